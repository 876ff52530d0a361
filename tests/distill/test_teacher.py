"""A run that is not the teacher's, or not what its manifest says, is refused."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nvvl.distill.teacher import check_run
from nvvl.errors import CheckpointError, ConfigError
from nvvl.model.checkpoint import Checkpoint

NORM = "language_model.backbone.norm_f.weight"


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


def test_run_of_the_teacher_is_accepted(run: Path, tiny_checkpoint: Path) -> None:
    assert check_run(run, tiny_checkpoint).format == "nvfp4"


def test_other_weights_are_refused(
    run: Path, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    other = make_checkpoint(tmp_path / "other", replace={NORM: torch.ones(64).bfloat16()})
    with pytest.raises(CheckpointError, match=f"was not made from .*other: {NORM} differ"):
        check_run(run, other)


def test_other_architecture_is_refused(
    run: Path, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    other = make_checkpoint(tmp_path / "other", language={"intermediate_size": 64})
    with pytest.raises(ConfigError, match="another language model"):
        check_run(run, other)


def test_other_tokenizer_is_refused(run: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_checkpoint, tmp_path / "other"))
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"</quad>"', '"</quod>"'))
    with pytest.raises(ConfigError, match="another tokenizer"):
        check_run(run, other)


def test_flipped_bit_is_found(copy: Path, tiny_checkpoint: Path) -> None:
    info = Checkpoint(copy).info(NORM)
    data = bytearray(info.file.read_bytes())
    data[info.start] ^= 1
    info.file.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"not what its manifest says: {NORM}"):
        check_run(copy, tiny_checkpoint)


def test_changed_calibration_is_found(copy: Path, tiny_checkpoint: Path) -> None:
    path = copy / "calibration.amax"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"manifest says: calibration\.amax"):
        check_run(copy, tiny_checkpoint)


def test_teacher_and_run_must_not_be_swapped(run: Path, tiny_checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="must be the BF16 checkpoint"):
        check_run(tiny_checkpoint, run)
    with pytest.raises(CheckpointError, match="is not quantized"):
        check_run(tiny_checkpoint, tiny_checkpoint)


def test_run_without_manifest_is_refused(copy: Path, tiny_checkpoint: Path) -> None:
    (copy / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="manifest"):
        check_run(copy, tiny_checkpoint)
