"""Proof of a written checkpoint: the folder is read again by code that had no part in writing it.

    structure  the serving contract, rule by rule              server_rules.py
    values     codes and scales made again from the source     value_proof.py
    hashes     every tensor and file against manifest.json     hash_proof.py
    logits     the reloaded model against the calibrated one   logits_proof.py
    graphs     ONNX graphs against the reloaded model          onnx_parity.py

Weights are read one tensor at a time, so memory does not grow with the model; only logits and
graphs need a whole one. Both can be left out, and logits are where there is too little memory. What
could not be checked is reported as such and is never counted as passed. Verifying writes nothing
into the folder: the folder is what is proved.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvvl.errors import CheckpointError, EngineError, writing
from nvvl.export.checks import Check, judge, not_checked
from nvvl.export.logits_proof import leave_out, prove_logits
from nvvl.export.onnx_extra import require_onnx
from nvvl.export.server_rules import check_server_rules
from nvvl.export.tensor_proof import prove_tensors
from nvvl.export.view import open_source, open_view
from nvvl.model.hashing import hash_file
from nvvl.progress import Progress
from nvvl.staging import MANIFEST_NAME

if TYPE_CHECKING:
    from nvvl.calib_data.items import Item

_READABLE = ("A1", "files can be read")

# Rules of server configs, of the rest of config.json, of side files and of stray ones: a checkpoint
# that breaks only these still has the tensors it should have.
_OTHER_RULES = ("C", "E", "A2", "H3", "N8")

# Without one of these no byte was compared with anything: hashes, the source's values, graphs.
_PROOFS = ("H1", "V1", "O1")


@dataclass(frozen=True)
class VerificationReport:
    """Every check of one folder.

    Attributes:
        folder: What was proved.
        source: What it was proved against, or None.
        checks: In the order of the rules.
        sqnr_db: Signal to quantization noise of each dequantized weight against the source, by
            module name.
        manifest_sha256: Of ``manifest.json``, which has the hashes of all that was proved; None
            where there is none.
    """

    folder: Path
    source: Path | None
    checks: tuple[Check, ...]
    sqnr_db: Mapping[str, float] = field(default_factory=dict)
    manifest_sha256: str | None = None

    @property
    def passed(self) -> bool:
        """Whether no check failed, and bytes were compared with a manifest, source or graphs.

        Else checks that could not run do not fail.
        """
        return not self._failed and any(c.passed and c.rule in _PROOFS for c in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values."""
        return {
            "folder": str(self.folder.resolve()),
            "source": None if self.source is None else str(self.source),
            "manifest_sha256": self.manifest_sha256,
            "passed": self.passed,
            "counts": self._counts(),
            "checks": [check.to_dict() for check in self.checks],
            # JSON has no infinity: null is a weight that lost nothing, or everything
            "sqnr_db": {
                fqn: value if math.isfinite(value) else None for fqn, value in self.sqnr_db.items()
            },
        }

    def summary_lines(self) -> list[str]:
        """Return what a reader needs: every failure, everything not checked, and the counts."""
        lines = [
            f"{check.status}: {check.rule} {check.name}: {check.detail}"
            for check in self.checks
            if check.passed is not True
        ]
        counts = ", ".join(f"{count} {status}" for status, count in self._counts().items())
        return [*lines, f"{self.folder}: {self._verdict()} ({counts})"]

    def write_report(self, path: Path) -> None:
        """Write the report as JSON.

        Raises:
            OutputError: if the file cannot be written.
        """
        with writing(path):
            path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @property
    def _failed(self) -> bool:
        return any(check.passed is False for check in self.checks)

    def _verdict(self) -> str:
        if self._failed:
            return "NOT verified"
        if not self.passed:
            return (
                f"NOT verified: without {MANIFEST_NAME} and without the source there is nothing to "
                "compare its bytes with; give --against MODEL"
            )
        if self.source is not None:
            return "verified"
        by = f"by its {MANIFEST_NAME}" if self.manifest_sha256 else "as what its graphs compute"
        return f"verified {by} alone; give --against MODEL to compare values and logits"

    def _counts(self) -> dict[str, int]:
        statuses = [check.status for check in self.checks]
        return {status: statuses.count(status) for status in ("passed", "failed", "not checked")}


def verify(
    out: Path,
    source: Path | None = None,
    *,
    logits: bool = True,
    probe_items: "Sequence[Item] | None" = None,
    graphs: Path | None = None,
    progress: Progress | None = None,
) -> VerificationReport:
    """Prove a written checkpoint.

    Args:
        out: the folder to prove.
        source: the BF16 checkpoint it was made from; without it, what needs it is not checked.
        logits: whether to run both models, one after the other; needs memory for one in BF16.
        probe_items: items the logits are compared on; a few of the default set if None.
        graphs: a folder of ONNX graphs made from ``out``, to be proved with it.
        progress: called as tensors are read.

    Returns:
        The report; faults in ``out`` are failed checks, not exceptions.

    Raises:
        CheckpointError: if ``out`` is not a folder, or one in which nothing was quantized or
            recorded that could be proved, or if ``source`` cannot be read or is quantized.
        EngineError: if ``graphs`` holds none.
        HardwareError: if there are graphs and nothing is installed that runs them.
    """
    if graphs is not None:
        require_onnx(runtime=True)
        _require_graphs(graphs)
    if not out.is_dir():
        raise CheckpointError(f"{out}: no such folder; give one that nvvl quantize wrote")
    source_view = None if source is None else open_source(source)
    try:
        view = open_view(out, source=source_view)
    except CheckpointError as fault:
        return VerificationReport(out, source, (judge(*_READABLE, [str(fault)]),))
    manifest = out / MANIFEST_NAME
    if not (view.is_quantized or graphs is not None or manifest.exists()):
        raise CheckpointError(
            f"{out}: nothing in it is quantized, and it has no {MANIFEST_NAME}, so there is "
            "nothing to prove; give a folder that nvvl quantize or distill wrote"
        )
    tensors = prove_tensors(view, progress=progress)
    checks = [judge(*_READABLE, ()), *check_server_rules(view), *tensors.checks]
    broken = any(c.passed is False and not c.rule.startswith(_OTHER_RULES) for c in checks)
    if not logits:
        checks += leave_out("left out on request")
    elif broken:
        checks += leave_out("tensors failed their checks, so logits must differ")
    elif source is None:
        checks += leave_out("needs the source")
    else:
        checks += prove_logits(out, source, probe_items=probe_items)
    if graphs is not None:
        checks += _prove_graphs(out, graphs, broken, probe_items, progress)
    digest = hash_file(manifest) if manifest.is_file() else None
    return VerificationReport(out, source, tuple(checks), tensors.sqnr_db, digest)


def _require_graphs(graphs: Path) -> None:
    from nvvl.export.onnx_io import IO_NAME

    if not (graphs / IO_NAME).is_file():
        raise EngineError(
            f"{graphs}: holds no {IO_NAME}; required a folder that nvvl export onnx wrote"
        )


def _prove_graphs(
    out: Path,
    graphs: Path,
    broken: bool,
    probe_items: "Sequence[Item] | None",
    progress: Progress | None,
) -> list[Check]:
    """Prove graphs, unless the checkpoint they are compared with is broken itself."""
    from nvvl.export.onnx_parity import FILES, prove_graphs

    if broken:
        return [not_checked(*FILES, "tensors of the checkpoint failed their checks")]
    return prove_graphs(out, graphs, probe_items=probe_items, progress=progress)
