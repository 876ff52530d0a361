"""A checkpoint as EleutherAI's lm-evaluation-harness wants it: three kinds of requests, answered.

The harness owns prompts, answers and metrics; here are likelihood and greedy generation alone, on
nvvl's own forward, so that every format is measured as `nvvl evaluate` measures it. Text is encoded
without a start token; a request without context gets one (the end token where a model has none).
What is longer than ``max_length`` loses its beginning, and is counted.

Requests are sorted by length and cut into batches before it is asked which are answered already: a
run that goes on forms the batches it would have formed, and so gets the numbers it would have got.

Shapes: B requests, T tokens, N scored tokens of the batch, V vocabulary.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from nvvl.errors import DataError
from nvvl.model.generate import generate
from nvvl.model.processor import Processor
from nvvl.model.prompt import Message, render_prompt
from nvvl.model.vlm import NemotronNanoVL
from nvvl.progress import Progress
from nvvl.reports.generation_settings import GenerationSettings, longest_of
from nvvl.reports.harness_journal import ResponseJournal
from nvvl.reports.question import collate_ids

_HEAD_ROWS = 512  # tokens whose logits are held at once: (512, V) float32

# How prompts in the chat template end. The processor encodes the answer apart, as it is generated.
_OPENINGS = tuple(
    render_prompt([Message("user", "")], reasoning=reasoning).rpartition("\n<SPECIAL_11>")[2]
    for reasoning in (False, True)
)


class _Scored(NamedTuple):
    """Tokens to score: the ids a model reads, and how many of the last are predicted."""

    ids: list[int]
    num_targets: int


class HarnessModel(LM):  # type: ignore[misc]
    """A loaded checkpoint that answers the harness's requests.

    Attributes:
        num_shortened: requests that were longer than ``max_length``, by task.
    """

    def __init__(
        self,
        model: NemotronNanoVL,
        processor: Processor,
        *,
        journal: ResponseJournal,
        batch_size: int,
        max_length: int,
        progress: Progress | None = None,
    ) -> None:
        """Wrap a model.

        Args:
            model: On any device.
            processor: Its own.
            journal: Where responses are kept, and found again.
            batch_size: Requests run at a time.
            max_length: Most tokens of a request.
            progress: Called after each batch.
        """
        super().__init__()
        self.model = model
        self.processor = processor
        self.journal = journal
        self.batch_size = batch_size
        self.max_length = max_length
        self.progress = progress
        self.num_shortened: Counter[str | None] = Counter()
        language = model.config.language
        self._stop_ids = list(language.eos_token_ids)
        start = language.bos_token_id
        self._start_id = self._stop_ids[0] if start is None else start

    @torch.inference_mode()
    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Return log-likelihood of each continuation, and whether greedy decoding writes it."""
        pairs = [self._encode_pair(request) for request in requests]
        found = self._answer("loglikelihood", requests, pairs, self._score, len_of=_num_ids)
        return [(float(nats), bool(is_greedy)) for nats, is_greedy in found]

    @torch.inference_mode()
    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Return the log-likelihood of each text, in windows that overlap by one token."""
        windows = [self._windows(request.args[0]) for request in requests]
        found = self._answer(
            "loglikelihood_rolling", requests, windows, self._score_windows, len_of=_num_all_ids
        )
        return [float(nats) for nats in found]

    @torch.inference_mode()
    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return a greedy answer to each context, cut before the first stop string.

        Raises:
            DataError: if a task asks for sampling, or for answers longer than a request.
        """
        prompts = [self._encode_prompt(request) for request in requests]
        found = self._answer(
            "generate_until", requests, prompts, self._write, len_of=lambda prompt: len(prompt[0])
        )
        return [str(text) for text in found]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render a conversation as the model's prompt.

        The harness asks for no opening where the last turn is the beginning of an answer, which the
        model is to go on with.
        """
        roles = {"system": "system", "user": "user", "assistant": "assistant"}
        messages = [Message(roles[turn["role"]], turn["content"]) for turn in chat_history]  # type: ignore[arg-type]
        if not add_generation_prompt and messages and messages[-1].role == "assistant":
            return self._render(messages[:-1], True) + messages[-1].content
        return self._render(messages, add_generation_prompt)

    def _render(self, messages: list[Message], add_generation_prompt: bool) -> str:
        segments = self.processor.render(messages, add_generation_prompt=add_generation_prompt)
        return "".join(segment.text for segment in segments)

    @property
    def tokenizer_name(self) -> str:
        """Name under which the harness keeps rendered prompts."""
        return "nvvl"

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Name the template; it is code (`nvvl.model.prompt`), not Jinja."""
        return "nvvl" if chat_template else ""

    def _answer(
        self,
        kind: str,
        requests: Sequence[Instance],
        inputs: Sequence[Any],
        answer: Callable[[Sequence[Any]], list[Any]],
        *,
        len_of: Callable[[Any], int],
    ) -> list[Any]:
        """Answer requests in batches of like length, and leave out batches that are answered."""
        keys = [self.journal.key(kind, request.args) for request in requests]
        order = sorted(range(len(inputs)), key=lambda place: -len_of(inputs[place]))
        for start in range(0, len(order), self.batch_size):
            places = order[start : start + self.batch_size]
            if any(keys[place] not in self.journal for place in places):
                answers = answer([inputs[place] for place in places])
                self.journal.add([keys[place] for place in places], answers)
            if self.progress is not None:
                self.progress(kind, start + len(places), len(order))
        return [self.journal[key] for key in keys]

    def _encode(self, text: str) -> list[int]:
        return self.processor.tokenize(text)

    def _encode_pair(self, request: Instance) -> _Scored:
        """Encode both as one text, but an answer apart from the opening of its turn.

        Spaces between them belong to the continuation.
        """
        context, continuation = request.arguments
        if context.endswith(_OPENINGS):
            before, after = self._encode(context), self._encode(continuation)
            return self._shorten(request, before, after)
        bare = context.rstrip()
        continuation = context[len(bare) :] + continuation
        before = self._encode(bare)
        after = self._encode(bare + continuation)[len(before) :]
        return self._shorten(request, before or [self._start_id], after)

    def _shorten(self, request: Instance, before: list[int], after: list[int]) -> _Scored:
        """Keep the last tokens that fit; at least one stands before what is scored."""
        if not after:
            raise DataError("lm-eval: a request has an empty continuation; nothing can be scored")
        if len(before) + len(after) > self.max_length:
            self.num_shortened[request.task_name] += 1
        ids = (before + after)[-self.max_length :]
        return _Scored(ids, min(len(after), len(ids) - 1))

    def _windows(self, text: str) -> list[_Scored]:
        pairs = map(
            make_disjoint_window,
            get_rolling_token_windows(
                token_list=self._encode(text),
                prefix_token=self._start_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            ),
        )
        return [_Scored(list(before) + list(after), len(after)) for before, after in pairs]

    def _score(self, batch: Sequence[_Scored]) -> list[tuple[float, bool]]:
        """Return log-likelihood, and whether each target is the likeliest token, of each row."""
        device = self.model.language_model.backbone.embeddings.weight.device
        rows = collate_ids(
            [torch.tensor(scored.ids[:-1]) for scored in batch],
            self.model.config.language.pad_token_id,
        )
        hidden, _ = self.model.language_model.hidden_states(
            self.model.embed(rows.input_ids.to(device)), padding_mask=rows.padding_mask.to(device)
        )  # (B, T, H)
        counts = [scored.num_targets for scored in batch]
        # Padding is on the left, so the states that predict the targets are the last of each row.
        states = torch.cat([row[-count:] for row, count in zip(hidden, counts, strict=True)])
        targets = torch.cat([torch.tensor(s.ids[-s.num_targets :]) for s in batch]).to(device)
        nats, hits = self._compare(states, targets)
        return [
            (float(row.sum()), bool(hit.all()))
            for row, hit in zip(nats.split(counts), hits.split(counts), strict=True)
        ]

    def _compare(self, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return float64 log-probabilities (N,) of targets, and whether they are the likeliest."""
        nats, hits = [], []
        head = self.model.language_model.lm_head
        for part, wanted in zip(states.split(_HEAD_ROWS), targets.split(_HEAD_ROWS), strict=True):
            logits = head(part).float()  # (rows, V)
            chosen = logits.gather(-1, wanted[:, None])[:, 0]
            nats.append((chosen - logits.logsumexp(-1)).double().cpu())
            hits.append((logits.argmax(-1) == wanted).cpu())
        return torch.cat(nats), torch.cat(hits)

    def _score_windows(self, batch: Sequence[list[_Scored]]) -> list[float]:
        windows = [window for text in batch for window in text]
        nats = [row for part in _parts(windows, self.batch_size) for row, _ in self._score(part)]
        counts = [len(text) for text in batch]
        ends = [sum(counts[: place + 1]) for place in range(len(counts))]
        return [sum(nats[end - count : end]) for end, count in zip(ends, counts, strict=True)]

    def _encode_prompt(self, request: Instance) -> tuple[list[int], GenerationSettings]:
        """Encode a prompt, and keep the end of it that leaves room for the longest answer."""
        context, values = request.arguments
        settings = GenerationSettings.read(values)
        room = self.max_length - settings.max_new_tokens
        if room < 1:
            raise DataError(
                f"lm-eval: answers of {settings.max_new_tokens} tokens leave no room in "
                f"{self.max_length}; raise --max-length"
            )
        ids = self._encode(context) or [self._start_id]
        if len(ids) > room:
            self.num_shortened[request.task_name] += 1
        return ids[-room:], settings

    def _write(self, batch: Sequence[tuple[list[int], GenerationSettings]]) -> list[str]:
        answers = generate(
            self.model,
            collate_ids(
                [torch.tensor(ids) for ids, _ in batch],
                self.model.config.language.pad_token_id,
            ),
            eos_token_id=self._stop_ids,
            max_new_tokens=longest_of([settings for _, settings in batch]),
        )
        return [
            settings.cut(self.processor.decode(ids[: settings.max_new_tokens]))
            for ids, (_, settings) in zip(answers, batch, strict=True)
        ]


def _num_ids(scored: _Scored) -> int:
    return len(scored.ids)


def _num_all_ids(windows: Sequence[_Scored]) -> int:
    return sum(map(_num_ids, windows))


def _parts(values: Sequence[_Scored], size: int) -> Iterator[Sequence[_Scored]]:
    return (values[start : start + size] for start in range(0, len(values), size))
