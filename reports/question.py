"""An item made ready for models: its tokens, and its images in place of pixels once encoded.

Efficient video sampling drops image tokens that look like the same place one frame earlier
(`nvvl.model.video`). What looks alike is decided on the features of one encoder, so a question has
its final tokens only when its images are encoded: `encode_questions`.

Shapes: n tiles, L tokens a tile, H hidden, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nvvl.calib_data.items import Item
from nvvl.errors import DataError
from nvvl.model.processor import ModelInputs, Processor
from nvvl.model.video import evs_retention_mask, prune_video_tokens
from nvvl.model.vlm import NemotronNanoVL

# Tiles that go through the vision tower at a time; a batch of long documents has thousands.
_TILES_AT_ONCE = 64


@dataclass(frozen=True)
class Question:
    """An item made ready for a model.

    Attributes:
        item: what is asked; its last message is the true answer.
        prompt: the tokens up to where the model has to answer, and the pixels.
        answered: the same with the true answer and its end of turn behind it.
    """

    item: Item
    prompt: ModelInputs
    answered: ModelInputs

    @property
    def truth(self) -> str:
        """The true answer."""
        return self.item.messages[-1].content

    @property
    def answer_ids(self) -> Tensor:
        """The true answer with its end of turn, (N,) int64."""
        return self.answered.input_ids[self.answered.answer_mask]


@dataclass(frozen=True)
class Encoded:
    """A question as one encoder sees it.

    Attributes:
        prompt_ids: (T,) int64, without the image tokens that were pruned.
        answer_ids: (N,) int64, the true answer with its end of turn.
        features: (image tokens of the prompt, H).
    """

    prompt_ids: Tensor
    answer_ids: Tensor
    features: Tensor


def prepare_question(
    item: Item, processor: Processor, *, max_num_tiles: int | None = None
) -> Question:
    """Turn an item into tokens and pixels.

    Raises:
        DataError: if its last message is not the assistant's, and as the processor does.
    """
    if not item.messages or item.messages[-1].role != "assistant":
        raise DataError(f"{item.item_id}: the last message must be the assistant's true answer")
    inputs = processor(
        item.messages, images=item.images, videos=item.videos, max_num_tiles=max_num_tiles
    )
    first, last = inputs.answer_mask.nonzero().squeeze(-1)[[0, -1]].tolist()
    return Question(item, _cut(inputs, first), _cut(inputs, last + 1))


def encode_questions(
    encoder: NemotronNanoVL, questions: Sequence[Question], *, pruning_rate: float = 0.0
) -> list[Encoded]:
    """Encode the images of questions, and drop the video tokens that are to be pruned.

    Args:
        encoder: the model whose vision tower and projector are used.
        questions: in any order; tiles of neighbours are encoded together.
        pruning_rate: share of the tokens of each video to drop.
    """
    device = encoder.language_model.lm_head.weight.device
    pixels = torch.cat([question.prompt.pixel_values for question in questions])
    parts = [encoder.encode_images(part.to(device)) for part in pixels.split(_TILES_AT_ONCE)]
    per_question = [len(question.prompt.pixel_values) for question in questions]
    hidden = encoder.config.language.hidden_size
    features = (
        torch.cat(parts)
        if len(pixels)
        else torch.zeros(0, encoder.config.tokens_per_tile, hidden, device=device)
    )  # (n, L, H)
    return [
        _prune(question, rows, encoder.config.image_token_id, pruning_rate)
        for question, rows in zip(questions, features.split(per_question), strict=True)
    ]


def _prune(
    question: Question, features: Tensor, image_token_id: int, pruning_rate: float
) -> Encoded:
    prompt = question.prompt
    rows = features.flatten(0, 1)
    if not pruning_rate or prompt.video_mask is None:
        return Encoded(prompt.input_ids, question.answer_ids, rows)
    is_image = prompt.input_ids == image_token_id
    is_video_row = prompt.video_mask[is_image].to(rows.device)
    frames = rows[is_video_row].unflatten(0, (-1, features.shape[1]))  # (all frames, L, H)
    side = round(features.shape[1] ** 0.5)
    masks = [
        evs_retention_mask(video.unflatten(1, (side, side)), pruning_rate)
        for video in frames.split(list(prompt.video_frames))
    ]
    kept = prune_video_tokens(prompt.video_mask, [mask.cpu() for mask in masks])
    return Encoded(
        prompt.input_ids[kept], question.answer_ids, rows[kept[is_image].to(rows.device)]
    )


def _cut(inputs: ModelInputs, length: int) -> ModelInputs:
    """Keep the first tokens, and all pixels: images come before answers."""
    return replace(
        inputs,
        input_ids=inputs.input_ids[:length],
        answer_mask=inputs.answer_mask[:length],
        video_mask=None if inputs.video_mask is None else inputs.video_mask[:length],
    )
