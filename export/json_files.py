"""JSON files of a checkpoint, read so that the rules can rely on the types of what they find.

A missing key is a rule's matter and is reported by the rule. A key of another type (a list where
an object belongs) could mean anything; the file is refused with the key named.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nvvl.errors import CheckpointError

# Type by path; "*" stands for every entry. A key that is null counts as missing, an entry does not.
_CONFIG_TYPES: Mapping[str, type] = {
    "llm_config": dict,
    "text_config": dict,
    "vision_config": dict,
    "vision_config.args": dict,
    "auto_map": dict,
    "quantization_config": dict,
    "quantization_config.ignore": list,
    "quantization_config.ignore.*": str,
    "quantization_config.quantized_layers": dict,
    "quantization_config.quantized_layers.*": dict,
    "quantization_config.config_groups": dict,
    "quantization_config.config_groups.*": dict,
    "quantization_config.config_groups.*.weights": dict,
    "quantization_config.config_groups.*.weights.group_size": int,
    "quantization_config.config_groups.*.input_activations": dict,
    "quantization_config.config_groups.*.targets": list,
    "quantization_config.config_groups.*.targets.*": str,
}
_HF_TYPES: Mapping[str, type] = {
    "producer": dict,
    "quantization": dict,
    "quantization.exclude_modules": list,
    "quantization.exclude_modules.*": str,
    "quantization.quantized_layers": dict,
    "quantization.quantized_layers.*": dict,
}
_INDEX_TYPES: Mapping[str, type] = {"metadata": dict, "weight_map": dict, "weight_map.*": str}
_TYPES = {
    "config.json": _CONFIG_TYPES,
    "hf_quant_config.json": _HF_TYPES,
    "model.safetensors.index.json": _INDEX_TYPES,
}
_TYPE_NAMES = {dict: "an object", list: "a list", str: "a string", int: "an integer"}


def read_json(path: Path) -> dict[str, Any] | None:
    """Read one of a checkpoint's JSON files; None if there is no such file.

    Raises:
        CheckpointError: if it cannot be read, is not JSON, or a key has another type than servers
            expect.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: required an object, got {type(values).__name__}")
    for where, required in _TYPES[path.name].items():
        for name, value in _find(values, where.split(".")):
            is_missing = value is None and not where.endswith("*")
            if not is_missing and not isinstance(value, required):
                raise CheckpointError(
                    f"{path}: {name}: required {_TYPE_NAMES[required]}, got {value!r:.60}"
                )
    return values


def _find(value: Any, keys: list[str], found: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value that a path leads to, with its full name."""
    if not keys:
        yield found.removeprefix("."), value
        return
    entries: Any = dict(enumerate(value)) if isinstance(value, list) else value
    if not isinstance(entries, dict):
        return
    for key in entries if keys[0] == "*" else [keys[0]]:
        if key in entries:
            yield from _find(entries[key], keys[1:], f"{found}.{key}")
