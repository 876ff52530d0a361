"""Packed sequences against the same sequences alone: nothing leaks over a boundary.

Tolerance in float32: 1e-5 of the largest value; both sides sum in other orders. A state, a window
or an attention that is not reset shows at 1e-2 and above (`test_a_leak_would_be_seen`).
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nvvl.model.config import VLMConfig
from nvvl.model.mamba2 import CPU_SPAN
from nvvl.model.packing import Packing
from nvvl.model.vlm import NemotronNanoVL

TOLERANCE = 1e-5

LENGTHS: list[list[int]] = [
    [1],
    [9],
    [5, 9],
    [8, 8, 8],  # boundaries of chunks
    [1, 1, 1, 20],  # shorter than the convolution kernel
    [3, 2, 1, 17, 4, 30, 1],
    [CPU_SPAN - 1, 2, CPU_SPAN + 3, 5],  # over the spans a CPU scans at once
]


@pytest.fixture(scope="module")
def model(
    make_config: Callable[..., dict[str, Any]], randomize: Callable[..., None]
) -> NemotronNanoVL:
    made = NemotronNanoVL(VLMConfig.from_dict(make_config()))
    randomize(made, seed=1)
    return made.eval()


def make_rows(lengths: list[int], *, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, length, 64, generator=generator) for length in lengths]


def relative_error(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_packed_logits_equal_unpacked_ones(lengths: list[int], model: NemotronNanoVL) -> None:
    rows = make_rows(lengths)
    hidden, _ = model.language_model.hidden_states(
        torch.cat(rows, dim=1), packing=Packing.of(lengths)
    )
    alone = torch.cat([model.language_model.hidden_states(row)[0] for row in rows], dim=1)
    head = model.language_model.lm_head
    assert relative_error(head(hidden), head(alone)) <= TOLERANCE


def test_a_leak_would_be_seen(model: NemotronNanoVL) -> None:
    rows = make_rows([5, 9])
    hidden, _ = model.language_model.hidden_states(torch.cat(rows, dim=1))
    alone, _ = model.language_model.hidden_states(rows[1])
    assert relative_error(hidden[:, 5:], alone) > 1e-2


def test_gradients_do_not_cross_a_boundary(model: NemotronNanoVL) -> None:
    lengths = [7, 11, 3]
    x = torch.cat(make_rows(lengths), dim=1).requires_grad_()
    hidden, _ = model.language_model.hidden_states(x, packing=Packing.of(lengths))
    hidden[:, 7:18].square().sum().backward()
    assert x.grad is not None
    assert not x.grad[:, :7].any()
    assert not x.grad[:, 18:].any()

    alone = x.detach()[:, 7:18].clone().requires_grad_()
    model.language_model.hidden_states(alone)[0].square().sum().backward()
    assert alone.grad is not None
    assert relative_error(x.grad[:, 7:18], alone.grad) <= 1e-4  # a sum of squares of many layers


@pytest.mark.parametrize(
    ("lengths", "places", "keep"),
    [
        ([3, 4, 5], [0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12], [0, 0, 0, 1]),
        ([8], [0, 1, 2, 3, 4, 5, 6, 7], [0, 1]),
        ([1, 1], [0, 4], [0, 0]),
    ],
)
def test_sequences_begin_with_a_chunk(
    lengths: list[int], places: list[int], keep: list[float]
) -> None:
    found = Packing.of(lengths).align(4)
    assert [side.tolist() for side in found] == [places, keep]


def test_a_sequence_gives_the_same_bits_wherever_it_stands(model: NemotronNanoVL) -> None:
    # what several processes lean on, which pack the same items into other rows
    first, second, third = (row.bfloat16() for row in make_rows([23, 40, 17]))
    bf16 = copy.deepcopy(model.language_model).bfloat16()

    def run(*rows: Tensor) -> Tensor:
        packing = Packing.of([row.shape[1] for row in rows])
        hidden: Tensor = bf16.hidden_states(torch.cat(rows, dim=1), packing=packing)[0]
        return hidden

    assert torch.equal(run(first, second, third)[:, 23:63], run(third, second)[:, 17:57])


def test_packing_of_another_length_is_refused(model: NemotronNanoVL) -> None:
    (row,) = make_rows([9])
    with pytest.raises(ValueError, match="8 tokens, got rows of 9"):
        model.language_model.hidden_states(row, packing=Packing.of([5, 3]))
    state = model.language_model.hidden_states(row)[1]
    with pytest.raises(ValueError, match="no state and no mask"):
        model.language_model.hidden_states(row, packing=Packing.of([9]), state=state)


@pytest.mark.parametrize("lengths", [[], [3, 0]])
def test_empty_sequences_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="positive token counts"):
        Packing.of(lengths)
