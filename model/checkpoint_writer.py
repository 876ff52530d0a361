"""Writes a checkpoint folder tensor by tensor, when the whole layout is known beforehand.

Because names, dtypes and shapes are known first, every header, byte offset and file size is too:
tensors arrive in any order, each is written at its place and dropped, and `plan_shards` tells
`nvvl plan` the exact bytes on disk without writing anything. The same layout and tensors give the
same bytes on every machine.

Shards carry the suffix ``.partial`` until `CheckpointWriter.finish`, so a killed run never looks
like a checkpoint. It can be resumed: tensors whose bytes on disk still have the hash that was
noted for them are not written again.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO

from nvvl.errors import OutputError, require_disk
from nvvl.model.safetensors_io import (
    TensorInfo,
    TensorSpec,
    dtype_name,
    encode_header,
    map_bytes,
    tensor_bytes,
)

if TYPE_CHECKING:
    import torch

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000
_METADATA = {"format": "pt"}


@dataclass(frozen=True)
class Shard:
    """One file to be written: its name, the bytes before the data, and its tensors in order."""

    name: str
    header: bytes
    specs: tuple[TensorSpec, ...]

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.nbytes for spec in self.specs)

    @property
    def file_bytes(self) -> int:
        """Exact size of the file."""
        return len(self.header) + self.data_bytes


def plan_shards(
    layout: Sequence[TensorSpec],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    metadata: Mapping[str, str] = _METADATA,
) -> tuple[Shard, ...]:
    """Distribute tensors over files in the order given; each file holds as many as fit.

    Args:
        layout: Every tensor of the checkpoint.
        max_shard_bytes: Data bytes a file may hold; a larger tensor gets a file of its own.
        metadata: Text pairs for each header.

    Raises:
        ValueError: if the layout is empty or names a tensor twice.
    """
    names = [spec.name for spec in layout]
    if not names or len(set(names)) < len(names):
        raise ValueError("layout: required at least one tensor, each name once")
    groups: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in layout:
        if groups[-1] and size + spec.nbytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(spec)
        size += spec.nbytes
    count = len(groups)
    return tuple(
        Shard(
            SINGLE_NAME if count == 1 else f"model-{i:05}-of-{count:05}.safetensors",
            encode_header(group, metadata),
            tuple(group),
        )
        for i, group in enumerate(groups, start=1)
    )


def files_bytes(shards: Sequence[Shard]) -> int:
    """Return the exact bytes of all files that a plan leads to, index included."""
    return sum(shard.file_bytes for shard in shards) + len(_encode_index(shards))


class CheckpointWriter:
    """Writes the tensors of one layout, in any order, each once.

    Attributes:
        written: Names of the tensors that are on disk.
    """

    def __init__(
        self,
        folder: Path,
        layout: Sequence[TensorSpec],
        *,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        metadata: Mapping[str, str] = _METADATA,
        resume: Mapping[str, str] | None = None,
    ) -> None:
        """Check the free disk space and lay out the files, headers first.

        Args:
            folder: Where to write; made if missing.
            layout: Every tensor that will be written, in file order.
            max_shard_bytes: Data bytes a file may hold.
            metadata: Text pairs for each header.
            resume: SHA-256 by name of the tensors a killed run had written; those whose bytes
                still agree count as written. None starts over.

        Raises:
            OutputError: if the disk lacks the space, or the folder cannot be written.
        """
        self._folder = Path(folder)
        self._shards = plan_shards(layout, max_shard_bytes=max_shard_bytes, metadata=metadata)
        self._places = {
            info.name: info for shard in self._shards for info in _place(self._folder, shard)
        }
        self._files: dict[Path, BinaryIO] = {}
        self.written: set[str] = set()
        with explain_os_errors(self._folder, self.files_bytes()):
            self._folder.mkdir(parents=True, exist_ok=True)
            kept = [self._reopen(shard) for shard in self._shards] if resume is not None else []
            require_disk(self._folder, self.bytes_to_come(), "the checkpoint needs")
            for shard in self._shards:
                if shard.name not in kept:
                    self._create(shard)
        for name, digest in (resume or {}).items():
            info = self._places.get(name)
            if info and hashlib.sha256(map_bytes(info)).hexdigest() == digest:
                self.written.add(name)

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def files_bytes(self) -> int:
        """Return the exact size on disk of all files, index included."""
        return files_bytes(self._shards)

    def write(self, name: str, tensor: "torch.Tensor", *, sha256: str | None = None) -> str:
        """Write one tensor at its place.

        Args:
            name: A name of the layout that is not written yet.
            tensor: Any device and strides; dtype and shape as in the layout.
            sha256: Of the tensor's bytes where it is known already; None hashes them.

        Returns:
            SHA-256 of the bytes in hex.

        Raises:
            ValueError: if the name is unknown or written already, or dtype or shape differ.
            OutputError: if the disk is full.
        """
        info = self._place_of(name)
        got = (dtype_name(tensor.dtype), tuple(tensor.shape))
        if got != (info.dtype, info.shape):
            raise ValueError(
                f"{name}: required {info.dtype} of shape {info.shape}, got {got[0]} of {got[1]}"
            )
        data = tensor_bytes(tensor)
        with explain_os_errors(info.file, info.nbytes):
            _write_at(self._files[info.file], info.start, data)
        self.written.add(name)
        return sha256 or hashlib.sha256(data).hexdigest()

    def write_pieces(self, name: str, pieces: "Iterable[torch.Tensor]") -> str:
        """Write one tensor that comes as flat pieces, in order.

        Args:
            name: A name of the layout that is not written yet.
            pieces: Of the layout's dtype; together as many elements as the layout says.

        Returns:
            SHA-256 of the bytes in hex.

        Raises:
            ValueError: if the name is unknown or written already, or the pieces do not fit.
            OutputError: if the disk is full.
        """
        info = self._place_of(name)
        digest, place = hashlib.sha256(), info.start
        for piece in pieces:
            data = tensor_bytes(piece)
            if dtype_name(piece.dtype) != info.dtype or place + len(data) > info.end:
                raise ValueError(f"{name}: a piece has another dtype, or is too long")
            with explain_os_errors(info.file, info.end - place):
                _write_at(self._files[info.file], place, data)
            digest.update(data)
            place += len(data)
        if place != info.end:
            raise ValueError(f"{name}: the pieces end {info.end - place} bytes early")
        self.written.add(name)
        return digest.hexdigest()

    def _place_of(self, name: str) -> TensorInfo:
        info = self._places.get(name)
        if info is None:
            raise ValueError(f"{name}: not in the layout of this checkpoint")
        if name in self.written:
            raise ValueError(f"{name}: written already")
        return info

    def finish(self) -> None:
        """Give the files their names, and write the index.

        Raises:
            ValueError: if tensors of the layout were not written.
            OutputError: if the disk is full.
        """
        missing = sorted(self._places.keys() - self.written)
        if missing:
            raise ValueError(f"{len(missing)} tensors were not written: {', '.join(missing)}")
        index = _encode_index(self._shards)
        with explain_os_errors(self._folder, len(index)):
            for file in self._files.values():
                os.fsync(file.fileno())
            self.close()
            for shard in self._shards:
                _partial(self._folder, shard).rename(self._folder / shard.name)
            (self._folder / INDEX_NAME).write_bytes(index)

    def close(self) -> None:
        """Close the files; what is unfinished keeps the suffix ``.partial``."""
        for file in self._files.values():
            file.close()

    def _reopen(self, shard: Shard) -> str | None:
        """Open the file a killed run left for this shard; None if it does not fit the layout."""
        path, final = _partial(self._folder, shard), self._folder / shard.name
        if final.exists() and not path.exists():
            final.rename(path)  # killed inside finish
        if not path.exists() or path.stat().st_size != shard.file_bytes:
            return None
        file = path.open("r+b", buffering=0)
        if file.read(len(shard.header)) != shard.header:
            file.close()
            return None
        self._files[path] = file
        return shard.name

    def _create(self, shard: Shard) -> None:
        path = _partial(self._folder, shard)
        self._files[path] = file = path.open("w+b", buffering=0)
        _write_at(file, 0, memoryview(shard.header))
        file.truncate(shard.file_bytes)

    def bytes_to_come(self) -> int:
        """Return how much disk space the files will still take; nothing once they are closed."""
        if any(file.closed for file in self._files.values()):
            return 0
        # st_blocks counts what a sparse file really holds
        held = sum(os.fstat(file.fileno()).st_blocks * 512 for file in self._files.values())
        return max(0, self.files_bytes() - held)


def write_safetensors(path: Path, tensors: Mapping[str, "torch.Tensor"]) -> None:
    """Write a small file at once, tensors in the order given.

    Args:
        path: The file, replaced if it exists.
        tensors: Any shapes and devices.

    Raises:
        OutputError: if the disk is full.
    """
    specs = [TensorSpec(n, dtype_name(t.dtype), tuple(t.shape)) for n, t in tensors.items()]
    header = encode_header(specs, _METADATA)
    partial = path.with_name(path.name + ".partial")
    with explain_os_errors(path, len(header) + sum(spec.nbytes for spec in specs)):
        with partial.open("wb") as file:
            file.write(header)
            for tensor in tensors.values():
                file.write(tensor_bytes(tensor))
        partial.replace(path)


def _partial(folder: Path, shard: Shard) -> Path:
    return folder / f"{shard.name}.partial"


def _place(folder: Path, shard: Shard) -> Iterator[TensorInfo]:
    end = len(shard.header)
    for spec in shard.specs:
        start, end = end, end + spec.nbytes
        yield TensorInfo(spec.name, spec.dtype, spec.shape, _partial(folder, shard), start, end)


def _encode_index(shards: Sequence[Shard]) -> bytes:
    """Build the index file.

    A single file gets one too: a server that finds no index loads every ``*.safetensors`` that
    somebody put beside it as weights (vLLM does).
    """
    weight_map = {spec.name: shard.name for shard in shards for spec in shard.specs}
    index = {
        "metadata": {"total_size": sum(shard.data_bytes for shard in shards)},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()


def _write_at(file: BinaryIO, offset: int, data: memoryview) -> None:
    done = 0
    while done < len(data):  # one call writes at most 2 GiB on Linux
        done += os.pwrite(file.fileno(), data[done:], offset + done)


@contextmanager
def explain_os_errors(path: Path, required: int) -> Iterator[None]:
    """Turn what the system says about a file into an `OutputError` that says what is missing."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            folder = path if path.is_dir() else path.parent
            raise OutputError(
                f"{path}: the disk is full: {required} bytes to write, "
                f"{shutil.disk_usage(folder).free} free; free space and run again"
            ) from error
        raise OutputError(f"{path}: cannot be written ({error.strerror})") from error
