"""The BF16 checkpoint of a plan: its tensors, from headers where there are any, without weights.

Where a folder has config.json but no shards, or not all of them, shapes come from the config, and
dtypes are those that this family usually has; notes then say so.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nvvl.errors import CheckpointError, describe_misfit
from nvvl.model.checkpoint import (
    Checkpoint,
    TensorSpec,
    require_bf16_config,
    require_tensors,
)
from nvvl.model.checkpoint_writer import INDEX_NAME
from nvvl.model.config import VLMConfig
from nvvl.model.tensor_list import list_tensors

_SUMMARY_IDXS = "vision_model.radio_model.summary_idxs"


@dataclass(frozen=True, kw_only=True)
class PlannedSource:
    """The BF16 checkpoint as far as it is known.

    Attributes:
        tensors: In file order.
        notes: What had to be assumed; empty where headers say everything.
    """

    config: VLMConfig
    tensors: Sequence[TensorSpec]
    notes: tuple[str, ...] = ()


def read_source(folder: Path) -> PlannedSource:
    """Read config.json and, as far as there are any, index and headers.

    Raises:
        ConfigError: if config.json cannot be used.
        CheckpointError: if tensors do not fit config.json, or the folder is quantized.
    """
    config = VLMConfig.from_folder(folder)
    require_bf16_config(folder, config)
    absent = _absent_shards(folder)
    if list(folder.glob("model*.safetensors")) and not absent:
        checkpoint = Checkpoint(folder)
        expected = {spec.name: spec.shape for spec in list_tensors(checkpoint.config)}
        found = {name: info.shape for name, info in checkpoint.tensors.items()}
        require_tensors(folder, found, expected)
        tensors = [
            TensorSpec(info.name, info.dtype, info.shape) for info in checkpoint.in_file_order()
        ]
        return PlannedSource(config=checkpoint.config, tensors=tensors)
    return _assume_source(folder, config, absent)


def _absent_shards(folder: Path) -> list[str]:
    """List the shards that an index names and that are not here, as in a download's middle."""
    try:
        index = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))
        return sorted(
            name for name in set(index["weight_map"].values()) if not (folder / name).exists()
        )
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return []  # what is wrong with the index is said by who reads the tensors


def _assume_source(folder: Path, config: VLMConfig, absent: Sequence[str]) -> PlannedSource:
    """List the tensors that config.json implies; compare them with the index if there is one."""
    which = (
        f"{len(absent)} of the shards are not here, the first {absent[0]}"
        if absent
        else "no shards here"
    )
    notes = [f"{which}: shapes from config.json, dtypes assumed, size not exact"]
    path = folder / INDEX_NAME
    if not path.exists():
        return PlannedSource(config=config, tensors=list_tensors(config), notes=tuple(notes))
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        names, total = set(index["weight_map"]), index.get("metadata", {}).get("total_size")
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a shard index ({describe_misfit(error)})") from None
    tensors = list_tensors(config)
    if _SUMMARY_IDXS in names:
        tensors.append(TensorSpec(_SUMMARY_IDXS, "I64", (1,)))
        notes.append(f"{_SUMMARY_IDXS}: length assumed to be 1")
    require_tensors(folder, dict.fromkeys(names, ()), {spec.name: () for spec in tensors})
    tensors.sort(key=lambda spec: index["weight_map"][spec.name])
    size = sum(spec.nbytes for spec in tensors)
    if total is not None and total != size:
        notes.append(f"{INDEX_NAME} says {total} bytes, these shapes and dtypes give {size}")
    return PlannedSource(config=config, tensors=tensors, notes=tuple(notes))
