"""The layers that train: the teacher's modules, with fake-quantized linears in place of its own."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nvvl.distill.scales import fake_quantize
from nvvl.model.packing import Packing
from nvvl.model.products import linear
from nvvl.model.vlm import NemotronNanoVL
from nvvl.quantize import kernels
from nvvl.quantize.recipe import Format

PREFIX = "language_model.backbone."

# Rows of a weight whose gradient is computed at once.
_GRADIENT_ROWS = 2048


class FakeQuantLinear(nn.Module):
    """``y = q(x) W^T`` with straight-through gradients; W holds values of its format already.

    Attributes:
        linear_format: Of the input.
        weight: (N, K), rounded by the `nvvl.distill.student.Student`.
        scale: FP32 scalar of the input on the CPU, where the kernels read it; None where inputs
            stay BF16.
        observed: Largest magnitude of the inputs met while training, where it is asked for.
    """

    linear_format: Format

    def __init__(self, weight: Tensor, linear_format: Format, scale: Tensor | None) -> None:
        super().__init__()
        self.linear_format = linear_format
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = None if scale is None else nn.Parameter(scale.clone(), requires_grad=False)
        self.observed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``x`` (..., K) to (..., N)."""
        if self.observed is not None and torch.is_grad_enabled():
            self.observed = torch.maximum(self.observed, kernels.amax(x.detach()).float().cpu())
        if self.scale is not None:
            x = fake_quantize(x, self.scale, self.linear_format)
        return multiply(x, self.weight)


class Backbone(nn.Module):
    """Layers and final norm, over embeddings.

    Attributes:
        recompute: Whether the activations inside a layer are dropped and computed again.
    """

    def __init__(self, layers: nn.ModuleList, norm_f: nn.Module, *, recompute: bool) -> None:
        super().__init__()
        self.layers = layers
        self.norm_f = norm_f
        self.recompute = recompute

    def forward(
        self, x: Tensor, *, packing: Packing | None = None, keep_layers: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """Run all layers over ``x`` (B, T, hidden).

        Args:
            x: Embeddings.
            packing: The sequences each row holds.
            keep_layers: Whether the output of each layer is returned.

        Returns:
            Hidden states after ``norm_f``, and the outputs of the layers if they are kept.
        """
        outputs: list[Tensor] = []
        for layer in self.layers:
            if self.recompute and torch.is_grad_enabled():  # nothing in a layer is random
                x = checkpoint(
                    _run_layer, layer, x, packing, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x = _run_layer(layer, x, packing)
            if keep_layers:
                outputs.append(x)
        return self.norm_f(x), outputs


def make_backbone(
    teacher: NemotronNanoVL,
    formats: Mapping[str, Format],
    scales: Mapping[str, Tensor],
    *,
    recompute: bool,
    take_layers: bool,
) -> Backbone:
    """Copy or take the teacher's layers and put fake-quantized linears into them.

    Args:
        teacher: Not changed, unless its layers are taken: then it has none afterwards.
        formats: Format of each quantized linear.
        scales: Scale of each quantized input.
        recompute: As in `Backbone`.
        take_layers: Whether the layers are taken.
    """
    source = teacher.language_model.backbone
    layers, norm_f = source.layers, source.norm_f
    if take_layers:
        source.layers = nn.ModuleList()
    else:
        layers, norm_f = copy.deepcopy((layers, norm_f))
    backbone = Backbone(layers, norm_f, recompute=recompute)
    for fqn, linear_format in formats.items():
        name = fqn.removeprefix(PREFIX)
        weight = backbone.get_parameter(f"{name}.weight").data
        backbone.set_submodule(name, FakeQuantLinear(weight, linear_format, scales.get(fqn)))
    return backbone


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x W^T``; the backward pass keeps the operands as they are, not widened."""
    product: Tensor = _Multiply.apply(x, weight)  # type: ignore[no-untyped-call]
    return product


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        gradient, of_x, of_weight = gradients[0], None, None
        if ctx.needs_input_grad[0]:
            of_x = linear(gradient, weight.T)
        if ctx.needs_input_grad[1]:
            of_weight = torch.empty_like(weight)
            inputs, outputs = x.flatten(0, -2).T, gradient.flatten(0, -2).T
            for start in range(0, len(weight), _GRADIENT_ROWS):  # what is widened stays small
                rows = slice(start, start + _GRADIENT_ROWS)
                of_weight[rows] = linear(outputs[rows], inputs)
        return of_x, of_weight


def _run_layer(layer: nn.Module, x: Tensor, packing: Packing | None) -> Tensor:
    output: Tensor = layer(x, packing=packing)[0]
    return output
