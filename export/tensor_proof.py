"""One pass over every tensor of a checkpoint, which feeds the value and the hash proofs.

A 12B checkpoint and its source are 35 GB: each byte is read once. In memory are one linear with
its scales and the source's weight.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nvvl.errors import CheckpointError
from nvvl.export.checks import Check, judge
from nvvl.export.hash_proof import HashProof, unavailable_hashes
from nvvl.export.tensor_files import TensorFiles, read_calibration
from nvvl.export.value_proof import ValueProof
from nvvl.export.view import SCALE_LEAVES, CheckpointView
from nvvl.progress import Progress

MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True)
class _Unit:
    """Tensors that are proved together: a quantized linear with its scales, or one tensor."""

    module: str
    leaves: tuple[str, ...]
    is_quantized: bool

    def name(self, leaf: str) -> str:
        """Return the name of one of its tensors; a stray one may be of no module."""
        return f"{self.module}.{leaf}" if self.module else leaf


@dataclass(frozen=True)
class TensorProof:
    """What one pass over the tensors found.

    Attributes:
        checks: Values, then hashes.
        sqnr_db: Signal to quantization noise of each dequantized weight, by module name.
    """

    checks: list[Check]
    sqnr_db: dict[str, float]


def prove_tensors(view: CheckpointView, *, progress: Progress | None = None) -> TensorProof:
    """Prove values and hashes of every tensor.

    Args:
        view: the checkpoint on disk, with its source if that is known.
        progress: called after each unit, the last time with all of them done.
    """
    assert view.folder is not None  # a planned view has no bytes
    calibration, unreadable = _open_calibration(view.folder)
    hashes, no_hashes = _open_hashes(view.folder)
    values = ValueProof(calibration, has_source=view.source is not None)
    written = TensorFiles(view)
    source = None if view.source is None else TensorFiles(view.source)
    units = _list_units(view)
    for done, unit in enumerate(units, start=1):
        parts = {leaf: written.read(unit.name(leaf)) for leaf in unit.leaves}
        name = unit.name(unit.leaves[0])
        original = None if source is None or not source.has(name) else source.read(name)
        if hashes is not None:
            for leaf, tensor in parts.items():
                first = leaf == unit.leaves[0]
                hashes.see(unit.name(leaf), tensor, original if first else None)
        if unit.is_quantized:
            values.see_linear(unit.module, parts, original)
        else:
            values.see_copied(name, parts[unit.leaves[0]], original)
        if progress is not None:
            progress(unit.module, done, len(units))
    hash_checks = no_hashes if hashes is None else hashes.checks(view)
    return TensorProof([*unreadable, *values.checks(), *hash_checks], values.sqnr_db)


def _open_calibration(folder: Path) -> tuple[dict[str, float] | None, list[Check]]:
    try:
        return read_calibration(folder), []
    except CheckpointError as fault:
        return None, [judge("A3", "calibration can be read", [str(fault)])]


def _open_hashes(folder: Path) -> tuple[HashProof | None, list[Check]]:
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        return HashProof.from_manifest(manifest), []
    except FileNotFoundError:
        return None, unavailable_hashes(f"the folder has no {MANIFEST_NAME}", passed=None)
    except (CheckpointError, OSError, ValueError, RecursionError) as fault:
        reason = f"{MANIFEST_NAME}: not a manifest of nvvl ({fault})"
        return None, unavailable_hashes(reason, passed=False)


def _list_units(view: CheckpointView) -> list[_Unit]:
    """Group a quantized weight with its scales; every other tensor stands alone."""
    quantized = {fqn for fqn in view.linears if view.stored(fqn) != "bf16"}
    return list(_units(view, quantized))


def _units(view: CheckpointView, quantized: set[str]) -> Iterator[_Unit]:
    for name in sorted(view.tensors):
        module, _, leaf = name.rpartition(".")
        if module not in quantized or leaf not in ("weight", *SCALE_LEAVES):
            yield _Unit(module, (leaf,), False)
        elif leaf == "weight":
            scales = [scale for scale in SCALE_LEAVES if f"{module}.{scale}" in view.tensors]
            yield _Unit(module, ("weight", *scales), True)
