"""Values of JSON files, as dataclasses take them or refuse them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from nvvl.errors import DataError
from nvvl.reports.json_values import read_object


@dataclass(frozen=True)
class Part:
    share: float


@dataclass(frozen=True, kw_only=True)
class Whole:
    name: str
    count: int
    flag: bool
    place: Path
    kind: Literal["a", "b"]
    parts: tuple[Part, ...]
    scores: Mapping[str, float | tuple[float, float]]
    limit: int | None
    extra: Mapping[str, str] = field(default_factory=dict)


VALUES: dict[str, Any] = {
    "name": "x",
    "count": 3,
    "flag": True,
    "place": "a/b",
    "kind": "a",
    "parts": [{"share": 1}, {"share": 0.5}],
    "scores": {"acc": 1.0, "ppl": [-2.5, 3]},
    "limit": None,
}


def test_values_become_what_the_annotations_say() -> None:
    assert read_object(Whole, VALUES, "run") == Whole(
        name="x",
        count=3,
        flag=True,
        place=Path("a/b"),
        kind="a",
        parts=(Part(1.0), Part(0.5)),
        scores={"acc": 1.0, "ppl": (-2.5, 3.0)},
        limit=None,
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": None}, "run.name: required text, got null"),
        ({"count": -1}, r"run.count: required a whole number from 0 to 2\^63 - 1, got -1"),
        ({"count": 10**30}, "run.count: required a whole number"),
        ({"count": True}, "run.count: required a whole number"),
        ({"flag": "false"}, 'run.flag: required true or false, got "false"'),
        ({"place": "a\0b"}, "run.place: required a path"),
        ({"place": "\ud800"}, "run.place: required a path"),
        ({"kind": ["a"]}, "run.kind: required one of a, b"),
        ({"parts": {}}, "run.parts: required a list"),
        ({"parts": [{"share": float("nan")}]}, r"run.parts\[0\].share: required a number from"),
        ({"parts": [{"share": 1e308}]}, r"run.parts\[0\].share: required a number from"),
        ({"parts": [{"share": 10**400}]}, r"run.parts\[0\].share: required a number from"),
        ({"parts": [{}]}, r"run.parts\[0\]: missing share"),
        ({"parts": [5]}, r"run.parts\[0\]: required an object, got 5"),
        ({"scores": {"acc": "x"}}, "run.scores.acc: required a number"),
        ({"scores": {"acc": [1.0]}}, "run.scores.acc: required 2 values"),
        ({"limit": "x"}, "run.limit: required a whole number"),
        ({"other": 1}, "run: unknown key other"),
    ],
)
def test_other_values_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"^{message}"):
        read_object(Whole, VALUES | changes, "run")


def test_numbers_may_be_infinite_where_that_is_said() -> None:
    values = {"share": float("inf")}
    assert read_object(Part, values, "part", finite=False) == Part(float("inf"))
    with pytest.raises(DataError, match=r"part\.share: required a number"):
        read_object(Part, {"share": "inf"}, "part", finite=False)
