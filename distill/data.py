"""Training and validation batches from a set of items.

Which items a step sees is a function of the seed and the number of the step alone: each epoch is
one permutation, and a step takes the next items of it. So there is no position in the data to be
saved or lost, and a resumed run sees exactly what an uninterrupted one would.

Items of one step are packed into rows of a bounded number of tokens (``nvvl.model.packing``): the
longest first, each into the first row with room. Nothing is padded, and memory does not depend on
how many items a step has. Several processes share a step's items.

Shapes: T tokens.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from nvvl.calib_data.items import Item, naming_item
from nvvl.calib_data.manifest import CalibrationSet
from nvvl.distill.recipe import DistillRecipe, LossTokens
from nvvl.distill.split import permutation, split_items
from nvvl.distill.survey import hash_items, survey_set
from nvvl.errors import DataError
from nvvl.model.processes import Processes
from nvvl.model.processor import ModelInputs, Processor
from nvvl.progress import Progress


@dataclass(frozen=True)
class ItemBatch:
    """Items that share a row.

    Attributes:
        indices: Of the items in their set, in the order of the row.
        item_ids: Of the items.
        inputs: Of each item.
        loss_masks: (T,) bool of each item, True where the prediction of the next token counts.
    """

    indices: tuple[int, ...]
    item_ids: tuple[str, ...]
    inputs: tuple[ModelInputs, ...]
    loss_masks: tuple[Tensor, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of the row."""
        return sum(len(inputs.input_ids) for inputs in self.inputs)

    @property
    def num_positions(self) -> int:
        """Positions that count."""
        return sum(int(mask.sum()) for mask in self.loss_masks)


class DistillData:
    """Items split once into training and validation.

    Attributes:
        training: Indices of the training items.
        validation: Indices of the held-out items.
        sha256: Of the set (`from_set`), of the default one of its held-out items; else empty.
        num_answers: Items with an answer or without pictures, where `from_set` has read them.
    """

    sha256: str = ""
    num_answers: int = 0

    def __init__(
        self,
        items: Sequence[Item],
        processor: Processor,
        recipe: DistillRecipe,
        *,
        seed: int,
        groups: Iterable[Sequence[int]] = (),
        share: tuple[int, int] = (0, 1),
        check: Callable[[Item], None] | None = None,
    ) -> None:
        """Split the items.

        Args:
            items: May be made anew at each access.
            processor: The model's.
            recipe: Gives sizes and which tokens count.
            seed: Of the split and of the order.
            groups: Items that have to be on one side of the split.
            share: Index of this process, and how many there are: it takes every n-th item.
            check: Refuses an item that must not be used.

        Raises:
            DataError: if nothing is left to train on or to validate, or a process would have no
                item.
        """
        if len(items) <= recipe.num_validation_items:
            raise DataError(
                f"distillation: the set has {len(items)} items and {recipe.num_validation_items} "
                "are kept for validation, so none is left to train on; give more items, or lower "
                "num_validation_items in the recipe"
            )
        self.training, self.validation = split_items(len(items), recipe, seed=seed, groups=groups)
        fewest = min(recipe.items_per_step, len(self.validation))
        if fewest < share[1]:
            raise DataError(
                f"distillation: {share[1]} processes share the items of a step, and the recipe has "
                f"{fewest}; raise items_per_step and num_validation_items, or start fewer"
            )
        self._items = items
        self._processor = processor
        self._recipe = recipe
        self._seed = seed
        self._share = share
        self._check = check

    @classmethod
    def from_set(
        cls,
        items: CalibrationSet,
        model: Path,
        recipe: DistillRecipe,
        *,
        seed: int,
        processes: Processes | None = None,
        check: Callable[[Item], None] | None = None,
        keep_together: bool = True,
        progress: Progress | None = None,
    ) -> Self:
        """Read a set through and split it, for the model of a folder.

        Args:
            items: The set.
            model: Whose processor is used.
            recipe: As in the class itself.
            seed: As above.
            processes: Those that share the items, in this pass as in training; None for this one
                alone.
            check: As above.
            keep_together: Whether items that share a picture are on one side of the split; where
                nothing is trained that does not matter.
            progress: Called on the main process after each item.

        Raises:
            DataError: as the class itself, or if items cannot be read or used: those of a long
                training are met before it, all at once.
            ReportedError: on other processes than the main one, in place of any error.
        """
        processes = processes or Processes("cpu", join=False)
        with processes.agreed():
            processor = Processor.from_folder(model)
        num_answers = 0

        def look(item: Item) -> None:
            nonlocal num_answers
            if check is not None:
                check(item)
            with naming_item(item.item_id):
                answered = processor.has_answer(item.messages, item.images, item.videos)
            if recipe.loss_tokens == "answers" and not answered:
                raise _mute(item)
            num_answers += answered or not (item.images or item.videos)

        found = survey_set(items, look, processes=processes, progress=progress)
        with processes.agreed():
            data = cls(
                items.items,
                processor,
                recipe,
                seed=seed,
                groups=found.groups if keep_together else (),
                share=(processes.index, processes.count),
                check=check,
            )
        if found.sha256 is None:
            data.num_answers = len(items.items)
            data.sha256 = hash_items(items, data.validation, processes=processes, progress=progress)
        else:
            data.num_answers = sum(processes.gather(num_answers))
            data.sha256 = found.sha256
        return data

    def require_answers(self) -> None:
        """Refuse a set of nothing but pictures with a question, which alone would be learned.

        Training a layer at a time learns from every token and needs no answers.

        Raises:
            DataError: if no item has an answer, or is text.
        """
        if not self.num_answers:
            raise DataError(
                "distillation: required items with an answer, got pictures with a question, which "
                "alone would be learned; give answers (JSONL)"
            )

    def __len__(self) -> int:
        return len(self._items)

    def training_batches(self, step: int) -> list[ItemBatch]:
        """Return this process's batches of one optimizer step, counted from 0.

        Raises:
            DataError: if an item cannot be used, or has no token that counts.
        """
        size = self._recipe.items_per_step
        index, count = self._share
        places = range(step * size + index, (step + 1) * size, count)
        return self.pack([self._index_at(place) for place in places])

    def validation_batches(self) -> Iterator[ItemBatch]:
        """Return this process's held-out items in batches.

        Raises:
            DataError: as `training_batches`.
        """
        index, count = self._share
        held_out = self.validation[index::count]
        size = self._recipe.items_per_step  # as many as fit in memory in training
        for start in range(0, len(held_out), size):
            yield from self.pack(held_out[start : start + size])

    def _index_at(self, place: int) -> int:
        epoch, offset = divmod(place, len(self.training))
        return self.training[permutation(len(self.training), self._seed, epoch)[offset]]

    def pack(self, indices: Sequence[int]) -> list[ItemBatch]:
        """Return items of the set in batches.

        Raises:
            DataError: as `training_batches`.
        """
        items = [self._prepare(self._items[index]) for index in indices]
        lengths = [len(inputs.input_ids) for _, inputs, _ in items]
        batches = []
        for row in pack_lengths(lengths, self._recipe.tokens_per_batch):
            ids, inputs, masks = zip(*(items[place] for place in row), strict=True)
            batches.append(ItemBatch(tuple(indices[place] for place in row), ids, inputs, masks))
        return batches

    def inputs(self, index: int) -> ModelInputs:
        """Return one item of the set as tensors.

        Raises:
            DataError: if it cannot be used.
        """
        return self._prepare(self._items[index])[1]

    def _prepare(self, item: Item) -> tuple[str, ModelInputs, Tensor]:
        if self._check is not None:
            self._check(item)
        with naming_item(item.item_id):
            inputs = self._processor(item.messages, images=item.images, videos=item.videos)
        image_token_id = self._processor.config.image_token_id
        mask = loss_mask(inputs, self._recipe.loss_tokens, image_token_id=image_token_id)
        if not mask.any():
            raise _mute(item)
        return item.item_id, inputs, mask


def _mute(item: Item) -> DataError:
    return DataError(
        f"item {item.item_id}: no token counts for the loss; give it an answer, or count all text "
        '(loss_tokens = "text" in the recipe; --loss-tokens text of nvvl rotate)'
    )


def loss_mask(inputs: ModelInputs, tokens: LossTokens, *, image_token_id: int) -> Tensor:
    """Mark the positions of one item whose prediction of the next token counts, (T,) bool.

    The last position predicts nothing known, so it never counts.

    Args:
        inputs: The item.
        tokens: ``text``, every position that is no image token, or ``answers``, those whose next
            token belongs to an answer.
        image_token_id: Id of image tokens.
    """
    mask = torch.zeros_like(inputs.answer_mask)
    if tokens == "answers":
        mask[:-1] = inputs.answer_mask[1:]
    else:
        mask[:-1] = (inputs.input_ids != image_token_id)[:-1]
    return mask


def pack_lengths(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Put items into rows of at most ``most`` tokens: first fit, the longest first.

    Args:
        lengths: Tokens of each item.
        most: Of a row; an item that alone has more gets a row of its own.

    Returns:
        Indices of the items of each row.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = (row for row, left in enumerate(room) if left >= lengths[index])
        row = next(fitting, len(rows))
        if row == len(rows):
            rows.append([])
            room.append(most)
        rows[row].append(index)
        room[row] -= lengths[index]
    return rows
