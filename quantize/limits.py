"""What a run may hold in memory at once: from ``--memory``, or from what is free.

With less memory than a run would take, the calibration items go to disk, then the neighbouring
blocks go. Inside a block an item is bounded too: what is longer than a span goes through in parts.
Limits change no byte of an output; spans move sums by rounding, so they are constants.
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nvvl.errors import HardwareError
from nvvl.model.memory import free_memory

if TYPE_CHECKING:
    from nvvl.quantize.estimate import Estimate


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a run may hold in memory at once.

    Attributes:
        overlap: Whether the next block is read, and the last one written, while one runs.
        activation_bytes: Most bytes of calibration items; the rest is on disk. None sets no limit.
    """

    overlap: bool = True
    activation_bytes: int | None = None


UNLIMITED = Limits()

# Longer items go through a block in parts of this many tokens or tiles.
SPAN_TOKENS = 2048
SPAN_TILES = 4


def parse_memory(text: str) -> int:
    """Read an amount of memory such as ``6GB``, ``6 GiB`` or ``900MB`` as bytes.

    Raises:
        HardwareError: if it is not one.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?\s*", text)
    if match is None or not float(match[1]):
        raise HardwareError(f"--memory {text}: required an amount such as 6GB or 6GiB")
    unit = match[2] or ""
    base = 1024 if unit.endswith("i") else 1000
    return round(float(match[1]) * base ** " KMGT".index(unit[:1] or " "))


def choose_limits(estimate: "Estimate", memory_bytes: int) -> Limits:
    """Decide what stays in memory, so that a run takes no more than it may.

    Raises:
        HardwareError: if even the least is more than that, saying how to take less.
    """
    if estimate.minimum_bytes > memory_bytes:
        other = (
            ", or the format nvfp4-w4a16, which runs no items" if estimate.activation_bytes else ""
        )
        raise HardwareError(
            f"--memory: allowed {memory_bytes / 1e9:.1f} GB, the run takes at least "
            f"{estimate.minimum_bytes / 1e9:.1f} GB: one block and the libraries; give more{other}"
        )
    least = estimate.memory_bytes - estimate.overlap_bytes - estimate.activation_bytes
    overlap = estimate.minimum_bytes + estimate.overlap_bytes <= memory_bytes
    fixed = least + (estimate.overlap_bytes if overlap else 0)
    return Limits(overlap=overlap, activation_bytes=memory_bytes - fixed)


def default_limits() -> Limits:
    """Return the limits of a run that was given none: half of the free memory for items.

    The processes that torchrun started on this machine share it.
    """
    from nvvl.model.processes import read_count  # a plan is made without torch

    free = free_memory()
    parts = 2 * read_count("LOCAL_WORLD_SIZE")
    return Limits(activation_bytes=None if free is None else free // parts)
