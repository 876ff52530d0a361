"""Two gloo processes against one: the same training, whole or sliced.

The processes are real ones, started as a user starts them. Losses differ in the rounding of sums:
gradients are added in another order.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nvvl.calib_data.manifest import load_calibration_set
from nvvl.distill.recipe import DistillRecipe
from nvvl.distill.train import distill
from nvvl.model.checkpoint import Checkpoint

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
    (tmp_path / "recipe.toml").write_text(short.to_toml())
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
