"""Reads a checkpoint folder, quantized or not, into a model that runs anywhere torch does.

Two models come from a quantized folder, and they must agree bit for bit, which ``nvvl verify``
checks:

* `load_any` reads the packed tensors, as a server would: codes and scales from disk.
* `fake_quant_model` takes the BF16 source and puts ModelOpt's quantizers on it, with the amax of
  ``calibration.amax``: the model that was calibrated.

Folders of ModelOpt and llm-compressor are read as well, so that a peer's output can be judged:
`nvvl.quantize.declared` gives their tensors our names and scales, or says what is not understood.
There any linear may be quantized, those of the vision tower, the projector and the head too.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from nvvl.errors import CheckpointError
from nvvl.model.checkpoint import Checkpoint
from nvvl.model.load import load_model, materialize, num_bytes
from nvvl.model.memory import require_memory
from nvvl.model.vlm import NemotronNanoVL
from nvvl.quantize import fp8
from nvvl.quantize.amaxes import CALIBRATION_NAME, Amax, read_amaxes
from nvvl.quantize.declared import (
    check_quantized_tensors,
    is_quantized,
    open_checkpoint,
    stored_formats,
)
from nvvl.quantize.linear import QuantizedLinear
from nvvl.quantize.recipe import Format
from nvvl.quantize.side_files import RECIPE_NAME, read_recipe
from nvvl.quantize.targets import LinearShape, list_linears, quantized_only

# The forward looks at its dtype. A tool that quantizes it is told that its scales are unexpected.
_NEVER_QUANTIZED = "patch_generator.embedder"


def load_any(
    folder: Path, *, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu"
) -> NemotronNanoVL:
    """Load a BF16, FP8, NVFP4 or mixed checkpoint for inference, nvvl's or another tool's.

    Args:
        folder: A checkpoint folder in the released layout, or in that of compressed-tensors.
        dtype: Of activations and products.
        device: Where the tensors go.

    Raises:
        ConfigError: if config.json cannot be used.
        CheckpointError: if tensors are missing, unexpected, of another shape or dtype, or not
            finite, or if the declared formats are unknown or not those of the tensors.
        HardwareError: if memory cannot hold its weights in ``dtype``.
    """
    checkpoint = open_checkpoint(folder)
    if not is_quantized(checkpoint):
        return load_model(folder, dtype=dtype, device=device)
    with torch.device("meta"):
        model = NemotronNanoVL(checkpoint.config)
        needed = num_bytes(model, dtype)
        linears = _all_linears(model)
        formats = stored_formats(checkpoint, linears)
        check_quantized_tensors(checkpoint, formats, linears)
        for fqn, linear_format in formats.items():
            if linear_format != "bf16":
                bias = model.get_submodule(fqn).bias is not None
                model.set_submodule(fqn, QuantizedLinear(linears[fqn], linear_format, bias=bias))
    require_memory(needed, str(folder), device)
    materialize(model, "", checkpoint, dtype=dtype, device=device)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            _prepare(module, name, checkpoint, dtype)
    return model.eval()


def fake_quant_model(
    source: Path,
    out: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> NemotronNanoVL:
    """Load the BF16 source with ModelOpt's quantizers as a quantized folder was calibrated.

    Args:
        source: The BF16 checkpoint folder.
        out: The quantized folder, for ``recipe.json`` and ``calibration.amax``; its weights
            are not read.
        dtype: Of activations and products.
        device: Where the tensors go.

    Raises:
        CheckpointError: if one of the files is missing or does not fit the source.
        HardwareError: if memory cannot hold it.
    """
    from nvvl.quantize.calibrate import insert_quantizers, set_amaxes

    model = load_model(source, dtype=dtype, device=device)
    quantized, amaxes = read_quantization(Path(out), list_linears(model.config))
    if dtype != torch.bfloat16:
        _round_as_packed(model, quantized, amaxes)
    insert_quantizers(model, quantized, algorithm=None)
    set_amaxes(model, amaxes)
    return model


def read_quantization(
    out: Path, linears: Mapping[str, object]
) -> tuple[dict[str, Format], dict[str, Amax]]:
    """Read the formats and the amax of the quantized linears of a written checkpoint.

    Raises:
        CheckpointError: if one of the files is missing or malformed, or is not for a model with
            these linears.
    """
    formats = quantized_only(read_recipe_formats(out / RECIPE_NAME, linears))
    return formats, read_amaxes(out / CALIBRATION_NAME, formats)


def read_recipe_formats(path: Path, linears: Mapping[str, object]) -> dict[str, Format]:
    """Read the resolved formats of the ``recipe.json`` of a written checkpoint.

    Raises:
        CheckpointError: if it is missing or malformed, or is not for a model with these linears.
    """
    _, formats = read_recipe(path.parent)
    if formats.keys() != linears.keys():
        raise CheckpointError(f"{path}: was made for another model; give its own source")
    return formats


def _all_linears(model: nn.Module) -> dict[str, LinearShape]:
    """Return (out_features, in_features) of every linear that a peer may have quantized."""
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith(_NEVER_QUANTIZED)
    }


def _round_as_packed(
    model: nn.Module, formats: Mapping[str, Format], amaxes: Mapping[str, Amax]
) -> None:
    """Give the quantized weights of a model that is not BF16 the values they were packed from.

    Weights are packed from BF16, and the FP8 codes of a BF16 weight come from a quotient that is
    itself rounded to BF16 (``nvvl.quantize.fp8``). A quantizer that sees the weight in another
    dtype would skip that rounding and now and then take the neighbouring code; values that are
    codes already it leaves alone. NVFP4 is computed in FP32 whatever the dtype.
    """
    for fqn, linear_format in formats.items():
        weight = model.get_submodule(fqn).get_parameter("weight")
        rounded = weight.bfloat16()
        if linear_format == "fp8":
            scale = fp8.scale_from_amax(amaxes[fqn].weight).to(weight.device)
            rounded = fp8.dequantize(fp8.quantize(rounded, scale), scale, weight.dtype)
        weight.data.copy_(rounded)


def _prepare(
    linear: QuantizedLinear, name: str, checkpoint: Checkpoint, dtype: torch.dtype
) -> None:
    for leaf, tensor in linear.named_buffers():
        if leaf != "weight" and not bool(
            (tensor.float() > 0).all() & tensor.float().isfinite().all()
        ):
            raise CheckpointError(
                f"{checkpoint.folder}: {name}.{leaf}: scales must be finite and positive; "
                "quantize the source again"
            )
    linear.prepare(dtype)
    if linear.dense_weight is None or not linear.dense_weight.isfinite().all():
        raise CheckpointError(
            f"{checkpoint.folder}: {name}.weight: holds NaN; quantize the source again"
        )
