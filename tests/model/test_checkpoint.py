import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save, save_file

from nvvl.errors import CheckpointError, ConfigError, NvvlError, OutputError
from nvvl.model.checkpoint import Checkpoint, CheckpointWriter, TensorSpec
from nvvl.model.checkpoint_writer import files_bytes, plan_shards, write_safetensors
from nvvl.model.safetensors_io import dtype_name, read_header, read_tensor

INDEX = "model.safetensors.index.json"
NORM = "language_model.backbone.norm_f.weight"


def write_raw(path: Path, header: object, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def copy_folder(source: Path, destination: Path) -> Path:
    return Path(shutil.copytree(source, destination))


@pytest.fixture
def sharded(make_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "sharded", max_shard_bytes=150_000)


# --- reading one file ---------------------------------------------------------------------------


def test_header_gives_dtype_shape_and_byte_range(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.arange(6, dtype=torch.float32).reshape(2, 3)}, path)
    info = read_header(path)["x"]
    assert (info.dtype, info.shape, info.nbytes, info.numel) == ("F32", (2, 3), 24, 6)
    assert path.read_bytes()[info.start : info.end] == torch.arange(6.0).numpy().tobytes()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor([True, False]),
        torch.arange(5, dtype=torch.uint8),
        torch.arange(5, dtype=torch.int8),
        torch.tensor([1.0, -448.0]).to(torch.float8_e4m3fn),
        torch.tensor([1.0, 2.0]).to(torch.float8_e5m2),
        torch.arange(4, dtype=torch.int16),
        torch.randn(3, 2).half(),
        torch.randn(3, 2).bfloat16(),
        torch.arange(4, dtype=torch.int32),
        torch.randn(3, 2),
        torch.arange(4),
        torch.randn(3, 2).double(),
        torch.tensor(1.5),
        torch.empty(0, 4),
    ],
    ids=lambda t: f"{t.dtype}-{tuple(t.shape)}",
)
def test_every_dtype_is_read_as_the_official_library_wrote_it(
    tensor: torch.Tensor, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    # an odd number of bytes before it, so that the tensor is not aligned in the file
    write_safetensors(path, {"odd": torch.zeros(3, dtype=torch.uint8), "x": tensor})
    with safe_open(path, "pt") as file:
        official = file.get_tensor("x")
    for loaded in (official, read_tensor(read_header(path)["x"])):
        assert loaded.dtype == tensor.dtype
        assert loaded.shape == tensor.shape
        assert loaded.view(-1).view(torch.uint8).equal(tensor.view(-1).view(torch.uint8))


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"{nonsense", b"", "header is not JSON"),
        (b"[1, 2]", b"", "not a JSON object"),
        (b'{"x": 1, "x": 2}', b"", "names x more than once"),
        (b'{"x": "\xff"}', b"", "header is not JSON"),
        ({"x": {"dtype": "F32"}}, b"", "x: the header entry lacks"),
        ({"x": [1]}, b"", "x: the header entry lacks"),
        ({"x": entry("F31", [1], 0, 4)}, b"0000", "x: dtype 'F31', required one of"),
        ({"x": entry("F32", [-1], 0, 4)}, b"0000", "x: shape .* are not sizes"),
        ({"x": entry("F32", [1], -4, 0)}, b"0000", "are not sizes"),
        ({"x": entry("F32", [2], 0, 4)}, b"0000", r"F32 of shape \[2\] needs 8 bytes.* hold 4"),
        (
            {"x": entry("F32", [1], 0, 4), "y": entry("F32", [1], 2, 6)},
            b"000000",
            "y overlaps the tensor before it",
        ),
        (
            {"x": entry("F32", [1], 0, 4), "y": entry("F32", [1], 8, 12)},
            b"0" * 12,
            "y leaves a hole",
        ),
        ({"x": entry("F32", [1], 4, 8)}, b"0" * 8, "x leaves a hole"),
        ({"x": entry("F32", [2], 0, 8)}, b"0000", "truncated: .* download it again"),
        ({"x": entry("F32", [1], 0, 4)}, b"0" * 5, "bytes after the last tensor"),
    ],
)
def test_malformed_file_is_refused_by_name(
    header: object, data: bytes, message: str, tmp_path: Path
) -> None:
    path = write_raw(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert "bad.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"1234567", b"\xff" * 8 + b"{}", b"version https://git-lfs.github.com/spec/v1\n"],
    ids=["empty", "shorter than the length", "length beyond the file", "git lfs pointer"],
)
def test_what_is_not_safetensors_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="not a safetensors file, or a truncated one"):
        read_header(path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.safetensors: cannot be read"):
        read_header(tmp_path / "none.safetensors")


def test_file_cut_short_after_opening_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(1000)}, path)
    info = read_header(path)["x"]
    os.truncate(path, 500)
    with pytest.raises(CheckpointError, match="x: the file ends after 500 bytes"):
        read_tensor(info)


# --- reading a folder ---------------------------------------------------------------------------


def test_tensors_of_a_folder_equal_the_official_reading(sharded: Path) -> None:
    checkpoint = Checkpoint(sharded)
    assert list(checkpoint.tensors) == sorted(checkpoint.tensors)
    shards = sorted(sharded.glob("model-*.safetensors"))
    assert len(shards) > 2
    seen = 0
    for shard in shards:
        with safe_open(shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118  (safe_open is not a mapping)
                assert checkpoint.load(name).equal(file.get_tensor(name))
                seen += 1
    assert seen == len(checkpoint.tensors)


def test_bytes_and_hash_are_those_of_the_tensor(tiny_checkpoint: Path) -> None:
    checkpoint = Checkpoint(tiny_checkpoint)
    for name in (NORM, "language_model.backbone.layers.0.mixer.A_log"):
        raw = checkpoint.load(name).view(torch.uint8).numpy().tobytes()
        assert bytes(checkpoint.read_bytes(name)) == raw
        assert checkpoint.sha256(name) == hashlib.sha256(raw).hexdigest()


def test_single_file_and_shards_hold_the_same_tensors(tiny_checkpoint: Path, sharded: Path) -> None:
    one, many = Checkpoint(tiny_checkpoint), Checkpoint(sharded)
    assert one.tensors.keys() == many.tensors.keys()
    assert all(one.sha256(name) == many.sha256(name) for name in one.tensors)


def test_radio_token_counts_come_from_the_tensors(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    generator = "vision_model.radio_model.model.patch_generator"
    folder = make_checkpoint(
        tmp_path / "x",
        replace={
            f"{generator}.cls_token.token": torch.zeros(7, 64),
            f"{generator}.pos_embed": torch.zeros(1, 49, 64),
            "vision_model.radio_model.summary_idxs": torch.arange(3),
        },
    )
    vision = Checkpoint(folder).config.vision
    assert (vision.num_prefix_tokens, vision.num_positions, vision.num_summary_idxs) == (7, 49, 3)


@pytest.mark.parametrize(
    ("leaf", "tensor", "message"),
    [
        ("cls_token.token", None, "no tensor named .*cls_token.token"),
        ("pos_embed", None, "no tensor named .*pos_embed"),
        ("pos_embed", torch.zeros(64, 64), "pos_embed: required 3 dimensions"),
        ("pos_embed", torch.zeros(1, 63, 64), "pos_embed: required a square number .* got 63"),
    ],
)
def test_tensors_that_settle_the_config_must_be_there(
    leaf: str,
    tensor: torch.Tensor | None,
    message: str,
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    name = f"vision_model.radio_model.model.patch_generator.{leaf}"
    folder = make_checkpoint(tmp_path / "x", replace={name: tensor})
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(folder)


def test_symlinked_files_are_followed(tiny_checkpoint: Path, tmp_path: Path) -> None:
    for path in tiny_checkpoint.iterdir():
        (tmp_path / path.name).symlink_to(path)
    assert Checkpoint(tmp_path).sha256(NORM) == Checkpoint(tiny_checkpoint).sha256(NORM)


def test_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"MODEL must be a folder that holds config\.json"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "error"), [("config.json", ConfigError), (INDEX, CheckpointError)]
)
def test_file_that_cannot_be_opened_is_named(
    name: str, error: type[NvvlError], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = copy_folder(tiny_checkpoint, tmp_path / "copy")
    (folder / name).unlink()
    (folder / name).mkdir()  # root may read whatever file there is
    with pytest.raises(error, match=rf"{name}: cannot be read \(Is a directory\)"):
        Checkpoint(folder)


def edit_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def remove_index(folder: Path) -> None:
    (folder / INDEX).unlink()


def remove_shard(folder: Path) -> None:
    sorted(folder.glob("model-*"))[1].unlink()


def add_stray_shard(folder: Path) -> None:
    shutil.copy(sorted(folder.glob("model-*"))[0], folder / "model.safetensors")


def forget_tensor(folder: Path) -> None:
    edit_index(folder, lambda names: names.pop(NORM))


def invent_tensor(folder: Path) -> None:
    edit_index(folder, lambda names: names.update(ghost=names[NORM]))


def swap_shard(folder: Path) -> None:
    def change(names: dict[str, str]) -> None:
        names[NORM] = next(shard for shard in names.values() if shard != names[NORM])

    edit_index(folder, change)


def duplicate_tensor(folder: Path) -> None:
    shards = sorted(folder.glob("model-*.safetensors"))
    with safe_open(shards[0], "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors[NORM] = torch.ones(64)
    save_file(tensors, shards[0])


def point_outside(folder: Path) -> None:
    edit_index(folder, lambda names: names.update({NORM: "../other.safetensors"}))


def break_index(folder: Path) -> None:
    (folder / INDEX).write_text("{")


def empty_index(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": {}}')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_index, "required model.safetensors alone, or .*index.json with its shards; got"),
        (remove_shard, "names model-00002-of-.*, which the folder lacks"),
        (add_stray_shard, "model.safetensors is not in model.safetensors.index.json"),
        (forget_tensor, f"{NORM} of model-.* is not in the index"),
        (invent_tensor, "ghost is in no shard"),
        (swap_shard, f"{NORM} is in model-.*, the index says model-"),
        (duplicate_tensor, f"{NORM} is in 2 shards"),
        (point_outside, f"{NORM}: '../other.safetensors' is not a file name"),
        (break_index, "index.json: not JSON"),
        (empty_index, "weight_map is missing or empty"),
    ],
)
def test_index_and_shards_must_agree(
    damage: Callable[[Path], None], message: str, sharded: Path
) -> None:
    damage(sharded)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint(sharded)
    assert "\n" not in str(caught.value)


def test_headers_are_read_without_torch(tiny_checkpoint: Path) -> None:
    code = (
        "import sys; from nvvl.model.checkpoint import Checkpoint; from pathlib import Path;"
        "Checkpoint(Path(sys.argv[1])); print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tiny_checkpoint)]
    assert subprocess.run(command, check=True, capture_output=True).stdout == b"False\n"


# --- writing ------------------------------------------------------------------------------------

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
