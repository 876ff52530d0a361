"""Writes what training made: the trained BF16 weights, and the quantized checkpoint from them.

Both are folders in the released layout. The BF16 one is the source of the quantized one in every
sense that ``nvvl verify OUT --against OUT.bf16`` proves: its tensors are hashed in the manifest,
packed codes are the rounding of its weights, and each weight amax is theirs. What was not trained
is byte for byte the teacher's. The manifest's ``distillation`` names teacher, run, recipe and data.

The quantized folder is made from the BF16 folder on disk, not from memory.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nvvl.distill.optimize import INPUT_AMAX
from nvvl.errors import writing
from nvvl.model.checkpoint import Checkpoint, CheckpointWriter, TensorSpec
from nvvl.model.safetensors_io import tensor_bytes
from nvvl.quantize import kernels
from nvvl.quantize.amaxes import Amax, share_qkv
from nvvl.quantize.layout import build_layout
from nvvl.quantize.load import read_recipe_formats
from nvvl.quantize.manifest import Manifest, TensorRecord, hash_files, library_versions, write_json
from nvvl.quantize.pack import pack_linear, require_usable
from nvvl.quantize.side_files import (
    RECIPE_NAME,
    copy_side_files,
    read_recipe,
    write_side_files,
)
from nvvl.quantize.targets import list_linears, quantized_only
from nvvl.staging import staged_folder


@contextmanager
def staged_outputs(
    out: Path, *, sources: Sequence[Path], overwrite: bool
) -> Iterator[tuple[Path, Path]]:
    """Yield empty folders that become ``OUT`` and ``OUT.bf16``, as `staged_folder` does.

    Args:
        out: The folder of the quantized checkpoint.
        sources: Folders that must survive.
        overwrite: Whether earlier outputs may be replaced.

    Raises:
        OutputError: as `staged_folder`.
    """
    with (
        staged_folder(out, sources=sources, overwrite=overwrite) as quantized,
        staged_folder(bf16_folder(out), sources=sources, overwrite=overwrite) as trained,
    ):
        yield quantized, trained


def bf16_folder(out: Path) -> Path:
    """Return where the trained BF16 weights of an output go."""
    return out.with_name(f"{out.name}.bf16")


def write_bf16(
    teacher: Path,
    folder: Path,
    weights: Mapping[str, Tensor],
    *,
    distillation: Mapping[str, Any] | None = None,
    command: Sequence[str],
    files: Mapping[str, Mapping[str, Any]] | None = None,
) -> Manifest:
    """Write the teacher's checkpoint with changed tensors in place of its own.

    Args:
        teacher: The BF16 checkpoint.
        folder: An empty folder.
        weights: Changed tensors by name, float32; stored as BF16 values in the dtype the teacher
            stores. What has no tensor's name is not of this checkpoint.
        distillation: For the manifest, where weights were trained.
        command: For the manifest.
        files: JSON files to write beside the weights, by name.

    Raises:
        OutputError: if a file cannot be written.
    """
    checkpoint = Checkpoint(teacher)
    layout = [TensorSpec(info.name, info.dtype, info.shape) for info in checkpoint.in_file_order()]
    source, written = {}, {}
    with CheckpointWriter(folder, layout) as writer:
        for spec in layout:
            tensor = checkpoint.load(spec.name)
            source[spec.name] = hashlib.sha256(tensor_bytes(tensor)).hexdigest()
            if spec.name in weights:
                tensor = weights[spec.name].bfloat16().to(tensor.dtype)
            sha256 = writer.write(spec.name, tensor)
            written[spec.name] = TensorRecord(sha256, spec.dtype, spec.shape)
        writer.finish()
    copy_side_files(checkpoint.folder, folder)
    _copy_config(checkpoint.folder, folder)
    for name, values in (files or {}).items():
        write_json(folder / name, values)
    return _write_manifest(
        folder,
        "bf16",
        source,
        written,
        items=(),
        distillation=distillation or {},
        command=command,
    )


def write_quantized(
    source: Path,
    run: Path,
    folder: Path,
    weights: Mapping[str, Tensor],
    *,
    distillation: Mapping[str, Any],
    command: Sequence[str],
) -> Manifest:
    """Pack a BF16 checkpoint with a run's formats, and its own weight amax.

    Args:
        source: The trained BF16 checkpoint.
        run: The quantized folder that training started from.
        folder: An empty folder.
        weights: Give the amax of each quantized input, as ``input_amax.{linear}``.
        distillation: For the manifest.
        command: For the manifest.

    Raises:
        CalibrationError: if a weight became all zero.
        OutputError: if a file cannot be written.
    """
    checkpoint = Checkpoint(source)
    formats = read_recipe_formats(run / RECIPE_NAME, list_linears(checkpoint.config))
    amaxes = _amaxes(checkpoint, quantized_only(formats), weights)
    require_usable(amaxes, formats)
    layout = {spec.name: spec for spec in build_layout(checkpoint, formats)}
    hashes, written = {}, {}
    with CheckpointWriter(folder, list(layout.values())) as writer:
        for name in checkpoint.tensors:
            hashes[name] = checkpoint.sha256(name)
            fqn = name.removesuffix(".weight")
            tensors = {name: checkpoint.load(name)}
            if fqn in amaxes:
                packed = pack_linear(tensors[name].bfloat16(), formats[fqn], amaxes[fqn])
                tensors = {f"{fqn}.{leaf}": tensor for leaf, tensor in packed.items()}
            for key, tensor in tensors.items():
                sha256 = writer.write(key, tensor)
                written[key] = TensorRecord(sha256, layout[key].dtype, layout[key].shape)
        writer.finish()
    recipe, _ = read_recipe(run)
    write_side_files(folder, checkpoint, recipe, formats, amaxes)
    items = Manifest.read(run).items
    return _write_manifest(
        folder,
        recipe.name,
        hashes,
        written,
        items=items,
        distillation=distillation,
        command=command,
    )


def _amaxes(
    checkpoint: Checkpoint, fqns: Iterable[str], weights: Mapping[str, Tensor]
) -> dict[str, Amax]:
    amaxes = {}
    for fqn in fqns:
        weight = checkpoint.load(f"{fqn}.weight").to(torch.bfloat16)
        amaxes[fqn] = Amax(kernels.amax(weight), weights.get(f"{INPUT_AMAX}{fqn}"))
    return share_qkv(amaxes)


def _copy_config(source: Path, folder: Path) -> None:
    with writing(folder / "config.json"):
        (folder / "config.json").write_bytes((source / "config.json").read_bytes())


def _write_manifest(
    folder: Path,
    name: str,
    source: Mapping[str, str],
    written: Mapping[str, TensorRecord],
    *,
    items: Sequence[tuple[str, str]],
    distillation: Mapping[str, Any],
    command: Sequence[str],
) -> Manifest:
    manifest = Manifest(
        format=name,
        command=tuple(command),
        source=source,
        tensors=written,
        files=hash_files(folder),
        items=items,
        versions=library_versions(),
        distillation=distillation,
    )
    manifest.write(folder)
    return manifest
