"""``nvvl calib build`` and ``show``, and the sets a built one must not overlap with."""

import json
from pathlib import Path

import huggingface_hub
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from nvvl.calib_data.manifest import load_calibration_set
from nvvl.cli import app
from nvvl.errors import DataError
from nvvl.reports import overlap
from nvvl.reports.suites import SUITES

SPEC = """
name = "mine"
[[sources]]
kind = "documents"
name = "pages"
kinds = ["card", "passage"]
count = 4
"""


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def _few_items(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(overlap, "NUM_ITEMS", 3)
    monkeypatch.setattr(overlap, "cache_folder", lambda: tmp_path / "cache")


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(SPEC)
    return path


def test_set_is_built_shown_and_taken_by_quantize(
    spec: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "set"
    built = run("calib", "build", spec, out, "--model", tiny_checkpoint)
    assert built.exit_code == 0, built.output
    assert "4 items in" in built.stdout
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["overlap"] == {"suites": [], "apart": list(SUITES), "found": []}
    assert manifest["spec"]["model"] == str(tiny_checkpoint)
    shown = run("calib", "show", out, "--samples", "2")
    assert "contact_sheet.png" in shown.stdout
    assert f"{manifest['summary']['text_tokens']:,}" in shown.stdout
    listed = json.loads(run("calib", "show", out, "--samples", "4", "--json").stdout)
    assert listed["summary"] == manifest["summary"]
    assert len(listed["items"]) == 4
    quantized = run(
        *("quantize", "fp8", tiny_checkpoint, tmp_path / "fp8", "--calib", out, "--json"),
        *("--device", "cpu"),
    )
    assert quantized.exit_code == 0, quantized.output
    used = json.loads((tmp_path / "fp8" / "manifest.json").read_text())["calibration"]
    assert used["items"] == [{"id": row["id"], "sha256": row["sha256"]} for row in listed["items"]]


def test_model_by_hub_id_counts_tokens_without_its_weights(
    spec: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []

    def download(_: str, *, allow_patterns: list[str]) -> str:
        fetched.extend(allow_patterns)
        return str(tiny_checkpoint)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    spec.write_text(f'{SPEC}\n[[sources]]\nkind = "folder"\npath = "absent"\n')
    refused = run("calib", "build", spec, tmp_path / "set", "--model", "org/tiny-vl")
    assert refused.exit_code == 2
    assert "folder2: " in refused.stderr
    assert "*.json" in fetched
    assert "*.safetensors" not in fetched


def test_own_test_set_must_not_overlap(spec: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    exam = tmp_path / "exam"
    exam.mkdir()
    card = load_calibration_set("default", num_items=1).items[0].images[0]
    card.resize((180, 180), Image.Resampling.LANCZOS).save(exam / "q1.jpg")
    options = ("--model", tiny_checkpoint, "--against", exam)
    refused = run("calib", "build", spec, tmp_path / "set", *options)
    assert refused.exit_code == 2
    assert "pages/card-train-0-0 shares a picture with q1.jpg" in refused.stderr
    assert not (tmp_path / "set").exists()
    kept = run("calib", "build", spec, tmp_path / "set", *options, "--allow-overlap", "--json")
    assert kept.exit_code == 0, kept.output
    (found,) = json.loads(kept.stdout)["overlap"]["found"]
    assert (found["suite"], found["other_id"]) == (str(exam), "q1.jpg")


def test_every_suite_is_compared_and_sets_must_exist(tmp_path: Path) -> None:
    sets = overlap.suite_sets()
    assert list(sets) == list(SUITES)
    assert [item.item_id for item in sets["line"]()] == ["line-0-0", "line-0-1", "line-0-2"]
    with pytest.raises(DataError, match="absent: no such file or folder"):
        overlap.own_sets([str(tmp_path / "absent")])
    with pytest.raises(DataError, match=r"video: is the name of a suite.* as \./video"):
        overlap.own_sets(["video"])


def test_suites_are_kept_for_the_next_set_of_own_pictures(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "images").mkdir()
    Image.effect_noise((64, 64), 90).convert("RGB").save(tmp_path / "images" / "a.png")
    spec = tmp_path / "own.toml"
    spec.write_text('name = "own"\n[[sources]]\nkind = "folder"\npath = "images"\n')
    kept = []
    for _ in range(2):
        built = run(
            *("calib", "build", spec, tmp_path / "set", "--model", tiny_checkpoint, "--overwrite")
        )
        assert built.exit_code == 0, built.output
        kept.append({p.name: p.stat().st_mtime_ns for p in (tmp_path / "cache").iterdir()})
    assert kept[0] == kept[1]
    digest = overlap.kept_prints().digest
    assert sorted(kept[0]) == sorted(f"suite-{name}-{digest}.npz" for name in SUITES)
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert manifest["overlap"] == {"suites": list(SUITES), "apart": [], "found": []}


def test_ids_of_any_characters_name_files(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    row = {"id": "../x\0y\n", "image": "a.png", "messages": [{"role": "user", "content": "?"}]}
    (tmp_path / "items.jsonl").write_text(json.dumps(row))
    shown = run("calib", "show", tmp_path / "items.jsonl", "--save", tmp_path / "saved")
    assert shown.exit_code == 0, shown.output
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["0-..-x-y--0.png"]


@pytest.mark.parametrize("change", [{"summary": {}}, {"sources": 5}, {"overlap": {"found": [1]}}])
def test_numbers_of_a_set_that_are_none_are_one_line(
    change: dict[str, object], spec: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "set"
    assert run("calib", "build", spec, out, "--model", tiny_checkpoint).exit_code == 0
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps(manifest | change))
    shown = run("calib", "show", out)
    assert shown.exit_code == 2, shown.output
    assert "manifest.json: not what nvvl calib build writes" in shown.stderr
