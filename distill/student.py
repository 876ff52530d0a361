"""The student: the teacher's language model with a run's quantizers, made to train.

The forward pass sees weights and inputs of quantized linears rounded to their formats; gradients
pass straight through both roundings, without a clip mask. The gradient of a rounded weight is
therefore that of the weight itself, and so the rounding need not be part of the graph: it is done
once an optimizer step (`Student.refresh`), however many batches the step has, and the backward pass
runs no code of it. ModelOpt's quantizers round the weight in every forward.

A trained tensor exists twice: as an FP32 master that the optimizer moves, and as the BF16 value the
forward uses, made from the master rounded to BF16, which is what is written and packed in the end.
The weight amax follows the weight; the input amax stays as the run calibrated it.

Vision tower, projector, embeddings and head are the teacher's own tensors, not copies: image
features and embeddings are computed once for both models.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nvvl.distill.recipe import Trainable
from nvvl.model.products import linear
from nvvl.model.vlm import LanguageModel, NemotronNanoVL
from nvvl.quantize import fp8, kernels, nvfp4
from nvvl.quantize.pack import Amax, input_scale, share_qkv
from nvvl.quantize.recipe import Format

_PREFIX = "language_model."


class FakeQuantLinear(nn.Module):
    """``y = q(x) W^T`` with straight-through gradients; W holds values of its format already.

    Attributes:
        linear_format: Of the input.
        weight: (N, K), set by `Student.refresh`.
        scale: FP32 scalar of the input; None where inputs stay BF16.
    """

    def __init__(self, weight: Tensor, linear_format: Format, scale: Tensor | None) -> None:
        super().__init__()
        self.linear_format = linear_format
        self.weight = nn.Parameter(weight.clone(), requires_grad=False)
        self.scale = scale  # stays on the CPU, where the kernels read it

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``x`` (..., K) to (..., N)."""
        if self.scale is not None:
            x = _FakeQuantize.apply(x, self.scale, self.linear_format)  # type: ignore[no-untyped-call]
        return linear(x, self.weight)


class Student:
    """A trainable, fake-quantized language model.

    Attributes:
        language_model: Computes hidden states; its embeddings and head are the teacher's.
        masters: FP32 leaf tensors by tensor name; their ``grad`` is filled by `collect_gradients`.
        num_refreshes: How often weights were rounded.
    """

    language_model: LanguageModel

    def __init__(
        self,
        teacher: NemotronNanoVL,
        formats: Mapping[str, Format],
        amaxes: Mapping[str, Amax],
        *,
        trainable: Sequence[Trainable] = ("linears", "norms"),
    ) -> None:
        """Make a student that computes what the run computes.

        Args:
            teacher: The BF16 model the run was made from; not changed.
            formats: Format of each quantized linear.
            amaxes: The run's amax of each; only those of inputs are used.
            trainable: What gets a master.
        """
        shared = (teacher.language_model.backbone.embeddings, teacher.language_model.lm_head)
        memo: dict[int, Any] = {id(module): module for module in shared}
        self.language_model = copy.deepcopy(teacher.language_model, memo)
        self.masters: dict[str, Tensor] = {}
        self.num_refreshes = 0
        self._formats = dict(formats)
        self._teacher = teacher
        for fqn, linear_format in formats.items():
            amax = amaxes[fqn].input
            scale = None if amax is None else input_scale(linear_format, amax)
            weight = teacher.get_parameter(f"{fqn}.weight")
            parent, _, leaf = fqn.removeprefix(_PREFIX).rpartition(".")
            linear = FakeQuantLinear(weight, linear_format, scale)
            setattr(self.language_model.get_submodule(parent), leaf, linear)
        names = [f"{fqn}.weight" for fqn in formats] if "linears" in trainable else []
        if "norms" in trainable:
            names += [f"{_PREFIX}{name}" for name in _norm_names(self.language_model)]
        for name in names:
            self._parameter(name).requires_grad_(True)
            self.masters[name] = teacher.get_parameter(name).float().clone().requires_grad_(True)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Give the forward the masters' values: rounded to BF16, weights to their formats too."""
        self.num_refreshes += 1
        weights = {fqn: self._unquantized(f"{fqn}.weight") for fqn in self._formats}
        amaxes = share_qkv({fqn: Amax(kernels.amax(w).cpu()) for fqn, w in weights.items()})
        for fqn, weight in weights.items():
            rounded = _round_weight(weight, self._formats[fqn], amaxes[fqn].weight)
            self._parameter(f"{fqn}.weight").copy_(rounded)
        for name, master in self.masters.items():
            if name.removesuffix(".weight") not in weights:
                self._parameter(name).copy_(master)

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """Add the gradients of a backward pass to the masters', in FP32, and clear them."""
        for name, master in self.masters.items():
            parameter = self._parameter(name)
            if parameter.grad is None:
                continue
            gradient = parameter.grad.float()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            parameter.grad = None

    def _unquantized(self, name: str) -> Tensor:
        master = self.masters.get(name)
        return self._teacher.get_parameter(name) if master is None else master.bfloat16()

    def _parameter(self, name: str) -> nn.Parameter:
        return self.language_model.get_parameter(name.removeprefix(_PREFIX))


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, linear_format: Format) -> Tensor:
        if linear_format == "fp8":
            return fp8.fake_quantize(x, scale)
        return nvfp4.fake_quantize(x, scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0], None, None


def _round_weight(weight: Tensor, linear_format: Format, amax: Tensor) -> Tensor:
    if linear_format == "fp8":
        return fp8.fake_quantize(weight, fp8.scale_from_amax(amax))
    return nvfp4.fake_quantize(weight, nvfp4.tensor_scale_from_amax(amax))


def _norm_names(model: LanguageModel) -> list[str]:
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim == 1 and name.endswith(("norm.weight", "norm_f.weight"))
    ]
