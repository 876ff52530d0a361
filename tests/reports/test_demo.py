import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nvvl import cpu
from nvvl.calib_data.manifest import load_calibration_set
from nvvl.cli import app
from nvvl.errors import OutputError
from nvvl.quantize.presets import load_recipe
from nvvl.quantize.walk import quantize_checkpoint
from nvvl.reports import demo, demo_export
from nvvl.reports.demo import _say_what_is_missing, run_demo
from nvvl.reports.run import load_run

pytestmark = pytest.mark.usefixtures("memory_for_engines")


@pytest.fixture
def source(make_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A tiny model with every key of config.json that servers read."""
    return make_checkpoint(
        tmp_path / "bf16", template="nemotron_h", vision={"preferred_resolution": [32, 32]}
    )


def test_demo_proves_and_compares_every_format(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    steps = []
    result = run_demo(
        source,
        out,
        num_items=1,
        num_calibration_items=2,
        num_distill_steps=1,
        num_sweep_items=1,
        progress=lambda stage, *_: steps.append(stage.split(":")[0]),
    )
    assert {
        name: [check.rule for check in proof.checks if check.passed is False]
        for name, proof in result.proofs.items()
    } == {"fp8": [], "nvfp4": [], "nvfp4-rotated": [], "nvfp4-qad": []}
    assert result.passed
    bf16, fp8, nvfp4, _, qad = result.report.runs
    labels = ["BF16", "FP8", "NVFP4", "NVFP4-ROTATED", "NVFP4-QAD"]
    assert [run.label for run in result.report.runs] == labels
    assert [run.verified for run in result.report.runs] == [None, True, True, True, True]
    assert bf16.weights_bytes > fp8.weights_bytes > nvfp4.weights_bytes
    assert qad.weights_bytes == nvfp4.weights_bytes
    assert bf16.kl is not None
    assert nvfp4.kl is not None
    assert nvfp4.kl.estimate > bf16.kl.estimate == 0
    assert list(dict.fromkeys(steps)) == [
        "quantize fp8",
        "verify fp8",
        "quantize nvfp4",
        "graphs of nvfp4",
        "engines of nvfp4",
        "verify nvfp4",
        "rotate",
        "quantize nvfp4-rotated",
        "verify nvfp4-rotated",
        "distill nvfp4-rotated",
        "verify nvfp4-qad",
        "evaluate",
        "sweep evs",
        "sweep tiles",
    ]
    assert [(sweep.kind, len(sweep.points)) for sweep in result.report.sweeps] == [
        ("evs", 2 * 5),
        ("tiles", 2 * 3),  # pages have the same tiles of 32 px under 4 and 6
    ]
    assert all(path.exists() for path in result.outputs.values())
    proved = {check.rule: check.passed for check in result.proofs["nvfp4"].checks}
    assert [proved[f"O{number}"] for number in range(1, 6)] == [True] * 5
    engines = json.loads((out / "nvfp4-engines" / "manifest.json").read_text())["engines"]
    assert engines.keys() == {"vision", "prefill", "decode"}
    assert result.notes == ()
    page = result.outputs["report"].read_text(encoding="utf-8")
    assert result.outputs["report"] == out / "report.html"
    assert "for sm120, built and not run: vision" in page
    assert "FP8, language_model.backbone.layers" in page
    assert "NVFP4, language_model.backbone.layers" in page
    assert page.count("<dt>Rotated</dt><dd>into bases learned from 2 items of default") == 2
    assert page.count("<dt>Distilled</dt><dd>qad_nvfp4_embedded, 1 steps at a rate of") == 1
    card = (out / "cards" / "NVFP4-QAD" / "README.md").read_text(encoding="utf-8")
    assert "\n- Rotated: into bases learned" in card
    assert "\n- Distilled: qad_nvfp4_embedded, 1 steps" in card
    assert load_run(out / "runs" / "nvfp4").model == out / "nvfp4"


def test_short_demo_leaves_out_what_takes_long(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    result = run_demo(source, out, short=True, num_items=1, num_calibration_items=2)
    assert [run.label for run in result.report.runs] == ["BF16", "FP8", "NVFP4"]
    assert result.passed
    assert list(result.proofs) == ["fp8", "nvfp4"]
    assert not result.report.sweeps
    assert not any((out / name).exists() for name in ("rotated", "nvfp4-qad", "sweeps"))
    assert all(path.exists() for path in result.outputs.values())
    assert any("nvvl demo --long" in note for note in result.notes)
    # packed from FP8's scales, to the bytes of a calibration of its own
    recipe = replace(load_recipe("nvfp4"), num_calibration_items=2)
    items = load_calibration_set("default", num_items=2)
    quantize_checkpoint(source, tmp_path / "nvfp4", recipe, items)
    packed, alone = (
        (folder / "nvfp4" / "model.safetensors").read_bytes() for folder in (out, tmp_path)
    )
    assert packed == alone


@pytest.mark.parametrize(("speedup", "is_short"), [(1, True), (2, False), (6, True)])
def test_demo_is_short_where_the_whole_takes_more_than_ten_minutes(
    speedup: int, is_short: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[bool] = []

    def stop(source: Path, out: Path, *, short: bool, **_: object) -> None:
        asked.append(short)
        raise OutputError("enough")

    monkeypatch.setattr(cpu, "bf16_speedup", lambda: speedup)
    monkeypatch.setattr(demo, "run_demo", stop)
    for options in ((), ("--long",), ("--short",)):
        CliRunner().invoke(app, ["demo", "-o", str(tmp_path), *options])
    assert asked == [is_short, False, True]


def test_demo_says_what_it_could_not_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo_export, "find_spec", lambda name: None)
    assert demo_export.export_graphs(tmp_path) is None
    assert demo_export.build_engines(tmp_path, tmp_path) is None
    assert _say_what_is_missing({}) == (
        "nvfp4 graphs: not built, needs pip install 'nvvl[onnx]'",
        "nvfp4 engines: not built, needs pip install 'nvvl[onnx,tensorrt-rtx]'",
    )


def test_demo_does_not_replace_what_nvvl_did_not_write(source: Path, tmp_path: Path) -> None:
    mine = tmp_path / "demo" / "fp8" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("keep")
    with pytest.raises(OutputError, match=r"no manifest\.json of an output of nvvl"):
        run_demo(source, tmp_path / "demo", num_items=1, num_calibration_items=2, overwrite=True)
    with pytest.raises(OutputError, match="required a folder for the demo, got a file"):
        run_demo(source, mine, num_items=1)
    assert mine.read_text() == "keep"


def test_demo_replaces_only_its_own_outputs_of_the_same_settings(
    source: Path,
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "demo"
    items = load_calibration_set("default", num_items=2)
    quantize_checkpoint(
        source, out / "fp8", replace(load_recipe("fp8"), num_calibration_items=2), items
    )
    before = (out / "fp8" / "manifest.json").read_bytes()
    with pytest.raises(OutputError, match="a new or empty folder, or that of a demo, which has d"):
        run_demo(source, out)
    assert [path.name for path in out.iterdir()] == ["fp8"]
    assert (out / "fp8" / "manifest.json").read_bytes() == before

    class BegunError(Exception):
        pass

    def begin(*_: object, **__: object) -> None:
        raise BegunError

    monkeypatch.setattr(demo, "load_calibration_set", begin)
    for overwrite, short in ((True, False), (False, False), (False, True)):
        with pytest.raises(BegunError):
            run_demo(source, out, num_items=5, overwrite=overwrite, short=short)
    with pytest.raises(OutputError, match=r"a demo with items 5, asked for 6; .* --overwrite"):
        run_demo(source, out, num_items=6)
    other = make_checkpoint(tmp_path / "other", seed=1)
    with pytest.raises(OutputError, match="holds a demo with model_sha256"):
        run_demo(other, out, num_items=5)
    (out / "report.md").write_text("mine")
    with pytest.raises(OutputError, match=r"report\.md: is there and was not written by nvvl"):
        run_demo(source, out, num_items=5)
