"""Statistics of inputs as a table: a row a linear, image and text side by side."""

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from nvvl.quantize.modalities import MODALITIES
from nvvl.quantize.recipe import CALIBRATED_FORMATS, Format, Recipe
from nvvl.quantize.statistics import InputStatistics
from nvvl.quantize.targets import LAYERS

if TYPE_CHECKING:
    from rich.table import Table

_BACKBONE = f"{LAYERS.rpartition('.')[0]}."


def statistics_dict(
    found: Sequence[InputStatistics], *, recipe: Recipe, calibration: str, num_items: int
) -> dict[str, Any]:
    """Return JSON-ready values.

    Args:
        found: Of each linear.
        recipe: The recipe in force.
        calibration: What the items were taken from.
        num_items: How many they were.
    """
    return {
        "recipe": recipe.to_dict(),
        "calibration": {"set": calibration, "num_items": num_items},
        "linears": [statistics.to_dict() for statistics in found],
    }


def statistics_table(found: Sequence[InputStatistics], *, image_weight: float | None) -> "Table":
    """Lay out amax and errors; with a weight also the part of the amax that scales reach.

    Args:
        found: Of each linear.
        image_weight: As the recipe has it.
    """
    from rich.table import Table

    tokens = ", ".join(f"{found[0].parts[m].num_tokens:,} {m} tokens" for m in MODALITIES)
    table = Table("linear", title=f"inputs: {tokens}", title_justify="left")
    heads = [f"amax {modality}" for modality in MODALITIES]
    for to in CALIBRATED_FORMATS:
        heads += [f"{to} error % {modality}" for modality in MODALITIES]
        if image_weight is not None:
            heads.append(f"{to} scale / amax")
    for head in heads:
        table.add_column(head, justify="right")
    for statistics in found:
        if statistics.name.endswith((".k_proj", ".v_proj")):
            continue  # their input is that of q_proj
        cells = [f"{statistics.parts[modality].amax:.4g}" for modality in MODALITIES]
        for to in CALIBRATED_FORMATS:
            cells += [_percent(_error(statistics, to, index)) for index in range(len(MODALITIES))]
            if image_weight is not None:
                cells.append(_ratio(statistics, to))
        name = statistics.name.removeprefix(_BACKBONE).replace(".q_proj", ".[qkv]_proj")
        table.add_row(name, *cells)
    table.add_section()
    means = ["", ""]
    for to in CALIBRATED_FORMATS:
        means += [_percent(_mean_error(found, to, index)) for index in range(len(MODALITIES))]
        if image_weight is not None:
            means.append("")
    table.add_row("mean", *means)
    return table


def _error(statistics: InputStatistics, to: Format, index: int) -> float | None:
    return statistics.parts[MODALITIES[index]].errors.get(to)


def _mean_error(found: Sequence[InputStatistics], to: Format, index: int) -> float | None:
    errors = [error for s in found if (error := _error(s, to, index)) is not None]
    return fmean(errors) if errors else None


def _percent(error: float | None) -> str:
    return "-" if error is None else f"{100 * error:.4f}"


def _ratio(statistics: InputStatistics, to: Format) -> str:
    amax = max(part.amax for part in statistics.parts.values())
    reached = statistics.scale_amax.get(to)
    return "-" if reached is None or not amax else f"{reached / amax:.3f}"
