"""The small files of a quantized checkpoint: recipe.json comes back as it was written."""

import json
from pathlib import Path

import pytest

from nvvl.errors import CheckpointError
from nvvl.model.config import VLMConfig
from nvvl.quantize.presets import mixed
from nvvl.quantize.side_files import RECIPE_NAME, json_files, read_recipe
from nvvl.quantize.targets import assign_formats, list_linears

RECIPE = {"name": "x", "rules": [{"target": "*", "format": "fp8"}]}


def test_recipe_comes_back_as_it_was_written(tiny_config: VLMConfig, tmp_path: Path) -> None:
    recipe = mixed()
    formats = assign_formats(recipe, list_linears(tiny_config))
    values = json_files(tiny_config, recipe, formats)[RECIPE_NAME]
    (tmp_path / RECIPE_NAME).write_text(json.dumps(values))
    assert read_recipe(tmp_path) == (recipe, formats)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read .*; required a folder that nvvl wrote"),
        ("{", "not a recipe that nvvl wrote"),
        ("[]", "not a recipe that nvvl wrote"),
        (json.dumps({"recipe": RECIPE}), "not a recipe that nvvl wrote .*formats"),
        (json.dumps({"recipe": RECIPE, "formats": 3}), "not a recipe that nvvl wrote"),
        (json.dumps({"recipe": {}, "formats": {}}), "not a recipe that nvvl wrote .*missing name"),
        (
            json.dumps({"recipe": RECIPE, "formats": {"a": "int4"}}),
            r"not a recipe that nvvl wrote \(format 'int4'\)",
        ),
    ],
)
def test_missing_or_malformed_recipe_is_one_clear_error(
    tmp_path: Path, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / RECIPE_NAME).write_text(text)
    with pytest.raises(CheckpointError, match=rf"recipe\.json: {message}"):
        read_recipe(tmp_path)
