"""What the bytes of an output, and the numbers of a run, depend on, as words to compare.

A run that was stopped goes on only where these are what it began with, and evaluations are
compared by them.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

import nvvl
from nvvl import cpu
from nvvl.errors import CheckpointError, reading
from nvvl.model.checkpoint import Checkpoint
from nvvl.model.hashing import hash_file
from nvvl.model.mamba_kernels import allowed_kernels
from nvvl.model.products import has_fast_bf16
from nvvl.model.scan import allowed_scan
from nvvl.quantize.manifest import library_versions
from nvvl.quantize.recipe import Recipe
from nvvl.quantize.side_files import copied_files

_MAX_NAMED = 4
_HASH = re.compile("[0-9a-f]{64}")

# How a user sets what the keys of a run say.
_OPTIONS = {
    "recipe.num_calibration_items": "--samples",
    "recipe.num_steps": "--steps",
    "recipe.learning_rate": "--lr",
    "data.set": "--data",
    "data.seed": "--seed",
}


def describe_run(
    checkpoint: Checkpoint, recipe: Recipe, *, device: str, calibration: str = ""
) -> dict[str, str]:
    """Say what the bytes of an output depend on, but for the calibration items.

    Weights are told by size, time of change and headers, because reading them takes as long as the
    run; the other files of the source by hash.

    Args:
        checkpoint: The source.
        recipe: The recipe in force.
        device: Kind of device that computes.
        calibration: Hash of the stored calibration that is packed from; empty if there is none.

    Raises:
        CheckpointError: if a file of the source cannot be read.
    """
    identity = {"nvvl": nvvl.__version__, "device": device, "stored calibration": calibration}
    identity |= {f"version of {name}": text for name, text in library_versions().items()}
    identity |= {f"recipe.{key}": json.dumps(value) for key, value in recipe.to_dict().items()}
    for path in [checkpoint.folder / "config.json", *copied_files(checkpoint.folder)]:
        try:
            identity[f"source {path.name}"] = hash_file(path)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    for path in sorted({info.file for info in checkpoint.tensors.values()}):
        with reading(path):
            status = path.stat()
        identity[f"source {path.name}"] = f"{status.st_size} bytes of {status.st_mtime_ns}"
    headers = [(i.name, i.dtype, i.shape, i.start) for i in checkpoint.tensors.values()]
    identity["source headers"] = hashlib.sha256(json.dumps(headers).encode()).hexdigest()
    return identity


def describe_arithmetic(device: torch.device) -> dict[str, str]:
    """Say what the rounding of activations depends on, and with it the amax of inputs.

    Libraries and compiled kernels sum in another order on another processor, of the same class too.
    """
    if device.type == "cuda":
        kernels = {} if allowed_kernels() is None else {"Mamba2 scan": "mamba-ssm"}
        return {"GPU": torch.cuda.get_device_name(device)} | kernels
    # tells processors apart that virtual machines give one name
    digest = hashlib.sha256(cpu.describe_cpu().encode()).hexdigest()[:8]
    scan = allowed_scan()
    return {
        "processor": torch.backends.cpu.get_cpu_capability(),
        "processor model": f"{cpu.cpu_name()} ({digest})",
        "products": "bfloat16" if has_fast_bf16() else "float32",
        "Mamba2 scan": "torch" if scan is None else f"compiled, {scan.variant}",
    }


def describe_differences(found: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Say where two descriptions of a run differ, with both values; a few of many.

    Args:
        found: Of the run that was stopped; its values may be mappings themselves.
        now: Of this one.
    """
    before, after = dict(_flatten(found)), dict(_flatten(now))
    lines = []
    for key in {**before, **after}:
        values = [str(side.get(key, "nothing")) for side in (before, after)]
        if before.get(key) == after.get(key):
            continue
        name = f"{key} ({_OPTIONS[key]})" if key in _OPTIONS else key
        if all(map(_HASH.fullmatch, values)):
            lines.append(f"{name}: other content now")
        else:
            lines.append(f"{name}: {values[0]} then, {values[1]} now")
    more = len(lines) - _MAX_NAMED
    return lines[:_MAX_NAMED] + ([f"and {more} more"] if more > 0 else [])


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
