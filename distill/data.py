"""Training and validation batches from a set of items.

Which items a step sees is a function of the seed and the number of the step alone: each epoch is
one permutation, and a step takes the next items of it. So there is no position in the data to be
saved or lost, and a resumed run sees exactly what an uninterrupted one would.

Items of one step are sorted by length and cut into batches of a bounded number of tokens, so that
little is padding and memory does not depend on how many items a step has. Padding is on the left,
as the model takes it; each item stands alone in its row, so no Mamba state crosses items.

Shapes: B items, T tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nvvl.calib_data.items import Item
from nvvl.distill.recipe import DistillRecipe, LossTokens
from nvvl.errors import DataError
from nvvl.model.processor import Batch, ModelInputs, Processor, collate


@dataclass(frozen=True)
class LossBatch:
    """A batch and the positions whose predictions are compared.

    Attributes:
        item_ids: Of the rows.
        inputs: The batch, padded on the left.
        loss_mask: (B, T) bool; never True at the last position, which predicts nothing known.
    """

    item_ids: tuple[str, ...]
    inputs: Batch
    loss_mask: Tensor


class DistillData:
    """Items split once into training and validation.

    Attributes:
        training: Indices of the training items.
        validation: Indices of the held-out items.
    """

    def __init__(
        self, items: Sequence[Item], processor: Processor, recipe: DistillRecipe, *, seed: int
    ) -> None:
        """Split the items.

        Args:
            items: May be made anew at each access.
            processor: The model's.
            recipe: Gives sizes and which tokens count.
            seed: Of the split and of the order.

        Raises:
            DataError: if nothing is left to train on.
        """
        if len(items) <= recipe.num_validation_items:
            raise DataError(
                f"distillation: the set has {len(items)} items and {recipe.num_validation_items} "
                "are kept for validation, so none is left to train on; give more items, or lower "
                "num_validation_items in the recipe"
            )
        order = _permutation(len(items), seed, -1)
        self.validation = sorted(order[: recipe.num_validation_items])
        self.training = sorted(order[recipe.num_validation_items :])
        self._items = items
        self._processor = processor
        self._recipe = recipe
        self._seed = seed

    def training_batches(self, step: int) -> list[LossBatch]:
        """Return the batches of one optimizer step, counted from 0.

        Raises:
            DataError: if an item cannot be used, or has no token that counts.
        """
        size = self._recipe.items_per_step
        places = range(step * size, (step + 1) * size)
        return list(self._make_batches([self._index_at(place) for place in places]))

    def validation_batches(self) -> Iterator[LossBatch]:
        """Return the held-out items in batches.

        Raises:
            DataError: as `training_batches`.
        """
        size = self._recipe.items_per_step
        for start in range(0, len(self.validation), size):
            yield from self._make_batches(self.validation[start : start + size])

    def _index_at(self, place: int) -> int:
        epoch, offset = divmod(place, len(self.training))
        return self.training[_permutation(len(self.training), self._seed, epoch)[offset]]

    def _make_batches(self, indices: Sequence[int]) -> Iterator[LossBatch]:
        prepared = []
        for index in indices:
            item = self._items[index]
            prepared.append((item.item_id, self._prepare(item)))
        prepared.sort(key=lambda pair: len(pair[1].input_ids))
        for group in _cut_by_tokens(prepared, self._recipe.tokens_per_batch):
            inputs = [pair[1] for pair in group]
            batch = collate(inputs, self._processor.config.language.pad_token_id)
            mask = loss_mask(
                batch,
                self._recipe.loss_tokens,
                image_token_id=self._processor.config.image_token_id,
            )
            ids = tuple(pair[0] for pair in group)
            for item_id, row in zip(ids, mask, strict=True):
                if not row.any():
                    raise DataError(
                        f"item {item_id}: no token counts for the loss; give it an answer, or set "
                        'loss_tokens = "text"'
                    )
            yield LossBatch(ids, batch, mask)

    def _prepare(self, item: Item) -> ModelInputs:
        try:
            return self._processor(item.messages, images=item.images, videos=item.videos)
        except DataError as error:
            raise DataError(f"item {item.item_id}: {error}") from None


def loss_mask(batch: Batch, tokens: LossTokens, *, image_token_id: int) -> Tensor:
    """Mark the positions whose prediction of the next token counts, (B, T) bool.

    Args:
        batch: Padded on the left.
        tokens: ``text``, every real position that is no image token, or ``answers``, those whose
            next token belongs to an answer.
        image_token_id: Id of image tokens.
    """
    mask = torch.zeros_like(batch.padding_mask)
    if tokens == "answers":
        mask[:, :-1] = batch.answer_mask[:, 1:]
    else:
        mask[:, :-1] = (batch.padding_mask & (batch.input_ids != image_token_id))[:, :-1]
    return mask


def _cut_by_tokens(
    prepared: Sequence[tuple[str, ModelInputs]], most: int
) -> Iterator[list[tuple[str, ModelInputs]]]:
    """Cut a list sorted by length into groups that take at most ``most`` tokens when padded."""
    group: list[tuple[str, ModelInputs]] = []
    for pair in prepared:
        if group and len(pair[1].input_ids) * (len(group) + 1) > most:
            yield group
            group = []
        group.append(pair)
    yield group


def _permutation(size: int, seed: int, epoch: int) -> list[int]:
    # torch's generator on the CPU gives the same permutation on every machine
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch + 1) % 2**31)
    return torch.randperm(size, generator=generator).tolist()
