"""How several processes share the calibration items of a walk, and join what they saw.

Items are dealt out in turn, so that long and short ones are spread evenly. An amax is a largest
value, which is exact whatever order it is looked for in: the joined one is that of one process.
"""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from nvvl.errors import DataError
from nvvl.model.processes import Processes
from nvvl.quantize.amaxes import Amax

_T = TypeVar("_T")


def take_share(values: Sequence[_T], processes: Processes) -> Sequence[_T]:
    """Return this process's part of what all of them share.

    Raises:
        DataError: if there is not one for each of several.
    """
    if processes.count == 1:
        return values
    if len(values) < processes.count:
        raise DataError(
            f"{processes.count} processes share {len(values)} calibration items; required one for "
            "each at least: give more items, or start fewer processes (one where nothing is "
            "calibrated)"
        )
    return values[processes.index :: processes.count]


def join_shares(shares: Sequence[Sequence[_T]]) -> list[_T]:
    """Put together again what `take_share` took apart, by process."""
    count = sum(len(share) for share in shares)
    return [shares[index % len(shares)][index // len(shares)] for index in range(count)]


def largest_amaxes(amaxes: Mapping[str, Amax], processes: Processes) -> dict[str, Amax]:
    """Return the largest amax that any process found, by name of the linear.

    Args:
        amaxes: What this one found; all processes have the same linears, in the same order.
        processes: Those that share the items.
    """
    if processes.count == 1 or not amaxes:
        return dict(amaxes)
    rows = [torch.stack([_or_nothing(a.weight), _or_nothing(a.input)]) for a in amaxes.values()]
    largest = processes.max(torch.stack(rows))  # (linears, 2)
    joined = {}
    for fqn, (weight, seen) in zip(amaxes, largest, strict=True):
        joined[fqn] = Amax(weight, None if seen == -torch.inf else seen)
    return joined


def _or_nothing(amax: Tensor | None) -> Tensor:
    return torch.tensor(-torch.inf) if amax is None else amax
