"""Quantize one checkpoint with nvvl and with its peers, and compare time and memory.

    OMP_NUM_THREADS=1 python benchmarks/peers.py --size 1b --llm-compressor VENV/bin/python

Each run is a process of its own, one after the other, on the same random checkpoint
(`make_checkpoint.py`), whose files are read once before each so that all find them in memory:

* calibrated: the same 8 texts of 512 tokens. ModelOpt's own ``mtq.quantize`` and
  ``export_hf_checkpoint`` on transformers' model of the language part alone; nvvl on the whole
  checkpoint, so it also copies the vision tower, which texts do not run;
* weights alone, NVFP4: llm-compressor's ``model_free_ptq`` on the same checkpoint, told to leave
  out what nvvl leaves out. It needs another transformers, so it has an interpreter of its own;
  without ``--llm-compressor`` it is not run.

Seconds begin after all imports. nvvl's are of the whole run, from opening the checkpoint to giving
the output its name, flushed to the disk; ModelOpt's are of calibrating and exporting, loading not
counted; llm-compressor's are of its one call. The peak is the largest resident set of the process,
imports included. Both must have quantized as many linears; how far the input amax of a calibrated
pair are apart is printed. A peer that fails is reported with its error.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NUM_ITEMS = 8
NUM_TOKENS = 512
_RUNS = Path(__file__).with_name("peer_runs.py")
_LANGUAGE = "language_model."


def make_texts(source: Path, folder: Path) -> Path:
    """Write the items for nvvl as JSONL, and the same token ids for ModelOpt; return the JSONL."""
    from nvvl.calib_data.manifest import load_calibration_set
    from nvvl.model.processor import Processor
    from nvvl.model.prompt import Message

    folder.mkdir(parents=True, exist_ok=True)
    processor = Processor.from_folder(source)
    drawn = load_calibration_set("default", num_items=400).items  # 400 have words enough
    words = iter(
        " ".join(
            message.content
            for item in drawn
            if not (item.images or item.videos)
            for message in item.messages
        ).split()
    )

    def count(text: str) -> int:
        return len(processor((Message("user", text), Message("assistant", "yes"))).input_ids)

    lines, ids = [], []
    for _ in range(NUM_ITEMS):
        text, length = "", 0
        while length < NUM_TOKENS:
            longer = f"{text} {next(words)}".strip()
            if (new := count(longer)) <= NUM_TOKENS:  # else the word does not fit: try the next
                text, length = longer, new
        messages = (Message("user", text), Message("assistant", "yes"))
        ids.append(processor(messages).input_ids.tolist())
        turns = [{"role": message.role, "content": message.content} for message in messages]
        lines.append(json.dumps({"messages": turns}))
    (folder / "ids.json").write_text(json.dumps(ids), encoding="utf-8")
    path = folder / "texts.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_language_part(source: Path, folder: Path) -> None:
    """Write the language model alone, as transformers reads it."""
    from nvvl.model.checkpoint import Checkpoint, CheckpointWriter, TensorSpec

    if (folder / "config.json").exists():
        return
    checkpoint = Checkpoint(source)
    names = [name for name in checkpoint.tensors if name.startswith(_LANGUAGE)]
    layout = [
        TensorSpec(name.removeprefix(_LANGUAGE), checkpoint.info(name).dtype, info.shape)
        for name in names
        for info in [checkpoint.info(name)]
    ]
    with CheckpointWriter(folder, layout) as writer:
        for name in names:
            writer.write(name.removeprefix(_LANGUAGE), checkpoint.load(name))
        writer.finish()
    config = dict(checkpoint.config.raw["llm_config"])
    config.pop(
        "time_step_limit", None
    )  # transformers refuses its infinity; the default is the same
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def run(tool: str, preset: str, work: Path, source: Path, python: str) -> dict[str, Any]:
    """Run one tool once in a process of its own; delete what it wrote but for the scales."""
    for path in source.glob("*.safetensors"):
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass
    out, result = work / f"out-{tool}-{preset}", work / "result.json"
    shutil.rmtree(out, ignore_errors=True)
    result.unlink(missing_ok=True)
    log = work / f"{tool}-{preset}.log"
    # -P: else this folder is on the path, where kernels.py hides a library's
    command = [python, "-P", str(_RUNS), tool, preset, str(source), str(out), str(work)]
    with log.open("w", encoding="utf-8") as file:
        child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    row: dict[str, Any] = {"tool": tool, "format": preset, "peak_bytes": usage.ru_maxrss * 1024}
    if child.returncode:
        last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
        return row | {"error": f"exit {child.returncode}: {''.join(last)[:300]}"}
    row |= json.loads(result.read_text())
    row["output_bytes"] = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    shutil.rmtree(out)
    return row


def compare_amaxes(ours: dict[str, float], theirs: dict[str, float]) -> dict[str, Any]:
    """Say how far the input amax of the two are apart, as a part of the peer's."""
    apart = [abs(ours[name] - theirs[name]) / theirs[name] for name in ours]
    return {"median": statistics.median(apart), "largest": max(apart)}


def compare(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    """Return the ratios peer over nvvl, by round and their median."""
    if any("error" in row for pair in pairs for row in pair):
        return {"error": next(row["error"] for pair in pairs for row in pair if "error" in row)}
    counts = {row["linears"] for pair in pairs for row in pair}
    if len(counts) > 1:
        raise SystemExit(f"not the same work: {sorted(counts)} linears were quantized")
    ratios: dict[str, Any] = {"linears": counts.pop()}
    for key in ("wall_s", "cpu_s", "peak_bytes"):
        rounds = [peer[key] / ours[key] for ours, peer in pairs]
        ratios[key] = {"median": statistics.median(rounds), "rounds": rounds}
    return ratios


def main() -> None:
    """Parse the options, run everything and print it."""
    from nvvl.benchmarks.machine import describe_machine
    from nvvl.benchmarks.make_checkpoint import SHARD_BYTES, make_checkpoint

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SHARD_BYTES, default="1b")
    parser.add_argument("--work", type=Path, default=Path("runs/peers"))
    parser.add_argument("--llm-compressor", metavar="PYTHON", help="interpreter that has it")
    parser.add_argument("--formats", default="fp8,nvfp4", help="calibrated ones")
    parser.add_argument("--rounds", type=int, default=3, help="of the runs without data")
    arguments = parser.parse_args()
    work: Path = (arguments.work / arguments.size).resolve()
    source = work / "checkpoint"
    if not (source / "config.json").exists():
        shutil.rmtree(source, ignore_errors=True)
        make_checkpoint(arguments.size, source)
    make_texts(source, work)
    write_language_part(source, work / "language")
    report: dict[str, Any] = {"size": arguments.size, "machine": describe_machine()}
    report["rows"], report["peer_over_nvvl"] = [], {}
    comparisons = [("modelopt", preset, 1) for preset in arguments.formats.split(",") if preset]
    if arguments.llm_compressor:
        comparisons.append(("llm-compressor", "nvfp4-w4a16", arguments.rounds))
    for peer, preset, rounds in comparisons:
        python = sys.executable if peer == "modelopt" else arguments.llm_compressor
        model = work / "language" if peer == "modelopt" else source
        pairs = []
        for _ in range(rounds):
            ours = run("nvvl", preset, work, source, sys.executable)
            pairs.append((ours, run(peer, preset, work, model, python)))
        ratios = compare(pairs)
        amaxes = [row.pop("amaxes", None) for row in pairs[-1]]
        if all(amaxes):
            ratios["input_amax_apart"] = compare_amaxes(*amaxes)
        report["rows"] += [row for pair in pairs for row in pair]
        report["peer_over_nvvl"][f"{peer}, {preset}"] = ratios
        report["load_after"] = os.getloadavg()[0]
        # after each, because the next one may take an hour
        (work / "peers.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
