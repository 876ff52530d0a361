"""How much memory programs can still have here: of the machine, or of the container's share."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from nvvl.errors import HardwareError

if TYPE_CHECKING:
    import torch

# A limit that says "none": version 1 of control groups has a number near 2**63 for it.
_NO_LIMIT = 1 << 60


def free_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes of memory that programs can still have, or None if nobody says so.

    The least of what the system has left and what each control group that holds this process
    (``docker run -m``, Kubernetes, SLURM) may still use. File pages count as free.

    Args:
        root: Where ``/proc`` and ``/sys`` are.
    """
    return min(_amounts(root), default=None)


def require_memory(needed: int, what: str, device: "torch.device | str") -> None:
    """Refuse what memory cannot hold, before any of it is read.

    On a GPU nothing is asked: what does not fit there fails at once and not after an hour of
    swapping.

    Args:
        needed: Bytes.
        what: Path of a checkpoint, for the message.
        device: Where it goes.

    Raises:
        HardwareError: if fewer bytes are free.
    """
    free = free_memory() if str(device).startswith("cpu") else None
    if free is not None and needed > free:
        raise HardwareError(
            f"{what}: needs about {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free; "
            "end other programs, or use a larger machine"
        )


def _amounts(root: Path) -> Iterator[int]:
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", _read(root / "proc/meminfo"), re.M)
    if found is not None:
        yield int(found[1]) * 1024
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        if controllers:
            base, names = root / "sys/fs/cgroup/memory", ("limit_in_bytes", "usage_in_bytes")
            cached = "total_"
        else:
            base, names, cached = root / "sys/fs/cgroup", ("max", "current"), ""
        group = base / path.strip("/")
        for folder in (group, *group.parents):
            limit, used = (_read(folder / f"memory.{name}").strip() for name in names)
            if limit.isdigit() and used.isdigit() and int(limit) < _NO_LIMIT:
                stat = _read(folder / "memory.stat")
                pages = re.findall(rf"^{cached}(?:in)?active_file (\d+)$", stat, re.M)
                yield max(0, int(limit) - int(used) + sum(map(int, pages)))
            if folder == base:
                break


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:  # no such system, or nothing said to this process
        return ""
