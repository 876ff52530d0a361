from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import NemotronHConfig, NemotronHForCausalLM

from nvvl.errors import DataError
from nvvl.model.config import VLMConfig
from nvvl.model.generate import Sampling, ThinkingBudget, choose_tokens, generate
from nvvl.model.processor import Batch
from nvvl.model.vlm import ModelState, NemotronNanoVL

NO_EOS = 303  # never generated: the fixture gives it the lowest logit
IMAGE = [281, 280, 280, 280, 280, 282]


def left_pad(prompts: Sequence[Sequence[int]], pixels: Tensor | None = None) -> Batch:
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    mask = torch.arange(longest) >= longest - lengths[:, None]
    tiles = torch.zeros(0, 3, 32, 32) if pixels is None else pixels
    return Batch(
        input_ids=ids, padding_mask=mask, pixel_values=tiles, answer_mask=torch.zeros_like(mask)
    )


def prompts_of(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(20, 276, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture(scope="module")
def model(tiny_config: VLMConfig, randomize: Callable[..., None]) -> NemotronNanoVL:
    """Random weights; only plain text tokens (20 to 279) can win."""
    vlm = NemotronNanoVL(tiny_config)
    randomize(vlm, seed=5)
    head = vlm.language_model.lm_head.weight
    # no bias to forbid tokens with: rows of zeros have logit 0, and the largest of 260 random
    # logits is above it
    head[:20] = 0
    head[280:] = 0
    return vlm.eval()


def test_greedy_equals_transformers(
    model: NemotronNanoVL, make_config: Callable[..., dict[str, Any]]
) -> None:
    skipped = ("architectures", "model_type", "time_step_limit", "torch_dtype", "num_hidden_layers")
    llm = {k: v for k, v in make_config()["llm_config"].items() if k not in skipped}
    # see test_language_model.py for time_step_min
    oracle = NemotronHForCausalLM(NemotronHConfig(**llm, time_step_min=1e-30)).eval()
    oracle.load_state_dict(
        {
            name.replace("backbone.", "model."): tensor
            for name, tensor in model.language_model.state_dict().items()
        }
    )
    batch = left_pad(prompts_of(11, 4))
    expected = oracle.generate(
        batch.input_ids,
        attention_mask=batch.padding_mask.long(),
        max_new_tokens=24,
        do_sample=False,
        eos_token_id=NO_EOS,
    )
    ours = generate(model, batch, eos_token_id=NO_EOS, max_new_tokens=24)
    assert ours == expected[:, 11:].tolist()
    assert len(set(ours[0])) > 3  # a model stuck on one token would prove little


def test_batch_equals_single_prompts(model: NemotronNanoVL) -> None:
    text, short, late = prompts_of(9, 3, 5)
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    prompts = [[*text, *IMAGE, *short], short, [*IMAGE, *late, *IMAGE]]
    tiles = [pixels[:1], None, pixels[1:]]
    together = generate(model, left_pad(prompts, pixels), eos_token_id=NO_EOS, max_new_tokens=12)
    alone = [
        generate(model, left_pad([prompt], tile), eos_token_id=NO_EOS, max_new_tokens=12)[0]
        for prompt, tile in zip(prompts, tiles, strict=True)
    ]
    assert together == alone
    other = left_pad(prompts, pixels.flip(0))
    assert generate(model, other, eos_token_id=NO_EOS, max_new_tokens=12) != together


def test_row_ends_before_its_stop_token_and_others_go_on(model: NemotronNanoVL) -> None:
    batch = left_pad(prompts_of(11, 4, 7))
    free = generate(model, batch, eos_token_id=NO_EOS, max_new_tokens=16)
    for stops in ([free[0][5]], [free[0][5], free[1][2]], [row[0] for row in free]):
        expected = []
        for row in free:
            ends = [place for place, token in enumerate(row) if token in stops]
            expected.append(row[: ends[0]] if ends else row)
        assert generate(model, batch, eos_token_id=stops, max_new_tokens=16) == expected


def test_forward_runs_only_while_a_row_is_unfinished(
    model: NemotronNanoVL, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = left_pad(prompts_of(11, 4))
    free = generate(model, batch, eos_token_id=NO_EOS, max_new_tokens=16)
    sizes: list[int] = []
    model_forward = model.forward

    def counted(*inputs: Tensor, **named: Any) -> Any:
        sizes.append((inputs[0] if inputs else named["inputs_embeds"]).shape[0])
        return model_forward(*inputs, **named)

    monkeypatch.setattr(model, "forward", counted)
    stops = [free[0][2], free[1][4]]
    answers = generate(model, batch, eos_token_id=stops, max_new_tokens=16)
    longest, shortest = (max(map(len, answers)), min(map(len, answers)))
    # the step after n tokens is the one that finds the end of a row of n tokens
    assert sizes == [2] * (shortest + 1) + [1] * (longest - shortest)
    sizes.clear()
    generate(model, batch, eos_token_id=NO_EOS, max_new_tokens=3)
    assert len(sizes) == 3


def test_stream_gives_each_token_once(model: NemotronNanoVL) -> None:
    batch = left_pad(prompts_of(11, 4))
    free = generate(model, batch, eos_token_id=NO_EOS, max_new_tokens=10)
    streamed: list[list[int]] = [[], []]

    def receive(tokens: dict[int, int]) -> None:
        for row, token in tokens.items():
            streamed[row].append(token)

    answers = generate(model, batch, eos_token_id=free[1][3], max_new_tokens=10, on_tokens=receive)
    assert streamed == answers
    assert len(answers[1]) < 10


def test_seed_settles_the_samples(model: NemotronNanoVL) -> None:
    batch = left_pad([prompts_of(8)[0]] * 3)

    def sample(seed: int, temperature: float = 1.0, top_p: float = 1.0) -> list[list[int]]:
        return generate(
            model,
            batch,
            eos_token_id=NO_EOS,
            max_new_tokens=12,
            sampling=Sampling(temperature=temperature, top_p=top_p, seed=seed),
        )

    first = sample(1)
    assert sample(1) == first
    assert sample(2) != first
    assert first[0] != first[1]  # rows of one prompt are drawn independently
    greedy = generate(model, batch, eos_token_id=NO_EOS, max_new_tokens=12)
    assert sample(3, top_p=1e-6) == greedy
    assert sample(3, temperature=1e-4) == greedy


@pytest.mark.parametrize(
    ("uniform", "top_p", "token"),
    [
        (0.0, 1.0, 2),  # probabilities 0.5, 0.3, 0.15, 0.05 of tokens 2, 0, 3, 1
        (0.49, 1.0, 2),
        (0.51, 1.0, 0),
        (0.79, 1.0, 0),
        (0.81, 1.0, 3),
        (0.94, 1.0, 3),
        (0.96, 1.0, 1),
        (0.999999, 0.8, 0),  # 0.5 and 0.3 remain: 5/8 and 3/8
        (0.62, 0.7, 2),
        (0.63, 0.7, 0),
        (0.99, 0.4, 2),  # one token is always kept
    ],
)
def test_sampling_inverts_the_distribution(uniform: float, top_p: float, token: int) -> None:
    logits = torch.tensor([[0.3, 0.05, 0.5, 0.15]]).log()
    sampling = Sampling(temperature=1.0, top_p=top_p)
    assert choose_tokens(logits, sampling, torch.tensor([uniform])) == [token]


def test_of_equally_likely_tokens_the_first_is_kept() -> None:
    logits = torch.zeros(1, 5000)
    logits[0, 700::7] = 1
    sampling = Sampling(temperature=1.0, top_p=1e-9)
    assert choose_tokens(logits, sampling, torch.tensor([0.5])) == [700]


def test_temperature_flattens_the_distribution() -> None:
    logits = torch.tensor([[0.0, 2.0]]).expand(4000, 2)
    uniform = torch.rand(4000, generator=torch.Generator().manual_seed(0))
    for temperature in (0.5, 1.0, 4.0):
        sampling = Sampling(temperature=temperature)
        share = sum(choose_tokens(logits, sampling, uniform)) / 4000
        expected = float(torch.sigmoid(torch.tensor(2.0 / temperature)))
        assert share == pytest.approx(expected, abs=0.03)  # four standard deviations


@pytest.mark.parametrize("arguments", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_sampling_out_of_range_is_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="required temperature >= 0 and 0 < top_p <= 1"):
        Sampling(**arguments)  # type: ignore[arg-type]


def test_an_answer_has_one_token_at_least(model: NemotronNanoVL) -> None:
    with pytest.raises(ValueError, match="required max_new_tokens >= 1"):
        generate(model, left_pad(prompts_of(3)), eos_token_id=NO_EOS, max_new_tokens=0)


def test_missing_tiles_are_refused(model: NemotronNanoVL) -> None:
    with pytest.raises(DataError, match="the prompt has 4, the tiles give 0"):
        generate(model, left_pad([IMAGE]), eos_token_id=NO_EOS, max_new_tokens=2)


# --- thinking budget ----------------------------------------------------------------------------


def test_image_token_in_an_answer_stands_for_no_image(
    model: NemotronNanoVL, monkeypatch: pytest.MonkeyPatch
) -> None:
    image_token = model.config.image_token_id
    monkeypatch.setattr("nvvl.model.generate.choose_tokens", lambda *_: [image_token])
    batch = left_pad(prompts_of(5))
    answers = generate(model, batch, eos_token_id=NO_EOS, max_new_tokens=3)
    assert answers == [[image_token] * 3]


class Script:
    """Stands in for the model: says a text token by token, whatever it is fed."""

    def __init__(self, script: list[int], like: NemotronNanoVL) -> None:
        self.script = script
        self.language_model = like.language_model
        self.place = 0

    def __call__(self, inputs: Tensor | None = None, **named: Any) -> Any:
        rows = named["inputs_embeds"] if inputs is None else inputs
        logits = torch.zeros(rows.shape[0], 1, 304)
        logits[:, :, self.script[self.place]] = 1
        self.place += 1
        return type("Output", (), {"logits": logits, "state": ModelState([])})


@pytest.fixture
def think(model: NemotronNanoVL, tiny_tokenizer: Tokenizer) -> Callable[..., str]:
    """Return a function that generates a scripted text under a budget."""

    def run(said: str, *, prompt: str = "<think>\n", **budget: int) -> str:
        script = tiny_tokenizer.encode(said).ids
        answers = generate(
            Script(script, model),  # type: ignore[arg-type]
            left_pad([tiny_tokenizer.encode(prompt).ids]),
            eos_token_id=12,
            max_new_tokens=len(script),
            thinking_budget=ThinkingBudget.from_tokenizer(tiny_tokenizer, **budget),
        )
        text: str = tiny_tokenizer.decode(answers[0], skip_special_tokens=False)
        return text

    return run


# Each character is a token, but for "th" and "in"; </think> is the six < / th in k >.
@pytest.mark.parametrize(
    ("said", "tokens", "grace", "heard"),
    [
        # the script goes on underneath, so six of its tokens are lost to the forced tag
        ("abc\ndefgh\nijklmnopq", 4, 9, "abc\n</think>ijklmnopq"),
        ("abc\ndefgh\nijklmnopqrst", 5, 9, "abc\ndefgh\n</think>opqrst"),  # next newline
        ("abcdefghijklmnopqrst", 5, 3, "abcdefgh</think>opqrst"),  # grace runs out
        ("abcdefghijklmnopqrst", 5, 0, "abcde</think>lmnopqrst"),  # no grace at all
        ("abcdefghijklmnopqrst", 0, 500, "</think>ghijklmnopqrst"),  # off: at once
        ("ab</think>\n\nabcdefgh", 4, 9, "ab</think>\n\nabcdefgh"),  # closed by itself
        ("ab</think>\n\nabcdefgh", 4, 0, "ab</think>\n\nabcdefgh"),  # while closing itself
        ("ab</thorn>abcdefgh", 4, 0, "ab</tho</think>defgh"),  # begun, but something else
        ("abcdefgh", 100, 500, "abcdefgh"),  # never reached
    ],
)
def test_budget_ends_thinking(
    said: str, tokens: int, grace: int, heard: str, think: Callable[..., str]
) -> None:
    shown = think(said, tokens=tokens, grace=grace)
    assert shown == heard


# The tokens of <think> are < th in k >.
@pytest.mark.parametrize(
    ("prompt", "said", "tokens", "heard"),
    [
        ("question", "ab<think>cdefghijklmnop", 9, "ab<think>cd</think>klmnop"),
        ("<think></think>", "ab<think>cdefghijklmnop", 2, "ab<think></think>ijklmnop"),
        ("<think>\n", "a</think>b<think>cdefghijklmnop", 14, "a</think>b<think>c</think>jklmnop"),
        ("question", "ab<think>c</think>defghijkl", 15, "ab<think>c</think>defghijkl"),
    ],
)
def test_budget_ends_thinking_that_the_model_began(
    prompt: str, said: str, tokens: int, heard: str, think: Callable[..., str]
) -> None:
    assert think(said, prompt=prompt, tokens=tokens, grace=0) == heard


def test_prompt_without_open_thinking_is_left_alone(think: Callable[..., str]) -> None:
    for prompt in ("<think></think>", "question", "<think>a</think>\nanswer"):
        assert think("abcdefghij", prompt=prompt, tokens=2, grace=0) == "abcdefghij"


def test_row_may_end_while_it_thinks(think: Callable[..., str]) -> None:
    assert think("abc<SPECIAL_12>defgh", tokens=50) == "abc"


def test_stop_token_cannot_replace_a_forced_end(think: Callable[..., str]) -> None:
    assert think("ab<SPECIAL_12>cdefghij", tokens=2, grace=0) == "ab</think>hij"


def test_budget_by_row(model: NemotronNanoVL, tiny_tokenizer: Tokenizer) -> None:
    prompts = [tiny_tokenizer.encode(text).ids for text in ("one<think>\n", "two<think></think>")]
    budget = ThinkingBudget.from_tokenizer(tiny_tokenizer, tokens=3, grace=0)
    kwargs: dict[str, Any] = {"eos_token_id": NO_EOS, "max_new_tokens": 12}
    free = generate(model, left_pad(prompts), **kwargs)
    cut = generate(model, left_pad(prompts), thinking_budget=budget, **kwargs)
    assert cut[0][:3] == free[0][:3]
    assert tuple(cut[0][3:9]) == budget.end_ids
    assert cut[1] == free[1]
    # what follows the forced tokens is the model's continuation of them
    resumed = generate(
        model, left_pad([prompts[0] + cut[0][:9]]), eos_token_id=NO_EOS, max_new_tokens=3
    )
    assert cut[0][9:] == resumed[0]


@pytest.mark.parametrize(
    "fault", [{"tokens": -1}, {"grace": -1}, {"end_ids": ()}], ids=lambda fault: next(iter(fault))
)
def test_impossible_budget_is_refused(fault: dict[str, Any]) -> None:
    values: dict[str, Any] = {"tokens": 1, "end_ids": (1,), "decode": str, "grace": 0} | fault
    with pytest.raises(ValueError, match="thinking budget"):
        ThinkingBudget(**values)
