"""Targets and precisions: what is possible is let through, all else is refused with the table."""

import re
import sys
from typing import Any

import pytest

from nvvl.errors import EngineError, HardwareError
from nvvl.export import engine_targets
from nvvl.export.engine_targets import (
    TENSORRT,
    TENSORRT_RTX,
    Precision,
    choose_builder,
    find_gpu_target,
    require_targets,
)


@pytest.mark.parametrize(
    ("precision", "targets"),
    [
        ("fp32", "sm80 sm86 sm89 sm120 sm121"),
        ("bf16", "sm80 sm86 sm89 sm120 sm121"),
        ("fp8", "sm89 sm120 sm121"),
        ("nvfp4", "sm120 sm121"),
    ],
)
def test_rtx_builds_exactly_these(precision: Precision, targets: str) -> None:
    possible = targets.split()
    require_targets(TENSORRT_RTX, possible, [precision])
    for target in set(TENSORRT_RTX.all_targets) - set(possible):
        message = f"--target {target}: it has no {precision}.*fp8 for sm89, sm120, sm121"
        with pytest.raises(EngineError, match=message):
            require_targets(TENSORRT_RTX, [target], [precision])


def test_one_impossible_target_of_several_is_refused() -> None:
    with pytest.raises(EngineError, match="--target sm89: it has no nvfp4"):
        require_targets(TENSORRT_RTX, ["sm120", "sm89"], ["bf16", "nvfp4"])


@pytest.mark.parametrize("target", ["sm90", "sm100"])
def test_data_center_gpu_is_sent_to_tensorrt(target: str) -> None:
    require_targets(TENSORRT, [target], ["fp8"])
    with pytest.raises(EngineError, match=rf"--target {target}.*--builder tensorrt builds it"):
        require_targets(TENSORRT_RTX, [target], ["fp8"])


@pytest.mark.parametrize("target", ["sm99", "120", "SM120", "blackwell"])
def test_unknown_target_is_refused_with_the_known_ones(target: str) -> None:
    with pytest.raises(EngineError, match=rf"--target {target}: .*builds for sm80, .*sm121"):
        require_targets(TENSORRT_RTX, [target], [])


def test_rtx_asks_for_a_target() -> None:
    with pytest.raises(EngineError, match="--target: tensorrt-rtx needs at least one of sm80"):
        choose_builder("tensorrt-rtx", [])


def test_repeated_target_counts_once() -> None:
    assert choose_builder("tensorrt-rtx", ["sm120", "sm120"]) == (TENSORRT_RTX, ("sm120",))


def test_missing_builder_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_targets, "find_spec", lambda name: None)
    with pytest.raises(HardwareError, match=re.escape("pip install 'nvvl[tensorrt-rtx]'")):
        choose_builder("tensorrt-rtx", ["sm120"])


class FakeNvml:
    """The part of pynvml that is asked, of a machine with one GPU or none."""

    class NVMLError(Exception):
        pass

    def __init__(self, capability: tuple[int, int] | None) -> None:
        self.capability = capability

    def nvmlInit(self) -> None:
        if self.capability is None:
            raise self.NVMLError("NVML Shared Library Not Found")

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetCudaComputeCapability(self, device: int) -> Any:
        return self.capability


@pytest.fixture
def give_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    def give(capability: tuple[int, int] | None) -> None:
        monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(capability))

    return give


def test_tensorrt_without_gpu_names_the_way(give_gpu: Any) -> None:
    give_gpu(None)
    message = "none was found here.*Not Found.*--builder tensorrt-rtx, which needs no GPU"
    with pytest.raises(HardwareError, match=message):
        choose_builder("tensorrt", [])


def test_tensorrt_takes_the_gpu_it_finds(give_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    give_gpu((9, 0))
    monkeypatch.setattr(engine_targets, "find_spec", lambda name: object())
    assert find_gpu_target() == "sm90"
    assert choose_builder("tensorrt", []) == (TENSORRT, ("sm90",))
    with pytest.raises(EngineError, match=r"--target sm120: .*GPU of this machine, which is sm90"):
        choose_builder("tensorrt", ["sm120"])
