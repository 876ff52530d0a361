"""The calibration items between two blocks, on disk: to go on after a kill, and to save memory.

One file holds what every item of a process is after one block. It is written item by item while
the block runs, hashed on the way by a thread of its own, and gets its final name when it is whole.
It is plain safetensors: the header, whose offsets are known last, stands in room left for it at the
front.

Whoever reads one back checks its hash first, because a killed machine may have lost any part.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from nvvl.errors import CheckpointError
from nvvl.model.checkpoint_writer import explain_os_errors
from nvvl.model.safetensors_io import (
    dtype_name,
    read_header,
    read_pieces,
    read_tensor,
    tensor_bytes,
)

# Bytes of a header entry: name, dtype, four sizes and two offsets of fifteen digits.
_ENTRY_BYTES = 192
_LENGTH_BYTES = 8
_PIECE_BYTES = 1 << 24


class SpillFolder:
    """Where the processes of a run keep their items; each has files of its own."""

    def __init__(self, folder: Path, *, index: int) -> None:
        """Take the folder, and the index of the process."""
        self.path = folder
        self._index = index

    def file(self, num_blocks: int) -> Path:
        """Return where this process keeps its items after so many blocks."""
        return self.path / f"activations-{num_blocks:05}-{self._index}.safetensors"

    def drop(self, *, before: int, every_process: bool = False) -> None:
        """Remove the items after fewer blocks than ``before``."""
        whose = "*" if every_process else self._index
        for path in self.path.glob(f"activations-*-{whose}.safetensors*"):  # .partial ones too
            if int(path.name.split("-")[1]) < before:
                path.unlink()


class Spill:
    """The items after one block, read back by name.

    Attributes:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        """Read the header.

        Raises:
            CheckpointError: if the file is missing or cut short.
        """
        self.path = path
        self._infos = read_header(path)

    def names(self) -> set[str]:
        """Return the names of all tensors."""
        return set(self._infos)

    def size_bytes(self, name: str) -> int:
        """Return the bytes of one tensor."""
        return self._infos[name].nbytes

    def load(self, name: str) -> Tensor:
        """Read one tensor."""
        return read_tensor(self._infos[name])

    def sha256(self) -> str:
        """Return what `SpillWriter.close` returned when this was written."""
        digest = hashlib.sha256()
        for name, info in self._infos.items():  # in the order of their bytes
            digest.update(_label(name, info.dtype, info.shape))
            for piece in read_pieces(info, _PIECE_BYTES):
                digest.update(tensor_bytes(piece))
        return digest.hexdigest()


class SpillWriter:
    """Writes one file, a tensor at a time.

    Attributes:
        size_bytes: Of the file so far.
    """

    def __init__(self, path: Path, *, num_tensors: int) -> None:
        """Open the file under a name that nobody reads.

        Args:
            path: Its final name; an older file of that name is replaced.
            num_tensors: Most tensors that will be added.

        Raises:
            OutputError: if it cannot be made.
        """
        self._path = path
        self._partial = path.with_name(path.name + ".partial")
        self._room = -(-(_ENTRY_BYTES * num_tensors + 64) // 8) * 8
        self._entries: dict[str, object] = {}
        self._digest = hashlib.sha256()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="spill")
        self._pending: Future[None] | None = None
        self.size_bytes = _LENGTH_BYTES + self._room
        with explain_os_errors(path, self.size_bytes):
            self._file = self._partial.open("w+b", buffering=0)

    def add(self, name: str, tensor: Tensor) -> None:
        """Add one tensor; it is written while the caller goes on.

        Raises:
            OutputError: if the disk is full, for this tensor or the one before.
        """
        self._wait()
        start = self.size_bytes - _LENGTH_BYTES - self._room
        dtype, shape = dtype_name(tensor.dtype), tuple(tensor.shape)
        self._entries[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [start, start + tensor.nbytes],
        }
        place, self.size_bytes = self.size_bytes, self.size_bytes + tensor.nbytes
        label = _label(name, dtype, shape)
        self._pending = self._pool.submit(self._write, label, tensor, place)

    def close(self) -> str:
        """Finish the file and give it its name.

        Returns:
            A hash of all names, dtypes, shapes and values.

        Raises:
            OutputError: if the disk is full.
        """
        self._wait()
        self._pool.shutdown()
        text = json.dumps(self._entries, separators=(",", ":")).encode()
        assert len(text) <= self._room, "spill: a header longer than the room left for it"
        header = self._room.to_bytes(_LENGTH_BYTES, "little") + text.ljust(self._room)
        with explain_os_errors(self._path, len(header)):
            os.pwrite(self._file.fileno(), header, 0)
            self._file.close()
            self._partial.replace(self._path)
        return self._digest.hexdigest()

    def abandon(self) -> None:
        """Give up: nothing is left on disk. May be called after an error, and twice."""
        self._pool.shutdown()
        self._file.close()
        self._partial.unlink(missing_ok=True)

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, label: bytes, tensor: Tensor, place: int) -> None:
        data = tensor_bytes(tensor)
        self._digest.update(label)
        self._digest.update(data)
        done = 0
        with explain_os_errors(self._path, len(data)):
            while done < len(data):  # one call writes at most 2 GiB on Linux
                done += os.pwrite(self._file.fileno(), data[done:], place + done)


def open_spill(path: Path, sha256: str) -> Spill | None:
    """Return a spill if it is whole and has the hash that was noted for it, else None."""
    try:
        spill = Spill(path)
    except CheckpointError:
        return None  # missing, or cut short
    return spill if spill.sha256() == sha256 else None


def _label(name: str, dtype: str, shape: Sequence[int]) -> bytes:
    return f"{name} {dtype} {list(shape)}\n".encode()
