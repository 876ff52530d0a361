"""What recipes and specs share: keys, choices and files of TOML, in the caller's error class."""

import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nvvl.errors import DataError, NvvlError, RecipeError
from nvvl.toml_tables import load_preset, read_toml, require_choice, require_keys, toml_lines


@dataclass(frozen=True, kw_only=True)
class Dish:
    name: str
    num_eggs: int
    salt: bool = False


@pytest.mark.parametrize("error", [DataError, RecipeError])
@pytest.mark.parametrize(
    ("values", "given", "message"),
    [
        ({"name": "x", "num_egs": 2}, (), "dish: unknown key 'num_egs'; did you mean num_eggs"),
        ({"name": "x", "num_eggs": 2, "q": 1}, (), "dish: unknown key 'q'$"),
        ({"salt": True}, (), "dish: missing name, num_eggs"),
        ({"name": "x"}, ("name", "num_eggs"), "dish: unknown key 'name'"),
    ],
)
def test_other_keys_than_fields_are_refused(
    error: type[NvvlError], values: dict[str, Any], given: tuple[str, ...], message: str
) -> None:
    with pytest.raises(error, match=message):
        require_keys(Dish, values, "dish", error, given=given)


def test_given_fields_are_not_missing() -> None:
    with pytest.raises(DataError, match="dish: missing num_eggs"):
        require_keys(Dish, {"name": "x"}, "dish", DataError)
    require_keys(Dish, {"name": "x"}, "dish", DataError, given=("num_eggs",))


@pytest.mark.parametrize(
    ("value", "message"),
    [("scop", "kind: required one of soup, pie, got 'scop'; did you mean soup"), (3, "got 3$")],
)
def test_value_that_is_no_choice_is_refused(value: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        require_choice(value, ("soup", "pie"), "kind", DataError)


def _refuse(_: object) -> None:
    raise DataError("faulty")


@pytest.mark.parametrize(
    ("content", "build", "message"),
    [
        (None, dict, "cannot be read"),
        (b"name = ", dict, "not valid TOML"),
        (b'name = "\xff"', dict, "not valid TOML"),
        (b"", _refuse, "faulty"),
    ],
)
def test_errors_of_a_file_begin_with_its_path(
    tmp_path: Path, content: bytes | None, build: Callable[[object], object], message: str
) -> None:
    path = tmp_path / "dish.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=rf"dish\.toml: {message}") as error:
        read_toml(path, build, DataError)
    assert str(error.value).startswith(str(path))


def test_lines_read_back_to_the_same_values() -> None:
    values = {"a": '😀 "quoted" \\ \t\n \x7f', "b": 2e-06, "c": True, "d": ["x", "ß"], "e": [1, -1]}
    assert tomllib.loads("\n".join(toml_lines(values))) == values


def test_preset_is_made_and_file_is_read(tmp_path: Path) -> None:
    presets = {"soup": lambda: "made"}
    assert load_preset("soup", presets, str) == "made"
    assert load_preset(tmp_path / "x.toml", presets, str) == str(tmp_path / "x.toml")
    with pytest.raises(RecipeError, match=r"sop: required one of soup, or .*; did you mean soup"):
        load_preset("sop", presets, str)
