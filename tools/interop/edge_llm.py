"""Let TensorRT Edge-LLM read a checkpoint, and compare what its graph holds, byte by byte.

    .venv-edge/bin/python tools/interop/edge_llm.py OUT [--visual] FOLDER...

Run as a program of its own: it imports nothing of nvvl. The exporter's command is run on each
folder as its documentation says, without remote code; it loads the language model (``--visual``:
the vision tower and projector) and writes an ONNX graph with its own plugins. That graph is then
searched for every tensor of that part of the folder: codes and scales of quantized linears must be
there with the same bytes, everything else with the values of the half precision that the exporter
computes in. Exit 1 if one is missing. Nothing is executed: that needs the target's GPU.

What its exporter cannot take of the embedded model: its vision tower is 256 wide, and the exporter
cuts widths into heads of 80, as the released model's are. ``--visual`` is therefore for a
checkpoint of the released geometry.
"""

# pyright: reportMissingImports=false

import argparse
import hashlib
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import torch
from safetensors import safe_open
from torch import Tensor

LANGUAGE, VISION = ("language_model.",), ("vision_model.", "mlp1.")
# Computed by the server in code of its own, from files beside the graph.
_BESIDE = ("input_conditioner.", "patch_generator.")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--visual", action="store_true", help="the vision part alone")
    parser.add_argument("out", type=Path)
    parser.add_argument("folder", type=Path, nargs="+")
    arguments = parser.parse_args()
    print(f"tensorrt-edgellm {version('tensorrt-edgellm')}")
    failed = False
    for folder in arguments.folder:
        dest = arguments.out / folder.name
        export(folder, dest, visual=arguments.visual)
        part = dest / ("visual" if arguments.visual else "llm")
        found, missing = compare(
            folder, read_digests(part), VISION if arguments.visual else LANGUAGE
        )
        print(f"{folder.name}: {found} tensors in its graph, {len(missing)} not found")
        for name in missing:
            print(f"  {name}")
        failed = failed or bool(missing) or not found
    sys.exit(failed)


def export(folder: Path, dest: Path, *, visual: bool) -> None:
    """Run the exporter's command."""
    command = Path(sys.executable).with_name("tensorrt-edgellm-export")
    skip = "--skip-llm" if visual else "--skip-visual"
    done = subprocess.run(
        [str(command), str(folder), str(dest), "--skip-audio", skip],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{folder}: the exporter ended with {done.returncode}\n{done.stderr[-2000:]}")


def read_digests(part: Path) -> set[str]:
    """Return a digest of every tensor in the graph of a folder and in the files beside it."""
    graph = onnx.load(str(part / "model.onnx"), load_external_data=True).graph
    digests = {hashlib.sha256(tensor.raw_data).hexdigest() for tensor in graph.initializer}
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                digests.add(hashlib.sha256(attribute.t.raw_data).hexdigest())
    for path in part.glob("*.safetensors"):
        with safe_open(str(path), "pt") as file:
            digests |= {digest(file.get_tensor(name)) for name in file.offset_keys()}
    return digests


def compare(folder: Path, digests: set[str], prefixes: tuple[str, ...]) -> tuple[int, list[str]]:
    """Count tensors of a checkpoint that the graph has; name those it has not."""
    found, missing = 0, []
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(str(path), "pt") as file:
            for name in file.offset_keys():
                if not name.startswith(prefixes) or any(part in name for part in _BESIDE):
                    continue
                if any(digest(form) in digests for form in forms(name, file.get_tensor(name))):
                    found += 1
                else:
                    missing.append(name)
    return found, missing


def forms(name: str, tensor: Tensor) -> Iterator[Tensor]:
    """Yield what the exporter may make of a tensor without losing anything but half precision."""
    if tensor.dtype in (torch.uint8, torch.float8_e4m3fn):
        yield tensor
        return
    wide = tensor.float()
    if name.endswith("A_log"):
        # the graph has what the scan multiplies by; numpy's exp is the exporter's to the last bit
        wide = -torch.from_numpy(np.exp(wide.numpy()))
    for form in (wide, wide.T.contiguous() if wide.ndim == 2 else wide):
        yield from (form, form.half())


def digest(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's bytes."""
    flat = tensor.reshape(-1).contiguous().view(torch.uint8)
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()


if __name__ == "__main__":
    main()
