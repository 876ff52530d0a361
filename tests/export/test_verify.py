"""A sound folder passes every check; every fault put into one is found and named."""

import json
import re
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from nvvl.cli import app
from nvvl.errors import CheckpointError, EngineError, HardwareError, OutputError
from nvvl.export.checks import Check
from nvvl.export.verify import VerificationReport, verify
from nvvl.export.view import open_view
from nvvl.model.config import VLMConfig
from nvvl.model.hashing import hash_file
from nvvl.quantize.targets import list_linears

Folders = Callable[[str], Path]

LAYERS = "language_model.backbone.layers"
IN_PROJ = f"{LAYERS}.0.mixer.in_proj"
UP_PROJ = f"{LAYERS}.6.mixer.up_proj"
SCHEMES = ("fp8", "nvfp4", "nvfp4-w4a16", "mixed")


def prove(out: Path, source: Path | None) -> VerificationReport:
    return verify(out, source, logits=False)


def failed(report: VerificationReport) -> list[Check]:
    return [check for check in report.checks if check.passed is False]


def named(report: VerificationReport, rule: str) -> str:
    """Return everything that the failed checks of a rule say."""
    return "\n".join(f for check in failed(report) if check.rule == rule for f in check.faults)


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def flip_byte(path: Path, name: str, *, byte: int = -1) -> None:
    """Flip one bit of one byte of one tensor, where it lies in the file."""
    data = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    start, end = json.loads(data[8 : 8 + length])[name]["data_offsets"]
    offset = 8 + length + (range(start, end)[byte])
    data[offset] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_sound_folder_passes_every_check(written: Folders, source: Path, scheme: str) -> None:
    report = prove(written(scheme), source)
    assert report.passed, report.summary_lines()
    unchecked = {check.rule for check in report.checks if check.passed is None}
    assert unchecked <= {"L1", "L2"}
    assert "least" in next(check.detail for check in report.checks if check.rule == "D9")


@pytest.mark.parametrize("scheme", ["nvfp4", "fp8"])
@pytest.mark.parametrize(
    ("name", "byte", "rules"),
    [
        (f"{IN_PROJ}.weight", 5, {"V2", "H1"}),
        (f"{IN_PROJ}.input_scale", -1, {"V4", "H1"}),
        ("language_model.backbone.norm_f.weight", 0, {"V1", "H1"}),
        ("language_model.backbone.embeddings.weight", 777, {"V1", "H1"}),
        (f"{LAYERS}.0.mixer.A_log", 0, {"V1", "H1"}),
        ("vision_model.radio_model.model.blocks.1.mlp.fc2.weight", 9, {"V1", "H1"}),
        ("vision_model.radio_model.summary_idxs", 0, {"V1", "H1"}),
        ("mlp1.3.weight", -1, {"V1", "H1"}),
    ],
)
def test_flipped_byte_is_found_and_named(
    copy_of: Folders, source: Path, scheme: str, name: str, byte: int, rules: set[str]
) -> None:
    out = copy_of(scheme)
    flip_byte(out / "model.safetensors", name, byte=byte)
    report = prove(out, source)
    assert not report.passed
    for rule in rules:
        assert name in named(report, rule)
    other = set(re.findall(r"^([\w.]+)(?=:)", named(report, "H1"), re.MULTILINE)) - {name}
    assert other == set()


@pytest.mark.parametrize(
    ("scheme", "leaf", "byte", "rules"),
    [
        ("nvfp4", "weight_scale", 3, {"V3", "H1"}),
        ("nvfp4", "weight_scale_2", 2, {"V4", "H1"}),
        ("nvfp4-w4a16", "weight_scale_2", 0, {"V4", "H1"}),
        ("fp8", "weight_scale", 0, {"V4", "H1"}),
    ],
)
def test_flipped_byte_in_a_scale_is_found_and_named(
    copy_of: Folders, source: Path, scheme: str, leaf: str, byte: int, rules: set[str]
) -> None:
    out = copy_of(scheme)
    flip_byte(out / "model.safetensors", f"{UP_PROJ}.{leaf}", byte=byte)
    report = prove(out, source)
    for rule in rules:
        assert f"{UP_PROJ}.{leaf}" in named(report, rule)


def test_fault_that_the_manifest_shares_is_still_found(copy_of: Folders, source: Path) -> None:
    """A writer that makes a wrong byte also hashes it; only the values show it."""
    out = copy_of("nvfp4")
    flip_byte(out / "model.safetensors", f"{UP_PROJ}.weight", byte=100)
    (out / "manifest.json").unlink()
    report = prove(out, source)
    assert {check.rule for check in failed(report)} == {"V2"}
    assert "1 bytes differ, first at [3, 4]" in named(report, "V2")  # 32 bytes a row


@pytest.mark.parametrize(
    ("one", "other", "rule"),
    [
        (f"{LAYERS}.5.mixer.in_proj.weight", f"{IN_PROJ}.weight", "V2"),
        (f"{LAYERS}.4.norm.weight", f"{LAYERS}.0.norm.weight", "V1"),
        (
            "vision_model.radio_model.model.blocks.0.attn.qkv.weight",
            "vision_model.radio_model.model.blocks.1.attn.qkv.weight",
            "V1",
        ),
    ],
)
def test_swapped_tensors_are_both_named(
    copy_of: Folders, source: Path, one: str, other: str, rule: str
) -> None:
    out = copy_of("nvfp4")

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        tensors[one], tensors[other] = tensors[other], tensors[one]

    edit_tensors(out, swap)
    report = prove(out, source)
    for name in (one, other):
        assert name in named(report, rule)
        assert name in named(report, "H1")


@pytest.mark.parametrize(
    ("scheme", "name", "rules"),
    [
        ("nvfp4", f"{IN_PROJ}.weight_scale", {"D2", "D3", "H1"}),
        ("nvfp4", f"{IN_PROJ}.weight_scale_2", {"D2", "D3", "H1"}),
        ("nvfp4", f"{IN_PROJ}.input_scale", {"D2", "D3", "H1"}),
        ("fp8", f"{IN_PROJ}.weight_scale", {"D1", "D3", "H1"}),
        ("fp8", f"{IN_PROJ}.input_scale", {"D1", "D3", "H1"}),
        ("fp8", f"{LAYERS}.2.norm.weight", {"N5", "H1"}),
    ],
)
def test_missing_tensor_is_named(
    copy_of: Folders, source: Path, scheme: str, name: str, rules: set[str]
) -> None:
    out = copy_of(scheme)
    edit_tensors(out, lambda tensors: tensors.pop(name))
    report = prove(out, source)
    for rule in rules:
        assert f"{name}: " in named(report, rule)


def test_extra_tensor_is_named(copy_of: Folders, source: Path) -> None:
    out = copy_of("fp8")
    name = f"{LAYERS}.0.mixer.in_proj.bias"
    edit_tensors(out, lambda tensors: tensors.update({name: torch.zeros(3)}))
    report = prove(out, source)
    assert name in named(report, "N5")
    assert name in named(report, "H1")


def test_renamed_projector_is_named(copy_of: Folders, source: Path) -> None:
    out = copy_of("nvfp4")

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors["multi_modal_projector.linear_1.weight"] = tensors.pop("mlp1.1.weight")

    edit_tensors(out, rename)
    report = prove(out, source)
    assert "multi_modal_projector.linear_1.weight" in named(report, "N1")
    assert "mlp1.1.weight: missing" in named(report, "N5")


def test_nan_is_named_wherever_it_is(copy_of: Folders, source: Path) -> None:
    out = copy_of("nvfp4")

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{IN_PROJ}.input_scale"].fill_(float("nan"))
        tensors[f"{UP_PROJ}.weight_scale"].view(torch.uint8)[0, 0] = 0x7F
        tensors["mlp1.0.weight"][3] = float("inf")

    edit_tensors(out, spoil)
    faults = named(prove(out, source), "D7")
    for name in (f"{IN_PROJ}.input_scale", f"{UP_PROJ}.weight_scale", "mlp1.0.weight"):
        assert name in faults
    assert prove(out, None).passed is False


def test_block_scales_that_are_not_positive_are_named_without_the_source(copy_of: Folders) -> None:
    out = copy_of("nvfp4")

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{UP_PROJ}.weight_scale"].view(torch.uint8)[0, :3] = torch.tensor([0, 0x80, 0x81])

    edit_tensors(out, spoil)
    fault = f"{UP_PROJ}.weight_scale: 3 values are zero or negative"
    assert named(prove(out, None), "D7") == fault


@pytest.mark.parametrize(
    ("index", "servers"), [(True, ["TensorRT-LLM"]), (False, ["TensorRT-LLM", "vLLM"])]
)
def test_other_weights_beside_the_model_are_named(
    copy_of: Folders, source: Path, index: bool, servers: list[str]
) -> None:
    out = copy_of("fp8")
    if not index:
        (out / "model.safetensors.index.json").unlink()
    assert prove(out, source).passed
    save_file({"lora": torch.zeros(2)}, out / "adapter.safetensors")
    faults = [c.detail for c in failed(prove(out, source)) if c.rule == "N8"]
    assert faults == [
        f"adapter.safetensors: {server} would read it as weights; move it" for server in servers
    ]


def test_other_weights_beside_the_source_do_not_count(
    written: Folders, source: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(source, tmp_path / "source"))
    save_file({"lora": torch.zeros(2)}, copy / "adapter.safetensors")
    assert prove(written("fp8"), copy).passed


def double(tensors: dict[str, Tensor], *, name: str) -> None:
    tensors[name].mul_(2)


def test_unequal_qkv_scales_are_named(copy_of: Folders, source: Path) -> None:
    for scheme, leaf, rule in (("nvfp4", "weight_scale_2", "Q1"), ("fp8", "weight_scale", "Q2")):
        out = copy_of(scheme)
        name = f"{LAYERS}.3.mixer.k_proj.{leaf}"
        edit_tensors(out, partial(double, name=name))
        report = prove(out, source)
        assert leaf in named(report, rule)
        assert name in named(report, "V4")


@pytest.mark.parametrize("key", ["weight_amax", "input_amax"])
def test_wrong_amax_in_the_calibration_is_named(copy_of: Folders, source: Path, key: str) -> None:
    out = copy_of("nvfp4")
    path = out / "calibration.amax"
    amaxes = load_file(path)
    amaxes[f"{UP_PROJ}.{key}"] *= 1.25
    save_file(amaxes, path)
    report = prove(out, source)
    scale = {"weight_amax": "weight_scale_2", "input_amax": "input_scale"}[key]
    assert f"{UP_PROJ}.{scale}" in named(report, "V4")
    assert "calibration.amax" in named(report, "H3")
    assert (f"{UP_PROJ}.weight_amax" in named(report, "V5")) == (key == "weight_amax")


def test_amax_that_is_not_of_the_source_is_named_although_all_bytes_follow_from_it(
    source: Path, written: Folders, tmp_path: Path, make_checkpoint: Callable[..., Path]
) -> None:
    other = make_checkpoint(
        tmp_path / "other",
        seed=1,
        vision={"preferred_resolution": [32, 32]},
        template="nemotron-h-5p5-reasoning",
    )
    report = prove(written("nvfp4"), other)
    assert f"{UP_PROJ}.weight_amax" in named(report, "V5")
    assert f"{UP_PROJ}.weight: " in named(report, "D9")  # noise of the size of the signal
    assert f"{UP_PROJ}.weight" in named(report, "H2")


def test_missing_and_unused_amax_are_named(copy_of: Folders, source: Path) -> None:
    out = copy_of("fp8")
    path = out / "calibration.amax"
    amaxes = load_file(path)
    amaxes["mlp1.1.weight_amax"] = amaxes.pop(f"{UP_PROJ}.input_amax")
    save_file(amaxes, path)
    report = prove(out, source)
    assert f"{UP_PROJ}.input_amax" in named(report, "V4")
    assert "mlp1.1.weight_amax" in named(report, "V5")


def test_quantized_projector_is_named(copy_of: Folders, source: Path) -> None:
    out = copy_of("fp8")

    def quantize(tensors: dict[str, torch.Tensor]) -> None:
        tensors["mlp1.1.weight"] = tensors["mlp1.1.weight"].to(torch.float8_e4m3fn)

    edit_tensors(out, quantize)
    report = prove(out, source)
    assert "mlp1.1.weight: F8_E4M3" in named(report, "D4")


@pytest.mark.parametrize(
    ("change", "rule", "text"),
    [
        (lambda c: c.update(ps_version="v1"), "C5", "ps_version"),
        (lambda c: c.update(norm_mean=[0.5, 0.5, 0.5]), "A2", "norm_mean"),
        (lambda c: c["quantization_config"].update(quant_algo="FP8"), "C8", "quant_algo"),
        (lambda c: c["quantization_config"]["ignore"].append("*layers.1*"), "C8", "*layers.1*"),
        (lambda c: c["quantization_config"]["ignore"].append("a\0b"), "N6", r"a\x00b"),
    ],
)
def test_changed_config_is_named(
    copy_of: Folders,
    source: Path,
    change: Callable[[dict[str, Any]], None],
    rule: str,
    text: str,
) -> None:
    out = copy_of("nvfp4")
    edit_json(out / "config.json", change)
    report = prove(out, source)
    assert text in named(report, rule)
    assert "config.json" in named(report, "H3")


def test_missing_and_changed_side_files_are_named(copy_of: Folders, source: Path) -> None:
    out = copy_of("fp8")
    (out / "tokenizer_config.json").unlink()
    (out / "preprocessor_config.json").write_text("{}")
    report = prove(out, source)
    for rule in ("C7", "H3"):
        assert "tokenizer_config.json: missing" in named(report, rule)
        assert "preprocessor_config.json: " in named(report, rule)


def test_side_files_that_were_added_are_named(copy_of: Folders, source: Path) -> None:
    out = copy_of("fp8")
    added = ("chat_template.jinja", "added_tokens.json")
    for name in added:
        (out / name).write_text("{}")
    edit_json(out / "manifest.json", lambda manifest: manifest["files"].pop("recipe.json"))
    report = prove(out, source)
    for name in added:
        assert f"{name}: not in the source" in named(report, "C7")
        assert f"{name}: not in the manifest" in named(report, "H3")
    assert "recipe.json: not in the manifest" in named(report, "H3")


def test_large_side_files_are_not_read_whole(
    copy_of: Folders, source: Path, tmp_path: Path
) -> None:
    out, copied = copy_of("fp8"), Path(shutil.copytree(source, tmp_path / "source"))
    size = 32 << 20
    for folder in (out, copied):
        with (folder / "tokenizer.model").open("wb") as file:
            file.truncate(size)
    sha256 = hash_file(out / "tokenizer.model")
    edit_json(out / "manifest.json", lambda m: m["files"].update({"tokenizer.model": sha256}))
    tracemalloc.start()
    report = prove(out, copied)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert report.passed, report.summary_lines()
    assert peak < size / 2


def test_folder_named_as_a_side_file_is_none(
    written: Folders, source: Path, tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(source, tmp_path / "source"))
    (copied / "tokenizer").mkdir()
    assert prove(written("fp8"), copied).passed


@pytest.mark.parametrize(
    ("text", "status"), [(None, "not checked"), ("{", "failed"), ('{"tensors": {}}', "failed")]
)
def test_manifest_that_is_missing_is_not_checked_and_one_that_is_broken_fails(
    copy_of: Folders, source: Path, text: str | None, status: str
) -> None:
    out = copy_of("fp8")
    (out / "manifest.json").unlink()
    if text is not None:
        (out / "manifest.json").write_text(text)
    report = prove(out, source)
    assert {check.status for check in report.checks if check.rule[0] == "H"} == {status}


def test_files_that_cannot_be_read_fail_with_their_names(copy_of: Folders, source: Path) -> None:
    out = copy_of("fp8")
    (out / "manifest.json").unlink()
    (out / "manifest.json").mkdir()
    report = prove(out, source)
    assert {check.status for check in report.checks if check.rule[0] == "H"} == {"failed"}
    (out / "hf_quant_config.json").unlink()
    (out / "hf_quant_config.json").mkdir()
    assert "hf_quant_config.json: cannot be read" in named(prove(out, source), "A1")


def test_dtype_of_no_format_fails_with_its_name(copy_of: Folders, source: Path) -> None:
    out = copy_of("fp8")
    scale = torch.ones(4).to(torch.float8_e8m0fnu)
    edit_tensors(out, lambda tensors: tensors.update({"mlp1.1.weight_scale": scale}))
    fault = named(prove(out, source), "A1")
    assert re.search(r"mlp1\.1\.weight_scale: required one of .*, got F8_E8M0", fault)


def test_without_calibration_codes_are_proved_with_the_stored_scale(
    copy_of: Folders, source: Path
) -> None:
    out = copy_of("nvfp4")
    (out / "calibration.amax").unlink()
    (out / "manifest.json").unlink()
    report = prove(out, source)
    assert report.passed
    status = {check.rule: check.status for check in report.checks}
    assert (status["V2"], status["V4"], status["V5"]) == ("passed", "not checked", "not checked")


def test_without_source_what_needs_it_is_not_checked(written: Folders) -> None:
    report = verify(written("nvfp4"))
    status = {check.rule: check.status for check in report.checks}
    needs_source = {"A2", "C7", "C13", "N5", "V1", "V2", "V3", "V5", "D9", "H2", "L1", "L2"}
    assert {rule for rule, s in status.items() if s == "not checked"} == needs_source
    assert status["H1"] == status["V4"] == "passed"
    assert report.passed
    assert ": verified by its manifest.json alone; give --against" in report.summary_lines()[-1]


def test_without_source_and_manifest_nothing_is_verified(copy_of: Folders) -> None:
    out = copy_of("nvfp4")
    (out / "manifest.json").unlink()
    report = verify(out)
    assert not failed(report)
    assert not report.passed
    assert ": NOT verified: without manifest.json and " in report.summary_lines()[-1]
    assert CliRunner().invoke(app, ["verify", str(out)]).exit_code == 1


def test_folder_in_which_nothing_is_quantized_is_the_users_error(source: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing in it is quantized, and it has no manifest"):
        verify(source, source)


def test_folder_without_graphs_is_the_users_error(written: Folders, tmp_path: Path) -> None:
    run = written("nvfp4")
    for folder in (tmp_path / "nowhere", run):
        with pytest.raises(EngineError, match=r"holds no io\.json; required a folder that nvvl ex"):
            verify(run, graphs=folder)


def test_changed_side_file_does_not_keep_logits_from_being_compared(
    copy_of: Folders, source: Path
) -> None:
    out = copy_of("nvfp4")
    (out / "generation_config.json").write_text("{}")
    report = verify(out, source)
    assert not report.passed
    assert {check.rule: check.status for check in report.checks}["L1"] == "passed"


def test_logits_left_out_read_not_checked(written: Folders, source: Path) -> None:
    report = verify(written("nvfp4"), source, logits=False)
    logits = report.checks[-2]
    assert (logits.rule, logits.status) == ("L1", "not checked")
    assert "left out on request" in logits.detail
    assert not any(line.startswith("passed: L1") for line in report.summary_lines())


@pytest.mark.parametrize("size", [0, 100, -1])
def test_truncated_file_fails_with_its_name(copy_of: Folders, source: Path, size: int) -> None:
    out = copy_of("fp8")
    path = out / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    report = prove(out, source)
    assert not report.passed
    assert "model.safetensors" in named(report, "A1")


def test_truncated_calibration_fails_with_its_name(copy_of: Folders, source: Path) -> None:
    out = copy_of("fp8")
    path = out / "calibration.amax"
    path.write_bytes(path.read_bytes()[:-1])
    assert "calibration.amax" in named(prove(out, source), "A3")


def test_folder_that_is_not_there_is_the_users_error(tmp_path: Path, written: Folders) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        verify(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors"):
        verify(written("fp8"), tmp_path)


@pytest.mark.parametrize("scheme", ["fp8", "nvfp4"])
def test_quantized_source_is_the_users_error(written: Folders, scheme: str) -> None:
    with pytest.raises(CheckpointError, match="holds quantized weights; required the BF16"):
        prove(written(scheme), written(scheme))


def test_missing_library_is_reported_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nvvl.export.onnx_extra.find_spec", lambda name: None)
    with pytest.raises(HardwareError, match=r"pip install 'nvvl\[onnx\]'"):
        verify(tmp_path / "nowhere", graphs=tmp_path)


def test_verifying_writes_nothing_and_the_report_is_whole(
    written: Folders, source: Path, tmp_path: Path
) -> None:
    out = written("fp8")
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    seen: list[tuple[str, int, int]] = []
    report = verify(out, source, logits=False, progress=lambda *args: seen.append(args))
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert [done for _, done, _ in seen] == list(range(1, seen[-1][2] + 1))
    path = tmp_path / "verification.json"
    report.write_report(path)
    values = json.loads(path.read_text())
    assert values["passed"] is True
    assert values["counts"]["failed"] == 0
    assert len(values["checks"]) == len(report.checks)
    assert values["sqnr_db"].keys() == list_linears(VLMConfig.from_folder(out)).keys()
    assert all(31 < value < 32.5 for value in values["sqnr_db"].values())  # normal weights in FP8
    assert report.summary_lines()[-1].endswith("0 failed, 2 not checked)")
    with pytest.raises(OutputError, match="cannot be written"):
        report.write_report(tmp_path / "nowhere" / "a.json")


def test_shards_are_read_through_their_index(copy_of: Folders, source: Path) -> None:
    out = copy_of("fp8")
    tensors = load_file(out / "model.safetensors")
    (out / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2]}
    parts["model-00002-of-00002.safetensors"] = names[1::2]
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, out / file)
    index: dict[str, dict[str, Any]] = {
        "metadata": {"total_size": sum(t.numel() * t.element_size() for t in tensors.values())},
        "weight_map": {name: file for file, part in parts.items() for name in part},
    }
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    assert prove(out, source).passed
    index["weight_map"][names[0]] = "model-00002-of-00002.safetensors"
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    assert names[0] in named(prove(out, source), "N7")


def test_view_reads_dtype_shape_and_scalars(written: Folders) -> None:
    view = open_view(written("nvfp4"))
    header = view.tensors[f"{UP_PROJ}.weight_scale"]
    assert (header.dtype, header.shape, header.nbytes) == ("F8_E4M3", (128, 4), 512)
    assert view.scalar(f"{UP_PROJ}.input_scale") == pytest.approx(9 / 2688)
    assert view.scalar(f"{UP_PROJ}.weight_scale") is None
    assert view.scalar("nothing") is None
