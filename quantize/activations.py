"""Calibration items carried through the model, one block at a time.

Every item stands alone, unpadded: an amax must not see padding, and a batch of mixed lengths would
change nothing but the memory. Between blocks an item is a tensor in CPU memory; a block and one
item at a time are on the device.

An item is first its tiles (patch tokens of RADIO, nothing for a text), then a sequence of
embeddings. The steps are those of ``NemotronNanoVL.forward``, cut where a block ends, so that the
numbers are those of the whole model, bit by bit.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from nvvl.calib_data.items import Item, item_hash
from nvvl.errors import CalibrationError, DataError
from nvvl.model.processor import Processor
from nvvl.model.vlm import NemotronNanoVL

Tick = Callable[[], None]


class Activations:
    """What the items are after the blocks run so far.

    Attributes:
        records: (id, SHA-256) of each item, in order, once its tiles were cut.
    """

    def __init__(
        self, items: Sequence[Item], processor: Processor, *, device: torch.device, tick: Tick
    ) -> None:
        """Take the items; nothing is read from them yet.

        Args:
            items: The calibration items.
            processor: The model's own.
            device: Where blocks run.
            tick: Called once for each item that a block has run over.
        """
        self.records: list[tuple[str, str]] = []
        self._items = items
        self._processor = processor
        self._device = device
        self._tick = tick
        self._input_ids: list[Tensor] = []
        self._hidden: list[Tensor | None] = []

    @property
    def size_bytes(self) -> int:
        """Bytes of the items as they are now."""
        return sum(hidden.nbytes for hidden in self._hidden if hidden is not None)

    def to_tensors(self) -> dict[str, Tensor]:
        """Return what the items are now, by names that `restore` knows."""
        tensors = {f"ids.{index}": ids for index, ids in enumerate(self._input_ids)}
        for index, hidden in enumerate(self._hidden):
            if hidden is not None:
                tensors[f"hidden.{index}"] = hidden
        return tensors

    def restore(self, tensors: Mapping[str, Tensor], records: Sequence[tuple[str, str]]) -> None:
        """Take up the items where `to_tensors` left them.

        Args:
            tensors: What it returned.
            records: (id, SHA-256) of each item, in order.
        """
        self.records = list(records)
        self._input_ids = [tensors[f"ids.{index}"] for index in range(len(records))]
        self._hidden = [tensors.get(f"hidden.{index}") for index in range(len(records))]

    def cut_patches(self, patch_generator: nn.Module, name: str) -> None:
        """Run the processor, and the first vision block over the tiles of each item.

        Raises:
            DataError: naming an item that the processor cannot use.
        """
        for index, item in enumerate(self._items):  # items may be made anew on each access
            self.records.append((item.item_id, item_hash(item)))
            try:
                inputs = self._processor(item.messages, images=item.images, videos=item.videos)
            except DataError as error:
                raise DataError(f"item {item.item_id}: {error}") from None
            self._input_ids.append(inputs.input_ids[None])
            # pixels of one item at a time: as float32 they are larger than all later activations
            self._hidden.append(inputs.pixel_values if len(inputs.pixel_values) else None)
            self._run(index, name, patch_generator)

    def encode(self, block: nn.Module, name: str) -> None:
        """Run one RADIO block."""
        self._map(name, block)

    def project(self, model: NemotronNanoVL, name: str) -> None:
        """Turn patch tokens into image embeddings; ``model.mlp1`` has its weights."""
        prefix_tokens = model.config.vision.num_prefix_tokens
        self._map(name, lambda hidden: model.project(hidden[:, prefix_tokens:]))

    def embed(self, model: NemotronNanoVL, name: str) -> None:
        """Turn ids and image embeddings into sequences; the embedding table has its weights."""
        for index, features in enumerate(self._hidden):
            input_ids = self._input_ids[index].to(self._device)
            features = None if features is None else features.to(self._device)
            self._store(index, name, model.embed(input_ids, features))

    def run_layer(self, layer: nn.Module, name: str) -> None:
        """Run one layer of the language model, which may have quantizers that observe."""
        self._map(name, lambda hidden: layer(hidden)[0])

    def _map(self, name: str, run: Callable[[Tensor], Tensor]) -> None:
        for index in range(len(self._hidden)):
            self._run(index, name, run)

    def _run(self, index: int, name: str, run: Callable[[Tensor], Tensor]) -> None:
        hidden = self._hidden[index]
        if hidden is None:
            self._tick()
            return
        try:
            output = run(hidden.to(self._device))
        except CalibrationError as error:  # a quantizer inside the block met NaN or Inf
            raise self._not_finite(index, name) from error
        self._store(index, name, output)

    def _store(self, index: int, name: str, output: Tensor) -> None:
        # extremes carry NaN and Inf along
        if not torch.stack(output.aminmax()).isfinite().all():
            raise self._not_finite(index, name)
        self._hidden[index] = output.cpu()
        self._tick()

    def _not_finite(self, index: int, name: str) -> CalibrationError:
        return CalibrationError(
            f"{name}: item {self.records[index][0]} gives NaN or Inf activations; leave it "
            "out, or check the source checkpoint with it"
        )
