"""Ask models a set of questions side by side: greedy answers, and how far from the teacher.

One pass over prompt and true answer gives the logits from which KL and top-1 agreement with the
teacher are taken. The same logits also settle most answers: where the most likely token at each
position is the next token of the true answer, greedy decoding writes exactly that answer, so there
is nothing left to generate. Only the questions a model gets wrong are decoded token by token (this
is speculative decoding, Leviathan et al., arXiv 2211.17192, with the truth as draft). As with any
change of batch, a tie within rounding error may fall the other way.

Quantizing the language model leaves the vision tower as it was. Models whose tower and projector
are equal bit for bit share one encoding of each image, the teacher included.

Shapes: B questions, T tokens, N answer tokens of the batch, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from nvvl.calib_data.items import Item
from nvvl.errors import DataError
from nvvl.model.generate import generate
from nvvl.model.processor import Batch, ModelInputs, Processor, collate
from nvvl.model.vlm import NemotronNanoVL
from nvvl.reports.metrics import logit_divergence

T = TypeVar("T")


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
class Response:
    """What a model makes of a question.

    Attributes:
        text: its greedy answer.
        kl: mean KL(teacher || model) over the answer tokens, in nats; None without a teacher.
        top1: fraction of answer tokens at which both rank the same token first.
    """

    text: str
    kl: float | None
    top1: float | None


@dataclass(frozen=True)
class _Reading:
    """What the pass over one true answer tells: whether it is the greedy one, KL and top-1."""

    is_greedy: bool
    kl: float | None
    top1: float | None


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


class Panel:
    """Models that take the same tokens and pixels, asked together.

    Attributes:
        models: the models under test, on one device.
        teacher: the model KL is measured against, or None; may be one of ``models``.
        processor: of any of them.
    """

    def __init__(
        self,
        models: Sequence[NemotronNanoVL],
        processor: Processor,
        *,
        teacher: NemotronNanoVL | None = None,
    ) -> None:
        self.models = list(models)
        self.teacher = teacher
        self.processor = processor
        self._encoders: dict[NemotronNanoVL, NemotronNanoVL] = {}
        for model in self.models if teacher is None else [teacher, *self.models]:
            twins = (m for m in self._encoders.values() if m is model or _same_vision(m, model))
            self._encoders[model] = next(twins, model)

    @torch.inference_mode()
    def ask(
        self,
        questions: Sequence[Question],
        *,
        max_new_tokens: int,
        batch_size: int,
        compare: bool = True,
        members: Sequence[int] | None = None,
    ) -> list[list[Response]]:
        """Return each model's responses, in the order of the questions.

        Args:
            questions: sorted by length here, so that a batch pads little.
            max_new_tokens: longest answer, in tokens.
            batch_size: questions that are run at a time.
            compare: measure KL and top-1 agreement, if there is a teacher.
            members: which of ``models`` to ask; all by default.
        """
        models = [
            self.models[index]
            for index in (range(len(self.models)) if members is None else members)
        ]
        readings: list[list[_Reading]] = [[] for _ in models]
        order = sorted(range(len(questions)), key=lambda i: len(questions[i].answered.input_ids))
        arranged = [questions[index] for index in order]
        for batch in _split(arranged, batch_size):
            for row, batch_readings in zip(
                readings, self._read(models, batch, compare), strict=True
            ):
                row.extend(batch_readings)
        responses = []
        for model, row in zip(models, readings, strict=True):
            texts = self._answer(model, arranged, row, max_new_tokens, batch_size)
            by_index = {
                index: Response(text, reading.kl, reading.top1)
                for index, text, reading in zip(order, texts, row, strict=True)
            }
            responses.append([by_index[index] for index in range(len(questions))])
        return responses

    def _read(
        self, models: Sequence[NemotronNanoVL], questions: Sequence[Question], compare: bool
    ) -> Iterator[list[_Reading]]:
        """Run each model over prompts and true answers of one batch."""
        batch = _to_device(
            collate([q.answered for q in questions], models[0].config.language.pad_token_id),
            models[0].language_model.lm_head.weight.device,
        )
        counts = batch.answer_mask.sum(-1).tolist()
        targets = batch.input_ids[batch.answer_mask]
        features: dict[NemotronNanoVL, Tensor] = {}
        teacher = self.teacher if compare else None
        teacher_logits = None if teacher is None else self._logits(teacher, batch, features)
        for model in models:
            logits = (
                teacher_logits
                if teacher_logits is not None and model is teacher
                else self._logits(model, batch, features)
            )
            hits = [bool(hit.all()) for hit in (logits.argmax(-1) == targets).split(counts)]
            if teacher_logits is None:
                yield [_Reading(hit, None, None) for hit in hits]
                continue
            divergence, agrees = logit_divergence(teacher_logits, logits)
            yield [
                _Reading(hit, float(kl.mean()), float(agree.float().mean()))
                for hit, kl, agree in zip(
                    hits, divergence.split(counts), agrees.split(counts), strict=True
                )
            ]

    def _logits(
        self, model: NemotronNanoVL, batch: Batch, features: dict[NemotronNanoVL, Tensor]
    ) -> Tensor:
        """Return the logits (N, V) that predict the answer tokens, question after question.

        Args:
            model: the model to run.
            batch: prompts with answers.
            features: image features of the batch by encoding model; filled here.
        """
        encoder = self._encoders[model]
        if encoder not in features and len(batch.pixel_values):
            features[encoder] = encoder.encode_images(batch.pixel_values)
        # Padding is on the left, so all answers lie in the last positions; the logits of a token
        # are one position before it.
        longest = int(batch.answer_mask.sum(-1).max())
        output = model(
            inputs_embeds=model.embed(batch.input_ids, features.get(encoder)),
            padding_mask=batch.padding_mask,
            logits_to_keep=longest + 1,
        )  # (B, longest + 1, V)
        logits: Tensor = output.logits[:, :-1][batch.answer_mask[:, -longest:]]
        return logits

    def _answer(
        self,
        model: NemotronNanoVL,
        questions: Sequence[Question],
        readings: Sequence[_Reading],
        max_new_tokens: int,
        batch_size: int,
    ) -> list[str]:
        """Return a model's answers; decode only where the true answer is not the greedy one."""
        ids = [
            question.answer_ids.tolist() if reading.is_greedy else None
            for question, reading in zip(questions, readings, strict=True)
        ]
        is_open = [row is None or len(row) > max_new_tokens for row in ids]
        prompts = [q.prompt for q, unknown in zip(questions, is_open, strict=True) if unknown]
        generated: list[list[int]] = []
        for part in _split(prompts, batch_size):
            generated += generate(
                model,
                collate(part, model.config.language.pad_token_id),
                eos_token_id=model.config.language.eos_token_id,
                max_new_tokens=max_new_tokens,
            )
        answers = iter(generated)
        return [
            self.processor.decode(next(answers) if row is None or unknown else row).strip()
            for row, unknown in zip(ids, is_open, strict=True)
        ]


def _split(values: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (values[start : start + size] for start in range(0, len(values), size))


def _cut(inputs: ModelInputs, length: int) -> ModelInputs:
    """Keep the first tokens, and all pixels: images come before answers."""
    return replace(
        inputs,
        input_ids=inputs.input_ids[:length],
        answer_mask=inputs.answer_mask[:length],
        video_mask=None if inputs.video_mask is None else inputs.video_mask[:length],
    )


def _to_device(batch: Batch, device: torch.device) -> Batch:
    return replace(
        batch,
        input_ids=batch.input_ids.to(device),
        padding_mask=batch.padding_mask.to(device),
        pixel_values=batch.pixel_values.to(device),
        answer_mask=batch.answer_mask.to(device),
    )


def _same_vision(first: NemotronNanoVL, second: NemotronNanoVL) -> bool:
    """Tell whether two models turn every image into the same features, bit for bit."""
    for name in ("vision_model", "mlp1"):
        tensors = getattr(first, name).state_dict()
        others = getattr(second, name).state_dict()
        if tensors.keys() != others.keys():
            return False
        for key, tensor in tensors.items():
            other = others[key]
            if tensor.dtype != other.dtype or not torch.equal(tensor, other):
                return False
    return True
