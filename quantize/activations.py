"""Calibration items carried through the model, one block at a time.

Every item stands alone, unpadded: an amax must not see padding, and a batch of mixed lengths would
change nothing but the memory. An item is first its tiles (patch tokens of RADIO, nothing for a
text), then a sequence of embeddings. The steps are those of ``NemotronNanoVL.forward``, cut where a
block ends, so that the numbers are those of the whole model, bit by bit; only items of more than
`SPAN_TOKENS` tokens or `SPAN_TILES` tiles go through a block in parts, with the layer's state from
part to part, which bounds memory and moves sums by rounding.

Between blocks an item is a tensor in CPU memory as far as the budget allows, and in the spill file
(`nvvl.quantize.spill`) beyond it; the next item is fetched, and the last one written, while a block
runs over the one between them. On CUDA items are pinned and copied without waiting.

Who watches a layer of the language model is told, before tokens pass, which of them are images.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from nvvl.calib_data.items import Item, item_hash, naming_item
from nvvl.errors import CalibrationError, OutputError
from nvvl.model.processor import Processor
from nvvl.model.prompt import ends_with_question
from nvvl.model.vlm import NemotronNanoVL
from nvvl.quantize.limits import SPAN_TILES, SPAN_TOKENS
from nvvl.quantize.spill import Spill, SpillWriter

Tick = Callable[[], None]
# told which of the tokens that pass next are image tokens: (1, T) bool
Announce = Callable[[Tensor], None]
# told where a span begins
_AnnounceSpan = Callable[[int], None]
# in memory; the name of a tensor in the spill; or nothing yet, as of a text in the vision tower
_Hidden = Tensor | str | None


class Activations:
    """What the items are after the blocks run so far.

    Attributes:
        records: (id, SHA-256) of each item, in order, once its tiles were cut.
    """

    def __init__(
        self,
        items: Sequence[Item],
        processor: Processor,
        *,
        device: torch.device,
        tick: Tick,
        budget_bytes: int | None = None,
        resumable: bool = True,
    ) -> None:
        """Take the items; nothing is read from them yet.

        Args:
            items: The calibration items.
            processor: The model's own.
            device: Where blocks run.
            tick: Called once for each item that a block has run over.
            budget_bytes: Most bytes of items in memory; None sets no limit.
            resumable: Whether `run_block` writes all items, so that `restore` can take them up;
                else it writes those alone that memory does not hold.
        """
        self.records: list[tuple[str, str]] = []
        self._items = items
        self._processor = processor
        self._device = device
        self._tick = tick
        self._resumable = resumable
        self._budget = float("inf") if budget_bytes is None else budget_bytes
        self._input_ids: list[Tensor] = []
        self._hidden: list[_Hidden] = []
        self._spill: Spill | None = None
        self._writer: SpillWriter | None = None
        self._room = 0
        self._in_memory = 0

    def restore(self, spill: Spill, records: Sequence[tuple[str, str]]) -> None:
        """Take up the items where `run_block` left them.

        Args:
            spill: What it wrote.
            records: (id, SHA-256) of each item, in order.
        """
        self.records = list(records)
        self._input_ids = [spill.load(f"ids.{index}") for index in range(len(records))]
        self._spill = spill
        names = spill.names()
        for index in range(len(records)):
            name = f"hidden.{index}"
            if name not in names:
                self._hidden.append(None)
            elif self._fits(spill.size_bytes(name)):
                self._hidden.append(self._keep(spill.load(name)))
            else:
                self._hidden.append(name)

    def run_block(self, run: Callable[[], None], path: Path, *, room: int) -> str:
        """Run one block over the items, and spill what they are after it.

        Args:
            run: Makes one call of `cut_patches`, `encode`, `project`, `embed` or `run_layer`.
            path: The file to write; the one of the block before must still be there.
            room: Bytes it may take on the disk.

        Returns:
            The hash of the file, or "" where there was no room for it and the items are all in
            memory.

        Raises:
            CalibrationError: naming a block and an item that give NaN or Inf.
            OutputError: if the disk has no room and memory has none either.
        """
        self._room = room
        self._writer = SpillWriter(path, num_tensors=2 * len(self._items))
        try:
            run()
            return self._finish_spill(path)
        finally:
            if self._writer is not None:
                self._writer.abandon()
                self._writer = None

    def cut_patches(self, patch_generator: nn.Module, name: str) -> None:
        """Run the processor, and the first vision block over the tiles of each item.

        Raises:
            DataError: naming an item that the processor cannot use.
        """
        for index, item in enumerate(self._items):  # items may be made anew on each access
            self.records.append((item.item_id, item_hash(item)))
            with naming_item(item.item_id):
                inputs = self._processor(
                    item.messages,
                    images=item.images,
                    videos=item.videos,
                    add_generation_prompt=ends_with_question(item.messages),
                )
            self._input_ids.append(inputs.input_ids[None])
            self._hidden.append(None)
            # pixels of one item at a time: as float32 they are larger than all later activations
            pixels = inputs.pixel_values if len(inputs.pixel_values) else None
            self._run(index, name, pixels, lambda x: _in_parts(patch_generator, x))

    def encode(self, block: nn.Module, name: str) -> None:
        """Run one RADIO block."""
        self._map(name, lambda hidden: _in_parts(block, hidden))

    def project(self, model: NemotronNanoVL, name: str) -> None:
        """Turn patch tokens into image embeddings; ``model.mlp1`` has its weights."""
        prefix_tokens = model.config.vision.num_prefix_tokens
        self._map(name, lambda x: _in_parts(lambda t: model.project(t[:, prefix_tokens:]), x))

    def embed(self, model: NemotronNanoVL, name: str) -> None:
        """Turn ids and image embeddings into sequences; the embedding table can be asked."""
        for index, features in self._fetched():
            features = None if features is None else features.to(self._device)
            input_ids = self._input_ids[index].to(self._device)
            self._store(index, name, model.embed(input_ids, features))

    def run_layer(self, layer: nn.Module, name: str, announce: Announce | None = None) -> None:
        """Run one layer of the language model, which may have quantizers that observe.

        Args:
            layer: On its device.
            name: Of the block.
            announce: Called before each span of tokens.
        """
        for index, hidden in self._fetched():
            run = partial(_in_spans, layer, announce=self._announcer(index, announce))
            self._run(index, name, hidden, run)

    def observe_layer(self, layer: nn.Module, name: str, announce: Announce) -> None:
        """Run one layer of the language model for who watches it; the items stay as they are.

        Args:
            layer: On its device.
            name: Of the block.
            announce: Called before each span of tokens.

        Raises:
            CalibrationError: naming a block and an item that give NaN or Inf.
        """
        for index, hidden in self._fetched():
            assert hidden is not None
            try:
                hidden = hidden.to(self._device, non_blocking=True)
                _in_spans(layer, hidden, announce=self._announcer(index, announce))
            except CalibrationError as error:
                raise self._not_finite(index, name) from error

    def _announcer(self, index: int, announce: Announce | None) -> _AnnounceSpan | None:
        if announce is None:
            return None
        images = self._input_ids[index] == self._processor.config.image_token_id
        return lambda start: announce(images[:, start : start + SPAN_TOKENS])

    def _map(self, name: str, run: Callable[[Tensor], Tensor]) -> None:
        for index, hidden in self._fetched():
            self._run(index, name, hidden, run)

    def _fetched(self) -> Iterator[tuple[int, Tensor | None]]:
        """Give each item in turn, with the next one on its way."""
        with ThreadPoolExecutor(1, thread_name_prefix="fetch") as pool:
            ahead = pool.submit(self._fetch, 0)
            for index in range(len(self._hidden)):
                hidden = ahead.result()
                if index + 1 < len(self._hidden):
                    ahead = pool.submit(self._fetch, index + 1)
                yield index, hidden

    def _fetch(self, index: int) -> Tensor | None:
        hidden = self._hidden[index]
        if isinstance(hidden, str):
            assert self._spill is not None
            hidden = self._spill.load(hidden)
        if hidden is not None and self._device.type == "cuda":
            hidden = hidden.pin_memory()
        return hidden

    def _run(
        self, index: int, name: str, hidden: Tensor | None, run: Callable[[Tensor], Tensor]
    ) -> None:
        if hidden is None:
            self._tick()
            return
        try:
            output = run(hidden.to(self._device, non_blocking=True))
        except CalibrationError as error:  # a quantizer inside the block met NaN or Inf
            raise self._not_finite(index, name) from error
        self._store(index, name, output)

    def _store(self, index: int, name: str, output: Tensor) -> None:
        # extremes carry NaN and Inf along
        if not torch.stack(output.aminmax()).isfinite().all():
            raise self._not_finite(index, name)
        output = output.cpu()
        before = self._hidden[index]
        if isinstance(before, Tensor):
            self._in_memory -= before.nbytes
        fits = self._fits(output.nbytes)
        if self._resumable or not fits:
            self._add_to_spill(f"hidden.{index}", output)
        if fits:
            self._hidden[index] = self._keep(output)
        else:
            self._require_spill()
            self._hidden[index] = f"hidden.{index}"
        self._tick()

    def _fits(self, num_bytes: int) -> bool:
        return self._in_memory + num_bytes <= self._budget

    def _keep(self, tensor: Tensor) -> Tensor:
        self._in_memory += tensor.nbytes
        return tensor

    def _add_to_spill(self, name: str, tensor: Tensor) -> None:
        """Add a tensor to the file, or give the file up if the disk has no room for it."""
        if self._writer is None:
            return
        if self._writer.size_bytes + tensor.nbytes <= self._room:
            self._writer.add(name, tensor)
            return
        self._writer.abandon()
        self._writer = None
        if any(isinstance(hidden, str) for hidden in self._hidden):
            self._require_spill()

    def _require_spill(self) -> None:
        if self._writer is None:
            raise OutputError(
                f"calibration items: memory holds {self._budget / 1e9:.2f} GB of them, and beside "
                f"the output the disk has room for {max(0, self._room)} bytes; make room on the "
                "disk (of temporary files: TMPDIR), give more --memory, or fewer --samples"
            )

    def _finish_spill(self, path: Path) -> str:
        if self._resumable:
            for index, ids in enumerate(self._input_ids):
                self._add_to_spill(f"ids.{index}", ids)
        if self._writer is None:
            self._spill = None
            return ""
        sha256 = self._writer.close()
        self._writer = None
        self._spill = Spill(path)
        return sha256

    def _not_finite(self, index: int, name: str) -> CalibrationError:
        return CalibrationError(
            f"{name}: item {self.records[index][0]} gives NaN or Inf activations; leave it "
            "out, or check the source checkpoint with it"
        )


def _in_parts(run: Callable[[Tensor], Tensor], tiles: Tensor) -> Tensor:
    """Run over a few tiles at a time; they do not see each other."""
    if len(tiles) <= SPAN_TILES:
        return run(tiles)
    return torch.cat([run(part) for part in tiles.split(SPAN_TILES)])


def _in_spans(layer: nn.Module, hidden: Tensor, *, announce: _AnnounceSpan | None = None) -> Tensor:
    """Run over (1, T, hidden) a span of tokens at a time, with the state that each span leaves."""
    outputs, state = [], None
    for index, span in enumerate(hidden.split(SPAN_TOKENS, dim=1)):
        if announce is not None:
            announce(index * SPAN_TOKENS)
        output, state = layer(span, state=state)
        outputs.append(output)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
