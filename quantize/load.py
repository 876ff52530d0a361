"""Reads a checkpoint folder, quantized or not, into a model that runs anywhere torch does.

Two models come from a quantized folder, and they must agree bit for bit, which ``nvvl verify``
checks:

* `load_any` reads the packed tensors, as a server would: codes and scales from disk.
* `fake_quant_model` takes the BF16 source and puts ModelOpt's quantizers on it, with the amax of
  ``calibration.safetensors``: the model that was calibrated.

Formats are read off the tensors themselves and must be those that ``hf_quant_config.json``
declares, because a server believes the latter.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nvvl.errors import CheckpointError
from nvvl.model.checkpoint import Checkpoint, TensorSpec
from nvvl.model.load import expected_tensors, load_model, materialize
from nvvl.model.vlm import NemotronNanoVL
from nvvl.quantize import fp8
from nvvl.quantize.layout import CALIBRATION_NAME, linear_tensors
from nvvl.quantize.linear import QuantizedLinear
from nvvl.quantize.pack import Amax, read_amaxes
from nvvl.quantize.recipe import FORMATS, Format
from nvvl.quantize.server_config import ALGORITHM_OF, MIXED
from nvvl.quantize.side_files import HF_QUANT_CONFIG_NAME, RECIPE_NAME
from nvvl.quantize.targets import list_linears, quantized_only


def load_any(
    folder: Path, *, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu"
) -> NemotronNanoVL:
    """Load a BF16, FP8, NVFP4 or mixed checkpoint for inference.

    Args:
        folder: A checkpoint folder in the released layout.
        dtype: Of activations and products.
        device: Where the tensors go.

    Raises:
        ConfigError: if config.json cannot be used.
        CheckpointError: if tensors are missing, unexpected, of another shape or dtype, or not
            finite, or if the declared formats are unknown or not those of the tensors.
    """
    checkpoint = Checkpoint(folder)
    if not is_quantized(checkpoint):
        return load_model(folder, dtype=dtype, device=device)
    formats = read_formats(checkpoint)
    check_quantized_tensors(checkpoint, formats)
    with torch.device("meta"):
        model = NemotronNanoVL(checkpoint.config)
        shapes = list_linears(checkpoint.config)
        for fqn, linear_format in formats.items():
            if linear_format != "bf16":
                _replace(model, fqn, QuantizedLinear(shapes[fqn], linear_format))
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
        out: The quantized folder, for ``recipe.json`` and ``calibration.safetensors``; its weights
            are not read.
        dtype: Of activations and products.
        device: Where the tensors go.

    Raises:
        CheckpointError: if one of the files is missing or does not fit the source.
    """
    from nvvl.quantize.calibrate import insert_quantizers, set_amaxes

    model = load_model(source, dtype=dtype, device=device)
    formats = read_recipe_formats(Path(out) / RECIPE_NAME, list_linears(model.config))
    quantized = quantized_only(formats)
    amaxes = read_amaxes(Path(out) / CALIBRATION_NAME, quantized)
    if dtype != torch.bfloat16:
        _round_as_packed(model, quantized, amaxes)
    insert_quantizers(model, quantized, algorithm=None)
    set_amaxes(model, amaxes)
    return model


def is_quantized(checkpoint: Checkpoint) -> bool:
    """Whether a folder declares a quantization."""
    declared = (checkpoint.folder / HF_QUANT_CONFIG_NAME).exists()
    return declared or "quantization_config" in checkpoint.config.raw


def read_formats(checkpoint: Checkpoint) -> dict[str, Format]:
    """Return the format of every quantizable linear, and compare it with what is declared.

    Raises:
        CheckpointError: if the declaration is missing, names an algorithm nvvl does not read, or
            the tensors have other formats than it says.
    """
    path = checkpoint.folder / HF_QUANT_CONFIG_NAME
    try:
        quantization = json.loads(path.read_text(encoding="utf-8"))["quantization"]
        algorithm = str(quantization["quant_algo"])
        layers: Mapping[str, Any] = quantization.get("quantized_layers") or {}
        declared = {fqn: str(entry["quant_algo"]) for fqn, entry in layers.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: cannot be read as a quantization config ({error!r}); required for a folder "
            "with quantized tensors"
        ) from None
    known = {*ALGORITHM_OF.values(), MIXED}
    unknown = sorted({algorithm, *declared.values()} - known)
    if unknown:
        raise CheckpointError(
            f"{path}: quant_algo {', '.join(unknown)}; required one of {', '.join(sorted(known))}"
        )
    formats: dict[str, Format] = {}
    for fqn in list_linears(checkpoint.config):
        formats[fqn] = _stored_format(fqn, checkpoint)
    found = {fqn: ALGORITHM_OF[fmt] for fqn, fmt in quantized_only(formats).items()}
    if algorithm != MIXED:
        declared = dict.fromkeys(found, algorithm)
    if found != declared or not found:
        raise CheckpointError(
            f"{path}: declares other formats than the tensors have: "
            f"{_describe_difference(declared, found)}"
        )
    return formats


def check_quantized_tensors(checkpoint: Checkpoint, formats: Mapping[str, Format]) -> None:
    """Compare names, shapes and quantized dtypes of all tensors with what formats require.

    Raises:
        CheckpointError: listing every missing, unexpected and misshapen tensor, sorted.
    """
    shapes = list_linears(checkpoint.config)
    expected: dict[str, TensorSpec] = {}
    for name, shape in expected_tensors(checkpoint.config).items():
        fqn = name.removesuffix(".weight")
        if formats.get(fqn, "bf16") == "bf16":
            expected[name] = TensorSpec(name, "", shape)
        else:
            specs = linear_tensors(fqn, shapes[fqn], formats[fqn])
            expected |= {spec.name: spec for spec in specs}
    faults = [f"{name} is missing" for name in expected.keys() - checkpoint.tensors]
    faults += [f"{name} is unexpected" for name in checkpoint.tensors.keys() - expected]
    for name in expected.keys() & checkpoint.tensors:
        info, spec = checkpoint.tensors[name], expected[name]
        if info.shape != spec.shape or (spec.dtype and info.dtype != spec.dtype):
            faults.append(
                f"{name} is {info.dtype} {info.shape}, required {spec.dtype} {spec.shape}"
            )
    if faults:
        raise CheckpointError(
            f"{checkpoint.folder}: {len(faults)} tensors do not fit config.json and formats: "
            f"{'; '.join(sorted(faults))}"
        )


def read_recipe_formats(path: Path, linears: Mapping[str, object]) -> dict[str, Format]:
    """Read the resolved formats of ``recipe.json``.

    Raises:
        CheckpointError: if it is missing, or is not for a model with these linears.
    """
    try:
        formats = json.loads(path.read_text(encoding="utf-8"))["formats"]
        fits = formats.keys() == linears.keys() and set(formats.values()) <= set(FORMATS)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a recipe that nvvl wrote ({error!r})") from None
    if not fits:
        raise CheckpointError(f"{path}: was made for another model; give its own source")
    return dict(formats)


def _stored_format(fqn: str, checkpoint: Checkpoint) -> Format:
    dtype = checkpoint.info(f"{fqn}.weight").dtype
    if dtype == "F8_E4M3":
        return "fp8"
    if dtype == "U8":
        return "nvfp4" if f"{fqn}.input_scale" in checkpoint.tensors else "nvfp4-w4a16"
    return "bf16"


def _describe_difference(declared: Mapping[str, str], found: Mapping[str, str]) -> str:
    names = sorted(fqn for fqn in declared.keys() | found if declared.get(fqn) != found.get(fqn))
    if not names:
        return "no linear is quantized"
    first = names[0]
    return (
        f"{first} is declared {declared.get(first, 'BF16')}, its tensors are "
        f"{found.get(first, 'BF16')}" + (f" (and {len(names) - 1} more)" if names[1:] else "")
    )


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


def _replace(model: nn.Module, fqn: str, module: nn.Module) -> None:
    parent, _, leaf = fqn.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
