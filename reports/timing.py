"""How fast a model answers: time to the first token, and tokens a second.

One question at a time, as a user waits for it: encode the images, drop what is pruned, read the
prompt, write a fixed number of tokens. Reading files and cutting tiles is left out. Models and
settings take turns, so that a machine that slows down slows all of them; what is reported are the
median and the quartiles over questions and rounds.

On a CPU quantized models compute in BF16 on decoded weights, so their speed says nothing about the
format; what a setting saves on one model can be read.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nvvl.cpu import cpu_name
from nvvl.model.generate import generate
from nvvl.model.vlm import NemotronNanoVL
from nvvl.reports.curves import Speed, Spread
from nvvl.reports.question import (
    Question,
    collate_ids,
    encode_questions,
    join_features,
    prune_videos,
)


@dataclass(frozen=True)
class Contender:
    """A model with the questions as one setting makes them."""

    model: NemotronNanoVL
    questions: Sequence[Question]
    pruning_rate: float = 0.0


def measure_speed(
    contenders: Sequence[Contender], *, num_rounds: int = 3, num_new_tokens: int = 32
) -> list[Speed]:
    """Time each contender on its questions, in turns.

    Args:
        contenders: what is compared; each with at least one question.
        num_rounds: times that each question is asked.
        num_new_tokens: tokens to write, whatever the model would say.
    """
    times: list[list[tuple[float, float]]] = [[] for _ in contenders]
    for contender in contenders:  # first calls allocate and compile
        _time_answer(contender, contender.questions[0], 2)
    for _ in range(num_rounds):
        for number in range(max(len(contender.questions) for contender in contenders)):
            for row, contender in zip(times, contenders, strict=True):
                question = contender.questions[number % len(contender.questions)]
                row.append(_time_answer(contender, question, num_new_tokens))
    return [
        Speed(
            first_token_ms=_spread([1000 * first for first, _ in row]),
            tokens_per_s=_spread([num_new_tokens / whole for _, whole in row]),
            num_new_tokens=num_new_tokens,
        )
        for row in times
    ]


def describe_machine(device: str) -> str:
    """Name what the times were taken on."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


@torch.inference_mode()
def _time_answer(
    contender: Contender, question: Question, num_new_tokens: int
) -> tuple[float, float]:
    """Return seconds to the first token and to the last one."""
    model, marks = contender.model, []
    start = time.perf_counter()
    (encoded,) = encode_questions(model, [question])
    encoded = prune_videos(question, encoded, model.config, contender.pruning_rate)
    generate(
        model,
        collate_ids([encoded.prompt_ids], model.config.language.pad_token_id),
        eos_token_id=(),  # every answer has the same length
        max_new_tokens=num_new_tokens,
        image_features=join_features([encoded]),
        on_tokens=lambda _: marks.append(time.perf_counter()),
    )
    return marks[0] - start, marks[-1] - start


def _spread(values: Sequence[float]) -> Spread:
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    return Spread(float(median), float(low), float(high), len(values))
