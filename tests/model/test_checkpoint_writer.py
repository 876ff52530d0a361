"""Checkpoints are written tensor by tensor, in any order, to the same bytes."""

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

from nvvl.errors import OutputError
from nvvl.model.checkpoint import Checkpoint, CheckpointWriter, TensorSpec
from nvvl.model.checkpoint_writer import files_bytes, plan_shards, write_safetensors
from nvvl.model.safetensors_io import dtype_name, read_header, read_tensor

INDEX = "model.safetensors.index.json"


GOLDEN = bytes.fromhex("8000000000000000") + (
    b'{"__metadata__":{"format":"pt"},'
    b'"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},'
    b'"b":{"dtype":"BF16","shape":[],"data_offsets":[3,5]}}'
)


def tensors_of_sizes(*sizes: int) -> dict[str, torch.Tensor]:
    return {f"t{i}": torch.full((size,), i, dtype=torch.uint8) for i, size in enumerate(sizes)}


def layout_of(tensors: dict[str, torch.Tensor]) -> list[TensorSpec]:
    return [TensorSpec(n, dtype_name(t.dtype), tuple(t.shape)) for n, t in tensors.items()]


def test_golden_bytes(tmp_path: Path) -> None:
    tensors = {
        "a": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "b": torch.tensor(1.0, dtype=torch.bfloat16),
    }
    header = GOLDEN[8:] + b" " * (-len(GOLDEN[8:]) % 8)
    expected = len(header).to_bytes(8, "little") + header + b"\x01\x02\x03\x80\x3f"
    write_safetensors(tmp_path / "helper.safetensors", tensors)
    with CheckpointWriter(tmp_path, layout_of(tensors)) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.finish()
    assert (tmp_path / "helper.safetensors").read_bytes() == expected
    assert (tmp_path / "model.safetensors").read_bytes() == expected


def test_bytes_equal_the_official_writer_for_the_same_order(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.randn(5, 3), "b.bias": torch.randn(7)}
    write_safetensors(tmp_path / "ours", tensors)
    assert (tmp_path / "ours").read_bytes() == save(tensors, metadata={"format": "pt"})


def test_order_of_writing_does_not_change_the_bytes(tmp_path: Path) -> None:
    tensors = tensors_of_sizes(5, 7, 11, 2)
    for folder, names in (("forth", list(tensors)), ("back", list(tensors)[::-1])):
        with CheckpointWriter(tmp_path / folder, layout_of(tensors), max_shard_bytes=12) as writer:
            digests = {name: writer.write(name, tensors[name]) for name in names}
            writer.finish()
        assert digests["t1"] == hashlib.sha256(b"\x01" * 7).hexdigest()
    forth = {path.name: path.read_bytes() for path in (tmp_path / "forth").iterdir()}
    assert forth == {path.name: path.read_bytes() for path in (tmp_path / "back").iterdir()}


def test_shards_are_filled_in_order_and_indexed(tmp_path: Path) -> None:
    tensors = tensors_of_sizes(5, 7, 30, 2)
    with CheckpointWriter(tmp_path, layout_of(tensors), max_shard_bytes=12) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.finish()
        assert writer.files_bytes() == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert json.loads((tmp_path / INDEX).read_text()) == {
        "metadata": {"total_size": 44},
        "weight_map": {
            "t0": "model-00001-of-00003.safetensors",
            "t1": "model-00001-of-00003.safetensors",
            "t2": "model-00002-of-00003.safetensors",
            "t3": "model-00003-of-00003.safetensors",
        },
    }
    with safe_open(tmp_path / "model-00001-of-00003.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_tensor("t1").equal(tensors["t1"])


def test_planned_bytes_are_known_without_writing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tiny_checkpoint)
    layout = [TensorSpec(i.name, i.dtype, i.shape) for i in checkpoint.tensors.values()]
    with CheckpointWriter(tmp_path / "copy", layout) as writer:
        for name in checkpoint.tensors:
            writer.write(name, checkpoint.load(name))
        writer.finish()
    written = [path.stat().st_size for path in (tmp_path / "copy").iterdir()]
    assert files_bytes(plan_shards(layout)) == sum(written)


def test_a_single_file_has_an_index_too(tmp_path: Path) -> None:
    # else servers take other safetensors files of the folder for weights
    with CheckpointWriter(tmp_path, [TensorSpec("x", "U8", (3,))]) as writer:
        writer.write("x", torch.zeros(3, dtype=torch.uint8))
        writer.finish()
    assert json.loads((tmp_path / INDEX).read_text())["weight_map"] == {"x": "model.safetensors"}


def test_strided_tensor_is_written_row_major(tmp_path: Path) -> None:
    tensor = torch.arange(6.0).reshape(2, 3).T
    with CheckpointWriter(tmp_path, [TensorSpec("x", "F32", (3, 2))]) as writer:
        writer.write("x", tensor)
        writer.finish()
    assert read_tensor(read_header(tmp_path / "model.safetensors")["x"]).equal(tensor)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("z", torch.zeros(2), "z: not in the layout"),
        ("x", torch.zeros(3), r"x: required F32 of shape \(2,\), got F32 of \(3,\)"),
        ("x", torch.zeros(2).half(), r"x: required F32 of shape \(2,\), got F16"),
        ("y", torch.zeros(1), "y: written already"),
        ("x", torch.zeros(2, dtype=torch.complex64), "dtype torch.complex64: required one of"),
    ],
)
def test_tensor_that_does_not_fit_the_layout_is_refused(
    name: str, tensor: torch.Tensor, message: str, tmp_path: Path
) -> None:
    layout = [TensorSpec("x", "F32", (2,)), TensorSpec("y", "F32", (1,))]
    with CheckpointWriter(tmp_path, layout) as writer:
        writer.write("y", torch.zeros(1))
        with pytest.raises(ValueError, match=message):
            writer.write(name, tensor)


def test_layout_names_each_tensor_once() -> None:
    with pytest.raises(ValueError, match="each name once"):
        plan_shards([TensorSpec("x", "F32", (2,))] * 2)


def test_unfinished_checkpoint_does_not_look_like_one(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path, layout_of(tensors_of_sizes(4, 4))) as writer:
        writer.write("t1", torch.full((4,), 1, dtype=torch.uint8))
        with pytest.raises(ValueError, match="1 tensors were not written: t0"):
            writer.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors.partial"]


def test_resumed_run_gives_the_same_bytes_and_keeps_what_was_written(tmp_path: Path) -> None:
    tensors = tensors_of_sizes(5, 7, 11)
    layout = layout_of(tensors)
    for folder in ("whole", "killed"):
        with CheckpointWriter(tmp_path / folder, layout, max_shard_bytes=12) as writer:
            digests = {name: writer.write(name, tensors[name]) for name in ("t0", "t1")}
            if folder == "whole":
                writer.write("t2", tensors["t2"])
                writer.finish()
    # a byte that never reached the disk: its tensor does not count as written
    partial = tmp_path / "killed" / "model-00001-of-00002.safetensors.partial"
    data = bytearray(partial.read_bytes())
    data[-1] ^= 1
    partial.write_bytes(data)
    with CheckpointWriter(
        tmp_path / "killed", layout, max_shard_bytes=12, resume=digests
    ) as writer:
        assert writer.written == {"t0"}
        for name in ("t1", "t2"):
            writer.write(name, tensors[name])
        writer.finish()
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert whole == {path.name: path.read_bytes() for path in (tmp_path / "killed").iterdir()}


def test_run_killed_while_finishing_is_resumed(tmp_path: Path) -> None:
    tensors = tensors_of_sizes(5, 11)
    with CheckpointWriter(tmp_path, layout_of(tensors), max_shard_bytes=12) as writer:
        digests = {name: writer.write(name, tensor) for name, tensor in tensors.items()}
    first = tmp_path / "model-00001-of-00002.safetensors"
    first.with_name(first.name + ".partial").rename(first)
    with CheckpointWriter(
        tmp_path, layout_of(tensors), max_shard_bytes=12, resume=digests
    ) as writer:
        assert writer.written == {"t0", "t1"}
        writer.finish()
    assert first.exists()
    assert (tmp_path / INDEX).exists()


def test_resume_with_another_layout_starts_over(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path, [TensorSpec("x", "F32", (2,))]) as writer:
        digest = writer.write("x", torch.ones(2))
    with CheckpointWriter(tmp_path, [TensorSpec("x", "F16", (2,))], resume={"x": digest}) as writer:
        assert writer.written == set()
        writer.write("x", torch.ones(2).half())
        writer.finish()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == writer.files_bytes()


def test_too_small_a_disk_is_refused_before_writing(tmp_path: Path) -> None:
    layout = [TensorSpec("x", "F32", (10**15,))]
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(OutputError, match=r"needs 4000000000000\d{3} bytes, the disk has \d+ free"):
        CheckpointWriter(tmp_path, layout)
    assert list(tmp_path.iterdir()) == []
    assert free > 0


def test_disk_that_fills_up_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with CheckpointWriter(tmp_path, [TensorSpec("x", "F32", (2,))]) as writer:
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(OutputError, match=r"the disk is full: 8 bytes to write, .* free space"):
            writer.write("x", torch.zeros(2))


def test_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file/out: cannot be written"):
        CheckpointWriter(tmp_path / "file" / "out", [TensorSpec("x", "F32", (2,))])
