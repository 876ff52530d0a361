"""Which linears exist, which format each gets, and what layout and server configs follow."""

import hashlib
import json
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from nvvl.errors import RecipeError
from nvvl.model.checkpoint import Checkpoint, TensorSpec
from nvvl.model.config import VLMConfig
from nvvl.model.load import expected_tensors
from nvvl.model.vlm import NemotronNanoVL
from nvvl.quantize.layout import build_layout
from nvvl.quantize.presets import PRESETS, fp8, mixed, nvfp4, nvfp4_w4a16
from nvvl.quantize.recipe import Format, Recipe, Rule
from nvvl.quantize.server_config import exclude_patterns, hf_quant_config, quantization_config
from nvvl.quantize.targets import assign_formats, list_linears

ROOT = Path(__file__).resolve().parents[2]
LAYERS = "language_model.backbone.layers"
PATTERN = "M-M*-M-" * 2  # layers 1 and 10 to 13 exist, so a careless pattern would hit too much


@pytest.fixture
def config(make_config: Callable[..., dict[str, Any]]) -> VLMConfig:
    return VLMConfig.from_dict(make_config(language={"hybrid_override_pattern": PATTERN}))


def recipe_of(*rules: tuple[str, Format] | tuple[str, Format, tuple[int, ...]]) -> Recipe:
    made = [Rule(target=r[0], format=r[1], layers=r[2] if len(r) > 2 else ()) for r in rules]
    return Recipe(name="test", rules=tuple(made))


def test_linears_are_those_of_the_language_model(tiny_config: VLMConfig) -> None:
    import torch

    with torch.device("meta"):
        model = NemotronNanoVL(tiny_config)
    found = {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name
    }
    assert list_linears(tiny_config) == found


@pytest.mark.parametrize(
    ("path", "count", "sha256"),
    [
        ("model/embedded/config.json", 28, "7f60d0f4880a7539"),
        ("benchmarks/config-tiny.json", 16, "c699c5e941e6faa9"),
        ("benchmarks/config-1b.json", 54, "5862e42304aec6e9"),
        ("benchmarks/config-12b.json", 136, "aa9cf27c44c16f72"),
    ],
)
def test_linears_of_known_models_stay_the_same(path: str, count: int, sha256: str) -> None:
    config = VLMConfig.from_dict(json.loads((ROOT / path).read_text(encoding="utf-8")))
    linears = list_linears(config)
    assert len(linears) == count
    # names, shapes and order, as a recipe.json and the journal of an unfinished run have them
    assert hashlib.sha256(json.dumps(linears).encode()).hexdigest()[:16] == sha256


@pytest.mark.parametrize(
    ("recipe", "format_of"),
    [(fp8(), "fp8"), (nvfp4(), "nvfp4"), (nvfp4_w4a16(), "nvfp4-w4a16")],
)
def test_uniform_presets_take_every_linear(
    config: VLMConfig, recipe: Recipe, format_of: str
) -> None:
    assert set(assign_formats(recipe, list_linears(config)).values()) == {format_of}


def test_mixed_keeps_attention_and_outer_layers_at_8_bits(config: VLMConfig) -> None:
    formats = assign_formats(mixed(), list_linears(config))
    outer = [f"{LAYERS}.{index}." for index in (0, 1, 12, 13)]
    for fqn, linear_format in formats.items():
        sensitive = fqn.endswith(("q_proj", "k_proj", "v_proj", "o_proj"))
        sensitive = sensitive or fqn.startswith(tuple(outer))
        assert linear_format == ("fp8" if sensitive else "nvfp4"), fqn


def test_first_matching_rule_wins(config: VLMConfig) -> None:
    recipe = recipe_of((f"{LAYERS}.1.*", "bf16"), ("*.up_proj", "fp8"), ("*", "nvfp4"))
    formats = assign_formats(recipe, list_linears(config))
    assert formats[f"{LAYERS}.1.mixer.up_proj"] == "bf16"
    assert formats[f"{LAYERS}.11.mixer.up_proj"] == "fp8"
    assert formats[f"{LAYERS}.11.mixer.down_proj"] == "nvfp4"


def test_linear_without_rule_stays_bf16(config: VLMConfig) -> None:
    formats = assign_formats(recipe_of(("*.mixer.in_proj", "nvfp4")), list_linears(config))
    assert formats[f"{LAYERS}.0.mixer.in_proj"] == "nvfp4"
    assert formats[f"{LAYERS}.0.mixer.out_proj"] == "bf16"


@pytest.mark.parametrize(
    ("target", "hint"),
    [
        ("*.mixer.inproj", r"did you mean .*\*\.in_proj"),
        (f"{LAYERS}.*.mixer.dwn_proj", r"did you mean .*\.mixer\.down_proj"),
        (f"{LAYERS}.99.mixer.in_proj", r"did you mean"),
        ("mlp1.1", r"mlp1, .* always stay BF16"),
        ("language_model.lm_head", r"lm_head .* always stay BF16"),
        ("*mlp*", r"matches no quantizable linear"),
    ],
)
def test_target_that_matches_nothing_is_refused(config: VLMConfig, target: str, hint: str) -> None:
    with pytest.raises(RecipeError, match=hint):
        assign_formats(recipe_of(("*", "fp8"), (target, "nvfp4")), list_linears(config))


def test_layer_outside_the_model_is_refused(config: VLMConfig) -> None:
    with pytest.raises(RecipeError, match="14 is not one of the model's 14 layers"):
        assign_formats(recipe_of(("*", "fp8", (14,))), list_linears(config))


def test_in_features_must_be_a_multiple_of_16(tiny_config: VLMConfig) -> None:
    linears = list_linears(tiny_config) | {f"{LAYERS}.1.mixer.up_proj": (128, 24)}
    message = r"layers\.1\.mixer\.up_proj: NVFP4 needs in_features divisible by 16, got 24; put"
    for recipe in (nvfp4(), nvfp4_w4a16()):
        with pytest.raises(RecipeError, match=message):
            assign_formats(recipe, linears)
    ignored = recipe_of((f"{LAYERS}.1.mixer.up_proj", "bf16"), ("*", "nvfp4"))
    assert assign_formats(ignored, linears)[f"{LAYERS}.1.mixer.up_proj"] == "bf16"
    assert set(assign_formats(fp8(), linears).values()) == {"fp8"}


def test_q_k_v_need_one_format(config: VLMConfig) -> None:
    with pytest.raises(RecipeError, match=r"q_proj fp8, k_proj nvfp4, v_proj nvfp4"):
        assign_formats(recipe_of(("*.q_proj", "fp8"), ("*", "nvfp4")), list_linears(config))


def test_recipe_that_quantizes_nothing_is_refused(config: VLMConfig) -> None:
    with pytest.raises(RecipeError, match="every linear stays bf16"):
        assign_formats(recipe_of(("*", "bf16")), list_linears(config))


def test_layout_keeps_order_and_replaces_quantized_weights(tiny_checkpoint: Path) -> None:
    source = Checkpoint(tiny_checkpoint)
    recipe = recipe_of(("*.in_proj", "nvfp4"), ("*.out_proj", "nvfp4-w4a16"), ("*.up_proj", "fp8"))
    formats = assign_formats(recipe, list_linears(source.config))
    layout = build_layout(source, formats)
    by_name = {spec.name: spec for spec in layout}
    assert len(by_name) == len(layout)

    prefix = f"{LAYERS}.0.mixer"
    in_proj = [spec for spec in layout if spec.name.startswith(f"{prefix}.in_proj")]
    assert in_proj == [
        TensorSpec(f"{prefix}.in_proj.weight", "U8", (196, 32)),
        TensorSpec(f"{prefix}.in_proj.weight_scale", "F8_E4M3", (196, 4)),
        TensorSpec(f"{prefix}.in_proj.weight_scale_2", "F32", ()),
        TensorSpec(f"{prefix}.in_proj.input_scale", "F32", ()),
    ]
    assert f"{prefix}.out_proj.weight_scale_2" in by_name
    assert f"{prefix}.out_proj.input_scale" not in by_name
    assert by_name[f"{LAYERS}.1.mixer.up_proj.weight"].dtype == "F8_E4M3"
    assert by_name[f"{LAYERS}.1.mixer.down_proj.weight"].dtype == "BF16"
    assert by_name[f"{prefix}.A_log"].dtype == "F32"
    kept = [spec.name for spec in layout if not spec.name.endswith(("_scale", "_scale_2"))]
    assert kept == [
        info.name
        for info in sorted(source.tensors.values(), key=lambda info: (info.file, info.start))
    ]
    assert set(kept) == set(expected_tensors(source.config))


def vllm_excludes(fqn: str, patterns: list[str]) -> bool:
    """vLLM 0.33: split a trailing star, rename the prefix, then exact, substring, fnmatch."""
    prefix = ("language_model.backbone", "language_model.model")
    split: list[str] = []
    for pattern in patterns:
        if pattern.endswith("*") and not pattern.endswith(".*"):
            split += [pattern[:-1], pattern[:-1] + ".*"]
        else:
            split.append(pattern)
    renamed = [p.replace(*prefix, 1) if p.startswith(prefix[0]) else p for p in split]
    name = fqn.replace(*prefix, 1)
    short = name.removeprefix("language_model.")
    return any(p == name or p in name or p in short or fnmatchcase(name, p) for p in renamed)


def trtllm_excludes(fqn: str, patterns: list[str]) -> bool:
    """TensorRT-LLM: no language_model prefix, backbone renamed to model, fnmatch alone."""
    name = fqn.removeprefix("language_model.").replace("backbone", "model", 1)
    renamed = [p.removeprefix("language_model.").replace("backbone", "model") for p in patterns]
    return any(fnmatchcase(name, p) for p in renamed)


@pytest.mark.parametrize(
    "recipe",
    [
        *(preset() for preset in PRESETS.values()),
        recipe_of((f"{LAYERS}.1.*", "bf16"), ("*", "nvfp4")),
        recipe_of(("*.mixer.[qkv]_proj", "bf16"), ("*", "fp8")),
    ],
)
@pytest.mark.parametrize("excludes", [vllm_excludes, trtllm_excludes])
def test_patterns_exclude_exactly_what_stays_bf16(
    config: VLMConfig, recipe: Recipe, excludes: Callable[[str, list[str]], bool]
) -> None:
    formats = assign_formats(recipe, list_linears(config))
    patterns = exclude_patterns(config, formats)
    for fqn, linear_format in formats.items():
        assert excludes(fqn, patterns) == (linear_format == "bf16"), fqn
    always = [
        "language_model.lm_head",
        "mlp1.1",
        "mlp1.3",
        "vision_model.radio_model.model.blocks.0.attn.qkv",
        *(f"{LAYERS}.{i}.mixer.conv1d" for i, k in enumerate(PATTERN) if k == "M"),
    ]
    for fqn in always:
        assert excludes(fqn, patterns), fqn


@pytest.mark.parametrize(
    ("preset", "algorithm", "group_size"),
    [
        ("fp8", "FP8", None),
        ("nvfp4", "NVFP4", 16),
        ("nvfp4-w4a16", "W4A16_NVFP4", 16),
        ("mixed", "MIXED_PRECISION", 16),
    ],
)
def test_both_server_configs_say_the_same(
    config: VLMConfig, preset: str, algorithm: str, group_size: int | None
) -> None:
    formats = assign_formats(PRESETS[preset](), list_linears(config))
    hf_config = hf_quant_config(config, formats)
    quantization = hf_config["quantization"]
    assert hf_config["producer"]["name"] == "modelopt"
    assert quantization["quant_algo"] == algorithm
    assert quantization.get("group_size") == group_size
    assert quantization["kv_cache_quant_algo"] is None
    assert ("quantized_layers" in quantization) == (preset == "mixed")

    in_config = quantization_config(hf_config)
    assert in_config["quant_method"] == "modelopt"
    assert in_config["quant_algo"] == algorithm
    assert in_config["ignore"] == quantization["exclude_modules"]
    assert in_config.get("quantized_layers") == quantization.get("quantized_layers")
    for group in in_config["config_groups"].values():
        weight_only = algorithm == "W4A16_NVFP4"
        assert (group["input_activations"] is None) == weight_only


def test_mixed_config_lists_each_quantized_layer(config: VLMConfig) -> None:
    formats = assign_formats(mixed(), list_linears(config))
    hf_config = hf_quant_config(config, formats)
    layers = hf_config["quantization"]["quantized_layers"]
    assert layers.keys() == formats.keys()
    assert layers[f"{LAYERS}.0.mixer.in_proj"] == {"quant_algo": "FP8"}
    assert layers[f"{LAYERS}.2.mixer.in_proj"] == {"quant_algo": "NVFP4", "group_size": 16}
    groups = quantization_config(hf_config)["config_groups"].values()
    assert sorted(fqn for group in groups for fqn in group["targets"]) == sorted(layers)
