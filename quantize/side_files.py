"""The files of a quantized checkpoint beside its weights.

``config.json`` is the source's, plus ``quantization_config``: architectures, model type and layer
pattern are what servers dispatch on, and stay untouched. Tokenizer, processor, chat template and
custom code are copied byte for byte. Calibration and recipe are written so that another run can
pack, compare or simulate from them without calibrating again.
"""

import json
import shutil
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from nvvl.errors import CheckpointError, OutputError, RecipeError, describe_misfit
from nvvl.model.checkpoint import Checkpoint
from nvvl.model.config import VLMConfig
from nvvl.quantize.amaxes import CALIBRATION_NAME, Amax, write_amaxes
from nvvl.quantize.manifest import write_json
from nvvl.quantize.recipe import FORMATS, Format, Recipe
from nvvl.quantize.server_config import hf_quant_config, quantization_config
from nvvl.staging import MANIFEST_NAME

RECIPE_NAME = "recipe.json"
HF_QUANT_CONFIG_NAME = "hf_quant_config.json"
ROTATION_NAME = "rotation.json"  # what nvvl rotate did to the source; copied as any small file

# Not copied from a source folder: weights of any kind, archives, hidden files, the card of another
# model, and what is written anew.
_NOT_COPIED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.bin",
    "*.bin.index.json",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.h5",
    "*.msgpack",
    "*.gguf",
    "*.onnx",
    "*.onnx_data",
    "*.tar",
    "*.tar.*",
    "*.tgz",
    "*.zip",
    ".*",
    "README.md",
    "config.json",
    HF_QUANT_CONFIG_NAME,
    RECIPE_NAME,
    MANIFEST_NAME,
)


def write_side_files(
    folder: Path,
    source: Checkpoint,
    recipe: Recipe,
    formats: Mapping[str, Format],
    amaxes: Mapping[str, Amax],
) -> None:
    """Write everything but weights and manifest.

    Args:
        folder: Where the weights were written.
        source: The BF16 checkpoint.
        recipe: The recipe in force.
        formats: Format of each quantizable linear.
        amaxes: Of each quantized linear.

    Raises:
        OutputError: if a file cannot be written or copied.
    """
    copy_side_files(source.folder, folder)
    for name, values in json_files(source.config, recipe, formats).items():
        write_json(folder / name, values)
    write_amaxes(folder / CALIBRATION_NAME, amaxes)


def copied_files(folder: Path) -> list[Path]:
    """List the files of a source folder that an output gets byte for byte, sorted."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and not any(fnmatchcase(path.name, p) for p in _NOT_COPIED)
    ]


def json_files(
    config: VLMConfig, recipe: Recipe, formats: Mapping[str, Format]
) -> dict[str, dict[str, Any]]:
    """Build the JSON files of a quantized checkpoint but for the manifest, by file name.

    Args:
        config: The source's.
        recipe: The recipe in force.
        formats: Format of each quantizable linear.
    """
    hf_config = hf_quant_config(config, formats)
    return {
        "config.json": dict(config.raw) | {"quantization_config": quantization_config(hf_config)},
        HF_QUANT_CONFIG_NAME: hf_config,
        RECIPE_NAME: {"recipe": recipe.to_dict(), "formats": dict(formats)},
    }


def read_recipe(folder: Path) -> tuple[Recipe, dict[str, Format]]:
    """Read ``recipe.json`` of a written checkpoint.

    Returns:
        The recipe in force, and the format that it gave to each quantizable linear.

    Raises:
        CheckpointError: if the file is missing, or is not what `json_files` says.
    """
    path = folder / RECIPE_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        recipe, formats = Recipe.from_dict(values["recipe"]), dict(values["formats"])
        unknown = sorted(set(formats.values()) - set(FORMATS))
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); required a folder that nvvl wrote"
        ) from None
    except (ValueError, RecursionError, KeyError, TypeError, RecipeError) as error:
        raise CheckpointError(
            f"{path}: not a recipe that nvvl wrote ({describe_misfit(error)})"
        ) from None
    if unknown:
        raise CheckpointError(f"{path}: not a recipe that nvvl wrote (format {unknown[0]!r})")
    return recipe, formats


def copy_side_files(source: Path, folder: Path) -> None:
    """Copy tokenizer, processor and other small files; not weights, nor what is written anew.

    Raises:
        OutputError: if a file cannot be copied.
    """
    for path in copied_files(source):
        _copy(path, folder / path.name)


def _copy(path: Path, destination: Path) -> None:
    try:
        shutil.copyfile(path, destination)
    except OSError as error:
        raise OutputError(
            f"{destination}: cannot be copied from {path} ({error.strerror})"
        ) from error
