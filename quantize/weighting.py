"""Calibration of one layer as the recipe says: plain amax, or a scale that weighs modalities.

Amax of weights always come from ModelOpt. With ``image_weight`` in the recipe the amax of inputs is
the magnitude that the chosen scale maps to the format's largest value (`nvvl.quantize.modalities`);
it depends on the format then, and larger inputs are clipped.
"""

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from nvvl.quantize.activations import Activations
from nvvl.quantize.amaxes import Amax
from nvvl.quantize.calibrate import calibrate_block
from nvvl.quantize.modalities import CANDIDATES, LayerInputs
from nvvl.quantize.recipe import CALIBRATED_FORMATS, Format, Recipe


def calibrate_layer(
    layer: nn.Module,
    prefix: str,
    formats: Mapping[str, Format],
    recipe: Recipe,
    activations: Activations,
) -> dict[str, Amax]:
    """Run a layer over the items and find the amax of its quantized linears.

    Args:
        layer: On its device; its linears are replaced by ModelOpt's.
        prefix: Name of the layer in the model.
        formats: Format by full name of the quantized linears of this layer.
        recipe: The recipe in force.
        activations: The items; they have passed the layer when this returns.

    Returns:
        By full name.

    Raises:
        CalibrationError: naming an item that gives NaN or Inf.
        DataError: if the recipe weighs a modality that no item has.
    """
    measured: dict[str, tuple[Format]] = {
        fqn: (to,) for fqn, to in formats.items() if to in CALIBRATED_FORMATS
    }
    weight = recipe.image_weight
    inputs = LayerInputs(prefix, measured, CANDIDATES) if weight is not None and measured else None
    if inputs is not None:
        inputs.survey(layer, activations)

    def run(module: nn.Module) -> None:
        if inputs is None:
            activations.run_layer(module, prefix)
            return
        with inputs.rounding(module) as announce:
            activations.run_layer(module, prefix, announce)

    amaxes = calibrate_block(layer, prefix, formats, algorithm=recipe.algorithm, forward_loop=run)
    if inputs is not None:
        for fqn, (to,) in measured.items():
            amaxes[fqn] = replace(amaxes[fqn], input=inputs.scale_amax(fqn, to, weight))
    return amaxes
