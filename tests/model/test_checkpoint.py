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
from safetensors.torch import save_file

from nvvl.errors import CheckpointError, ConfigError, NvvlError
from nvvl.model.checkpoint import Checkpoint
from nvvl.model.checkpoint_writer import write_safetensors
from nvvl.model.safetensors_io import read_header, read_tensor

INDEX = "model.safetensors.index.json"
NORM = "language_model.backbone.norm_f.weight"


def write_raw(path: Path, header: object, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: object, shape: list[int], start: int, end: int) -> dict[str, object]:
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
        pytest.param(b'{"x":' * 200_000, b"", "header is not JSON", id="nested"),
        pytest.param(
            b"{" + b", ".join(b'"%d": 1' % (n % 60_000) for n in range(60_001)) + b"}",
            b"",
            "names 0 more than once",  # in less than a second: hours where pairs are counted
            id="many names",
        ),
        ({"x": {"dtype": "F32"}}, b"", "x: the header entry lacks"),
        ({"x": [1]}, b"", "x: the header entry lacks"),
        ({"x": entry(["F32"], [1], 0, 4)}, b"0000", r"x: dtype \['F32'\], required one of"),
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
