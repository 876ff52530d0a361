import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from nvvl.errors import CalibrationError
from nvvl.quantize import backend, fp8, nvfp4

NVFP4 = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
FP8 = {"num_bits": (4, 3), "axis": None}


@pytest.fixture(autouse=True)
def registered() -> None:
    backend.register()


def quantizer(amax: float | None, **config: Any) -> Any:
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.nn import TensorQuantizer

    made = TensorQuantizer(QuantizerAttributeConfig(**config))
    if amax is not None:
        made.amax = torch.tensor(amax)
    return made


def calibrated_linear(config: dict[str, Any]) -> tuple[nn.Sequential, torch.Tensor]:
    import modelopt.torch.quantization as mtq

    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Linear(64, 32, bias=False)).bfloat16(),
        torch.randn(5, 64).bfloat16(),
    )
    config = {**config, "calibrator": (backend.FastMaxCalibrator,)}
    entries = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": config},
        {"quantizer_name": "*input_quantizer", "cfg": config},
    ]
    quantized = mtq.quantize(model, {"quant_cfg": entries, "algorithm": "max"}, lambda m: m(x))
    return quantized, x


def test_registering_twice_does_not_warn() -> None:
    from modelopt.torch.quantization.nn import is_registered_quant_backend

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backend.register()
    assert is_registered_quant_backend("nvvl_nvfp4")
    assert is_registered_quant_backend("nvvl_fp8")


@pytest.mark.parametrize("kind", ["nvfp4", "fp8"])
def test_simulated_linear_computes_with_the_packed_values(kind: str) -> None:
    config = {**(NVFP4 if kind == "nvfp4" else FP8), "backend": f"nvvl_{kind}"}
    model, x = calibrated_linear(config)
    weight = model.get_parameter("0.weight").detach()
    if kind == "nvfp4":
        scale = nvfp4.tensor_scale_from_amax(weight.abs().max())
        stored = nvfp4.dequantize(*nvfp4.quantize(weight, scale), scale, torch.bfloat16)
        x_stored = nvfp4.fake_quantize(x, nvfp4.tensor_scale_from_amax(x.abs().max()))
    else:
        scale = fp8.scale_from_amax(weight.abs().max())
        stored = fp8.dequantize(fp8.quantize(weight, scale), scale, torch.bfloat16)
        x_stored = fp8.fake_quantize(x, fp8.scale_from_amax(x.abs().max()))
    assert torch.equal(model(x), nn.functional.linear(x_stored, stored))


@pytest.mark.parametrize("kind", ["nvfp4", "fp8"])
def test_gradient_passes_straight_through(kind: str) -> None:
    made = quantizer(1.0, **(NVFP4 if kind == "nvfp4" else FP8), backend=f"nvvl_{kind}")
    x = torch.randn(3, 32, requires_grad=True)
    upstream = torch.randn(3, 32)
    made(x).backward(upstream)
    assert x.grad is not None
    assert torch.equal(x.grad, upstream)


def test_fp8_is_at_most_one_code_from_modelopts_own() -> None:
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    amax = x.abs().max().item()
    ours = quantizer(amax, **FP8, backend="nvvl_fp8")(x).float()
    theirs = quantizer(amax, **FP8)(x).float()
    # A code is worth 2**-3 of its value or less; both round to BF16 after it.
    assert ((ours - theirs).abs() <= theirs.abs() * 0.13).all()
    assert (ours != theirs).float().mean() < 0.05


@pytest.mark.parametrize("kind", ["nvfp4", "fp8"])
def test_quantizer_that_was_never_calibrated_is_an_error(kind: str) -> None:
    made = quantizer(None, **(NVFP4 if kind == "nvfp4" else FP8), backend=f"nvvl_{kind}")
    with pytest.raises(CalibrationError, match=f"nvvl_{kind} has no amax; calibrate"):
        made(torch.ones(2, 16))


@pytest.mark.parametrize("amax", [0.0, float("nan"), float("inf")])
def test_useless_amax_is_an_error(amax: float) -> None:
    with pytest.raises(CalibrationError, match="amax: a finite value of at least"):
        quantizer(amax, **NVFP4, backend="nvvl_nvfp4")(torch.ones(2, 16))


def test_static_block_quantizers_are_refused() -> None:
    config = copy.deepcopy(NVFP4)
    config["block_sizes"]["type"] = "static"  # type: ignore[index]
    with pytest.raises(ValueError, match="serves dynamic NVFP4 quantizers with blocks of 16"):
        quantizer(1.0, **config, backend="nvvl_nvfp4")(torch.ones(2, 16))


def test_per_channel_fp8_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one scale per tensor, got .* axis 0"):
        quantizer(1.0, **{**FP8, "axis": 0}, backend="nvvl_fp8")(torch.ones(2, 16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fast_calibrator_finds_modelopts_amax(dtype: torch.dtype) -> None:
    from modelopt.torch.quantization.calib import MaxCalibrator

    g = torch.Generator().manual_seed(2)
    ours, theirs = backend.FastMaxCalibrator(), MaxCalibrator()
    for size in (3.0, 0.5, 7.0, 1.0):
        x = (torch.randn(4, 31, generator=g) * size).to(dtype)
        ours.collect(x)
        theirs.collect(x)
        assert ours.compute_amax().dtype == theirs.compute_amax().dtype
        assert torch.equal(ours.compute_amax(), theirs.compute_amax())
    ours.reset()
    assert ours.compute_amax() is None


def test_fast_calibrator_leaves_other_axes_to_modelopt() -> None:
    calibrator = backend.FastMaxCalibrator(axis=0)
    calibrator.collect(torch.tensor([[1.0, -2.0], [3.0, 0.0]]))
    assert calibrator.compute_amax().tolist() == [[2.0], [3.0]]


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "an infinity")])
def test_fast_calibrator_refuses_non_finite_values(value: float, word: str) -> None:
    with pytest.raises(CalibrationError, match=f"calibration met {word} in a tensor of shape"):
        backend.FastMaxCalibrator().collect(torch.tensor([[1.0, value]]))
