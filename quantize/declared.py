"""What a folder's files say its formats are, and whether its tensors are those.

A server believes the declaration: ``hf_quant_config.json`` of ModelOpt and nvvl, or
``quantization_config`` of compressed-tensors. Formats are read off the tensors too, and both must
agree. Folders of other tools may quantize any linear and have a format that nvvl does not write;
what is made from a checkpoint, graphs and distilled models, takes nvvl's own formats only.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nvvl.errors import CheckpointError, describe_misfit
from nvvl.model.checkpoint import Checkpoint, TensorSpec
from nvvl.model.config import VLMConfig
from nvvl.model.load import expected_tensors
from nvvl.quantize.compressed_tensors import (
    CompressedTensorsCheckpoint,
    declared_formats,
    is_compressed_tensors,
)
from nvvl.quantize.layout import StoredFormat, linear_tensors
from nvvl.quantize.recipe import FORMATS, Format
from nvvl.quantize.server_config import MIXED, STORED_ALGORITHM_OF
from nvvl.quantize.side_files import HF_QUANT_CONFIG_NAME
from nvvl.quantize.targets import LinearShape, list_linears


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a folder that nvvl, ModelOpt or llm-compressor wrote; tensors get the released names.

    Raises:
        ConfigError, CheckpointError: as `Checkpoint`.
    """
    if is_compressed_tensors(VLMConfig.from_folder(folder).raw):
        return CompressedTensorsCheckpoint(folder)
    return Checkpoint(folder)


def is_quantized(checkpoint: Checkpoint) -> bool:
    """Whether a folder declares a quantization."""
    declared = (checkpoint.folder / HF_QUANT_CONFIG_NAME).exists()
    return declared or "quantization_config" in checkpoint.config.raw


def read_formats(checkpoint: Checkpoint) -> dict[str, Format]:
    """Return the format of every quantizable linear of a folder in nvvl's own layout.

    Raises:
        CheckpointError: if it is another tool's layout or format, or as `stored_formats`.
    """
    if is_compressed_tensors(checkpoint.config.raw):
        raise CheckpointError(
            f"{checkpoint.folder}: compressed-tensors wrote this; nvvl evaluates it and answers "
            "from it, but makes nothing else of it: quantize its BF16 source with nvvl"
        )
    formats: dict[str, Format] = {}
    for fqn, found in stored_formats(checkpoint, list_linears(checkpoint.config)).items():
        if found == "fp8-per-channel":
            raise CheckpointError(
                f"{checkpoint.folder}: {fqn} has FP8 scales per channel; required one of "
                f"{', '.join(FORMATS)}: quantize its BF16 source with nvvl"
            )
        formats[fqn] = found
    return formats


def stored_formats(
    checkpoint: Checkpoint, linears: Mapping[str, LinearShape]
) -> dict[str, StoredFormat]:
    """Return the format of every linear, and compare it with what is declared.

    Args:
        checkpoint: As `open_checkpoint` gives it.
        linears: Those that may be quantized.

    Raises:
        ConfigError, CheckpointError: if the declaration is missing or has something nvvl does not
            read, or the tensors have other formats than it says.
    """
    formats: dict[str, StoredFormat] = {}
    for fqn in linears:
        formats[fqn] = _stored_format(fqn, checkpoint)
    found = {fqn: STORED_ALGORITHM_OF[fmt] for fqn, fmt in formats.items() if fmt != "bf16"}
    if isinstance(checkpoint, CompressedTensorsCheckpoint):
        path = checkpoint.folder / "config.json"
        config = checkpoint.config.raw["quantization_config"]
        by_name = declared_formats(config, linears, path)
        declared = {fqn: STORED_ALGORITHM_OF[fmt] for fqn, fmt in by_name.items() if fmt != "bf16"}
    else:
        path = checkpoint.folder / HF_QUANT_CONFIG_NAME
        declared = _read_modelopt(path, found)
    if found != declared or not found:
        raise CheckpointError(
            f"{path}: declares other formats than the tensors have: "
            f"{_describe_difference(declared, found)}"
        )
    return formats


def check_quantized_tensors(
    checkpoint: Checkpoint,
    formats: Mapping[str, StoredFormat],
    linears: Mapping[str, LinearShape] | None = None,
) -> None:
    """Compare names, shapes and quantized dtypes of all tensors with what formats require.

    Args:
        checkpoint: The folder.
        formats: Of linears; others have the tensors of the BF16 model.
        linears: Shapes of those named in ``formats``; the quantizable ones by default.

    Raises:
        CheckpointError: listing every missing, unexpected and misshapen tensor, sorted.
    """
    shapes = list_linears(checkpoint.config) if linears is None else linears
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


def _read_modelopt(path: Path, found: Mapping[str, str]) -> dict[str, str]:
    """Return the algorithm that ``hf_quant_config.json`` declares for each linear.

    Args:
        path: The file.
        found: What the tensors say; a declaration for the whole model means these linears.
    """
    try:
        quantization = json.loads(path.read_text(encoding="utf-8"))["quantization"]
        algorithm = str(quantization["quant_algo"])
        layers: Mapping[str, Any] = quantization.get("quantized_layers") or {}
        declared = {fqn: str(entry["quant_algo"]) for fqn, entry in layers.items()}
        cache = quantization.get("kv_cache_quant_algo")
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: cannot be read as a quantization config ({describe_misfit(error)}); required "
            "for a folder with quantized tensors"
        ) from None
    known = {*STORED_ALGORITHM_OF.values(), MIXED}
    unknown = sorted({algorithm, *declared.values()} - known)
    if unknown:
        raise CheckpointError(
            f"{path}: quant_algo {', '.join(unknown)}; required one of {', '.join(sorted(known))}"
        )
    if cache is not None:
        raise CheckpointError(
            f"{path}: kv_cache_quant_algo {cache}; nvvl keeps the KV cache as it is and would "
            "judge another model: export it without"
        )
    return declared if algorithm == MIXED else dict.fromkeys(found, algorithm)


def _stored_format(fqn: str, checkpoint: Checkpoint) -> StoredFormat:
    weight = checkpoint.tensors.get(f"{fqn}.weight")
    dtype = "" if weight is None else weight.dtype  # one that is missing is named with the others
    if dtype == "F8_E4M3":
        scale = checkpoint.tensors.get(f"{fqn}.weight_scale")
        return "fp8-per-channel" if scale is not None and scale.shape else "fp8"
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
