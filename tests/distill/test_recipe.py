"""Distillation recipes: strict reading, presets equal to their files, the rate's course."""

import dataclasses
from pathlib import Path

import pytest

import nvvl.distill
from nvvl.distill.presets import PRESETS, load_distill_recipe
from nvvl.distill.recipe import DistillRecipe
from nvvl.errors import RecipeError

RECIPES = Path(str(nvvl.distill.__path__[0])) / "recipes"


@pytest.mark.parametrize("name", PRESETS)
def test_preset_equals_its_file(name: str) -> None:
    assert DistillRecipe.from_toml(RECIPES / f"{name}.toml") == load_distill_recipe(name)


def test_every_file_is_a_preset() -> None:
    assert {path.stem for path in RECIPES.glob("*.toml")} == set(PRESETS)


def test_full_size_default_is_the_published_rate() -> None:
    recipe = load_distill_recipe("qad_nvfp4")
    assert (recipe.learning_rate, recipe.safe_learning_rate) == (2e-6, 1e-5)
    assert (recipe.loss, recipe.loss_tokens) == ("kl", "text")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lerning_rate": 1e-6}, "unknown key 'lerning_rate'; did you mean learning_rate"),
        ({"loss": "kll"}, "loss: required one of kl, mse, ce"),
        ({"num_steps": 0}, "num_steps: required an integer from 1 to 1000000000, got 0"),
        ({"num_steps": 10**20}, "num_steps: required an integer from 1 to 1000000000, got 1"),
        ({"num_steps": 10**7}, "num_steps: .* make 320000128 items; required at most 10000000"),
        ({"num_steps": True}, "num_steps: required an integer"),
        ({"num_validation_items": 0}, "num_validation_items: required an integer from 1 to"),
        ({"learning_rate": 0.0}, "learning_rate: required above 0 and at most 1, got 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate: required above 0 and at most 1, got nan"),
        ({"beta2": "high"}, "beta2: required a number"),
        ({"trainable": ["vision"]}, "trainable: required some of linears, norms"),
        ({"trainable": []}, "trainable: required some of"),
    ],
)
def test_bad_value_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        DistillRecipe.from_dict({"name": "x", "learning_rate": 1e-6} | values)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("loss_tokens", "answers"),
        ("scale_learning_rate", 0.01),
        ("beta2", 0.99),
        ("max_grad_norm", 2.0),
        ("validate_every", 10),
        ("ema_decay", 0.9),
    ],
)
def test_what_layers_alone_would_not_use_is_refused(key: str, value: object) -> None:
    values = {"name": "x", "learning_rate": 1e-3, "method": "layers"}
    assert DistillRecipe.from_dict(values).method == "layers"
    with pytest.raises(RecipeError, match=f'{key}: has no meaning with method "layers", got'):
        DistillRecipe.from_dict(values | {key: value})


def test_missing_key_and_unknown_preset_are_refused() -> None:
    with pytest.raises(RecipeError, match="missing learning_rate"):
        DistillRecipe.from_dict({"name": "x"})
    with pytest.raises(RecipeError, match="did you mean qad_nvfp4"):
        load_distill_recipe("qad_nvfp")


def test_rate_rises_linearly_then_falls_as_a_cosine_to_zero() -> None:
    recipe = DistillRecipe(name="x", learning_rate=1.0, num_steps=110, warmup_fraction=10 / 110)
    rates = [recipe.learning_rate_at(step) for step in range(111)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[60] == pytest.approx(0.5)
    assert rates[110] == pytest.approx(0)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_rate_without_warmup_starts_at_the_top() -> None:
    recipe = dataclasses.replace(load_distill_recipe("qad_nvfp4"), warmup_fraction=0.0)
    assert recipe.learning_rate_at(0) == recipe.learning_rate
