"""The weights of a graph: a file beside it that is written as a stream, one tensor at a time.

An ONNX file holds the nodes; large tensors lie in ``*.data`` files and are named by offset and
length. Graphs of one folder may point at the same bytes: ``prefill`` and ``decode`` share theirs.
Tensors of the checkpoint keep their names, and where the graph's dtype is the stored one they keep
their bytes as well: packed FP4 and FP8 codes, block scales, BF16. So a graph can be compared with
its checkpoint, and memory does not grow with the model.
"""

import hashlib
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from onnx import StringStringEntryProto, TensorProto
from torch import Tensor

from nvvl.errors import writing
from nvvl.model.safetensors_io import tensor_bytes

# Smaller tensors stay inside the graph: builders want scales and shapes there.
INLINE_BYTES = 1024

# Offsets are multiples of this, so that a file can be mapped instead of read.
_ALIGNMENT = 4096

_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.float8_e4m3fn: TensorProto.FLOAT8E4M3FN,
    torch.int64: TensorProto.INT64,
    torch.bool: TensorProto.BOOL,
}


def inline_tensor(name: str, tensor: Tensor) -> TensorProto:
    """Build a tensor whose bytes lie inside the graph."""
    proto = TensorProto(name=name, data_type=_TYPES[tensor.dtype], dims=tensor.shape)
    proto.raw_data = bytes(tensor_bytes(tensor))
    return proto


class DataFile:
    """An external data file that is written as its tensors come.

    Attributes:
        path: The file; graphs name it by its last part, and lie in the same folder.
        sha256: Of each tensor's bytes, by name.
    """

    def __init__(self, path: Path) -> None:
        """Make the file.

        Raises:
            OutputError: if it cannot be made.
        """
        self.path = path
        self.sha256: dict[str, str] = {}
        self._tensors: dict[str, TensorProto] = {}
        with writing(path):
            self._file: BinaryIO = path.open("wb")

    def __enter__(self) -> "DataFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def find(self, name: str) -> TensorProto | None:
        """Return the entry of a tensor that is written already."""
        return self._tensors.get(name)

    def add(self, name: str, tensor: Tensor) -> TensorProto:
        """Write a tensor and return its entry; small ones stay inside the entry.

        Args:
            name: the initializer's name, new in this file.
            tensor: float32, bfloat16, float8_e4m3fn, int64, or uint8 for two FP4 codes a byte, the
                even column in the low nibble, as on disk.

        Raises:
            OutputError: if the disk is full.
        """
        data = tensor_bytes(tensor)
        if tensor.dtype == torch.uint8:
            shape = (*tensor.shape[:-1], 2 * tensor.shape[-1])
            proto = TensorProto(name=name, data_type=TensorProto.FLOAT4E2M1, dims=shape)
        else:
            proto = TensorProto(name=name, data_type=_TYPES[tensor.dtype], dims=tensor.shape)
        if len(data) <= INLINE_BYTES:
            proto.raw_data = bytes(data)
        else:
            self._write_outside(proto, data)
        self.sha256[name] = hashlib.sha256(data).hexdigest()
        self._tensors[name] = proto
        return proto

    def _write_outside(self, proto: TensorProto, data: memoryview) -> None:
        with writing(self.path):
            offset = self._file.tell()
            self._file.write(b"\0" * (-offset % _ALIGNMENT))
            offset = self._file.tell()
            self._file.write(data)
        proto.data_location = TensorProto.EXTERNAL
        entries = {"location": self.path.name, "offset": str(offset), "length": str(len(data))}
        proto.external_data.extend(
            StringStringEntryProto(key=k, value=v) for k, v in entries.items()
        )
