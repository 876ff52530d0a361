"""The saved state: strict, and never half written."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nvvl.distill.state import Standing, StateFolder
from nvvl.errors import CheckpointError, OutputError
from nvvl.model.checkpoint_writer import write_safetensors
from nvvl.model.safetensors_io import read_header, read_tensor

IDENTITY = {"recipe": {"name": "x"}, "teacher": "abc"}


def make_masters(fill: float = 1.0) -> dict[str, Tensor]:
    return {
        "a.weight": torch.full((4, 3), fill).requires_grad_(),
        "b.weight": torch.full((3,), -fill).requires_grad_(),
    }


def train(masters: dict[str, Tensor], optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        for master in masters.values():
            master.grad = torch.full_like(master, 0.1 * (step + 1))
        optimizer.step()


def save(folder: Path) -> tuple[dict[str, Tensor], torch.optim.Optimizer]:
    masters = make_masters()
    optimizer = torch.optim.AdamW(masters.values())
    train(masters, optimizer, 3)
    state = StateFolder(folder, IDENTITY)
    assert state.open(masters, overwrite=False) is False
    state.save(Standing(3, 2.0, 1.0, 3), masters, optimizer)
    return masters, optimizer


def test_loaded_state_goes_on_bit_for_bit(tmp_path: Path) -> None:
    masters, optimizer = save(tmp_path / "s")
    state = StateFolder(tmp_path / "s", IDENTITY)
    loaded = make_masters(9.0)
    other = torch.optim.AdamW(loaded.values())
    assert state.open(loaded, overwrite=False) is True
    assert state.load(loaded, other) == Standing(3, 2.0, 1.0, 3)
    train(masters, optimizer, 2)
    train(loaded, other, 2)
    assert all(torch.equal(masters[name], loaded[name]) for name in masters)


def test_best_weights_outlive_later_saves(tmp_path: Path) -> None:
    masters, optimizer = save(tmp_path / "s")
    best = {name: master.detach().clone() for name, master in masters.items()}
    train(masters, optimizer, 2)
    state = StateFolder(tmp_path / "s", IDENTITY)
    state.save(Standing(5, 2.0, 1.0, 3), masters, optimizer)
    state.load_best(masters)
    assert all(torch.equal(masters[name], best[name]) for name in best)
    assert sorted(path.name for path in state.folder.iterdir()) == [
        "best-000003.safetensors",
        "state.json",
        "step-000005.safetensors",
    ]


def test_changed_file_is_refused(tmp_path: Path) -> None:
    masters, optimizer = save(tmp_path / "s")
    path = tmp_path / "s" / "step-000003.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="missing or changed"):
        StateFolder(tmp_path / "s", IDENTITY).load(masters, optimizer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exp_avg.b.weight": None}, r"exp_avg\.b\.weight is missing"),
        ({"master.c.weight": torch.zeros(1)}, r"master\.c\.weight is unexpected"),
        ({"master.b.weight": torch.zeros(4)}, r"required float32 \(3,\)"),
        ({"master.b.weight": torch.zeros(3).double()}, "required float32"),
    ],
)
def test_every_tensor_must_fit(
    change: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    masters, optimizer = save(tmp_path / "s")
    path = tmp_path / "s" / "step-000003.safetensors"
    tensors = {name: read_tensor(info) for name, info in read_header(path).items()}
    for name, tensor in change.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    write_safetensors(path, tensors)
    _accept_files(tmp_path / "s")
    with pytest.raises(CheckpointError, match=message):
        StateFolder(tmp_path / "s", IDENTITY).load(masters, optimizer)


def test_run_with_other_settings_is_not_gone_on_with(tmp_path: Path) -> None:
    masters, _ = save(tmp_path / "s")
    other = StateFolder(tmp_path / "s", IDENTITY | {"teacher": "def"})
    with pytest.raises(OutputError, match="holds a run with another teacher"):
        other.open(masters, overwrite=False)
    assert other.open(masters, overwrite=True) is False


def test_discard_leaves_what_is_not_its_own(tmp_path: Path) -> None:
    save(tmp_path / "s")
    (tmp_path / "s" / "notes.txt").write_text("mine")
    StateFolder(tmp_path / "s", IDENTITY).discard()
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["notes.txt"]


def test_full_disk_is_said_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("nvvl.distill.state.shutil.disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match="needs 420 bytes, the disk has 10 free"):
        StateFolder(tmp_path / "s", IDENTITY).open(make_masters(), overwrite=False)


def test_unreadable_state_is_refused(tmp_path: Path) -> None:
    masters, _ = save(tmp_path / "s")
    (tmp_path / "s" / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match="not a training state of nvvl"):
        StateFolder(tmp_path / "s", IDENTITY).open(masters, overwrite=False)


def _accept_files(folder: Path) -> None:
    """Write the hashes of the files as they are into state.json."""
    import hashlib

    path = folder / "state.json"
    state = json.loads(path.read_text())
    for file in folder.glob("*.safetensors"):
        state["files"][file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    path.write_text(json.dumps(state))
