"""Reading quantized folders back: equal to the fake-quant model, and strict about what is there."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from nvvl.calib_data.items import Item
from nvvl.calib_data.manifest import CalibrationSet
from nvvl.errors import CheckpointError
from nvvl.model.checkpoint import Checkpoint
from nvvl.model.checkpoint_writer import write_safetensors
from nvvl.model.load import load_model
from nvvl.model.processor import Processor
from nvvl.model.vlm import NemotronNanoVL
from nvvl.quantize.declared import read_formats
from nvvl.quantize.linear import QuantizedLinear
from nvvl.quantize.load import fake_quant_model, load_any
from nvvl.quantize.presets import PRESETS
from nvvl.quantize.recipe import Recipe, Rule
from nvvl.quantize.targets import assign_formats, list_linears
from nvvl.quantize.walk import quantize_checkpoint

LAYERS = "language_model.backbone.layers"
UP_PROJ = f"{LAYERS}.1.mixer.up_proj"
QuantizeTiny = Callable[[str], Path]


def logits_of(model: NemotronNanoVL, source: Path, items: tuple[Item, ...]) -> list[Tensor]:
    processor = Processor.from_folder(source)
    results = []
    for item in items:
        inputs = processor(item.messages, images=item.images, videos=item.videos)
        pixels = inputs.pixel_values.to(model.dtype)
        with torch.no_grad():
            results.append(model(inputs.input_ids[None], pixel_values=pixels).logits)
    return results


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("preset", PRESETS)
def test_reloaded_model_equals_the_calibrated_one_bit_for_bit(
    preset: str,
    dtype: torch.dtype,
    quantize_tiny: QuantizeTiny,
    tiny_checkpoint: Path,
    items: tuple[Item, ...],
) -> None:
    out = quantize_tiny(preset)
    reloaded = load_any(out, dtype=dtype)
    calibrated = fake_quant_model(tiny_checkpoint, out, dtype=dtype)
    plain = load_model(tiny_checkpoint, dtype=dtype)
    three = [logits_of(model, out, items) for model in (reloaded, calibrated, plain)]
    for found, expected, unquantized in zip(*three, strict=True):
        assert found.dtype == dtype
        assert torch.equal(found, expected)
        assert not torch.equal(found, unquantized)


def sqnr_db(found: list[Tensor], expected: list[Tensor]) -> float:
    signal = torch.cat([x.flatten() for x in expected])
    noise = torch.cat([x.flatten() for x in found]) - signal
    return float(10 * torch.log10(signal.square().mean() / noise.square().mean()))


@pytest.mark.parametrize(("preset", "floor_db"), [("fp8", 14.0), ("nvfp4", 5.0)])
def test_quantized_logits_stay_near_bf16(
    preset: str,
    floor_db: float,
    quantize_tiny: QuantizeTiny,
    tiny_checkpoint: Path,
    items: tuple[Item, ...],
) -> None:
    """Floors lie 2 dB under what seven layers of random weights give; a wrong scale gives 0 dB."""
    model = load_any(quantize_tiny(preset), dtype=torch.float32)
    plain = load_model(tiny_checkpoint, dtype=torch.float32)
    expected = logits_of(plain, tiny_checkpoint, items)
    assert sqnr_db(logits_of(model, tiny_checkpoint, items), expected) > floor_db


def test_fp8_loses_as_much_as_modelopt_s_own_simulation(
    quantize_tiny: QuantizeTiny, tiny_checkpoint: Path, items: tuple[Item, ...]
) -> None:
    """ModelOpt's FP8 takes neighbouring codes here and there, so losses agree, not bits."""
    out = quantize_tiny("fp8")
    ours, theirs = (fake_quant_model(tiny_checkpoint, out, dtype=torch.float32) for _ in range(2))
    modules: dict[str, Any] = dict(theirs.named_modules())
    quantizers = [module for name, module in modules.items() if name.endswith("_quantizer")]
    assert any(quantizer.backend == "nvvl_fp8" for quantizer in quantizers)
    for quantizer in quantizers:
        quantizer.backend = None
    expected = logits_of(load_model(tiny_checkpoint, dtype=torch.float32), tiny_checkpoint, items)
    losses = [sqnr_db(logits_of(m, tiny_checkpoint, items), expected) for m in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], abs=0.5)


@pytest.mark.parametrize("preset", ["fp8", "nvfp4-w4a16"])
def test_source_in_f32_reloads_as_calibrated(
    preset: str,
    make_checkpoint: Callable[..., Path],
    calibration_set: CalibrationSet,
    tmp_path: Path,
) -> None:
    weight = torch.randn(128, 64, generator=torch.Generator().manual_seed(1)) / 8
    source = make_checkpoint(tmp_path / "source", replace={f"{UP_PROJ}.weight": weight})
    out = tmp_path / "out"
    quantize_checkpoint(source, out, PRESETS[preset](), calibration_set)
    models = load_any(out, dtype=torch.float32), fake_quant_model(source, out, dtype=torch.float32)
    items = tuple(calibration_set.items)
    for found, expected in zip(*(logits_of(m, source, items) for m in models), strict=True):
        assert torch.equal(found, expected)


def test_plain_folder_loads_as_it_is(tiny_checkpoint: Path) -> None:
    found, expected = load_any(tiny_checkpoint), load_model(tiny_checkpoint)
    assert not any(isinstance(module, QuantizedLinear) for module in found.modules())
    assert all(
        torch.equal(a, b)
        for a, b in zip(found.state_dict().values(), expected.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_formats_are_read_off_the_folder(preset: str, quantize_tiny: QuantizeTiny) -> None:
    checkpoint = Checkpoint(quantize_tiny(preset))
    expected = assign_formats(PRESETS[preset](), list_linears(checkpoint.config))
    assert read_formats(checkpoint) == expected


def test_unquantized_linears_stay_plain(
    tiny_checkpoint: Path, items: tuple[Item, ...], tmp_path: Path
) -> None:
    recipe = Recipe(name="x", rules=(Rule(target="*.up_proj", format="nvfp4-w4a16"),))
    quantize_checkpoint(tiny_checkpoint, tmp_path / "out", recipe, None)
    model = load_any(tmp_path / "out")
    assert isinstance(model.get_submodule(UP_PROJ), QuantizedLinear)
    assert isinstance(model.get_submodule(f"{LAYERS}.1.mixer.down_proj"), nn.Linear)


def test_linear_computes_from_codes_and_scales(quantize_tiny: QuantizeTiny) -> None:
    with safe_open(quantize_tiny("nvfp4") / "model.safetensors", "pt") as file:
        weight, block_scale, scale, input_scale = (
            file.get_tensor(f"{UP_PROJ}.{leaf}")
            for leaf in ("weight", "weight_scale", "weight_scale_2", "input_scale")
        )
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    codes = torch.stack([weight & 15, weight >> 4], dim=-1).flatten(1).int()
    values = grid[codes & 7] * torch.where(codes > 7, -1.0, 1.0)
    steps = block_scale.float().repeat_interleave(16, dim=1) * scale
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    blocks = x.unflatten(-1, (-1, 16))
    block_steps = (blocks.abs().amax(-1, keepdim=True) / 6 / input_scale).to(torch.float8_e4m3fn)
    step = block_steps.float() * input_scale
    near = (blocks[..., None].abs() / step[..., None] - grid).abs().argmin(-1)
    rounded = (grid[near] * blocks.sign() * step).flatten(-2)

    linear = load_any(quantize_tiny("nvfp4"), dtype=torch.float32).get_submodule(UP_PROJ)
    # the reference multiplies the same numbers in another order, once: float32 rounding alone
    torch.testing.assert_close(linear(x), rounded @ (values * steps).T, rtol=1e-5, atol=1e-5)


def test_linear_without_prepare_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"call prepare\(\)"):
        QuantizedLinear((16, 16), "fp8")(torch.zeros(1, 16))


@pytest.fixture
def broken(quantize_tiny: QuantizeTiny, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that copies a quantized folder with some tensors or settings changed."""

    def change(
        preset: str,
        *,
        tensors: dict[str, Tensor | None] | None = None,
        quantization: dict[str, object] | None = None,
    ) -> Path:
        folder = tmp_path / "broken"
        shutil.copytree(
            quantize_tiny(preset), folder, ignore=shutil.ignore_patterns("*.index.json")
        )
        with safe_open(folder / "model.safetensors", "pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        for name, tensor in (tensors or {}).items():
            stored.pop(name, None)
            if tensor is not None:
                stored[name] = tensor
        write_safetensors(folder / "model.safetensors", stored)
        path = folder / "hf_quant_config.json"
        config = json.loads(path.read_text())
        config["quantization"] |= quantization or {}
        path.write_text(json.dumps(config))
        return folder

    return change


@pytest.mark.parametrize(
    ("preset", "tensors", "message"),
    [
        ("fp8", {f"{UP_PROJ}.weight_scale": None}, rf"{UP_PROJ}\.weight_scale is missing"),
        ("fp8", {f"{UP_PROJ}.extra": torch.ones(2)}, rf"{UP_PROJ}\.extra is unexpected"),
        ("fp8", {f"{UP_PROJ}.input_scale": torch.ones(1)}, r"input_scale is F32 \(1,\), required"),
        ("nvfp4", {f"{UP_PROJ}.weight_scale_2": torch.ones(()).bfloat16()}, "required F32"),
        ("nvfp4", {"language_model.lm_head.weight": None}, "lm_head.weight is missing"),
        ("nvfp4", {f"{UP_PROJ}.input_scale": torch.tensor(0.0)}, "finite and positive"),
        ("fp8", {f"{UP_PROJ}.weight_scale": torch.tensor(torch.inf)}, "finite and positive"),
        (
            "fp8",
            {f"{UP_PROJ}.weight": torch.full((128, 64), torch.nan).to(torch.float8_e4m3fn)},
            rf"{UP_PROJ}\.weight: holds NaN",
        ),
        (
            "nvfp4",
            {f"{UP_PROJ}.input_scale": None},
            "up_proj is declared NVFP4, its tensors are W4A16_NVFP4",
        ),
    ],
)
def test_folder_with_faulty_tensors_is_refused(
    preset: str, tensors: dict[str, Tensor | None], message: str, broken: Callable[..., Path]
) -> None:
    folder = broken(preset, tensors=tensors)
    with pytest.raises(CheckpointError, match=message):
        load_any(folder)


@pytest.mark.parametrize(
    ("preset", "quantization", "message"),
    [
        ("fp8", {"quant_algo": "INT4_AWQ"}, r"quant_algo INT4_AWQ; required one of FP8, .*, NVFP4"),
        ("fp8", {"quant_algo": "NVFP4"}, r"is declared NVFP4, its tensors are FP8 \(and \d+ more"),
        ("mixed", {"quantized_layers": {}}, "is declared BF16, its tensors are FP8"),
        ("mixed", {"quantized_layers": {UP_PROJ: {"quant_algo": "W8A8"}}}, "quant_algo W8A8"),
    ],
)
def test_folder_that_declares_something_else_is_refused(
    preset: str, quantization: dict[str, object], message: str, broken: Callable[..., Path]
) -> None:
    folder = broken(preset, quantization=quantization)
    with pytest.raises(CheckpointError, match=message):
        load_any(folder)


def test_folder_without_declaration_is_refused(quantize_tiny: QuantizeTiny, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(quantize_tiny("fp8"), folder)
    path = folder / "hf_quant_config.json"
    path.unlink()
    with pytest.raises(CheckpointError, match=r"hf_quant_config\.json: cannot be read .*\(No such"):
        load_any(folder)
    path.write_text("[]")
    with pytest.raises(CheckpointError, match=r"config \(its values are arranged otherwise\)"):
        load_any(folder)


def test_calibration_of_another_model_is_refused(
    make_checkpoint: Callable[..., Path], quantize_tiny: QuantizeTiny, tmp_path: Path
) -> None:
    longer = {"hybrid_override_pattern": "M-M*-M-M-"}
    source = make_checkpoint(tmp_path / "source", language=longer)
    with pytest.raises(CheckpointError, match=r"recipe\.json: was made for another model"):
        fake_quant_model(source, quantize_tiny("fp8"))


def test_calibration_without_a_linear_is_refused(
    quantize_tiny: QuantizeTiny, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    shutil.copytree(quantize_tiny("fp8"), tmp_path / "copy")
    path = tmp_path / "copy" / "calibration.amax"
    with safe_open(path, "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del stored[f"{UP_PROJ}.weight_amax"]
    write_safetensors(path, stored)
    with pytest.raises(CheckpointError, match=rf"{UP_PROJ}\.weight_amax is missing"):
        fake_quant_model(tiny_checkpoint, tmp_path / "copy")
