"""ModelOpt's part: quantizers placed on the linears of one block, and their amax.

``mtq.quantize`` replaces linears by quantized twins and runs the calibration items through them.
While it calibrates, quantizers only observe: activations stay as the BF16 model makes them, so the
amax of a block does not depend on how earlier blocks were quantized, and a model walked block by
block gets the same numbers as one calibrated whole.

Quantizers are switched on by exact name and everything else is off, because ModelOpt's default
lists leave ``mlp1`` on and its globs miss this family's MLPs. Quantizers call nvvl's own backends
(``nvvl.quantize.backend``), so that fake-quant and packed checkpoint share one arithmetic.
"""

import contextlib
import io
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from nvvl.quantize.amaxes import Amax
from nvvl.quantize.backend import FP8_BACKEND, NVFP4_BACKEND, FastMaxCalibrator, register
from nvvl.quantize.formats import BLOCK_SIZE
from nvvl.quantize.recipe import CALIBRATED_FORMATS, Format

ForwardLoop = Callable[[nn.Module], None]

_QUANTIZER: dict[str, dict[str, Any]] = {
    "fp8": {"num_bits": (4, 3), "axis": None, "backend": FP8_BACKEND},
    "nvfp4": {
        "num_bits": (2, 1),
        "block_sizes": {-1: BLOCK_SIZE, "type": "dynamic", "scale_bits": (4, 3)},
        "backend": NVFP4_BACKEND,
    },
}
_QUANTIZER["nvfp4-w4a16"] = _QUANTIZER["nvfp4"]


def quantizer_config(formats: Mapping[str, Format], *, algorithm: str | None) -> dict[str, Any]:
    """Build the config that ``mtq.quantize`` takes.

    Args:
        formats: Format by name of the linear within the module to be quantized.
        algorithm: ModelOpt's calibration algorithm; None places quantizers only.
    """
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for name, linear_format in formats.items():
        if linear_format == "bf16":
            continue
        attributes = _QUANTIZER[linear_format] | {"calibrator": (FastMaxCalibrator,)}
        entries.append({"quantizer_name": f"{name}.weight_quantizer", "cfg": attributes})
        if linear_format in CALIBRATED_FORMATS:
            entries.append({"quantizer_name": f"{name}.input_quantizer", "cfg": attributes})
    # between processes, nvvl joins the amax itself, where an error on one of them is known to all
    how = None if algorithm is None else {"method": algorithm, "distributed_sync": False}
    return {"quant_cfg": entries, "algorithm": how}


def insert_quantizers(
    module: nn.Module,
    formats: Mapping[str, Format],
    *,
    algorithm: str | None,
    forward_loop: ForwardLoop | None = None,
) -> None:
    """Place quantizers in a module, in place, and calibrate them if an algorithm is given.

    Args:
        module: Its linears are replaced by ModelOpt's.
        formats: Format by name of the linear within ``module``.
        algorithm: As in `quantizer_config`.
        forward_loop: Runs every calibration item through the module it is given.
    """
    import modelopt.torch.quantization as mtq

    register()
    config = quantizer_config(formats, algorithm=algorithm)
    # ModelOpt prints a line a call, and results of ours go to stdout
    with contextlib.redirect_stdout(io.StringIO()), torch.no_grad(), warnings.catch_warnings():
        # of each linear, in one of several processes; see `quantizer_config`
        warnings.filterwarnings("ignore", "Distributed training is initialized but no parallel")
        mtq.quantize(module, config, forward_loop)


def calibrate_block(
    block: nn.Module,
    prefix: str,
    formats: Mapping[str, Format],
    *,
    algorithm: str,
    forward_loop: ForwardLoop,
) -> dict[str, Amax]:
    """Find the amax of every quantized linear of one block.

    Args:
        block: On its device; its linears are replaced by ModelOpt's.
        prefix: Name of the block in the model.
        formats: Format by full name of the quantized linears of this block.
        algorithm: ModelOpt's calibration algorithm.
        forward_loop: Runs every item through the block it is given.

    Returns:
        By full name; ``input`` is None where ModelOpt observed nothing or inputs stay BF16.
    """
    local: dict[str, Format] = {}
    for fqn, linear_format in formats.items():
        local[fqn.removeprefix(f"{prefix}.")] = linear_format

    def run(module: nn.Module) -> None:
        for name in local:
            # seen once before this loop already; observing each use again only costs time
            linear = module.get_submodule(name)
            linear.get_submodule("weight_quantizer").disable_calib()  # type: ignore[operator]
        forward_loop(module)

    insert_quantizers(block, local, algorithm=algorithm, forward_loop=run)
    amaxes = {}
    for fqn, name in zip(formats, local, strict=True):
        linear = block.get_submodule(name)
        weight = _amax_of(linear, "weight_quantizer")
        assert weight is not None, f"{fqn}: ModelOpt left the weight without an amax"
        amaxes[fqn] = Amax(weight, _amax_of(linear, "input_quantizer"))
    return amaxes


def set_amaxes(model: nn.Module, amaxes: Mapping[str, Amax]) -> None:
    """Give placed quantizers the amax that a calibration found, by full name of the linear."""
    for fqn, amax in amaxes.items():
        linear = model.get_submodule(fqn)
        device = next(linear.parameters()).device
        linear.get_submodule("weight_quantizer").amax = amax.weight.to(device)
        if amax.input is not None:
            linear.get_submodule("input_quantizer").amax = amax.input.to(device)


def _amax_of(linear: nn.Module, quantizer: str) -> torch.Tensor | None:
    """Return a quantizer's amax as a float32 scalar on the CPU."""
    amax = getattr(linear.get_submodule(quantizer), "amax", None)
    return None if amax is None else amax.detach().float().cpu().reshape(())
