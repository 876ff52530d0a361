"""An item made ready for models: its tokens, and its images in place of pixels once encoded.

Efficient video sampling drops image tokens that look like the same place one frame earlier
(`nvvl.model.video`). What looks alike is decided on the features of one encoder, so a question has
its final tokens only when its images are encoded.

Shapes: n tiles, L tokens a tile, H hidden, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nvvl.calib_data.items import Item
from nvvl.errors import DataError
from nvvl.model.config import VLMConfig
from nvvl.model.processor import Batch, ModelInputs, Processor
from nvvl.model.video import prune_prompt
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
        prompt_ids: (T,) int64, without the image tokens that were dropped.
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


def encode_questions(encoder: NemotronNanoVL, questions: Sequence[Question]) -> list[Encoded]:
    """Encode the images of questions.

    Args:
        encoder: the model whose vision tower and projector are used.
        questions: in any order; tiles of neighbours are encoded together.
    """
    device = encoder.language_model.backbone.embeddings.weight.device
    hidden, per_tile = encoder.config.language.hidden_size, encoder.config.tokens_per_tile
    parts = [torch.zeros(0, per_tile, hidden, dtype=encoder.dtype, device=device)]
    for pixels in torch.cat([q.prompt.pixel_values for q in questions]).split(_TILES_AT_ONCE):
        if len(pixels):
            parts.append(encoder.encode_images(pixels.to(device)))
    per_question = [len(question.prompt.pixel_values) for question in questions]
    features = torch.cat(parts).split(per_question)  # (n, L, H) each
    return [
        Encoded(question.prompt.input_ids, question.answer_ids, rows.flatten(0, 1))
        for question, rows in zip(questions, features, strict=True)
    ]


def prune_videos(
    question: Question, encoded: Encoded, config: VLMConfig, pruning_rate: float
) -> Encoded:
    """Drop image tokens of each video that look like the same place one frame earlier.

    Args:
        question: the question.
        encoded: the same with all its image tokens.
        config: the model's config.
        pruning_rate: share of the tokens of each video to drop; 0 drops none.
    """
    kept, features = prune_prompt(config, question.prompt, encoded.features, pruning_rate)
    return replace(encoded, prompt_ids=encoded.prompt_ids[kept], features=features)


def collate_ids(rows: Sequence[Tensor], pad_token_id: int) -> Batch:
    """Pad rows of ids (T,) on the left; the pixels are left out, as they were encoded before."""
    length = max(len(row) for row in rows)
    input_ids = torch.full((len(rows), length), pad_token_id, dtype=torch.int64)
    padding_mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for index, row in enumerate(rows):
        input_ids[index, length - len(row) :] = row
        padding_mask[index, length - len(row) :] = True
    return Batch(
        input_ids=input_ids,
        padding_mask=padding_mask,
        pixel_values=torch.zeros(0, 3, 1, 1),
        answer_mask=torch.zeros_like(padding_mask),
    )


def join_features(questions: Sequence[Encoded]) -> Tensor | None:
    """Return the features of all questions, one behind the other; None without images."""
    features = torch.cat([question.features for question in questions])
    return features if len(features) else None


def _cut(inputs: ModelInputs, length: int) -> ModelInputs:
    """Keep the first tokens, and all pixels: images come before answers."""
    return replace(
        inputs,
        input_ids=inputs.input_ids[:length],
        answer_mask=inputs.answer_mask[:length],
        video_mask=None if inputs.video_mask is None else inputs.video_mask[:length],
    )
