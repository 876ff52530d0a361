"""Recipes of distillation by name, each with a twin in ``recipes/*.toml`` to copy and change.

``qad_nvfp4`` has the published settings for this family (arXiv 2601.20088): forward KL at
temperature 1, learning rate 2e-6. Its table of rates is why 1e-5 is where warnings begin: at 2e-5
the vision-language benchmarks fall further below BF16 than they do without distillation, at 1e-4
by 14 to 32 points. ``qad_nvfp4_embedded`` is for the embedded model, whose weights are a thousand
times fewer and bear a higher rate, on answers alone because it was trained on nothing else. Few of
its tokens are answers, so most of its loss is the error of what the layers put out, which every
token has: in as many steps that brings KL down three times as far as KL itself does.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from nvvl.distill.recipe import DistillRecipe
from nvvl.toml_tables import load_preset


def qad_nvfp4() -> DistillRecipe:
    """Return the published settings for a full-size model."""
    return DistillRecipe(name="qad_nvfp4", learning_rate=2e-6, recompute=True)


def qad_nvfp4_embedded() -> DistillRecipe:
    """Return settings for half an hour of two CPU cores (figures: benchmarks/RESULTS.md)."""
    return dataclasses.replace(
        qad_nvfp4(),
        name="qad_nvfp4_embedded",
        recompute=False,
        learning_rate=2e-4,
        safe_learning_rate=1e-3,
        loss="mse",
        layer_loss=1000.0,  # about four fifths of the loss
        ema_decay=0.99,
        loss_tokens="answers",
        num_steps=1800,
        items_per_step=8,
        tokens_per_batch=4096,
        num_validation_items=64,
        validate_every=450,
    )


def qad_nvfp4_selective() -> DistillRecipe:
    """Return settings for a run with attention and the first and last layers in BF16.

    Those of Nemotron Nano 9B V2, whose rate is half that of the vision-language model. What stays
    BF16 is a matter of the run: quantize with ``quantize/recipes/nvfp4-selective.toml``.
    """
    return dataclasses.replace(qad_nvfp4(), name="qad_nvfp4_selective", learning_rate=1e-6)


def qad_nvfp4_layers() -> DistillRecipe:
    """Return settings that train a layer at a time, in the memory of four layers."""
    return DistillRecipe(
        name="qad_nvfp4_layers",
        method="layers",
        learning_rate=1e-3,
        safe_learning_rate=3e-3,
        num_steps=200,
        items_per_step=128,
        tokens_per_batch=4096,
        num_validation_items=16,
    )


PRESETS: Mapping[str, Callable[[], DistillRecipe]] = {
    "qad_nvfp4": qad_nvfp4,
    "qad_nvfp4_embedded": qad_nvfp4_embedded,
    "qad_nvfp4_selective": qad_nvfp4_selective,
    "qad_nvfp4_layers": qad_nvfp4_layers,
}


def load_distill_recipe(spec: str | Path) -> DistillRecipe:
    """Return a preset by name, or read a TOML file.

    Raises:
        RecipeError: if there is no such preset and no such file, or the file is not a recipe.
    """
    return load_preset(spec, PRESETS, DistillRecipe.from_toml)
