"""What the bytes of an output, and the numbers of a run, depend on, as words to compare.

A run that was stopped goes on only where these are what it began with, and evaluations are
compared by them.
"""

import hashlib
import json

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
    return {
        "processor": torch.backends.cpu.get_cpu_capability(),
        "processor model": f"{cpu.cpu_name()} ({digest})",
        "products": "bfloat16" if has_fast_bf16() else "float32",
        "Mamba2 scan": "torch" if allowed_scan() is None else "compiled",
    }
