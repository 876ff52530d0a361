"""The files of a quantized checkpoint beside its weights.

``config.json`` is the source's, plus ``quantization_config``: architectures, model type and layer
pattern are what servers dispatch on, and stay untouched. Tokenizer, processor, chat template and
custom code are copied byte for byte. Calibration and recipe are written so that another run can
pack, compare or simulate from them without calibrating again.
"""

import shutil
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvvl.errors import OutputError
from nvvl.model.checkpoint import Checkpoint
from nvvl.model.checkpoint_writer import write_safetensors
from nvvl.model.config import VLMConfig
from nvvl.quantize.layout import CALIBRATION_NAME
from nvvl.quantize.manifest import write_json
from nvvl.quantize.recipe import Format, Recipe
from nvvl.quantize.server_config import hf_quant_config, quantization_config
from nvvl.quantize.staging import MANIFEST_NAME

if TYPE_CHECKING:
    from nvvl.quantize.pack import Amax

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
    amaxes: "Mapping[str, Amax]",
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
    from nvvl.quantize.pack import to_tensors

    copy_side_files(source.folder, folder)
    for name, values in json_files(source.config, recipe, formats).items():
        write_json(folder / name, values)
    write_safetensors(folder / CALIBRATION_NAME, to_tensors(amaxes))


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
