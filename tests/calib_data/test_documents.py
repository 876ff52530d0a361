import hashlib
import os
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import ImageStat

from nvvl.calib_data.documents import KINDS, document_messages, make_document
from nvvl.calib_data.drawing import Split
from nvvl.calib_data.texts import text_passage
from nvvl.calib_data.words import belongs
from nvvl.errors import DataError

SPLITS: tuple[Split, ...] = ("train", "held_out")
ANSWER_CHARS = set(string.printable[:95]) | {"\n"}

# Of the questions and answers of seeds 0 to 9, with strings and fonts of training.
TURNS = {
    "line": "4e4f8f983551b1a5",
    "lines": "ae6a15afbe97c003",
    "card": "df3b53008e23b8c1",
    "table": "44f24eb3bbfeb27f",
    "receipt": "891a4754fef63931",
    "text": "f1679212abdbf27c",
    "page": "03bbf7c38facc643",
    "two_pages": "aa38f4221c631539",
    "chart": "0ac868814c63d90b",
    "video": "e13943ae4be499f6",
    "line_chart": "40ea1784b3ce6024",
    "pie_chart": "4be2047058ece8f2",
    "scrambled_lines": "218bad7637d1dec3",
    "scrambled_card": "89efd3c2e68fa80d",
}


def digest_turns(kind: str) -> str:
    turns = [make_document(kind, seed, split="train").turns for seed in range(10)]
    return hashlib.sha256(repr(turns).encode()).hexdigest()[:16]


def digest_pixels(kind: str) -> str:
    digest = hashlib.sha256()
    for seed in range(4):
        document = make_document(kind, seed, split="held_out", fonts="held_out")
        for image in document.images:
            digest.update(image.tobytes())
        digest.update(repr(document.glyphs).encode())
    return digest.hexdigest()


@pytest.mark.parametrize("kind", KINDS)
def test_questions_and_answers_of_a_seed_never_change(kind: str) -> None:
    assert digest_turns(kind) == TURNS[kind]


def test_another_process_draws_the_same_pixels() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_documents as t; "
        "print(*(t.digest_pixels(kind) for kind in reversed(t.KINDS)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, __file__.rpartition("/")[0]],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [digest_pixels(kind) for kind in reversed(KINDS)]


def test_settings_of_matplotlib_change_no_pixel(tmp_path: Path) -> None:
    settings = tmp_path / "matplotlibrc"
    settings.write_text(
        "lines.linewidth: 9\nlines.antialiased: False\npatch.antialiased: False\n"
        "lines.scale_dashes: False\nlines.markeredgewidth: 5\nfigure.dpi: 300\n"
        "savefig.dpi: 300\nfigure.facecolor: red\npath.snap: True\npatch.linewidth: 8\n"
        "path.simplify_threshold: 1.0\npath.sketch: 5, 20, 2\n"
    )
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_documents as t; "
        "print(t.digest_pixels('line_chart'), t.digest_pixels('pie_chart'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, __file__.rpartition("/")[0]],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"MATPLOTLIBRC": str(settings)},
    )
    assert done.stdout.split() == [digest_pixels(kind) for kind in ("line_chart", "pie_chart")]


def test_seeds_and_splits_give_other_documents() -> None:
    turns = {
        make_document("card", seed, split=split).turns for seed in range(20) for split in SPLITS
    }
    assert len(turns) == 40


def test_other_fonts_draw_other_pixels() -> None:
    one, two = (make_document("line", 3, split="train", fonts=fonts) for fonts in SPLITS)
    assert one.images[0].tobytes() != two.images[0].tobytes()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", SPLITS)
def test_answers_are_printable_and_of_the_split(kind: str, split: Split) -> None:
    for seed in range(20):
        for question, answer in make_document(kind, seed, split=split).turns:
            assert question
            assert set(answer) <= ANSWER_CHARS
            assert answer == answer.strip() != ""
            # lines of a transcription repeat values that were drawn for the split one by one
            assert belongs(answer, split) or question == "Transcribe the document."


@pytest.mark.parametrize("kind", KINDS)
def test_no_held_out_answer_is_an_answer_in_training(kind: str) -> None:
    train, held_out = (
        {answer for seed in range(40) for _, answer in make_document(kind, seed, split=split).turns}
        for split in SPLITS
    )
    assert len(held_out) > 35
    assert not train & held_out


@pytest.mark.parametrize("kind", KINDS)
def test_each_question_of_a_document_has_one_answer(kind: str) -> None:
    for seed in range(30):
        questions = [question for question, _ in make_document(kind, seed, split="train").turns]
        assert len(set(questions)) == len(questions) >= 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fonts", SPLITS)
def test_every_glyph_lies_inside_its_image_and_stands_out(kind: str, fonts: Split) -> None:
    for seed in range(12):
        document = make_document(kind, seed, split="held_out", fonts=fonts)
        assert len(document.glyphs) == len(document.images)
        for image, glyphs in zip(document.images, document.glyphs, strict=True):
            assert image.mode == "RGB"
            assert image.width % 256 == 0 == image.height % 256
            grey = image.convert("L")
            for glyph in glyphs:
                assert 0 <= glyph.x0 < glyph.x1 <= image.width
                assert 0 <= glyph.y0 < glyph.y1 <= image.height
                low, high = ImageStat.Stat(grey.crop(glyph.box)).extrema[0]
                assert high - low >= 25, (seed, glyph)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_asked_for_stands_on_the_page(kind: str) -> None:
    for seed in range(20):
        document = make_document(kind, seed, split="train")
        shown = "".join(glyph.char for glyphs in document.glyphs for glyph in glyphs)
        for question, answer in document.turns:
            reads_axis = kind in ("chart", "line_chart") and question.startswith(
                "What is the value"
            )
            for line in answer.split("\n"):
                assert reads_axis or line.replace(" ", "") in shown


@pytest.mark.parametrize("kind", KINDS)
def test_texts_do_not_overlap(kind: str) -> None:
    # letters of italics reach over their neighbours; others share no more than a corner
    for seed in range(12):
        for glyphs in make_document(kind, seed, split="train").glyphs:
            for index, one in enumerate(glyphs):
                for two in glyphs[index + 2 :]:
                    width = min(one.x1, two.x1) - max(one.x0, two.x0)
                    height = min(one.y1, two.y1) - max(one.y0, two.y0)
                    if width > 0 and height > 0:
                        areas = [(g.x1 - g.x0) * (g.y1 - g.y0) for g in (one, two)]
                        assert width * height <= 0.25 * min(areas), (seed, one, two)


def test_sizes_are_whole_tiles() -> None:
    sizes = {make_document("page", seed, split="train").images[0].size for seed in range(40)}
    assert sizes == {(512, 512), (512, 256), (256, 512)}
    assert [image.size for image in make_document("two_pages", 0, split="train").images] == [
        (256, 256)
    ] * 2


def test_video_has_frames_half_a_second_apart() -> None:
    for seed in range(20):
        document = make_document("video", seed, split="train")
        video = document.video
        assert video is not None
        assert 4 <= len(video.frames) <= 8
        assert video.fps == 2.0
        assert video.frame_indices == tuple(range(len(video.frames)))
        assert video.frames == document.images


def test_video_answers_are_those_of_the_frame_asked_for() -> None:
    for seed in range(40):
        document = make_document("video", seed, split="train")
        for question, answer in document.turns:
            if question.endswith("seconds?"):
                frame = int(float(question.split()[-2]) * 2)
                shown = "".join(glyph.char for glyph in document.glyphs[frame])
                assert answer.replace(" ", "") in shown


def test_what_stands_still_in_a_video_has_the_same_pixels() -> None:
    document = make_document("video", 1, split="train")
    first, second = document.images[:2]
    grounds = [image.crop((0, 0, 6, 256)).tobytes() for image in (first, second)]
    assert grounds[0] == grounds[1]
    assert first.tobytes() != document.images[-1].tobytes()


def test_messages_alternate_and_the_first_has_the_media() -> None:
    cases = [("card", "<image>\n"), ("two_pages", "<image>\n<image>\n"), ("video", "<video>\n")]
    for kind, media in cases:
        document = make_document(kind, 0, split="train")
        messages = document_messages(document)
        assert [message.role for message in messages] == ["user", "assistant"] * len(document.turns)
        assert messages[0].content == media + document.turns[0][0]
        assert [message.content for message in messages[1::2]] == [a for _, a in document.turns]
        assert not any("<image>" in m.content or "<video>" in m.content for m in messages[1:])


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"kind": "letter", "split": "train"}, "required one of line, lines, card, .*got 'letter'"),
        ({"kind": "line", "split": "test"}, "split: required train or held_out, got 'test'"),
        ({"kind": "line", "split": "train", "fonts": "all"}, "fonts: .* got 'all'"),
    ],
)
def test_unknown_names_are_refused(arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        make_document(seed=0, **arguments)


def test_passages_are_prose_of_their_split() -> None:
    train, held_out = ({text_passage(seed, split) for seed in range(30)} for split in SPLITS)
    assert not train & held_out
    assert all(100 < len(text) < 4000 for text in train | held_out)
    assert text_passage(5, "train") == text_passage(5, "train")
