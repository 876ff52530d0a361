"""From one BF16 weight and its calibrated amax to the tensors that are written.

The scales here are the only place where an amax becomes a number on disk; formats themselves are
in ``nvvl.quantize.fp8`` and ``nvvl.quantize.nvfp4``.
"""

from collections.abc import Mapping

from torch import Tensor

from nvvl.errors import CalibrationError
from nvvl.quantize import fp8, nvfp4
from nvvl.quantize.amaxes import Amax
from nvvl.quantize.recipe import CALIBRATED_FORMATS, NVFP4_FORMATS, Format


def pack_linear(weight: Tensor, linear_format: Format, amax: Amax) -> dict[str, Tensor]:
    """Quantize one weight.

    Args:
        weight: (N, K) float.
        linear_format: Any format but ``bf16``.
        amax: The calibrated magnitudes.

    Returns:
        Tensors by leaf name (``weight``, ``weight_scale``, ...), as `linear_tensors` lists them.

    Raises:
        ValueError: for ``bf16``.
    """
    tensors: dict[str, Tensor]
    if linear_format == "fp8":
        scale = fp8.scale_from_amax(amax.weight)
        tensors = {"weight": fp8.quantize(weight, scale), "weight_scale": scale}
    elif linear_format in NVFP4_FORMATS:
        scale = nvfp4.tensor_scale_from_amax(amax.weight)
        packed, block_scale = nvfp4.quantize(weight, scale)
        tensors = {"weight": packed, "weight_scale": block_scale, "weight_scale_2": scale}
    else:
        raise ValueError(f"{linear_format} is not a quantized format")
    if amax.input is not None:
        tensors["input_scale"] = input_scale(linear_format, amax.input)
    return tensors


def input_scale(linear_format: Format, amax: Tensor) -> Tensor:
    """Return the float32 scalar that a server multiplies input codes with."""
    if linear_format == "fp8":
        return fp8.scale_from_amax(amax)
    return nvfp4.tensor_scale_from_amax(amax)


def require_usable(amaxes: Mapping[str, Amax], formats: Mapping[str, Format]) -> None:
    """Refuse a scale that nothing, or nothing finite, was observed for.

    Raises:
        CalibrationError: naming the linear and the way out.
    """
    for fqn, amax in amaxes.items():
        _require_positive(amax.weight, f"{fqn}: weight amax", "the weight is all zero")
        if formats[fqn] in CALIBRATED_FORMATS:
            _require_positive(amax.input, f"{fqn}: input amax", "calibration never activated it")


def _require_positive(amax: Tensor | None, what: str, zero_means: str) -> None:
    if amax is None:
        raise CalibrationError(
            f"{what} was never observed: no item reached the layer; give other calibration items, "
            'or keep the layer BF16 with a rule (format = "bf16")'
        )
    value = float(amax)
    if not 0 < value < float("inf"):
        reason = zero_means if value == 0 else "activations or weights are not finite"
        raise CalibrationError(
            f"{what} is {value}: {reason}; give other calibration items, or keep the layer BF16 "
            'with a rule (format = "bf16")'
        )
