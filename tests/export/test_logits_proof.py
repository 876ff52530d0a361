"""The written model and the calibrated one agree bit for bit, and a difference is located."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from nvvl.calib_data.items import Item
from nvvl.calib_data.manifest import CalibrationSet
from nvvl.export.logits_proof import prove_logits
from nvvl.export.verify import verify
from nvvl.model.prompt import Message
from nvvl.quantize.presets import PRESETS
from nvvl.quantize.walk import quantize_checkpoint

Folders = Callable[[str], Path]

UP_PROJ = "language_model.backbone.layers.6.mixer.up_proj"
Q_PROJ = "language_model.backbone.layers.3.mixer.q_proj"


@pytest.fixture(scope="module")
def probes() -> list[Item]:
    picture = Image.frombytes("RGB", (48, 32), bytes(range(256)) * 18)
    question = Message("user", "<image>\nread the text")
    return [
        Item("picture", (question, Message("assistant", "the thing")), images=(picture,)),
        Item("text", (Message("user", "the sum of two and two"),)),
    ]


@pytest.mark.parametrize("preset", PRESETS)
def test_what_the_walk_writes_passes_every_check(
    source: Path, probes: list[Item], tmp_path: Path, preset: str
) -> None:
    out = tmp_path / "out"
    quantize_checkpoint(
        source, out, PRESETS[preset](), CalibrationSet(tuple(probes), "probes", len(probes))
    )
    report = verify(out, source, probe_items=probes)
    assert report.passed, report.summary_lines()
    assert report.checks[-1].passed is True
    assert all(check.passed for check in report.checks)


@pytest.mark.parametrize("preset", ["fp8", "nvfp4"])
def test_what_the_walk_writes_of_a_wider_source_passes_every_check(
    make_checkpoint: Callable[..., Path], probes: list[Item], tmp_path: Path, preset: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    wide = {
        f"{UP_PROJ}.weight": torch.randn(128, 64, generator=generator),
        f"{Q_PROJ}.weight": torch.randn(64, 64, generator=generator).half(),
    }
    source = make_checkpoint(
        tmp_path / "source", replace=wide, template="any", vision={"preferred_resolution": [32, 32]}
    )
    out = tmp_path / "out"
    quantize_checkpoint(
        source, out, PRESETS[preset](), CalibrationSet(tuple(probes), "probes", len(probes))
    )
    report = verify(out, source, probe_items=probes)
    assert report.passed, report.summary_lines()
    assert all(check.passed for check in report.checks)


@pytest.mark.parametrize("scheme", ["fp8", "nvfp4", "nvfp4-w4a16", "mixed"])
def test_sound_folder_gives_the_calibrated_models_logits(
    written: Folders, source: Path, probes: list[Item], scheme: str
) -> None:
    report = verify(written(scheme), source, probe_items=probes)
    logits, scales = report.checks[-2:]
    assert (logits.rule, logits.status) == ("L1", "passed")
    assert logits.detail.startswith("2 items, ")
    assert (scales.rule, scales.status) == ("L2", "passed"), scales.detail
    assert report.passed


@pytest.mark.parametrize(("key", "factor"), [("weight_amax", 1.25), ("input_amax", 0.25)])
def test_first_module_that_differs_is_named(
    copy_of: Folders, source: Path, probes: list[Item], key: str, factor: float
) -> None:
    out = copy_of("nvfp4")
    path = out / "calibration.amax"
    amaxes = load_file(path)
    amaxes[f"{UP_PROJ}.{key}"] *= factor
    save_file(amaxes, path)
    check, _ = prove_logits(out, source, probe_items=probes)
    assert check.passed is False
    assert len(check.faults) == 2
    assert all(fault.endswith(f"first at {UP_PROJ}") for fault in check.faults)


@pytest.mark.parametrize("factor", [1 / 100, 1e5])
@pytest.mark.parametrize("preset", ["fp8", "nvfp4"])
def test_scales_that_do_not_fit_what_linears_see_are_named(
    source: Path, probes: list[Item], tmp_path: Path, preset: str, factor: float
) -> None:
    out = tmp_path / "out"
    items = CalibrationSet(tuple(probes), "probes", len(probes))
    quantize_checkpoint(source, out, PRESETS[preset](), items)
    for name, leaf in (("calibration.amax", "input_amax"), ("model.safetensors", "input_scale")):
        tensors = load_file(out / name)
        for key in tensors:
            if key.endswith(leaf):
                tensors[key] *= factor
        save_file(tensors, out / name)
    logits, scales = prove_logits(out, source, probe_items=probes)
    assert logits.passed is True, logits.detail  # both sides are wrong alike
    assert scales.passed is False
    assert any(UP_PROJ in fault for fault in scales.faults)


def test_linear_that_one_model_alone_quantizes_is_named(
    copy_of: Folders, source: Path, probes: list[Item]
) -> None:
    out = copy_of("fp8")
    recipe = json.loads((out / "recipe.json").read_text())
    recipe["formats"][UP_PROJ] = "bf16"
    (out / "recipe.json").write_text(json.dumps(recipe))
    amaxes = load_file(out / "calibration.amax")
    kept = {name: amax for name, amax in amaxes.items() if UP_PROJ not in name}
    save_file(kept, out / "calibration.amax")
    check, _ = prove_logits(out, source, probe_items=probes)
    assert UP_PROJ in check.detail


def test_folder_that_does_not_load_fails_with_the_reason(
    copy_of: Folders, source: Path, probes: list[Item]
) -> None:
    out = copy_of("fp8")
    (out / "recipe.json").unlink()
    check, _ = prove_logits(out, source, probe_items=probes)
    assert check.passed is False
    assert "recipe.json" in check.detail


def test_source_without_a_tokenizer_reads_not_checked(
    written: Folders, source: Path, probes: list[Item], tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(source, tmp_path / "source"))
    (copied / "tokenizer.json").unlink()
    check, _ = prove_logits(written("fp8"), copied, probe_items=probes)
    assert check.passed is None
    assert "tokenizer.json: not found" in check.detail


def test_logits_read_not_checked_where_the_model_does_not_fit(
    written: Folders, source: Path, probes: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = written("nvfp4")
    stored = load_file(source / "model.safetensors")
    weights = sum(2 * tensor.numel() for tensor in stored.values())
    monkeypatch.setattr("nvvl.model.memory.free_memory", lambda: int(0.99 * weights))
    monkeypatch.setattr("nvvl.quantize.load.materialize", None)  # nothing is loaded
    report = verify(out, source, probe_items=probes)
    logits, scales = report.checks[-2:]
    assert (logits.rule, logits.status) == ("L1", "not checked")
    assert (scales.rule, scales.status, scales.detail) == ("L2", "not checked", logits.detail)
    assert f"{out}: needs about 0.0 GB of memory, 0.0 GB are free; end other" in logits.detail
    assert logits.detail.endswith("or pass --no-logits")
    assert report.passed


def test_logits_are_not_compared_where_tensors_failed(
    copy_of: Folders, source: Path, probes: list[Item]
) -> None:
    out = copy_of("fp8")
    (out / "manifest.json").write_text("{}")
    logits = verify(out, source, probe_items=probes).checks[-2]
    assert (logits.rule, logits.status) == ("L1", "not checked")
    assert "failed" in logits.detail
