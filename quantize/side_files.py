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

from nvvl.errors import OutputError
from nvvl.model.checkpoint import Checkpoint
from nvvl.model.checkpoint_writer import write_safetensors
from nvvl.quantize.manifest import write_json
from nvvl.quantize.pack import CALIBRATION_NAME, Amax, to_tensors
from nvvl.quantize.recipe import Format, Recipe
from nvvl.quantize.server_config import hf_quant_config, quantization_config
from nvvl.quantize.staging import MANIFEST_NAME

RECIPE_NAME = "recipe.json"
HF_QUANT_CONFIG_NAME = "hf_quant_config.json"

# Not copied from a source folder: weights of any kind, hidden files, and what is written anew.
_NOT_COPIED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.bin",
    "*.bin.index.json",
    "*.pt",
    "*.pth",
    "*.gguf",
    "*.onnx",
    ".*",
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
    hf_config = hf_quant_config(source.config, formats)
    config = dict(source.config.raw) | {"quantization_config": quantization_config(hf_config)}
    for path in sorted(source.folder.iterdir()):
        if path.is_file() and not any(fnmatchcase(path.name, p) for p in _NOT_COPIED):
            _copy(path, folder / path.name)
    write_json(folder / "config.json", config)
    write_json(folder / HF_QUANT_CONFIG_NAME, hf_config)
    write_json(folder / RECIPE_NAME, {"recipe": recipe.to_dict(), "formats": dict(formats)})
    write_safetensors(folder / CALIBRATION_NAME, to_tensors(amaxes))


def _copy(path: Path, destination: Path) -> None:
    try:
        shutil.copyfile(path, destination)
    except OSError as error:
        raise OutputError(
            f"{destination}: cannot be copied from {path} ({error.strerror})"
        ) from error
