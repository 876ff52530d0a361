"""Ask nvvl what another program is to be compared with: log-probabilities and answers.

    python -m nvvl.tools.interop.reference OUT bf16=FOLDER fp8=FOLDER nvfp4=FOLDER [--items 100]

Writes ``OUT/reference.json`` and the images as PNG. Runs in nvvl's own environment; the other
program reads the files in its own, so that neither sees the other's libraries.

Two kinds of prompt:

* scored: prompt and true answer as token ids, each image one ``<image>`` token that the server
  expands itself. The log-probability of every token given those before it, in bfloat16 as servers
  compute and in float32. How far these two lie apart is what rounding alone does to this model.
* asked: the rendered text, to be tokenized by the server. Greedy answers to items of two suites.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import nvvl
from nvvl.calib_data.items import Item
from nvvl.calib_data.texts import text_passage
from nvvl.model.processor import Processor
from nvvl.model.prompt import Message, render_prompt
from nvvl.model.vlm import NemotronNanoVL
from nvvl.quantize.load import load_any
from nvvl.reports.measure import Panel
from nvvl.reports.question import Question, prepare_question
from nvvl.reports.suites import SUITES

SUITES_ASKED = ("line", "key_value")
SUITES_SCORED = ("line", "key_value", "page", "two_pages")  # one tile; one; five; two images
SCORED_PER_SUITE = 4
TEXTS_SCORED = 8
# Other items than those asked, and than those of `nvvl evaluate` and `nvvl demo`.
SEED = 7
_BATCH_SIZE = 16


def main() -> None:
    parser = argparse.ArgumentParser(description="Write nvvl's log-probabilities and answers.")
    parser.add_argument("out", type=Path)
    parser.add_argument("checkpoints", nargs="+", metavar="FORMAT=FOLDER")
    parser.add_argument("--items", type=int, default=100, help="asked of each suite")
    arguments = parser.parse_args()
    folders = {
        name: Path(folder)
        for name, _, folder in (text.partition("=") for text in arguments.checkpoints)
    }
    reference = make_reference(folders, arguments.out, num_items=arguments.items)
    path = arguments.out / "reference.json"
    path.write_text(json.dumps(reference) + "\n", encoding="utf-8")


def make_reference(folders: dict[str, Path], out: Path, *, num_items: int) -> dict[str, Any]:
    """Score and answer every prompt with every checkpoint.

    Args:
        folders: Checkpoints of one model, by the name of their format.
        out: Folder for the images; made if needed.
        num_items: Items asked of each suite.

    Returns:
        What ``reference.json`` holds.
    """
    (out / "images").mkdir(parents=True, exist_ok=True)
    processor = Processor.from_folder(next(iter(folders.values())))
    scored = [prepare_question(item, processor) for item in scored_items()]
    asked = {
        name: [prepare_question(item, processor) for item in SUITES[name].items(num_items)]
        for name in SUITES_ASKED
    }
    return {
        "nvvl": nvvl.__version__,
        "torch": torch.__version__,
        "checkpoints": {name: str(folder.resolve()) for name, folder in folders.items()},
        "image_token_id": processor.config.image_token_id,
        "scored": [_scored_prompt(question, processor, out) for question in scored],
        "asked": [
            _asked_prompt(question, suite, out)
            for suite, questions in asked.items()
            for question in questions
        ],
        "results": {
            name: _results(folder, processor, scored, asked) for name, folder in folders.items()
        },
    }


def scored_items() -> list[Item]:
    """Make the items whose tokens are scored: passages of text, and documents."""
    items = [_passage(number) for number in range(TEXTS_SCORED)]
    for name in SUITES_SCORED:
        items += SUITES[name].items(SCORED_PER_SUITE, seed=SEED)
    return items


def collapse_images(input_ids: Sequence[int], processor: Processor) -> list[int]:
    """Put one image token in the place of each image: what a server is given to expand.

    Args:
        input_ids: Ids of a prompt, where an image is its start token, one image token a feature,
            and its end token.
        processor: Of the model.
    """
    tokenizer, config = processor.tokenizer, processor.config
    start = tokenizer.token_to_id(config.image_start_token)
    end = tokenizer.token_to_id(config.image_end_token)
    image = config.image_token_id
    collapsed: list[int] = []
    previous = None
    for token in input_ids:
        if token not in (start, end) and not (token == image and previous == image):
            collapsed.append(token)
        previous = token
    return collapsed


def _passage(number: int) -> Item:
    words = text_passage((SEED << 40) + number, "held_out").split()
    half = len(words) // 2
    question, answer = " ".join(words[:half]), " ".join(words[half:])
    messages = (Message("user", f"Continue the text.\n{question}"), Message("assistant", answer))
    return Item(item_id=f"passage-{SEED}-{number}", messages=messages)


def _scored_prompt(question: Question, processor: Processor, out: Path) -> dict[str, Any]:
    input_ids = question.answered.input_ids.tolist()
    return {
        "id": question.item.item_id,
        "kind": "image" if question.item.images else "text",
        "prompt_ids": collapse_images(input_ids, processor),
        "input_ids": input_ids,
        "images": _save_images(question.item, out),
    }


def _asked_prompt(question: Question, suite: str, out: Path) -> dict[str, Any]:
    return {
        "id": question.item.item_id,
        "suite": suite,
        "prompt": render_prompt(question.item.messages[:-1]),
        "input_ids": question.prompt.input_ids.tolist(),
        "images": _save_images(question.item, out),
        "truth": question.truth,
        "max_new_tokens": SUITES[suite].max_new_tokens,
    }


def _save_images(item: Item, out: Path) -> list[str]:
    names = [f"images/{item.item_id}-{index}.png" for index in range(len(item.images))]
    for name, image in zip(names, item.images, strict=True):
        image.save(out / name)
    return names


def _results(
    folder: Path,
    processor: Processor,
    scored: Sequence[Question],
    asked: dict[str, list[Question]],
) -> dict[str, Any]:
    model = load_any(folder, dtype=torch.bfloat16)
    logprobs = {q.item.item_id: score(model, q) for q in scored}
    answers: dict[str, str] = {}
    for name, questions in asked.items():
        responses = Panel([model], processor).ask(
            questions, max_new_tokens=SUITES[name].max_new_tokens, batch_size=_BATCH_SIZE
        )[0]
        pairs = zip(questions, responses, strict=True)
        answers |= {question.item.item_id: response.text for question, response in pairs}
    exact = load_any(folder, dtype=torch.float32)
    return {
        "logprobs": logprobs,
        "float32_logprobs": {q.item.item_id: score(exact, q) for q in scored},
        "answers": answers,
    }


@torch.inference_mode()
def score(model: NemotronNanoVL, question: Question) -> list[float]:
    """Return the log-probability of each token of prompt and answer but the first, in nats."""
    inputs = question.answered
    pixels = inputs.pixel_values if len(inputs.pixel_values) else None
    logits = model(inputs.input_ids.unsqueeze(0), pixel_values=pixels).logits[0, :-1]  # (T - 1, V)
    targets = inputs.input_ids[1:].unsqueeze(-1)
    logprobs: list[float] = logits.float().log_softmax(-1).gather(-1, targets).squeeze(-1).tolist()
    return logprobs


if __name__ == "__main__":
    main()
