"""The frozen BF16 teacher, and the check that a quantized run was made from it.

The student starts from the teacher's weights with the run's scales. Scales of other weights would
be silently wrong, so the run must prove where it comes from: its own bytes must be those of its
manifest, and the manifest's source hashes those of the teacher's tensors.
"""

import hashlib
from pathlib import Path
from typing import Any

from nvvl.calib_data.manifest import CalibrationSet
from nvvl.distill.data import DistillData
from nvvl.distill.recipe import DistillRecipe
from nvvl.errors import CheckpointError, ConfigError, name_some
from nvvl.model.checkpoint import Checkpoint
from nvvl.model.hashing import changed_files, hash_file
from nvvl.model.processor import Processor
from nvvl.quantize.declared import check_quantized_tensors, is_quantized, read_formats
from nvvl.quantize.manifest import Manifest
from nvvl.staging import MANIFEST_NAME


def check_run(run: Path, teacher: Path) -> Manifest:
    """Prove that a quantized folder is unchanged and was made from a BF16 folder.

    Args:
        run: What ``nvvl quantize`` wrote.
        teacher: The BF16 checkpoint.

    Returns:
        The run's manifest.

    Raises:
        ConfigError: if a config.json or the tokenizer cannot be used, or they are of another model.
        CheckpointError: if the run is not quantized, its bytes are not those of its manifest, or
            it was made from other weights.
    """
    source, written = Checkpoint(teacher), Checkpoint(run)
    if is_quantized(source):
        raise CheckpointError(f"{teacher}: is quantized; the teacher must be the BF16 checkpoint")
    if not is_quantized(written):
        raise CheckpointError(f"{run}: is not quantized; give a folder that nvvl quantize wrote")
    if written.config.language != source.config.language:
        raise ConfigError(f"{run}: config.json describes another language model than {teacher}")
    tokenizers = [Processor.from_folder(folder).tokenizer for folder in (run, teacher)]
    if tokenizers[0].to_str() != tokenizers[1].to_str():
        raise ConfigError(f"{run}: has another tokenizer than {teacher}; give the run's own source")
    manifest = Manifest.read(run)
    check_quantized_tensors(written, read_formats(written))
    _check_unchanged(written, manifest)
    _check_source(source, manifest, run)
    return manifest


def run_identity(
    run: Path,
    teacher: Path,
    recipe: DistillRecipe,
    items: CalibrationSet,
    data: DistillData,
    seed: int,
) -> dict[str, Any]:
    """Return what makes two distillations the same one.

    Args:
        run: What ``nvvl quantize`` wrote; was checked (`check_run`).
        teacher: The BF16 checkpoint.
        recipe: Settings of the training.
        items: What is trained and validated on.
        data: The same, split.
        seed: Of the split and order of items.
    """
    return {
        "recipe": recipe.to_dict(),
        "teacher": teacher_digest(teacher),
        "run": hash_file(run / MANIFEST_NAME),
        "data": {
            "set": items.spec,
            "num_items": len(items.items),
            "seed": seed,
            "sha256": data.sha256,
        },
    }


def teacher_digest(teacher: Path) -> str:
    """Return one SHA-256 over the hashes of all of a teacher's tensors."""
    checkpoint = Checkpoint(teacher)
    lines = "\n".join(f"{name} {checkpoint.sha256(name)}" for name in sorted(checkpoint.tensors))
    return hashlib.sha256(lines.encode()).hexdigest()


def _check_unchanged(written: Checkpoint, manifest: Manifest) -> None:
    faults = sorted(written.tensors.keys() ^ manifest.tensors.keys())
    faults += [
        name
        for name, record in manifest.tensors.items()
        if name in written.tensors and written.sha256(name) != record.sha256
    ]
    faults += changed_files(written.folder, manifest.files)
    if faults:
        raise CheckpointError(
            f"{written.folder}: not what its manifest says: {name_some(faults, limit=3)}; run "
            "nvvl verify on it, and quantize the source again"
        )


def _check_source(source: Checkpoint, manifest: Manifest, run: Path) -> None:
    faults = sorted(source.tensors.keys() ^ manifest.source.keys())
    faults += [
        name
        for name, sha256 in manifest.source.items()
        if name in source.tensors and source.sha256(name) != sha256
    ]
    if faults:
        raise CheckpointError(
            f"{run}: was not made from {source.folder}: {name_some(faults, limit=3)} differ; "
            "give its own source as the teacher"
        )
