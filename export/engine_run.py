"""From a checkpoint to engines in one go: its graphs are written, built from, and not kept.

What the headers of a checkpoint tell is refused before a graph is written: a format that the target
lacks, and weights that are too large to build from here.
"""

from collections.abc import Sequence
from pathlib import Path

from nvvl.export.engine import EngineOptions, EngineResult, build_into
from nvvl.export.engine_targets import Precision, require_cache, require_targets
from nvvl.export.onnx_export import export_onnx
from nvvl.export.onnx_recipe import GraphRecipe
from nvvl.export.parts import largest_part, layer_sizes
from nvvl.export.view import CheckpointView, open_view
from nvvl.progress import Progress
from nvvl.staging import staged_folder


def build_from_checkpoint(
    run: Path,
    dest: Path,
    recipe: GraphRecipe,
    options: EngineOptions,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    command: Sequence[str] = (),
) -> EngineResult:
    """Write the graphs of a checkpoint and build an engine of each.

    Args:
        run: A BF16 checkpoint, or one that ``nvvl quantize`` wrote.
        dest: The folder to write.
        recipe: What the graphs look like.
        options: How to build.
        overwrite: Whether an earlier output at ``dest`` may be replaced.
        progress: Called as graphs are written and engines built.
        command: The command line, for the manifest.

    Raises:
        CheckpointError: if the checkpoint is not what its manifest says.
        EngineError: if it cannot be built as asked, or the builder refuses it.
        HardwareError: if building needs more memory than there is.
        OutputError: if ``dest`` exists, or the disk is too small.
    """
    dest = dest.absolute()  # see build_engines
    view = open_view(run)
    require_targets(options.builder, options.targets, find_precisions(view, recipe))
    require_cache(options.builder, recipe.kv_cache, recipe.kv_dtype)
    layers = layer_sizes(graph_bytes(view, recipe))
    options.require_memory("prefill", largest_part(layers, recipe.num_parts), layers)
    with staged_folder(dest, sources=[run], overwrite=overwrite) as folder:
        graphs = folder.parent / "graphs"
        export_onnx(run, graphs, recipe, progress=progress, command=command)
        engines = build_into(folder, graphs, dest, options, progress, command)
    return EngineResult(folder=dest, engines=engines)


def find_precisions(view: CheckpointView, recipe: GraphRecipe) -> frozenset[Precision]:
    """Return what the hardware must have for a checkpoint's graphs."""
    graph: Precision = "bf16" if recipe.dtype == "bf16" else "fp32"
    stored: list[Precision] = [view.stored(fqn) for fqn in view.linears]
    if "fp8" in (recipe.kv_dtype, recipe.vision):
        stored.append("fp8")
    # a BF16 weight has the graph's dtype; norms and states are float32 in any
    return frozenset({"fp32", graph, *(kind for kind in stored if kind != "bf16")})


def graph_bytes(view: CheckpointView, recipe: GraphRecipe) -> dict[str, int]:
    """Return the bytes that each tensor of a checkpoint will have in a graph."""
    wide = 2 if recipe.dtype == "f32" else 1
    return {
        name: header.nbytes * (wide if header.dtype in ("BF16", "F16") else 1)
        for name, header in view.tensors.items()
    }
