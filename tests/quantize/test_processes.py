"""Two gloo processes against one: the same bytes, whole, resumed, and one line for an error.

The processes are started as a user starts them, once for all cases, because imports take longer
than runs.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from nvvl.calib_data.manifest import load_calibration_set
from nvvl.quantize.journal import read_journal
from nvvl.quantize.presets import mixed
from nvvl.quantize.walk import quantize_checkpoint

LAYERS = "language_model.backbone.layers"
NUM_ITEMS = 5  # uneven over two

Outcome = dict[str, Any]


def content(folder: Path) -> dict[str, Any]:
    """Every file's bytes; the command is the one thing that differs."""
    files: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir()}
    files["manifest.json"] = json.loads(files["manifest.json"]) | {"command": []}
    return files


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def alone(tiny_checkpoint: Path, folder: Path) -> Path:
    recipe = replace(mixed(), num_calibration_items=NUM_ITEMS)
    items = load_calibration_set("default", num_items=NUM_ITEMS)
    quantize_checkpoint(tiny_checkpoint, folder / "alone", recipe, items)
    return folder / "alone"


@pytest.fixture(scope="module")
def outcomes(tiny_checkpoint: Path, folder: Path) -> dict[str, list[Outcome]]:
    """What the two processes said of each case, by its name."""
    Image.new("RGB", (32, 32)).save(folder / "good.png")
    (folder / "bad.png").write_bytes(b"no picture")
    turns = [{"role": "user", "content": "<image> what?"}, {"role": "assistant", "content": "it"}]
    lines = [json.dumps({"messages": turns, "image": name}) for name in ("good.png", "bad.png")]
    (folder / "items.jsonl").write_text("\n".join(lines) + "\n")
    weighted = 'name = "w"\nimage_weight = 0.5\n[[rules]]\ntarget = "*"\nformat = "fp8"\n'
    (folder / "weighted.toml").write_text(weighted)
    half = f"{LAYERS}.3"

    def quantize(out: str, *more: object, interrupt: str = "") -> dict[str, Any]:
        arguments = ["quantize", "mixed", tiny_checkpoint, folder / out, "--device", "cpu", *more]
        return {"arguments": [str(argument) for argument in arguments], "interrupt": interrupt}

    items = ("--samples", NUM_ITEMS)
    commands = {
        "whole": quantize("whole", *items),
        "interrupted": quantize("resumed", *items, interrupt=half),
        "resumed": quantize("resumed", *items),
        "left": quantize("left", *items, interrupt=half),
        "exists": quantize("whole", *items),
        "bad item": quantize("bad", "--calib", folder / "items.jsonl"),
        "weighted": quantize("bad", *items, "--recipe", folder / "weighted.toml"),
        "few items": quantize("few", "--samples", 1),
        "no model": {"arguments": ["quantize", "fp8", "nowhere", "x"], "interrupt": ""},
    }
    (folder / "commands.json").write_text(json.dumps(list(commands.values())))
    program = Path(__file__).with_name("two_processes.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launcher, "--nproc-per-node", "2", str(program), str(folder)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = [json.loads((folder / f"said-{rank}.json").read_text()) for rank in range(2)]
    return {name: [one[index] for one in said] for index, name in enumerate(commands)}


def test_two_processes_give_the_bytes_of_one(
    outcomes: dict[str, list[Outcome]], folder: Path, alone: Path
) -> None:
    main, other = outcomes["whole"]
    assert main["code"] == other["code"] == 0, main
    assert main["stdout"].count("prove it:") == 1
    assert other["stdout"] == other["stderr"] == ""
    assert content(folder / "whole") == content(alone)


def test_processes_have_left_each_other_before_python_ends(
    outcomes: dict[str, list[Outcome]], folder: Path
) -> None:
    assert outcomes["whole"][0]["code"] == 0
    for rank in range(2):
        assert json.loads((folder / f"joined-{rank}.json").read_text()) is False


def test_two_processes_go_on_after_an_interrupt_of_one(
    outcomes: dict[str, list[Outcome]], folder: Path, alone: Path
) -> None:
    main, other = outcomes["interrupted"]
    assert main["code"] == 130
    assert "the same command goes on from there" in main["stderr"]
    assert other["code"] == 2
    assert other["stderr"] == ""
    main, other = outcomes["resumed"]
    assert main["code"] == other["code"] == 0, main
    assert content(folder / "resumed") == content(alone)


def test_one_process_goes_on_with_what_two_left(
    outcomes: dict[str, list[Outcome]], tiny_checkpoint: Path, folder: Path, alone: Path
) -> None:
    assert outcomes["left"][0]["code"] == 130
    _, blocks, _ = read_journal(folder / ".left.partial" / "journal.jsonl")
    assert blocks[-1].block == f"{LAYERS}.3"
    assert len(set(blocks[-1].spills)) == 2
    recipe = replace(mixed(), num_calibration_items=NUM_ITEMS)
    items = load_calibration_set("default", num_items=NUM_ITEMS)
    quantize_checkpoint(tiny_checkpoint, folder / "left", recipe, items)
    assert content(folder / "left") == content(alone)


@pytest.mark.parametrize(
    ("case", "part"),
    [
        ("exists", "whole: exists already; choose another OUT, or pass --overwrite"),
        ("bad item", "bad.png"),
        ("few items", "2 processes share 1 calibration items; required one for each"),
        (
            "weighted",
            "image_weight sums errors over all items, which one process does alone; got 2",
        ),
        ("no model", "nowhere: required 'embedded', an existing folder or a Hub id"),
    ],
)
def test_error_ends_all_processes_with_one_line(
    case: str, part: str, outcomes: dict[str, list[Outcome]], folder: Path
) -> None:
    main, other = outcomes[case]
    assert main["code"] == other["code"] == 2, main
    assert other["stderr"] == ""
    (line,) = [line for line in main["stderr"].splitlines() if line.startswith("error: ")]
    assert part in line
    assert not list(folder.glob(".bad*")) + list(folder.glob(".few*"))
