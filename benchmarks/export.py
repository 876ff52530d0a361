"""Graphs of the embedded model, of one full-size block of each kind, or of given checkpoints.

    python benchmarks/export.py [--size embedded|blocks] [--checkpoint DIR]... [--work DIR]

Runs ``nvvl export onnx`` in a process of its own and prints for each format: seconds of the whole
command, start included, its CPU seconds, the peak of its resident memory, and the bytes of the
checkpoint's weights and of the graphs. ``blocks`` is a random checkpoint with one Mamba2, one MLP,
one attention layer and one vision block of the 12B model's sizes. ``--checkpoint`` exports folders
that are there instead, such as a 12B one; it needs their size again of free disk for a while.

Exit 1 if a command takes longer than ``SECONDS`` at a named size, or more than ``PEAK_BYTES``.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from nvvl.benchmarks.engines import make_checkpoints
from nvvl.benchmarks.machine import describe_machine

SECONDS = 60.0
PEAK_BYTES = 8e9


@dataclass(frozen=True)
class Export:
    """What one export took."""

    wall_s: float
    cpu_s: float
    peak_bytes: int
    checkpoint_bytes: int
    graph_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=("embedded", "blocks"), default="embedded")
    parser.add_argument("--checkpoint", type=Path, action="append", default=[])
    parser.add_argument("--work", type=Path, default=Path("runs/export"))
    arguments = parser.parse_args()
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    print(json.dumps({"machine": describe_machine()}))
    checkpoints: dict[str, Path] = {path.name: path for path in arguments.checkpoint}
    if not checkpoints:
        work = work / arguments.size
        work.mkdir(exist_ok=True)
        checkpoints = {str(n): path for n, path in make_checkpoints(arguments.size, work).items()}
    print(f"{'name':12} {'weights':>14} {'graphs':>14} {'wall s':>8} {'CPU s':>8} {'peak MB':>8}")
    over = []
    for name, checkpoint in checkpoints.items():
        export = measure(checkpoint, work / "graphs")
        print(
            f"{name:12} {export.checkpoint_bytes:14,} {export.graph_bytes:14,} "
            f"{export.wall_s:8.1f} {export.cpu_s:8.1f} {export.peak_bytes / 1e6:8.0f}",
            flush=True,
        )
        if export.peak_bytes > PEAK_BYTES:
            over.append(f"{name}: {export.peak_bytes / 1e9:.1f} GB")
        if not arguments.checkpoint and export.wall_s > SECONDS:
            over.append(f"{name}: {export.wall_s:.0f} s")
    if over:
        sys.exit(f"more than {SECONDS:.0f} s or {PEAK_BYTES / 1e9:.0f} GB: {', '.join(over)}")


def measure(checkpoint: Path, dest: Path) -> Export:
    """Export a checkpoint in a process of its own and delete the graphs."""
    command = [sys.executable, "-m", "nvvl", "export", "onnx", "--overwrite"]
    began = time.perf_counter()
    child = subprocess.Popen([*command, str(checkpoint), str(dest)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"{checkpoint}: nvvl export onnx ended with {child.returncode}")
    export = Export(
        wall_s=time.perf_counter() - began,
        cpu_s=usage.ru_utime + usage.ru_stime,
        peak_bytes=usage.ru_maxrss * 1024,
        checkpoint_bytes=sum(path.stat().st_size for path in checkpoint.glob("model*.safetensors")),
        graph_bytes=sum(path.stat().st_size for path in dest.iterdir()),
    )
    shutil.rmtree(dest)
    return export


if __name__ == "__main__":
    main()
