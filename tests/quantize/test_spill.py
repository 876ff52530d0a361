"""Spilled items come back as they were, or not at all."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nvvl.errors import OutputError
from nvvl.quantize.spill import Spill, SpillFolder, SpillWriter, open_spill

TENSORS = {
    "hidden.0": torch.arange(12, dtype=torch.bfloat16).reshape(1, 4, 3),
    "ids.0": torch.tensor([[3, 1, 2]]),
    "hidden.1": torch.empty((1, 0, 3), dtype=torch.bfloat16),
}


def write(path: Path) -> str:
    writer = SpillWriter(path, num_tensors=len(TENSORS))
    for name, tensor in TENSORS.items():
        writer.add(name, tensor)
        assert not path.exists()
    sha256 = writer.close()
    assert path.stat().st_size == writer.size_bytes
    return sha256


def test_tensors_come_back_and_the_official_library_reads_them(tmp_path: Path) -> None:
    sha256 = write(tmp_path / "a.safetensors")
    spill = open_spill(tmp_path / "a.safetensors", sha256)
    assert spill is not None
    assert spill.names() == set(TENSORS)
    official = load_file(tmp_path / "a.safetensors")
    for name, tensor in TENSORS.items():
        assert torch.equal(spill.load(name), tensor)
        assert torch.equal(official[name], tensor)
        assert spill.size_bytes(name) == tensor.nbytes
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_half_written_files_of_other_processes_are_dropped(tmp_path: Path) -> None:
    names = ["activations-00003-0.safetensors", "activations-00003-2.safetensors.partial"]
    later = "activations-00004-2.safetensors.partial"
    for name in (*names, later):
        (tmp_path / name).write_bytes(b"")
    SpillFolder(tmp_path, index=0).drop(before=4, every_process=True)
    assert [path.name for path in tmp_path.iterdir()] == [later]


def test_same_tensors_give_the_same_hash_and_others_another(tmp_path: Path) -> None:
    sha256 = write(tmp_path / "a")
    assert write(tmp_path / "b") == sha256 == Spill(tmp_path / "a").sha256()
    writer = SpillWriter(tmp_path / "c", num_tensors=3)
    for name, tensor in TENSORS.items():
        writer.add(name, tensor + 1)
    assert writer.close() != sha256


@pytest.mark.parametrize("fault", ["missing", "flipped", "cut", "other hash"])
def test_faulty_file_is_no_spill(fault: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    sha256 = write(path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    if fault == "missing":
        path.unlink()
    elif fault == "other hash":
        sha256 = "0" * 64
    else:
        path.write_bytes(data if fault == "flipped" else data[:-1])
    assert open_spill(path, sha256) is None


def test_full_disk_is_an_error_at_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = SpillWriter(tmp_path / "a", num_tensors=2)
    monkeypatch.setattr(os, "pwrite", fail)
    writer.add("hidden.0", TENSORS["hidden.0"])
    with pytest.raises(OutputError, match=r"a: the disk is full: 24 bytes to write"):
        writer.add("ids.0", TENSORS["ids.0"])
    writer.abandon()
    writer.abandon()
    assert list(tmp_path.iterdir()) == []
