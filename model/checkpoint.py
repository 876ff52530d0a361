"""A checkpoint folder: config.json and safetensors files, opened lazily and checked fully.

Opening reads headers only (milliseconds for a 12B model, no torch), and proves that index and
shards tell the same story: every tensor the index names is in the shard it names, and no shard
holds a tensor the index lacks. Tensors are then read one at a time by name, so that a model
larger than memory can be walked. `nvvl.model.checkpoint_writer` is the other direction.

Which tensors the architecture needs is not known here: `require_tensors` compares with what the
network (`nvvl.model.load`) or config.json (`nvvl.model.tensor_list`) says.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from nvvl.errors import CheckpointError
from nvvl.model.checkpoint_writer import INDEX_NAME, SINGLE_NAME, CheckpointWriter
from nvvl.model.config import VLMConfig
from nvvl.model.safetensors_io import (
    TensorInfo,
    TensorSpec,
    map_bytes,
    read_header,
    read_tensor,
)

if TYPE_CHECKING:
    import torch

__all__ = ["Checkpoint", "CheckpointWriter", "TensorInfo", "TensorSpec"]

_RADIO = "vision_model.radio_model"
_PATCH_GENERATOR = f"{_RADIO}.model.patch_generator"


class Checkpoint:
    """The tensors of one folder by name, read on demand.

    Attributes:
        folder: Where it lies.
        tensors: Header entries, sorted by name.
        config: The typed config.json, with RADIO's token counts taken from tensor shapes.
    """

    folder: Path
    tensors: Mapping[str, TensorInfo]
    config: VLMConfig

    def __init__(self, folder: Path) -> None:
        """Read config.json, the index if there is one, and every header.

        Raises:
            ConfigError: if config.json is missing or describes another architecture.
            CheckpointError: if a file is missing or malformed, or index and shards disagree.
        """
        self.folder = Path(folder)
        config = VLMConfig.from_folder(self.folder)
        tensors = _read_tensors(self.folder)
        self.tensors = MappingProxyType(dict(sorted(tensors.items())))
        summary_idxs = self.tensors.get(f"{_RADIO}.summary_idxs")
        self.config = config.with_shapes(
            prefix_tokens=self._vision_shape("cls_token.token", 2)[0],
            positions=_require_square(self._vision_shape("pos_embed", 3)[1], self.folder),
            summary_idxs=0 if summary_idxs is None else summary_idxs.numel,
        )

    def info(self, name: str) -> TensorInfo:
        """Return the header entry of one tensor.

        Raises:
            CheckpointError: if the checkpoint has no such tensor.
        """
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.folder}: no tensor named {name}") from None

    def in_file_order(self) -> list[TensorInfo]:
        """Return the header entries in the order of their bytes, shard by shard."""
        return sorted(self.tensors.values(), key=lambda info: (info.file.name, info.start))

    def load(self, name: str) -> "torch.Tensor":
        """Read one tensor into fresh CPU memory, in the dtype it is stored in.

        Raises:
            CheckpointError: if there is no such tensor, or its file became shorter.
        """
        return read_tensor(self.info(name))

    def read_bytes(self, name: str) -> memoryview:
        """Map the bytes of one tensor read-only.

        Returns:
            (nbytes,) bytes, valid as long as the view lives.
        """
        return map_bytes(self.info(name))

    def sha256(self, name: str) -> str:
        """Return the SHA-256 of one tensor's bytes in hex."""
        return hashlib.sha256(self.read_bytes(name)).hexdigest()

    def _vision_shape(self, leaf: str, ndim: int) -> tuple[int, ...]:
        info = self.info(f"{_PATCH_GENERATOR}.{leaf}")
        if len(info.shape) != ndim:
            raise CheckpointError(
                f"{info.file}: {info.name}: required {ndim} dimensions, got shape {info.shape}"
            )
        return info.shape


def require_bf16_config(folder: Path, config: VLMConfig) -> None:
    """Refuse a folder that says it is quantized.

    Raises:
        CheckpointError: if config.json has a ``quantization_config``.
    """
    if "quantization_config" in config.raw:
        raise CheckpointError(
            f"{folder}: config.json has a quantization_config; required the BF16 checkpoint that "
            "it was made from"
        )


def require_tensors(
    folder: Path, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Compare names and shapes of a folder's tensors with those that config.json implies.

    Args:
        folder: For errors.
        found: Shapes by name.
        expected: Shapes by name.

    Raises:
        CheckpointError: listing every missing, unexpected and misshapen tensor, each kind sorted.
    """
    faults = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    faults += [f"{name} is unexpected" for name in sorted(found.keys() - expected.keys())]
    faults += [
        f"{name} has shape {found[name]}, required {expected[name]}"
        for name in sorted(expected.keys() & found.keys())
        if found[name] != expected[name]
    ]
    if faults:
        raise CheckpointError(
            f"{folder}: {len(faults)} tensors do not fit config.json: {'; '.join(faults)}; "
            "download it again"
        )


def require_finite(tensor: "torch.Tensor", info: TensorInfo) -> None:
    """Refuse NaN and Inf; tensors of integers have none.

    Args:
        tensor: The values of the tensor, or of a part of it, in any shape and dtype.
        info: Its header entry, for errors.

    Raises:
        CheckpointError: naming file and tensor.
    """
    # extremes carry NaN and Inf along; far cheaper than looking at each element with isfinite
    if tensor.is_floating_point() and tensor.numel():
        low, high = tensor.aminmax()
        if not (low.isfinite() and high.isfinite()):
            raise CheckpointError(f"{info.file}: {info.name}: holds NaN or Inf; download it again")


def _require_square(positions: int, folder: Path) -> int:
    if positions != math.isqrt(positions) ** 2:
        raise CheckpointError(
            f"{folder}: {_PATCH_GENERATOR}.pos_embed: required a square number of positions, "
            f"got {positions}"
        )
    return positions


def _read_tensors(folder: Path) -> dict[str, TensorInfo]:
    present = sorted(path.name for path in folder.glob("model*.safetensors"))
    weight_map = _read_weight_map(folder / INDEX_NAME)
    if weight_map is None:
        if present != [SINGLE_NAME]:
            raise CheckpointError(
                f"{folder}: required {SINGLE_NAME} alone, or {INDEX_NAME} with its shards; "
                f"got {', '.join(present) or 'no model*.safetensors'}; download it again"
            )
        return read_header(folder / SINGLE_NAME)
    shards = sorted(set(weight_map.values()))
    missing = [name for name in shards if not (folder / name).exists()]
    if missing:
        raise CheckpointError(
            f"{folder / INDEX_NAME}: names {', '.join(missing)}, which the folder lacks; "
            "download it again"
        )
    extra = sorted(set(present) - set(shards))
    if extra:
        raise CheckpointError(
            f"{folder}: {', '.join(extra)} is not in {INDEX_NAME}; remove it or the index"
        )
    headers = {shard: read_header(folder / shard) for shard in shards}
    _compare_index(folder, weight_map, headers)
    return {name: headers[shard][name] for name, shard in weight_map.items()}


def _read_weight_map(path: Path) -> dict[str, str] | None:
    """Read the tensor-to-shard map of an index; None if there is no index."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error}); download it again") from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map is missing or empty; download it again")
    for name, shard in weight_map.items():
        # a shard lies in the folder itself: anything else could read from elsewhere
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{path}: {name}: {shard!r} is not a file name")
    return weight_map


def _compare_index(
    folder: Path, weight_map: Mapping[str, str], headers: Mapping[str, Mapping[str, TensorInfo]]
) -> None:
    counts = Counter(name for header in headers.values() for name in header)
    found = {name: shard for shard, header in headers.items() for name in header}
    faults = [
        *(f"{name} is in {count} shards" for name, count in counts.items() if count > 1),
        *(f"{name} is in no shard" for name in weight_map if name not in found),
        *(f"{name} of {found[name]} is not in the index" for name in found.keys() - weight_map),
        *(
            f"{name} is in {found[name]}, the index says {shard}"
            for name, shard in weight_map.items()
            if counts[name] == 1 and found[name] != shard
        ),
    ]
    if faults:
        raise CheckpointError(
            f"{folder / INDEX_NAME}: index and shards disagree: {'; '.join(sorted(faults))}; "
            "download the folder again"
        )
