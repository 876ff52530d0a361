"""Reads and writes the safetensors format one tensor at a time.

A file is an 8-byte little-endian header length, a JSON header naming every tensor's dtype, shape
and byte range, and the bytes back to back. Reading the header alone is enough to plan a run on a
12B model, so torch is imported only where a tensor is made. Every byte of a file must belong to
exactly one tensor; anything else is refused with the fault named, because a truncated download
that loads is worse than one that does not.

The official library is the oracle: what is written here opens with ``safetensors.safe_open``.
Format: https://github.com/huggingface/safetensors (README, "Format").
"""

import json
import math
import mmap
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvvl.errors import CheckpointError, reading

if TYPE_CHECKING:
    import torch

DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "F32": 4,
    "I64": 8,
    "F64": 8,
}

# The official reader refuses longer headers; a larger number means the file is something else.
_MAX_HEADER_BYTES = 100_000_000
_LENGTH_BYTES = 8


@dataclass(frozen=True)
class TensorSpec:
    """Name, safetensors dtype ("BF16", "U8", "F8_E4M3", ...) and shape of one tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return self.numel * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class TensorInfo(TensorSpec):
    """A tensor and where it lies: bytes ``start`` to ``end`` of ``file``, counted from 0."""

    file: Path
    start: int
    end: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read and check the header of one file.

    Returns:
        The tensors in the order of their bytes.

    Raises:
        CheckpointError: if the file is missing, is not safetensors, is truncated, or its byte
            ranges overlap, leave holes, or disagree with dtype and shape.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if size < _LENGTH_BYTES or length > min(size - _LENGTH_BYTES, _MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{path}: not a safetensors file, or a truncated one ({size} bytes, header "
                    f"length {length}); download it again (a Git LFS pointer looks like this too)"
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    entries = _parse_json(path, text)
    offset = _LENGTH_BYTES + length
    tensors = [
        _read_entry(path, name, entry, offset)
        for name, entry in entries.items()
        if name != "__metadata__"
    ]
    tensors.sort(key=lambda info: (info.start, info.end))
    _check_ranges(path, tensors, offset, size)
    return {info.name: info for info in tensors}


def encode_header(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """Build the length and header of a file whose tensors lie in the order given.

    The JSON is padded with spaces to a multiple of 8 bytes, as the official writer does, so that
    the data starts aligned.

    Returns:
        Bytes that stand before the data.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for spec in specs:
        start, end = end, end + spec.nbytes
        header[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def map_bytes(info: TensorInfo) -> memoryview:
    """Map a tensor's bytes read-only, without copying them.

    Returns:
        (nbytes,) bytes; the mapping lives as long as the view.
    """
    if info.nbytes == 0:
        return memoryview(b"")
    aligned = info.start - info.start % mmap.ALLOCATIONGRANULARITY
    with reading(info.file), info.file.open("rb") as file:
        mapped = mmap.mmap(
            file.fileno(), info.end - aligned, offset=aligned, access=mmap.ACCESS_READ
        )
    return memoryview(mapped)[info.start - aligned :]


def read_tensor(info: TensorInfo) -> "torch.Tensor":
    """Read one tensor into fresh CPU memory, in the dtype it is stored in.

    Raises:
        CheckpointError: if the file became shorter since its header was read.
        SourceError: if the system cannot read it.
    """
    import torch

    data = torch.empty(info.nbytes, dtype=torch.uint8)
    # read, not mapped: a file cut short under us is an error here, and a crash in a mapping
    with reading(info.file), info.file.open("rb", buffering=0) as file:
        file.seek(info.start)
        _fill(data, file, info, 0)
    return data.view(torch_dtypes()[info.dtype]).reshape(info.shape)


def read_pieces(info: TensorInfo, piece_bytes: int) -> "Iterator[torch.Tensor]":
    """Read one tensor as flat pieces, in order, for those who need not hold it whole.

    Args:
        info: Which tensor.
        piece_bytes: Most bytes of a piece, a multiple of every dtype's size.

    Yields:
        (elements,) in the dtype it is stored in; all pieces share one buffer, so each is valid
        until the next one is asked for.

    Raises:
        CheckpointError: if the file became shorter since its header was read.
        SourceError: if the system cannot read it.
    """
    import torch

    buffer = torch.empty(min(piece_bytes, info.nbytes), dtype=torch.uint8)
    with reading(info.file), info.file.open("rb", buffering=0) as file:
        file.seek(info.start)
        for done in range(0, info.nbytes, piece_bytes):
            piece = buffer[: info.nbytes - done]
            _fill(piece, file, info, done)
            yield piece.view(torch_dtypes()[info.dtype])


def read_rows(info: TensorInfo, rows: Sequence[int]) -> "torch.Tensor":
    """Read some rows of a matrix, and nothing else of it.

    Args:
        info: A matrix (N, K).
        rows: Indices below N.

    Returns:
        (len(rows), K) in the dtype it is stored in.

    Raises:
        CheckpointError: if the file became shorter since its header was read.
        SourceError: if the system cannot read it.
    """
    import torch

    row_bytes = info.nbytes // info.shape[0]
    data = torch.empty((len(rows), row_bytes), dtype=torch.uint8)
    with reading(info.file), info.file.open("rb", buffering=0) as file:
        for place, row in enumerate(rows):
            file.seek(info.start + row * row_bytes)
            _fill(data[place], file, info, row * row_bytes)
    return data.view(torch_dtypes()[info.dtype])


def _fill(data: "torch.Tensor", file: FileIO, info: TensorInfo, done: int) -> None:
    """Read as many bytes as ``data`` has; ``done`` were read before."""
    view, filled = data.numpy().data, 0
    while filled < data.numel():
        count = file.readinto(view[filled:])
        if not count:
            raise CheckpointError(
                f"{info.file}: {info.name}: the file ends after {info.start + done + filled} "
                f"bytes, required {info.end}; it changed while it was read, download it again"
            )
        filled += count


def torch_dtypes() -> dict[str, "torch.dtype"]:
    """Return the torch dtype of each safetensors dtype name."""
    import torch

    return {
        "BOOL": torch.bool,
        "U8": torch.uint8,
        "I8": torch.int8,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "I16": torch.int16,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I32": torch.int32,
        "F32": torch.float32,
        "I64": torch.int64,
        "F64": torch.float64,
    }


def dtype_name(dtype: "torch.dtype") -> str:
    """Return the safetensors name of a torch dtype.

    Raises:
        ValueError: if safetensors files of this project do not hold that dtype.
    """
    for name, candidate in torch_dtypes().items():
        if candidate == dtype:
            return name
    raise ValueError(f"dtype {dtype}: required one of {', '.join(DTYPE_BYTES)}")


def tensor_bytes(tensor: "torch.Tensor") -> memoryview:
    """Return a tensor's bytes as they stand in a file (row-major, little-endian)."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _parse_json(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = dict(pairs)
        if len(names) < len(pairs):
            twice = next(n for n, times in Counter(n for n, _ in pairs).items() if times > 1)
            raise CheckpointError(f"{path}: header names {twice} more than once")
        return names

    try:
        header = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: the header is not JSON ({error}); download it again"
        ) from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is not a JSON object; download it again")
    return header


def _read_entry(path: Path, name: str, entry: Any, offset: int) -> TensorInfo:
    where = f"{path}: {name}"
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(
            f"{where}: the header entry lacks dtype, shape or data_offsets; download it again"
        ) from None
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise CheckpointError(f"{where}: dtype {dtype!r}, required one of {', '.join(DTYPE_BYTES)}")
    if not isinstance(shape, list) or not _are_sizes([*shape, start, end]):
        raise CheckpointError(f"{where}: shape {shape} or offsets [{start}, {end}] are not sizes")
    info = TensorInfo(name, dtype, tuple(shape), path, offset + start, offset + end)
    if end - start != info.nbytes:
        raise CheckpointError(
            f"{where}: {dtype} of shape {shape} needs {info.nbytes} bytes, "
            f"its data_offsets hold {end - start}; download it again"
        )
    return info


def _are_sizes(values: Iterable[object]) -> bool:
    return all(type(value) is int and value >= 0 for value in values)


def _check_ranges(path: Path, tensors: Sequence[TensorInfo], offset: int, size: int) -> None:
    end = offset
    for info in tensors:
        if info.start != end:
            fault = "overlaps the tensor before it" if info.start < end else "leaves a hole"
            raise CheckpointError(
                f"{path}: {info.name} {fault} (starts at byte {info.start}, required {end}); "
                "download it again"
            )
        end = info.end
    if size != end:
        fault = "truncated" if size < end else "bytes after the last tensor"
        raise CheckpointError(
            f"{path}: {fault}: the header describes {end} bytes, the file has {size}; "
            "download it again"
        )
