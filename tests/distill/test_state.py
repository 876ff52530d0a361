"""The saved state: strict, and never half written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nvvl.distill.state import Standing, StateFolder
from nvvl.distill.train_folder import hold_train_folder
from nvvl.errors import CheckpointError, OutputError
from nvvl.model.checkpoint_writer import write_safetensors
from nvvl.model.safetensors_io import read_header, read_tensor

IDENTITY = {"recipe": {"name": "x"}, "teacher": "abc"}
SHAPES = {"a.weight": (4, 3), "b.weight": (3,)}


def make_tensors(fill: float = 1.0) -> dict[str, Tensor]:
    return {name: torch.full(shape, fill) for name, shape in SHAPES.items()}


def save(folder: Path) -> StateFolder:
    state = StateFolder(folder, IDENTITY)
    assert state.open(size_bytes=10, overwrite=False) is False
    state.save(Standing(3, 2.0, 1.0, 3), make_tensors(), make_tensors(7.0))
    return state


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_saved_state_is_loaded_as_it_was(tmp_path: Path) -> None:
    save(tmp_path / "s")
    state = StateFolder(tmp_path / "s", IDENTITY)
    assert state.open(size_bytes=10, overwrite=False) is True
    assert state.standing() == Standing(3, 2.0, 1.0, 3)
    loaded, best = state.load(SHAPES), state.load_best(3, SHAPES)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in make_tensors().items())
    assert all(torch.equal(best[name], tensor) for name, tensor in make_tensors(7.0).items())


def test_nothing_is_read_before_it_is_used(tmp_path: Path, live_memory: Callable[[], Any]) -> None:
    state = save(tmp_path / "s")
    with live_memory() as memory:
        loaded, best = state.load(SHAPES), state.load_best(3, SHAPES)
        assert "b.weight" in loaded
        assert "c.weight" not in best
        assert memory.peak == 0
        assert torch.equal(loaded["b.weight"], torch.ones(3))
        assert memory.peak > 0


def test_best_weights_outlive_later_saves(tmp_path: Path) -> None:
    state = save(tmp_path / "s")
    state.save(Standing(5, 2.0, 1.0, 3), make_tensors(2.0), None)
    assert float(state.load_best(3, SHAPES)["a.weight"][0, 0]) == 7.0
    assert names(state.folder) == [
        "best-000003.safetensors",
        "state.json",
        "step-000005.safetensors",
    ]


def test_the_best_weights_alone_are_kept(tmp_path: Path) -> None:
    state = StateFolder(tmp_path / "s", IDENTITY)
    state.open(size_bytes=10, overwrite=False)
    standing = Standing(0, 5.0)
    kept = []
    for step, loss in enumerate([5.0, 3.0, 4.0, 3.0, 2.0]):  # of equal ones the earlier is better
        standing.step = step
        weights = make_tensors(float(step)) if standing.add(loss) else None
        state.save(standing, make_tensors(), weights)
        kept.append([name for name in names(state.folder) if name.startswith("best")])
    assert kept == [[f"best-00000{step}.safetensors"] for step in (0, 1, 1, 1, 4)]
    assert (standing.best_loss, standing.best_step) == (2.0, 4)
    assert float(state.load_best(4, SHAPES)["b.weight"][0]) == 4


def test_weights_of_another_step_than_was_asked_for_are_refused(tmp_path: Path) -> None:
    state = save(tmp_path / "s")
    write_safetensors(state.folder / "best-000002.safetensors", make_tensors())
    with pytest.raises(CheckpointError, match=r"best-000002\.safetensors: missing or changed"):
        state.load_best(2, SHAPES)


def test_held_folder_goes_when_nothing_is_left_in_it(tmp_path: Path) -> None:
    with hold_train_folder(tmp_path / "out") as folder:
        assert folder == tmp_path / "out.train"
        state = save(folder)
    assert folder.exists()
    with hold_train_folder(tmp_path / "out"):
        state.discard()
    assert not folder.exists()


def test_state_that_an_earlier_version_saved_is_refused_in_one_line(tmp_path: Path) -> None:
    state = save(tmp_path / "s")
    values = json.loads(state.path.read_text())
    values["standing"] = {"step": 3, "start_loss": 2.0, "best": [[1.0, 3]]}
    state.path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="not a training state of nvvl"):
        state.open(size_bytes=10, overwrite=False)


def test_changed_file_is_refused(tmp_path: Path) -> None:
    state = save(tmp_path / "s")
    path = tmp_path / "s" / "step-000003.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="missing or changed"):
        state.load(SHAPES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b.weight": None}, r"b\.weight is missing"),
        ({"c.weight": torch.zeros(1)}, r"c\.weight is unexpected"),
        ({"b.weight": torch.zeros(4)}, r"required float32 \(3,\)"),
        ({"b.weight": torch.zeros(3).double()}, "required float32"),
    ],
)
def test_every_tensor_must_fit(
    change: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    state = save(tmp_path / "s")
    path = tmp_path / "s" / "step-000003.safetensors"
    tensors = {name: read_tensor(info) for name, info in read_header(path).items()}
    for name, tensor in change.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    write_safetensors(path, tensors)
    _accept_files(tmp_path / "s")
    with pytest.raises(CheckpointError, match=message):
        state.load(SHAPES)


def test_run_with_other_settings_is_not_gone_on_with(tmp_path: Path) -> None:
    save(tmp_path / "s")
    other = StateFolder(tmp_path / "s", IDENTITY | {"teacher": "def"})
    with pytest.raises(OutputError, match=r"run with other settings: teacher: .* then, .* now"):
        other.open(size_bytes=10, overwrite=False)
    assert other.open(size_bytes=10, overwrite=True) is False


def test_overwrite_goes_on_with_a_run_of_the_same_settings(tmp_path: Path) -> None:
    save(tmp_path / "s")
    state = StateFolder(tmp_path / "s", IDENTITY)
    assert state.open(size_bytes=10, overwrite=True) is True
    assert state.standing().step == 3
    assert float(state.load_best(3, SHAPES)["a.weight"][0, 0]) == 7.0


@pytest.mark.parametrize("name", ["step-000003.safetensors", "best-000003.safetensors"])
@pytest.mark.parametrize("change", ["missing", "changed"])
def test_overwrite_discards_a_run_whose_files_are_not_whole(
    name: str, change: str, tmp_path: Path
) -> None:
    state = save(tmp_path / "s")
    path = state.folder / name
    data = path.read_bytes()
    path.unlink()
    if change == "changed":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert state.open(size_bytes=10, overwrite=True) is False
    assert names(state.folder) == []


def test_run_of_another_version_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "s")
    monkeypatch.setattr("nvvl.distill.train_folder.library_versions", lambda: {"torch": "9"})
    with pytest.raises(
        OutputError, match=r"with other settings: .*version of torch: .* then, 9 now"
    ):
        StateFolder(tmp_path / "s", IDENTITY).open(size_bytes=10, overwrite=False)


def test_half_a_line_that_a_kill_left_in_the_log_is_dropped(tmp_path: Path) -> None:
    state = save(tmp_path / "s")
    for step in (3, 4):
        state.log({"step": step})
    with state.log_path.open("a") as file:
        file.write('{"step": 5, "lo')
    state.trim_log(3)
    assert state.log_path.read_text() == '{"step": 3}\n'


def test_log_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    state = save(tmp_path / "s")
    state.log_path.mkdir()
    with pytest.raises(OutputError, match=r"log\.jsonl: cannot be written"):
        state.log({"step": 4})


def test_discard_leaves_what_is_not_its_own(tmp_path: Path) -> None:
    save(tmp_path / "s")
    (tmp_path / "s" / "notes.txt").write_text("mine")
    StateFolder(tmp_path / "s", IDENTITY).discard()
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["notes.txt"]


def test_full_disk_is_said_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match="needs 420 bytes, the disk has 10 free"):
        StateFolder(tmp_path / "s", IDENTITY).open(size_bytes=420, overwrite=False)


def test_unreadable_state_is_refused(tmp_path: Path) -> None:
    state = save(tmp_path / "s")
    (tmp_path / "s" / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match="not a training state of nvvl"):
        state.open(size_bytes=10, overwrite=False)
    assert state.open(size_bytes=10, overwrite=True) is False


def _accept_files(folder: Path) -> None:
    """Write the hashes of the files as they are into state.json."""
    import hashlib

    path = folder / "state.json"
    state = json.loads(path.read_text())
    for file in folder.glob("*.safetensors"):
        state["files"][file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    path.write_text(json.dumps(state))
