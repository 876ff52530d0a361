"""Ask models a set of questions side by side: greedy answers, and how far from the teacher.

One pass over prompt and true answer gives the logits from which likelihood, KL and top-1 agreement
with the teacher are taken. The same logits also settle most answers: where the most likely token at
each position is the next token of the true answer, greedy decoding writes exactly that answer, so
there is nothing left to generate. Only the questions a model gets wrong are decoded token by token
(this is speculative decoding, Leviathan et al., arXiv 2211.17192, with the truth as draft). They
wait until there is a whole batch of them. As with any change of batch, a tie within rounding error
may fall the other way.

Quantizing the language model leaves the vision tower as it was. Models whose tower and projector
are equal bit for bit share one encoding of each image, the teacher included.

Shapes: B questions, T tokens, N answer tokens of the batch, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from nvvl.model.generate import generate
from nvvl.model.processor import Processor
from nvvl.model.vlm import NemotronNanoVL
from nvvl.reports.metrics import answer_nll, logit_divergence
from nvvl.reports.question import (
    Encoded,
    Question,
    collate_ids,
    encode_questions,
    join_features,
    prune_videos,
)

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Response:
    """What a model makes of a question.

    Attributes:
        text: its greedy answer; empty where none was asked for.
        is_true: whether greedy decoding writes the true answer, token by token.
        nll: mean negative log-likelihood of the true answer's tokens, in nats.
        kl: mean KL(teacher || model) over these tokens, in nats; None without a teacher.
        top1: fraction of these tokens at which both rank the same token first.
        num_visual_tokens: image tokens in the prompt.
    """

    text: str
    is_true: bool
    nll: float
    kl: float | None
    top1: float | None
    num_visual_tokens: int


@dataclass(frozen=True)
class _Reading:
    """What the pass over one true answer tells."""

    is_true: bool
    nll: float
    kl: float | None
    top1: float | None


@dataclass
class _Sheet:
    """What one model has answered so far, by the place of the question.

    Attributes:
        waiting: questions that are to be decoded, at most a batch of them.
    """

    model: NemotronNanoVL
    pruning_rate: float
    readings: dict[int, _Reading] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)
    visual_tokens: dict[int, int] = field(default_factory=dict)
    waiting: list[tuple[int, Encoded]] = field(default_factory=list)

    def response(self, place: int) -> Response:
        reading = self.readings[place]
        return Response(
            text=self.texts[place],
            is_true=reading.is_true,
            nll=reading.nll,
            kl=reading.kl,
            top1=reading.top1,
            num_visual_tokens=self.visual_tokens[place],
        )


class Panel:
    """Models that take the same tokens and pixels, asked together.

    Attributes:
        models: the models under test, on one device.
        teacher: the model KL is measured against, or None; may be one of ``models``.
        processor: of any of them.
        pruning_rates: share of the tokens of each video that each model is not shown. One model may
            take part with several rates. The teacher sees everything.
    """

    def __init__(
        self,
        models: Sequence[NemotronNanoVL],
        processor: Processor,
        *,
        teacher: NemotronNanoVL | None = None,
        pruning_rates: Sequence[float] | None = None,
    ) -> None:
        self.models = list(models)
        self.teacher = teacher
        self.processor = processor
        self.pruning_rates = list(pruning_rates or [0.0] * len(self.models))
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
            max_new_tokens: longest answer, in tokens; 0 asks for none.
            batch_size: questions that are run at a time.
            compare: measure KL and top-1 agreement, if there is a teacher.
            members: which of ``models`` to ask; all by default.
        """
        sheets = [
            _Sheet(self.models[index], self.pruning_rates[index])
            for index in (range(len(self.models)) if members is None else members)
        ]
        teacher = self.teacher if compare else None
        places = sorted(range(len(questions)), key=lambda i: len(questions[i].answered.input_ids))
        for part in _split(places, batch_size):
            batch = [questions[place] for place in part]
            self._answer_batch(sheets, teacher, part, batch, max_new_tokens, batch_size)
        for sheet in sheets:
            self._decode(sheet, len(sheet.waiting), max_new_tokens)
        return [[sheet.response(place) for place in range(len(questions))] for sheet in sheets]

    def _answer_batch(
        self,
        sheets: Sequence[_Sheet],
        teacher: NemotronNanoVL | None,
        places: Sequence[int],
        questions: Sequence[Question],
        max_new_tokens: int,
        batch_size: int,
    ) -> None:
        """Run each model over prompts and true answers; decode where a whole batch waits."""
        models = [sheet.model for sheet in sheets]
        encoders = dict.fromkeys(
            self._encoders[model] for model in ([teacher, *models] if teacher else models)
        )
        encoded = {encoder: encode_questions(encoder, questions) for encoder in encoders}
        teacher_logits = (
            None if teacher is None else _answer_logits(teacher, encoded[self._encoders[teacher]])
        )
        for sheet in sheets:
            batch = [
                prune_videos(question, seen, sheet.model.config, sheet.pruning_rate)
                for question, seen in zip(
                    questions, encoded[self._encoders[sheet.model]], strict=True
                )
            ]
            same = sheet.model is teacher and not sheet.pruning_rate
            logits = teacher_logits if same else _answer_logits(sheet.model, batch)
            assert logits is not None
            for place, question, reading in zip(
                places, batch, _read(logits, batch, teacher_logits), strict=True
            ):
                sheet.readings[place] = reading
                sheet.visual_tokens[place] = len(question.features)
                if not max_new_tokens:
                    sheet.texts[place] = ""
                elif reading.is_true and len(question.answer_ids) <= max_new_tokens:
                    sheet.texts[place] = self.processor.decode(question.answer_ids.tolist()).strip()
                else:
                    sheet.waiting.append((place, question))
            if len(sheet.waiting) >= batch_size:
                self._decode(sheet, batch_size, max_new_tokens)

    def _decode(self, sheet: _Sheet, num_questions: int, max_new_tokens: int) -> None:
        """Decode the answers of the questions that have waited longest."""
        due, sheet.waiting = sheet.waiting[:num_questions], sheet.waiting[num_questions:]
        if not due:
            return
        language = sheet.model.config.language
        answers = generate(
            sheet.model,
            collate_ids([question.prompt_ids for _, question in due], language.pad_token_id),
            eos_token_id=language.eos_token_ids,
            max_new_tokens=max_new_tokens,
            image_features=join_features([question for _, question in due]),
        )
        for (place, _), ids in zip(due, answers, strict=True):
            sheet.texts[place] = self.processor.decode(ids).strip()


def _read(
    logits: Tensor, questions: Sequence[Encoded], teacher_logits: Tensor | None
) -> Iterator[_Reading]:
    """Compare logits (N, V) with the true answers, and with the teacher's logits (N, V)."""
    counts = [len(question.answer_ids) for question in questions]
    targets = torch.cat([question.answer_ids for question in questions]).to(logits.device)
    hits = (logits.argmax(-1) == targets).split(counts)
    nlls = answer_nll(logits, targets).split(counts)
    if teacher_logits is None:
        for hit, nll in zip(hits, nlls, strict=True):
            yield _Reading(bool(hit.all()), float(nll.mean()), None, None)
        return
    divergence, agrees = logit_divergence(teacher_logits, logits)
    for hit, nll, kl, agree in zip(
        hits, nlls, divergence.split(counts), agrees.split(counts), strict=True
    ):
        kl_mean, top1 = float(kl.mean()), float(agree.float().mean())
        yield _Reading(bool(hit.all()), float(nll.mean()), kl_mean, top1)


def _answer_logits(model: NemotronNanoVL, questions: Sequence[Encoded]) -> Tensor:
    """Return the logits (N, V) that predict the answer tokens, question after question."""
    device = model.language_model.backbone.embeddings.weight.device
    batch = collate_ids(
        [torch.cat([question.prompt_ids, question.answer_ids]) for question in questions],
        model.config.language.pad_token_id,
    )
    # Padding is on the left, so all answers lie in the last positions; the logits of a token
    # are one position before it.
    counts = torch.tensor([len(question.answer_ids) for question in questions])
    longest = int(counts.max())
    output = model(
        inputs_embeds=model.embed(batch.input_ids.to(device), join_features(questions)),
        padding_mask=batch.padding_mask.to(device),
        logits_to_keep=longest + 1,
    )  # (B, longest + 1, V)
    is_answer = torch.arange(longest) >= longest - counts[:, None]  # (B, longest)
    logits: Tensor = output.logits[:, :-1][is_answer.to(device)]
    return logits


def _split(values: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (values[start : start + size] for start in range(0, len(values), size))


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
