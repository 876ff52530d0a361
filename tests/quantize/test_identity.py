"""What a run is made from, and what computes it: told apart by words that a journal keeps."""

import errno
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nvvl import cpu
from nvvl.errors import CheckpointError
from nvvl.model import scan as scan_module
from nvvl.model.checkpoint import Checkpoint
from nvvl.quantize import identity as identity_module
from nvvl.quantize.identity import describe_arithmetic, describe_run
from nvvl.quantize.manifest import hash_files
from nvvl.quantize.presets import nvfp4


def test_arithmetic_is_told_by_what_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    monkeypatch.setattr(
        scan_module, "load_scans", lambda: {"avx2": SimpleNamespace(variant="avx2")}
    )
    monkeypatch.setattr(identity_module, "has_fast_bf16", lambda: False)
    monkeypatch.setattr(cpu, "describe_cpu", lambda: "model name\t: Some CPU")
    assert describe_arithmetic(device) == {
        "processor": torch.backends.cpu.get_cpu_capability(),
        "processor model": "Some CPU (beff5bd4)",
        "products": "float32",
        "Mamba2 scan": "compiled, avx2",
    }
    monkeypatch.setenv("NVVL_KERNELS", "plain")
    assert describe_arithmetic(device)["Mamba2 scan"] == "torch"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"name of {device}")
    assert describe_arithmetic(torch.device("cuda:1")) == {"GPU": "name of cuda:1"}


def test_processors_of_one_name_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity_module, "has_fast_bf16", lambda: False)  # kept for a process

    def name_one_with(flags: str) -> str:
        described = f"x86_64\nflags\t: {flags}\nmodel\t: 17\nmodel name\t: AMD EPYC\nvendor_id\t: x"
        monkeypatch.setattr(cpu, "describe_cpu", lambda: described)
        return describe_arithmetic(torch.device("cpu"))["processor model"]

    names = [name_one_with(flags) for flags in ("avx2", "avx2 avx512f", "avx2")]
    assert names[0] == names[2] != names[1]
    assert [name.partition(" (")[0] for name in names] == ["AMD EPYC"] * 3


def test_large_file_beside_the_weights_is_hashed_in_little_memory(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = make_checkpoint(tmp_path / "source")
    with (source / "notes.txt").open("wb") as file:
        file.truncate(32 * 2**20)
    checkpoint = Checkpoint(source)
    tracemalloc.start()
    try:
        identity = describe_run(checkpoint, nvfp4(), device="cpu")
        hashes = hash_files(source)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert identity["source notes.txt"] == hashes["notes.txt"]
    assert peak_bytes < 4 * 2**20


def test_side_file_that_cannot_be_read_is_named(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(tiny_checkpoint)

    def denied(_: Path) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(identity_module, "hash_file", denied)
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read \(Permission denied"):
        describe_run(checkpoint, nvfp4(), device="cpu")
