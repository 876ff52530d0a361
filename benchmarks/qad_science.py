"""What decides what distillation recovers: the embedded model's ablations, each against PTQ.

    python -m nvvl.benchmarks.qad_science OUT [--arm NAME]... [--steps 100] [--items 1000]

Quantizes the embedded model to NVFP4 once, then trains one student an arm from there, ``--steps``
steps of KL at a rate of 5e-5, but for what the arm is about:

* ``kl``: quantization-aware distillation as published. ``kl-and-layers``: with outputs of layers as
  a second term. ``mse``: squared errors of logits. ``ce``: the same steps on the true next token,
  which is quantization-aware training (QAT). ``preset``: ``qad_nvfp4_embedded``, squared errors of
  logits and, above all, of the outputs of layers, at a higher rate.
* ``rate-X``: other learning rates, over a factor of 100.
* ``data-...``: one question an item, of the same documents, answered by the truth or by the
  teacher; passages of text alone; tokens drawn at random.

All are then asked the same held-out items beside BF16. Written to OUT: ``science.md`` and
``science.json``, and ``report.html`` of all runs. What is there already is not made again.
"""

import argparse
import dataclasses
import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tokenizers import Tokenizer

from nvvl.benchmarks.machine import describe_machine
from nvvl.benchmarks.recovery import compare, to_markdown
from nvvl.calib_data.items import Item
from nvvl.calib_data.listing import list_items
from nvvl.calib_data.manifest import CalibrationSet, LazyItems, load_calibration_set
from nvvl.calib_data.sources import ItemSource, generated_items
from nvvl.distill.presets import qad_nvfp4_embedded
from nvvl.distill.recipe import DistillRecipe
from nvvl.distill.train import distill
from nvvl.model.load import resolve_model
from nvvl.model.processor import Processor
from nvvl.model.prompt import Message
from nvvl.quantize.load import load_any
from nvvl.quantize.presets import load_recipe
from nvvl.quantize.walk import quantize_checkpoint
from nvvl.reports.evaluate import Candidate, Options, evaluate
from nvvl.reports.measure import Panel
from nvvl.reports.publish import publish
from nvvl.reports.question import prepare_question
from nvvl.reports.suites import find_suites

SUITES = ("line", "key_value")
RATE = 5e-5
RATES = (5e-6, 1.5e-5, 1.5e-4, 5e-4)  # besides that
NUM_CALIBRATION_ITEMS = 256
NUM_RANDOM_TOKENS = 32
SHARE_AVERAGED = 6  # the average of weights spans a sixth of the steps
MAX_ANSWER_TOKENS = 256
LAYER_LOSS = 10.0  # about as much as KL
TEACHER = "embedded"

MakeItems = Callable[[int], CalibrationSet]


def documents(num_items: int) -> CalibrationSet:
    """The mixture that the model was trained on: documents with all their questions, and text."""
    return load_calibration_set("default", num_items=num_items)


def one_question(num_items: int) -> CalibrationSet:
    """The same documents with their first question alone."""
    sources = [
        ItemSource(source.item_id, partial(first_turn, source))
        for source in list_items("default", num_items=num_items, seed=0)
    ]
    return CalibrationSet(LazyItems(sources), "documents, one question", num_items)


def answered_by_teacher(num_items: int) -> CalibrationSet:
    """Those again, with what the teacher answers in place of the truth."""
    folder = resolve_model(TEACHER)
    panel = Panel([load_any(folder)], Processor.from_folder(folder))
    asked = one_question(num_items).items
    sources = []
    size = 256
    for start in range(0, num_items, size):
        items = list(asked[start : start + size])
        questions = [prepare_question(item, panel.processor) for item in items]
        (row,) = panel.ask(questions, max_new_tokens=MAX_ANSWER_TOKENS, batch_size=32)
        for item, response in zip(items, row, strict=True):
            said = Message("assistant", response.text or " ")
            new = dataclasses.replace(item, messages=(*item.messages[:-1], said))
            sources.append(ItemSource(item.item_id, partial(dataclasses.replace, new)))
    return CalibrationSet(LazyItems(sources), "documents, answered by the teacher", num_items)


def text_alone(num_items: int) -> CalibrationSet:
    """Passages of text to be continued."""
    sources = generated_items(["passage"] * num_items, seed=0, split="train")
    return CalibrationSet(LazyItems(sources), "passages", num_items)


def random_tokens(num_items: int) -> CalibrationSet:
    """Turns of tokens that are drawn at random, control tokens left out."""
    tokenizer = Tokenizer.from_file(str(resolve_model(TEACHER) / "tokenizer.json"))
    special = tokenizer.get_added_tokens_decoder()
    ids = [i for i in range(tokenizer.get_vocab_size()) if i not in special]

    def draw(number: int) -> Item:
        rng = random.Random(number)
        said, answered = (tokenizer.decode(rng.choices(ids, k=NUM_RANDOM_TOKENS)) for _ in range(2))
        messages = (Message("user", said), Message("assistant", answered))
        return Item(item_id=f"random-{number}", messages=messages, domain="random")

    sources = [ItemSource(f"random-{i}", partial(draw, i)) for i in range(num_items)]
    return CalibrationSet(LazyItems(sources), "random tokens", num_items)


def first_turn(source: ItemSource) -> Item:
    """Return a conversation up to its first answer."""
    item = source.load()
    end = next(i for i, message in enumerate(item.messages) if message.role == "assistant")
    return dataclasses.replace(item, messages=item.messages[: end + 1])


def make_arms(num_steps: int) -> dict[str, tuple[DistillRecipe, MakeItems]]:
    """Return the recipe and the items of each arm."""
    preset = dataclasses.replace(
        qad_nvfp4_embedded(),
        num_steps=num_steps,
        validate_every=max(1, num_steps // 2),
        ema_decay=max(0.0, 1 - SHARE_AVERAGED / num_steps),
    )
    base = dataclasses.replace(preset, loss="kl", layer_loss=0.0, learning_rate=RATE)
    arms: dict[str, tuple[DistillRecipe, MakeItems]] = {"kl": (base, documents)}
    arms["kl-and-layers"] = (dataclasses.replace(base, layer_loss=LAYER_LOSS), documents)
    arms["mse"] = (dataclasses.replace(base, loss="mse"), documents)
    arms["ce"] = (dataclasses.replace(base, loss="ce"), documents)
    arms["preset"] = (preset, documents)
    for rate in RATES:
        arms[f"rate-{rate:g}"] = (dataclasses.replace(base, learning_rate=rate), documents)
    arms["data-one-question"] = (base, one_question)
    arms["data-teacher-answers"] = (base, answered_by_teacher)
    arms["data-text"] = (base, text_alone)
    arms["data-random"] = (base, random_tokens)
    return arms


def train(arms: dict[str, tuple[DistillRecipe, MakeItems]], out: Path) -> dict[str, Path]:
    """Quantize, train every arm, and return the folders by name, ``ptq`` first."""
    source = resolve_model(TEACHER)
    folders = {"ptq": out / "ptq"}
    if not folders["ptq"].exists():
        ptq = dataclasses.replace(load_recipe("nvfp4"), num_calibration_items=NUM_CALIBRATION_ITEMS)
        items = load_calibration_set("default", num_items=NUM_CALIBRATION_ITEMS)
        quantize_checkpoint(source, folders["ptq"], ptq, items)
    for name, (recipe, make_items) in arms.items():
        folders[name] = out / name
        if not folders[name].exists():
            print(f"{name}: {recipe.num_steps} steps", flush=True)
            distill(folders["ptq"], source, folders[name], recipe, make_items(recipe.num_items))
    return folders


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--arm", action="append", help="only these; all by default")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of each arm")
    parser.add_argument("--items", type=int, default=1000, help="items of each suite")
    arguments = parser.parse_args()
    out: Path = arguments.out
    arms = make_arms(arguments.steps)
    unknown = set(arguments.arm or ()) - set(arms)
    if unknown:
        parser.error(f"--arm {', '.join(sorted(unknown))}: required any of {', '.join(arms)}")
    chosen = {name: arms[name] for name in arguments.arm or arms}
    machine = describe_machine()
    folders = train(chosen, out)
    source = resolve_model(TEACHER)
    runs = evaluate(
        [
            Candidate(folder=folder, out=out / "runs" / name, label=name)
            for name, folder in {"bf16": source, **folders}.items()
        ],
        find_suites(SUITES),
        Options(num_items=arguments.items, gate_items=0),
        teacher=source,
    )
    rows = compare(runs)
    published = publish(runs, out)
    (out / "science.json").write_text(
        json.dumps(
            {"machine": machine, "steps": arguments.steps, "items": arguments.items, "arms": rows},
            default=dataclasses.asdict,
            indent=1,
        )
    )
    (out / "science.md").write_text(to_markdown(rows) + "\n")
    print(to_markdown(rows))
    print(f"{out / 'science.json'}, {published.page}")


if __name__ == "__main__":
    main()
