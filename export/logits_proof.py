"""Proof that the written checkpoint computes what was calibrated, bit for bit on a CPU.

Two models that share no weights in memory run the same items: one is loaded from the packed
tensors; the other is the BF16 source with ModelOpt's quantizers and the stored amax. They are
loaded one after the other, so memory holds one whole model in BF16 at a time, and where it does not
fit nothing is compared. While a model runs, a digest of every module's output is kept; where the
logits differ, the first module that differs is named.

Equality is exact: same kernels, same order, same machine. It says nothing about how good the
quantized model is (`nvvl.reports`), and both sides have the same input scales; so these are
compared with what the linears see, which finds scales of another unit, model or kind of item.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nvvl.errors import ConfigError, HardwareError, NvvlError, SourceError
from nvvl.export.checks import Check, judge, not_checked
from nvvl.export.tensor_files import tensor_bytes
from nvvl.model.processor import ModelInputs, Processor, collate
from nvvl.model.vlm import NemotronNanoVL
from nvvl.quantize.formats import E2M1_MAX, E4M3_MAX
from nvvl.quantize.linear import QuantizedLinear
from nvvl.quantize.load import fake_quant_model, load_any

if TYPE_CHECKING:
    from nvvl.calib_data.items import Item

LOGITS = ("L1", "logits equal the calibrated model's bit for bit")
SCALES = ("L2", "input scales fit what linears see")

# Between the largest input of a few items and the largest that a scale can write. A set of a
# thousand items may have seen larger ones, and `image_weight` clips to an eighth at most.
_MOST_BEYOND = 16.0
_LEAST_USED = 1 / 4096
_LARGEST = {"fp8": E4M3_MAX, "nvfp4": E2M1_MAX * E4M3_MAX}

# Items looked through for one with an image and one without.
_NUM_CANDIDATES = 16


@dataclass
class _Trace:
    """What one model did with one item.

    Attributes:
        logits: All of them.
        digests: Of each module's output, in order.
        reaches: Of each linear with an input scale: its largest input over the largest that the
            scale can write.
    """

    logits: Tensor
    digests: list[tuple[str, str]]
    reaches: dict[str, float]


def prove_logits(
    out: Path, source: Path, *, probe_items: "Sequence[Item] | None" = None
) -> list[Check]:
    """Run the written and the calibrated model over a few items; compare them, and their scales.

    Args:
        out: the written checkpoint.
        source: the BF16 checkpoint it was made from.
        probe_items: items to run; one with an image and one without if None.
    """
    items = default_probe_items() if probe_items is None else probe_items
    try:
        processor = Processor.from_folder(source)
    except ConfigError as fault:
        return leave_out(str(fault))
    inputs = [processor(item.messages, images=item.images, videos=item.videos) for item in items]
    try:
        written = _run(lambda: load_any(out), inputs)
        calibrated = _run(lambda: fake_quant_model(source, out), inputs)
    except HardwareError as shortage:
        return leave_out(f"{shortage}; or pass --no-logits")
    except SourceError:  # of the disk, not of the checkpoint
        raise
    except NvvlError as fault:
        return [judge(*LOGITS, [str(fault)]), not_checked(*SCALES, "a model could not be run")]
    faults = []
    for item, one, two in zip(items, written, calibrated, strict=True):
        faults += _compare(item.item_id, one, two)
    num_tokens = sum(len(item.input_ids) for item in inputs)
    note = f"{len(items)} items, {num_tokens} tokens"
    return [judge(*LOGITS, faults, note=note), _judge_scales(written)]


def leave_out(reason: str) -> list[Check]:
    """Return both checks as not made, and why."""
    return [not_checked(*LOGITS, reason), not_checked(*SCALES, reason)]


def _judge_scales(traces: Sequence[_Trace]) -> Check:
    largest: dict[str, float] = {}
    for trace in traces:
        for fqn, reach in trace.reaches.items():
            largest[fqn] = max(reach, largest.get(fqn, 0.0))
    faults = [
        f"{fqn}: inputs reach {reach:.3g} times what its input_scale can write; calibrate again, "
        "on items like those it will see"
        for fqn, reach in largest.items()
        if not _LEAST_USED <= reach <= _MOST_BEYOND
    ]
    if not largest:
        return judge(*SCALES, (), note="no inputs are quantized")
    note = f"{min(largest.values()):.2g} to {max(largest.values()):.2g} of what scales can write"
    return judge(*SCALES, faults, note=note)


def default_probe_items() -> "list[Item]":
    """Return one item with an image and one without, of the default calibration set."""
    from nvvl.calib_data.manifest import load_calibration_set

    items = load_calibration_set("default", num_items=_NUM_CANDIDATES, seed=0).items
    with_image = next(item for item in items if item.images)
    without = next(item for item in items if not item.images and not item.videos)
    return [with_image, without]


def _run(load: Callable[[], NemotronNanoVL], inputs: Sequence[ModelInputs]) -> list[_Trace]:
    """Load a model, run it over each item alone, and let it go."""
    model = load()
    return [_trace(model, item) for item in inputs]


@torch.inference_mode()
def _trace(model: NemotronNanoVL, inputs: ModelInputs) -> _Trace:
    digests: list[tuple[str, str]] = []
    reaches: dict[str, float] = {}

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, Tensor):
                digests.append((name, _digest(first)))
            if isinstance(module, QuantizedLinear) and module.linear_format in _LARGEST:
                held = float(module.input_scale) * _LARGEST[module.linear_format]
                reaches[name] = max(float(args[0].abs().max()) / held, reaches.get(name, 0.0))

        return keep

    hooks = [
        module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name
    ]
    try:
        batch = collate([inputs], model.config.language.pad_token_id)
        pixels = batch.pixel_values if len(batch.pixel_values) else None
        logits = model(batch.input_ids, pixel_values=pixels).logits
    finally:
        for hook in hooks:
            hook.remove()
    return _Trace(logits, digests, reaches)


def _digest(tensor: Tensor) -> str:
    return hashlib.blake2b(tensor_bytes(tensor), digest_size=16).hexdigest()


def _compare(item_id: str, written: _Trace, calibrated: _Trace) -> list[str]:
    faults = []
    if not written.logits.isfinite().all():
        faults.append(f"item {item_id}: logits are not finite")
    if not torch.equal(written.logits, calibrated.logits):
        largest = (written.logits.float() - calibrated.logits.float()).abs().max()
        where = _first_difference(written.digests, calibrated.digests)
        faults.append(f"item {item_id}: logits differ by up to {largest:.3g}, first at {where}")
    return faults


def _first_difference(
    written: Sequence[tuple[str, str]], calibrated: Sequence[tuple[str, str]]
) -> str:
    """Name the first module with another output; quantizers of one model alone do not count."""
    common = {name for name, _ in written} & {name for name, _ in calibrated}
    pairs = zip(
        (entry for entry in written if entry[0] in common),
        (entry for entry in calibrated if entry[0] in common),
        strict=True,
    )
    return next((one[0] for one, two in pairs if one != two), "the logits alone")
