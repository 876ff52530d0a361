"""What servers read to know which layer has which format: the two quantization configs.

``hf_quant_config.json`` is ModelOpt's own file; ``quantization_config`` in config.json says the
same in the style of compressed-tensors. vLLM prefers the latter, TensorRT-LLM and Edge-LLM the
former, so both are made from one source here.

Exclude patterns are matched differently by each server, and a pattern that matches too much, or
nothing, goes unnoticed until answers are wrong:

* vLLM compares exactly, then as a substring, then with fnmatch, after replacing the *prefix*
  ``language_model.backbone`` by ``language_model.model`` in names; a pattern that starts with a
  wildcard is not renamed. It fuses q, k and v, and then needs their exact names.
* TensorRT-LLM uses fnmatch alone, on names without ``language_model.`` and with ``model`` for
  ``backbone``.

So each BF16 module inside the layers is listed twice: by its full name, and as
``*.layers.3.mixer.conv1d``, where the dots keep layer 1 from matching layers 10 to 19.
Sources: vLLM 0.33 ``quantization/modelopt.py``; TensorRT-LLM ``modeling_nemotron_nano.py``.
"""

from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any

from nvvl.model.config import VLMConfig
from nvvl.quantize.formats import BLOCK_SIZE
from nvvl.quantize.layout import StoredFormat
from nvvl.quantize.recipe import Format
from nvvl.quantize.targets import LAYERS, quantized_only

ALGORITHM_OF: Mapping[Format, str] = {
    "fp8": "FP8",
    "nvfp4": "NVFP4",
    "nvfp4-w4a16": "W4A16_NVFP4",
}
MIXED = "MIXED_PRECISION"

# With what other tools write and nvvl only reads.
STORED_ALGORITHM_OF: Mapping[StoredFormat, str] = {
    "fp8": ALGORITHM_OF["fp8"],
    "fp8-per-channel": "FP8_PER_CHANNEL_PER_TOKEN",
    "nvfp4": ALGORITHM_OF["nvfp4"],
    "nvfp4-w4a16": ALGORITHM_OF["nvfp4-w4a16"],
}


def hf_quant_config(config: VLMConfig, formats: Mapping[str, Format]) -> dict[str, Any]:
    """Build the content of ``hf_quant_config.json``.

    Args:
        config: The model.
        formats: Format of each quantizable linear, at least one of them not ``bf16``.
    """
    quantized = quantized_only(formats)
    used = sorted({ALGORITHM_OF[fmt] for fmt in quantized.values()})
    algorithm = used[0] if len(used) == 1 else MIXED
    quantization: dict[str, Any] = {"quant_algo": algorithm, "kv_cache_quant_algo": None}
    if any(name != "FP8" for name in used):
        quantization["group_size"] = BLOCK_SIZE
    quantization["exclude_modules"] = exclude_patterns(config, formats)
    if algorithm == MIXED:
        quantization["quantized_layers"] = {
            fqn: _layer_entry(fmt) for fqn, fmt in sorted(quantized.items())
        }
    # servers accept no other producer name for this layout
    producer = {"name": "modelopt", "version": version("nvidia-modelopt")}
    return {"producer": producer, "quantization": quantization}


def quantization_config(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Say what ``hf_quant_config.json`` says in the form config.json holds it."""
    quantization = hf_config["quantization"]
    algorithm = quantization["quant_algo"]
    result: dict[str, Any] = {
        "quant_method": "modelopt",
        "quant_algo": algorithm,
        "kv_cache_scheme": None,
        "ignore": list(quantization["exclude_modules"]),
        "producer": dict(hf_config["producer"]),
    }
    layers: Mapping[str, Mapping[str, Any]] = quantization.get("quantized_layers", {})
    if not layers:
        result["config_groups"] = {"group_0": _group(algorithm, ["Linear"])}
        return result
    names = sorted({entry["quant_algo"] for entry in layers.values()})
    result["config_groups"] = {
        f"group_{index}": _group(
            name, sorted(fqn for fqn, entry in layers.items() if entry["quant_algo"] == name)
        )
        for index, name in enumerate(names)
    }
    result["quantized_layers"] = {fqn: dict(entry) for fqn, entry in layers.items()}
    return result


def exclude_patterns(config: VLMConfig, formats: Mapping[str, Format]) -> list[str]:
    """List the patterns of everything that stays BF16, sorted, safe in each server's matching."""
    convolutions = [
        f"{LAYERS}.{index}.mixer.conv1d"
        for index, kind in enumerate(config.language.layers)
        if kind == "mamba"
    ]
    unquantized = [fqn for fqn, fmt in formats.items() if fmt == "bf16"]
    patterns = ["*lm_head", "mlp1*", "vision_model*", *_both_forms(convolutions)]
    return sorted([*patterns, *_both_forms(unquantized)])


def _both_forms(fqns: Iterable[str]) -> list[str]:
    patterns = []
    for fqn in fqns:
        patterns += [fqn, f"*.layers.{fqn.removeprefix(f'{LAYERS}.')}"]
    return patterns


def _layer_entry(linear_format: Format) -> dict[str, Any]:
    entry: dict[str, Any] = {"quant_algo": ALGORITHM_OF[linear_format]}
    if linear_format != "fp8":
        entry["group_size"] = BLOCK_SIZE
    return entry


def _group(algorithm: str, targets: list[str]) -> dict[str, Any]:
    numbers: dict[str, Any] = {"dynamic": False, "num_bits": 8, "type": "float"}
    if algorithm != "FP8":
        numbers |= {"num_bits": 4, "group_size": BLOCK_SIZE}
    # vLLM takes NVFP4 for weight-only wherever input_activations is null
    inputs = None if algorithm == "W4A16_NVFP4" else dict(numbers)
    return {"input_activations": inputs, "weights": numbers, "targets": targets}
