"""``nvvl export onnx``: a checkpoint, BF16 or quantized, as three graphs without plugins.

    vision.onnx    vision.data      tiles -> image embeddings
    prefill.onnx   language.data    any number of tokens and the states before -> logits, states
    decode.onnx    (the same file)  one token and the states before -> logits, states
                                    or in parts: prefill.0.onnx, prefill.1.onnx, ...
    vision_scales.safetensors       of an FP8 vision graph of a BF16 vision tower
    embedding.safetensors           token id -> embedding, where the graphs do not look it up
    io.json                         names, shapes, dtypes and states of the graphs
    recipe.json                     what they look like, resolved
    manifest.json                   hashes of every file, and of every tensor they were made from
    config.json, tokenizer, ...     as in the checkpoint

The checkpoint is read once, a tensor at a time, and every tensor must have the hash that its
manifest records. The folder appears when it is complete. Nothing here runs a graph; what proves
that they compute what the checkpoint does is `nvvl.export.onnx_parity`.
"""

import json
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx

import nvvl
from nvvl.calib_data.items import Item
from nvvl.calib_data.manifest import load_calibration_set
from nvvl.errors import CheckpointError, EngineError, describe_misfit, require_disk
from nvvl.export.hash_proof import changed_file_faults
from nvvl.export.onnx_data import DataFile
from nvvl.export.onnx_graph import Graph
from nvvl.export.onnx_io import IO_NAME, describe_graphs
from nvvl.export.onnx_language import EMBEDDINGS, build_language_graph
from nvvl.export.onnx_recipe import GraphRecipe
from nvvl.export.onnx_vision import build_vision_graph
from nvvl.export.onnx_weights import CheckpointWeights, read_hashes
from nvvl.export.parts import layer_sizes, split_layers
from nvvl.export.vision_fp8 import NUM_IMAGES, SCALES_NAME, find_scales, use_scales
from nvvl.model.checkpoint import Checkpoint
from nvvl.model.checkpoint_writer import write_safetensors
from nvvl.model.hashing import changed_files, hash_file
from nvvl.progress import Progress
from nvvl.quantize.manifest import write_json
from nvvl.quantize.side_files import copied_files
from nvvl.staging import MANIFEST_NAME, staged_folder

EMBEDDING_NAME = "embedding.safetensors"
RECIPE_NAME = "recipe.json"

# Buffers that no graph computes with: the processor normalizes pixels, servers read the summary.
_NOT_COMPUTED = (
    "vision_model.radio_model.input_conditioner.",
    "vision_model.radio_model.summary_idxs",
)

# Graphs, tokenizer and JSON files beside the weights.
_SMALL_FILES_BYTES = 64 << 20


@dataclass(frozen=True)
class ExportResult:
    """What was written.

    Attributes:
        folder: Where.
        files: Bytes of each file, by name.
        formats: How many linears have each format.
    """

    folder: Path
    files: Mapping[str, int]
    formats: Mapping[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {
            "folder": str(self.folder),
            "files": dict(self.files),
            "formats": dict(self.formats),
        }


def export_onnx(
    run: Path,
    dest: Path,
    recipe: GraphRecipe,
    *,
    overwrite: bool = False,
    vision_items: Sequence[Item] | None = None,
    progress: Progress | None = None,
    command: Sequence[str] = (),
) -> ExportResult:
    """Write the graphs of a checkpoint.

    Args:
        run: a BF16 checkpoint, or one that ``nvvl quantize`` wrote.
        dest: the folder to write.
        recipe: what the graphs look like.
        overwrite: whether an earlier export at ``dest`` may be replaced.
        vision_items: whose images an FP8 vision graph finds its scales on; some of the default
            set if None.
        progress: called after each block and layer.
        command: the command line, for the manifest.

    Raises:
        CalibrationError: if an FP8 vision graph is asked for and there are no images.
        CheckpointError: if the checkpoint is not what its manifest says.
        OutputError: if ``dest`` exists, or the disk is too small.
    """
    checkpoint = Checkpoint(run)
    weights = CheckpointWeights(checkpoint, recipe.dtype)
    if weights.formats:
        _require_unchanged_files(run)
    with staged_folder(dest, sources=[run], overwrite=overwrite) as folder:
        _require_space(folder, checkpoint, recipe)
        if recipe.vision == "fp8":
            items = vision_items or load_calibration_set("default", num_items=NUM_IMAGES).items
            scales = find_scales(weights, items, progress=progress)
            use_scales(weights, scales)
            write_safetensors(folder / SCALES_NAME, scales)
        graphs = _write_graphs(folder, weights, recipe, progress)
        if recipe.token_embedding == "sidecar":
            name = f"{EMBEDDINGS}.weight"
            write_safetensors(folder / EMBEDDING_NAME, {name: weights.stored(name)})
        _read_the_rest(weights)
        for path in [run / "config.json", *copied_files(run)]:
            shutil.copyfile(path, folder / path.name)
        write_json(folder / IO_NAME, describe_graphs(graphs, checkpoint.config, recipe))
        write_json(folder / RECIPE_NAME, {"graphs": recipe.to_dict(), "formats": weights.formats})
        write_json(folder / MANIFEST_NAME, _make_manifest(folder, weights, command))
        files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    counts: dict[str, int] = {}
    for linear_format in weights.formats.values():
        counts[linear_format] = counts.get(linear_format, 0) + 1
    return ExportResult(dest, files, counts)


def file_faults(dest: Path) -> list[str]:
    """List files of a folder of graphs that are missing or not what its manifest says.

    Raises:
        EngineError: if the manifest cannot be read.
    """
    return changed_file_faults(dest, read_manifest(dest)["files"])


def read_manifest(dest: Path) -> dict[str, Any]:
    """Read ``manifest.json`` of a folder of graphs.

    Raises:
        EngineError: if it is missing or that of something else.
    """
    path = dest / MANIFEST_NAME
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        made_from = manifest["checkpoint"]
        is_known = isinstance(manifest["files"], dict) and "manifest_sha256" in made_from
        is_known = is_known and isinstance(made_from["tensors"], dict)
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise EngineError(
            f"{path}: cannot be read as a manifest ({describe_misfit(error)}); export again"
        ) from None
    if not is_known:
        raise EngineError(f"{path}: not the manifest of a folder of graphs; export again")
    return manifest


def _write_graphs(
    folder: Path, weights: CheckpointWeights, recipe: GraphRecipe, progress: Progress | None
) -> list[Graph]:
    with DataFile(folder / "vision.data") as data:
        graphs = [build_vision_graph(weights, recipe, data, progress=progress)]
    sizes = {name: info.nbytes for name, info in weights.checkpoint.tensors.items()}
    parts = split_layers(layer_sizes(sizes), recipe.num_parts)
    with DataFile(folder / "language.data") as data:
        for is_decode in (False, True):
            for number, layers in enumerate(parts):
                base = "decode" if is_decode else "prefill"
                graphs.append(
                    build_language_graph(
                        weights,
                        recipe,
                        data,
                        is_decode=is_decode,
                        name=base if len(parts) == 1 else f"{base}.{number}",
                        layers=layers,
                        progress=progress,
                    )
                )
    for graph in graphs:
        path = folder / f"{graph.name}.onnx"
        onnx.save(graph.to_model(), path)
        onnx.checker.check_model(path)
    return graphs


def _read_the_rest(weights: CheckpointWeights) -> None:
    """Hash what no graph computes with, after seeing that all else was used."""
    unread = sorted(weights.checkpoint.tensors.keys() - weights.sha256.keys())
    for name in unread:
        assert name.startswith(_NOT_COMPUTED), f"{name} is in no graph"
        weights.stored(name)


def _require_unchanged_files(run: Path) -> None:
    changed = changed_files(run, read_hashes(run).files)
    if changed:
        raise CheckpointError(
            f"{run}: {', '.join(changed)}: changed since the checkpoint was written; quantize it "
            f"again, and see: nvvl verify {shlex.quote(str(run))}"
        )


def _require_space(folder: Path, checkpoint: Checkpoint, recipe: GraphRecipe) -> None:
    """Refuse a disk that is too small, counting float32 for 16-bit tensors of f32 graphs."""
    required = _SMALL_FILES_BYTES
    for info in checkpoint.tensors.values():
        wide = recipe.dtype == "f32" and info.dtype in ("BF16", "F16")
        required += info.nbytes * (2 if wide else 1)
    require_disk(folder.parent, required, "the graphs need about")


def _make_manifest(
    folder: Path, weights: CheckpointWeights, command: Sequence[str]
) -> dict[str, Any]:
    run = weights.checkpoint.folder
    manifest = run / MANIFEST_NAME
    return {
        "nvvl_version": nvvl.__version__,
        "versions": {name: version(name) for name in ("onnx", "torch")},
        "command": list(command),
        "checkpoint": {
            "manifest_sha256": hash_file(manifest) if manifest.is_file() else None,
            "tensors": dict(sorted(weights.sha256.items())),
        },
        "files": {path.name: hash_file(path) for path in sorted(folder.iterdir())},
    }
