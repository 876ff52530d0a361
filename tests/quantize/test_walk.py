"""The walk: what it writes, that ModelOpt agrees, and that failures leave nothing behind."""

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from nvvl.calib_data.items import Item, item_hash
from nvvl.calib_data.manifest import CalibrationSet
from nvvl.errors import (
    CalibrationError,
    CheckpointError,
    DataError,
    HardwareError,
    NvvlError,
    OutputError,
    RecipeError,
)
from nvvl.model.checkpoint import Checkpoint
from nvvl.model.load import load_model
from nvvl.model.processes import Processes
from nvvl.model.processor import Processor
from nvvl.model.prompt import Message
from nvvl.quantize.amaxes import read_amaxes
from nvvl.quantize.backend import register
from nvvl.quantize.blocks import LoadedBlock
from nvvl.quantize.layout import build_layout
from nvvl.quantize.limits import Limits
from nvvl.quantize.manifest import Manifest
from nvvl.quantize.output import Output
from nvvl.quantize.presets import PRESETS, fp8, nvfp4, nvfp4_w4a16
from nvvl.quantize.recipe import Recipe, Rule
from nvvl.quantize.targets import assign_formats, list_linears, qkv_groups
from nvvl.quantize.walk import quantize_checkpoint

LAYERS = "language_model.backbone.layers"
QuantizeTiny = Callable[[str], Path]
MakeCheckpoint = Callable[..., Path]


def read_tensors(folder: Path) -> dict[str, Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def modelopt_amaxes(source: Path, items: tuple[Item, ...], preset: str) -> dict[str, float]:
    """Calibrate the whole model at once with ModelOpt's own default config."""
    import modelopt.torch.quantization as mtq

    model = load_model(source)
    processor = Processor.from_folder(source)
    defaults = {
        "fp8": mtq.FP8_DEFAULT_CFG,
        "nvfp4": mtq.NVFP4_DEFAULT_CFG,
        "nvfp4-w4a16": mtq.W4A16_NVFP4_CFG,
    }
    off = ["*vision_model*", "*mlp1*", "*lm_head*", "*conv1d*", "*embeddings*"]
    config = {
        "quant_cfg": [
            *defaults[preset]["quant_cfg"],
            *({"quantizer_name": pattern, "enable": False} for pattern in off),
        ],
        "algorithm": "max",
    }

    def run(module: torch.nn.Module) -> None:
        for item in items:
            inputs = processor(item.messages, images=item.images, videos=item.videos)
            module(inputs.input_ids[None], pixel_values=inputs.pixel_values)

    register()  # of the model's own linears, which ModelOpt does not know by itself
    with redirect_stdout(io.StringIO()), torch.no_grad():
        mtq.quantize(model, config, run)
    modules: dict[str, Any] = dict(model.named_modules())
    return {
        name.replace("_quantizer", "_amax"): float(module.amax)
        for name, module in modules.items()
        if name.endswith(("weight_quantizer", "input_quantizer")) and module.is_enabled
    }


@pytest.mark.parametrize("preset", ["fp8", "nvfp4", "nvfp4-w4a16"])
def test_amax_equals_whole_model_calibration_by_modelopt(
    preset: str, quantize_tiny: QuantizeTiny, tiny_checkpoint: Path, items: tuple[Item, ...]
) -> None:
    expected = modelopt_amaxes(tiny_checkpoint, items, preset)
    for group in qkv_groups(list_linears(Checkpoint(tiny_checkpoint).config)):
        shared = max(expected[f"{fqn}.weight_amax"] for fqn in group)
        expected |= {f"{fqn}.weight_amax": shared for fqn in group}
    with safe_open(quantize_tiny(preset) / "calibration.amax", "pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert all(amax.dtype == torch.float32 and amax.shape == () for amax in found.values())
    assert {name: float(amax) for name, amax in found.items()} == expected


@pytest.mark.parametrize("preset", ["nvfp4", "nvfp4-w4a16"])
def test_nvfp4_bytes_are_those_of_modelopt(
    preset: str, quantize_tiny: QuantizeTiny, tiny_checkpoint: Path
) -> None:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    source, written = read_tensors(tiny_checkpoint), read_tensors(quantize_tiny(preset))
    linears = list_linears(Checkpoint(tiny_checkpoint).config)
    amaxes = read_amaxes(quantize_tiny(preset) / "calibration.amax", linears)
    for fqn, amax in amaxes.items():
        scale_2 = amax.weight / (6 * 448)
        expected: Any = NVFP4QTensor.quantize(source[f"{fqn}.weight"], 16, None, scale_2)
        packed, block_scale = expected[0]._quantized_data, expected[1]
        assert torch.equal(written[f"{fqn}.weight"], packed), fqn
        assert torch.equal(
            written[f"{fqn}.weight_scale"].view(torch.uint8), block_scale.view(torch.uint8)
        ), fqn
        assert torch.equal(written[f"{fqn}.weight_scale_2"], scale_2), fqn
        assert (f"{fqn}.input_scale" in written) == (preset == "nvfp4")
        if amax.input is not None:
            assert torch.equal(written[f"{fqn}.input_scale"], amax.input / (6 * 448)), fqn


def test_fp8_bytes_are_those_of_modelopt(
    quantize_tiny: QuantizeTiny, tiny_checkpoint: Path
) -> None:
    from modelopt.torch.export.quant_utils import to_quantized_weight

    source, written = read_tensors(tiny_checkpoint), read_tensors(quantize_tiny("fp8"))
    linears = list_linears(Checkpoint(tiny_checkpoint).config)
    amaxes = read_amaxes(quantize_tiny("fp8") / "calibration.amax", linears)
    for fqn, amax in amaxes.items():
        scale = amax.weight / 448
        assert torch.equal(written[f"{fqn}.weight_scale"], scale)
        expected = to_quantized_weight(source[f"{fqn}.weight"], scale, "fp8")
        assert torch.equal(
            written[f"{fqn}.weight"].view(torch.uint8), expected.view(torch.uint8)
        ), fqn
        assert amax.input is not None
        assert torch.equal(written[f"{fqn}.input_scale"], amax.input / 448)


@pytest.mark.parametrize("preset", PRESETS)
def test_everything_else_is_copied_byte_for_byte(
    preset: str, quantize_tiny: QuantizeTiny, tiny_checkpoint: Path
) -> None:
    source, out = Checkpoint(tiny_checkpoint), Checkpoint(quantize_tiny(preset))
    formats = assign_formats(PRESETS[preset](), list_linears(source.config))
    quantized = {f"{fqn}.weight" for fqn, fmt in formats.items() if fmt != "bf16"}
    for name in source.tensors.keys() - quantized:
        assert out.info(name).dtype == source.info(name).dtype, name
        assert out.sha256(name) == source.sha256(name), name
    assert [spec.name for spec in build_layout(source, formats)] == [
        info.name for info in sorted(out.tensors.values(), key=lambda info: info.start)
    ]


@pytest.mark.parametrize("preset", sorted(PRESETS.keys() - {"nvfp4-selective"}))
def test_q_k_v_of_a_layer_share_their_scales(preset: str, quantize_tiny: QuantizeTiny) -> None:
    written = read_tensors(quantize_tiny(preset))
    leaf = "weight_scale" if preset in ("fp8", "mixed") else "weight_scale_2"
    for kind in [leaf, *(["input_scale"] if preset != "nvfp4-w4a16" else [])]:
        values = {float(written[f"{LAYERS}.3.mixer.{p}_proj.{kind}"]) for p in "qkv"}
        assert len(values) == 1, kind


def test_side_files_are_the_source_s(quantize_tiny: QuantizeTiny, tiny_checkpoint: Path) -> None:
    out = quantize_tiny("nvfp4")
    copied = {
        "generation_config.json",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for name in copied:
        assert (out / name).read_bytes() == (tiny_checkpoint / name).read_bytes()
    written = {"config.json", "hf_quant_config.json", "recipe.json", "calibration.amax"}
    assert {p.name for p in out.iterdir()} == copied | written | {
        "manifest.json",
        "model.safetensors",
        "model.safetensors.index.json",
    }
    config = json.loads((out / "config.json").read_text())
    hf_config = json.loads((out / "hf_quant_config.json").read_text())
    in_config = config.pop("quantization_config")
    assert config == json.loads((tiny_checkpoint / "config.json").read_text())
    assert in_config["ignore"] == hf_config["quantization"]["exclude_modules"]
    recipe = json.loads((out / "recipe.json").read_text())
    assert Recipe.from_dict(recipe["recipe"]) == nvfp4()
    assert set(recipe["formats"].values()) == {"nvfp4"}


def test_other_weights_archives_and_hidden_files_are_not_copied(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source = make_checkpoint(tmp_path / "source")
    weights = {"pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "vision.onnx_data"}
    archives = {"model.tar", "model.tar.gz", "model.tgz", "images.zip"}
    for name in weights | archives | {".gitattributes", "modeling.py", "chat_template.jinja"}:
        (source / name).write_text(name)
    (source / "figures").mkdir()
    out = tmp_path / "out"
    quantize_checkpoint(source, out, nvfp4_w4a16(), None)
    present = {path.name for path in out.iterdir()}
    assert {"modeling.py", "chat_template.jinja"} <= present
    assert not (weights | archives | {".gitattributes", "figures"}) & present


def test_manifest_hashes_all_that_was_read_and_written(
    quantize_tiny: QuantizeTiny, tiny_checkpoint: Path, items: tuple[Item, ...]
) -> None:
    out = quantize_tiny("mixed")
    manifest = Manifest.read(out)
    source, written = Checkpoint(tiny_checkpoint), Checkpoint(out)
    assert manifest.source == {name: source.sha256(name) for name in source.tensors}
    assert manifest.tensors.keys() == written.tensors.keys()
    for name, record in manifest.tensors.items():
        info = written.info(name)
        assert record.sha256 == written.sha256(name)
        assert (record.dtype, record.shape) == (info.dtype, info.shape)
    assert manifest.items == [(item.item_id, item_hash(item)) for item in items]
    assert manifest.files == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in out.iterdir()
        if path.name not in ("manifest.json", "model.safetensors")
    }
    assert {"python", "torch", "nvidia-modelopt", "transformers"} <= manifest.versions.keys()


def test_same_run_gives_same_bytes(
    tiny_checkpoint: Path,
    calibration_set: CalibrationSet,
    quantize_tiny: QuantizeTiny,
    tmp_path: Path,
) -> None:
    out = tmp_path / "again"
    quantize_checkpoint(tiny_checkpoint, out, PRESETS["mixed"](), calibration_set)
    assert folder_bytes(out) == folder_bytes(quantize_tiny("mixed"))


def test_weight_only_reads_no_items(
    tiny_checkpoint: Path,
    calibration_set: CalibrationSet,
    quantize_tiny: QuantizeTiny,
    tmp_path: Path,
) -> None:
    out = tmp_path / "without"
    manifest = quantize_checkpoint(tiny_checkpoint, out, nvfp4_w4a16(), None)
    assert manifest.items == []
    assert folder_bytes(out) == folder_bytes(quantize_tiny("nvfp4-w4a16"))


def test_layers_after_the_last_calibrated_one_are_not_run(
    tiny_checkpoint: Path,
    calibration_set: CalibrationSet,
    quantize_tiny: QuantizeTiny,
    tmp_path: Path,
) -> None:
    rules = (
        Rule(target="*", format="fp8", layers=(0, 1)),
        Rule(target="*", format="nvfp4-w4a16", layers=(4,)),
    )
    stages: list[tuple[str, int, int]] = []
    out = tmp_path / "out"
    quantize_checkpoint(
        tiny_checkpoint,
        out,
        Recipe(name="first", rules=rules),
        calibration_set,
        progress=lambda *step: stages.append(step),
    )
    assert [done for _, done, _ in stages] == list(range(1, stages[0][2] + 1))
    ticks = {name: sum(step[0] == name for step in stages) for name, _, _ in stages}
    num_items = len(calibration_set.items)
    assert ticks[f"{LAYERS}.1"] == ticks["mlp1"] == num_items + 1
    assert ticks[f"{LAYERS}.2"] == ticks[f"{LAYERS}.4"] == ticks["everything else"] == 1
    first, whole = read_tensors(out), read_tensors(quantize_tiny("fp8"))
    for leaf in ("weight_scale", "input_scale"):
        name = f"{LAYERS}.1.mixer.up_proj.{leaf}"
        assert torch.equal(first[name], whole[name])


def assert_only(folder: Path, *names: str) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)


def test_existing_out_is_kept(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=r"holds files but no manifest\.json .*not replaced"):
            quantize_checkpoint(tiny_checkpoint, out, nvfp4_w4a16(), None, overwrite=overwrite)
    assert_only(out, "thesis.txt")
    assert_only(tmp_path, "out")


def test_source_is_never_replaced(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "models" / "source")
    for out in (source, source.parent):
        with pytest.raises(OutputError, match=f"holds {source}, which is read"):
            quantize_checkpoint(source, out, nvfp4_w4a16(), None, overwrite=True)
    assert (source / "model.safetensors").exists()


def test_output_in_the_source_is_refused(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    before = sorted(source.iterdir())
    with pytest.raises(OutputError, match=f"out: lies in {source}, which is read; choose another"):
        quantize_checkpoint(source, source / "out", nvfp4_w4a16(), None)
    assert sorted(source.iterdir()) == before


def test_overwrite_replaces_an_earlier_output(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize_checkpoint(tiny_checkpoint, out, nvfp4_w4a16(), None)
    (out / "report.json").write_text("{}")
    quantize_checkpoint(tiny_checkpoint, out, nvfp4_w4a16(), None, overwrite=True)
    assert not (out / "report.json").exists()
    assert (out / "manifest.json").exists()
    assert_only(tmp_path, "out")


def test_failed_overwrite_keeps_the_earlier_output(
    tiny_checkpoint: Path, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    quantize_checkpoint(tiny_checkpoint, out, nvfp4_w4a16(), None)
    before = folder_bytes(out)
    name = "language_model.lm_head.weight"
    broken = make_checkpoint(tmp_path / "broken", replace={name: nan_like(304, 64)})
    with pytest.raises(CheckpointError, match=rf"{name}: holds NaN or Inf"):
        quantize_checkpoint(broken, out, nvfp4_w4a16(), None, overwrite=True)
    assert folder_bytes(out) == before
    assert_only(tmp_path, "broken", "out")


def nan_like(*shape: int) -> Tensor:
    tensor = torch.ones(shape, dtype=torch.bfloat16)
    tensor[-1, -1] = torch.nan
    return tensor


def with_values(value: float, *shape: int) -> Tensor:
    return torch.full(shape, value, dtype=torch.bfloat16)


UP_PROJ = f"{LAYERS}.1.mixer.up_proj.weight"
CLS_TOKEN = "vision_model.radio_model.model.patch_generator.cls_token.token"


@pytest.mark.parametrize(
    ("replace", "recipe", "error", "message"),
    [
        ({UP_PROJ: nan_like(128, 64)}, fp8(), CheckpointError, rf"{UP_PROJ}: holds NaN or Inf"),
        ({UP_PROJ: None}, nvfp4_w4a16(), CheckpointError, rf"{UP_PROJ} is missing"),
        ({UP_PROJ: with_values(1, 64, 64)}, fp8(), CheckpointError, rf"{UP_PROJ} has shape"),
        ({"mlp1.9.weight": with_values(1, 2, 2)}, fp8(), CheckpointError, "9.weight is unexpected"),
        (
            {UP_PROJ: with_values(0, 128, 64)},
            nvfp4_w4a16(),
            CalibrationError,
            r"layers\.1\.mixer\.up_proj: weight amax is 0\.0: the weight is all zero",
        ),
        (
            {UP_PROJ: with_values(0, 128, 64)},
            Recipe(name="x", rules=(Rule(target="*.down_proj", format="fp8"),)),
            CalibrationError,
            r"layers\.1\.mixer\.down_proj: input amax is 0\.0: calibration never activated it",
        ),
        (
            {UP_PROJ: with_values(3e38, 128, 64)},
            fp8(),
            CalibrationError,
            r"layers\.1: item one tile gives NaN or Inf activations",
        ),
        (
            {CLS_TOKEN: with_values(3e38, 4, 64)},
            fp8(),
            CalibrationError,
            r"vision_model\.\S+: item one tile gives NaN or Inf activations",
        ),
    ],
)
def test_faulty_source_leaves_nothing_behind(
    replace: dict[str, Tensor | None],
    recipe: Recipe,
    error: type[NvvlError],
    message: str,
    make_checkpoint: MakeCheckpoint,
    calibration_set: CalibrationSet,
    tmp_path: Path,
) -> None:
    source = make_checkpoint(tmp_path / "source", replace=replace)
    with pytest.raises(error, match=message):
        quantize_checkpoint(source, tmp_path / "out", recipe, calibration_set)
    assert_only(tmp_path, "source")


def test_in_features_24_names_the_layer(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", language={"intermediate_size": 24})
    with pytest.raises(RecipeError, match=r"1\.mixer\.down_proj: NVFP4 needs .* got 24"):
        quantize_checkpoint(source, tmp_path / "out", nvfp4_w4a16(), None)
    recipe = Recipe(
        name="x", rules=(Rule(target="*.down_proj", format="bf16"), *nvfp4_w4a16().rules)
    )
    quantize_checkpoint(source, tmp_path / "out", recipe, None)
    written = read_tensors(tmp_path / "out")
    assert written[f"{LAYERS}.1.mixer.down_proj.weight"].dtype == torch.bfloat16
    assert written[f"{LAYERS}.1.mixer.up_proj.weight"].dtype == torch.uint8


@pytest.mark.parametrize("count", [None, 0])
def test_calibrated_recipe_without_items_is_refused(
    count: int | None, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    calibration = None if count is None else CalibrationSet(items=(), spec="test", num_requested=0)
    with pytest.raises(DataError, match="recipe nvfp4 quantizes inputs too, and there are no"):
        quantize_checkpoint(tiny_checkpoint, tmp_path / "out", nvfp4(), calibration)
    assert_only(tmp_path)


def test_quantized_source_is_refused(quantize_tiny: QuantizeTiny, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has a quantization_config; required the BF16"):
        quantize_checkpoint(quantize_tiny("fp8"), tmp_path / "out", nvfp4_w4a16(), None)


def test_f32_source_is_quantized_as_bf16(
    make_checkpoint: MakeCheckpoint,
    tiny_checkpoint: Path,
    quantize_tiny: QuantizeTiny,
    tmp_path: Path,
) -> None:
    linear = f"{LAYERS}.1.mixer.up_proj"
    exact = read_tensors(tiny_checkpoint)[f"{linear}.weight"].float()
    source = make_checkpoint(
        tmp_path / "source", replace={f"{linear}.weight": exact * (1 + 2**-20)}
    )
    quantize_checkpoint(source, tmp_path / "out", nvfp4_w4a16(), None)
    found, expected = read_tensors(tmp_path / "out"), read_tensors(quantize_tiny("nvfp4-w4a16"))
    for leaf in ("weight", "weight_scale_2"):
        assert torch.equal(found[f"{linear}.{leaf}"], expected[f"{linear}.{leaf}"])


def test_item_that_cannot_be_used_is_named(
    tiny_checkpoint: Path, calibration_set: CalibrationSet, tmp_path: Path
) -> None:
    item = Item(item_id="no picture", messages=(Message("user", "<image>"),))
    faulty = CalibrationSet(items=(item,), spec="test", num_requested=1)
    with pytest.raises(DataError, match=r"item no picture: .* 1 <image> placeholders"):
        quantize_checkpoint(tiny_checkpoint, tmp_path / "out", fp8(), faulty)
    assert_only(tmp_path)


class WatchedProcesses(Processes):
    """One process that notes the errors that others would hear of."""

    def __init__(self) -> None:
        super().__init__("cpu", join=False)
        self.heard: list[NvvlError] = []

    @contextmanager
    def agreed(self) -> Iterator[None]:
        try:
            yield
        except NvvlError as error:
            self.heard.append(error)
            raise


@pytest.mark.parametrize("overlap", [True, False])
def test_error_of_writing_the_last_block_is_told_to_all_processes(
    overlap: bool, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish_block = Output.finish_block

    def fail(output: Output, block: LoadedBlock, *args: Any) -> None:
        if block.name == f"{LAYERS}.6":
            raise OutputError("the disk is full")
        finish_block(output, block, *args)

    monkeypatch.setattr(Output, "finish_block", fail)
    processes = WatchedProcesses()
    with pytest.raises(OutputError, match="the disk is full"):
        quantize_checkpoint(
            *(tiny_checkpoint, tmp_path / "out", nvfp4_w4a16(), None),
            limits=Limits(overlap=overlap),
            processes=processes,
        )
    assert [str(error) for error in processes.heard] == ["the disk is full"]


def test_kernels_that_cannot_be_had_are_refused_before_any_work(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVVL_KERNELS", "fastest")
    with pytest.raises(HardwareError, match=r"NVVL_KERNELS: .* was expected, got 'fastest'"):
        quantize_checkpoint(tiny_checkpoint, tmp_path / "out", nvfp4_w4a16(), None)
    assert_only(tmp_path)
