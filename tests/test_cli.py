"""The command line: what it prints where, its exit codes, and how quickly it answers."""

import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from PIL import Image
from typer.core import TyperGroup
from typer.testing import CliRunner, Result

import nvvl
from nvvl.cli import app, main, quantize_main
from nvvl.progress import Ticker


def list_verbs(group: TyperGroup) -> Iterator[list[str]]:
    for name, command in group.commands.items():
        if isinstance(command, TyperGroup):
            yield from ([name, *words] for words in list_verbs(command))
        else:
            yield [name]


NVVL = [sys.executable, "-m", "nvvl"]
MAIN_GROUP: Any = typer.main.get_command(app)
VERBS = list(list_verbs(MAIN_GROUP))


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


@pytest.mark.parametrize("verb", [*VERBS, ["calib"], ["export"]], ids=" ".join)
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


@pytest.mark.parametrize("verb", ["quantize", "calib show", "calib stats"])
def test_help_says_what_a_set_may_be_and_what_the_seed_decides(
    verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shown = " ".join(
        re.sub(r"[│╭╮╰╯─]|\[\S+<=x\S*\]", " ", run(*verb.split(), "--help").stdout).split()
    )
    assert "`default`, a built set, a folder of images, or a JSONL file" in shown
    assert "Which items are generated, or which of your own are taken" in shown


def test_recorded_command_of_nvvl_quantize_can_be_given_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["nvvl-quantize", "nvfp4-w4a16", str(source), str(out)])
    with pytest.raises(SystemExit) as end:
        quantize_main()
    assert end.value.code == 0
    command, *arguments = json.loads((out / "manifest.json").read_text())["command"]
    assert command == "nvvl"
    assert run(*arguments, "--overwrite").exit_code == 0


def test_file_name_that_is_not_utf8_is_printed_escaped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (40, 30), "white").save(tmp_path / os.fsdecode(b"id\xe9.png"))
    written = io.BytesIO()
    stdout = io.TextIOWrapper(written, encoding="utf-8")  # strict, as a terminal's
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "argv", ["nvvl", "calib", "show", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        main()
    stdout.flush()
    assert end.value.code == 0
    assert rb"id\udce9.png" in written.getvalue()


@pytest.mark.parametrize("arguments", [["path", "embedded"], ["--help"], ["path", "--help"]])
def test_full_disk_below_stdout_is_one_line_and_exit_2(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([*NVVL, *arguments], stdout=full, stderr=subprocess.PIPE, text=True)
    error = "error: stdout: cannot be written (No space left on device)\n"
    assert (done.returncode, done.stderr) == (2, error)


def test_work_goes_on_where_stderr_is_full() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*NVVL, "calib", "show", "nowhere"], stdout=subprocess.PIPE, stderr=full
        )
    assert (done.returncode, done.stdout) == (2, b"")


@pytest.mark.parametrize("verb", [["path", "embedded"], ["--help"]])
def test_reader_that_goes_away_ends_the_command_quietly(verb: list[str]) -> None:
    with subprocess.Popen([*NVVL, *verb], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.close()
        assert child.stderr.read() == b""
    assert child.returncode == 141


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["path"], "Missing argument 'MODEL'; see nvvl path --help"),
        (["pth", "x"], "No such command 'pth'. Did you mean 'path'; see nvvl --help"),
        (["--bogus"], "No such option: --bogus; see nvvl --help"),
        (
            ["calib", "show", "--sample", "3"],
            "No such option: --sample (Possible options: --samples, --save); see nvvl calib show "
            "--help",
        ),
        (
            ["quantize", "fp9", "a", "b"],
            "Invalid value for 'FORMAT': 'fp9' is not one of 'fp8', 'nvfp4', 'nvfp4-w4a16', "
            "'mixed'; see nvvl quantize --help",
        ),
        (["calib", "show", "--samples"], "Option '--samples' requires an argument"),
    ],
)
def test_misuse_is_one_line_with_the_nearest_name_and_exit_2(
    arguments: list[str], error: str
) -> None:
    result = run(*arguments)
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", f"error: {error}\n")


@pytest.mark.parametrize("group", [[], ["calib"], ["export"]])
def test_missing_verb_prints_the_help_alone(group: list[str]) -> None:
    result = run(*group)
    assert (result.exit_code, result.stderr) == (2, "")
    assert result.stdout.strip() == run(*group, "--help").stdout.strip()


def test_fault_of_the_system_names_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model: str) -> Path:
        Path("/proc/nowhere").rename("/proc/there")
        raise AssertionError

    monkeypatch.setattr("nvvl.model.resolve.resolve_model", fail)
    assert_user_error(run("path", "embedded"), "/proc/nowhere: /proc/there: No such file or dir")


def test_error_of_the_user_is_one_line_and_exit_2() -> None:
    assert_user_error(run("path", "nowhere/at/all"), "nowhere/at/all", "required 'embedded'")


def test_file_is_not_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> str:
        raise AssertionError("asked the Hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    Path("models/vlm").write_text("")
    Path("models/link").symlink_to("nowhere")
    for name in ("models/vlm", "models/link", "./models/vlm"):
        assert_user_error(run("path", name), f"{name}: is no folder; required 'embedded', a Hub id")


def test_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model: str) -> Path:
        raise RuntimeError("a bug")

    monkeypatch.setattr("nvvl.model.resolve.resolve_model", fail)
    assert isinstance(run("path", "embedded").exception, RuntimeError)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore text"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
        MemoryError(),
    ],
)
def test_too_little_memory_is_one_line_and_exit_2(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(model: str) -> Path:
        raise error

    monkeypatch.setattr("nvvl.model.resolve.resolve_model", fail)
    assert_user_error(
        run("path", "embedded"), "out of memory (", "--device cpu", "a smaller --batch for"
    )


def test_interrupt_is_one_line_and_exit_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(model: str) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr("nvvl.model.resolve.resolve_model", interrupt)
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


def test_version_is_printed() -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"nvvl {nvvl.__version__}\n")


def test_pattern_that_reaches_too_far_is_named_and_exit_1(
    quantized: Path, source: Path, tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(quantized, tmp_path / "broken"))
    for name, keys in (
        ("config.json", ("quantization_config", "ignore")),
        ("hf_quant_config.json", ("quantization", "exclude_modules")),
    ):
        values = json.loads((broken / name).read_text())
        values[keys[0]][keys[1]].append("*layers.1*")
        (broken / name).write_text(json.dumps(values))
    result = run("verify", broken, "--against", source, "--no-logits")
    assert result.exit_code == 1
    faults = [line for line in result.stdout.splitlines() if "*layers.1*" in line]
    assert any(line.split()[1].startswith("E") for line in faults), result.stdout


def test_existing_output_is_kept_unless_told_otherwise(quantized: Path, source: Path) -> None:
    before = (quantized / "manifest.json").read_bytes()
    arguments = ["quantize", "nvfp4-w4a16", source, quantized.parent / "w4a16"]
    assert run(*arguments).exit_code == 0
    assert_user_error(run(*arguments), "w4a16", "--overwrite")
    assert run(*arguments, "--overwrite").exit_code == 0
    assert (quantized / "manifest.json").read_bytes() == before


def test_interrupted_run_says_how_to_go_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tick = Ticker.tick

    def interrupt(ticker: Ticker) -> None:
        if ticker.stage == "mlp1":
            signal.raise_signal(signal.SIGINT)
        tick(ticker)

    arguments = ["quantize", "nvfp4-w4a16", source, tmp_path / "out"]
    with monkeypatch.context() as patch:
        patch.setattr(Ticker, "tick", interrupt)
        result = run(*arguments)
    assert result.exit_code == 130
    assert "finishing this block" in result.stderr
    assert "the same command goes on from there" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    assert run(*arguments).exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_second_export_needs_no_calibration(quantized: Path, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["quantize", "nvfp4", source, out, "--from-calibration", quantized]
    for option in (("--samples", "2"), ("--calib", "default")):
        refused = run(*arguments, *option)
        assert_user_error(refused, "--from-calibration runs no", f"leave out {option[0]}")
    assert run(*arguments).exit_code == 0
    items = [
        json.loads((folder / "manifest.json").read_text())["calibration"]
        for folder in (quantized, out)
    ]
    assert items[0] == items[1]
    assert run("verify", out, "--against", source, "--no-logits").exit_code == 0


def test_statistics_are_shown_and_given_as_json(source: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "weighted.toml"
    rule = '[[rules]]\ntarget = "*.out_proj"\nformat = "fp8"\n'
    recipe.write_text(f'name = "weighted"\nimage_weight = 0.5\n{rule}')
    arguments = ["calib", "stats", source, "default", "--samples", "2", "--recipe", recipe]
    shown = run(*arguments)
    assert shown.exit_code == 0, shown.output
    assert "layers.0.mixer.out_proj" in shown.stdout
    assert "scale / amax" in shown.stdout
    values = json.loads(run(*arguments, "--json").stdout)
    assert values["recipe"]["image_weight"] == 0.5
    assert values["calibration"] == {"set": "default", "num_items": 2}
    first = values["linears"][0]
    assert first["format"] == "fp8"
    assert first["image"]["num_tokens"] > 0
    assert 0 < first["text"]["errors"]["nvfp4"] < 0.1
    assert_user_error(
        run("quantize", "nvfp4-w4a16", source, tmp_path / "out", "--recipe", recipe),
        "required a recipe of nvfp4-w4a16 alone, got fp8",
    )


def test_weighted_checkpoint_is_proved(source: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "weighted.toml"
    rule = '[[rules]]\ntarget = "*"\nformat = "nvfp4"\n'
    recipe.write_text(f'name = "weighted"\nimage_weight = 0.25\n{rule}')
    out = tmp_path / "out"
    done = run("quantize", "nvfp4", source, out, "--recipe", recipe, "--samples", "2")
    assert done.exit_code == 0, done.output
    assert run("verify", out, "--against", source).exit_code == 0


def test_plan_is_quick_and_does_not_import_torch(source: Path) -> None:
    program = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from nvvl.cli import app\n"
        "result = CliRunner().invoke(app, ['plan', sys.argv[1], '--json'])\n"
        "assert result.exit_code == 0, result.output\n"
        "print([n for n in ('torch', 'transformers', 'modelopt') if n in sys.modules])"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", program, source], capture_output=True, text=True, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.strip() == "[]"
    # CPU time, not wall time: other tests run beside this one
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2.0


@pytest.mark.parametrize("preset", ["fp8", "nvfp4", "nvfp4-w4a16", "mixed"])
def test_plan_foresees_the_server_rules(preset: str, source: Path) -> None:
    planned = json.loads(run("plan", source, "--format", preset, "--json").stdout)
    assert planned["exact"]
    status = {check["rule"]: check["status"] for check in planned["server_rules"]}
    assert "failed" not in status.values()
    assert {rule for rule, word in status.items() if word == "passed"} >= {"D1", "E1", "N5", "C8"}
    text = run("plan", source, "--format", preset).stdout
    assert f"weights: exactly {planned['weight_bytes']:,} bytes" in text
    assert "TensorRT-LLM: " in text
    assert "tensor parallel 2: every layer splits" in text


def test_rule_that_will_fail_is_named_before_the_run(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    config = json.loads((source / "config.json").read_text())
    config["vision_config"]["args"]["min_num_patches"] = 4
    (folder / "config.json").write_text(json.dumps(config))
    assert "vLLM: " in (text := run("plan", folder).stdout)
    assert "FAILS C4 (no dynamic resolution)" in text


def test_too_little_memory_is_refused_before_work_starts(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused = run("quantize", "nvfp4-w4a16", source, out, "--memory", "10MB")
    assert_user_error(refused, "allowed 0.0 GB, the run takes at least")
    assert not list(tmp_path.iterdir())
    assert run("quantize", "nvfp4-w4a16", source, out, "--memory", "6GB").exit_code == 0
    assert_user_error(run("plan", source, "--memory", "6 apples"), "an amount such as 6GB")


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
    for name in ("report.html", "report.md", f"cards/{quantized.name}/README.md"):
        assert str(tmp_path / "report" / name) in again.stdout
        assert (tmp_path / "report" / name).is_file()


def test_proof_of_no_run_is_refused(source: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    run("evaluate", source, "-o", runs, "--items", "1", "--suite", "line")
    proof = tmp_path / "proof.json"
    values = {"folder": str(tmp_path), "manifest_sha256": None, "passed": True}
    proof.write_text(json.dumps({**values, "checks": [], "sqnr_db": {}, "counts": {}}))
    page = tmp_path / "mine.html"
    refused = run("report", runs / source.name, "-o", page, "--proof", proof)
    assert_user_error(refused, "proof.json", "which no run is of")
    assert not page.exists()
    assert run("report", runs / source.name, "-o", page).exit_code == 0
    assert page.is_file()
    assert (tmp_path / "mine.json").is_file()


def test_two_models_of_one_name_are_refused(source: Path, tmp_path: Path) -> None:
    result = run("evaluate", source, source, "-o", tmp_path / "runs")
    assert_user_error(result, "required different folders", "--label")


def test_calibration_set_can_be_looked_at(tmp_path: Path) -> None:
    first = run("calib", "show", "--samples", "3", "--save", tmp_path / "pictures", "--json")
    assert first.exit_code == 0, first.output
    rows = json.loads(first.stdout)
    assert len({row["sha256"] for row in rows}) == 3
    num_pictures = sum(len(row["pictures"]) for row in rows)
    assert len(list((tmp_path / "pictures").glob("*.png"))) == num_pictures > 0
    again = run("calib", "show", "--samples", "3", "--save", tmp_path / "pictures")
    assert_user_error(again, "pictures", "required a new folder")
    for name in ("a/b.png", "a-b.png", f"{'long' * 60}.png"):
        path = tmp_path / "mine" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)
    mine = run("calib", "show", tmp_path / "mine", "--save", tmp_path / "saved")
    assert mine.exit_code == 0, mine.output
    assert len(list((tmp_path / "saved").iterdir())) == 3
    in_text = run("calib", "show", "--samples", "3").stdout
    assert all(row["sha256"] in in_text for row in rows)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["distill", "RUN", "--teacher", "embedded", "-o", ""], "-o: required a value, got an em"),
        (["quantize", "fp8", "embedded", "OUT", "--recipe="], "--recipe: required a value"),
        (["chat", "embedded", "What?", "--image", ""], "--image: required a value"),
        (["quantize", "fp8", "embedded", ""], "the argument after embedded: required a value"),
        (["calib", "show", ""], "the argument after show: required a value"),
    ],
)
def test_empty_value_is_refused(words: list[str], part: str) -> None:
    assert_user_error(run(*words), part, "is a variable unset?")


def test_empty_calibration_set_writes_nothing(source: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = run("quantize", "fp8", source, tmp_path / "out", "--calib", tmp_path / "empty")
    assert_user_error(result, "empty", "found none")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", [("--calib", "nowhere"), ("--samples", "9"), ("--seed", "3")])
def test_items_for_a_format_that_runs_none_are_refused(
    option: tuple[str, str], source: Path, tmp_path: Path
) -> None:
    result = run("quantize", "nvfp4-w4a16", source, tmp_path / "out", *option)
    assert_user_error(result, f"nvfp4-w4a16 runs no calibration items: leave out {option[0]}")
    assert not list(tmp_path.iterdir())


def test_chat_answers_about_an_image(source: Path, tmp_path: Path) -> None:
    image = tmp_path / "page.png"
    Image.new("RGB", (40, 30), "white").save(image)
    result = run(
        *("chat", source, "What?", "--image", image),
        *("--max-new-tokens", "3", "--json"),
    )
    assert result.exit_code == 0, result.output
    assert isinstance(json.loads(result.stdout)["answer"], str)


def test_chat_samples_by_seed_and_ends_thinking(source: Path) -> None:
    def chat(*options: object) -> str:
        result = run("chat", source, "What?", "--max-new-tokens", 24, "--json", *options)
        assert result.exit_code == 0, result.output
        answer: str = json.loads(result.stdout)["answer"]
        return answer

    assert chat("--temperature", 1, "--seed", 1) == chat("--temperature", 1, "--seed", 1)
    assert chat("--temperature", 1, "--seed", 1) != chat("--temperature", 1, "--seed", 2)
    assert chat("--temperature", 1, "--top-p", 1e-6) == chat()
    assert "</think>" in chat("--think", "--thinking-budget", 0)
    assert "</think>" not in chat("--think")  # random weights do not close it themselves


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--thinking-budget", 5], "add --think"),
        (["--top-p", 0], "--top-p 0"),
        (["--seed", 3], "change nothing at --temperature 0"),
    ],
)
def test_chat_names_options_without_effect(source: Path, options: list[object], part: str) -> None:
    assert_user_error(run("chat", source, "What?", *options), part)


@pytest.mark.parametrize(
    ("words", "options", "code"),
    [("/think", [], 0), ("/no_think", ["--think"], 2), ("", ["--think"], 0), ("", [], 2)],
)
def test_thinking_budget_needs_a_question_that_is_thought_about(
    source: Path, words: str, options: list[str], code: int
) -> None:
    asked = ("chat", source, f"What? {words}", "--thinking-budget", 0, "--max-new-tokens", 3)
    assert run(*asked, *options).exit_code == code


def test_model_that_memory_cannot_hold_is_refused_at_once(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "fp8"
    assert run("quantize", "fp8", source, out, "--samples", 2).exit_code == 0
    monkeypatch.setattr("nvvl.model.memory.free_memory", lambda: 1000)
    for folder in (source, out):
        asked = run("chat", folder, "What?", "--device", "cpu")
        assert_user_error(asked, f"{folder}: needs about")
        options = ("--items", 2, "--device", "cpu", "-o", tmp_path / "runs")
        evaluated = run("evaluate", folder, *options)
        assert_user_error(evaluated, f"{folder}: needs about")


def test_unreadable_image_is_named(source: Path, tmp_path: Path) -> None:
    image = tmp_path / "page.png"
    image.write_bytes(b"no image")
    assert_user_error(run("chat", source, "What?", "--image", image), "page.png")


def test_lm_eval_prints_standard_errors_of_each_model(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    arguments = ["lm-eval", source, "--task", "nvvl_copy,nvvl_prose", "--limit", 4, "-o", out]
    done = run(*arguments, "--label", "one")
    assert done.exit_code == 0, done.output
    assert "exact_match (stripped)" in done.stdout
    assert "0.0000 ± 0.0000" in done.stdout
    assert "first 4 items" in done.stdout
    (values,) = json.loads(run(*arguments, "--label", "one", "--json").stdout)
    assert list(values["tasks"]) == ["nvvl_copy", "nvvl_prose"]


def test_report_takes_folders_of_lm_eval(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    run("lm-eval", source, "--task", "nvvl_copy", "--limit", 4, "-o", out, "--label", "one")
    done = run("report", out / "one", "-o", tmp_path / "tasks.html")
    assert done.exit_code == 0, done.output
    assert "exact_match (stripped)" in done.stdout
    assert "Tasks of the lm-evaluation-harness" in (tmp_path / "tasks.html").read_text()
    assert_user_error(run("report", out, "-o", tmp_path), "has no run.json and no lm-eval.json")


@pytest.mark.slow  # the harness looks through its 14,000 tasks
def test_lm_eval_names_tasks_near_a_mistyped_one(source: Path, tmp_path: Path) -> None:
    done = run("lm-eval", source, "--task", "arc_esay", "-o", tmp_path)
    assert done.exit_code == 2
    assert "no task named arc_esay; near it: arc_easy" in done.stderr


def test_warning_is_one_line_without_the_place_in_the_source() -> None:
    program = (
        "import warnings, nvvl.cli as cli\n"
        "cli.app = lambda **_: warnings.warn('too\\n high')\n"
        "cli.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stderr == "warning: too high\n"


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--samples", "9", "--format", "nvfp4-w4a16"], "nvfp4-w4a16 runs no calibration items"),
        (["--samples", "9" * 20], "'--samples': Input should be less than or equal to 1000000"),
    ],
)
def test_plan_refuses_samples_that_no_run_takes(words: list[str], part: str) -> None:
    assert_user_error(run("plan", "embedded", *words), part)


def test_seed_beside_a_stored_calibration_is_refused(source: Path, tmp_path: Path) -> None:
    given = ("--from-calibration", source, "--seed", 3)
    result = run("quantize", "fp8", source, tmp_path / "out", *given)
    assert_user_error(result, "--from-calibration runs no calibration items: leave out --seed")
