"""The student: the teacher's language model with a run's quantizers, made to train.

The forward pass sees weights and inputs of quantized linears rounded to their formats; gradients
pass straight through both roundings (``scales.py``). The gradient of a rounded weight is therefore
that of the weight itself, and so the rounding need not be part of the graph: it is done once an
optimizer step (`Student.refresh`), however many batches the step has, and the backward pass runs no
code of it. ModelOpt's quantizers round the weight in every forward.

A trained tensor exists twice: as an FP32 master that the optimizer moves, and as the BF16 value the
forward uses, made from the master rounded to BF16, which is what is written and packed in the end.
The weight amax follows the weight. The input amax stays as the run calibrated it, or is learned (as
a logarithm, so that a step is a fraction of it), or follows what the student meets.

Vision tower, projector, embeddings and head are the teacher's own tensors: image features and
embeddings are computed once for both models.

Where layers are sliced over processes (``sharding.py``), each process has a slice of a tensor and
of its master; all of this then works on slices, and only the amax is taken over all of them.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nvvl.distill.backbone import PREFIX, Backbone, FakeQuantLinear, make_backbone
from nvvl.distill.recipe import DistillRecipe
from nvvl.distill.scales import round_weight
from nvvl.distill.sharding import shard_layers, slice_of
from nvvl.errors import RecipeError
from nvvl.model.processes import Processes
from nvvl.model.vlm import NemotronNanoVL
from nvvl.quantize import kernels
from nvvl.quantize.amaxes import Amax, share_qkv
from nvvl.quantize.pack import input_scale
from nvvl.quantize.recipe import Format
from nvvl.quantize.targets import qkv_groups

LOG_AMAX = ".input_log_amax"


class Student:
    """A trainable, fake-quantized language model.

    Attributes:
        backbone: Computes hidden states from embeddings.
        masters: FP32 leaf tensors by name; their ``grad`` is filled by `collect_gradients`. Weights
            have their tensor's name, learned input scales ``{linear}.input_log_amax``.
        amaxes: FP32 scalars: the amax of each quantized input, as it is now.
        sliced: Whether each process has a slice of every layer.
    """

    backbone: Backbone

    def __init__(
        self,
        teacher: NemotronNanoVL,
        formats: Mapping[str, Format],
        amaxes: Mapping[str, Amax],
        recipe: DistillRecipe,
        *,
        processes: Processes | None = None,
        take_layers: bool = False,
        shard: bool = False,
    ) -> None:
        """Make a student that computes what the run computes.

        Args:
            teacher: The BF16 model the run was made from.
            formats: Format of each quantized linear.
            amaxes: The run's amax of each; only those of inputs are used.
            recipe: Says what trains.
            processes: Those that train together; None for this one alone.
            take_layers: Take the teacher's layers in place of copying them; it has none afterwards.
            shard: Give each process a slice of every layer.
        """
        self.masters: dict[str, Tensor] = {}
        self.amaxes = {fqn: a.input.clone() for fqn, a in amaxes.items() if a.input is not None}
        self._formats = dict(formats)
        self._processes = processes or Processes("cpu", join=False)
        self.sliced = shard
        scales = {fqn: input_scale(formats[fqn], amax) for fqn, amax in self.amaxes.items()}
        self.backbone = make_backbone(
            teacher, formats, scales, recompute=recipe.recompute, take_layers=take_layers
        )
        trained = self._trained_names(recipe)
        for name in trained:
            self.backbone.get_parameter(name.removeprefix(PREFIX)).requires_grad_(True)
        if shard:
            shard_layers(self.backbone, self.backbone.layers, self._processes.device)
        self._parameters = {f"{PREFIX}{name}": p for name, p in self.backbone.named_parameters()}
        for name in trained:
            weight = slice_of(self._parameters[name])
            self.masters[name] = weight.float().clone().requires_grad_(True)
        self._scale_owners = self._own_scales() if "input_scales" in recipe.trainable else {}
        if recipe.recalibrate_inputs:
            for linear in self._quantized_inputs().values():
                linear.observed = torch.zeros(())
        frozen = {f"{fqn}.weight" for fqn in formats} - self.masters.keys()
        self._round({name: slice_of(self._parameters[name]) for name in sorted(frozen)})
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Give the forward the masters' values: rounded to BF16, weights to their formats too."""
        weights: dict[str, Tensor] = {}
        for name, master in self.masters.items():
            if name.endswith(LOG_AMAX):
                continue
            if name.removesuffix(".weight") in self._formats:
                weights[name] = master.bfloat16()
            else:
                slice_of(self._parameters[name]).copy_(master)
        self._round(weights)
        for fqn, owner in self._scale_owners.items():
            self.amaxes[fqn].copy_(self.masters[owner].exp())
        self.set_input_scales()

    @torch.no_grad()
    def set_input_scales(self) -> None:
        """Give the forward the scales that follow from `amaxes`."""
        for fqn, linear in self._quantized_inputs().items():
            assert linear.scale is not None
            linear.scale.copy_(input_scale(self._formats[fqn], self.amaxes[fqn]))

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """Add the gradients of a backward pass to the masters', in FP32, and clear them."""
        for name, master in self.masters.items():
            if not name.endswith(LOG_AMAX):
                _add_gradient(master, _take_gradient(self._parameters[name]))
        for fqn, owner in self._scale_owners.items():
            scale = self._parameters[f"{fqn}.scale"]
            gradient = _take_gradient(scale)
            # the scale is proportional to the amax: d / d log amax = scale d / d scale
            _add_gradient(self.masters[owner], None if gradient is None else gradient * scale)

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """Add up the gradients of all processes.

        Those of slices have become a mean on the way, and the others become one too beside them.
        """
        count = self._processes.count if self.sliced else 1
        for name, master in self.masters.items():
            if master.grad is not None and not self.is_sliced(name):
                master.grad = self._processes.sum(master.grad) / count

    @torch.no_grad()
    def recalibrate(self) -> None:
        """Set the amax of inputs to the largest met since the last time, where something was."""
        linears = self._quantized_inputs()
        met = torch.stack([_observed(linear) for linear in linears.values()])
        for (fqn, linear), amax in zip(linears.items(), self._processes.max(met), strict=True):
            if amax > 0:
                self.amaxes[fqn] = amax.clone()
            linear.observed = torch.zeros(())
        for group in qkv_groups(self.amaxes):
            assert len({float(self.amaxes[fqn]) for fqn in group}) == 1, group  # one tensor
        self.set_input_scales()

    def parameter(self, name: str) -> Tensor:
        """Return what a master is the master of: shaped as a checkpoint stores it."""
        return self.masters[name] if name.endswith(LOG_AMAX) else self._parameters[name]

    def is_sliced(self, name: str) -> bool:
        """Whether each process has a slice of a master."""
        return self.sliced and not name.endswith(LOG_AMAX)

    def _round(self, weights: Mapping[str, Tensor]) -> None:
        """Put weights, rounded to their formats, where the forward reads them."""
        if not weights:
            return
        local = torch.stack([_amax(weight) for weight in weights.values()])
        largest = self._processes.max(local) if self.sliced else local
        names = [name.removesuffix(".weight") for name in weights]
        amaxes = share_qkv({fqn: Amax(a) for fqn, a in zip(names, largest, strict=True)})
        for fqn, weight in zip(names, weights.values(), strict=True):
            if weight.numel():
                rounded = round_weight(weight, self._formats[fqn], amaxes[fqn].weight)
                slice_of(self._parameters[f"{fqn}.weight"]).copy_(rounded)

    def _trained_names(self, recipe: DistillRecipe) -> list[str]:
        names = []
        if "linears" in recipe.trainable:
            names += [f"{fqn}.weight" for fqn in self._formats]
        if "norms" in recipe.trainable:
            names += [
                f"{PREFIX}{name}"
                for name, parameter in self.backbone.named_parameters()
                if parameter.ndim == 1 and name.endswith(("norm.weight", "norm_f.weight"))
            ]
        return names

    def _own_scales(self) -> dict[str, str]:
        """Make a master of each input amax, one for q, k and v, and name it for each linear."""
        owners = {fqn: f"{fqn}{LOG_AMAX}" for fqn in self._quantized_inputs()}
        for query, key, value in qkv_groups(owners):
            owners[key] = owners[value] = owners[query]
        for fqn, owner in owners.items():
            self._parameters[f"{fqn}.scale"].requires_grad_(True)
            if owner not in self.masters:
                self.masters[owner] = self.amaxes[fqn].log().requires_grad_(True)
        return owners

    def _quantized_inputs(self) -> dict[str, FakeQuantLinear]:
        linears = {}
        for fqn in self.amaxes:
            linear = self.backbone.get_submodule(fqn.removeprefix(PREFIX))
            assert isinstance(linear, FakeQuantLinear)
            linears[fqn] = linear
        return linears


def require_trainable(recipe: DistillRecipe, amaxes: Mapping[str, Amax]) -> None:
    """Refuse a recipe about quantized inputs where a run has none.

    Raises:
        RecipeError: naming the key.
    """
    if any(amax.input is not None for amax in amaxes.values()):
        return
    for key, asked in (
        ("trainable", "input_scales" in recipe.trainable),
        ("recalibrate_inputs", recipe.recalibrate_inputs),
    ):
        if asked:
            raise RecipeError(
                f"{key}: scales of inputs need quantized inputs, and the run quantizes weights "
                "alone; leave them out, or give a run of another format"
            )


def _take_gradient(parameter: nn.Parameter) -> Tensor | None:
    gradient, parameter.grad = parameter.grad, None
    return None if gradient is None else slice_of(gradient)


def _add_gradient(master: Tensor, gradient: Tensor | None) -> None:
    if gradient is not None:
        gradient = gradient.float()
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)


def _observed(linear: FakeQuantLinear) -> Tensor:
    assert linear.observed is not None, "recalibration was not asked for"
    return linear.observed


def _amax(weight: Tensor) -> Tensor:
    # a process may have no row of a small weight
    return kernels.amax(weight).cpu() if weight.numel() else torch.zeros(())
