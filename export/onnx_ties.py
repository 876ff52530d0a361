"""Rounding ties between two computations of one quantized model, and how they are settled.

A quantizer is a staircase. Two sums of the same numbers in another order differ by some 1e-7, and
where such a number lies that close to the edge of a step, the two land on neighbouring codes: 6 %
apart in FP8, up to 50 % in NVFP4, and every later number differs. No tolerance on logits can tell
this from a fault. So the torch model takes the graph's side: each quantized linear multiplies the
graph's quantized input in place of its own, **after** it is proved that this input is what the
format gives for the torch model's own input, moved by no more than the tolerance. What then remains
is compared with no excuse left.

The proof is per element for FP8. For NVFP4 the scale of a block may be that of its largest
magnitude moved up or down, and then each element that of its value moved up or down.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nvvl.quantize import fp8, nvfp4, rounding
from nvvl.quantize.formats import BLOCK_SIZE, E2M1_BOUNDARIES, E2M1_VALUES
from nvvl.quantize.linear import QuantizedLinear

# Move of an input, relative to the largest magnitude of its token, that counts as rounding.
TOLERANCE = 1e-5


@dataclass
class TieSettler:
    """Gives a torch model the quantized inputs of a graph, after proving that they are its own.

    Attributes:
        inputs: Of the graph's present run, by module name.
        new_states: Keys and values that it added to an FP8 cache, (B, T, heads x D), by the name of
            the linear that gives them.
        faults: Inputs that are no rounding of the torch model's, until they are drained.
        num_values: Inputs compared.
        num_ties: Inputs that lay on a step's edge.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    new_states: dict[str, Tensor] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    num_values: int = 0
    num_ties: int = 0

    def drain(self) -> list[str]:
        """Return the faults found since the last call."""
        faults, self.faults = self.faults, []
        return faults

    def watch(self, fqn: str, linear: QuantizedLinear) -> RemovableHandle:
        """Put a hook on a linear whose input is quantized; returns its handle."""

        def settle(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            settled = self.settle(fqn, args[0], linear.linear_format, linear.input_scale)
            assert linear.dense_weight is not None  # it has just been multiplied
            return (
                output if settled is None else F.linear(settled, linear.dense_weight, linear.bias)
            )

        return linear.register_forward_hook(settle)

    def watch_states(self, fqn: str, linear: nn.Module) -> RemovableHandle:
        """Have what a key or value projection gives rounded as an FP8 cache keeps it."""
        one = torch.ones(())

        def settle(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            settled = self._settle(fqn, output, self.new_states.get(fqn), "fp8", one)
            return fp8.fake_quantize(output, one) if settled is None else settled

        return linear.register_forward_hook(settle)

    def settle(self, fqn: str, x: Tensor, linear_format: str, scale: Tensor) -> Tensor | None:
        """Return a graph's quantized input where it differs by ties alone; else None.

        Args:
            fqn: name of the linear.
            x: (..., K) float32, the torch model's own input, not quantized.
            linear_format: ``fp8`` or ``nvfp4``.
            scale: its ``input_scale``.
        """
        return self._settle(fqn, x, self.inputs.get(fqn), linear_format, scale)

    def _settle(
        self, fqn: str, x: Tensor, theirs: Tensor | None, linear_format: str, scale: Tensor
    ) -> Tensor | None:
        if theirs is None or theirs.shape != x.shape:
            self.faults.append(f"{fqn}: the graph does not quantize this")
            return None
        ours = rounding.fake_quantize(x, scale, linear_format)
        differs = ours != theirs
        self.num_values += x.numel()
        if not differs.any():
            return None
        move = TOLERANCE * x.abs().amax(-1, keepdim=True)
        is_rounding = _fp8_rounding if linear_format == "fp8" else _nvfp4_rounding
        wrong = differs & ~is_rounding(x, theirs, move, scale)
        if wrong.any():
            self.faults.append(f"{fqn}: {int(wrong.sum())} of {x.numel()} quantized values differ")
            return None
        self.num_ties += int(differs.sum())
        return theirs


def _fp8_rounding(x: Tensor, theirs: Tensor, move: Tensor, scale: Tensor) -> Tensor:
    low, high = fp8.fake_quantize(x - move, scale), fp8.fake_quantize(x + move, scale)
    is_code = fp8.fake_quantize(theirs, scale) == theirs
    return (low <= theirs) & (theirs <= high) & is_code


def _nvfp4_rounding(x: Tensor, theirs: Tensor, move: Tensor, scale: Tensor) -> Tensor:
    outward = torch.where(x < 0, -move, move)
    low, high, wanted = (t.unflatten(-1, (-1, BLOCK_SIZE)) for t in (x - move, x + move, theirs))
    fits = torch.zeros_like(wanted[..., :1], dtype=torch.bool)
    for moved in (x - outward, x + outward):
        _, block_scale = nvfp4.quantize(moved, scale)
        unit = (block_scale.float() * scale).unsqueeze(-1)
        is_code = _round_e2m1(wanted / unit) * unit == wanted
        reached = (_round_e2m1(low / unit) * unit <= wanted) & (
            wanted <= _round_e2m1(high / unit) * unit
        )
        fits |= (is_code & reached).all(-1, keepdim=True)
    return fits.expand_as(wanted).flatten(-2)


def _round_e2m1(y: Tensor) -> Tensor:
    magnitudes = torch.tensor(E2M1_VALUES[:8])
    places = torch.bucketize(y.abs(), torch.tensor(E2M1_BOUNDARIES))
    return magnitudes[places] * y.sign()
