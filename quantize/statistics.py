"""Statistics of the inputs of every linear that a recipe quantizes, by modality; writes nothing.

The blocks are run over the items as `nvvl.quantize.walk` does, each layer twice
(`nvvl.quantize.modalities`); items that half of the free memory does not hold lie in a temporary
folder between blocks. For each linear: amax of image tokens and of text tokens, the input scale
that the recipe gives, and the error of rounding either modality to FP8 and to NVFP4 under it,
whichever of the two the recipe asks for.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from nvvl.calib_data.items import Item
from nvvl.errors import DataError, RecipeError
from nvvl.model.checkpoint import Checkpoint
from nvvl.model.load import check_tensors, expected_tensors
from nvvl.model.processor import Processor
from nvvl.progress import Progress, Ticker
from nvvl.quantize.activations import Activations
from nvvl.quantize.block_names import list_blocks
from nvvl.quantize.block_runner import BlockRunner, count_runs
from nvvl.quantize.blocks import BlockReader
from nvvl.quantize.formats import BLOCK_SIZE
from nvvl.quantize.limits import default_limits
from nvvl.quantize.modalities import CANDIDATES, MODALITIES, PLAIN, LayerInputs, Modality
from nvvl.quantize.recipe import CALIBRATED_FORMATS, Format, Recipe
from nvvl.quantize.spill import SpillFolder
from nvvl.quantize.targets import assign_formats, list_linears


@dataclass(frozen=True, kw_only=True)
class ModalityStatistics:
    """The inputs of one linear that belong to tokens of one modality.

    Attributes:
        num_tokens: Over all items.
        amax: Largest magnitude.
        errors: ``sum (x - fake_quantize(x))**2 / sum x**2`` by format; None where ``x`` is zero.
    """

    num_tokens: int
    amax: float
    errors: Mapping[Format, float | None]


@dataclass(frozen=True, kw_only=True)
class InputStatistics:
    """The inputs of one linear.

    Attributes:
        name: Full name of the linear.
        format: What the recipe makes it.
        scale_amax: By format, the magnitude that its input scale maps to the largest value.
        parts: By modality.
    """

    name: str
    format: Format
    scale_amax: Mapping[Format, float]
    parts: Mapping[Modality, ModalityStatistics]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        values: dict[str, Any] = {"name": self.name, "format": self.format}
        values["scale_amax"] = dict(self.scale_amax)
        for modality, part in self.parts.items():
            values[modality] = {
                "num_tokens": part.num_tokens,
                "amax": part.amax,
                "errors": dict(part.errors),
            }
        return values


@torch.no_grad()
def collect_input_statistics(
    source: Path,
    recipe: Recipe,
    items: Sequence[Item],
    *,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> list[InputStatistics]:
    """Run a checkpoint over items and describe the inputs of the linears.

    Args:
        source: A BF16 checkpoint folder in the released layout.
        recipe: Says which linears, and how their input scales are found.
        items: The calibration items.
        device: Where blocks are run.
        progress: Called with the name of the block, steps done and steps in total.

    Returns:
        Of each linear whose inputs the recipe quantizes, in the order of the model.

    Raises:
        ConfigError: if config.json or the tokenizer cannot be used.
        CheckpointError: if source tensors are missing, unexpected, misshapen or not finite.
        RecipeError: if the recipe does not fit the model, or quantizes no inputs.
        DataError: if there are no items, one cannot be used, or all lack a modality that weighs.
        CalibrationError: if an item gives NaN or Inf.
        OutputError: if neither memory nor the disk has room for the items.
    """
    checkpoint = Checkpoint(source)
    check_tensors(checkpoint, expected_tensors(checkpoint.config))
    shapes = list_linears(checkpoint.config)
    formats = assign_formats(recipe, shapes)
    if not set(CALIBRATED_FORMATS) & set(formats.values()):
        raise RecipeError(f"{recipe.name}: required a rule that quantizes inputs, got none")
    if not items:
        raise DataError("required at least one calibration item, got none")
    device = torch.device(device)
    all_blocks = list_blocks(checkpoint.config)
    blocks = all_blocks[: count_runs(all_blocks, formats)]
    ticker = Ticker(progress, total=len(blocks) * len(items))
    processor = Processor.from_folder(checkpoint.folder)
    budget = default_limits().activation_bytes
    activations = Activations(
        items, processor, device=device, tick=ticker.tick, budget_bytes=budget, resumable=False
    )
    runner = BlockRunner(checkpoint, device)
    found: list[InputStatistics] = []
    with (
        TemporaryDirectory(prefix="nvvl-") as folder,
        BlockReader(checkpoint, blocks, device=device) as reader,
    ):
        spills = SpillFolder(Path(folder), index=0)
        for count, name in enumerate(blocks, start=1):
            ticker.stage = name
            block = reader.take(name)
            measured = {
                fqn: _formats_to_measure(shapes[fqn][1])
                for fqn, linear_format in formats.items()
                if fqn.startswith(f"{name}.") and linear_format in CALIBRATED_FORMATS
            }
            run = partial(runner.run, block, activations)
            if measured:
                layer = runner.fill_layer(block)
                candidates = PLAIN if recipe.image_weight is None else CANDIDATES
                inputs = LayerInputs(name, measured, candidates)
                inputs.survey(layer, activations)
                run = partial(_run_rounded, inputs, layer, name, activations)
            activations.run_block(run, spills.file(count), room=shutil.disk_usage(folder).free)
            spills.drop(before=count)
            found += [
                _describe(inputs, fqn, formats[fqn], to, recipe.image_weight)
                for fqn, to in measured.items()
            ]
    return found


def _run_rounded(
    inputs: LayerInputs, layer: nn.Module, name: str, activations: Activations
) -> None:
    with inputs.rounding(layer) as announce:
        activations.run_layer(layer, name, announce)


def _formats_to_measure(in_features: int) -> tuple[Format, ...]:
    return CALIBRATED_FORMATS if in_features % BLOCK_SIZE == 0 else ("fp8",)


def _describe(
    inputs: LayerInputs,
    fqn: str,
    linear_format: Format,
    measured: Sequence[Format],
    image_weight: float | None,
) -> InputStatistics:
    chosen: dict[Format, int] = {to: inputs.choose(fqn, to, image_weight) for to in measured}
    parts: dict[Modality, ModalityStatistics] = {}
    for modality in MODALITIES:
        seen = inputs.part(fqn, modality)
        errors: dict[Format, float | None] = {
            to: inputs.errors(fqn, to, modality)[index] if seen.energy else None
            for to, index in chosen.items()
        }
        parts[modality] = ModalityStatistics(
            num_tokens=seen.num_tokens, amax=seen.amax, errors=errors
        )
    return InputStatistics(
        name=fqn,
        format=linear_format,
        scale_amax={to: float(inputs.scale_amax(fqn, to, image_weight)) for to in measured},
        parts=parts,
    )
