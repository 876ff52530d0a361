"""An output takes its name whole or not at all, and nothing finished or foreign is lost."""

import errno
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from nvvl.calib_data.manifest import load_calibration_set
from nvvl.errors import DataError, OutputError
from nvvl.quantize.journal import Journal
from nvvl.quantize.presets import nvfp4, nvfp4_w4a16
from nvvl.quantize.walk import quantize_checkpoint
from nvvl.staging import locked, resumable_folder, staged_folder

Staging = Callable[..., AbstractContextManager[Any]]


def denied(*_: object, **__: object) -> bool:
    raise PermissionError(errno.EACCES, "Permission denied")


@pytest.mark.parametrize(
    ("journal", "kept"), [("{}\n", False), ("{}\n{}\n", True), ("{}\n{", False)]
)
def test_failed_run_removes_only_what_it_began_itself(
    journal: str, kept: bool, tmp_path: Path
) -> None:
    stage = tmp_path / ".out.partial"
    stage.mkdir()
    (stage / "journal.jsonl").write_text(journal)
    with (
        pytest.raises(DataError),
        resumable_folder(tmp_path / "out", sources=[tmp_path / "source"], overwrite=False),
    ):
        raise DataError("a picture that cannot be read just now")
    assert (stage / "journal.jsonl").exists() == kept


@pytest.mark.parametrize("overwrite", [False, True])
def test_foreign_folder_is_kept_where_an_output_exists(overwrite: bool, tmp_path: Path) -> None:
    out, foreign = tmp_path / "out", tmp_path / ".out.partial" / "thesis.txt"
    for path in (out / "manifest.json", foreign):
        path.parent.mkdir()
    foreign.write_text("years of work")
    (out / "manifest.json").write_text('{"nvvl_version": "0"}')
    with (
        pytest.raises(OutputError, match=r"holds files but no journal" if overwrite else "exists"),
        resumable_folder(out, sources=[tmp_path / "source"], overwrite=overwrite) as stage,
    ):
        Journal(stage, {}, [])
    assert foreign.exists()


@pytest.mark.parametrize("text", ['{"manifest_version": 3}', "[1]", "no JSON"])
def test_folder_with_a_manifest_of_something_else_is_not_replaced(
    text: str, tmp_path: Path
) -> None:
    out = tmp_path / "extension"
    out.mkdir()
    (out / "manifest.json").write_text(text)
    with (
        pytest.raises(OutputError, match=r"no manifest\.json of an output of nvvl"),
        staged_folder(out, sources=[], overwrite=True),
    ):
        pytest.fail("work began")
    assert (out / "manifest.json").read_text() == text


@pytest.mark.parametrize("staging", [staged_folder, resumable_folder])
@pytest.mark.parametrize("overwrite", [False, True])
def test_mount_point_is_refused_before_any_work(
    overwrite: bool, staging: Staging, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == out)
    with (
        pytest.raises(OutputError, match=r"out: is a mount point, .*; choose a folder in it"),
        staging(out, sources=[tmp_path / "source"], overwrite=overwrite),
    ):
        pytest.fail("work began")


def test_what_killed_runs_left_is_removed_unless_it_is_finished_or_in_use(tmp_path: Path) -> None:
    folders = {
        name: tmp_path / f".out.partial-{name}"
        for name in ("killed", "finished", "in-use", "just-made")
    }
    other = tmp_path / ".other.partial-killed"
    for folder in (*folders.values(), other):
        (folder / "output").mkdir(parents=True)
        (folder / "output" / "model.safetensors").write_text("half")
    (folders["finished"] / "output" / "manifest.json").write_text("{}")
    for folder in (*folders.values(), other):
        if folder != folders["just-made"]:
            os.utime(folder, (1e9, 1e9))
    with (
        locked(folders["in-use"]),
        staged_folder(tmp_path / "out", sources=[], overwrite=False) as folder,
    ):
        (folder / "file").write_text("whole")
    left = {path.name for path in tmp_path.iterdir()}
    kept = {folders[name].name for name in ("finished", "in-use", "just-made")}
    assert left == {"out", other.name, *kept}


@pytest.mark.parametrize("staging", [staged_folder, resumable_folder])
@pytest.mark.parametrize("reason", ["Device or resource busy", "exists already"])
def test_finished_output_is_kept_if_only_its_name_is_missing(
    staging: Staging, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def busy(*_: object) -> Path:
        raise OSError(errno.EBUSY, reason)

    def write() -> None:
        with staging(out, sources=[tmp_path / "source"], overwrite=False) as stage:
            folder = stage if staging is staged_folder else stage.output
            folder.mkdir(exist_ok=True)
            (folder / "manifest.json").write_text("{}")
            if reason == "exists already":  # since the run began
                out.mkdir()
            else:
                monkeypatch.setattr(Path, "rename", busy)

    with pytest.raises(OutputError, match=rf"out: .*{reason}.*; the finished output is kept as"):
        write()
    assert len(list(tmp_path.glob(".out.partial*/output/manifest.json"))) == 1


@pytest.mark.parametrize("staging", [staged_folder, resumable_folder])
def test_folder_that_may_not_be_entered_is_one_clear_line(
    staging: Staging, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "exists", denied)
    with (
        pytest.raises(OutputError, match=r"out: cannot be written \(Permission denied\)"),
        staging(tmp_path / "out", sources=[tmp_path / "source"], overwrite=False),
    ):
        pytest.fail("work began")


@pytest.mark.parametrize("act", ["open", "unlink", "read_bytes"])
def test_what_another_user_left_is_one_clear_line(
    act: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / ".out.partial"
    folder.mkdir()
    (folder / "journal.jsonl").write_text("{}\n")
    (folder / "activations-00001-0.safetensors").write_text("")
    monkeypatch.setattr(Path, act, denied)
    with (
        pytest.raises(OutputError, match=r"\.out\.partial.*\(Permission denied\)"),
        resumable_folder(tmp_path / "out", sources=[tmp_path / "source"], overwrite=False) as stage,
    ):
        Journal(stage, {}, [])


def test_what_is_read_is_never_replaced(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize_checkpoint(tiny_checkpoint, out, nvfp4_w4a16(), None)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(OutputError, match=r"out: holds .*out, which is read"):
        quantize_checkpoint(
            *(tiny_checkpoint, out, nvfp4_w4a16(), None), from_calibration=out, overwrite=True
        )
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (out / "pictures").mkdir()
    Image.new("RGB", (32, 32)).save(out / "pictures" / "a.png")
    items = load_calibration_set(out / "pictures", num_items=1)
    with pytest.raises(OutputError, match=r"out: holds .*pictures, which is read"):
        quantize_checkpoint(tiny_checkpoint, out, nvfp4(), items, overwrite=True)
    assert (out / "pictures" / "a.png").exists()
