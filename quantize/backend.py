"""nvvl's arithmetic inside ModelOpt: quantizer backends and an amax calibrator.

ModelOpt places quantizers in a model and drives calibration; what a quantizer then computes can be
chosen by name with its public `register_quant_backend`. `register` adds two names:

* ``nvvl_nvfp4`` for dynamic NVFP4 quantizers, for which ModelOpt has no CPU code at all. Not for
  static ones: there ModelOpt's scale searches silently skip quantizers with a backend.
* ``nvvl_fp8`` for static per-tensor FP8 quantizers. ModelOpt's own CPU code is slower and takes the
  neighbouring code for about 4 % of BF16 values (`nvvl.quantize.fp8` says why).

With both, a simulated model computes with exactly the values that are packed to disk, on every
device. Gradients pass straight through, without a clip mask.

Select them in the ``cfg`` of a ``quant_cfg`` entry: ``{..., "backend": "nvvl_nvfp4"}``. A backend
must be registered before the first forward, also in a process that restores a model.

This module imports ModelOpt, which takes several seconds; `nvvl.quantize.nvfp4` and
`nvvl.quantize.fp8` do not.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch

from nvvl.errors import CalibrationError
from nvvl.model.products import Linear
from nvvl.quantize import fp8, kernels, nvfp4
from nvvl.quantize.formats import BLOCK_SIZE

with warnings.catch_warnings():
    # Said at import for every transformers newer than ModelOpt's release, and by torch about
    # ModelOpt's use of torch.jit; nvvl's own tests run against the versions it pins.
    warnings.filterwarnings("ignore", message="transformers .* is not tested with current version")
    warnings.filterwarnings("ignore", message="`torch.jit", category=DeprecationWarning)
    from modelopt.torch.quantization.calib import MaxCalibrator
    from modelopt.torch.quantization.nn import (
        QuantLinearConvBase,
        QuantModuleRegistry,
        TensorQuantizer,
        is_registered_quant_backend,
        register_quant_backend,
    )

NVFP4_BACKEND = "nvvl_nvfp4"
FP8_BACKEND = "nvvl_fp8"

FakeQuantize = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def register() -> None:
    """Make both backends and the model's linears known to ModelOpt; may be called again."""
    for name, entrypoint in ((NVFP4_BACKEND, _nvfp4), (FP8_BACKEND, _fp8)):
        if not is_registered_quant_backend(name):
            register_quant_backend(name, entrypoint)
    if Linear not in QuantModuleRegistry:
        QuantModuleRegistry.register({Linear: "nvvl.Linear"})(_QuantLinear)


class _QuantLinear(QuantLinearConvBase):  # type: ignore[misc]
    """`nvvl.model.products.Linear` with quantizers on input and weight."""


class FastMaxCalibrator(MaxCalibrator):  # type: ignore[misc]
    """ModelOpt's max calibrator with nvvl's amax kernel for per-tensor amax.

    Gives the same amax, bit for bit, and refuses NaN and infinity with an error of nvvl's. Select
    it with ``"calibrator": (FastMaxCalibrator,)`` in the ``cfg`` of a ``quant_cfg`` entry.
    """

    @torch.no_grad()
    def collect(self, x: torch.Tensor) -> None:
        """Take one more tensor into account.

        Args:
            x: Activations or a weight, any shape.

        Raises:
            CalibrationError: If x holds a NaN or an infinity.
        """
        if self._axis is not None or self._track_amax or x.device.type == "meta":
            super().collect(x)
            return
        amax = kernels.amax(x)
        if not torch.isfinite(amax):
            raise CalibrationError(
                f"calibration met {'NaN' if torch.isnan(amax) else 'an infinity'} in a tensor of "
                f"shape {list(x.shape)}; check the checkpoint and the calibration items"
            )
        amax = amax.to(x.dtype)
        known: torch.Tensor | None = self._calib_amax  # type: ignore[has-type]
        self._calib_amax = amax if known is None else torch.maximum(known, amax)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, fake_quantize: FakeQuantize, scale: torch.Tensor
    ) -> torch.Tensor:
        return fake_quantize(x, scale)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradients[0], None, None


def _nvfp4(inputs: torch.Tensor, quantizer: TensorQuantizer) -> torch.Tensor:
    blocks = quantizer.block_sizes or {}
    size = blocks.get(-1) or blocks.get(inputs.dim() - 1)
    if (quantizer.num_bits, size, blocks.get("type")) != ((2, 1), BLOCK_SIZE, "dynamic"):
        raise ValueError(
            f"{NVFP4_BACKEND} serves dynamic NVFP4 quantizers with blocks of {BLOCK_SIZE}, got "
            f"num_bits {quantizer.num_bits} and block_sizes {quantizer.block_sizes}"
        )
    scale = nvfp4.tensor_scale_from_amax(_calibrated_amax(quantizer, NVFP4_BACKEND))
    return _apply(inputs, nvfp4.fake_quantize, scale)


def _fp8(inputs: torch.Tensor, quantizer: TensorQuantizer) -> torch.Tensor:
    if quantizer.num_bits != (4, 3) or quantizer.block_sizes or quantizer.axis is not None:
        raise ValueError(
            f"{FP8_BACKEND} serves static FP8 quantizers with one scale per tensor, got num_bits "
            f"{quantizer.num_bits}, block_sizes {quantizer.block_sizes}, axis {quantizer.axis}"
        )
    scale = fp8.scale_from_amax(_calibrated_amax(quantizer, FP8_BACKEND))
    return _apply(inputs, fp8.fake_quantize, scale)


def _calibrated_amax(quantizer: TensorQuantizer, backend: str) -> torch.Tensor:
    amax = quantizer.amax
    if not isinstance(amax, torch.Tensor):
        raise CalibrationError(
            f"a quantizer with the backend {backend} has no amax; calibrate with items that reach "
            "every quantized layer, or disable the quantizer of a layer that none reaches"
        )
    return amax


def _apply(x: torch.Tensor, fake_quantize: FakeQuantize, scale: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = _StraightThrough.apply(x, fake_quantize, scale)  # type: ignore[no-untyped-call]
    return result
