"""Checkpoints that ModelOpt's and compressed-tensors' own code writes, read and computed with.

Scales here are powers of two where both conventions are compared: a reciprocal, and BF16, hold
those exactly, so that codes, weights and logits must be equal bit for bit.
"""

import copy
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    apply_quantization_config,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nvvl.calib_data.items import Item
from nvvl.errors import CheckpointError, ConfigError, NvvlError
from nvvl.model.checkpoint import Checkpoint
from nvvl.model.load import load_model
from nvvl.model.processor import Processor
from nvvl.model.vlm import NemotronNanoVL
from nvvl.quantize.amaxes import Amax, read_amaxes
from nvvl.quantize.backend import register
from nvvl.quantize.declared import open_checkpoint, read_formats
from nvvl.quantize.linear import QuantizedLinear
from nvvl.quantize.load import load_any
from nvvl.quantize.pack import pack_linear
from nvvl.quantize.recipe import Format
from nvvl.quantize.targets import list_linears
from nvvl.reports.evaluate import Candidate, Options, evaluate
from nvvl.reports.measure import _same_vision
from nvvl.reports.suites import SUITES

LAYERS = "language_model.backbone.layers"
UP_PROJ = f"{LAYERS}.1.mixer.up_proj"
LANGUAGE_ONLY = ["re:.*lm_head", "re:vision_model.*", "re:mlp1.*"]
PRESET_OF: Mapping[str, Format] = {"FP8": "fp8", "NVFP4": "nvfp4", "NVFP4A16": "nvfp4-w4a16"}
LARGEST: Mapping[Format, float] = {"fp8": 448.0, "nvfp4": 2688.0, "nvfp4-w4a16": 2688.0}
QuantizeTiny = Callable[[str], Path]
Compress = Callable[..., Path]

# what these libraries do themselves, and not in our hands
pytestmark = pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")


def logits_of(model: NemotronNanoVL, source: Path, items: tuple[Item, ...]) -> list[Tensor]:
    processor = Processor.from_folder(source)
    results = []
    for item in items:
        inputs = processor(item.messages, images=item.images, videos=item.videos)
        pixels = inputs.pixel_values.to(model.dtype)
        with torch.no_grad():
            results.append(model(inputs.input_ids[None], pixel_values=pixels).logits)
    return results


def sqnr_db(found: list[Tensor], expected: list[Tensor]) -> float:
    signal = torch.cat([x.float().flatten() for x in expected])
    noise = torch.cat([x.float().flatten() for x in found]) - signal
    return float(10 * torch.log10(signal.square().mean() / noise.square().mean()))


@pytest.fixture(scope="session")
def round_amaxes(quantize_tiny: QuantizeTiny) -> Callable[[Format], dict[str, Amax]]:
    """Return a function that gives calibrated amaxes, moved up until scales are powers of two."""

    def move_up(amax: Tensor, largest: float) -> Tensor:
        return largest * 2.0 ** torch.ceil(torch.log2(amax / largest))

    def get(linear_format: Format) -> dict[str, Amax]:
        folder = quantize_tiny("fp8")
        linears = list_linears(Checkpoint(folder).config)
        largest = LARGEST[linear_format]
        return {
            fqn: Amax(
                move_up(amax.weight, largest),
                None
                if amax.input is None or linear_format == "nvfp4-w4a16"
                else move_up(amax.input, largest),
            )
            for fqn, amax in read_amaxes(folder / "calibration.amax", linears).items()
        }

    return get


@pytest.fixture(scope="session")
def ours(
    quantize_tiny: QuantizeTiny,
    tiny_checkpoint: Path,
    round_amaxes: Callable[[Format], dict[str, Amax]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[Format], Path]:
    """Return a function that packs the tiny model in our layout with the rounded amaxes."""
    root = tmp_path_factory.mktemp("ours")

    def build(linear_format: Format) -> Path:
        folder = root / linear_format
        if not folder.exists():
            shutil.copytree(quantize_tiny(linear_format), folder)
            source = load_file(tiny_checkpoint / "model.safetensors")
            tensors = load_file(folder / "model.safetensors")
            for fqn, amax in round_amaxes(linear_format).items():
                packed = pack_linear(source[f"{fqn}.weight"], linear_format, amax)
                tensors |= {f"{fqn}.{leaf}": tensor for leaf, tensor in packed.items()}
            save_file(tensors, folder / "model.safetensors")
        return folder

    return build


@pytest.fixture(scope="session")
def compress(
    tiny_checkpoint: Path,
    round_amaxes: Callable[[Format], dict[str, Amax]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Compress:
    """Return a function that lets compressed-tensors write the tiny model as it does."""

    def build(scheme: str, *, ignore: list[str] = LANGUAGE_ONLY, target: str = "Linear") -> Path:
        folder = tmp_path_factory.mktemp("compressed") / scheme
        model = quantized_by_compressed_tensors(
            tiny_checkpoint, scheme, round_amaxes, ignore=ignore, target=target
        )
        compressor = ModelCompressor.from_pretrained_model(model)
        assert compressor is not None
        compressor.compress_model(model)
        shutil.copytree(
            tiny_checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json")
        )
        save_file(
            {k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors"
        )
        compressor.update_config(str(folder))
        return folder

    return build


def quantized_by_compressed_tensors(
    source: Path,
    scheme: str,
    round_amaxes: Callable[[Format], dict[str, Amax]],
    *,
    ignore: list[str],
    target: str = "Linear",
    dtype: torch.dtype = torch.bfloat16,
) -> NemotronNanoVL:
    """Give a model the scheme and its scales; its forward then is compressed-tensors' own."""
    model = load_model(source, dtype=dtype)
    config = QuantizationConfig(
        config_groups={"group_0": preset_name_to_scheme(scheme, [target])}, ignore=ignore
    )
    apply_quantization_config(model, config)
    amaxes = round_amaxes(PRESET_OF[scheme]) if scheme in PRESET_OF else {}
    for fqn, module in model.named_modules():
        found: QuantizationScheme | None = getattr(module, "quantization_scheme", None)
        if found is None:
            continue
        weight = module.get_parameter("weight").data
        # what calibration did not see has a scale of its own size
        amax = amaxes.get(fqn) or Amax(weight.float().abs().amax(), torch.tensor(448.0))
        set_scales(module, weight, found, amax)
        module.quantization_status = QuantizationStatus.FROZEN
    return model


def set_scales(module: nn.Module, weight: Tensor, scheme: QuantizationScheme, amax: Amax) -> None:
    assert scheme.weights is not None
    scales: dict[str, Tensor] = {}
    if scheme.weights.num_bits == 4:
        scales["weight_global_scale"] = 2688 / amax.weight
        blocks = weight.float().unflatten(-1, (-1, 16))
        scales["weight_scale"], _ = calculate_qparams(
            blocks.amin(-1), blocks.amax(-1), scheme.weights, scales["weight_global_scale"]
        )
        if amax.input is not None and scheme.input_activations is not None:
            scales["input_global_scale"] = 2688 / amax.input
    elif scheme.weights.strategy == "channel":
        rows = weight.float()
        scales["weight_scale"], _ = calculate_qparams(
            rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True), scheme.weights
        )
    else:
        scales["weight_scale"] = amax.weight / 448
        assert amax.input is not None
        scales["input_scale"] = amax.input / 448
    for name, scale in scales.items():
        parameter = module.get_parameter(name)
        parameter.data = scale.reshape(parameter.shape).to(parameter.dtype)


@pytest.mark.parametrize("scheme", PRESET_OF)
def test_compressed_tensors_folder_computes_as_ours_at_equal_scales(
    scheme: str, compress: Compress, ours: Callable[[Format], Path], items: tuple[Item, ...]
) -> None:
    theirs, own = load_any(compress(scheme)), load_any(ours(PRESET_OF[scheme]))
    for fqn in list_linears(own.config):
        linear, expected = theirs.get_submodule(fqn), own.get_submodule(fqn)
        assert isinstance(linear, QuantizedLinear)
        assert isinstance(expected, QuantizedLinear)
        assert linear.linear_format == PRESET_OF[scheme]
        assert linear.dense_weight is not None
        assert expected.dense_weight is not None
        assert torch.equal(linear.dense_weight, expected.dense_weight), fqn
    folder = ours(PRESET_OF[scheme])
    pairs = zip(logits_of(theirs, folder, items), logits_of(own, folder, items), strict=True)
    assert all(torch.equal(found, expected) for found, expected in pairs)


@pytest.mark.parametrize("scheme", [*PRESET_OF, "FP8_DYNAMIC"])
def test_weights_are_those_that_compressed_tensors_unpacks(scheme: str, compress: Compress) -> None:
    folder = compress(scheme)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    group = QuantizationScheme(**config["config_groups"]["group_0"])
    unpack = BaseCompressor.get_value_from_registry(config["format"]).decompress
    stored = load_file(folder / "model.safetensors")
    model = load_any(folder)
    for fqn in list_linears(model.config):
        leaves = {
            name.rpartition(".")[2]: tensor
            for name, tensor in stored.items()
            if name.rpartition(".")[0] == fqn
        }
        linear = model.get_submodule(fqn)
        assert isinstance(linear, QuantizedLinear)
        assert linear.dense_weight is not None
        assert torch.equal(linear.dense_weight, unpack(leaves, group)["weight"]), fqn


@pytest.mark.parametrize("scheme", [*PRESET_OF, "FP8_DYNAMIC"])
def test_inputs_are_rounded_as_compressed_tensors_simulates_it(
    scheme: str,
    compress: Compress,
    tiny_checkpoint: Path,
    round_amaxes: Callable[[Format], dict[str, Amax]],
) -> None:
    """In float32, where their scales are not rounded to the dtype of the model."""
    simulated = quantized_by_compressed_tensors(
        tiny_checkpoint, scheme, round_amaxes, ignore=LANGUAGE_ONLY, dtype=torch.float32
    )
    model = load_any(compress(scheme), dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for fqn, (_, width) in list_linears(model.config).items():
        ours, theirs = model.get_submodule(fqn), simulated.get_submodule(fqn)
        assert isinstance(ours, QuantizedLinear)
        assert ours.dense_weight is not None
        theirs.get_parameter("weight").data = ours.dense_weight
        theirs.quantization_status = QuantizationStatus.COMPRESSED
        x = 3 * torch.randn(2, 7, width, generator=generator)
        rounds_input = not torch.equal(ours(x), nn.functional.linear(x, ours.dense_weight))
        assert rounds_input is (scheme != "NVFP4A16"), fqn
        assert torch.equal(ours(x), theirs(x)), fqn


def export_with_modelopt(
    source: Path, folder: Path, config_name: str, items: tuple[Item, ...], amaxes: dict[str, Amax]
) -> None:
    """Let ModelOpt calibrate, pack and declare, on the model with the released names."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format
    from modelopt.torch.export.quant_utils import get_quant_config, postprocess_state_dict
    from modelopt.torch.export.unified_export_hf import _process_quantized_modules

    model = load_model(source)
    processor = Processor.from_folder(source)
    settings = copy.deepcopy(getattr(mtq, config_name))
    for pattern in ("*vision_model*", "*mlp1*", "*lm_head*", "*conv1d*", "*embeddings*"):
        settings["quant_cfg"].append({"quantizer_name": pattern, "enable": False})

    def run(module: nn.Module) -> None:
        for item in items:
            inputs = processor(item.messages, images=item.images, videos=item.videos)
            module(inputs.input_ids[None], pixel_values=inputs.pixel_values)

    register()  # of the model's own linears, which ModelOpt does not know by itself
    with torch.no_grad():
        mtq.quantize(model, settings, run)
    for fqn, amax in amaxes.items():  # ours shares the weight amax of q, k and v
        model.get_submodule(f"{fqn}.weight_quantizer").amax = amax.weight
    declared = get_quant_config(model)
    _process_quantized_modules(model, torch.bfloat16)
    tensors = postprocess_state_dict(model.state_dict(), 448, None)
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    (folder / "hf_quant_config.json").write_text(json.dumps(declared))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = convert_hf_quant_config_format(declared)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("preset", "config_name"), [("fp8", "FP8_DEFAULT_CFG"), ("nvfp4", "NVFP4_DEFAULT_CFG")]
)
def test_modelopt_export_computes_as_ours(
    preset: str,
    config_name: str,
    quantize_tiny: QuantizeTiny,
    tiny_checkpoint: Path,
    items: tuple[Item, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = quantize_tiny(preset)
    linears = list_linears(Checkpoint(own).config)
    amaxes = read_amaxes(own / "calibration.amax", linears)
    export_with_modelopt(tiny_checkpoint, tmp_path / "out", config_name, items, amaxes)
    theirs = load_any(tmp_path / "out")
    pairs = zip(logits_of(theirs, own, items), logits_of(load_any(own), own, items), strict=True)
    assert all(torch.equal(found, expected) for found, expected in pairs)


def test_modelopt_export_per_channel_and_token(
    tiny_checkpoint: Path, items: tuple[Item, ...], tmp_path: Path
) -> None:
    name = "FP8_PER_CHANNEL_PER_TOKEN_CFG"
    export_with_modelopt(tiny_checkpoint, tmp_path / "out", name, items, {})
    stored = load_file(tmp_path / "out" / "model.safetensors")
    linear = load_any(tmp_path / "out", dtype=torch.float32).get_submodule(UP_PROJ)
    assert isinstance(linear, QuantizedLinear)
    assert linear.linear_format == "fp8-per-channel"
    weight = stored[f"{UP_PROJ}.weight"].float() * stored[f"{UP_PROJ}.weight_scale"][:, None]
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    x[2] = 0  # a token without a largest value
    step = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448
    rounded = (x / step).to(torch.float8_e4m3fn).float() * step
    # the same numbers in float32; only the order of the sums may differ
    torch.testing.assert_close(linear(x), rounded @ weight.T, rtol=1e-5, atol=1e-5)
    with pytest.raises(CheckpointError, match="has FP8 scales per channel; required one of bf16"):
        read_formats(Checkpoint(tmp_path / "out"))


def test_linears_outside_the_layers_may_be_quantized(
    compress: Compress, tiny_checkpoint: Path, items: tuple[Item, ...]
) -> None:
    folder = compress("FP8_DYNAMIC", ignore=["re:.*embedder"])
    model = load_any(folder)
    block = model.get_submodule("vision_model.radio_model.model.blocks.0.mlp.fc1")
    for module in (block, model.get_submodule("mlp1.1"), model.language_model.lm_head):
        assert isinstance(module, QuantizedLinear)
    assert block.bias is not None
    plain = load_model(tiny_checkpoint)
    found, expected = (logits_of(m, tiny_checkpoint, items) for m in (model, plain))
    assert 15 < sqnr_db(found, expected) < 60  # rounded everywhere, and still the same model


def test_group_may_name_its_linears(compress: Compress) -> None:
    folder = compress("FP8_DYNAMIC", target=r"re:.*\.(up|down)_proj$")
    model = load_any(folder)
    quantized = {
        n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, QuantizedLinear)
    }
    assert quantized == {"up_proj", "down_proj"}


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_status": "frozen"}, "quantization_status 'frozen'; required 'compressed'"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme is set; nvvl computes without it"),
        ({"transform_config": {"config_groups": {"R1": {}}}}, "transform_config is set"),
        ({"config_groups": {}}, "config_groups is missing or empty"),
        ({"config_groups": {"FP8": ["Linear"]}}, r"FP8: required a scheme written out in full"),
        ({"ignore": ["re:(", "x"]}, r"ignore: 're:\(' is not a regular expression"),
        ({"ignore": "lm_head"}, "ignore: required a list of strings, got 'lm_head'"),
    ],
)
def test_settings_that_nvvl_cannot_compute_with_are_refused(
    changes: dict[str, Any], message: str, compress: Compress
) -> None:
    folder = compress("FP8")
    edit(folder, **changes)
    with pytest.raises(ConfigError, match=message):
        load_any(folder)


@pytest.mark.parametrize("scheme", ["W4A16", "MXFP4", "FP8_BLOCK", "INT8"])
def test_other_schemes_are_refused(scheme: str, compress: Compress) -> None:
    folder = compress("FP8")
    group = preset_name_to_scheme(scheme, ["Linear"]).model_dump(mode="json")
    edit(folder, config_groups={"group_0": group})
    with pytest.raises(ConfigError, match=r"group_0: weights (int|float)\d+ per .*nvvl reads"):
        load_any(folder)


def test_linear_that_is_ignored_but_packed_is_refused(compress: Compress) -> None:
    folder = compress("NVFP4")
    edit(folder, ignore=[UP_PROJ])
    message = f"{re.escape(UP_PROJ)} is declared BF16, its tensors are NVFP4"
    with pytest.raises(CheckpointError, match=message):
        load_any(folder)


@pytest.mark.parametrize(
    ("leaf", "value", "message"),
    [
        ("weight_global_scale", torch.zeros(1), r"weight_scale_2: scales must be finite"),
        ("input_global_scale", torch.full((1,), torch.nan), r"input_scale: scales must be finite"),
        ("weight_scale", None, r"up_proj\.weight_scale is missing"),
        ("weight", torch.zeros(2, 2), r"both stand for .*up_proj\.weight"),
    ],
)
def test_faulty_tensors_are_refused(
    leaf: str, value: Tensor | None, message: str, compress: Compress
) -> None:
    folder = compress("NVFP4")
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(f"{UP_PROJ}.{leaf}", None)
    if value is not None:
        tensors[f"{UP_PROJ}.{leaf}"] = value
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(NvvlError, match=message):
        load_any(folder)


def test_quantized_cache_of_modelopt_is_refused(
    quantize_tiny: QuantizeTiny, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(quantize_tiny("nvfp4"), folder)
    path = folder / "hf_quant_config.json"
    config = json.loads(path.read_text())
    config["quantization"]["kv_cache_quant_algo"] = "FP8"
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="kv_cache_quant_algo FP8; nvvl keeps the KV cache"):
        load_any(folder)


def test_nothing_else_is_made_of_a_compressed_tensors_folder(compress: Compress) -> None:
    with pytest.raises(CheckpointError, match="compressed-tensors wrote this; nvvl evaluates it"):
        read_formats(Checkpoint(compress("NVFP4")))


def test_bytes_of_a_converted_scale_are_not_given(compress: Compress) -> None:
    checkpoint = open_checkpoint(compress("NVFP4"))
    assert len(checkpoint.read_bytes(f"{UP_PROJ}.weight")) == 128 * 64 // 2
    with pytest.raises(CheckpointError, match="input_scale is converted when read"):
        checkpoint.sha256(f"{UP_PROJ}.input_scale")


def test_quantized_towers_and_heads_are_evaluated_each_with_its_own(
    compress: Compress, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    ignore = ["re:.*embedder"]
    folders = [compress(scheme, ignore=ignore) for scheme in ("FP8_DYNAMIC", "NVFP4A16")]
    models = [load_any(folder) for folder in folders]
    assert _same_vision(models[0], load_any(folders[0]))
    assert not _same_vision(*models)
    runs = evaluate(
        [Candidate(folder=f, out=tmp_path / f.name, label=f.name) for f in folders],
        [SUITES["line"]],
        Options(num_items=2, batch_size=2, gate_items=0),
    )
    for run, folder in zip(runs, folders, strict=True):
        (alone,) = evaluate(
            [Candidate(folder=folder, out=tmp_path / "alone" / folder.name, label="alone")],
            [SUITES["line"]],
            Options(num_items=2, batch_size=2, gate_items=0),
        )
        assert [a.nll for a in run.answers] == [a.nll for a in alone.answers]
