"""The command line: what it prints where, its exit codes, and how quickly it answers."""

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from nvvl.cli import app

VERBS = [
    ["quantize"],
    ["verify"],
    ["evaluate"],
    ["report"],
    ["calib", "show"],
    ["chat"],
    ["demo"],
    ["path"],
]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def source(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with every key of config.json that servers read."""
    return make_checkpoint(
        tmp_path_factory.mktemp("source") / "bf16",
        template="nemotron_h",
        vision={"preferred_resolution": [32, 32]},
    )


@pytest.fixture(scope="module")
def quantized(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "fp8"
    result = run("quantize", "fp8", source, out, "--samples", "2", "--device", "cpu")
    assert result.exit_code == 0, result.output
    return out


def assert_user_error(result: Result, *parts: str) -> None:
    """Exit code 2, one line on stderr with every part, nothing on stdout."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    error = result.stderr.splitlines()[-1]
    assert error.startswith("error: ")
    for part in parts:
        assert part in error


def test_help_is_quick_and_does_not_import_torch() -> None:
    program = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from nvvl.cli import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "print([n for n in ('torch', 'transformers', 'modelopt') if n in sys.modules])"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.strip() == "[]"
    # CPU time, not wall time: other tests run beside this one
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_help_of_every_verb_shows_an_example(verb: list[str]) -> None:
    result = run(*verb, "--help")
    assert result.exit_code == 0
    assert f"Example: nvvl {' '.join(verb)}" in " ".join(result.stdout.split()) or verb == ["path"]


@pytest.mark.parametrize("command", ["nvvl", "nvvl-quantize"])
def test_installed_commands_answer(command: str) -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / command, "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "Usage: nvvl" in done.stdout
    assert ("FORMAT" in done.stdout) == (command == "nvvl-quantize")


def test_error_of_the_user_is_one_line_and_exit_2() -> None:
    assert_user_error(run("path", "nowhere/at/all"), "nowhere/at/all", "required 'embedded'")


def test_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model: str) -> Path:
        raise RuntimeError("a bug")

    monkeypatch.setattr("nvvl.model.load.resolve_model", fail)
    assert isinstance(run("path", "embedded").exception, RuntimeError)


def test_interrupt_is_one_line_and_exit_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(model: str) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr("nvvl.model.load.resolve_model", interrupt)
    result = run("path", "embedded")
    assert result.exit_code == 130
    assert result.stderr.startswith("error: interrupted")


def test_written_checkpoint_is_verified(quantized: Path, source: Path) -> None:
    result = run("verify", quantized, "--against", source, "--json")
    report = json.loads(result.stdout)
    assert report["passed"], [check for check in report["checks"] if check["passed"] is False]
    assert result.exit_code == 0


def test_flipped_byte_is_named_and_exit_1(quantized: Path, source: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in quantized.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = bytearray((broken / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (broken / "model.safetensors").write_bytes(weights)
    result = run("verify", broken, "--against", source, "--no-logits")
    assert result.exit_code == 1
    assert "failed: H1" in result.stdout
    assert "NOT verified" in result.stdout


def test_existing_output_is_kept_unless_told_otherwise(quantized: Path, source: Path) -> None:
    before = (quantized / "manifest.json").read_bytes()
    arguments = ["quantize", "nvfp4-w4a16", source, quantized.parent / "w4a16"]
    assert run(*arguments).exit_code == 0
    assert_user_error(run(*arguments), "w4a16", "--overwrite")
    assert run(*arguments, "--overwrite").exit_code == 0
    assert (quantized / "manifest.json").read_bytes() == before


def test_json_is_all_there_is_on_stdout(source: Path, tmp_path: Path) -> None:
    result = run("quantize", "nvfp4-w4a16", source, tmp_path / "out", "--json")
    assert json.loads(result.stdout)["format"] == "nvfp4-w4a16"


def test_recipe_of_another_format_is_refused(source: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('name = "mine"\n[[rules]]\ntarget = "*.mixer.*"\nformat = "nvfp4-w4a16"\n')
    out = tmp_path / "out"
    refused = run("quantize", "fp8", source, out, "--recipe", recipe)
    assert_user_error(refused, "required a recipe of fp8 alone, got nvfp4-w4a16")
    assert not out.exists()
    assert run("quantize", "mixed", source, out, "--recipe", recipe).exit_code == 0
    assert json.loads((out / "recipe.json").read_text())["recipe"]["name"] == "mine"


def test_runs_are_compared_item_by_item(quantized: Path, source: Path, tmp_path: Path) -> None:
    result = run(
        *("evaluate", source, quantized, "-o", tmp_path / "runs", "--items", "2"),
        *("--suite", "line", "--teacher", source, "--json"),
    )
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    names = [source.name, quantized.name]
    assert [scores["label"] for scores in report["runs"]] == names
    folders = [tmp_path / "runs" / name for name in names]
    again = run("report", *folders, "-o", tmp_path / "report")
    assert again.exit_code == 0, again.output
    assert json.loads((tmp_path / "report" / "report.json").read_text()) == report
    assert "line" in again.stdout
    assert str(tmp_path / "report" / "report.md") in again.stdout


def test_two_models_of_one_name_are_refused(source: Path, tmp_path: Path) -> None:
    result = run("evaluate", source, source, "-o", tmp_path / "runs")
    assert_user_error(result, "another folder")


def test_calibration_set_can_be_looked_at(tmp_path: Path) -> None:
    first = run("calib", "show", "--samples", "3", "--save", tmp_path / "pictures", "--json")
    assert first.exit_code == 0, first.output
    rows = json.loads(first.stdout)
    assert len({row["sha256"] for row in rows}) == 3
    num_pictures = sum(len(row["pictures"]) for row in rows)
    assert len(list((tmp_path / "pictures").glob("*.png"))) == num_pictures > 0
    again = run("calib", "show", "--samples", "3", "--save", tmp_path / "pictures")
    assert_user_error(again, "pictures", "required a new folder")
    in_text = run("calib", "show", "--samples", "3").stdout
    assert all(row["sha256"] in in_text for row in rows)


def test_empty_calibration_set_writes_nothing(source: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = run("quantize", "fp8", source, tmp_path / "out", "--calib", tmp_path / "empty")
    assert_user_error(result, "empty", "found none")
    assert not (tmp_path / "out").exists()


def test_chat_answers_about_an_image(source: Path, tmp_path: Path) -> None:
    image = tmp_path / "page.png"
    Image.new("RGB", (40, 30), "white").save(image)
    result = run(
        *("chat", source, "What?", "--image", image),
        *("--max-new-tokens", "3", "--json"),
    )
    assert result.exit_code == 0, result.output
    assert isinstance(json.loads(result.stdout)["answer"], str)


def test_unreadable_image_is_named(source: Path, tmp_path: Path) -> None:
    image = tmp_path / "page.png"
    image.write_bytes(b"no image")
    assert_user_error(run("chat", source, "What?", "--image", image), "page.png")
