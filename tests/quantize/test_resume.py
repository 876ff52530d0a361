"""A killed run goes on to the same bytes, whenever it was killed, and never from something else."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import nvvl
from nvvl import cpu
from nvvl.calib_data.items import Item
from nvvl.calib_data.manifest import CalibrationSet
from nvvl.errors import CalibrationError, OutputError, SourceError
from nvvl.model import safetensors_io
from nvvl.model.checkpoint_writer import CheckpointWriter
from nvvl.model.prompt import Message
from nvvl.quantize import journal as journal_module
from nvvl.quantize import walk as walk_module
from nvvl.quantize.activations import Activations
from nvvl.quantize.journal import (
    Journal,
)
from nvvl.quantize.manifest import Manifest
from nvvl.quantize.presets import PRESETS, fp8, nvfp4, nvfp4_w4a16
from nvvl.quantize.recipe import Recipe, Rule
from nvvl.quantize.walk import quantize_checkpoint
from nvvl.staging import Stage, resumable_folder

LAYERS = "language_model.backbone.layers"
QuantizeTiny = Callable[[str], Path]
MakeCheckpoint = Callable[..., Path]

# Everything through which a run changes the disk, and the tick after each item.
WRITES: tuple[tuple[Any, str], ...] = (
    (os, "pwrite"),
    (os, "fsync"),
    (Path, "rename"),
    (Path, "replace"),
    (Path, "unlink"),
    (Path, "write_bytes"),
    (Path, "mkdir"),
    (shutil, "copyfile"),
    (shutil, "rmtree"),
    (Activations, "_store"),
)


class KilledError(BaseException):
    """Stands for a death: nothing a run does after it reaches the disk."""


class Killer:
    """Counts what a run does to the disk, and lets it die before one of these events."""

    def __init__(self, patch: pytest.MonkeyPatch, *, at: int = 10**9) -> None:
        self.count = 0
        self.at = at
        for owner, name in WRITES:
            patch.setattr(owner, name, self._guard(getattr(owner, name)))

    def _guard(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count >= self.at:  # a dead process does not clean up
                raise KilledError
            return function(*args, **kwargs)

        return guarded


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_only(folder: Path, *names: str) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)


@contextmanager
def killed(at: int) -> Iterator[Killer]:
    with pytest.MonkeyPatch.context() as patch:
        yield Killer(patch, at=at)


def count_events(run: Callable[[], object]) -> int:
    with killed(10**9) as killer:
        run()
    return killer.count


def test_sigkill_at_20_random_points_goes_on_to_the_same_bytes(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    program = Path(__file__).with_name("killed_runs.py")
    done = subprocess.run(
        [sys.executable, program, tiny_checkpoint, tmp_path, "0", "20"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    points = json.loads(done.stdout)["points"]
    assert len(set(points)) == 23  # and the three events that make the output appear
    expected = folder_bytes(tmp_path / "whole")
    assert "model.safetensors" in expected
    for point in points:
        assert folder_bytes(tmp_path / f"at{point}") == expected, f"killed before event {point}"


def test_run_that_dies_while_it_replaces_an_output_goes_on(
    tiny_checkpoint: Path, quantize_tiny: QuantizeTiny, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def run() -> None:
        quantize_checkpoint(tiny_checkpoint, out, nvfp4_w4a16(), None, overwrite=True)

    run()
    num_events = count_events(run)
    for point in range(num_events - 3, num_events + 1):
        with killed(point), pytest.raises(KilledError):
            run()
        run()
        assert folder_bytes(out) == folder_bytes(quantize_tiny("nvfp4-w4a16"))


def test_killed_again_and_again_still_ends(
    tiny_checkpoint: Path,
    calibration_set: CalibrationSet,
    quantize_tiny: QuantizeTiny,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    num_kills = 0
    while not out.exists():
        with killed(60) as killer:
            try:
                quantize_checkpoint(tiny_checkpoint, out, nvfp4(), calibration_set)
            except KilledError:
                num_kills += 1
        assert num_kills < 50, f"no progress: {killer.count} events"
    assert num_kills > 3
    assert folder_bytes(out) == folder_bytes(quantize_tiny("nvfp4"))


@pytest.fixture
def interrupted(
    tiny_checkpoint: Path, calibration_set: CalibrationSet, tmp_path: Path
) -> Callable[..., Path]:
    """Return a function that interrupts a run after a layer and gives its staging folder."""

    def interrupt(layer: int = 3, recipe: Recipe | None = None) -> Path:
        stages: list[str] = []
        with pytest.raises(KeyboardInterrupt, match=r"the same command goes on from there"):
            quantize_checkpoint(
                tiny_checkpoint,
                tmp_path / "out",
                recipe or nvfp4(),
                calibration_set,
                progress=lambda stage, *_: stages.append(stage),
                stop=lambda: stages[-1] == f"{LAYERS}.{layer}",
            )
        assert_only(tmp_path, ".out.partial")
        return tmp_path / ".out.partial"

    return interrupt


def resume(source: Path, items: CalibrationSet, out: Path, **options: Any) -> list[str]:
    stages: list[str] = []
    recipe = options.pop("recipe", nvfp4())
    quantize_checkpoint(
        source, out, recipe, items, progress=lambda stage, *_: stages.append(stage), **options
    )
    return stages


def test_interrupt_finishes_the_block_and_the_next_run_starts_after_it(
    interrupted: Callable[..., Path],
    tiny_checkpoint: Path,
    calibration_set: CalibrationSet,
    quantize_tiny: QuantizeTiny,
    tmp_path: Path,
) -> None:
    interrupted(3)
    stages = resume(tiny_checkpoint, calibration_set, tmp_path / "out")
    assert list(dict.fromkeys(stages)) == [
        *(f"{LAYERS}.{index}" for index in (4, 5, 6)),
        "everything else",
    ]
    assert folder_bytes(tmp_path / "out") == folder_bytes(quantize_tiny("nvfp4"))
    assert_only(tmp_path, "out")


@pytest.mark.parametrize("fault", ["missing", "flipped", "cut"])
def test_faulty_spill_costs_a_second_run_of_the_blocks_only(
    fault: str,
    interrupted: Callable[..., Path],
    tiny_checkpoint: Path,
    calibration_set: CalibrationSet,
    quantize_tiny: QuantizeTiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (spill,) = interrupted(3).glob("activations-*.safetensors")
    data = bytearray(spill.read_bytes())
    data[-1] ^= 1
    spill.unlink()
    if fault != "missing":
        spill.write_bytes(data if fault == "flipped" else data[:-10])
    written: list[str] = []
    write = CheckpointWriter.write

    def note(writer: CheckpointWriter, name: str, tensor: Tensor, **options: Any) -> str:
        written.append(name)
        return write(writer, name, tensor, **options)

    monkeypatch.setattr(CheckpointWriter, "write", note)
    stages = resume(tiny_checkpoint, calibration_set, tmp_path / "out")
    assert stages.count(f"{LAYERS}.2") == len(calibration_set.items)
    assert not [name for name in written if name.startswith(f"{LAYERS}.2.")]
    assert folder_bytes(tmp_path / "out") == folder_bytes(quantize_tiny("nvfp4"))


def test_without_room_for_spills_the_bytes_are_the_same(
    interrupted: Callable[..., Path],
    tiny_checkpoint: Path,
    calibration_set: CalibrationSet,
    quantize_tiny: QuantizeTiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(walk_module, "_SPARE_BYTES", 10**18)
    assert not list(interrupted(4).glob("activations-*"))
    resume(tiny_checkpoint, calibration_set, tmp_path / "out")
    assert folder_bytes(tmp_path / "out") == folder_bytes(quantize_tiny("nvfp4"))


def test_bytes_that_never_reached_the_disk_are_written_again(
    interrupted: Callable[..., Path],
    tiny_checkpoint: Path,
    calibration_set: CalibrationSet,
    quantize_tiny: QuantizeTiny,
    tmp_path: Path,
) -> None:
    weights = interrupted(3) / "output" / "model.safetensors.partial"
    header_bytes = 8 + int.from_bytes(weights.read_bytes()[:8], "little")
    with weights.open("r+b") as file:  # a power cut after the journal was flushed
        file.seek(header_bytes)
        file.write(bytes(weights.stat().st_size - header_bytes))
    resume(tiny_checkpoint, calibration_set, tmp_path / "out")
    assert folder_bytes(tmp_path / "out") == folder_bytes(quantize_tiny("nvfp4"))


def test_interrupt_is_heard_while_finished_blocks_run_again(
    interrupted: Callable[..., Path], tiny_checkpoint: Path, calibration_set: CalibrationSet
) -> None:
    stage = interrupted(1)
    for spill in stage.glob("activations-*"):
        spill.unlink()
    stages: list[str] = []
    with pytest.raises(KeyboardInterrupt, match="the same command goes on from there"):
        quantize_checkpoint(
            *(tiny_checkpoint, stage.with_name("out"), nvfp4(), calibration_set),
            progress=lambda name, *_: stages.append(name),
            stop=lambda: True,
        )
    assert set(stages) == {"vision_model.radio_model.model.patch_generator"}


def test_torn_line_is_a_block_done_again(
    interrupted: Callable[..., Path],
    tiny_checkpoint: Path,
    calibration_set: CalibrationSet,
    quantize_tiny: QuantizeTiny,
    tmp_path: Path,
) -> None:
    path = interrupted(3) / "journal.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    stages = resume(tiny_checkpoint, calibration_set, tmp_path / "out")
    assert f"{LAYERS}.3" in stages
    assert folder_bytes(tmp_path / "out") == folder_bytes(quantize_tiny("nvfp4"))


def changed_content(items: CalibrationSet) -> CalibrationSet:
    last = replace(items.items[-1], messages=(Message("user", "other words"),), images=())
    return CalibrationSet((*items.items[:-1], last), "test", len(items.items))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("recipe", r"recipe\.rules: .*nvfp4.* then, .*fp8.* now"),
        ("format", r"recipe\.name: \"nvfp4\" then, \"nvfp4-w4a16\" now"),
        ("fewer items", r"calibration items: 5 then, 4 now"),
        ("other words", r"calibration item two: has other content now"),
        ("version", r"nvvl: 0\.1\.0 then, 99 now"),
        ("processor", r"processor: \w+ then, another now"),
        ("processor model", r"processor model: .+ then, Other CPU \(\w{8}\) now"),
        ("weights", r"source model\.safetensors: .* then, .* now"),
        ("tokenizer", r"source tokenizer_config\.json: other content now"),
    ],
)
def test_changed_input_is_refused_with_what_differs(
    change: str,
    message: str,
    make_checkpoint: MakeCheckpoint,
    calibration_set: CalibrationSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = make_checkpoint(tmp_path / "source")
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, out, nvfp4(), calibration_set, stop=lambda: True)
    before = folder_bytes_deep(tmp_path / ".out.partial")
    recipe, items = nvfp4(), calibration_set
    if change == "recipe":
        recipe = replace(recipe, rules=(Rule(target="*", format="fp8"),))
    elif change == "format":
        recipe = nvfp4_w4a16()
    elif change == "fewer items":
        items = CalibrationSet(items.items[:-1], "test", 4)
    elif change == "other words":
        items = changed_content(items)
    elif change == "version":
        monkeypatch.setattr(nvvl, "__version__", "99")
    elif change == "processor":
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
    elif change == "processor model":
        monkeypatch.setattr(cpu, "describe_cpu", lambda: "model name\t: Other CPU")
    else:
        name = {"weights": "model.safetensors", "tokenizer": "tokenizer_config.json"}[change]
        if change == "weights":
            os.utime(source / name, ns=(1, 1))
        else:
            (source / name).write_text("{}")
    with pytest.raises(OutputError, match=message):
        quantize_checkpoint(source, out, recipe, items)
    assert folder_bytes_deep(tmp_path / ".out.partial") == before
    quantize_checkpoint(source, out, recipe, items, overwrite=True)
    assert_only(tmp_path, "source", "out")


def folder_bytes_deep(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_full_disk_keeps_the_state_and_says_what_is_missing(
    tiny_checkpoint: Path,
    calibration_set: CalibrationSet,
    quantize_tiny: QuantizeTiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    pwrite = os.pwrite
    count = 0

    def fill(*args: Any) -> int:
        nonlocal count
        count += 1
        if count > 60:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fill)
        with pytest.raises(
            OutputError, match=r"disk is full: \d+ bytes to write, .*the output still needs \d+"
        ):
            quantize_checkpoint(tiny_checkpoint, out, nvfp4(), calibration_set)
    assert_only(tmp_path, ".out.partial")
    stages = resume(tiny_checkpoint, calibration_set, out)
    assert "vision_model.radio_model.model.patch_generator" not in stages
    assert folder_bytes(out) == folder_bytes(quantize_tiny("nvfp4"))


def test_full_disk_at_the_last_file_keeps_the_state(
    tiny_checkpoint: Path,
    calibration_set: CalibrationSet,
    quantize_tiny: QuantizeTiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    write_bytes = Path.write_bytes

    def fill(path: Path, *args: Any, **options: Any) -> int:
        if path.name == "manifest.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_bytes(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fill)
        with pytest.raises(
            OutputError, match=r"No space left .*still needs its small files; \d+ finished blocks"
        ):
            quantize_checkpoint(tiny_checkpoint, out, nvfp4(), calibration_set)
    assert_only(tmp_path, ".out.partial")
    assert resume(tiny_checkpoint, calibration_set, out) == ["everything else"]  # no block
    assert folder_bytes(out) == folder_bytes(quantize_tiny("nvfp4"))


def test_second_run_into_the_same_folder_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with resumable_folder(out, sources=[tiny_checkpoint], overwrite=False) as stage:
        stage.output.mkdir()
        with pytest.raises(OutputError, match=r"\.out\.partial: another run is writing there"):
            quantize_checkpoint(tiny_checkpoint, out, nvfp4_w4a16(), None)


def test_foreign_folder_in_the_way_is_kept(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match=r"holds files but no journal\.jsonl"):
        quantize_checkpoint(tiny_checkpoint, tmp_path / "out", nvfp4_w4a16(), None)
    assert (tmp_path / ".out.partial" / "thesis.txt").exists()


def test_journal_says_what_was_run(interrupted: Callable[..., Path]) -> None:
    stage = Stage(interrupted(1))
    lines = [json.loads(line) for line in stage.journal.read_text().splitlines()]
    assert lines[0]["nvvl"] == "0.1.0"
    assert lines[0]["device"] == "cpu"
    assert lines[-1]["block"] == f"{LAYERS}.1"
    assert lines[-1]["amaxes"].keys() == {
        f"{LAYERS}.1.mixer.up_proj",
        f"{LAYERS}.1.mixer.down_proj",
    }
    with Journal(stage, lines[0], [], overwrite=True) as journal:  # no items: another set
        assert journal.blocks == []
    assert_only(stage.root, "journal.jsonl")


@pytest.mark.parametrize("preset", PRESETS)
def test_stored_calibration_gives_the_bytes_of_a_calibrated_run(
    preset: str, tiny_checkpoint: Path, quantize_tiny: QuantizeTiny, tmp_path: Path
) -> None:
    stages: list[str] = []
    quantize_checkpoint(
        tiny_checkpoint,
        tmp_path / "out",
        PRESETS[preset](),
        None,
        from_calibration=quantize_tiny("fp8"),
        progress=lambda stage, *_: stages.append(stage),
    )
    assert len(stages) == len(set(stages)), "a block was run over items"
    found, expected = folder_bytes(tmp_path / "out"), folder_bytes(quantize_tiny(preset))
    if preset == "nvfp4-w4a16":  # its own run draws no items, so its manifest names none
        found.pop("manifest.json"), expected.pop("manifest.json")
    assert found == expected


def test_stored_calibration_that_lacks_layers_is_refused(
    quantize_tiny: QuantizeTiny, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        CalibrationError, match=r"nvfp4-w4a16: its calibration lacks the inputs of 16 linears"
    ):
        quantize_checkpoint(
            *(tiny_checkpoint, tmp_path / "out", fp8(), None),
            from_calibration=quantize_tiny("nvfp4-w4a16"),
        )
    assert_only(tmp_path)


def test_stored_calibration_of_another_source_is_refused(
    make_checkpoint: MakeCheckpoint, quantize_tiny: QuantizeTiny, tmp_path: Path
) -> None:
    name = f"{LAYERS}.1.mixer.up_proj.weight"
    other = torch.ones((128, 64), dtype=torch.bfloat16)
    source = make_checkpoint(tmp_path / "source", replace={name: other})
    with pytest.raises(CalibrationError, match=rf"calibrated on another source \({name} differs"):
        quantize_checkpoint(
            *(source, tmp_path / "out", nvfp4(), None), from_calibration=quantize_tiny("fp8")
        )
    assert_only(tmp_path, "source")


def test_changed_calibration_file_is_refused(
    quantize_tiny: QuantizeTiny, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "fp8"
    shutil.copytree(quantize_tiny("fp8"), copy)
    data = bytearray((copy / "calibration.amax").read_bytes())
    data[-1] ^= 1
    (copy / "calibration.amax").write_bytes(data)
    with pytest.raises(Exception, match=r"calibration\.amax: its hash is not the one"):
        quantize_checkpoint(tiny_checkpoint, tmp_path / "out", nvfp4(), None, from_calibration=copy)


def test_calibration_of_a_distilled_run_is_refused(
    quantize_tiny: QuantizeTiny, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "fp8"
    shutil.copytree(quantize_tiny("fp8"), copy)
    replace(Manifest.read(copy), distillation={"steps": 60}).write(copy)
    with pytest.raises(CalibrationError, match="fp8: is a distilled run, whose input scales"):
        quantize_checkpoint(tiny_checkpoint, tmp_path / "out", nvfp4(), None, from_calibration=copy)
    assert_only(tmp_path, "fp8")


def test_item_sets_are_compared_by_name_too(calibration_set: CalibrationSet) -> None:
    first: Item = calibration_set.items[0]
    found = [("other", "0" * 64)]
    assert journal_module._compare_items(found, [first]) == [
        f"calibration items: other then, {first.item_id} now"
    ]


@pytest.mark.parametrize("error", [errno.EIO, errno.ESTALE])
def test_source_that_cannot_be_read_just_now_keeps_the_finished_blocks(
    error: int,
    tiny_checkpoint: Path,
    calibration_set: CalibrationSet,
    quantize_tiny: QuantizeTiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fill = safetensors_io._fill
    failing = f"{LAYERS}.4."

    def fail(data: Any, file: Any, info: Any, done: int) -> None:
        if info.name.startswith(failing):
            raise OSError(error, os.strerror(error))
        fill(data, file, info, done)

    monkeypatch.setattr(safetensors_io, "_fill", fail)
    with pytest.raises(SourceError, match=r"cannot be read \(.*finished blocks are kept in .*out"):
        resume(tiny_checkpoint, calibration_set, tmp_path / "out")
    monkeypatch.undo()
    stages = resume(tiny_checkpoint, calibration_set, tmp_path / "out")
    assert stages[0] == f"{LAYERS}.4"
    assert folder_bytes(tmp_path / "out") == folder_bytes(quantize_tiny("nvfp4"))
