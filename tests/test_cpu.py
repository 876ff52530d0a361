"""The kind of CPU decides how matrices are multiplied, and how long a plan says it takes."""

import platform

import pytest
import torch

from nvvl import cpu
from nvvl.model import products

ZEN4 = "vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx2 avx512f avx512_bf16"
EMERALD_RAPIDS = "vendor_id\t: GenuineIntel\nflags\t\t: fpu avx2 avx512f avx512_bf16 amx_bf16"


@pytest.mark.parametrize(
    ("described", "speedup"),
    [
        ("vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx2", 1),
        (ZEN4, 2),
        (EMERALD_RAPIDS, 6),
        (EMERALD_RAPIDS.replace(" amx_bf16", ""), 1),  # a virtual machine that hides them
        ("vendor_id\t: GenuineIntel\nflags\t\t: fpu avx2 avx512f", 1),
        ("vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx512f xavx512_bf16", 1),
    ],
)
def test_instructions_for_bfloat16_are_not_enough(
    described: str, speedup: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "describe_cpu", lambda: described)
    assert cpu.bf16_speedup() == speedup


@pytest.mark.parametrize(
    ("machine", "kept_to", "speedup", "is_fast"),
    [
        ("x86_64", "AVX512", 2, True),
        ("x86_64", "AVX512", 1, False),
        ("x86_64", "AVX2", 2, False),  # torch is kept from what the CPU has
        ("x86_64", "DEFAULT", 1, False),
        ("aarch64", "DEFAULT", 1, True),
    ],
)
def test_products_go_by_what_torch_may_use(
    machine: str, kept_to: str, speedup: int, is_fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: kept_to)
    monkeypatch.setattr(products, "bf16_speedup", lambda: speedup)
    assert products.has_fast_bf16.__wrapped__() is is_fast


@pytest.mark.parametrize(
    ("described", "name"),
    [
        ("x86_64\nmodel\t: 17\nmodel name\t: AMD EPYC 9R14\nvendor_id\t: x", "AMD EPYC 9R14"),
        ("aarch64\nCPU part\t: 0xd4f", "a machine"),
    ],
)
def test_name_is_that_of_the_model(
    described: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "describe_cpu", lambda: described)
    monkeypatch.setattr(platform, "machine", lambda: "a machine")
    assert cpu.cpu_name() == name
