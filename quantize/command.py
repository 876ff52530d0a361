"""The verbs ``nvvl quantize``, also ``nvvl-quantize``, and ``nvvl calib stats``."""

import shlex
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nvvl.errors import DataError, RecipeError
from nvvl.options import (
    SET_HELP,
    CalibArgument,
    DeviceOption,
    JsonOption,
    MemoryOption,
    ModelArgument,
    Preset,
    RecipeOption,
    ResumableOverwriteOption,
    SeedOption,
    choose_device,
)
from nvvl.quantize.recipe import MOST_ITEMS

if TYPE_CHECKING:
    from nvvl.quantize.recipe import Recipe

SamplesOption = Annotated[
    int | None,
    typer.Option(min=1, max=MOST_ITEMS, help="Calibration items; else as many as the recipe says."),
]


def quantize(
    preset: Annotated[
        Preset, typer.Argument(metavar="FORMAT", help="fp8, nvfp4, nvfp4-w4a16 or mixed.")
    ],
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    *,
    calib: Annotated[
        str | None, typer.Option(metavar="SET", help=SET_HELP, show_default="default")
    ] = None,
    samples: SamplesOption = None,
    recipe: RecipeOption = None,
    from_calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="OUT",
            help="Output of a finished run over MODEL: pack from its scales, calibrate nothing.",
        ),
    ] = None,
    device: DeviceOption = "auto",
    memory: MemoryOption = None,
    seed: SeedOption = 0,
    overwrite: ResumableOverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a quantized checkpoint in the layout that servers load.

    A run that was killed or interrupted goes on where it stopped, when the same command is given
    again. Started by torchrun, several processes share the calibration items.
    """
    from nvvl.calib_data.manifest import load_calibration_set
    from nvvl.console import defer_interrupt, print_json, show_progress
    from nvvl.model.load import resolve_model
    from nvvl.model.processes import Processes
    from nvvl.quantize.limits import choose_limits, default_limits, parse_memory
    from nvvl.quantize.plan import make_plan
    from nvvl.quantize.walk import quantize_checkpoint

    processes = Processes(choose_device(device))
    with processes.agreed():
        chosen = choose_recipe(preset, recipe, samples)
        needs_items = chosen.is_calibrated and from_calibration is None
        if not needs_items:
            what = "--from-calibration" if chosen.is_calibrated else f"recipe {chosen.name}"
            refuse_unused(what, {"--calib": calib, "--samples": samples, "--seed": seed or None})
        source = resolve_model(model)
        limits = default_limits()
        if memory is not None:
            planned = make_plan(source, chosen, calibrate=from_calibration is None)
            limits = choose_limits(planned.estimate, parse_memory(memory))
        items = None
        if needs_items:
            num_items = chosen.num_calibration_items
            items = load_calibration_set(calib, num_items=num_items, seed=seed)
    shown = show_progress() if processes.is_main else nullcontext(None)
    with shown as progress, defer_interrupt(quiet=not processes.is_main) as stop:
        manifest = quantize_checkpoint(
            source,
            out,
            chosen,
            items,
            device=processes.device,
            overwrite=overwrite,
            progress=progress,
            stop=stop,
            command=["nvvl", *sys.argv[1:]],
            from_calibration=from_calibration,
            limits=limits,
            processes=processes,
        )
    if not processes.is_main:
        return
    if as_json:
        print_json({"out": str(out), **manifest.to_dict()})
    else:
        print(f"{out}: {manifest.format}, {len(manifest.tensors)} tensors")
        print("prove it:", shlex.join(["nvvl", "verify", str(out), "--against", model]))


def show_statistics(
    model: ModelArgument,
    calib: CalibArgument = "default",
    *,
    samples: SamplesOption = None,
    recipe: RecipeOption = None,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Show what images and text make of the inputs of each linear: amax, rounding errors.

    The error is sum (x - rounded x)**2 / sum x**2 of the tokens of one modality, under the scale
    that the recipe finds (nvfp4 unless --recipe says otherwise), once rounded to FP8 and once to
    NVFP4. A recipe with image_weight shows the scales it chooses. Nothing is written.
    """
    from nvvl.calib_data.manifest import load_calibration_set
    from nvvl.console import print_json, print_table, show_progress
    from nvvl.model.resolve import resolve_model
    from nvvl.quantize.presets import nvfp4
    from nvvl.quantize.recipe import Recipe
    from nvvl.quantize.statistics import collect_input_statistics
    from nvvl.quantize.statistics_text import statistics_dict, statistics_table

    chosen = nvfp4() if recipe is None else Recipe.from_toml(recipe)
    num_items = chosen.num_calibration_items if samples is None else samples
    source = resolve_model(model)
    items = load_calibration_set(calib, num_items=num_items, seed=seed).items
    with show_progress() as progress:
        found = collect_input_statistics(
            source, chosen, items, device=choose_device(device), progress=progress
        )
    if as_json:
        values = statistics_dict(found, recipe=chosen, calibration=calib, num_items=len(items))
        print_json({"model": model, **values})
    else:
        print_table(statistics_table(found, image_weight=chosen.image_weight))


def refuse_unused(what: str, options: Mapping[str, object]) -> None:
    """Refuse options about calibration items, where none are run.

    Args:
        what: Runs none.
        options: By name; None if one is not given.

    Raises:
        DataError: naming those that are given.
    """
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise DataError(f"{what} runs no calibration items: leave out {' and '.join(given)}")


def choose_recipe(preset: Preset, file: Path | None, num_items: int | None) -> "Recipe":
    """Return the recipe of a format, or the one in a file if it quantizes to that format."""
    from nvvl.quantize.presets import load_recipe
    from nvvl.quantize.recipe import Recipe

    recipe = load_recipe(preset)
    if file is not None:
        recipe = Recipe.from_toml(file)
        formats = {rule.format for rule in recipe.rules} - {"bf16"}
        if preset != "mixed" and formats != {preset}:
            raise RecipeError(
                f"{file}: required a recipe of {preset} alone, got {', '.join(sorted(formats))}; "
                "give the format mixed"
            )
    return recipe if num_items is None else replace(recipe, num_calibration_items=num_items)
