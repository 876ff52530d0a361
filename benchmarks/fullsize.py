"""Quantize a checkpoint of full size and say what it took: memory, seconds, share of the machine.

    python benchmarks/fullsize.py --size 12b [--work DIR] [--runs nvfp4,fp8,nvfp4-w4a16,cp]

Makes a random checkpoint (`make_checkpoint.py`) and a calibration set of 32 pictures of one tile
(about 10,000 tokens), then runs each format in a process of its own, proves the output with
``nvvl verify`` and deletes it. Needs free disk of the checkpoint plus the largest output; ``cp``
copies the checkpoint once for comparison, and needs twice its size.

What is printed of each run:

* peak: the largest resident set of the process, what ``/usr/bin/time -v`` calls maximum;
* seconds of each phase, as the main thread saw them, and CPU seconds of the whole process;
* of calibrated runs: the floating-point operations of vision tower, projector and layers' linears
  over wall seconds, as a fraction of the rate at which this machine multiplies bfloat16 matrices
  (``nvvl.model.products.linear`` on the MLP's shape, same threads, measured right before and after
  the run), and the same over CPU seconds, which load elsewhere changes little;
* of calibrated runs: the CPU seconds of amax, packing, hashing and writing blocks, as a share.

Everything lies in ``DIR/SIZE``, the results in ``results.jsonl``; a run that is there is not made
again, and a killed one goes on where it stopped. Times of several sittings are added up.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from nvvl.benchmarks.machine import describe_machine
from nvvl.benchmarks.make_checkpoint import SHARD_BYTES, make_checkpoint

NUM_ITEMS = 32
RUNS = ("nvfp4", "fp8", "nvfp4-w4a16", "cp")


def make_items(folder: Path, tile: int) -> Path:
    """Write 32 pictures of one tile with a question and an answer each; return the JSONL file."""
    from nvvl.calib_data.manifest import load_calibration_set

    path = folder / "items.jsonl"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    for item in load_calibration_set("default", num_items=4 * NUM_ITEMS).items:
        if len(item.images) != 1 or len(lines) == NUM_ITEMS:
            continue
        name = f"{len(lines):02}.png"
        item.images[0].convert("RGB").resize((tile, tile)).save(folder / name)
        turns = [{"role": m.role, "content": m.content} for m in item.messages[:2]]
        lines.append(json.dumps({"messages": turns, "image": name}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def run_child(arguments: list[str]) -> tuple[int, float, int]:
    """Run this file in a process of its own; return exit code, CPU seconds and peak bytes."""
    # as a module: a script has its folder on the path, where kernels.py hides a library's
    child = subprocess.Popen([sys.executable, "-m", "nvvl.benchmarks.fullsize", *arguments])
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    return child.returncode, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def measure_format(preset: str, source: Path, work: Path, items: Path) -> dict[str, Any]:
    """Quantize and verify once; delete the output."""
    out, sittings = work / f"out-{preset}", work / f"sittings-{preset}.jsonl"
    code, cpu_s, peak = run_child(
        ["--child", preset, "--work", str(work), "--items", str(items), str(source)]
    )
    with sittings.open("a", encoding="utf-8") as file:
        phases = work / f"phases-{preset}.json"
        seen = json.loads(phases.read_text()) if phases.exists() else {}
        phases.unlink(missing_ok=True)
        file.write(json.dumps({"cpu_s": cpu_s, "peak_bytes": peak} | seen) + "\n")
    if code:
        raise SystemExit(f"{preset}: the process ended with {code}; the same command goes on")
    result = add_up([json.loads(line) for line in sittings.read_text().splitlines()])
    result["output_bytes"] = sum(path.stat().st_size for path in out.iterdir())
    command = [sys.executable, "-m", "nvvl", "verify", str(out), "--against", str(source)]
    start = time.perf_counter()
    verified = subprocess.run([*command, "--no-logits"], capture_output=True, text=True)
    result["verify_s"] = time.perf_counter() - start
    result["verified"] = verified.returncode == 0
    result["verify_says"] = (verified.stdout.splitlines() or [verified.stderr[-300:]])[-1]
    if verified.returncode == 0:
        shutil.rmtree(out)
    sittings.unlink()
    return result


def add_up(sittings: list[dict[str, Any]]) -> dict[str, Any]:
    """Join the sittings of one run: seconds are added, the peak is the largest."""
    whole: dict[str, Any] = {"sittings": len(sittings), "phases_s": {}}
    for sitting in sittings:
        for phase, seconds in sitting.pop("phases_s", {}).items():
            whole["phases_s"][phase] = whole["phases_s"].get(phase, 0.0) + seconds
        for key, value in sitting.items():
            if key.startswith("peak"):
                whole[key] = max(whole.get(key, 0), value)
            elif key.endswith("_s"):
                whole[key] = whole.get(key, 0.0) + value
            else:
                whole[key] = value
    if whole.get("flop"):
        rate = whole["matrix_gflops_per_cpu_s"] * 1e9
        whole["fraction_of_rate_wall"] = whole["flop"] / (
            whole["wall_s"] * whole["matrix_gflops_wall"] * 1e9
        )
        whole["fraction_of_rate_cpu"] = whole["flop"] / (whole["cpu_s"] * rate)
        whole["packing_share_cpu"] = whole["packing_s"] / whole["cpu_s"]
    return whole


def child(preset: str, source: Path, work: Path, items: Path) -> None:
    """Quantize, timing phases; what was measured goes to ``phases-PRESET.json``."""
    import torch

    from nvvl.calib_data.manifest import load_calibration_set
    from nvvl.quantize.output import Output
    from nvvl.quantize.presets import load_recipe
    from nvvl.quantize.recipe import CALIBRATED_FORMATS
    from nvvl.quantize.walk import quantize_checkpoint

    clock = Clock(work / f"phases-{preset}.json")
    # the walk's own work on a finished block, whichever thread does it
    Output.finish_block = clock.timed(Output.finish_block)  # type: ignore[method-assign]
    recipe = replace(load_recipe(preset), num_calibration_items=NUM_ITEMS)  # type: ignore[arg-type]
    calibrated = preset in CALIBRATED_FORMATS
    chosen = load_calibration_set(items, num_items=NUM_ITEMS) if calibrated else None
    rates = [matrix_rate(source)] if calibrated else []
    clock.start()
    quantize_checkpoint(
        source, work / f"out-{preset}", recipe, chosen, progress=clock.see, command=["fullsize"]
    )
    clock.end()
    if chosen is not None:
        rates.append(matrix_rate(source))
        tokens, flop = count_flop(source, chosen.items)
        clock.values |= {
            "tokens": tokens,
            "flop": flop,
            "threads": torch.get_num_threads(),
            "matrix_gflops_wall": sum(rate[0] for rate in rates) / 2,
            "matrix_gflops_per_cpu_s": sum(rate[1] for rate in rates) / 2,
        }
    clock.write()


class Clock:
    """Seconds by phase, and CPU seconds of wrapped calls."""

    def __init__(self, path: Path) -> None:
        self.values: dict[str, Any] = {"phases_s": {}, "packing_s": 0.0, "wall_s": 0.0}
        self._path = path
        self._last = self._begin = time.perf_counter()

    def start(self) -> None:
        """Begin to count."""
        self._last = self._begin = time.perf_counter()

    def see(self, stage: str, _done: int, _total: int) -> None:
        """Take a step of progress; written down at once, since a killed run cannot do it later."""
        now = time.perf_counter()
        phase = phase_of(stage)
        phases = self.values["phases_s"]
        phases[phase] = phases.get(phase, 0.0) + now - self._last
        self._last, self.values["wall_s"] = now, now - self._begin
        self.write()

    def end(self) -> None:
        """Count what came after the last step of progress."""
        self.see("finish files", 0, 0)

    def write(self) -> None:
        """Write down what is known so far."""
        self._path.write_text(json.dumps(self.values), encoding="utf-8")

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function so that its CPU seconds are counted."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            before = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.values["packing_s"] += time.thread_time() - before

        return wrapped


def phase_of(stage: str) -> str:
    """Name the phase that a block belongs to."""
    for part, phase in (
        ("vision_model", "vision tower"),
        ("mlp1", "projector"),
        ("embeddings", "embeddings"),
        ("layers", "layers"),
    ):
        if part in stage:
            return phase
    return stage


def matrix_rate(source: Path) -> tuple[float, float]:
    """Return GFLOP a second of bfloat16 products of the MLP's shape: by wall and by CPU second."""
    import torch

    from nvvl.model.config import VLMConfig
    from nvvl.model.products import linear

    config = VLMConfig.from_folder(source).language
    x = torch.randn(320, config.hidden_size).bfloat16()
    weight = torch.randn(config.intermediate_size, config.hidden_size).bfloat16()
    flop = 2 * x.shape[0] * weight.numel()
    repeats = max(3, round(2e12 / flop / 10))
    linear(x, weight)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        linear(x, weight)
    return (
        repeats * flop / (time.perf_counter() - wall) / 1e9,
        repeats * flop / (time.process_time() - cpu) / 1e9,
    )


def count_flop(source: Path, items: Any) -> tuple[int, int]:
    """Count tokens of all items, and the operations of every linear they went through."""
    from nvvl.model.checkpoint import Checkpoint
    from nvvl.model.processor import Processor

    checkpoint = Checkpoint(source)
    processor, config = Processor.from_folder(source), checkpoint.config
    parameters = {"vision": 0, "projector": 0, "layers": 0}
    for info in checkpoint.tensors.values():
        if len(info.shape) == 2 and info.name.endswith(".weight"):
            for key, part in (
                ("vision", ".blocks."),
                ("projector", "mlp1."),
                ("layers", ".layers."),
            ):
                parameters[key] += info.numel if part in info.name else 0
    patches = (config.image_size // config.vision.patch_size) ** 2 + config.vision.num_prefix_tokens
    tokens = flop = 0
    for item in items:
        inputs = processor(item.messages, images=item.images, videos=item.videos)
        tiles = len(inputs.pixel_values)
        tokens += len(inputs.input_ids)
        flop += 2 * len(inputs.input_ids) * parameters["layers"]
        flop += 2 * tiles * patches * parameters["vision"]
        flop += 2 * tiles * config.tokens_per_tile * parameters["projector"]
    return tokens, flop


def measure_copy(source: Path, work: Path) -> dict[str, Any]:
    """Copy the checkpoint with ``cp`` and flush it to the disk."""
    copy = work / "copy"
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(source.resolve()), str(copy)], check=True)
    subprocess.run(["sync", "-f", str(copy)], check=True)
    seconds = time.perf_counter() - start
    shutil.rmtree(copy)
    return {"wall_s": seconds, "source_bytes": sum(p.stat().st_size for p in source.iterdir())}


def main() -> None:
    """Parse the options, measure what is missing and print all of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SHARD_BYTES, default="1b")
    parser.add_argument("--work", type=Path, default=Path("runs/fullsize"))
    parser.add_argument("--runs", default=",".join(RUNS), help="which, in this order")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--items", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("source", type=Path, nargs="?", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.source, arguments.work, arguments.items)
        return
    work: Path = arguments.work / arguments.size
    work.mkdir(parents=True, exist_ok=True)
    source = work / "checkpoint"
    if not (source / "config.json").exists():
        shutil.rmtree(source, ignore_errors=True)
        make_checkpoint(arguments.size, source)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    items = make_items(work / "items", config["force_image_size"])
    path = work / "results.jsonl"
    known = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for run in arguments.runs.split(","):
        if run in {result["run"] for result in known}:
            continue
        machine = describe_machine()
        result = {"run": run, "size": arguments.size} | machine
        result |= {"commit": commit(), "omp_num_threads": os.environ.get("OMP_NUM_THREADS", "")}
        if run == "cp":
            result |= measure_copy(source, work)
        else:
            result |= measure_format(run, source, work, items)
        result["load_after"] = os.getloadavg()[0]
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        known.append(result)
    for result in known:
        print(json.dumps(result, indent=1))


def commit() -> str:
    """Return the commit that is checked out, or nothing outside a repository."""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


if __name__ == "__main__":
    main()
