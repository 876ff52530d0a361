"""One question to one model, whatever runs it: the loop that ``nvvl chat`` has for all backends.

A backend encodes tiles, takes a prompt and then one token at a time; what it does in between is
its own (`TorchBackend` here, ONNX graphs in `nvvl.export.onnx_backend`). The choices that make an
answer are made here, once: which video tokens EVS drops, where images stand, which token is drawn,
when thinking ends. So two backends with the same numbers give the same answer.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nvvl.model.config import VLMConfig
from nvvl.model.generate import GREEDY, Sampling, ThinkingBudget, Thought, choose_tokens
from nvvl.model.processor import ModelInputs
from nvvl.model.video import prune_prompt
from nvvl.model.vlm import ModelState, NemotronNanoVL


class Backend(Protocol):
    """What runs the model; it keeps the states of one conversation."""

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Turn tiles (n, 3, S, S) into embeddings (n, tokens_per_tile, hidden)."""
        ...

    def prefill(self, ids: Tensor, features: Tensor | None) -> Tensor:
        """Take a prompt (1, T) with (rows, hidden) for its image tokens; gives logits (vocab,)."""
        ...

    def decode(self, token: int) -> Tensor:
        """Take one more token; gives logits (vocab,)."""
        ...


@dataclass(frozen=True)
class Answer:
    """Tokens of an answer, and what it took.

    Attributes:
        ids: New tokens, without the one that ended the answer.
        prompt_tokens: Tokens of the prompt, after EVS.
        first_token_s: Seconds to the first token: tiles, prompt.
        decode_s: Seconds of all tokens after it.
    """

    ids: list[int]
    prompt_tokens: int
    first_token_s: float
    decode_s: float

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second after the first; 0 if there was none."""
        return (len(self.ids) - 1) / self.decode_s if len(self.ids) > 1 else 0.0


class TorchBackend:
    """The torch model, BF16 or with fake quantization."""

    def __init__(self, model: NemotronNanoVL) -> None:
        self._model = model
        self._device = model.language_model.backbone.embeddings.weight.device
        self._state: ModelState | None = None

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Run the vision tower and the projector."""
        return self._model.encode_images(pixel_values.to(self._device))

    def prefill(self, ids: Tensor, features: Tensor | None) -> Tensor:
        """Run the whole prompt at once."""
        return self._run(self._model.embed(ids.to(self._device), features))

    def decode(self, token: int) -> Tensor:
        """Run one token; the image token, if the model writes it, stands for no image."""
        ids = torch.tensor([[token]], device=self._device)
        return self._run(self._model.language_model.backbone.embeddings(ids))

    def _run(self, embeds: Tensor) -> Tensor:
        output = self._model(inputs_embeds=embeds, state=self._state, logits_to_keep=1)
        self._state = output.state
        return output.logits[0, -1]


@torch.inference_mode()
def answer(
    backend: Backend,
    config: VLMConfig,
    inputs: ModelInputs,
    *,
    max_new_tokens: int,
    pruning_rate: float = 0.0,
    sampling: Sampling = GREEDY,
    thinking_budget: ThinkingBudget | None = None,
    eos_token_ids: Sequence[int] | None = None,
    on_token: Callable[[list[int]], None] | None = None,
) -> Answer:
    """Answer one prompt, with the tokens that `nvvl.model.generate.generate` chooses.

    Args:
        backend: fresh, that is without the states of another prompt.
        config: the model's.
        inputs: the prompt, with its tiles.
        max_new_tokens: most tokens of the answer.
        pruning_rate: share of video tokens that EVS drops.
        sampling: how each token is drawn.
        thinking_budget: cuts reasoning; None leaves it alone.
        eos_token_ids: tokens that end the answer; the config's if None.
        on_token: called with all tokens so far, after each.
    """
    stops = set(config.language.eos_token_ids if eos_token_ids is None else eos_token_ids)
    start = time.perf_counter()
    ids, features = inputs.input_ids, None
    if len(inputs.pixel_values):
        rows = backend.encode_images(inputs.pixel_values).flatten(0, 1)
        kept, features = prune_prompt(config, inputs, rows, pruning_rate)
        ids = ids[kept]
    logits = backend.prefill(ids[None], features)
    tokens: list[int] = []
    thought = Thought(thinking_budget, ids.tolist())
    uniforms = torch.Generator().manual_seed(sampling.seed)
    first = time.perf_counter()
    while True:
        uniform = torch.rand(1, generator=uniforms)
        (drawn,) = choose_tokens(logits[None], sampling, uniform)
        token = thought.guide(drawn, tokens)
        if token in stops:
            break
        tokens.append(token)
        if on_token is not None:
            on_token(tokens)
        if len(tokens) == max_new_tokens:
            break
        logits = backend.decode(token)
    end = time.perf_counter()
    return Answer(tokens, len(ids), first - start, end - first)
