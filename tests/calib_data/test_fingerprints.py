import io
from dataclasses import replace

import pytest
from PIL import Image
from skimage import data as photographs

from nvvl.calib_data.documents import KINDS, make_document
from nvvl.calib_data.fingerprints import Fingerprints, find_overlaps
from nvvl.calib_data.items import Item, document_item
from nvvl.calib_data.texts import text_passage
from nvvl.model.prompt import Message
from nvvl.model.video import Video

WORDS = [f"word{index}" for index in range(14)]


def picture_item(image: Image.Image, name: str = "a") -> Item:
    return Item(name, (Message("user", "<image>\nRead."),), (image,))


def text_item(text: str, name: str = "a") -> Item:
    return Item(name, (Message("user", text),))


def overlaps(ours: list[Item], theirs: list[Item]) -> list[tuple[str, str, str]]:
    found = find_overlaps(Fingerprints.of(ours), Fingerprints.of(theirs), "exam")
    return [(overlap.item_id, overlap.other_id, overlap.kind) for overlap in found]


def copy_of(image: Image.Image, scale: float = 0.7, quality: int = 50) -> Image.Image:
    """Scale a picture and compress it with loss, as a copy on the web would be."""
    size = (round(image.width * scale), round(image.height * scale))
    file = io.BytesIO()
    image.resize(size).save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "video"])
def test_copies_of_documents_are_found_and_other_documents_are_not(kind: str) -> None:
    exam = [
        document_item(make_document(kind, seed, split="held_out"), f"exam{seed}")
        for seed in range(40)
    ]
    others = [
        document_item(make_document(kind, seed, split="train"), f"train{seed}")
        for seed in range(40)
    ]
    assert overlaps(others, exam) == []
    copies = [
        picture_item(copy_of(item.images[-1]), item.item_id.replace("exam", "copy"))
        for item in exam
    ]
    assert overlaps(copies, exam) == [
        (f"copy{name}", f"exam{name}", "picture") for name in sorted(map(str, range(40)))
    ]


def test_copies_of_photographs_are_found() -> None:
    names = ("astronaut", "coffee", "chelsea", "rocket", "page", "text")
    images = {name: Image.fromarray(getattr(photographs, name)()).convert("RGB") for name in names}
    exam = [picture_item(image, name) for name, image in images.items()]
    assert len(overlaps(exam, exam)) == len(names)
    for name, image in images.items():
        assert overlaps([picture_item(copy_of(image, 0.6, 40), "x")], exam) == [
            ("x", name, "picture")
        ]
        others = [item for item in exam if item.item_id != name]
        assert overlaps([picture_item(image, "x")], others) == []


def test_blank_pictures_equal_nothing() -> None:
    blank = picture_item(Image.new("RGB", (64, 64), "white"))
    assert overlaps([blank], [blank]) == []


def test_first_and_last_frame_of_a_video_count() -> None:
    frames = [make_document("card", seed, split="train").images[0] for seed in range(3)]
    video = Item("v", (Message("user", "<video>\n?"),), videos=(Video(frames, 1.0, (0, 1, 2)),))
    found = [overlaps([picture_item(frame)], [video]) for frame in frames]
    assert [len(pairs) for pairs in found] == [1, 0, 1]


def test_runs_of_thirteen_words_are_shared_whatever_case_and_punctuation() -> None:
    text = "Before. " + ", ".join(WORDS).upper() + "! After"
    assert overlaps([text_item(text)], [text_item("say " + " ".join(WORDS), "b")]) == [
        ("a", "b", "text")
    ]
    twelve = " ".join(WORDS[:12])
    assert overlaps([text_item(f"x {twelve} y")], [text_item(f"z {twelve} w", "b")]) == []


def test_short_texts_count_as_a_whole_and_only_without_pictures() -> None:
    assert overlaps([text_item("What is 2 + 2?")], [text_item("what is 2+2", "b")])
    assert not overlaps([text_item("What is 2 + 2?")], [text_item("What is 2 + 3?", "b")])
    first, second = (
        picture_item(make_document("card", seed, split="train").images[0]) for seed in (1, 2)
    )
    assert overlaps([first], [second]) == []


def test_shared_instruction_is_no_overlap_but_a_shared_answer_is() -> None:
    asked = "<image>\n" + " ".join(WORDS)
    pictures = [make_document("card", seed, split="train").images[0] for seed in (1, 2)]
    items = [
        Item(name, (Message("user", asked), Message("assistant", name)), images=(picture,))
        for name, picture in zip("ab", pictures, strict=True)
    ]
    assert overlaps(items[:1], items[1:]) == []
    answer = Message("assistant", asked.removeprefix("<image>\n"))
    items = [replace(item, messages=(Message("user", "<image>"), answer)) for item in items]
    assert overlaps(items[:1], items[1:]) == [("a", "b", "text")]


def test_words_without_spaces_are_shared_too() -> None:
    text = "\u4e8c\u4e09\u56db\u4e94\u516d\u4e03\u516b\u4e5d\u5341\u767e\u5343\u4e07\u4ebf"
    assert overlaps([text_item(f"\u4e00{text}")], [text_item(f"x {text}", "b")])
    assert not overlaps([text_item(f"\u4e00{text[1:]}")], [text_item(f"x {text[1:]}", "b")])


def test_passages_of_the_two_splits_share_no_run_of_words() -> None:
    ours = [text_item(text_passage(seed, "train"), f"t{seed}") for seed in range(50)]
    theirs = [text_item(text_passage(seed, "held_out"), f"h{seed}") for seed in range(50)]
    assert overlaps(ours, theirs) == []
    assert len(overlaps(theirs, theirs)) == 50
