"""``nvvl distill``: the whole way from a run to two folders, and its errors."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from nvvl.cli import app
from nvvl.distill.blockwise import BlockwiseResult, LayerResult
from nvvl.distill.recipe import DistillRecipe
from nvvl.options import SET_HELP
from nvvl.quantize.manifest import Manifest
from nvvl.toml_tables import toml_lines


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["distill", *(str(argument) for argument in arguments)])


def test_teacher_s_logits_need_no_recipe_to_be_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "it"}]
    data = tmp_path / "items.jsonl"
    data.write_text(f"{json.dumps({'messages': turns})}\n" * 65)  # one more than are held out
    out = tmp_path / "LOGITS"
    arguments = ["precompute", "embedded", "-o", out, "--data", data, "--device", "cpu"]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    assert "positions of 65 items, 64 tokens each" in result.stdout

    recipes: list[DistillRecipe] = []

    def note(*arguments: Any, **_: Any) -> None:
        recipes.append(arguments[3])

    monkeypatch.setattr("nvvl.distill.train.distill", note)
    given = ["RUN", "--teacher", "embedded", "-o", tmp_path / "out", "--data", data]
    for options in ([], ["--logits", out]):
        assert invoke(*given, *options).exit_code == 0
    assert [(recipe.loss, recipe.layer_loss > 0) for recipe in recipes] == [
        ("mse", True),
        ("kl", False),
    ]
    assert recipes[0].num_items == recipes[1].num_items


@pytest.fixture
def recipe_file(recipe: DistillRecipe, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text("\n".join(toml_lines(recipe.to_dict())))
    return path


def test_distill_writes_both_folders(
    run: Path, tiny_checkpoint: Path, item_folder: Path, recipe_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = ["--teacher", tiny_checkpoint, "--data", item_folder, "--recipe", recipe_file]
    result = invoke(run, *options, "--steps", 2, "--device", "cpu", "-o", out, "--json")
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert values["bf16"] == str(tmp_path / "out.bf16")
    assert values["best_loss"] <= values["start_loss"]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["distillation"]["recipe"]["num_steps"] == 2
    assert (tmp_path / "out.bf16" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--recipe", "qad"], ("qad: required one of qad_nvfp4",)),
        (["--lr", "-1"], ("learning_rate: required above 0 and at most 1, got -1",)),
        (["--data", "nowhere"], ("nowhere: no such file",)),
        (["--shard"], ("--shard: slices the state over several processes, and there is one",)),
        (["--steps", "9" * 20], ("num_steps: required an integer from 1 to 1000000000, got 9999",)),
        (
            ["--seed", "9" * 20],
            ("'--seed': Input should be less than or equal to 9223372036854775807",),
        ),
    ],
)
def test_error_is_one_line(
    options: list[str], parts: tuple[str, ...], run: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    result = invoke(run, "--teacher", tiny_checkpoint, "-o", tmp_path / "out", *options)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert all(part in result.stderr.splitlines()[-1] for part in parts)


def test_set_with_nothing_left_to_train_on_is_refused(
    run: Path, tiny_checkpoint: Path, item_folder: Path, tmp_path: Path
) -> None:
    result = invoke(
        run,
        "--teacher",
        tiny_checkpoint,
        "-o",
        tmp_path / "out",
        "--data",
        item_folder,
        "--device",
        "cpu",
    )
    assert result.exit_code == 2
    assert "9 items and 128 are kept for validation" in result.stderr.splitlines()[-1]


def test_layers_that_were_trained_are_counted_alone(
    run: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = (
        LayerResult("first", 0.0, 0.0, trained=False),
        LayerResult("second", 0.2, 0.1),
        LayerResult("third", 0.3, 0.3),
        LayerResult("last", 0.4, 0.4, trained=False),
    )
    result = BlockwiseResult(Manifest.read(run), tmp_path / "out.bf16", layers)
    monkeypatch.setattr("nvvl.distill.blockwise.distill_blockwise", lambda *_, **__: result)
    options = ["--teacher", tiny_checkpoint, "-o", tmp_path / "out", "--device", "cpu"]
    said = invoke(run, *options, "--recipe", "qad_nvfp4_layers")
    assert said.exit_code == 0, said.output
    assert "1 of 2 trained layers are nearer to BF16; error of the last 3.00e-01" in said.stdout


@pytest.mark.parametrize("verb", ["distill", "precompute", "rotate"])
def test_help_names_every_kind_of_set_that_data_takes(verb: str) -> None:
    result = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "200"})
    assert SET_HELP in result.stdout
