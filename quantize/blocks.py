"""The source's weights, one block at a time, the next one read while this one is at work.

Which tensors a block has is in ``nvvl.quantize.block_names``. They are read once, hashed and looked
through for NaN and Inf as they come in, by a thread of its own where there is memory for two
blocks. Rows and pieces of the tables that are no block's are read where they are used.

On CUDA the thread also pins what it read and copies it to the device on a stream of its own, so
that the next block is there when the current one is done. Each block has new tensors, pinned and on
the device, from torch's caching allocators, which give them the memory of blocks that are done.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor, nn

from nvvl.errors import CheckpointError
from nvvl.model.checkpoint import Checkpoint, require_finite
from nvvl.model.safetensors_io import TensorInfo, read_pieces, read_rows, tensor_bytes
from nvvl.quantize.block_names import tensors_by_block

# Read, hashed and written at once where a tensor is only copied.
PIECE_BYTES = 16 * 2**20


@dataclass(frozen=True)
class LoadedBlock:
    """The tensors of one block; a source that `nvvl.model.load.materialize` takes.

    Attributes:
        name: Of the block.
        host: As stored, in CPU memory, by full name.
        sha256: Of each, in hex.
        device: The same on the device that computes; ``host`` itself on a CPU.
        infos: Header entries.
        ready: Set by the copies to the device; None on a CPU.
    """

    name: str
    host: Mapping[str, Tensor]
    sha256: Mapping[str, str]
    device: Mapping[str, Tensor]
    infos: Mapping[str, TensorInfo]
    ready: "torch.cuda.Event | None" = None

    def info(self, name: str) -> TensorInfo:
        """Return the header entry of one tensor."""
        try:
            return self.infos[name]
        except KeyError:
            raise CheckpointError(f"{self.name}: no tensor named {name}") from None

    def load(self, name: str) -> Tensor:
        """Return one tensor on the device, in the dtype it is stored in."""
        return self.device[name]


class BlockReader:
    """Reads blocks in a given order, one ahead of the one that was taken last."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        blocks: Sequence[str],
        *,
        device: torch.device,
        ahead: bool = True,
    ) -> None:
        """Begin with the first block.

        Args:
            checkpoint: The source.
            blocks: Names, in the order they will be taken.
            device: Where tensors are wanted.
            ahead: Whether to read one block while another is at work.
        """
        self._checkpoint = checkpoint
        self._tensors = tensors_by_block(checkpoint.in_file_order(), blocks)
        self._order = list(blocks)
        self._device = device
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="read") if ahead else None
        self._next: Future[LoadedBlock] | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._begin_next()

    def __enter__(self) -> "BlockReader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def take(self, name: str) -> LoadedBlock:
        """Return the next block, and begin to read the one after it.

        Raises:
            CheckpointError: if a tensor is not finite, or its file became shorter.
        """
        expected = self._order.pop(0)
        assert expected == name, f"{name} taken out of order"
        block = self._read(name) if self._next is None else self._next.result()
        self._begin_next()
        if block.ready is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(block.ready)
            for tensor in block.device.values():
                tensor.record_stream(stream)  # else the copies of a later block could overtake
        return block

    def _begin_next(self) -> None:
        self._next = None
        if self._pool is not None and self._order:
            self._next = self._pool.submit(self._read, self._order[0])

    def _read(self, name: str) -> LoadedBlock:
        host: dict[str, Tensor] = {}
        sha256: dict[str, str] = {}
        infos = {info.name: info for info in self._tensors[name]}
        for tensor_name, info in infos.items():
            tensor = self._checkpoint.load(tensor_name)
            sha256[tensor_name] = hashlib.sha256(tensor_bytes(tensor)).hexdigest()
            require_finite(tensor, info)
            host[tensor_name] = tensor
        if self._stream is None:
            return LoadedBlock(name, host, sha256, host, infos)
        host = {tensor_name: tensor.pin_memory() for tensor_name, tensor in host.items()}
        with torch.cuda.stream(self._stream):
            device = {n: t.to(self._device, non_blocking=True) for n, t in host.items()}
            ready = torch.cuda.Event()
            ready.record(self._stream)
        return LoadedBlock(name, host, sha256, device, infos, ready)


class EmbeddingRows(nn.Module):
    """An embedding table that stays in its file: each call reads the rows it needs."""

    def __init__(self, info: TensorInfo) -> None:
        super().__init__()
        self._info = info

    def forward(self, ids: Tensor) -> Tensor:
        """Embed ``ids`` (..., T) as (..., T, hidden) bfloat16.

        Raises:
            CheckpointError: if a row is not finite, or the file became shorter.
        """
        rows, places = ids.unique(return_inverse=True)
        table = read_rows(self._info, rows.tolist())
        require_finite(table, self._info)
        return table.bfloat16().to(ids.device)[places]


def finite_pieces(info: TensorInfo) -> Iterator[Tensor]:
    """Read a tensor in pieces, each of them looked through for NaN and Inf.

    Raises:
        CheckpointError: if one is not finite, or the file became shorter.
    """
    for piece in read_pieces(info, PIECE_BYTES):
        require_finite(piece, info)
        yield piece
