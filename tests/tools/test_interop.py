"""The judge of `make interop`: agreement passes, and each kind of disagreement is found."""

import copy
from typing import Any

import pytest

from nvvl.model.load import resolve_model
from nvvl.model.processor import Processor
from nvvl.reports.question import prepare_question
from nvvl.reports.suites import SUITES
from nvvl.tools.interop.judge import format_table, judge
from nvvl.tools.interop.reference import collapse_images

IMAGE = 9
NUM_ASKED = 20


def make_reference() -> dict[str, Any]:
    """Two scored prompts of four tokens, and answers of which three quarters are right."""
    scored = [
        {"id": "t", "kind": "text", "input_ids": [1, 2, 3, 4]},
        {"id": "i", "kind": "image", "input_ids": [1, IMAGE, 3, 4]},
    ]
    asked = [
        {"id": f"q{n}", "suite": "line", "input_ids": [1, n], "truth": "right"}
        for n in range(NUM_ASKED)
    ]
    result = {
        "logprobs": {"t": [-1.0, -2.0, -3.0], "i": [-9.0, -2.0, -3.0]},
        "float32_logprobs": {"t": [-1.1, -1.9, -3.1], "i": [-9.0, -2.1, -2.9]},
        "answers": {f"q{n}": "right" if n % 4 else "wrong" for n in range(NUM_ASKED)},
    }
    return {"image_token_id": IMAGE, "scored": scored, "asked": asked, "results": {"fp8": result}}


def make_served(reference: dict[str, Any]) -> dict[str, Any]:
    """What a server that agrees gives: log-probabilities 0.1 off, image tokens anything."""
    prompts = [*reference["scored"], *reference["asked"]]
    return {
        "versions": {"server": "1"},
        "never_filled": [],
        "logprobs": {"t": [-0.9, -2.1, -2.9], "i": [-50.0, -1.9, -3.1]},
        "answers": dict(reference["results"]["fp8"]["answers"]),
        "prompt_ids": {prompt["id"]: prompt["input_ids"] for prompt in prompts},
    }


def test_agreement_passes_and_image_tokens_do_not_count() -> None:
    reference = make_reference()
    verdict = judge(reference, "fp8", make_served(reference))
    assert verdict.agrees
    assert [distance.num_tokens for distance in verdict.distances] == [3, 2]
    assert all(distance.server == pytest.approx(0.1) for distance in verdict.distances)
    assert "FAIL" not in format_table([verdict])


@pytest.mark.parametrize(
    "change",
    [
        {"logprobs": {"t": [-0.9, -2.1, -2.9], "i": [-9.0, -1.0, -3.1]}},
        {"logprobs": {"t": [float("nan")] * 3, "i": [-9.0, -1.9, -3.1]}},
        {"answers": dict.fromkeys((f"q{n}" for n in range(NUM_ASKED)), "wrong")},
        {"never_filled": ["mlp1.1.weight"]},
        {"prompt_ids": {"t": [1, 2, 3], "i": [1, IMAGE, 3, 4]}},
    ],
    ids=["log-probabilities", "nan", "answers", "never filled", "tokens"],
)
def test_each_disagreement_is_found(change: dict[str, Any]) -> None:
    reference = make_reference()
    served = copy.deepcopy(make_served(reference))
    prompt_ids = served["prompt_ids"] | change.pop("prompt_ids", {})
    verdict = judge(reference, "fp8", served | change | {"prompt_ids": prompt_ids})
    assert not verdict.agrees
    assert format_table([verdict]).count("FAIL") >= 1


def test_each_image_becomes_one_token() -> None:
    processor = Processor.from_folder(resolve_model("embedded"))
    item = next(SUITES["two_pages"].items(1))
    input_ids = prepare_question(item, processor).prompt.input_ids.tolist()
    collapsed = collapse_images(input_ids, processor)
    assert collapsed.count(processor.config.image_token_id) == 2
    text = processor.tokenizer.decode(collapsed, skip_special_tokens=False)
    assert item.messages[0].content in text
