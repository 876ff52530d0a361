"""Recipes by name. Each is a function, and has a twin in ``recipes/*.toml`` to copy and change.

``fp8`` and ``nvfp4`` have the scope of the released checkpoints (arXiv 2511.03929): every linear
of the language model. ``mixed`` keeps the few layers that hybrid models of this family are most
sensitive in (attention, the first two and the last two; arXiv 2601.20088, table of recipes) at
8 bits, ``nvfp4-selective`` in BF16, as Nemotron Nano 9B V2 is distilled. Vision tower, projector,
embeddings, head, convolutions and norms stay BF16 in all of them, because servers build those
without quantization.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from nvvl.quantize.recipe import Format, Recipe, Rule
from nvvl.toml_tables import load_preset

_ALL_LINEARS = "language_model.backbone.layers.*.mixer.*"
_ATTENTION = "language_model.backbone.layers.*.mixer.[qkvo]_proj"


def fp8() -> Recipe:
    """Return W8A8: E4M3 weights and inputs, one static scale a tensor."""
    return _uniform("fp8", "fp8")


def nvfp4() -> Recipe:
    """Return W4A4: E2M1 weights and inputs in blocks of 16, static tensor scales."""
    return _uniform("nvfp4", "nvfp4")


def nvfp4_w4a16() -> Recipe:
    """Return W4A16: NVFP4 weights, BF16 inputs; needs no calibration data."""
    return _uniform("nvfp4-w4a16", "nvfp4-w4a16")


def mixed() -> Recipe:
    """Return NVFP4 with FP8 in attention and in the first two and last two layers."""
    sensitive = (
        Rule(target=_ATTENTION, format="fp8"),
        Rule(target=_ALL_LINEARS, format="fp8", layers=(0, 1, -2, -1)),
    )
    recipe = nvfp4()
    return dataclasses.replace(recipe, name="mixed", rules=(*sensitive, *recipe.rules))


def nvfp4_selective() -> Recipe:
    """Return NVFP4 with BF16 in attention and in the first two and last two layers."""
    sensitive = (
        Rule(target=_ATTENTION, format="bf16"),
        Rule(target=_ALL_LINEARS, format="bf16", layers=(0, 1, -2, -1)),
    )
    recipe = nvfp4()
    return dataclasses.replace(recipe, name="nvfp4-selective", rules=(*sensitive, *recipe.rules))


PRESETS: Mapping[str, Callable[[], Recipe]] = {
    "fp8": fp8,
    "nvfp4": nvfp4,
    "nvfp4-w4a16": nvfp4_w4a16,
    "mixed": mixed,
    "nvfp4-selective": nvfp4_selective,
}


def load_recipe(spec: str | Path) -> Recipe:
    """Return a preset by name, or read a TOML file.

    Raises:
        RecipeError: if there is no such preset and no such file, or the file is not a recipe.
    """
    return load_preset(spec, PRESETS, Recipe.from_toml)


def _uniform(name: str, linear_format: Format) -> Recipe:
    return Recipe(name=name, rules=(Rule(target=_ALL_LINEARS, format=linear_format),))
