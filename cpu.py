"""What kind of CPU this is, without torch: what compiled code and the choice of products go by."""

import platform
import re
from pathlib import Path

_AMX_SPEEDUP = 6
_AMD_SPEEDUP = 2


def describe_cpu() -> str:
    """Describe what -march=native depends on: architecture, model and instruction sets."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else [platform.processor()]
    wanted = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU part")
    found = {line for line in lines if line.startswith(wanted)}
    return "\n".join([platform.machine(), *sorted(found)])


def cpu_name() -> str:
    """Name this CPU's model, or its architecture where the system does not say the model."""
    name = re.search(r"^model name\s*: (.*)$", describe_cpu(), re.MULTILINE)
    return name[1] if name else platform.machine()


def bf16_speedup() -> int:
    """Return how many times faster than float32 this CPU multiplies bfloat16 matrices: 1, 2 or 6.

    Having instructions for it is not enough. Measured with torch 2.13: AMD's AVX-512 (Zen 4, Zen 5)
    twice as fast, Intel's (Sapphire Rapids, Emerald Rapids) half as fast, AVX-512 and AVX2 without
    them a fifth and a quarter; Intel's matrix units (AMX) six times. A virtual machine can hide
    those from its guest.
    """
    words = set(describe_cpu().split())
    if "amx_bf16" in words:
        return _AMX_SPEEDUP
    if {"avx512_bf16", "AuthenticAMD"} <= words:
        return _AMD_SPEEDUP
    return 1
