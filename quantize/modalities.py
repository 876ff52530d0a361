"""What reaches the linears of one layer: image tokens and text tokens apart.

A layer is run over the calibration items twice, because a scale follows from all of them: first to
find largest magnitude and energy of each modality (`LayerInputs.survey`), then to round inputs
under candidates of the scale and to sum the squared errors (`LayerInputs.rounding`).

The error of a modality is relative to its own energy, ``sum (x - fake_quantize(x))**2 / sum x**2``,
so that a thousand image tokens do not outweigh ten words, nor large tokens small ones. A recipe's
``image_weight`` w then means: of all candidates take the scale with the least

    w * error of image tokens + (1 - w) * error of text tokens.

The candidates clip down to an eighth of the amax, and go up to twice the amax, because NVFP4's
block scales are rounded to E4M3 and so depend on the tensor scale within an octave. The plain amax
is one of them and wins a tie.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nvvl.errors import CalibrationError, DataError
from nvvl.quantize import kernels, rounding
from nvvl.quantize.activations import Activations, Announce
from nvvl.quantize.pack import input_scale
from nvvl.quantize.recipe import Format
from nvvl.quantize.targets import qkv_groups

Modality = Literal["image", "text"]
MODALITIES: tuple[Modality, ...] = ("image", "text")

# Multiples of the amax, the amax itself first; four an octave.
PLAIN = (1.0,)
CANDIDATES = (1.0, *(2 ** (step / 4) for step in range(-12, 5) if step))

# given the name of a linear and (tokens, K) of one modality
_Collect = Callable[[str, Modality, Tensor], None]


@dataclass
class Seen:
    """Inputs of one linear and modality: how many tokens, largest magnitude, sum of squares."""

    num_tokens: int = 0
    amax: float = 0.0
    energy: float = 0.0


class LayerInputs:
    """The inputs of the linears of one layer, over all calibration items.

    Attributes:
        seen: By linear and modality, after `survey`.
        squared_errors: By linear, format and modality: one sum a candidate, after `rounding`.
    """

    def __init__(
        self,
        prefix: str,
        formats: Mapping[str, Sequence[Format]],
        candidates: Sequence[float] = PLAIN,
    ) -> None:
        """Say what to look at.

        Args:
            prefix: Name of the layer in the model.
            formats: Formats to round the inputs to, by full name of the linear.
            candidates: Multiples of the amax to make scales of.
        """
        self._prefix = prefix
        # q, k and v have one input: it is looked at once
        first = {fqn: group[0] for group in qkv_groups(formats) for fqn in group}
        self._first = {fqn: first.get(fqn, fqn) for fqn in formats}
        self._formats = {fqn: tuple(formats[fqn]) for fqn in self._first.values()}
        self._candidates = tuple(candidates)
        self.seen = {fqn: {m: Seen() for m in MODALITIES} for fqn in self._formats}
        self.squared_errors: dict[tuple[str, Format, Modality], list[float]] = {
            (fqn, to, m): [0.0] * len(self._candidates)
            for fqn, formats_of in self._formats.items()
            for to in formats_of
            for m in MODALITIES
        }

    def survey(self, layer: nn.Module, activations: Activations) -> None:
        """Run the layer over the items, which stay as they are, to find ranges.

        Raises:
            CalibrationError: naming an item that gives NaN or Inf.
        """
        with self._watch(layer, self._add_seen) as announce:
            activations.observe_layer(layer, self._prefix, announce)

    @contextmanager
    def rounding(self, layer: nn.Module) -> Iterator[Announce]:
        """Sum rounding errors while the layer is run inside; yields what announces tokens."""
        scales: dict[tuple[str, Format], list[Tensor]] = {
            (fqn, to): self._scales(fqn, to)
            for fqn, formats in self._formats.items()
            for to in formats
            if self.amax(fqn)
        }
        with self._watch(layer, partial(self._add_errors, scales)) as announce:
            yield announce

    def amax(self, fqn: str) -> float:
        """Return the largest magnitude of a linear's inputs."""
        return max(seen.amax for seen in self.seen[self._first[fqn]].values())

    def part(self, fqn: str, modality: Modality) -> Seen:
        """Return what was seen of one modality."""
        return self.seen[self._first[fqn]][modality]

    def errors(self, fqn: str, to: Format, modality: Modality) -> list[float]:
        """Return the error under each candidate, relative to the energy; 0 of nothing."""
        energy = self.part(fqn, modality).energy
        sums = self.squared_errors[self._first[fqn], to, modality]
        return [total / energy if energy else 0.0 for total in sums]

    def choose(self, fqn: str, to: Format, image_weight: float | None) -> int:
        """Return the number of the candidate with the least weighted error; without, the first.

        Raises:
            DataError: if the weight is of a modality that no item has.
        """
        if image_weight is None:
            return 0
        weights: dict[Modality, float] = {"image": image_weight, "text": 1 - image_weight}
        for modality, weight in weights.items():
            if weight and not self.part(fqn, modality).num_tokens:
                raise DataError(
                    f"image_weight = {image_weight}: required calibration items with {modality} "
                    f"tokens, got none; give such items, or leave image_weight out"
                )
        image, text = (self.errors(fqn, to, modality) for modality in MODALITIES)
        losses = [
            weights["image"] * i + weights["text"] * t for i, t in zip(image, text, strict=True)
        ]
        return losses.index(min(losses))

    def scale_amax(self, fqn: str, to: Format, image_weight: float | None) -> Tensor:
        """Return the magnitude that the chosen scale maps to the format's largest value."""
        ratio = self._candidates[self.choose(fqn, to, image_weight)]
        return torch.tensor(self.amax(fqn) * ratio, dtype=torch.float32)

    def _scales(self, fqn: str, to: Format) -> list[Tensor]:
        try:
            return [input_scale(to, torch.tensor(self.amax(fqn) * r)) for r in self._candidates]
        except CalibrationError as error:
            raise CalibrationError(f"{fqn}: {error}") from None

    @contextmanager
    def _watch(self, layer: nn.Module, collect: _Collect) -> Iterator[Announce]:
        """Give the inputs of each linear to ``collect``, by modality."""
        images = torch.zeros(1, 0, dtype=torch.bool)

        def announce(of_images: Tensor) -> None:
            nonlocal images
            images = of_images

        def look(fqn: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0].detach()
            mask = images.to(x.device)
            assert mask.shape == x.shape[:-1], f"{fqn}: {list(x.shape)} for {list(mask.shape)}"
            for modality, rows in (("image", x[mask]), ("text", x[~mask])):
                if len(rows):
                    collect(fqn, modality, rows)  # type: ignore[arg-type]

        handles = [
            layer.get_submodule(fqn.removeprefix(f"{self._prefix}.")).register_forward_pre_hook(
                partial(look, fqn)
            )
            for fqn in self._formats
        ]
        try:
            yield announce
        finally:
            for handle in handles:
                handle.remove()

    def _add_seen(self, fqn: str, modality: Modality, rows: Tensor) -> None:
        amax = float(kernels.amax(rows))
        if not amax < float("inf"):
            raise CalibrationError(f"{fqn}: NaN or Inf among its inputs")
        seen = self.seen[fqn][modality]
        seen.num_tokens += len(rows)
        seen.amax = max(seen.amax, amax)
        seen.energy += _energy(rows.float())

    def _add_errors(
        self,
        scales: Mapping[tuple[str, Format], Sequence[Tensor]],
        fqn: str,
        modality: Modality,
        rows: Tensor,
    ) -> None:
        exact = rows.float()
        for to in self._formats[fqn]:
            sums = self.squared_errors[fqn, to, modality]
            for index, scale in enumerate(scales.get((fqn, to), ())):
                rounded = rounding.fake_quantize(rows, scale, to)
                sums[index] += _energy(rounded.float() - exact)


def _energy(x: Tensor) -> float:
    """Return the sum of squares of a float32 tensor."""
    flat = x.flatten()
    return float(flat.dot(flat))
