"""Engines of the embedded model and of one full-size block of each kind, built and measured.

    python benchmarks/engines.py [--size embedded|blocks] [--target sm120] [--work DIR]

Builds BF16, FP8 and NVFP4 with TensorRT-RTX, which needs no GPU, and prints for each engine: bytes
of weights in its graph, bytes of the engine, seconds, and the peak memory of the builder's process.
``blocks`` is a random checkpoint with one Mamba2, one MLP and one attention layer
and one vision block of the 12B model's sizes; its language model is cut into three parts, so that
each layer is an engine of its own. A target that lacks a format is left out, and said.

Exit 1 if a full-size Mamba2 block takes longer than ``MAMBA_SECONDS``. No engine is run.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from nvvl.benchmarks.machine import describe_machine
from nvvl.benchmarks.make_checkpoint import make_checkpoint
from nvvl.export.engine import EngineOptions, EngineResult
from nvvl.export.engine_graphs import read_graph
from nvvl.export.engine_run import build_from_checkpoint
from nvvl.export.engine_targets import TENSORRT_RTX, Precision
from nvvl.export.onnx_export import export_onnx
from nvvl.export.onnx_recipe import GraphRecipe
from nvvl.model.resolve import resolve_model

FORMATS: tuple[Precision, ...] = ("bf16", "fp8", "nvfp4")
MAMBA_SECONDS = 15.0
_SAMPLES = {"embedded": 64, "blocks": 2}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=("embedded", "blocks"), default="embedded")
    parser.add_argument("--target", default="sm120")
    parser.add_argument("--work", type=Path, default=Path("runs/engines"))
    arguments = parser.parse_args()
    work: Path = arguments.work / arguments.size
    work.mkdir(parents=True, exist_ok=True)
    print(json.dumps({"machine": describe_machine(), "target": arguments.target}))
    print(f"{'engine':18} {'weights':>12} {'engine':>12} {'seconds':>8} {'peak MB':>8}")
    recipe = GraphRecipe(num_parts=3 if arguments.size == "blocks" else 1)
    slow = []
    for name, checkpoint in make_checkpoints(arguments.size, work).items():
        if arguments.target not in TENSORRT_RTX.targets[name]:
            print(f"{name}: not built, {arguments.target} has no {name}")
            continue
        options = EngineOptions(builder=TENSORRT_RTX, targets=(arguments.target,))
        dest = work / f"engines-{name}"
        result = build_from_checkpoint(checkpoint, dest, recipe, options, overwrite=True)
        weights = graph_weights(checkpoint, work, recipe)
        print_engines(name, result, weights)
        if arguments.size == "blocks":
            for part in ("prefill.0", "decode.0"):  # the Mamba2 layer
                if result.engines[part].seconds > MAMBA_SECONDS:
                    slow.append(f"{name} {part}")
    if slow:
        sys.exit(f"Mamba2 blocks over {MAMBA_SECONDS:.0f} s: {', '.join(slow)}")


def make_checkpoints(size: str, work: Path) -> dict[Precision, Path]:
    """Make what is missing of a checkpoint in each format."""
    source = resolve_model("embedded") if size == "embedded" else work / "bf16"
    if size == "blocks" and not (source / "config.json").exists():
        make_checkpoint("blocks", source)
    folders: dict[Precision, Path] = {"bf16": source}
    for name in FORMATS[1:]:
        folders[name] = work / name
        if not (work / name / "manifest.json").exists():
            run_nvvl("quantize", name, source, work / name, "--samples", str(_SAMPLES[size]))
    return folders


def graph_weights(checkpoint: Path, work: Path, recipe: GraphRecipe) -> dict[str, int]:
    """Return the bytes of weights of each graph of a checkpoint."""
    graphs = work / "graphs"
    export_onnx(checkpoint, graphs, recipe, overwrite=True)
    return {path.stem: read_graph(path).weight_bytes for path in graphs.glob("*.onnx")}


def print_engines(name: str, result: EngineResult, weights: dict[str, int]) -> None:
    """Print one line an engine."""
    for graph, engine in result.engines.items():
        print(
            f"{name + ' ' + graph:18} {weights[graph]:12,} {engine.size_bytes:12,} "
            f"{engine.seconds:8.2f} {engine.peak_memory_bytes / 1e6:8.0f}"
        )


def run_nvvl(*arguments: Path | str) -> None:
    """Run a verb in a process of its own, so that its memory is given back."""
    command: Sequence[str] = [sys.executable, "-m", "nvvl", *map(str, arguments)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
