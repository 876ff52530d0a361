"""Largest magnitudes, and ``calibration.amax``, the file that keeps them.

An ``X.input_amax`` and an ``X.weight_amax`` of each quantized linear ``X`` are float32 scalars in
it; the first is absent where inputs stay BF16. Which tensors those are follows from the formats
alone, so nothing here imports torch before there are values.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nvvl.errors import CheckpointError
from nvvl.model.checkpoint_writer import write_safetensors
from nvvl.model.safetensors_io import TensorSpec, read_header, read_tensor
from nvvl.quantize.recipe import CALIBRATED_FORMATS, Format
from nvvl.quantize.targets import qkv_groups, quantized_only

if TYPE_CHECKING:
    from torch import Tensor

# Of the safetensors format, under a name that no server takes for weights: TensorRT-LLM reads every
# *.safetensors file of a folder, whatever its index lists.
CALIBRATION_NAME = "calibration.amax"

_INPUT = ".input_amax"
_WEIGHT = ".weight_amax"


@dataclass(frozen=True)
class Amax:
    """Largest magnitudes of one linear, float32 scalars on the CPU.

    Attributes:
        weight: Of the weight; q, k and v of a layer share the largest of the three.
        input: Of the inputs over all calibration items; None where inputs stay BF16.
    """

    weight: "Tensor"
    input: "Tensor | None" = None


def share_qkv(amaxes: Mapping[str, Amax]) -> dict[str, Amax]:
    """Give q, k and v of each layer one weight amax, the largest of the three.

    Servers fuse the three: vLLM takes the largest tensor scale without touching block scales, and
    TensorRT-LLM refuses unequal ones. Inputs are the same tensor, so their amax agree already.
    """
    import torch

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


def calibration_tensors(formats: Mapping[str, Format]) -> list[TensorSpec]:
    """List the content of ``calibration.amax``, in file order: float32 scalars.

    Args:
        formats: Format of each quantizable linear.
    """
    tensors = []
    for fqn, linear_format in sorted(quantized_only(formats).items()):
        if linear_format in CALIBRATED_FORMATS:
            tensors.append(TensorSpec(f"{fqn}{_INPUT}", "F32", ()))
        tensors.append(TensorSpec(f"{fqn}{_WEIGHT}", "F32", ()))
    return tensors


def write_amaxes(path: Path, amaxes: Mapping[str, Amax]) -> None:
    """Write ``calibration.amax``, with the tensors that `calibration_tensors` lists.

    Args:
        path: The file.
        amaxes: Of each quantized linear.

    Raises:
        OutputError: if the file cannot be written.
    """
    tensors = {}
    for fqn, amax in sorted(amaxes.items()):
        if amax.input is not None:
            tensors[f"{fqn}{_INPUT}"] = amax.input
        tensors[f"{fqn}{_WEIGHT}"] = amax.weight
    write_safetensors(path, tensors)


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
        weight = tensors.pop(f"{fqn}{_WEIGHT}", None)
        if weight is None:
            raise CheckpointError(f"{path}: {fqn}{_WEIGHT} is missing")
        amaxes[fqn] = Amax(weight, tensors.pop(f"{fqn}{_INPUT}", None))
    if tensors:
        raise CheckpointError(f"{path}: unexpected {', '.join(sorted(tensors))}")
    return amaxes


def read_input_amaxes(path: Path) -> "dict[str, Tensor]":
    """Read the amax of inputs alone, by name of the linear, whichever linears those are.

    Raises:
        CheckpointError: if the file cannot be read.
    """
    return {
        name.removesuffix(_INPUT): read_tensor(info)
        for name, info in read_header(path).items()
        if name.endswith(_INPUT)
    }
