"""The calibration of a finished run, for packing another export without calibrating again.

The largest input of a linear does not depend on the format that it is then stored in, because
calibration runs the BF16 model. So one calibration serves every recipe over the same layers, and
the bytes are those of a run that calibrated for itself. Scales chosen by ``image_weight`` do depend
on the format, and serve that format alone. A distilled run has none to give: its weights were
trained after calibration, and its scales may have been.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from nvvl.errors import CalibrationError, CheckpointError, RecipeError
from nvvl.model.hashing import hash_file
from nvvl.quantize.amaxes import CALIBRATION_NAME, read_input_amaxes
from nvvl.quantize.manifest import Manifest
from nvvl.quantize.recipe import CALIBRATED_FORMATS, Format, Recipe
from nvvl.quantize.side_files import read_recipe

_MAX_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class StoredCalibration:
    """What a finished run found out about inputs.

    Attributes:
        folder: The output of that run.
        inputs: Largest magnitude of the inputs, float32 scalars, by name of the linear.
        source: SHA-256 of each tensor of the BF16 source.
        items: (id, SHA-256) of the calibration items.
        recipe: The recipe of that run.
        formats: The format it gave to each quantizable linear.
        sha256: Of ``calibration.amax``.
    """

    folder: Path
    inputs: Mapping[str, Tensor]
    source: Mapping[str, str]
    items: Sequence[tuple[str, str]]
    recipe: Recipe
    formats: Mapping[str, Format]
    sha256: str

    @classmethod
    def read(cls, folder: Path) -> "StoredCalibration":
        """Read the calibration of an output folder.

        Raises:
            CheckpointError: if a file is missing, malformed, or not the one the run wrote.
            CalibrationError: if the run was distilled, so that its weights were not calibrated.
        """
        folder = Path(folder)
        manifest = Manifest.read(folder)
        if manifest.distillation:
            raise CalibrationError(
                f"{folder}: is a distilled run, whose input scales were not calibrated on its "
                "weights; leave out --from-calibration to calibrate on them"
            )
        path = folder / CALIBRATION_NAME
        inputs = read_input_amaxes(path)
        sha256 = hash_file(path)
        if manifest.files.get(CALIBRATION_NAME) != sha256:
            raise CheckpointError(
                f"{path}: its hash is not the one in manifest.json; it changed after it was "
                "written, calibrate again"
            )
        recipe, formats = read_recipe(folder)
        return cls(
            folder=folder,
            inputs=inputs,
            source=manifest.source,
            items=manifest.items,
            recipe=recipe,
            formats=formats,
            sha256=sha256,
        )

    def require_covers(self, recipe: Recipe, formats: Mapping[str, Format]) -> None:
        """Refuse a recipe that needs what was not calibrated.

        Raises:
            RecipeError: if the recipe finds its amax in another way.
            CalibrationError: if inputs of linears were not observed.
        """
        if recipe.algorithm != self.recipe.algorithm:
            raise RecipeError(
                f"{self.folder}: was calibrated with algorithm {self.recipe.algorithm}, the recipe "
                f"says {recipe.algorithm}; calibrate again"
            )
        if recipe.image_weight != self.recipe.image_weight:
            raise RecipeError(
                f"{self.folder}: was calibrated with {_say_weight(self.recipe)}, the recipe has "
                f"{_say_weight(recipe)}; calibrate again"
            )
        self._require_weighed(recipe, formats)
        missing = [
            fqn
            for fqn, linear_format in formats.items()
            if linear_format in CALIBRATED_FORMATS and fqn not in self.inputs
        ]
        if missing:
            named = ", ".join(missing[:_MAX_NAMED]) + (", ..." if missing[_MAX_NAMED:] else "")
            raise CalibrationError(
                f"{self.folder}: its calibration lacks the inputs of {len(missing)} linears that "
                f"the recipe quantizes ({named}); calibrate again, or keep them BF16 or "
                "nvfp4-w4a16"
            )

    def _require_weighed(self, recipe: Recipe, formats: Mapping[str, Format]) -> None:
        """Refuse another format where scales were chosen by the errors of one."""
        for fqn, linear_format in formats.items():
            before = self.formats.get(fqn, "bf16")
            if (
                recipe.image_weight is not None
                and linear_format in CALIBRATED_FORMATS
                and linear_format != before
            ):
                raise RecipeError(
                    f"{fqn}: its input scale in {self.folder} was chosen by errors of {before}, "
                    f"the recipe says {linear_format}; calibrate again, or leave out image_weight "
                    "in both"
                )


def _say_weight(recipe: Recipe) -> str:
    weight = recipe.image_weight
    return "no image_weight" if weight is None else f"image_weight {weight}"
