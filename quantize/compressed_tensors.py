"""Reads what llm-compressor writes (compressed-tensors) as a checkpoint with our names and scales.

Two conventions differ from the layout of `nvvl.quantize.layout`:

* a packed weight is called ``weight_packed``, and NVFP4's tensor scales are stored as reciprocals:
  ``weight_global_scale = 6 * 448 / amax``, ``input_global_scale`` likewise. One over them, in FP32,
  is what vLLM computes with too; codes and block scales are the same bytes;
* scalars have shape (1,), and FP8 scales the dtype of the model.

The formats are declared in config.json as ``config_groups``: which weights and inputs have which
numbers, for modules matched by class, name or regular expression, less those in ``ignore``. What
is not understood in full is refused: a group of another kind, transforms, sparsity, a quantized KV
cache or output. Layout and matching: compressed-tensors 0.20, ``quant_config.py``, ``match.py``.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from nvvl.errors import CheckpointError, ConfigError
from nvvl.model.checkpoint import Checkpoint, TensorInfo
from nvvl.model.patterns import matches_pattern
from nvvl.quantize.layout import StoredFormat
from nvvl.quantize.server_config import MIXED, STORED_ALGORITHM_OF

if TYPE_CHECKING:
    import torch

QUANT_METHOD = "compressed-tensors"

# Our names of peculiar leaves.
_RENAMED = {
    "weight_packed": "weight",
    "weight_global_scale": "weight_scale_2",
    "input_global_scale": "input_scale",
}
_RECIPROCALS = ("weight_global_scale", "input_global_scale")
_SCALES = (*_RECIPROCALS, "weight_scale", "input_scale")
_FLOATS = ("BF16", "F16", "F32")

# Weights and inputs, as `_say` puts them.
_FORMATS: Mapping[tuple[str, str], StoredFormat] = {
    ("float8 per tensor", "float8 per tensor"): "fp8",
    ("float8 per channel", "float8 per token, dynamic"): "fp8-per-channel",
    ("float4 per tensor_group of 16", "float4 per tensor_group of 16, dynamic local"): "nvfp4",
    ("float4 per tensor_group of 16", "plain"): "nvfp4-w4a16",
}


def is_compressed_tensors(raw_config: Mapping[str, Any]) -> bool:
    """Tell whether a config.json says that compressed-tensors wrote the weights."""
    return (raw_config.get("quantization_config") or {}).get("quant_method") == QUANT_METHOD


def declared_algorithm(config: Mapping[str, Any], where: Path) -> str:
    """Return what ModelOpt would call the formats of a folder: FP8, NVFP4, MIXED_PRECISION...

    Args:
        config: ``quantization_config``.
        where: config.json, for messages.

    Raises:
        ConfigError: as `declared_formats`.
    """
    names = {STORED_ALGORITHM_OF[linear_format] for _, linear_format in _read_groups(config, where)}
    return names.pop() if len(names) == 1 else MIXED


class CompressedTensorsCheckpoint(Checkpoint):
    """A compressed-tensors folder whose tensors have our names, shapes and scales.

    ``tensors`` describes what `load` returns; where that is converted, the place in the file is
    still that of the stored tensor.
    """

    def __init__(self, folder: Path) -> None:
        """Open the folder.

        Raises:
            ConfigError, CheckpointError: as `Checkpoint`, or if two tensors get one name.
        """
        super().__init__(folder)
        self._stored: dict[str, TensorInfo] = {}
        ours: dict[str, TensorInfo] = {}
        for info in self.tensors.values():
            renamed = _describe(info)
            if renamed.name in ours:
                raise CheckpointError(
                    f"{folder}: {self._stored[renamed.name].name} and {info.name} both stand for "
                    f"{renamed.name}; required one of them"
                )
            ours[renamed.name] = renamed
            self._stored[renamed.name] = info
        self.tensors = MappingProxyType(dict(sorted(ours.items())))

    def load(self, name: str) -> "torch.Tensor":
        """Read one tensor, converted to our conventions, into fresh CPU memory."""
        from nvvl.model.safetensors_io import read_tensor

        info = self.info(name)
        tensor = read_tensor(self._stored[name])
        if _converts(self._stored[name]):
            tensor = tensor.float().reshape(info.shape)
            if self._stored[name].name.endswith(_RECIPROCALS):
                tensor = tensor.reciprocal()
        return tensor

    def read_bytes(self, name: str) -> memoryview:
        """Map the bytes of one tensor read-only.

        Raises:
            CheckpointError: if the stored bytes are not those of the tensor that `load` gives.
        """
        if _converts(self._stored[self.info(name).name]):
            raise CheckpointError(f"{self.folder}: {name} is converted when read, and has no bytes")
        return super().read_bytes(name)


def declared_formats(
    config: Mapping[str, Any], linears: Iterable[str], where: Path
) -> dict[str, StoredFormat]:
    """Return the format that config.json declares for each linear; ``bf16`` where none.

    Args:
        config: ``quantization_config``.
        linears: Names of linears.
        where: config.json, for messages.

    Raises:
        ConfigError: if it asks for something that is not understood.
    """
    groups = _read_groups(config, where)
    ignored = _strings(config.get("ignore") or [], f"{where}: ignore")
    formats: dict[str, StoredFormat] = {}
    for fqn in linears:
        formats[fqn] = "bf16"
        if _matches(fqn, ignored):
            continue
        for targets, linear_format in groups:
            if _matches(fqn, targets):
                formats[fqn] = linear_format
                break
    return formats


def _read_groups(config: Mapping[str, Any], where: Path) -> list[tuple[list[str], StoredFormat]]:
    status = config.get("quantization_status")
    if status != "compressed":
        raise ConfigError(
            f"{where}: quantization_status {status!r}; required 'compressed': save the model with "
            "save_compressed=True"
        )
    for key in ("kv_cache_scheme", "transform_config", "sparsity_config"):
        part = config.get(key)
        if part and not (isinstance(part, dict) and part.get("format") == "dense"):
            raise ConfigError(
                f"{where}: {key} is set; nvvl computes without it and would judge another model"
            )
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise ConfigError(f"{where}: config_groups is missing or empty; required at least one")
    return [_read_group(group, f"{where}: config_groups.{name}") for name, group in groups.items()]


def _read_group(group: Any, where: str) -> tuple[list[str], StoredFormat]:
    if not isinstance(group, dict):
        raise ConfigError(f"{where}: required a scheme written out in full, got {group!r}")
    targets = _strings(group.get("targets"), f"{where}.targets")
    if group.get("output_activations") is not None:
        raise ConfigError(f"{where}: outputs are quantized, which nvvl cannot compute with")
    weights, inputs = (_say(group.get(key)) for key in ("weights", "input_activations"))
    found = _FORMATS.get((weights, inputs))
    if found is None:
        raise ConfigError(
            f"{where}: weights {weights}, inputs {inputs}; nvvl reads the schemes FP8, "
            "FP8_DYNAMIC, NVFP4 and NVFP4A16"
        )
    return targets, found


def _say(args: Any) -> str:
    """Put a kind of number into words: type, bits, what shares a scale, when it is found."""
    if args is None:
        return "plain"
    if not isinstance(args, dict):
        return repr(args)
    words = f"{args.get('type')}{args.get('num_bits')} per {args.get('strategy')}"
    if args.get("group_size"):
        words += f" of {args['group_size']}"
    if not args.get("symmetric", True):
        words += ", asymmetric"
    if args.get("dynamic"):
        words += ", dynamic" if args["dynamic"] is True else f", dynamic {args['dynamic']}"
    return words


def _strings(values: Any, where: str) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ConfigError(f"{where}: required a list of strings, got {values!r}")
    for value in (value for value in values if value.startswith("re:")):
        try:
            re.compile(value.removeprefix("re:"))
        except re.error as error:
            raise ConfigError(f"{where}: {value!r} is not a regular expression ({error})") from None
    return values


def _matches(fqn: str, targets: Iterable[str]) -> bool:
    return any(
        matches_pattern(target.removeprefix("re:"), fqn, whole=False)
        if target.startswith("re:")
        else target in (fqn, "Linear")
        for target in targets
    )


def _describe(info: TensorInfo) -> TensorInfo:
    """Say what a stored tensor is in our layout."""
    owner, _, leaf = info.name.rpartition(".")
    name = f"{owner}.{_RENAMED.get(leaf, leaf)}"
    if not _converts(info):
        return TensorInfo(name, info.dtype, info.shape, info.file, info.start, info.end)
    shape = () if info.numel == 1 else tuple(size for size in info.shape if size != 1)
    return TensorInfo(name, "F32", shape, info.file, info.start, info.end)


def _converts(info: TensorInfo) -> bool:
    """Whether a tensor is a scale that is kept in another form than ours; block scales are not."""
    return info.name.rpartition(".")[2] in _SCALES and info.dtype in _FLOATS
