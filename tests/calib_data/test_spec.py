from pathlib import Path
from typing import Any

import pytest

from nvvl.calib_data.source_spec import SOURCES, Documents, Pdf, Text
from nvvl.calib_data.spec import READY, SetSpec, find_spec
from nvvl.errors import DataError

TOML = """
name = "mine"
seed = 3
max_tokens = 2048

[[sources]]
kind = "pdf"
path = "invoices"
dpi = 72

[[sources]]
kind = "documents"
name = "pages"
count = 4
kinds = ["page", "passage"]
answers = false
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return path


def documents(**fields: Any) -> dict[str, Any]:
    return {"kind": "documents", "count": 1, **fields}


def test_toml_maps_to_dataclasses(tmp_path: Path) -> None:
    spec = SetSpec.from_toml(write(tmp_path, TOML))
    assert (spec.name, spec.seed, spec.max_tokens, spec.model) == ("mine", 3, 2048, "embedded")
    pdf, pages = spec.sources
    assert pdf == Pdf(name="pdf1", path="invoices", dpi=72)
    assert pages == Documents(name="pages", count=4, kinds=("page", "passage"), answers=False)


def test_plain_values_read_back_to_an_equal_spec(tmp_path: Path) -> None:
    spec = SetSpec.from_toml(write(tmp_path, TOML))
    assert SetSpec.from_dict(spec.to_dict()) == spec


@pytest.mark.parametrize("path", sorted(READY.glob("*.toml")), ids=lambda path: path.stem)
def test_ready_specs_are_read_and_say_how_many(path: Path) -> None:
    spec = SetSpec.from_toml(path)
    assert spec.name == path.stem
    assert find_spec(path.stem) == path
    total = {"default": 1024, "paper-1024": 1024, "nemotron-vlm-v2": 512, "cnn-dailymail": 512}
    assert sum(source.count or 0 for source in spec.sources) == total[path.stem]


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"name": "a"}, "sources: required at least one"),
        ({"sources": [documents()]}, "spec: missing name"),
        ({"name": "a", "sources": {"kind": "pdf"}}, "sources: required a list of tables"),
        ({"name": "a", "sources": [documents()], "max_token": 3}, "did you mean max_tokens"),
        ({"name": "a", "sources": [documents()], "max_tokens": 0}, "max_tokens: .* at least 1"),
        ({"name": "a", "sources": [documents()], "seed": True}, "seed: required int, got True"),
        ({"name": 3, "sources": [documents()]}, "name: required str, got 3"),
        ({"name": "a", "sources": [{"kind": "pdfs"}]}, "required one of .* did you mean pdf"),
        ({"name": "a", "sources": [{"count": 1}]}, "sources.kind: required one of"),
        ({"name": "a", "sources": [{"kind": "pdf"}]}, r"sources \(pdf\): missing path"),
        ({"name": "a", "sources": [{"kind": "documents"}]}, "documents: required count"),
        ({"name": "a", "sources": [documents(count=0)]}, "documents.count: .* at least 1, got 0"),
        ({"name": "a", "sources": [documents(count=2**33)]}, "documents.count: .* at most 4294967"),
        ({"name": "a", "sources": [documents(seed=-1)]}, "documents.seed: .* at least 0, got -1"),
        ({"name": "a", "sources": [documents()], "seed": 2**63}, "^seed: required at most 92233"),
        ({"name": "a", "sources": [documents(kinds=["song"])]}, "required one of line, .* 'song'"),
        ({"name": "a", "sources": [documents(kinds="line")]}, "kinds: required a list"),
        ({"name": "a", "sources": [documents(split="test")]}, "split: required one of train"),
        ({"name": "a", "sources": [documents(name="x"), documents(name="x")]}, "x is the name of"),
        ({"name": "a", "sources": [{"kind": "text", "path": ".", "words": 1}]}, "at least 2"),
        ({"name": "a", "sources": [{"kind": "text", "path": "a\0b"}]}, "text.path: .* without NUL"),
        (
            {"name": "a", "sources": [{"kind": "hub", "dataset": "d", "count": 1}]},
            "d: required one of text, messages, question and prompt",
        ),
        (
            {
                "name": "a",
                "sources": [
                    {"kind": "hub", "dataset": "d", "count": 1, "prompt": "?", "question": "q"}
                ],
            },
            "d: required one of text",
        ),
    ],
)
def test_what_cannot_be_a_spec_is_refused(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        SetSpec.from_dict(values)


def test_the_file_is_named_in_the_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"mine.toml: not valid TOML"):
        SetSpec.from_toml(write(tmp_path, "name = "))
    with pytest.raises(DataError, match=r"mine.toml: spec: unknown key 'nam'"):
        SetSpec.from_toml(write(tmp_path, 'nam = "x"'))
    with pytest.raises(DataError, match=r"absent.toml: cannot be read"):
        SetSpec.from_toml(tmp_path / "absent.toml")
    with pytest.raises(DataError, match=r"papr-1024: required a .toml file, or .* mean paper-1024"):
        find_spec("papr-1024")
    assert find_spec("some/mine.toml") == Path("some/mine.toml")


def test_every_kind_of_source_is_known_by_its_name() -> None:
    assert {kind: cls.kind for kind, cls in SOURCES.items()} == {kind: kind for kind in SOURCES}
    assert SOURCES["text"] is Text
