"""The record of finished blocks: what it says, and what the disk and other files do to it."""

import errno
import json
import os
import resource
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nvvl.errors import CheckpointError, OutputError
from nvvl.model import scan as scan_module
from nvvl.model.checkpoint import Checkpoint
from nvvl.quantize import journal as journal_module
from nvvl.quantize.journal import (
    BlockRecord,
    Journal,
    describe_arithmetic,
    describe_run,
    read_journal,
)
from nvvl.quantize.manifest import encode_json, hash_files
from nvvl.quantize.presets import nvfp4
from nvvl.quantize.staging import Stage


def block_record(item_id: str) -> BlockRecord:
    return BlockRecord(block="mlp1", source={}, written={}, amaxes={}, items=[(item_id, "0" * 64)])


def test_names_of_files_that_are_not_utf8_come_back(tmp_path: Path) -> None:
    name = os.fsdecode(b"id\xe9.png")
    with Journal(Stage(tmp_path), {f"source {name}": name}, []) as journal:
        journal.append(block_record(name))
    identity, blocks, _ = read_journal(tmp_path / "journal.jsonl")
    assert identity == {f"source {name}": name}
    assert [block.items for block in blocks] == [block_record(name).items]
    assert json.loads(encode_json({name: name})) == {name: name}


def test_disk_that_fills_up_within_a_line_is_one_clear_error(tmp_path: Path) -> None:
    journal = Journal(Stage(tmp_path), {}, [])
    path = tmp_path / "journal.jsonl"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, before[1]))
    try:
        with pytest.raises(OutputError, match=r"cannot be written \(File too large\)"), journal:
            journal.append(block_record("x"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == b'{}\n{"blo'
    assert read_journal(path) == ({}, [], 3)


def test_arithmetic_is_told_by_what_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(scan_module, "load_scan", object)
    monkeypatch.setattr(journal_module, "has_fast_bf16", lambda: False)
    monkeypatch.setattr(journal_module, "describe_cpu", lambda: "model name\t: Some CPU")
    assert describe_arithmetic(cpu) == {
        "processor": torch.backends.cpu.get_cpu_capability(),
        "processor model": "Some CPU (beff5bd4)",
        "products": "float32",
        "Mamba2 scan": "compiled",
    }
    monkeypatch.setenv("NVVL_KERNELS", "plain")
    assert describe_arithmetic(cpu)["Mamba2 scan"] == "torch"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"name of {device}")
    assert describe_arithmetic(torch.device("cuda:1")) == {"GPU": "name of cuda:1"}


def test_processors_of_one_name_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def name_one_with(flags: str) -> str:
        described = f"x86_64\nflags\t: {flags}\nmodel\t: 17\nmodel name\t: AMD EPYC\nvendor_id\t: x"
        monkeypatch.setattr(journal_module, "describe_cpu", lambda: described)
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

    monkeypatch.setattr(journal_module, "hash_file", denied)
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read \(Permission denied"):
        describe_run(checkpoint, nvfp4(), device="cpu")
