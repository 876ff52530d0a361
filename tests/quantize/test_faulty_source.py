"""What a broken download does to a run: one line that names the file, exit 2, nothing written."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nvvl.cli import app

INDEX = "model.safetensors.index.json"
NORM = "language_model.backbone.norm_f.weight"


def second_shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[1]


def remove_shard(folder: Path) -> None:
    second_shard(folder).unlink()


def truncate_shard(folder: Path) -> None:
    shard = second_shard(folder)
    shard.write_bytes(shard.read_bytes()[:-1])


def overlap_tensors(folder: Path) -> None:
    """Move the second tensor of a shard onto the first, keeping the length of the header."""
    shard = second_shard(folder)
    data = shard.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    entries = sorted(
        (entry for name, entry in header.items() if name != "__metadata__"),
        key=lambda entry: entry["data_offsets"],
    )
    start, end = entries[1]["data_offsets"]
    entries[1]["data_offsets"] = [start - 2, end - 2]
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    assert len(text) == length
    shard.write_bytes(data[:8] + text + data[8 + length :])


def name_a_ghost(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["ghost.weight"] = index["weight_map"][NORM]
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (remove_shard, (INDEX, "names model-00002-of-", "which the folder lacks")),
        (truncate_shard, ("model-00002-of-", "truncated: the header describes")),
        (overlap_tensors, ("model-00002-of-", "overlaps the tensor before it")),
        (name_a_ghost, (INDEX, "ghost.weight is in no shard")),
    ],
)
def test_faulty_source_is_one_line_and_nothing_is_written(
    damage: Callable[[Path], None],
    parts: tuple[str, ...],
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    source = make_checkpoint(tmp_path / "source", max_shard_bytes=100_000)
    damage(source)
    verbs = [["plan", source], ["quantize", "nvfp4-w4a16", source, tmp_path / "out"]]
    for verb in verbs[1:] if damage is remove_shard else verbs:  # a plan can do without shards
        result = CliRunner().invoke(app, [str(argument) for argument in verb])
        assert result.exit_code == 2, result.output
        # the count of steps that had begun is there too
        (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        for part in (*parts, "download"):
            assert part in line
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
