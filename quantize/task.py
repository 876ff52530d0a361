"""What a run of the walk is to do: source, recipe and items, once they are known to fit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nvvl.calib_data.items import Item
from nvvl.errors import DataError, RecipeError
from nvvl.model.checkpoint import Checkpoint
from nvvl.model.load import check_tensors, expected_tensors
from nvvl.model.processes import Processes
from nvvl.quantize.identity import describe_arithmetic, describe_run
from nvvl.quantize.recipe import CALIBRATED_FORMATS, Format, Recipe
from nvvl.quantize.stored import StoredCalibration
from nvvl.quantize.targets import assign_formats, list_linears

if TYPE_CHECKING:
    from nvvl.calib_data.manifest import CalibrationSet


@dataclass(frozen=True, kw_only=True)
class Task:
    """What all processes do together, once source, recipe and items are known to fit each other.

    Attributes:
        checkpoint: The source.
        formats: Format of each quantizable linear.
        recipe: The recipe in force.
        stored: The calibration that is packed from, if it is not found out anew.
        items: The calibration items; empty if no input is calibrated.
    """

    checkpoint: Checkpoint
    formats: Mapping[str, Format]
    recipe: Recipe
    stored: StoredCalibration | None
    items: Sequence[Item]

    def identify(self, device: torch.device) -> dict[str, str]:
        """Say what the bytes of the output depend on, but for the calibration items."""
        calibration = self.stored.sha256 if self.stored else ""
        identity = describe_run(
            self.checkpoint, self.recipe, device=device.type, calibration=calibration
        )
        return identity | describe_arithmetic(device) if self.items else identity


def read_task(
    source: Path,
    recipe: Recipe,
    items: "CalibrationSet | None",
    from_calibration: Path | None,
    processes: Processes,
) -> Task:
    """Open the source, and refuse what does not fit it; all else as in `quantize_checkpoint`."""
    checkpoint = Checkpoint(source)
    check_tensors(checkpoint, expected_tensors(checkpoint.config))
    formats = assign_formats(recipe, list_linears(checkpoint.config))
    stored = None
    if from_calibration is not None:
        stored = StoredCalibration.read(from_calibration)
        stored.require_covers(recipe, formats)
        recipe = replace(recipe, num_calibration_items=stored.recipe.num_calibration_items)
    used_items = () if stored else _select_items(recipe, formats, items)
    if recipe.image_weight is not None and processes.count > 1:
        raise RecipeError(
            f"recipe {recipe.name}: image_weight sums errors over all items, which one "
            f"process does alone; got {processes.count}: start one, or leave image_weight out"
        )
    return Task(
        checkpoint=checkpoint, formats=formats, recipe=recipe, stored=stored, items=used_items
    )


def _select_items(
    recipe: Recipe, formats: Mapping[str, Format], items: "CalibrationSet | None"
) -> Sequence[Item]:
    """Return the items to calibrate with; none if only weights are quantized."""
    if not set(CALIBRATED_FORMATS) & set(formats.values()):
        return ()
    if items is None or not items.items:
        raise DataError(
            f"recipe {recipe.name} quantizes inputs too, and there are no calibration items; "
            "give a calibration set with at least one"
        )
    return items.items
