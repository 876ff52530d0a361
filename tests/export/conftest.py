"""Checkpoints that exist as headers only, and small written ones, for the proofs to judge.

The written ones come from an independent writer: ModelOpt's packer and the official safetensors
library, so that a proof is not only ever shown what nvvl's own writer makes.
"""

import copy
import functools
import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nvvl.export.view import CheckpointView, TensorHeader
from nvvl.model.config import VLMConfig
from nvvl.model.load import expected_tensors
from nvvl.quantize.layout import linear_tensors
from nvvl.quantize.recipe import Format
from nvvl.quantize.server_config import hf_quant_config, quantization_config
from nvvl.quantize.targets import list_linears

# Keys a released config.json has besides those that nvvl itself reads.
RELEASED_KEYS: dict[str, Any] = {
    "template": "nemotron-h-5p5-reasoning",
    "vision": {"preferred_resolution": [32, 32]},
}
# Long enough that a pattern for layer 1 can also reach layers 10 to 19.
TWENTY_LAYERS = "M-M*M-M-M-M*M-M-M-M-"

ViewFactory = Callable[..., CheckpointView]
FormatOf = Callable[[str], Format]


@pytest.fixture(scope="session")
def make_view(make_config: Callable[..., dict[str, Any]]) -> ViewFactory:
    """Return a function that builds the view of a 20-layer checkpoint, without any bytes.

    Args of the function:
        format_of: Format of each linear by name; one format for all if a string.
        scalars: Values of scale tensors by name; 0.5 unless given.
    """

    shapes_of = functools.cache(lambda: _source_headers(VLMConfig.from_dict(_values(make_config))))

    def build(
        format_of: Format | FormatOf = "nvfp4", *, scalars: Mapping[str, float] | None = None
    ) -> CheckpointView:
        values = _values(make_config)
        config = VLMConfig.from_dict(values)
        shapes = list_linears(config)
        choose = format_of if callable(format_of) else lambda _: format_of
        formats: dict[str, Format] = {fqn: choose(fqn) for fqn in shapes}
        source = shapes_of()
        written = dict(source)
        for fqn, shape in shapes.items():
            if formats[fqn] != "bf16":
                for spec in linear_tensors(fqn, shape, formats[fqn]):
                    written[spec.name] = TensorHeader(spec.dtype, spec.shape, "a")
        config_json = dict(values)
        hf_config = None
        if set(formats.values()) != {"bf16"}:
            hf_config = hf_quant_config(config, formats)
            config_json["quantization_config"] = quantization_config(hf_config)
        given = dict(scalars or {})
        return CheckpointView(
            config=config_json,
            hf_quant_config=hf_config,
            tensors=written,
            scalar_reader=lambda name: given.get(name, 0.5),
            shards={"a": frozenset(written)},
            source=CheckpointView(config=values, hf_quant_config=None, tensors=source),
        )

    return build


def _values(make_config: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    language = {"hybrid_override_pattern": TWENTY_LAYERS}
    return make_config(language=language, **copy.deepcopy(RELEASED_KEYS))


def _source_headers(config: VLMConfig) -> dict[str, TensorHeader]:
    return {
        name: TensorHeader("F32" if name.endswith("A_log") else "BF16", shape, "a")
        for name, shape in expected_tensors(config).items()
    }


@pytest.fixture(scope="session")
def source(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BF16 checkpoint with every key and file of a released one; tests do not change it."""
    return make_checkpoint(tmp_path_factory.mktemp("source") / "bf16", **RELEASED_KEYS)


@pytest.fixture(scope="session")
def written(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that gives a quantized copy of ``source``; tests do not change it."""
    return functools.cache(
        lambda scheme: write_quantized(source, tmp_path_factory.mktemp(scheme) / "out", scheme)
    )


@pytest.fixture
def copy_of(written: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that gives a quantized copy which a test may break."""
    return lambda scheme: Path(shutil.copytree(written(scheme), tmp_path / scheme))


def scheme_format(scheme: str, fqn: str) -> Format:
    """Return the format of a linear: one for all, or in "mixed" by layer."""
    if scheme != "mixed":
        return scheme  # type: ignore[return-value]
    formats: tuple[Format, ...] = ("fp8", "bf16", "nvfp4", "fp8", "nvfp4", "nvfp4-w4a16", "nvfp4")
    return formats[int(fqn.split(".")[3])]


def write_quantized(source: Path, folder: Path, scheme: str) -> Path:
    """Quantize a folder with ModelOpt's packer and input amax values taken out of the air."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.index.json"))
    config = VLMConfig.from_folder(source)
    tensors = load_file(source / "model.safetensors")
    manifest: dict[str, Any] = {"source": {"tensors": hash_all(tensors)}}
    formats = {fqn: scheme_format(scheme, fqn) for fqn in list_linears(config)}
    amaxes = {
        fqn: share_amax(fqn, tensors)
        for fqn, linear_format in formats.items()
        if linear_format != "bf16"
    }
    calibration = {f"{fqn}.weight_amax": amax for fqn, amax in amaxes.items()}
    for fqn, amax in amaxes.items():
        input_amax = torch.tensor(3.0 + int(fqn.split(".")[3]))
        if formats[fqn] != "nvfp4-w4a16":
            calibration[f"{fqn}.input_amax"] = input_amax
        weight = tensors.pop(f"{fqn}.weight")
        for leaf, tensor in pack(weight, formats[fqn], amax, input_amax).items():
            tensors[f"{fqn}.{leaf}"] = tensor
    save_file(tensors, folder / "model.safetensors")
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": dict.fromkeys(sorted(tensors), "model.safetensors"),
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file(calibration, folder / "calibration.amax")
    hf_config = hf_quant_config(config, formats)
    recipe = {"name": scheme, "rules": [{"target": "*", "format": "fp8"}]}
    (folder / "recipe.json").write_text(json.dumps({"recipe": recipe, "formats": formats}))
    (folder / "hf_quant_config.json").write_text(json.dumps(hf_config))
    values = {**config.raw, "quantization_config": quantization_config(hf_config)}
    (folder / "config.json").write_text(json.dumps(values))
    names = {"F8_E4M3": torch.float8_e4m3fn, "U8": torch.uint8, "BF16": torch.bfloat16}
    names |= {"F32": torch.float32, "I64": torch.int64}
    dtype_names = {dtype: name for name, dtype in names.items()}
    manifest["tensors"] = {
        name: {
            "sha256": sha256,
            "dtype": dtype_names[tensors[name].dtype],
            "shape": list(tensors[name].shape),
        }
        for name, sha256 in hash_all(tensors).items()
    }
    manifest["files"] = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if not path.name.startswith("model.safetensors")
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def share_amax(fqn: str, tensors: Mapping[str, Tensor]) -> Tensor:
    mixer, _, leaf = fqn.rpartition(".")
    leaves = ("q_proj", "k_proj", "v_proj") if leaf in ("q_proj", "k_proj", "v_proj") else (leaf,)
    return (
        torch.stack([tensors[f"{mixer}.{part}.weight"].abs().amax() for part in leaves])
        .amax()
        .float()
    )


def pack(
    weight: Tensor, linear_format: Format, amax: Tensor, input_amax: Tensor
) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # modelopt calls deprecated torch functions on import
        from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor

    if linear_format == "fp8":
        scale = amax / 448
        codes, _ = FP8QTensor.quantize(weight, scale)
        return {
            "weight": codes._quantized_data,
            "weight_scale": scale,
            "input_scale": input_amax / 448,
        }
    scale = amax / 2688
    packed, block_scale, _ = NVFP4QTensor.quantize(weight, 16, None, scale)
    tensors = {
        "weight": packed._quantized_data,
        "weight_scale": block_scale,
        "weight_scale_2": scale,
    }
    if linear_format == "nvfp4":
        tensors["input_scale"] = input_amax / 2688
    return tensors


def hash_all(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {
        name: hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in tensors.items()
    }
