"""How much memory and time a run will take, from shapes alone.

Memory follows the walk: the largest block with its weights in BF16, or the largest tensor on its
way through packing, beside the calibration items as they are carried along. What the items will be
is not known before they are drawn, so a typical one is assumed; pictures of many tiles take more.

Time comes from stored rates, measured on a 2-core AVX-512 CPU; another machine is as much faster or
slower as its matrix products are.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nvvl.errors import HardwareError
from nvvl.model.config import VLMConfig
from nvvl.model.safetensors_io import TensorSpec
from nvvl.quantize.recipe import CALIBRATED_FORMATS, Format
from nvvl.quantize.targets import LAYERS

# Python, torch and ModelOpt with nothing loaded.
_BASE_BYTES = 900 * 10**6
_TILES_PER_ITEM = 2
_TEXT_TOKENS_PER_ITEM = 200

# A tensor that is packed: itself, its codes, and scratch.
_PACKING_FACTOR = 1.6
# Intermediate tensors of a layer that live at once, in tensors as wide as the widest.
_LIVE_TENSORS = 4

# Reading, hashing, packing and writing, in bytes of the source; and products of matrices.
_BYTES_PER_SECOND = 0.4e9
_CPU_FLOPS = 0.5e12
_GPU_FLOPS = 150e12


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a run may hold in memory at once.

    Attributes:
        overlap: Whether the next block is read, and the last one written, while one runs.
        activation_bytes: Most bytes of calibration items; the rest is on disk. None sets no limit.
    """

    overlap: bool = True
    activation_bytes: int | None = None


UNLIMITED = Limits()


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run will take.

    Attributes:
        memory_bytes: Peak of the whole process; on a GPU, items stay in CPU memory.
        activation_bytes: The calibration items between two blocks; part of the memory, and what a
            resumable run also keeps on disk.
        seconds: From start to finish.
        rates: Where the time comes from.
        assumed: What was assumed about calibration items.
    """

    memory_bytes: int
    activation_bytes: int
    seconds: float
    rates: str
    assumed: str


def parse_memory(text: str) -> int:
    """Read an amount of memory such as ``6GB``, ``6 GiB`` or ``900MB`` as bytes.

    Raises:
        HardwareError: if it is not one.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?\s*", text)
    if match is None or not float(match[1]):
        raise HardwareError(f"--memory {text}: required an amount such as 6GB or 6GiB")
    unit = match[2] or ""
    base = 1024 if unit.endswith("i") else 1000
    return round(float(match[1]) * base ** " KMGT".index(unit[:1] or " "))


def require_memory(estimate: Estimate, memory_bytes: int) -> None:
    """Refuse a run that is not going to fit.

    Raises:
        HardwareError: saying what it would take, and how to take less.
    """
    if estimate.memory_bytes > memory_bytes:
        raise HardwareError(
            f"--memory: allowed {memory_bytes / 1e9:.1f} GB, the run takes about "
            f"{estimate.memory_bytes / 1e9:.1f} GB with {estimate.assumed}, "
            f"{estimate.activation_bytes / 1e9:.1f} GB of it for the items; give fewer --samples, "
            "or the format nvfp4-w4a16, which needs none"
        )


def estimate_run(
    config: VLMConfig,
    tensors: Sequence[TensorSpec],
    formats: Mapping[str, Format],
    *,
    num_items: int,
    device: str,
) -> Estimate:
    """Estimate peak memory and time of quantizing.

    Args:
        config: The model.
        tensors: Every tensor of the source.
        formats: Format of each quantizable linear.
        num_items: Calibration items.
        device: ``cpu`` or ``cuda``.
    """
    calibrated = bool(set(CALIBRATED_FORMATS) & set(formats.values()))
    items = num_items if calibrated else 0
    tokens = _TILES_PER_ITEM * config.tokens_per_tile + _TEXT_TOKENS_PER_ITEM
    patches = (config.image_size // config.vision.patch_size) ** 2
    vision_tokens = _TILES_PER_ITEM * (patches + config.vision.num_prefix_tokens)
    activation_bytes = (
        items
        * 2
        * max(vision_tokens * config.vision.hidden_size, tokens * config.language.hidden_size)
    )
    largest = max(spec.nbytes for spec in tensors)
    packed = [spec.nbytes for spec in tensors if formats.get(_owner(spec), "bf16") != "bf16"]
    weights = max(largest, _PACKING_FACTOR * max(packed, default=0))
    if items:
        widest = max(
            tokens * max(config.language.intermediate_size, 2 * config.language.mamba_inner_size),
            vision_tokens * config.vision.intermediate_size,
        )
        weights = max(weights, _largest_block(tensors) + _LIVE_TENSORS * 2 * widest)
    flops = (
        2
        * items
        * (
            tokens * _linear_parameters(tensors, LAYERS)
            + vision_tokens * _linear_parameters(tensors, "vision_model")
        )
    )
    rate = _GPU_FLOPS if device == "cuda" else _CPU_FLOPS
    source_bytes = sum(spec.nbytes for spec in tensors)
    return Estimate(
        memory_bytes=round(_BASE_BYTES + weights + activation_bytes),
        activation_bytes=activation_bytes,
        seconds=source_bytes / _BYTES_PER_SECOND + flops / rate,
        rates=f"stored: {_BYTES_PER_SECOND / 1e9:.1f} GB/s, {rate / 1e12:.1f} TFLOP/s ({device})",
        assumed=f"{items} items of {_TILES_PER_ITEM} tiles and {_TEXT_TOKENS_PER_ITEM} text tokens"
        if items
        else "no calibration items",
    )


def _owner(spec: TensorSpec) -> str:
    return spec.name.removesuffix(".weight")


def _linear_parameters(tensors: Sequence[TensorSpec], prefix: str) -> int:
    return sum(
        spec.numel for spec in tensors if spec.name.startswith(prefix) and len(spec.shape) == 2
    )


def _largest_block(tensors: Sequence[TensorSpec]) -> int:
    sizes: dict[str, int] = {}
    for spec in tensors:
        parts = spec.name.split(".")
        if "layers" in parts or "blocks" in parts:
            start = parts.index("layers" if "layers" in parts else "blocks")
            block = ".".join(parts[: start + 2])
        else:
            block = ".".join(parts[:3])
        sizes[block] = sizes.get(block, 0) + spec.nbytes
    return max(sizes.values())
