"""Tensors of a folder by name, read one at a time with the official safetensors library.

`nvvl.model.checkpoint` reads checkpoints for every other purpose; a proof does not use the reader
that belongs to the writer it judges.
"""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nvvl.errors import CheckpointError
from nvvl.export.view import CheckpointView

CALIBRATION_NAME = "calibration.amax"


class TensorFiles:
    """Reads the tensors that a view lists."""

    def __init__(self, view: CheckpointView) -> None:
        assert view.folder is not None  # a planned view has no bytes
        self._folder: Path = view.folder
        self._view = view

    def has(self, name: str) -> bool:
        """Whether there is a tensor of that name."""
        return name in self._view.tensors

    def read(self, name: str) -> Tensor:
        """Return a tensor in its stored dtype."""
        path = self._folder / self._view.tensors[name].file
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


def read_calibration(folder: Path) -> dict[str, float] | None:
    """Read the calibrated amax values of a folder; None if it holds none.

    Raises:
        CheckpointError: if the file is malformed or holds anything but scalars.
    """
    path = folder / CALIBRATION_NAME
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error})") from None
    wrong = sorted(n for n, t in tensors.items() if t.numel() != 1 or t.dtype != torch.float32)
    if wrong:
        raise CheckpointError(f"{path}: required float32 scalars, got {', '.join(wrong)}")
    return {name: float(tensor) for name, tensor in tensors.items()}


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes as they stand in a file: row-major, little-endian."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def hash_tensor(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's bytes in hex."""
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()
