"""Two gloo processes against one: the same training, whole or sliced, and one line for an error.

The processes are real ones, started as a user starts them. Losses differ in the rounding of sums:
gradients are added in another order.
"""

import json
import os
import shutil
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import accelerate
import pytest

from nvvl.calib_data.manifest import load_calibration_set
from nvvl.distill.recipe import DistillRecipe
from nvvl.distill.split import split_items
from nvvl.distill.train import distill
from nvvl.model.checkpoint import Checkpoint
from nvvl.model.processes import Processes
from nvvl.toml_tables import toml_lines

STEPS = 4


@pytest.fixture(scope="module")
def short(recipe: DistillRecipe) -> DistillRecipe:
    """Everything that sums over processes: scales that train, recomputation, averages."""
    values = recipe.to_dict() | {
        "trainable": ["linears", "norms", "input_scales"],
        "learning_rate": 2e-5,  # that of a real recipe: at first, AdamW moves by signs
        "num_steps": STEPS,
        "items_per_step": 5,  # uneven over two
        # Items alone in their rows: bfloat16 products may round by the length of a row on CPUs with
        # such units, and one process packs other rows than two (rows: tests/model/test_packing.py)
        "tokens_per_batch": 1,
        "validate_every": 2,
        "recompute": True,
        "ema_decay": 0.5,
    }
    return DistillRecipe.from_dict(values)


def read_log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "distill_log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(
    run: Path,
    tiny_checkpoint: Path,
    item_folder: Path,
    short: DistillRecipe,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    out = tmp_path_factory.mktemp("alone") / "out"
    items = load_calibration_set(item_folder, num_items=short.num_items)
    distill(run, tiny_checkpoint, out, short, items)
    return out


@pytest.mark.parametrize("options", [[], ["--shard"]], ids=["whole", "sliced"])
def test_two_processes_give_the_losses_of_one(
    options: list[str],
    run: Path,
    tiny_checkpoint: Path,
    item_folder: Path,
    short: DistillRecipe,
    alone: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "recipe.toml").write_text("\n".join(toml_lines(short.to_dict())))
    out = tmp_path / "out"
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "nvvl"]
    arguments = ["distill", run, "--teacher", tiny_checkpoint, "-o", out, "--data", item_folder]
    settings = ["--recipe", tmp_path / "recipe.toml", "--device", "cpu", *options]
    command = [sys.executable, "-m", *launcher, *map(str, [*arguments, *settings])]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("prove it:") == 1  # by the main process alone

    ours, theirs = read_log(alone), read_log(out)
    assert [line["step"] for line in theirs] == list(range(STEPS + 1))
    for one, two in zip(ours, theirs, strict=True):
        for key in one.keys() & {"loss", "validation_loss"}:
            assert two[key] == pytest.approx(one[key], abs=1e-4), key
        assert two.get("loss_tokens") == one.get("loss_tokens")
        if "grad_norm" in one:
            assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=0.02)
    trained = Checkpoint(out.with_name("out.bf16"))
    assert trained.tensors.keys() == Checkpoint(tiny_checkpoint).tensors.keys()


def drop_answer(folder: Path, index: int) -> Path:
    """Leave one item without an answer."""
    path = folder / "items.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    del lines[index]["messages"][1:]
    path.write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(scope="module")
def errors(
    run: Path,
    tiny_checkpoint: Path,
    item_folder: Path,
    recipe: DistillRecipe,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, list[dict[str, Any]]]:
    """What the two processes said of each case, by its name; started once for all."""
    folder = tmp_path_factory.mktemp("errors")
    values = recipe.to_dict() | {"loss_tokens": "answers", "items_per_step": 2, "num_steps": 3}
    answers = DistillRecipe.from_dict(values)
    (folder / "answers.toml").write_text("\n".join(toml_lines(answers.to_dict())))
    wild = DistillRecipe.from_dict(values | {"learning_rate": 0.9, "num_steps": 5})
    (folder / "wild.toml").write_text("\n".join(toml_lines(wild.to_dict())))
    training, held_out = split_items(9, answers, seed=0)
    for name, index in (("training", training[0]), ("held-out", held_out[0])):
        drop_answer(Path(shutil.copytree(item_folder, folder / name)), index)
    (folder / "exists").mkdir()
    (folder / "layers.train").mkdir()
    (folder / "layers.train" / "blocks.json").touch()

    def distill(out: str, data: Path = item_folder, recipe: str = "answers.toml") -> dict[str, Any]:
        arguments = [run, "--teacher", tiny_checkpoint, "-o", folder / out, "--data", data]
        file = recipe if recipe == "qad_nvfp4_layers" else folder / recipe
        options = [*arguments, "--recipe", file, "--device", "cpu"]
        return {"arguments": ["distill", *map(str, options)], "interrupt": ""}

    commands = {
        "training item": distill("out", folder / "training"),
        "held-out item": distill("out2", folder / "held-out"),
        "exists": distill("exists"),
        "state": distill("layers"),
        "recipe": distill("out3", recipe="nowhere.toml"),
        "method": distill("out4", recipe="qad_nvfp4_layers"),
        "diverging": distill("out5", recipe="wild.toml"),
    }
    (folder / "commands.json").write_text(json.dumps(list(commands.values())))
    program = Path(__file__).parents[1] / "quantize" / "two_processes.py"
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, "-m", *launcher, str(program), str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    said = [json.loads((folder / f"said-{rank}.json").read_text()) for rank in range(2)]
    return {name: [one[index] for one in said] for index, name in enumerate(commands)}


@pytest.mark.parametrize(
    ("case", "part"),
    [
        ("training item", "no token counts for the loss"),
        ("held-out item", "no token counts for the loss"),
        ("exists", "exists: exists already; choose another OUT, or pass --overwrite"),
        ("state", 'layers.train: holds a run of method "layers"'),
        ("recipe", "nowhere.toml: cannot be read"),
        ("method", 'method "layers" runs in one process; start nvvl without torchrun'),
        ("diverging", "step "),
    ],
)
def test_error_ends_all_processes_with_one_line(
    case: str, part: str, errors: dict[str, list[dict[str, Any]]]
) -> None:
    main, other = errors[case]
    assert main["code"] == other["code"] == 2, (main, other)
    assert other["stderr"] == ""
    (line,) = [line for line in main["stderr"].splitlines() if line.startswith("error: ")]
    assert part in line


def test_processes_wait_for_hours_while_the_main_one_writes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits: list[timedelta] = []

    class Accelerator:
        process_index, num_processes, device = 1, 2, "cpu"

        def __init__(self, *, cpu: bool, kwargs_handlers: list[Any]) -> None:
            waits.extend(handler.timeout for handler in kwargs_handlers)

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(accelerate, "Accelerator", Accelerator)
    assert Processes("cpu").count == 2
    assert waits[0] >= timedelta(hours=12)
