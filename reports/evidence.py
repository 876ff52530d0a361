"""What is known of the checkpoint behind a run: how it was made, and whether it was proved.

A checkpoint written by nvvl carries its manifest, and a quantized one its recipe. The outcome of
``nvvl verify`` is kept outside of it, since the folder is what is proved: a JSON file that is
given, or ``verify-NAME.json`` beside the folder ``NAME``, where the demo puts it. A proof older
than a file of the checkpoint is refused, because it may speak of other bytes.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nvvl.errors import DataError
from nvvl.model.hashing import hash_file
from nvvl.quantize.manifest import Manifest
from nvvl.quantize.recipe import Recipe
from nvvl.quantize.side_files import ROTATION_NAME, read_recipe
from nvvl.reports.deployment import Engines, find_engines
from nvvl.reports.harness_run import HarnessRun
from nvvl.reports.json_values import describe_fault, json_text
from nvvl.reports.run import RunResult
from nvvl.staging import MANIFEST_NAME

# Name of a proof beside the checkpoint whose name is put in.
PROOF_NAME = "verify-{}.json"

# What the manifest of BF16 weights, rotated or trained, has in place of a recipe's name.
_BF16 = "bf16"

# float64 itself has 20 log10(2^53) = 319 dB; what is above is infinite, or a file that was edited.
_MOST_DB = 1e4


@dataclass(frozen=True)
class ProofCheck:
    """One check of a verification, as ``nvvl verify --json`` has it."""

    rule: str
    name: str
    status: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class Proof:
    """The outcome of ``nvvl verify``.

    Attributes:
        folder: the checkpoint that was proved.
        manifest_sha256: of its ``manifest.json``; None if it had none.
        sqnr_db: signal to quantization noise of each weight, in dB, by module name; infinite ones
            are left out.
        counts: how many checks passed, failed and were not made, by these words.
    """

    path: Path
    folder: Path
    manifest_sha256: str | None
    passed: bool
    checks: tuple[ProofCheck, ...]
    sqnr_db: Mapping[str, float]
    counts: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known of the checkpoint behind a run.

    Attributes:
        manifest: None if nvvl did not write the checkpoint, as for a released one.
        recipe: the recipe in force; None as above, and for BF16 weights that nvvl wrote.
        num_linears: how many linears have each format.
        proof: None if ``nvvl verify`` was not run.
        engines: None if none were built.
        rotation: what ``nvvl rotate`` recorded; empty if the source was not rotated.
    """

    manifest: Manifest | None
    recipe: Recipe | None
    num_linears: Mapping[str, int]
    proof: Proof | None
    engines: Engines | None = None
    rotation: Mapping[str, Any] = field(default_factory=dict)

    @property
    def changes(self) -> tuple[tuple[str, str], ...]:
        """What was done to the weights before they were packed, a word and a sentence each."""
        found = []
        if self.rotation:
            found.append(("Rotated", _describe_rotation(self.rotation)))
        if self.manifest is not None and self.manifest.distillation:
            found.append(("Distilled", _describe_distillation(self.manifest.distillation)))
        return tuple(found)

    @property
    def source_sha256(self) -> str | None:
        """One hash over the names and hashes of the BF16 source's tensors."""
        if self.manifest is None:
            return None
        lines = (f"{name} {sha256}\n" for name, sha256 in sorted(self.manifest.source.items()))
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def gather_evidence(
    runs: Sequence[RunResult | HarnessRun], proofs: Sequence[Path] = ()
) -> dict[str, Evidence]:
    """Read what is known of the checkpoints behind some runs.

    Args:
        runs: finished runs.
        proofs: JSON files of ``nvvl verify --json``; others are found beside the checkpoints.

    Returns:
        The evidence of each run, by label. A checkpoint that is gone leaves none.

    Raises:
        DataError: if a proof cannot be read, is of no run, or is older than its checkpoint, or if a
            checkpoint is not the one that was asked.
        CheckpointError: if a manifest or a recipe is missing or not one.
    """
    by_folder = {proof.folder.resolve(): proof for proof in map(read_proof, proofs)}
    folders = [run.model.resolve() for run in runs]
    for folder in folders:
        beside = folder.with_name(PROOF_NAME.format(folder.name))
        if folder not in by_folder and folder.is_dir() and beside.is_file():
            proof = read_proof(beside)
            if proof.folder.name != folder.name:
                raise DataError(
                    f"{beside}: proves {proof.folder}, not the {folder.name} beside it; run nvvl "
                    "verify again, or remove the file"
                )
            by_folder[folder] = proof
    for folder, proof in by_folder.items():
        if folder not in folders:
            raise DataError(f"{proof.path}: proves {proof.folder}, which no run is of")
        _require_newer(proof, folder)
    for run, folder in zip(runs, folders, strict=True):
        _require_same(run, folder)
    return {
        run.label: _read_folder(folder, by_folder.get(folder))
        for run, folder in zip(runs, folders, strict=True)
    }


def read_proof(path: Path) -> Proof:
    """Read what ``nvvl verify --json`` has printed.

    Raises:
        DataError: if it is missing or something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Proof(
            path=path,
            folder=Path(values["folder"]),
            passed=_require_bool(values["passed"]),
            manifest_sha256=values["manifest_sha256"],
            checks=tuple(
                ProofCheck(check["rule"], check["name"], check["status"], check["detail"])
                for check in values["checks"]
            ),
            sqnr_db={
                name: float(value)
                for name, value in values["sqnr_db"].items()
                if value is not None and abs(value) < _MOST_DB
            },
            counts=values["counts"],
        )
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        reason = describe_fault(error)
        raise DataError(f"{path}: required the output of nvvl verify --json ({reason})") from None


def _require_bool(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"passed: required true or false, got {json_text(value)}")
    return value


def _require_same(run: RunResult | HarnessRun, folder: Path) -> None:
    manifest = folder / MANIFEST_NAME
    if run.manifest_sha256 and manifest.is_file() and hash_file(manifest) != run.manifest_sha256:
        raise DataError(
            f"{run.out}: {folder} was written anew since it was asked, so its recipe and proof are "
            "of another checkpoint; evaluate it again, or give the new one another name"
        )


def _require_newer(proof: Proof, folder: Path) -> None:
    if not folder.is_dir():
        return
    manifest = folder / MANIFEST_NAME
    found = hash_file(manifest) if manifest.is_file() else None
    if proof.manifest_sha256 != found:  # copies keep the times of their originals
        raise DataError(
            f"{proof.path}: proves another checkpoint than what is now at {folder}; run nvvl "
            "verify again, or remove the file"
        )
    newest = max((p.stat().st_mtime_ns for p in folder.iterdir() if p.is_file()), default=0)
    if proof.path.stat().st_mtime_ns < newest:
        raise DataError(
            f"{proof.path}: older than the checkpoint {folder} that it proves; "
            "run nvvl verify again, or remove the file"
        )


def _read_folder(folder: Path, proof: Proof | None) -> Evidence:
    manifest, recipe = None, None
    formats: Mapping[str, str] = {}
    if (folder / MANIFEST_NAME).is_file():
        manifest = Manifest.read(folder)
        if manifest.format != _BF16:
            recipe, formats = read_recipe(folder)
    return Evidence(
        manifest=manifest,
        recipe=recipe,
        num_linears=Counter(formats.values()),
        proof=proof,
        engines=find_engines(folder),
        rotation=_read_rotation(folder / ROTATION_NAME),
    )


def _read_rotation(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        _describe_rotation(values)
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        reason = describe_fault(error)
        raise DataError(f"{path}: not what nvvl rotate wrote ({reason})") from None
    return values


def _describe_rotation(record: Mapping[str, Any]) -> str:
    data, harm = record["data"], record["harm"]
    return (
        f"into bases learned from {data['num_items']:,} items of {data['set']}, where rounding is "
        f"expected to do {harm:.2f} times the harm"
    )


def _describe_distillation(record: Mapping[str, Any]) -> str:
    recipe, data = record["recipe"], record["data"]
    steps = f"{recipe['num_steps']:,} steps{' a layer' if recipe['method'] == 'layers' else ''}"
    text = (
        f"{recipe['name']}, {steps} at a rate of at most {recipe['learning_rate']:g}, "
        f"{data['num_items']:,} items of {data['set']}"
    )
    if "validation_loss" not in record:
        return text
    loss = record["validation_loss"]
    return (
        f"{text}; validation loss {loss['start']:.4g} before, {loss['written']:.4g} at step "
        f"{record['step']:,}, which was written"
    )
