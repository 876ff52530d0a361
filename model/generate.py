"""Generates answers for a left-padded batch of prompts, one token a step.

The prompt is run once; after that each step feeds one token per unfinished row and the state of
the rows before (keys and values, convolution and state-space states). Rows that are done leave the
batch. Sampling draws its uniform numbers on the CPU from one seed, so the choice does not depend on
the device's own random generator.

A thinking budget cuts reasoning the way the Nemotron Nano V2 VL report evaluates it (budgets of
2K to 12K tokens with a grace period of 500): see `ThinkingBudget`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from nvvl.model.processor import Batch
from nvvl.model.vlm import NemotronNanoVL

# Tokens looked at to find a tag: every character of "</think>" could be a token of its own.
_TAIL = 16
_OPEN, _CLOSE = "<think>", "</think>"
_PARTIAL_CLOSE = tuple(_CLOSE[:length] for length in range(2, len(_CLOSE)))


@dataclass(frozen=True, kw_only=True)
class ThinkingBudget:
    r"""How many tokens a row may think.

    A row thinks while its prompt or answer holds a ``<think>`` not yet closed, whoever wrote it;
    else it is left alone. Once ``tokens`` tokens were generated, thinking is ended after the next
    token with a newline, or after ``grace`` more tokens if none comes: the row then continues with
    ``end_ids``, whatever the model would have said, and is free again after them. A ``</think>``
    the model has begun itself is not interrupted.

    Attributes:
        tokens: Tokens before the end is sought; 0 ends thinking before its first token.
        grace: Further tokens within which a newline is waited for.
        end_ids: Tokens that close the thinking, usually those of ``</think>``.
        decode: Text of token ids, special tokens included. Tags are looked for in text, because a
            tokenizer may merge their last character with what follows.
    """

    tokens: int
    end_ids: tuple[int, ...]
    decode: Callable[[Sequence[int]], str]
    grace: int = 500

    def __post_init__(self) -> None:
        if self.tokens < 0 or self.grace < 0:
            raise ValueError(
                f"thinking budget: required tokens and grace of 0 or more, got {self.tokens} "
                f"and {self.grace}"
            )
        if not self.end_ids:
            raise ValueError("thinking budget: end_ids is empty, required the ids of </think>")

    @classmethod
    def from_tokenizer(
        cls, tokenizer: Tokenizer, *, tokens: int, grace: int = 500
    ) -> "ThinkingBudget":
        """Build a budget whose end is the tokenizer's spelling of ``</think>``."""
        return cls(
            tokens=tokens,
            grace=grace,
            end_ids=tuple(tokenizer.encode(_CLOSE, add_special_tokens=False).ids),
            decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=False),
        )


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn from logits; as it stands, the likeliest is taken.

    Attributes:
        temperature: 0 takes the likeliest token; above 0 samples from logits / temperature.
        top_p: Samples only from the likeliest tokens whose probabilities reach this sum.
        seed: Of the uniform numbers. The same seed, batch and logits give the same tokens.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"sampling: required temperature >= 0 and 0 < top_p <= 1, got {self.temperature} "
                f"and {self.top_p}"
            )


GREEDY = Sampling()


@torch.no_grad()
def generate(
    model: NemotronNanoVL,
    batch: Batch,
    *,
    eos_token_id: int | Sequence[int],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    thinking_budget: ThinkingBudget | None = None,
    image_features: Tensor | None = None,
    on_tokens: Callable[[dict[int, int]], None] | None = None,
) -> list[list[int]]:
    """Continue every prompt of a batch.

    Args:
        model: On any device; the batch is moved to it.
        batch: Left-padded prompts and their tiles.
        eos_token_id: The token, or tokens, that end a row.
        max_new_tokens: Most tokens per row.
        sampling: How each token is drawn.
        thinking_budget: Cuts reasoning; None leaves it alone.
        image_features: (image tokens of the batch, hidden), where the images were encoded before;
            the batch's pixels are then not looked at.
        on_tokens: Called after each step with {row: token} of the rows that go on.

    Returns:
        For each row its new tokens without the one that ended it; a row of ``max_new_tokens``
        tokens was cut off.

    Raises:
        ValueError: if ``max_new_tokens`` is below 1.
        DataError: if image tokens and tiles do not match.
    """
    if max_new_tokens < 1:
        raise ValueError(f"required max_new_tokens >= 1, got {max_new_tokens}")
    stops = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id)
    device = model.language_model.backbone.embeddings.weight.device
    rows = list(range(batch.input_ids.shape[0]))
    answers: list[list[int]] = [[] for _ in rows]
    thoughts = [Thought(thinking_budget, batch.input_ids[row].tolist()) for row in rows]
    uniforms = torch.Generator().manual_seed(sampling.seed)

    input_ids, padding_mask = batch.input_ids.to(device), batch.padding_mask.to(device)
    if image_features is None:
        pixels = batch.pixel_values.to(device)
        output = model(input_ids, pixel_values=pixels, padding_mask=padding_mask, logits_to_keep=1)
    else:
        embeds = model.embed(input_ids, image_features)
        output = model(inputs_embeds=embeds, padding_mask=padding_mask, logits_to_keep=1)
    for _ in range(max_new_tokens):
        # drawn for all rows, so that a row's numbers do not depend on when others ended
        uniform = torch.rand(len(answers), generator=uniforms)[rows]
        tokens = choose_tokens(output.logits[:, -1], sampling, uniform)
        tokens = [
            thoughts[row].guide(token, answers[row])
            for row, token in zip(rows, tokens, strict=True)
        ]
        going_on = [place for place, token in enumerate(tokens) if token not in stops]
        for place in going_on:
            answers[rows[place]].append(tokens[place])
        if on_tokens is not None:
            on_tokens({rows[place]: tokens[place] for place in going_on})
        if not going_on or len(answers[rows[going_on[0]]]) == max_new_tokens:
            break
        state = output.state
        if len(going_on) < len(rows):
            state = state.select(torch.tensor(going_on, device=device))
            rows = [rows[place] for place in going_on]
        step = torch.tensor([[tokens[place]] for place in going_on], device=device)
        # by embedding: a model may write the image token, which then stands for no image
        embeds = model.language_model.backbone.embeddings(step)
        output = model(inputs_embeds=embeds, state=state)
    return answers


def choose_tokens(logits: Tensor, sampling: Sampling, uniform: Tensor) -> list[int]:
    """Choose one token a row by inverting the distribution function of its likeliest tokens.

    Args:
        logits: (B, vocab), any float dtype.
        sampling: at temperature 0 the largest logit is taken; one token at least is kept.
        uniform: (B,) float32 in [0, 1), what decides; ignored at temperature 0.

    Returns:
        B token ids.
    """
    if sampling.temperature == 0:
        choice: list[int] = logits.argmax(-1).tolist()
        return choice
    # float64: running sums of 131,072 probabilities in float32 would round the tail away
    probabilities = torch.softmax(logits.double() / sampling.temperature, dim=-1)
    # stable: of equally likely tokens the first is kept, as argmax has it
    values, ids = probabilities.sort(dim=-1, descending=True, stable=True)
    before = values.cumsum(-1) - values
    reached = values.masked_fill(before >= sampling.top_p, 0).cumsum(-1)
    target = uniform.to(reached)[:, None] * reached[:, -1:]
    place = torch.searchsorted(reached, target, right=True).clamp(max=logits.shape[-1] - 1)
    sampled: list[int] = ids.gather(-1, place)[:, 0].tolist()
    return sampled


class Thought:
    """Follows the thinking of one row, and ends it when the budget says so."""

    def __init__(self, budget: ThinkingBudget | None, prompt: list[int]) -> None:
        self._budget = budget
        self._forced: list[int] = []
        self._open = False
        if budget is not None:
            tail = budget.decode(prompt[-2 * _TAIL :])
            self._open = tail.rfind(_OPEN) > tail.rfind(_CLOSE)

    def guide(self, token: int, answer: list[int]) -> int:
        """Return the token to append to ``answer``: the model's own, or one that ends thinking."""
        if self._forced:
            return self._forced.pop(0)
        if self._budget is None:
            return token
        budget, length = self._budget, len(answer)
        tail = budget.decode(answer[-_TAIL:])
        opened, closed = tail.rfind(_OPEN), tail.rfind(_CLOSE)
        if opened != closed:  # one of them is there, and the last one counts
            self._open = opened > closed
        if not self._open or tail.endswith(_PARTIAL_CLOSE):
            return token
        spent = length >= budget.tokens + (budget.grace if budget.tokens else 0)
        newline = length >= budget.tokens and "\n" in budget.decode(answer[-1:])
        if not spent and not newline:
            return token
        self._open = False
        self._forced = list(budget.end_ids)
        return self._forced.pop(0)
