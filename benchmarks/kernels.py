"""Time FP8 and NVFP4 quantization on one CPU thread: nvvl, ModelOpt and a copy, in one run.

    python benchmarks/kernels.py                 # small tensors, seconds
    python benchmarks/kernels.py --size full     # a 20480 x 5120 weight, as in the 12B model

GB/s is bytes of BF16 input by CPU seconds, the median of the repeats; CPU time suffers little from
other load on the machine. Outputs are allocated anew in every call, as a user's are. Scratch is the
peak of resident memory during one call, less what was there before and the outputs, as a multiple
of the input, and only measured for inputs of 64 MiB or more. Scales are given to all. A result is
compared bit by bit with plain torch's, which is the reference; "equal" is the share of its elements
(codes, scales, values) with the same bits.

ModelOpt has no NVFP4 fake-quant on a CPU; its row there is quantize followed by dequantize.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor
from modelopt.torch.quantization.tensor_quant import fp8_eager

from nvvl.cpu import cpu_name
from nvvl.quantize import fp8, kernels, nvfp4

SIZES = {  # weight and activation, rows x columns
    "small": ((2048, 2048), (512, 2048)),
    "full": ((20480, 5120), (2048, 5120)),
}
Result = tuple[torch.Tensor, ...]
Calls = dict[str, Callable[[], Result]]

# Smaller freed blocks stay with the process, so that resident memory tells nothing.
MIN_BYTES_FOR_SCRATCH = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured implementation of one operation."""

    operation: str
    implementation: str
    cpu_s: float
    gb_per_s: float
    scratch: float | None
    equal: float | None


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    rows = measure_all(*SIZES[arguments.size], arguments.repeats)
    if arguments.json:
        report = {"size": arguments.size, "machine": machine(), "rows": [asdict(r) for r in rows]}
        print(json.dumps(report, indent=2))
    else:
        print_table(rows)
    wrong = [r for r in rows if r.implementation.startswith("nvvl") and r.equal not in (None, 1.0)]
    sys.exit(f"not bit-equal: {wrong}" if wrong else 0)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time FP8 and NVFP4 quantization on one thread.")
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args()


def measure_all(weight_shape: tuple[int, int], x_shape: tuple[int, int], repeats: int) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(weight_shape, generator=generator).mul_(0.02).bfloat16()
    x = torch.randn(x_shape, generator=generator).bfloat16()
    target = torch.empty_like(weight)
    copy: Calls = {"bf16 copy into existing memory": lambda: (target.copy_(weight),)}
    return [
        *measure("copy", weight, copy, repeats),
        *measure("amax", weight, amax(weight), repeats),
        *measure("NVFP4 quantize+pack", weight, nvfp4_quantize(weight), repeats),
        *measure("FP8 quantize", weight, fp8_quantize(weight), repeats),
        *measure("NVFP4 fake-quant, activation", x, nvfp4_fake_quantize(x), repeats),
        *measure("FP8 fake-quant, activation", x, fp8_fake_quantize(x), repeats),
    ]


def amax(x: torch.Tensor) -> Calls:
    return ours(lambda: (kernels.amax(x),), variants=False)


def nvfp4_quantize(w: torch.Tensor) -> Calls:
    scale = nvfp4.tensor_scale_from_amax(kernels.amax(w))

    def modelopt() -> Result:
        made: Any = NVFP4QTensor.quantize(w, 16, weights_scaling_factor_2=scale)
        return made[0]._quantized_data, made[1]

    return {**ours(lambda: nvfp4.quantize(w, scale)), "ModelOpt": modelopt}


def fp8_quantize(w: torch.Tensor) -> Calls:
    scale = fp8.scale_from_amax(kernels.amax(w))

    def modelopt() -> Result:
        return (FP8QTensor.quantize(w, scales=scale)[0]._quantized_data,)

    return {**ours(lambda: (fp8.quantize(w, scale),)), "ModelOpt": modelopt}


def nvfp4_fake_quantize(x: torch.Tensor) -> Calls:
    scale = nvfp4.tensor_scale_from_amax(kernels.amax(x))

    def modelopt() -> Result:
        made: Any = NVFP4QTensor.quantize(x, 16, weights_scaling_factor_2=scale)
        back = made[0].dequantize(scale=made[1], double_scale=scale, block_sizes={-1: 16})
        return (back,)

    both = {"ModelOpt quantize, dequantize": modelopt}
    return {**ours(lambda: (nvfp4.fake_quantize(x, scale),)), **both}


def fp8_fake_quantize(x: torch.Tensor) -> Calls:
    found = kernels.amax(x)
    scale = fp8.scale_from_amax(found)
    eager = {"ModelOpt eager": lambda: (fp8_eager(x, found),)}
    return {**ours(lambda: (fp8.fake_quantize(x, scale),)), **eager}


def ours(call: Callable[[], Result], *, variants: bool = True) -> Calls:
    """One entry for each path of nvvl's, plain torch first: it is the reference."""

    def on(path: str) -> Callable[[], Result]:
        def run() -> Result:
            os.environ["NVVL_KERNELS"] = path
            return call()

        return run

    paths = {"nvvl plain torch": on("plain")}
    if not variants:
        return {**paths, "nvvl C": on("auto")}
    return {**paths, **{f"nvvl {name}": on(name) for name in reversed(kernels.list_variants())}}


def measure(operation: str, x: torch.Tensor, calls: Calls, repeats: int) -> list[Row]:
    reference = next(iter(calls.values()))()
    rows = []
    for implementation, call in calls.items():
        result = call()
        equal = share_equal(result, reference) if len(calls) > 1 else None
        del result
        scratch = scratch_bytes(call) if x.nbytes >= MIN_BYTES_FOR_SCRATCH else None
        cpu_s = statistics.median(cpu_seconds(call) for _ in range(repeats))
        rows.append(
            Row(
                operation=operation,
                implementation=implementation,
                cpu_s=cpu_s,
                gb_per_s=x.nbytes / 1e9 / cpu_s,
                scratch=None if scratch is None else scratch / x.nbytes,
                equal=equal,
            )
        )
    return rows


def cpu_seconds(call: Callable[[], Any]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def share_equal(result: Result, reference: Result) -> float:
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    same, total = 0, 0
    for a, b in zip(result, reference, strict=True):
        bits = width[b.dtype.itemsize]
        same += int((a.view(bits) == b.view(bits)).sum())
        total += b.numel()
    return same / total


def scratch_bytes(call: Callable[[], Result]) -> int | None:
    """Peak of resident memory above the start and the outputs, by Linux's resettable mark."""
    mark = Path("/proc/self/clear_refs")
    if not mark.exists():
        return None
    before = resident("VmRSS")
    mark.write_text("5")
    outputs = call()
    return max(0, resident("VmHWM") - before - sum(t.nbytes for t in outputs))


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def machine() -> dict[str, str]:
    return {"processor": cpu_name(), "torch": torch.__version__}


def print_table(rows: list[Row]) -> None:
    copy = rows[0].gb_per_s
    print(f"{machine()}, one thread")
    header = ("operation", "implementation", "CPU s", "GB/s", "of copy", "scratch", "equal")
    print("{:29} {:31} {:>8} {:>8} {:>8} {:>8} {:>9}".format(*header))
    for row in rows:
        scratch = "" if row.scratch is None else f"{row.scratch:.2f}"
        equal = "" if row.equal is None else f"{100 * row.equal:.4g} %"
        print(
            f"{row.operation:29} {row.implementation:31} {row.cpu_s:8.4f} {row.gb_per_s:8.3f} "
            f"{row.gb_per_s / copy:8.3f} {scratch:>8} {equal:>9}"
        )


if __name__ == "__main__":
    main()
