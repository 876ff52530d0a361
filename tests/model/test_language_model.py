"""The language model against transformers' `NemotronHForCausalLM`, in float32.

transformers clamps the Mamba2 time step at `time_step_min` (0.001 by default), in prefill only;
ours clamps to `time_step_limit` everywhere, as the released code and the servers do. The oracle is
therefore built with a `time_step_min` that no time step reaches (its initializer refuses 0), and
tests of their own cover the default.

Tolerance: 1e-5 of the largest logit. Both sides compute in float32 (epsilon 6e-8) in different
orders of summation through up to ten layers; a wrong term would show at 1e-2 and above.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import NemotronHConfig, NemotronHForCausalLM

from nvvl.model.config import VLMConfig
from nvvl.model.vlm import ModelState, NemotronNanoVL

TOLERANCE = 1e-5

GEOMETRIES: dict[str, dict[str, Any]] = {
    "hybrid": {},
    "mamba only": {"hybrid_override_pattern": "MMM"},
    "attention only": {"hybrid_override_pattern": "**"},
    "starts with attention": {"hybrid_override_pattern": "*-MM*"},
    "released order": {"hybrid_override_pattern": "M-M-M-M*-M"},
    "one group": {"n_groups": 1},
    "a group per head": {"n_groups": 4},
    "head dim unlike hidden / heads": {"head_dim": 32, "num_key_value_heads": 4},
    "one key-value head": {"num_key_value_heads": 1},
    "mamba head dim 20, state 24": {"mamba_head_dim": 20, "ssm_state_size": 24},
    "chunks of 5": {"chunk_size": 5},
    "one chunk": {"chunk_size": 64},
    "kernel 2 without bias": {"conv_kernel": 2, "use_conv_bias": False},
}

Pair = tuple[NemotronNanoVL, NemotronHForCausalLM]
PairFactory = Callable[..., Pair]


def relative_error(ours: Tensor, oracle: Tensor) -> float:
    return float((ours - oracle).abs().max() / oracle.abs().max())


@pytest.fixture(scope="module")
def make_pair(
    make_config: Callable[..., dict[str, Any]], randomize: Callable[..., None]
) -> PairFactory:
    """Build our model and the oracle with the same random weights."""

    def build(
        *, time_step_min: float = 1e-30, dt_bias: float | None = None, **language: Any
    ) -> Pair:
        values = make_config(language=language)
        ours = NemotronNanoVL(VLMConfig.from_dict(values))
        randomize(ours, seed=1)
        if dt_bias is not None:
            for name, parameter in ours.named_parameters():
                if name.endswith("dt_bias"):
                    parameter.fill_(dt_bias)
        llm = values["llm_config"]
        oracle_config = {
            key: value
            for key, value in llm.items()
            if key
            not in (
                "architectures",
                "model_type",
                "time_step_limit",
                "torch_dtype",
                "num_hidden_layers",
            )
        }
        oracle = NemotronHForCausalLM(
            NemotronHConfig(**oracle_config, time_step_min=time_step_min)
        ).eval()
        state = {
            name.replace("backbone.", "model."): tensor
            for name, tensor in ours.language_model.state_dict().items()
        }
        oracle.load_state_dict(state, strict=True)
        return ours.eval(), oracle.requires_grad_(False)

    return build


@pytest.fixture(scope="module")
def pair(make_pair: PairFactory) -> Pair:
    return make_pair()


def random_ids(batch: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(20, 280, (batch, length), generator=generator)  # no image tokens


def run_in_pieces(model: NemotronNanoVL, ids: Tensor, pieces: list[int]) -> tuple[Tensor, Any]:
    logits, state = [], None
    for piece in ids.split(pieces, dim=1):
        output = model(piece, state=state)
        logits.append(output.logits)
        state = output.state
    return torch.cat(logits, dim=1), state


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_prefill_and_decode_equal_transformers(geometry: str, make_pair: PairFactory) -> None:
    ours, oracle = make_pair(**GEOMETRIES[geometry])
    ids = random_ids(2, 37)
    expected = oracle(ids, use_cache=False).logits
    assert relative_error(ours(ids).logits, expected) <= TOLERANCE
    stepwise, _ = run_in_pieces(ours, ids, [30] + [1] * 7)
    assert relative_error(stepwise, expected) <= TOLERANCE


@pytest.mark.parametrize(
    "pieces",
    [
        [1, 36],
        [7, 30],  # chunk_size 8 minus one
        [8, 29],
        [9, 28],
        [36, 1],
        [2, 2, 3, 8, 16, 6],  # pieces shorter than the convolution kernel
        [1] * 37,
    ],
    ids=str,
)
def test_prefill_in_pieces_equals_transformers(pieces: list[int], pair: Pair) -> None:
    ours, oracle = pair
    ids = random_ids(2, 37, seed=1)
    logits, _ = run_in_pieces(ours, ids, pieces)
    assert relative_error(logits, oracle(ids, use_cache=False).logits) <= TOLERANCE


def test_state_does_not_depend_on_the_pieces(pair: Pair) -> None:
    ours, _ = pair
    ids = random_ids(2, 37, seed=2)
    whole: ModelState = ours(ids).state
    _, pieces = run_in_pieces(ours, ids, [3, 20, 1, 13])
    for one, other in zip(whole.layers, pieces.layers, strict=True):
        assert (one is None) == (other is None)
        for a, b in zip(one or (), other or (), strict=True):
            assert relative_error(b, a) <= TOLERANCE


def test_decode_equals_the_decode_of_transformers(pair: Pair) -> None:
    ours, oracle = pair
    ids = random_ids(2, 20, seed=3)
    state, cache = None, None
    for piece in ids.split([15, 1, 1, 1, 1, 1], dim=1):
        output = ours(piece, state=state)
        expected = oracle(piece, past_key_values=cache, use_cache=True)
        state, cache = output.state, expected.past_key_values
        assert relative_error(output.logits, expected.logits) <= TOLERANCE


def test_left_padding_changes_nothing(pair: Pair) -> None:
    ours, oracle = pair
    lengths = [23, 9, 1, 16]
    rows = [random_ids(1, length, seed=length)[0] for length in lengths]
    longest = max(lengths)
    ids = torch.stack([torch.cat([row.new_zeros(longest - len(row)), row]) for row in rows])
    mask = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    more = random_ids(4, 3, seed=5)

    padded = ours(ids, padding_mask=mask)
    state = padded.state
    decoded = []
    for column in more.split(1, dim=1):
        output = ours(column, state=state)
        decoded.append(output.logits)
        state = output.state
    batch_oracle = oracle(ids, attention_mask=mask.long()).logits
    for index, row in enumerate(rows):
        alone = oracle(torch.cat([row, more[index]])[None]).logits[0]
        real = padded.logits[index, longest - len(row) :]
        assert relative_error(real, alone[: len(row)]) <= TOLERANCE
        assert relative_error(torch.cat(decoded, 1)[index], alone[len(row) :]) <= TOLERANCE
        expected = batch_oracle[index, longest - len(row) :]
        assert relative_error(real, expected) <= TOLERANCE


def test_padded_batch_can_be_prefilled_in_pieces(pair: Pair) -> None:
    ours, oracle = pair
    ids = random_ids(2, 20, seed=6)
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1, :11] = False  # the second row starts inside the second piece
    first = ours(ids[:, :8], padding_mask=mask[:, :8])
    second = ours(ids[:, 8:], padding_mask=mask[:, 8:], state=first.state)
    expected = oracle(ids[1:, 11:]).logits[0]
    assert relative_error(second.logits[1, 3:], expected) <= TOLERANCE
    expected = oracle(ids[:1]).logits[0, 8:]
    assert relative_error(second.logits[0], expected) <= TOLERANCE


def test_rows_of_a_state_can_be_selected(pair: Pair) -> None:
    ours, _ = pair
    ids, step = random_ids(3, 10, seed=7), random_ids(3, 1, seed=8)
    mask = torch.ones(3, 10, dtype=torch.bool)
    mask[0, :4] = False
    state = ours(ids, padding_mask=mask).state
    all_rows = ours(step, state=state).logits
    rows = torch.tensor([2, 0])
    some_rows = ours(step[rows], state=state.select(rows)).logits
    assert relative_error(some_rows, all_rows[rows]) <= TOLERANCE


def test_last_logits_alone_are_the_last_of_all(pair: Pair) -> None:
    ours, _ = pair
    ids = random_ids(2, 12, seed=9)
    kept = ours(ids, logits_to_keep=2).logits
    assert kept.shape == (2, 2, 304)
    assert relative_error(kept, ours(ids).logits[:, -2:]) <= TOLERANCE


def test_image_embeddings_take_the_same_way(pair: Pair) -> None:
    ours, oracle = pair
    ids = random_ids(2, 20, seed=10)
    ids[0, 3:7] = ids[0, 8:12] = ids[1, 10:14] = 280  # three tiles of four tokens
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    embeds = ours.embed(ids, ours.encode_images(pixels))
    expected = oracle(inputs_embeds=embeds).logits
    assert relative_error(ours(ids, pixel_values=pixels).logits, expected) <= TOLERANCE
    assert relative_error(ours(inputs_embeds=embeds).logits, expected) <= TOLERANCE


def test_default_clamp_of_transformers_agrees_above_it(make_pair: PairFactory) -> None:
    # softplus(dt + 3) stays above 0.001 for every dt > -9.9, far beyond what these weights give
    ours, oracle = make_pair(time_step_min=0.001, dt_bias=3.0)
    ids = random_ids(2, 37, seed=11)
    assert relative_error(ours(ids).logits, oracle(ids, use_cache=False).logits) <= TOLERANCE


def test_time_step_limit_is_applied_in_prefill_and_decode(make_pair: PairFactory) -> None:
    clamped, oracle = make_pair(
        time_step_min=0.001, dt_bias=-9.0, time_step_limit=[0.001, "Infinity"]
    )
    free, _ = make_pair(dt_bias=-9.0)
    ids = random_ids(2, 37, seed=12)
    expected = oracle(ids, use_cache=False).logits
    assert relative_error(clamped(ids).logits, expected) <= TOLERANCE
    assert relative_error(run_in_pieces(clamped, ids, [1] * 37)[0], expected) <= TOLERANCE
    assert relative_error(free(ids).logits, expected) > 10 * TOLERANCE  # the clamp bites here


def test_bfloat16_stays_close_to_float32(pair: Pair) -> None:
    ours, oracle = pair
    ids = random_ids(2, 37, seed=13)
    expected = oracle(ids, use_cache=False).logits
    low = NemotronNanoVL(ours.config).bfloat16().eval().requires_grad_(False)
    low.load_state_dict(ours.state_dict())
    logits = low(ids).logits
    assert logits.dtype == torch.bfloat16
    # seven layers of rounding at 2^-9; a dtype mix-up that loses more would show
    assert float((logits.float() - expected).norm() / expected.norm()) < 0.03
