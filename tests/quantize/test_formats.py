import subprocess
import sys
from itertools import pairwise

import pytest
import torch

from nvvl.errors import CalibrationError
from nvvl.quantize.formats import (
    BLOCK_SIZE,
    E2M1_BOUNDARIES,
    E2M1_MAX,
    E2M1_VALUES,
    E4M3_MAX,
    E4M3_MIN_POSITIVE,
    check_amax,
    check_float,
    read_scale,
)


def e2m1_by_definition(code: int) -> float:
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    magnitude = mantissa / 2 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2)
    return -magnitude if sign else magnitude


def test_e2m1_table_follows_the_bit_fields() -> None:
    assert len(E2M1_VALUES) == 16
    assert [e2m1_by_definition(code) for code in range(16)] == list(E2M1_VALUES)


def test_boundaries_are_midpoints_of_neighbouring_values() -> None:
    midpoints = [(a + b) / 2 for a, b in pairwise(E2M1_VALUES[:8])]
    assert list(E2M1_BOUNDARIES) == midpoints


def test_constants_are_those_of_torchs_e4m3() -> None:
    info = torch.finfo(torch.float8_e4m3fn)
    assert info.max == E4M3_MAX
    assert info.smallest_normal / 8 == E4M3_MIN_POSITIVE
    assert (max(E2M1_VALUES), BLOCK_SIZE) == (E2M1_MAX, 16)


@pytest.mark.parametrize("value", [2.0**-126, 1e-4, 1.0, 2.0**119])
def test_scale_is_read(value: float) -> None:
    assert read_scale(torch.tensor(value), "scale") == torch.tensor(value).item()


@pytest.mark.parametrize("value", [0.0, -1.0, 2.0**-127, 2.0**120, float("inf"), float("nan")])
def test_unusable_scale_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"weight_scale: a value in \[2\*\*-126, 2\*\*119\]"):
        read_scale(torch.tensor(value), "weight_scale")


def test_scale_per_channel_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one value per tensor was expected, got shape \[4\]"):
        read_scale(torch.ones(4), "scale")


@pytest.mark.parametrize("value", [0.0, 1e-40, float("inf"), float("nan")])
def test_unusable_amax_is_a_calibration_error(value: float) -> None:
    with pytest.raises(CalibrationError, match="amax: a finite value of at least"):
        check_amax(torch.tensor(value), E4M3_MAX)


def test_amax_per_channel_is_a_calibration_error() -> None:
    with pytest.raises(CalibrationError, match=r"got shape \[2, 1\]"):
        check_amax(torch.ones(2, 1), E4M3_MAX)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"got {dtype}"):
        check_float(torch.zeros(1).to(dtype))


@pytest.mark.parametrize(
    ("module", "heavy"), [("formats", "torch"), ("nvfp4", "modelopt"), ("fp8", "modelopt")]
)
def test_light_modules_stay_light(module: str, heavy: str) -> None:
    program = f"import sys, nvvl.quantize.{module}; sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
