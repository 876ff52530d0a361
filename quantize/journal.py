"""What a run has finished, so that a killed one goes on from there to the same bytes.

``journal.jsonl`` begins with what the run is made from (`nvvl.quantize.identity`), then has one
line for each finished block: hashes read and written, amax, and where the activations after it lie.
A line is flushed to the disk before the next block begins. A torn last line is a block that is done
again.

To go on, a run needs what the calibration items are after the last finished block. Each process
spills its own to one file during every block where the disk has room for it beside the whole
output (``nvvl.quantize.spill``). A spill that is missing, has another hash or is of another number
of processes costs time and nothing else: the finished blocks are then run again over the items,
without calibrating or packing.

A run that was made from something else is refused with what differs.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nvvl.calib_data.items import Item, item_hash
from nvvl.errors import OutputError, writing
from nvvl.quantize.amaxes import Amax
from nvvl.quantize.identity import describe_differences
from nvvl.quantize.manifest import TensorRecord
from nvvl.staging import Stage

_MAX_NAMED = 4


@dataclass(frozen=True, kw_only=True)
class BlockRecord:
    """One finished block.

    Attributes:
        block: Its name.
        source: SHA-256 of each source tensor read.
        written: What was written.
        amaxes: Of its quantized linears.
        items: (id, SHA-256) of the calibration items; only in the block that drew them.
        spills: SHA-256 of the activations after it, by process; empty if they were not spilled.
    """

    block: str
    source: Mapping[str, str]
    written: Mapping[str, TensorRecord]
    amaxes: Mapping[str, Amax]
    items: Sequence[tuple[str, str]] = ()
    spills: Sequence[str] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values; a float32 amax survives them exactly."""
        return {
            "block": self.block,
            "source": dict(self.source),
            "written": {n: [r.sha256, r.dtype, r.shape] for n, r in self.written.items()},
            "amaxes": {
                fqn: [float(a.weight), None if a.input is None else float(a.input)]
                for fqn, a in self.amaxes.items()
            },
            "items": [list(item) for item in self.items],
            "spills": list(self.spills),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "BlockRecord":
        """Read what `to_dict` made."""
        return cls(
            block=values["block"],
            source=values["source"],
            written={
                name: TensorRecord(sha256, dtype, tuple(shape))
                for name, (sha256, dtype, shape) in values["written"].items()
            },
            amaxes={
                fqn: Amax(_scalar(weight), None if seen is None else _scalar(seen))
                for fqn, (weight, seen) in values["amaxes"].items()
            },
            items=[(item_id, sha256) for item_id, sha256 in values["items"]],
            spills=values["spills"],
        )


class Journal:
    """The finished blocks of one stage.

    Attributes:
        blocks: In the order they were finished.
    """

    def __init__(
        self,
        stage: Stage,
        identity: Mapping[str, str],
        items: Sequence[Item],
        *,
        overwrite: bool = False,
    ) -> None:
        """Read what an earlier run left, or start anew.

        Args:
            stage: Where the output is made.
            identity: What this run is made from, as `nvvl.quantize.identity` says it.
            items: The calibration items of this run.
            overwrite: Start anew where an earlier run was made from something else.

        Raises:
            OutputError: if an earlier run was made from something else, naming what differs, or
                the folder is not ours or cannot be written.
        """
        self._stage = stage
        if not stage.journal.exists() and any(stage.root.iterdir()):
            raise OutputError(
                f"{stage.root}: holds files but no {stage.journal.name}, so nvvl did not write "
                "it; move it away, or choose another OUT"
            )
        found, self.blocks, end = read_journal(stage.journal)
        differences = [] if not self.blocks else _compare(found, identity, self.blocks, items)
        if differences and not overwrite:
            raise OutputError(
                f"{stage.root}: an unfinished run was made from something else: "
                f"{'; '.join(differences)}; give it the same again, or pass --overwrite to start "
                "anew"
            )
        with writing(stage.root):
            if differences or not self.blocks:
                self.blocks, end = [], 0
                stage.clear()
            # unbuffered: what a full disk did not take must not be tried again by close
            self._file = stage.journal.open("ab", buffering=0)
            self._file.truncate(end)
        if not self.blocks:
            self._append(dict(identity))

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of every tensor that finished blocks wrote, by name."""
        return {name: r.sha256 for block in self.blocks for name, r in block.written.items()}

    def append(self, record: BlockRecord) -> None:
        """Record a finished block, on the disk when this returns."""
        self._append(record.to_dict())
        self.blocks.append(record)

    def _append(self, values: Mapping[str, Any]) -> None:
        line = json.dumps(values, ensure_ascii=False) + "\n"
        data = line.encode(errors="backslashreplace")  # names of files that are no UTF-8
        try:
            while data:
                data = data[self._file.write(data) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OutputError(
                f"{self._stage.journal}: cannot be written ({error.strerror}); make room, and "
                "the same command goes on"
            ) from error


def read_journal(path: Path) -> tuple[dict[str, str], list[BlockRecord], int]:
    """Read a journal up to its first torn line; also how many bytes that is.

    Raises:
        OutputError: if there is one that cannot be read.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return {}, [], 0
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be read ({error.strerror}); choose another OUT"
        ) from error
    identity: dict[str, str] = {}
    blocks: list[BlockRecord] = []
    end = 0
    for line in data.splitlines(keepends=True):
        try:
            if not line.endswith(b"\n"):
                break
            values = json.loads(line)
            if end:
                blocks.append(BlockRecord.from_dict(values))
            else:
                identity = dict(values)
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
            break  # never reached the disk; the block it was about is done again
        end += len(line)
    return identity, blocks, end


def _compare(
    found: Mapping[str, str],
    identity: Mapping[str, str],
    blocks: Sequence[BlockRecord],
    items: Sequence[Item],
) -> list[str]:
    """List how the run that left a journal differs from this one."""
    return describe_differences(found, identity) or _compare_items(
        [pair for block in blocks for pair in block.items], items
    )


def _compare_items(found: Sequence[tuple[str, str]], items: Sequence[Item]) -> list[str]:
    if len(found) != len(items):
        return [f"calibration items: {len(found)} then, {len(items)} now"]
    differences = []
    for item, (item_id, sha256) in zip(items, found, strict=True):
        if item.item_id != item_id:
            differences.append(f"calibration items: {item_id} then, {item.item_id} now")
        elif item_hash(item) != sha256:
            differences.append(f"calibration item {item_id}: has other content now")
    more = len(differences) - _MAX_NAMED
    return differences[:_MAX_NAMED] + ([f"and {more} more"] if more > 0 else [])


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)
