"""What `nvvl quantize` cannot use: one line each, exit 2, and nothing is written."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from nvvl.cli import app

MakeCheckpoint = Callable[..., Path]

UP_PROJ = "language_model.backbone.layers.1.mixer.up_proj.weight"


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def without_key(make: MakeCheckpoint, folder: Path) -> Path:
    make(folder)
    change_config(folder, norm_mean=None)
    return folder


def of_another_architecture(make: MakeCheckpoint, folder: Path) -> Path:
    make(folder)
    change_config(folder, architectures=["LlamaForCausalLM"], model_type="llama")
    return folder


def not_json(make: MakeCheckpoint, folder: Path) -> Path:
    make(folder)
    (folder / "config.json").write_text("{")
    return folder


def without_a_tensor(make: MakeCheckpoint, folder: Path) -> Path:
    return make(folder, replace={UP_PROJ: None})


def of_another_shape(make: MakeCheckpoint, folder: Path) -> Path:
    return make(folder, replace={UP_PROJ: torch.zeros(64, 64)})


def of_another_dtype(make: MakeCheckpoint, folder: Path) -> Path:
    return make(folder, replace={UP_PROJ: torch.zeros(128, 64, dtype=torch.uint8)})


def with_nan(make: MakeCheckpoint, folder: Path) -> Path:
    return make(folder, replace={UP_PROJ: torch.full((128, 64), math.nan)})


def with_odd_width(make: MakeCheckpoint, folder: Path) -> Path:
    return make(folder, language={"intermediate_size": 120})


CASES = [
    (without_key, "config.json: missing norm_mean", "config.json that it was released with"),
    (of_another_architecture, "required architecture NemotronH", "MODEL must be a checkpoint of"),
    (not_json, "config.json: not valid JSON", "download it again"),
    (without_a_tensor, f"{UP_PROJ} is missing", "download it again"),
    (of_another_shape, "has shape (64, 64), required (128, 64)", "download it again"),
    (of_another_dtype, f"{UP_PROJ}: required one of BF16", "give the BF16 checkpoint"),
    (with_nan, f"{UP_PROJ}: holds NaN or Inf", "download it again"),
    (with_odd_width, "down_proj: NVFP4 needs in_features divisible by 16, got 120", "put a rule"),
]


@pytest.mark.parametrize(
    ("make", "fault", "way_out"), CASES, ids=[case[0].__name__ for case in CASES]
)
def test_unusable_model_is_one_line_and_nothing_is_written(
    make: Callable[[MakeCheckpoint, Path], Path],
    fault: str,
    way_out: str,
    make_checkpoint: MakeCheckpoint,
    tmp_path: Path,
) -> None:
    source = make(make_checkpoint, tmp_path / "source")
    command = ["quantize", "nvfp4", source, tmp_path / "out", "--samples", "2", "--device", "cpu"]
    result = CliRunner().invoke(app, [str(argument) for argument in command])
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert fault in line
    assert way_out in line
    assert str(source) in line or make is with_odd_width  # which names a linear, and a rule for it
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--calib", "{folder}/empty"], "empty: required at least one image"),
        (["--calib", "{folder}/nowhere"], "nowhere"),
        (["--samples", "0"], "--samples"),
        (["--memory", "1MB"], "--memory: allowed 0.0 GB, the run takes at least"),
        (["--recipe", "{folder}/nowhere.toml"], "nowhere.toml"),
    ],
)
def test_unusable_option_is_one_line_and_nothing_is_written(
    options: list[str], part: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    given = [option.format(folder=tmp_path) for option in options]
    command = ["quantize", "nvfp4", tiny_checkpoint, tmp_path / "out", "--device", "cpu", *given]
    result = CliRunner().invoke(app, [str(argument) for argument in command])
    assert result.exit_code == 2, result.output
    assert part in result.stderr
    assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
