"""How much memory and time a run will take, from shapes alone.

Memory follows the walk: the block at work with its weights in BF16, the one being read and the one
being written beside it, what a span of tokens needs inside a block, and the calibration items as
they are carried along. What a run does with less memory than that is in ``nvvl.quantize.limits``.
What the items will be is not known before they are drawn, so a typical one is assumed between
blocks, and inside a block a whole span, the most that any item takes there. The limit that follows
from ``--memory`` so holds for longer ones too, but for the embeddings of the few items at work,
some MB for a thousand tokens.

Time comes from rates: products of matrices and hashing are measured for some hundredths of a second
on this machine, a GPU's are stored.
"""

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from nvvl.cpu import bf16_speedup
from nvvl.model.config import VLMConfig
from nvvl.model.safetensors_io import TensorSpec
from nvvl.quantize.block_names import list_blocks, tensors_by_block
from nvvl.quantize.limits import SPAN_TILES, SPAN_TOKENS
from nvvl.quantize.recipe import CALIBRATED_FORMATS, Format
from nvvl.quantize.targets import LAYERS

# Python and torch with the model's shapes; with ModelOpt and the processor beside them.
_BASE_BYTES = 350 * 10**6
_CALIBRATED_BASE_BYTES = 650 * 10**6
_TILES_PER_ITEM = 2
_TEXT_TOKENS_PER_ITEM = 200

# Blocks at once: one read, one at work, one written.
_OVERLAPPED_BLOCKS = 3
# Codes of the largest weight, as a part of it, while they are hashed and written.
_CODES = 0.55
# Bytes that live at once for each element of the widest activation inside a block.
_BYTES_PER_WIDE_ELEMENT = 16
# The same where rounding errors of inputs are summed: an input, exact, rounded, and the difference.
_BYTES_PER_MEASURED_ELEMENT = 16
# A weight is widened in pieces where the CPU multiplies bfloat16 slowly.
_WIDENED_BYTES = 64 * 2**20
# Items in memory below which going through the disk is not worth it.
_LEAST_ITEMS = 2

# Reading, packing and writing a byte of the source, in bytes hashed in that time; and the part of
# the matrix rate that a whole run reaches.
_WORK_PER_HASHED_BYTE = 5.0
_MATRIX_FRACTION = 0.6
_GPU_FLOPS = 150e12
_MEASURE_SIZE = 768
_MEASURE_BYTES = 8 * 2**20


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How fast a machine works: floating-point operations, and bytes hashed, a second."""

    flops: float
    hashed_bytes: float
    text: str


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run will take.

    Attributes:
        memory_bytes: Peak of the whole process where nothing limits it; on a GPU, items stay in
            CPU memory.
        minimum_bytes: Peak with everything on disk that can be there.
        activation_bytes: The calibration items between two blocks; part of the memory, and what a
            resumable run also keeps on disk, before and after a block.
        overlap_bytes: Part of the memory that two more blocks take.
        seconds: From start to finish.
        rates: Where the time comes from.
        assumed: What was assumed about calibration items.
    """

    memory_bytes: int
    minimum_bytes: int
    activation_bytes: int
    overlap_bytes: int
    seconds: float
    rates: str
    assumed: str


def measure_rates() -> Rates:
    """Measure this machine for some hundredths of a second, without torch.

    In CPU seconds, so that what else runs now does not count.
    """
    import numpy as np

    matrix = np.ones((_MEASURE_SIZE, _MEASURE_SIZE), dtype=np.float32)
    data = bytes(_MEASURE_BYTES)
    a_thread = 2 * _MEASURE_SIZE**3 / _cpu_seconds(lambda: matrix @ matrix)
    hashed = _MEASURE_BYTES / _cpu_seconds(lambda: hashlib.sha256(data).digest())
    threads = num_threads()
    units = bf16_speedup()
    text = (
        f"measured here: {threads} threads of {a_thread / 1e9:.0f} GFLOP/s in float32"
        f"{f', {units} times that by bfloat16 units' if units > 1 else ''}; "
        f"{hashed / 1e9:.1f} GB/s hashed"
    )
    return Rates(flops=units * threads * a_thread, hashed_bytes=hashed, text=text)


def num_threads() -> int:
    """Return how many threads torch will compute with."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return int(wanted) if wanted.isdigit() and int(wanted) else len(os.sched_getaffinity(0))


def _cpu_seconds(call: Callable[[], object]) -> float:
    times = []
    for _ in range(4):  # the first one wakes threads
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times)


def estimate_run(
    config: VLMConfig,
    tensors: Sequence[TensorSpec],
    formats: Mapping[str, Format],
    *,
    num_items: int,
    device: str,
    weighted: bool = False,
    rates: Rates | None = None,
) -> Estimate:
    """Estimate peak memory and time of quantizing.

    Args:
        config: The model.
        tensors: Every tensor of the source.
        formats: Format of each quantizable linear.
        num_items: Calibration items.
        device: ``cpu`` or ``cuda``.
        weighted: Whether the recipe has an ``image_weight``: layers are run twice over the items.
        rates: Of this machine; measured if None.
    """
    calibrated = bool(set(CALIBRATED_FORMATS) & set(formats.values()))
    items = num_items if calibrated else 0
    tokens = _TILES_PER_ITEM * config.tokens_per_tile + _TEXT_TOKENS_PER_ITEM
    patches = (config.image_size // config.vision.patch_size) ** 2
    vision_tokens = _TILES_PER_ITEM * (patches + config.vision.num_prefix_tokens)
    item_bytes = 2 * max(
        vision_tokens * config.vision.hidden_size, tokens * config.language.hidden_size
    )
    blocks = tensors_by_block(tensors, list_blocks(config))
    block = max(sum(spec.nbytes for spec in specs) for specs in blocks.values())
    packed = [spec.nbytes for spec in tensors if formats.get(_owner(spec), "bf16") != "bf16"]
    fixed = block + _CODES * max(packed, default=0)
    fixed += _CALIBRATED_BASE_BYTES if items else _BASE_BYTES
    if items:
        per_element = _BYTES_PER_WIDE_ELEMENT + (_BYTES_PER_MEASURED_ELEMENT if weighted else 0)
        fixed += _WIDENED_BYTES + per_element * _widest_activation(config)
    overlap = (_OVERLAPPED_BLOCKS - 1) * block
    flops = (
        2
        * items
        * (
            (2 if weighted else 1) * tokens * _linear_parameters(tensors, LAYERS)
            + vision_tokens * _linear_parameters(tensors, "vision_model")
        )
    )
    rates = rates or measure_rates()
    rate = _GPU_FLOPS if device == "cuda" else rates.flops * _MATRIX_FRACTION
    source_bytes = sum(spec.nbytes for spec in tensors)
    stored = f"; stored: {_GPU_FLOPS / 1e12:.0f} TFLOP/s of a GPU" if device == "cuda" else ""
    return Estimate(
        memory_bytes=round(fixed + overlap + items * item_bytes),
        minimum_bytes=round(fixed + min(items, _LEAST_ITEMS) * item_bytes),
        activation_bytes=items * item_bytes,
        overlap_bytes=overlap,
        seconds=source_bytes * _WORK_PER_HASHED_BYTE / rates.hashed_bytes + flops / rate,
        rates=rates.text + stored,
        assumed=f"{items} items of {_TILES_PER_ITEM} tiles and {_TEXT_TOKENS_PER_ITEM} text tokens"
        f", {SPAN_TOKENS} tokens at once inside a block"
        if items
        else "no calibration items",
    )


def _widest_activation(config: VLMConfig) -> int:
    """Count the elements of the widest tensor inside a block, for a whole span of an item."""
    language = config.language
    widest = max(language.intermediate_size, 2 * language.mamba_inner_size + 2 * language.conv_dim)
    patches = (config.image_size // config.vision.patch_size) ** 2 + config.vision.num_prefix_tokens
    return max(
        SPAN_TOKENS * widest,
        SPAN_TILES * patches * config.vision.intermediate_size,
        SPAN_TILES * config.tokens_per_tile * config.projector_hidden_size,
    )


def _owner(spec: TensorSpec) -> str:
    return spec.name.removesuffix(".weight")


def _linear_parameters(tensors: Sequence[TensorSpec], prefix: str) -> int:
    return sum(
        spec.numel for spec in tensors if spec.name.startswith(prefix) and len(spec.shape) == 2
    )
