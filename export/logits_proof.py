"""Proof that the written checkpoint computes what was calibrated, bit for bit on a CPU.

Two models that share no weights in memory run the same items: one is loaded from the packed
tensors; the other is the BF16 source with ModelOpt's quantizers and the stored amax. They are
loaded one after the other, so memory holds one whole model in BF16 at a time, and where it does not
fit nothing is compared. While a model runs, a digest of every module's output is kept; where the
logits differ, the first module that differs is named.

Equality is exact: same kernels, same order, same machine. It says nothing about how good the
quantized model is (`nvvl.reports`).
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
from nvvl.quantize.load import fake_quant_model, load_any

if TYPE_CHECKING:
    from nvvl.calib_data.items import Item

LOGITS = ("L1", "logits equal the calibrated model's bit for bit")

# Items looked through for one with an image and one without.
_NUM_CANDIDATES = 16


@dataclass
class _Trace:
    """What one model did with one item: logits and a digest of each module's output, in order."""

    logits: Tensor
    digests: list[tuple[str, str]]


def prove_logits(out: Path, source: Path, *, probe_items: "Sequence[Item] | None" = None) -> Check:
    """Run the written and the calibrated model over a few items and compare.

    Args:
        out: the written checkpoint.
        source: the BF16 checkpoint it was made from.
        probe_items: items to run; one with an image and one without if None.
    """
    items = default_probe_items() if probe_items is None else probe_items
    try:
        processor = Processor.from_folder(source)
    except ConfigError as fault:
        return not_checked(*LOGITS, str(fault))
    inputs = [processor(item.messages, images=item.images, videos=item.videos) for item in items]
    try:
        written = _run(lambda: load_any(out), inputs)
        calibrated = _run(lambda: fake_quant_model(source, out), inputs)
    except HardwareError as shortage:
        return not_checked(*LOGITS, f"{shortage}; or pass --no-logits")
    except SourceError:  # of the disk, not of the checkpoint
        raise
    except NvvlError as fault:
        return judge(*LOGITS, [str(fault)])
    faults = []
    for item, one, two in zip(items, written, calibrated, strict=True):
        faults += _compare(item.item_id, one, two)
    num_tokens = sum(len(item.input_ids) for item in inputs)
    return judge(*LOGITS, faults, note=f"{len(items)} items, {num_tokens} tokens")


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

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, Tensor):
                digests.append((name, _digest(first)))

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
    return _Trace(logits, digests)


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
