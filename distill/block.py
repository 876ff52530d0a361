"""One layer trained alone, in little memory.

A full training state takes 16 bytes a parameter. Here a layer has its FP32 masters (4), the rounded
BF16 weights of the forward (2), and at any time the gradient of one linear: each weight is moved as
soon as its gradient is there, by Adafactor, whose second moments are a row and a column, a few rows
at a time. That is at most 8 bytes a parameter, four times the BF16 layer, activations not counted.

Adafactor's rate is a fraction of the weights' own size.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nvvl.distill.backbone import FakeQuantLinear
from nvvl.distill.losses import relative_error
from nvvl.distill.recipe import DistillRecipe
from nvvl.distill.scales import round_weight
from nvvl.model.packing import Packing
from nvvl.quantize import kernels
from nvvl.quantize.amaxes import Amax, share_qkv
from nvvl.quantize.pack import input_scale
from nvvl.quantize.recipe import Format

# Elements that an optimizer step holds in float32 at once.
SLICE_ELEMENTS = 2**20


class BlockStudent:
    """A layer with fake-quantized linears, trained by its own optimizer.

    Attributes:
        layer: What runs.
        masters: FP32 weights by name within the checkpoint.
    """

    def __init__(
        self,
        layer: nn.Module,
        prefix: str,
        formats: Mapping[str, Format],
        amaxes: Mapping[str, Amax],
        recipe: DistillRecipe,
    ) -> None:
        """Make a student of a layer.

        Args:
            layer: With BF16 weights; its linears are replaced.
            prefix: Name of the layer in the checkpoint.
            formats: Format of each quantized linear of this layer.
            amaxes: The run's amax of each; only those of inputs are used.
            recipe: Says whether norms train beside the linears, and how fast.
        """
        self.layer = layer
        self.masters: dict[str, Tensor] = {}
        self._formats = dict(formats)
        self._recipe = recipe
        self._slices: dict[str, list[tuple[nn.Parameter, torch.optim.Optimizer]]] = {}
        self._step = 0
        for fqn, linear_format in formats.items():
            name = fqn.removeprefix(f"{prefix}.")
            amax = amaxes[fqn].input
            scale = None if amax is None else input_scale(linear_format, amax)
            weight = layer.get_parameter(f"{name}.weight").data
            layer.set_submodule(name, FakeQuantLinear(weight, linear_format, scale))
        self._parameters = {f"{prefix}.{name}": p for name, p in layer.named_parameters()}
        for name in self._trained_names(recipe):
            self._train(name)
        self.refresh()

    def step(self, x: Tensor, target: Tensor, packing: Packing) -> float:
        """Move the weights so that ``x`` comes out nearer to ``target``; return the error before.

        Args:
            x: (1, T, D) what the quantized layers before give.
            target: (1, T, D) what the BF16 layer gives in the BF16 model.
            packing: The sequences of the row.
        """
        rate = self._recipe.learning_rate_at(self._step)
        for slices in self._slices.values():
            for _, optimizer in slices:
                optimizer.param_groups[0]["lr"] = rate
        error = relative_error(self.layer(x, packing=packing)[0], target)
        error.backward()  # hooks move each weight on the way
        self._step += 1
        self.refresh()
        return float(error.detach())

    @torch.no_grad()
    def refresh(self) -> None:
        """Give the forward the masters' values: rounded to BF16, weights to their formats too."""
        amaxes: dict[str, Amax] = {}
        for fqn in self._formats:
            parts = self._in_slices(self.masters[f"{fqn}.weight"])
            amaxes[fqn] = Amax(
                torch.stack([kernels.amax(p.bfloat16()).cpu() for p in parts]).amax()
            )
        amaxes = share_qkv(amaxes)
        for fqn, linear_format in self._formats.items():
            name = f"{fqn}.weight"
            pairs = zip(
                *map(self._in_slices, (self.masters[name], self._parameters[name])), strict=True
            )
            for master, parameter in pairs:
                rounded = round_weight(master.bfloat16(), linear_format, amaxes[fqn].weight)
                parameter.copy_(rounded)
        for name, master in self.masters.items():
            if name.removesuffix(".weight") not in self._formats:
                self._parameters[name].copy_(master)

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take weights that were trained before."""
        for name, master in self.masters.items():
            master.copy_(weights[name])
        self.refresh()

    def _trained_names(self, recipe: DistillRecipe) -> list[str]:
        names = [f"{fqn}.weight" for fqn in self._formats]
        if "norms" in recipe.trainable:
            vectors = [name for name, p in self._parameters.items() if p.ndim == 1]
            names += [name for name in vectors if name.endswith("norm.weight")]
        return names

    @staticmethod
    def _in_slices(weight: Tensor) -> tuple[Tensor, ...]:
        return weight.detach().split(max(1, SLICE_ELEMENTS // weight[0].numel()))

    def _train(self, name: str) -> None:
        parameter = self._parameters[name]
        master = parameter.detach().float()
        self.masters[name] = master
        slices: list[tuple[nn.Parameter, torch.optim.Optimizer]] = []
        for part in self._in_slices(master):
            piece = nn.Parameter(part)  # a view: moving it moves the master
            slices.append((piece, torch.optim.Adafactor([piece], foreach=False)))
        self._slices[name] = slices
        parameter.requires_grad_(True)
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: self._move(name, p))

    @torch.no_grad()
    def _move(self, name: str, parameter: Tensor) -> None:
        """Take one optimizer step on a weight, and drop its gradient."""
        assert parameter.grad is not None
        start = 0
        for piece, optimizer in self._slices[name]:
            part = parameter.grad[start : start + len(piece)]
            piece.grad = part.float()
            optimizer.step()
            piece.grad = None
            start += len(piece)
        parameter.grad = None
