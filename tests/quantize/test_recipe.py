"""Recipes: strict parsing, presets and their TOML twins."""

import dataclasses
import json
from pathlib import Path

import pytest

import nvvl.quantize
from nvvl.errors import RecipeError
from nvvl.quantize.presets import PRESETS, load_recipe
from nvvl.quantize.recipe import Recipe, Rule

RECIPES = Path(str(nvvl.quantize.__file__)).parent / "recipes"
EXAMPLE = """
name = "example"
num_calibration_items = 8

[[rules]]
target = "*.mixer.[qkv]_proj"
format = "fp8"
layers = [2, -1]

[[rules]]
target = "*"
format = "nvfp4"
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_toml_maps_one_to_one_to_fields(tmp_path: Path) -> None:
    recipe = Recipe.from_toml(write(tmp_path, EXAMPLE))
    assert recipe == Recipe(
        name="example",
        rules=(
            Rule(target="*.mixer.[qkv]_proj", format="fp8", layers=(2, -1)),
            Rule(target="*", format="nvfp4"),
        ),
        num_calibration_items=8,
    )


def test_recipe_survives_toml_and_json(tmp_path: Path) -> None:
    recipe = Recipe.from_toml(write(tmp_path, EXAMPLE))
    assert Recipe.from_toml(write(tmp_path, recipe.to_toml())) == recipe
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_names_in_any_letters_survive_toml(tmp_path: Path) -> None:
    rules = (Rule(target="*.größe.𝄞", format="fp8"),)
    recipe = Recipe(name='😀 "quoted" \\ \t\n \x7f', rules=rules)
    assert Recipe.from_toml(write(tmp_path, recipe.to_toml())) == recipe


@pytest.mark.parametrize("name", PRESETS)
def test_preset_equals_its_toml_twin(name: str) -> None:
    assert PRESETS[name]() == Recipe.from_toml(RECIPES / f"{name}.toml")
    assert load_recipe(name) == PRESETS[name]()
    assert load_recipe(RECIPES / f"{name}.toml") == PRESETS[name]()


def test_every_toml_file_has_a_preset() -> None:
    assert {path.stem for path in RECIPES.iterdir()} == set(PRESETS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ('colour = "red"\n', r"unknown key 'colour'"),
        ("num_calibration_item = 8\n", r"did you mean num_calibration_items"),
        ("num_calibration_items = 0\n", r"required 1 to 1000000, got 0"),
        ("num_calibration_items = true\n", r"required int, got True"),
        ('num_calibration_items = "8"\n', r"required int, got '8'"),
        ('algorithm = "mx"\n', r"required one of max, got 'mx'; did you mean max"),
        ("rules = []\n", r"required at least one rule, got none"),
        ('rules = "all"\n', r"rules: required a list of tables"),
        ('[[rules]]\ntarget = "*"\n', r"rules: missing format"),
        ('[[rules]]\ntarget = "*"\nformat = "nvfp"\n', r"got 'nvfp'; did you mean nvfp4"),
        ('[[rules]]\ntarget = ""\nformat = "fp8"\n', r"required a pattern"),
        ('[[rules]]\ntarget = "*"\nformt = "fp8"\n', r"unknown key 'formt'; did you mean format"),
        ('[[rules]]\ntarget = "*"\nformat = "fp8"\nlayers = 3\n', r"required a list of integers"),
        ('[[rules]]\ntarget = "*"\nformat = "fp8"\nlayers = [1.5]\n', r"required int, got 1.5"),
        ("rules = [\n", r"not valid TOML"),
    ],
)
def test_faulty_toml_is_refused(tmp_path: Path, change: str, message: str) -> None:
    rules = "" if "rules" in change else '[[rules]]\ntarget = "*"\nformat = "fp8"\n'
    path = write(tmp_path, f'name = "x"\n{change}{rules}')
    with pytest.raises(RecipeError, match=message) as error:
        Recipe.from_toml(path)
    assert str(path) in str(error.value)


def test_missing_name_is_refused() -> None:
    with pytest.raises(RecipeError, match="recipe: missing name"):
        Recipe.from_dict({"rules": [{"target": "*", "format": "fp8"}]})


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nowhere\.toml: cannot be read"):
        load_recipe(tmp_path / "nowhere.toml")


def test_unknown_preset_lists_near_names() -> None:
    with pytest.raises(RecipeError, match="did you mean nvfp4"):
        load_recipe("nvpf4")


def test_recipe_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRESETS["fp8"]().name = "other"  # type: ignore[misc]
