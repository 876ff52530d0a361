"""The source's weights, one block at a time, the next one read while this one is at work.

A block is a module that the walk runs over the calibration items as a whole: the patch generator,
a RADIO block, the projector, a layer. Its tensors are read once, hashed and looked through for NaN
and Inf as they come in, by a thread of its own where there is memory for two blocks. Tables that
are far larger than a block (embeddings, lm_head) are no block's: their rows and pieces are read
where they are used.

On CUDA the thread also pins what it read and copies it to the device on a stream of its own, so
that the next block is there when the current one is done. Each block has new tensors, pinned and on
the device, from torch's caching allocators, which give them the memory of blocks that are done.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor, nn

from nvvl.errors import CheckpointError
from nvvl.model.checkpoint import Checkpoint
from nvvl.model.config import VLMConfig
from nvvl.model.safetensors_io import TensorInfo, read_pieces, read_rows, tensor_bytes
from nvvl.quantize.targets import LAYERS

PATCHES = "vision_model.radio_model.model.patch_generator"
VISION_BLOCKS = "vision_model.radio_model.model.blocks"
PROJECTOR = "mlp1"
EMBEDDINGS = "language_model.backbone.embeddings"

# Read, hashed and written at once where a tensor is only copied.
PIECE_BYTES = 16 * 2**20


def list_blocks(config: VLMConfig) -> list[str]:
    """Return the modules that are read and run one at a time, in the order of the forward."""
    return [
        PATCHES,
        *(f"{VISION_BLOCKS}.{index}" for index in range(config.vision.num_layers)),
        PROJECTOR,
        EMBEDDINGS,
        *(f"{LAYERS}.{index}" for index in range(len(config.language.layers))),
    ]


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
        self._names = _names_by_block(checkpoint, blocks)
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
        for tensor_name in self._names[name]:
            tensor = self._checkpoint.load(tensor_name)
            sha256[tensor_name] = hashlib.sha256(tensor_bytes(tensor)).hexdigest()
            require_finite(tensor, self._checkpoint.info(tensor_name))
            host[tensor_name] = tensor
        infos = {tensor_name: self._checkpoint.info(tensor_name) for tensor_name in host}
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


def require_finite(tensor: Tensor, info: TensorInfo) -> None:
    """Refuse NaN and Inf.

    Raises:
        CheckpointError: naming file and tensor.
    """
    # extremes carry NaN and Inf along; far cheaper than looking at each element with isfinite
    if tensor.is_floating_point() and tensor.numel():
        low, high = tensor.aminmax()
        if not (low.isfinite() and high.isfinite()):
            raise CheckpointError(f"{info.file}: {info.name}: holds NaN or Inf; download it again")


def _names_by_block(checkpoint: Checkpoint, blocks: Iterable[str]) -> dict[str, list[str]]:
    """List each block's tensors in the order of their bytes; none of the embedding table's."""
    names: dict[str, list[str]] = {name: [] for name in blocks}
    for info in sorted(checkpoint.tensors.values(), key=lambda i: (i.file.name, i.start)):
        parts = info.name.split(".")
        prefixes = (".".join(parts[:count]) for count in range(1, len(parts)))
        owner = next((prefix for prefix in prefixes if prefix in names), None)
        if owner is not None and owner != EMBEDDINGS:
            names[owner].append(info.name)
    return names
