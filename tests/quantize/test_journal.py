"""The record of finished blocks: what it says, and what the disk and other files do to it."""

import json
import os
import resource
from pathlib import Path

import pytest

from nvvl.errors import OutputError
from nvvl.quantize.journal import BlockRecord, Journal, read_journal
from nvvl.quantize.manifest import encode_json
from nvvl.staging import Stage


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
