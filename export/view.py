"""A checkpoint folder as the rules see it: two JSON files, tensor headers and a few scalars.

Opened with the official safetensors reader, not with nvvl's own, so that a fault shared by nvvl's
writer and reader shows. Nothing here imports torch; a view can also be made from a planned layout
before a byte is written, then without a `scalar_reader`.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError, safe_open

from nvvl.errors import CheckpointError
from nvvl.export.json_files import read_json

INDEX_NAME = "model.safetensors.index.json"
LAYER = re.compile(r"language_model\.backbone\.layers\.(\d+)\.")
EMBEDDINGS = "language_model.backbone.embeddings"
LM_HEAD = "language_model.lm_head"
SCALE_LEAVES = ("weight_scale", "weight_scale_2", "input_scale")

Stored = Literal["bf16", "fp8", "nvfp4"]

_DTYPE_BITS = {
    **dict.fromkeys(("F64", "I64", "U64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("BF16", "F16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "U8", "I8", "BOOL"), 8),
}


@dataclass(frozen=True)
class TensorHeader:
    """One tensor of a file: safetensors dtype, shape, and the file that holds it."""

    dtype: str
    shape: tuple[int, ...]
    file: str

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return math.prod(self.shape) * _DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True)
class Declaration:
    """What a quantization config claims, whichever of the two files it stands in.

    Attributes:
        algo: ``quant_algo`` in upper case; empty if absent.
        layers: ``quantized_layers`` of MIXED_PRECISION: module name to its algorithm.
    """

    algo: str
    kv_cache_algo: str | None
    group_size: int | None
    exclude: tuple[str, ...]
    layers: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class CheckpointView:
    """The parts of a checkpoint that can be judged without reading weights.

    Attributes:
        config: config.json.
        hf_quant_config: hf_quant_config.json, or None if the folder has none.
        tensors: Header entry of each tensor.
        scalar_reader: Reads a tensor of one float32 element; None if values are not known.
        index: The shard index, or None if there is one file.
        shards: Names of the tensors in each file.
        folder: Where it lies, or None if it is only planned.
        source: The BF16 checkpoint it was made from, if known.
    """

    config: Mapping[str, Any]
    hf_quant_config: Mapping[str, Any] | None
    tensors: Mapping[str, TensorHeader]
    scalar_reader: Callable[[str], float] | None = None
    index: Mapping[str, Any] | None = None
    shards: Mapping[str, frozenset[str]] = field(default_factory=dict)
    folder: Path | None = None
    source: "CheckpointView | None" = None

    @property
    def language_config(self) -> Mapping[str, Any]:
        """The language model's part of config.json; empty if it is missing."""
        part = self.config.get("llm_config", self.config.get("text_config"))
        return part if isinstance(part, dict) else {}

    @cached_property
    def code_files(self) -> tuple[str, ...]:
        """Names of the code files that auto_map of config.json names, sorted.

        Raises:
            CheckpointError: if auto_map is no object.
        """
        auto_map = self.config.get("auto_map") or {}
        if not isinstance(auto_map, dict):
            raise CheckpointError(
                f"config.json: auto_map: required an object, got {auto_map!r:.60}; take the file "
                "from the source checkpoint"
            )
        modules = set()
        for value in auto_map.values():
            for target in value if isinstance(value, list) else [value]:
                if isinstance(target, str):  # a list has null for a class that does not exist
                    modules.add(target.rpartition("--")[2].partition(".")[0])
        return tuple(f"{module}.py" for module in sorted(modules))

    @property
    def missing_code_files(self) -> tuple[str, ...]:
        """Those of `code_files` that are not in the folder."""
        assert self.folder is not None  # a planned view has no files
        return tuple(name for name in self.code_files if not (self.folder / name).is_file())

    @cached_property
    def linears(self) -> tuple[str, ...]:
        """Module names of every linear layer, sorted: a 2-D ``weight`` that is no embedding."""
        return tuple(
            sorted(
                name.removesuffix(".weight")
                for name, header in self.tensors.items()
                if name.endswith(".weight")
                and len(header.shape) == 2
                and not name.startswith(EMBEDDINGS)
            )
        )

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """Names of every module that owns a tensor, sorted."""
        return tuple(sorted({name.rpartition(".")[0] for name in self.tensors}))

    @cached_property
    def language_linears(self) -> tuple[str, ...]:
        """Linears of the language model's layers, without lm_head."""
        return tuple(fqn for fqn in self.linears if LAYER.match(fqn))

    @cached_property
    def attention_layers(self) -> tuple[str, ...]:
        """Names of mixers that have a q_proj, sorted."""
        return tuple(
            fqn.removesuffix(".q_proj") for fqn in self.language_linears if fqn.endswith(".q_proj")
        )

    @cached_property
    def declaration(self) -> Declaration | None:
        """What vLLM goes by: config.json's quantization_config, else hf_quant_config.json."""
        return self.config_declaration or self.hf_declaration

    @property
    def is_quantized(self) -> bool:
        """Whether weights are quantized, or declared to be, by whichever tool."""
        declared = self.hf_quant_config or self.config.get("quantization_config")
        return declared is not None or any(self.stored(fqn) != "bf16" for fqn in self.linears)

    @cached_property
    def config_declaration(self) -> Declaration | None:
        """The declaration in config.json."""
        part = self.config.get("quantization_config")
        if not isinstance(part, dict):
            return None
        kv_scheme = part.get("kv_cache_scheme")
        return _declare(
            part,
            exclude=part.get("ignore"),
            kv_cache_algo=None if kv_scheme is None else _name_kv_scheme(kv_scheme),
            group_size=part.get("group_size", _find_group_size(part.get("config_groups"))),
        )

    @cached_property
    def hf_declaration(self) -> Declaration | None:
        """The declaration in hf_quant_config.json."""
        part = (self.hf_quant_config or {}).get("quantization")
        if not isinstance(part, dict):
            return None
        return _declare(
            part,
            exclude=part.get("exclude_modules"),
            kv_cache_algo=part.get("kv_cache_quant_algo"),
            group_size=part.get("group_size"),
        )

    def stored(self, fqn: str) -> Stored:
        """Return the format a linear's weight is stored in, going by its dtype."""
        dtype = self.tensors[f"{fqn}.weight"].dtype
        return {"U8": "nvfp4", "F8_E4M3": "fp8"}.get(dtype, "bf16")  # type: ignore[return-value]

    def is_weight_only(self, fqn: str) -> bool:
        """Whether an NVFP4 linear is declared to take 16-bit inputs."""
        if self.declaration is None:
            return False
        algo = self.declaration.layers.get(fqn, self.declaration.algo)
        return algo == "W4A16_NVFP4"

    def scalar(self, name: str) -> float | None:
        """Return the value of a float32 scalar; None if the tensor is missing or is not one."""
        header = self.tensors.get(name)
        if header is None or self.scalar_reader is None:
            return None
        if header.dtype != "F32" or math.prod(header.shape) != 1:
            return None
        return self.scalar_reader(name)


def is_scale(name: str) -> bool:
    """Whether a tensor of this name is a scale."""
    return name.rpartition(".")[2] in (*SCALE_LEAVES, "k_scale", "v_scale")


def open_view(
    folder: Path, *, source: CheckpointView | None = None, strays: bool = True
) -> CheckpointView:
    """Read the JSON files and every header of a folder.

    Args:
        folder: A checkpoint.
        source: The BF16 checkpoint it was made from, if known.
        strays: Whether safetensors files count that are not the model's by name or index: a server
            may read them. Of a source they do not, no more than when it is quantized.

    Raises:
        CheckpointError: if config.json or the safetensors files are missing or malformed.
    """
    index = read_json(folder / INDEX_NAME)
    weights = sorted(folder.glob("*.safetensors"))
    if not strays:
        weight_map = (index or {}).get("weight_map")
        named = set(weight_map.values()) if isinstance(weight_map, dict) else set()
        weights = [p for p in weights if p.name in named or p.name.startswith("model")]
    if not weights:
        raise CheckpointError(f"{folder}: no *.safetensors file; give the folder of a checkpoint")
    headers = {path.name: read_headers(path) for path in weights}
    tensors = {name: header for part in headers.values() for name, header in part.items()}
    config = read_json(folder / "config.json")
    if config is None:
        raise CheckpointError(f"{folder}: no config.json; give the folder of a checkpoint")

    def read_scalar(name: str) -> float:
        with safe_open(folder / tensors[name].file, framework="numpy") as file:
            return float(np.asarray(file.get_tensor(name)).reshape(()))

    return CheckpointView(
        config=config,
        hf_quant_config=read_json(folder / "hf_quant_config.json"),
        tensors=tensors,
        scalar_reader=read_scalar,
        index=index,
        shards={name: frozenset(part) for name, part in headers.items()},
        folder=folder,
        source=source,
    )


def open_source(folder: Path) -> CheckpointView:
    """Open the BF16 checkpoint that another is compared with.

    Raises:
        CheckpointError: as `open_view`, or if its weights are quantized.
    """
    view = open_view(folder, strays=False)
    if view.is_quantized:
        raise CheckpointError(
            f"{folder}: holds quantized weights; required the BF16 checkpoint that they were made "
            "from"
        )
    return view


def read_headers(path: Path) -> dict[str, TensorHeader]:
    """Read one file's header with the official reader.

    Raises:
        CheckpointError: if the reader refuses the file, or a tensor has a dtype that no format has.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            headers = {
                name: TensorHeader(part.get_dtype(), tuple(part.get_shape()), path.name)
                for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error})") from None
    for name, header in headers.items():
        if header.dtype not in _DTYPE_BITS:
            raise CheckpointError(
                f"{path}: {name}: required one of {', '.join(_DTYPE_BITS)}, got {header.dtype}; "
                "quantize the BF16 checkpoint with nvvl"
            )
    return headers


def _declare(
    part: Mapping[str, Any], *, exclude: Any, kv_cache_algo: str | None, group_size: Any
) -> Declaration:
    layers = part.get("quantized_layers") or {}
    return Declaration(
        algo=str(part.get("quant_algo") or "").upper(),
        kv_cache_algo=kv_cache_algo,
        group_size=group_size,
        exclude=tuple(exclude) if isinstance(exclude, list) else (),
        layers={name: str(values.get("quant_algo", "")).upper() for name, values in layers.items()},
    )


def _name_kv_scheme(scheme: Any) -> str:
    if isinstance(scheme, dict) and (scheme.get("type"), scheme.get("num_bits")) == ("float", 8):
        return "FP8"
    return str(scheme)


def _find_group_size(groups: Mapping[str, Any] | None) -> int | None:
    """Return the block size of the first group that has one."""
    for group in (groups or {}).values():
        size: int | None = (group.get("weights") or {}).get("group_size")
        if size is not None:
            return size
    return None
