"""From one BF16 weight and its calibrated amax to the tensors that are written.

The scales here are the only place where an amax becomes a number on disk; formats themselves are
in ``nvvl.quantize.fp8`` and ``nvvl.quantize.nvfp4``.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from nvvl.errors import CalibrationError, CheckpointError
from nvvl.model.safetensors_io import read_header, read_tensor
from nvvl.quantize import fp8, nvfp4
from nvvl.quantize.layout import CALIBRATION_NAME as CALIBRATION_NAME
from nvvl.quantize.recipe import CALIBRATED_FORMATS, Format
from nvvl.quantize.targets import qkv_groups


@dataclass(frozen=True)
class Amax:
    """Largest magnitudes of one linear, float32 scalars on the CPU.

    Attributes:
        weight: Of the weight; q, k and v of a layer share the largest of the three.
        input: Of the inputs over all calibration items; None where inputs stay BF16.
    """

    weight: Tensor
    input: Tensor | None = None


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
    elif linear_format in ("nvfp4", "nvfp4-w4a16"):
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


def share_qkv(amaxes: Mapping[str, Amax]) -> dict[str, Amax]:
    """Give q, k and v of each layer one weight amax, the largest of the three.

    Servers fuse the three: vLLM takes the largest tensor scale without touching block scales, and
    TensorRT-LLM refuses unequal ones. Inputs are the same tensor, so their amax agree already.
    """
    shared = dict(amaxes)
    for group in qkv_groups(amaxes):
        largest = torch.stack([amaxes[fqn].weight for fqn in group]).amax()
        for fqn in group:
            shared[fqn] = replace(amaxes[fqn], weight=largest)
        inputs = [amaxes[fqn].input for fqn in group]
        first = inputs[0]
        # one tensor feeds all three; anything else is a bug of ours
        assert first is None or all(x is not None and torch.equal(x, first) for x in inputs), group
    return shared


def require_usable(amaxes: Mapping[str, Amax], formats: Mapping[str, Format]) -> None:
    """Refuse a scale that nothing, or nothing finite, was observed for.

    Raises:
        CalibrationError: naming the linear and the way out.
    """
    for fqn, amax in amaxes.items():
        _require_positive(amax.weight, f"{fqn}: weight amax", "the weight is all zero")
        if formats[fqn] in CALIBRATED_FORMATS:
            _require_positive(amax.input, f"{fqn}: input amax", "calibration never activated it")


def to_tensors(amaxes: Mapping[str, Amax]) -> dict[str, Tensor]:
    """Return the content of ``calibration.amax``: float32 scalars by name."""
    tensors = {}
    for fqn, amax in sorted(amaxes.items()):
        if amax.input is not None:
            tensors[f"{fqn}.input_amax"] = amax.input
        tensors[f"{fqn}.weight_amax"] = amax.weight
    return tensors


def read_amaxes(path: Path, fqns: Iterable[str]) -> dict[str, Amax]:
    """Read ``calibration.amax`` back.

    Args:
        path: The file.
        fqns: The quantized linears it must cover.

    Raises:
        CheckpointError: if the file cannot be read, or does not cover exactly these linears.
    """
    header = read_header(path)
    tensors = {name: read_tensor(info) for name, info in header.items()}
    amaxes = {}
    for fqn in fqns:
        weight = tensors.pop(f"{fqn}.weight_amax", None)
        if weight is None:
            raise CheckpointError(f"{path}: {fqn}.weight_amax is missing")
        amaxes[fqn] = Amax(weight, tensors.pop(f"{fqn}.input_amax", None))
    if tensors:
        raise CheckpointError(f"{path}: unexpected {', '.join(sorted(tensors))}")
    return amaxes


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
