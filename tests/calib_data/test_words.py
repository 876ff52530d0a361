import random
import string

import pytest

from nvvl.calib_data.drawing import Split
from nvvl.calib_data.values import DRAWS, load_list
from nvvl.calib_data.words import Strings, belongs, load_fields

SPLITS: tuple[Split, ...] = ("train", "held_out")


def test_each_string_is_of_exactly_one_split() -> None:
    texts = [str(number) for number in range(4000)]
    held_out = [text for text in texts if belongs(text, "held_out")]
    assert not any(belongs(text, "train") for text in held_out)
    assert all(belongs(text, "train") for text in set(texts) - set(held_out))
    assert 200 <= len(held_out) <= 300  # one in sixteen


def test_the_split_of_a_string_never_changes() -> None:
    # trained models rely on it: what was held out must stay held out
    words = ["Bremen", "Cairo", "Castro", "Emma", "Berlin", "Madrid", "Lopez", "Alice"]
    assert [belongs(word, "held_out") for word in words] == [True] * 4 + [False] * 4


@pytest.mark.parametrize("kind", sorted(DRAWS))
@pytest.mark.parametrize("split", SPLITS)
def test_values_are_short_enough_printable_and_of_the_split(kind: str, split: Split) -> None:
    strings = Strings(random.Random(0), split)
    for _ in range(60):
        text = strings.value(kind, 12)
        assert 1 <= len(text) <= 12
        assert text == text.strip()
        assert set(text) <= set(string.printable[:95])
        assert belongs(text, split)


def test_a_kind_that_is_always_too_long_falls_back_to_a_number() -> None:
    text = Strings(random.Random(0), "train").value("phone", 5)
    assert text.replace(",", "").isdigit()


def test_codes_have_no_letters_that_fonts_draw_alike() -> None:
    rng = random.Random(0)
    drawn = "".join(DRAWS["code"](rng) for _ in range(2000))
    assert not set(drawn) & set("IOlo")


@pytest.mark.parametrize("split", SPLITS)
def test_lines_and_labels_keep_their_lengths(split: Split) -> None:
    strings = Strings(random.Random(0), split)
    assert all(4 <= len(strings.line(4, 28)) <= 28 for _ in range(100))
    labels = strings.labels(6, 9)
    assert len(set(labels)) == 6
    assert all(3 <= len(label) <= 9 for label in labels)


def test_lines_use_every_printable_character() -> None:
    strings = Strings(random.Random(0), "train")
    drawn = set("".join(strings.line(4, 28) for _ in range(6000)))
    assert drawn == set(map(chr, range(0x20, 0x7F)))


def test_every_field_has_a_kind_of_value_and_a_name_of_its_own() -> None:
    names = [name for name, _ in load_fields()]
    assert len(names) == len(set(names)) >= 150
    assert {kind for _, kind in load_fields()} <= set(DRAWS)


def test_held_out_prose_shares_no_verse_with_training() -> None:
    assert not set(load_list("prose_train.txt")) & set(load_list("prose_held_out.txt"))
