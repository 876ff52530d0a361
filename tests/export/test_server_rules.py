"""Each rule finds the one thing that breaks it, and a sound checkpoint breaks none."""

import copy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from nvvl.errors import CheckpointError
from nvvl.export.checks import Check
from nvvl.export.server_rules import SERVER_RULES, check_server_rules
from nvvl.export.view import CheckpointView, TensorHeader
from nvvl.quantize.recipe import Format

ViewFactory = Callable[..., CheckpointView]

LAYERS = "language_model.backbone.layers"
SCALAR = TensorHeader("F32", (), "a")


def mixed(fqn: str) -> Format:
    """FP8 in attention and the first layer, BF16 in layer 1, NVFP4 elsewhere."""
    layer = int(fqn.split(".")[3])
    if layer == 1:
        return "bf16"
    return "fp8" if layer in (0, 3, 11) else "nvfp4"


def partly_bf16(fqn: str) -> Format:
    return "bf16" if fqn.split(".")[3] in ("1", "3") else "nvfp4"


def failed(view: CheckpointView) -> dict[str, Check]:
    return {check.rule: check for check in check_server_rules(view) if check.passed is False}


def with_config(view: CheckpointView, **changes: Any) -> CheckpointView:
    config = copy.deepcopy(dict(view.config))
    for key, value in changes.items():
        *parents, leaf = key.split("__")
        part = config
        for parent in parents:
            part = part[parent]
        if value is None:
            del part[leaf]
        else:
            part[leaf] = value
    return replace(view, config=config)


def with_patterns(view: CheckpointView, *patterns: str) -> CheckpointView:
    """Add patterns to both configs."""
    assert view.hf_quant_config is not None
    hf_config = copy.deepcopy(dict(view.hf_quant_config))
    hf_config["quantization"]["exclude_modules"] += patterns
    ignore = [*view.config["quantization_config"]["ignore"], *patterns]
    view = with_config(view, quantization_config__ignore=ignore)
    return replace(view, hf_quant_config=hf_config)


def with_hf(view: CheckpointView, **changes: Any) -> CheckpointView:
    assert view.hf_quant_config is not None
    hf_config = copy.deepcopy(dict(view.hf_quant_config))
    hf_config["quantization"] |= changes
    return replace(view, hf_quant_config=hf_config)


def with_tensors(view: CheckpointView, changes: dict[str, TensorHeader | None]) -> CheckpointView:
    tensors = {name: header for name, header in view.tensors.items() if name not in changes}
    tensors |= {name: header for name, header in changes.items() if header is not None}
    return replace(view, tensors=tensors, shards={"a": frozenset(tensors)})


@pytest.mark.parametrize("format_of", ["fp8", "nvfp4", "nvfp4-w4a16", "bf16", mixed, partly_bf16])
def test_sound_checkpoints_break_no_rule(make_view: ViewFactory, format_of: Any) -> None:
    assert failed(make_view(format_of)) == {}


def test_every_rule_documents_itself_under_its_id() -> None:
    for rule in SERVER_RULES:
        assert (rule.find_faults.__doc__ or "").startswith(f"{rule.rule}: ")
        assert rule.servers


@pytest.mark.parametrize(
    ("changes", "rule", "named"),
    [
        ({"architectures": ["NemotronHVL"]}, "C1", "architectures"),
        ({"model_type": "nemotron_h"}, "C1", "model_type"),
        ({"norm_mean": None}, "C2", "norm_mean"),
        ({"vision_config__preferred_resolution": None}, "C2", "preferred_resolution"),
        ({"vision_config__args__model": None}, "C2", "vision_config.args.model"),
        ({"torch_dtype": None}, "C3", "torch_dtype"),
        ({"vision_config__args__min_num_patches": 4}, "C4", "min_num_patches"),
        ({"ps_version": "v1"}, "C5", "ps_version: 'v1', the source has 'v2'"),
        ({"ps_version": "v3"}, "C5", "ps_version"),
        ({"llm_config__hybrid_override_pattern": None}, "C6", "missing"),
        ({"llm_config__hybrid_override_pattern": "M-M*" * 4}, "C6", "16 layers"),
        ({"llm_config__hybrid_override_pattern": "--M*M-M-M-M*M-M-M-M-"}, "C6", "pattern[0]: -"),
        ({"quantization_config__quant_method": "fp8"}, "C8", "quant_method"),
        ({"quantization_config__quant_algo": "FP8"}, "C8", "quant_algo"),
        ({"quantization_config__ignore": ["*lm_head"]}, "C8", "mlp1*"),
        ({"quantization_config__quant_algo": "NVFP4_AWQ"}, "C9", "NVFP4_AWQ"),
        ({"quantization_config__config_groups": {}}, "C11", "config_groups"),
        (
            {"quantization_config__ignore": None, "quantization_config__exclude_modules": []},
            "C11",
            "quantization_config.ignore: required a list",
        ),
        ({"quantization_config__quantization": {}}, "C11", "quantization_config.quantization"),
        (
            {"quantization_config__config_groups__group_0__input_activations": None},
            "C11",
            "group_0.input_activations",
        ),
    ],
)
def test_config_fault_is_found_and_named(
    make_view: ViewFactory, changes: dict[str, Any], rule: str, named: str
) -> None:
    check = failed(with_config(make_view(), **changes))[rule]
    assert named in check.detail


@pytest.mark.parametrize(
    ("changes", "rule", "named"),
    [
        ({"quant_algo": "FP8"}, "C8", "quant_algo"),
        ({"kv_cache_quant_algo": "FP8"}, "C8", "kv cache"),
        ({"group_size": 32}, "C8", "group_size"),
        ({"group_size": None}, "C10", "group_size"),
        ({"exclude_modules": None}, "C10", "exclude_modules"),
        ({"quantized_layers": {"a": {"quant_algo": "FP8"}}}, "C10", "quantized_layers"),
    ],
)
def test_hf_quant_config_fault_is_found_and_named(
    make_view: ViewFactory, changes: dict[str, Any], rule: str, named: str
) -> None:
    assert named in failed(with_hf(make_view(), **changes))[rule].detail


def test_dtype_may_be_spelt_as_transformers_5_does(make_view: ViewFactory) -> None:
    view = with_config(make_view(), torch_dtype=None, dtype="bfloat16")
    assert "C3" not in failed(view)


def test_config_without_its_twin_is_found(make_view: ViewFactory) -> None:
    view = replace(make_view(), hf_quant_config=None)
    assert {"C8", "C10"} <= failed(view).keys()
    assert (
        "quantization_config"
        in failed(with_config(make_view(), quantization_config=None))["C8"].detail
    )


def test_quantized_weights_without_any_config_are_found(make_view: ViewFactory) -> None:
    view = replace(with_config(make_view(), quantization_config=None), hf_quant_config=None)
    assert {"C8", "C10", "C11"} <= failed(view).keys()


def test_mixed_layers_that_differ_between_configs_are_named(make_view: ViewFactory) -> None:
    view = make_view(mixed)
    layers = dict(view.config["quantization_config"]["quantized_layers"])
    fqn = f"{LAYERS}.2.mixer.in_proj"
    layers[fqn] = {"quant_algo": "FP8"}
    view = with_config(view, quantization_config__quantized_layers=layers)
    assert fqn in failed(view)["C8"].detail
    assert fqn in failed(view)["E1"].detail


@pytest.mark.parametrize("where", ["quantization", "layers", "quantization_config", "group"])
def test_other_block_size_of_a_mixed_checkpoint_is_named(
    make_view: ViewFactory, where: str
) -> None:
    view = make_view(mixed)
    assert view.hf_quant_config is not None
    fqn = f"{LAYERS}.2.mixer.in_proj"
    layers = {**view.hf_quant_config["quantization"]["quantized_layers"]}
    layers[fqn] = {"quant_algo": "NVFP4", "group_size": 32}
    change, named = {
        "quantization": (partial(with_hf, group_size=32), "quantization.group_size"),
        "layers": (partial(with_hf, quantized_layers=layers), f"quantized_layers.{fqn}.group_size"),
        "quantization_config": (
            partial(with_config, quantization_config__group_size=32),
            "quantization_config.group_size",
        ),
        "group": (
            partial(
                with_config, quantization_config__config_groups__group_1__weights__group_size=32
            ),
            "config_groups.group_1.weights.group_size",
        ),
    }[where]
    assert f"{named}: required 16, got 32" in failed(change(view))["C10"].detail


def test_pixel_shuffle_version_that_the_source_lacks_is_named(make_view: ViewFactory) -> None:
    view = make_view()
    assert view.source is not None
    view = replace(view, source=with_config(view.source, ps_version=None))
    assert "ps_version: 'v2', the source has None" in failed(view)["C5"].detail


def test_kv_cache_format_without_scales_is_named(make_view: ViewFactory) -> None:
    scheme = {"type": "float", "num_bits": 8, "dynamic": False}
    view = with_config(make_view(), quantization_config__kv_cache_scheme=scheme)
    assert f"{LAYERS}.3.mixer.k_proj.k_scale" in failed(view)["C12"].detail
    scale = f"{LAYERS}.3.mixer.v_proj.v_scale"
    assert scale in failed(with_tensors(make_view(), {scale: SCALAR}))["C12"].detail


@pytest.mark.parametrize(
    ("old", "new", "rules"),
    [
        ("mlp1.1.weight", "multi_modal_projector.linear_1.weight", {"N1", "N4", "N5"}),
        ("mlp1.0.weight", None, {"N4", "N5"}),
        ("language_model.lm_head.weight", "language_model.head.weight", {"N2", "N5"}),
        (
            "vision_model.radio_model.model.blocks.0.attn.qkv.weight",
            "vision_model.radio_model.encoder.layer.0.attention.q_proj.weight",
            {"N3", "N5"},
        ),
        (
            "vision_model.radio_model.model.blocks.1.norm1.weight",
            "vision_model.blocks.1.norm1.weight",
            {"N1", "N3", "N5"},
        ),
        (f"{LAYERS}.0.norm.weight", None, {"N5"}),
        (f"{LAYERS}.0.norm.weight", f"{LAYERS}.0.norm.weight\0backbone.pt_name", {"N5", "N6"}),
        (None, f"{LAYERS}.0.extra.bias", {"N5"}),
    ],
)
def test_lost_renamed_and_added_tensors_are_named(
    make_view: ViewFactory, old: str | None, new: str | None, rules: set[str]
) -> None:
    view = make_view()
    changes: dict[str, TensorHeader | None] = {}
    if new is not None:
        changes[new] = view.tensors[old] if old else TensorHeader("BF16", (64,), "a")
    if old is not None:
        changes[old] = None
    found = failed(with_tensors(view, changes))
    assert rules <= found.keys()
    for rule in rules:
        assert (
            repr(old)[1:-1] in found[rule].detail
            or repr(new)[1:-1] in found[rule].detail
            or (new is not None and new in found[rule].detail)
        )


def test_nul_in_patterns_and_layer_keys_is_named(make_view: ViewFactory) -> None:
    bad = "backbone\0.pt_name_sentinel"
    assert repr(bad) in failed(with_patterns(make_view(), bad))["N6"].detail
    view = make_view(mixed)
    layers = dict(view.config["quantization_config"]["quantized_layers"])
    layers[bad] = {"quant_algo": "FP8"}
    view = with_config(view, quantization_config__quantized_layers=layers)
    assert "quantized_layers of config.json" in failed(view)["N6"].detail


@pytest.mark.parametrize(
    ("index", "named"),
    [
        ({"metadata": {"total_size": 1}}, "total_size: 1"),
        ({"weight_map": {}}, "not in the index"),
        ({"weight_map": {"ghost.weight": "a"}}, "ghost.weight"),
    ],
)
def test_index_that_disagrees_is_named(
    make_view: ViewFactory, index: dict[str, Any], named: str
) -> None:
    view = make_view()
    sound: dict[str, dict[str, Any]] = {
        "metadata": {"total_size": sum(header.nbytes for header in view.tensors.values())},
        "weight_map": dict.fromkeys(view.tensors, "a"),
    }
    assert failed(replace(view, index=sound)) == {}
    broken = {**sound, **index}
    if "ghost.weight" in broken["weight_map"]:
        broken["weight_map"] = {**sound["weight_map"], "ghost.weight": "a"}
    found = failed(replace(view, index=broken))["N7"]
    assert any(named in fault for fault in found.faults)


def test_tensor_in_two_files_is_named(make_view: ViewFactory) -> None:
    view = make_view()
    name = "mlp1.0.weight"
    view = replace(view, shards={**view.shards, "b": frozenset({name})})
    assert f"{name}: in a and b" in failed(view)["N7"].detail


@pytest.mark.parametrize(
    ("format_of", "name", "header", "rules"),
    [
        ("nvfp4", f"{LAYERS}.0.mixer.in_proj.weight_scale", None, {"D2", "D3"}),
        ("nvfp4", f"{LAYERS}.0.mixer.in_proj.input_scale", None, {"D2", "D3"}),
        ("nvfp4", f"{LAYERS}.0.mixer.in_proj.weight_scale_2", None, {"D2", "D3"}),
        ("fp8", f"{LAYERS}.0.mixer.in_proj.weight_scale", None, {"D1", "D3"}),
        ("fp8", f"{LAYERS}.0.mixer.in_proj.input_scale", None, {"D1", "D3"}),
        ("fp8", f"{LAYERS}.0.mixer.in_proj.weight_scale_2", SCALAR, {"D1"}),
        ("nvfp4-w4a16", f"{LAYERS}.0.mixer.in_proj.input_scale", SCALAR, {"D2"}),
        (
            "nvfp4",
            f"{LAYERS}.0.mixer.in_proj.weight_scale",
            TensorHeader("F8_E4M3", (196, 8), "a"),
            {"D2"},
        ),
        (
            "nvfp4",
            f"{LAYERS}.0.mixer.in_proj.weight_scale_2",
            TensorHeader("F32", (5,), "a"),
            {"D2", "Q4"},
        ),
        (
            "fp8",
            f"{LAYERS}.0.mixer.in_proj.weight",
            TensorHeader("F8_E4M3", (8, 64), "a"),
            {"D1"},
        ),
        ("nvfp4", "mlp1.1.weight", TensorHeader("U8", (128, 128), "a"), {"D3", "D4", "E1", "E2"}),
        ("nvfp4", "mlp1.1.weight_scale_2", SCALAR, {"D3", "D4", "N4"}),
        (
            "fp8",
            "vision_model.radio_model.model.blocks.0.mlp.fc1.weight",
            TensorHeader("F8_E4M3", (128, 64), "a"),
            {"D3", "D4"},
        ),
        (
            "nvfp4",
            f"{LAYERS}.0.mixer.conv1d.weight",
            TensorHeader("F8_E4M3", (128, 1, 4), "a"),
            {"D5"},
        ),
        (
            "nvfp4",
            "language_model.lm_head.weight",
            TensorHeader("U8", (304, 32), "a"),
            {"D3", "D6", "E1", "E2"},
        ),
        ("nvfp4", f"{LAYERS}.0.mixer.A_log", TensorHeader("BF16", (4,), "a"), {"C13"}),
        (
            "nvfp4",
            f"{LAYERS}.1.mixer.up_proj.weight",
            TensorHeader("U8", (128, 4), "a"),
            {"D8"},
        ),
        (
            "nvfp4",
            f"{LAYERS}.3.mixer.k_proj.weight",
            TensorHeader("BF16", (32, 64), "a"),
            {"Q3", "E1", "E2", "D3"},
        ),
    ],
)
def test_wrong_layout_is_found_and_named(
    make_view: ViewFactory,
    format_of: Format,
    name: str,
    header: TensorHeader | None,
    rules: set[str],
) -> None:
    found = failed(with_tensors(make_view(format_of), {name: header}))
    assert rules <= found.keys()
    module = name.rpartition(".")[0]
    assert all(
        module in found[rule].detail or module.rpartition(".")[0] in found[rule].detail
        for rule in rules
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -0.25])
def test_scale_that_is_not_finite_and_positive_is_named(
    make_view: ViewFactory, value: float
) -> None:
    name = f"{LAYERS}.0.mixer.in_proj.input_scale"
    assert name in failed(make_view(scalars={name: value}))["D7"].detail


@pytest.mark.parametrize(
    ("format_of", "leaf", "rule"),
    [
        ("nvfp4", "k_proj.weight_scale_2", "Q1"),
        ("nvfp4", "v_proj.input_scale", "Q1"),
        ("fp8", "q_proj.input_scale", "Q2"),
        ("fp8", "k_proj.weight_scale", "Q2"),
    ],
)
def test_unequal_qkv_scales_are_named(
    make_view: ViewFactory, format_of: Format, leaf: str, rule: str
) -> None:
    view = make_view(format_of, scalars={f"{LAYERS}.11.mixer.{leaf}": 0.25})
    assert failed(view).keys() == {rule}
    assert f"{LAYERS}.11.mixer" in failed(view)[rule].detail


@pytest.mark.parametrize(
    ("pattern", "rules"),
    [
        # vLLM splits a trailing star off, so each spelling reaches too far in its own servers
        ("*layers.1*", {"E2"}),
        (f"{LAYERS}.1*", {"E1", "E2"}),
        (f"{LAYERS}.1", {"E1"}),
        ("*layers.1.*", set()),
        (f"{LAYERS}.1.*", set()),
    ],
)
def test_pattern_for_layer_1_is_named_where_it_reaches_layers_10_to_19(
    make_view: ViewFactory, pattern: str, rules: set[str]
) -> None:
    found = failed(with_patterns(make_view(partly_bf16), pattern))
    assert found.keys() == rules
    for rule in rules:
        reached = {fault.split(".mixer")[0] for fault in found[rule].faults}
        assert reached == {f"{LAYERS}.{layer}" for layer in range(10, 20)}
        assert all(f"{pattern} excludes it" in fault for fault in found[rule].faults)


def test_bf16_layer_that_no_pattern_excludes_is_named(make_view: ViewFactory) -> None:
    view = make_view(partly_bf16)
    fqn = f"{LAYERS}.1.mixer.up_proj"
    kept = [p for p in view.config["quantization_config"]["ignore"] if "layers.1.mixer.up" not in p]
    view = with_config(view, quantization_config__ignore=kept)
    found = failed(with_hf(view, exclude_modules=kept))
    assert {"E1", "E2"} <= found.keys()
    assert fqn in found["E1"].detail


def test_conv1d_that_trtllm_would_quantize_is_named(make_view: ViewFactory) -> None:
    view = make_view()
    kept = [p for p in view.config["quantization_config"]["ignore"] if "layers.4." not in p]
    view = with_hf(with_config(view, quantization_config__ignore=kept), exclude_modules=kept)
    assert failed(view).keys() == {"D5"}
    assert f"{LAYERS}.4.mixer.conv1d" in failed(view)["D5"].detail


@pytest.mark.parametrize(
    ("pattern", "rules"),
    [
        ("*mixer.gate", {"E3"}),
        ("model.embed_tokens", {"E3"}),
        ("language_model*", {"E1", "E4"}),
        ("*layers*", {"E1", "E2", "E4"}),
        ("*mlp*", {"E5"}),
        ("*mlp.fc1", {"E5"}),
    ],
)
def test_dead_broad_and_stray_patterns_are_named(
    make_view: ViewFactory, pattern: str, rules: set[str]
) -> None:
    found = failed(with_patterns(make_view(), pattern))
    assert rules == found.keys()
    assert all(pattern in found[rule].detail for rule in rules)


def test_layer_listed_as_quantized_but_absent_is_named(make_view: ViewFactory) -> None:
    view = make_view(mixed)
    layers = dict(view.config["quantization_config"]["quantized_layers"])
    layers[f"{LAYERS}.0.mixer.conv1d"] = {"quant_algo": "FP8"}
    view = with_config(view, quantization_config__quantized_layers=layers)
    assert {"D5", "E3"} <= failed(view).keys()


def test_naming_part_of_qkv_is_named(make_view: ViewFactory) -> None:
    found = failed(with_patterns(make_view(), f"{LAYERS}.3.mixer.q_proj"))
    assert "q_proj" in found["Q3"].detail


def test_what_cannot_be_known_reads_not_checked(make_view: ViewFactory) -> None:
    view = replace(make_view(), source=None, scalar_reader=None, shards={})
    skipped = {check.rule for check in check_server_rules(view) if check.passed is None}
    assert skipped == {"A2", "C7", "C13", "N5", "N7", "N8", "D7", "Q1", "Q2"}


def test_code_of_a_planned_checkpoint_reads_not_checked(make_view: ViewFactory) -> None:
    view = with_config(make_view(), auto_map={"AutoConfig": "configuration.Config"})
    (code,) = (check for check in check_server_rules(view) if check.rule == "C14")
    assert code.passed is None
    assert code.servers == ("vLLM", "TensorRT-LLM")


def test_code_that_is_named_in_no_object_is_refused(make_view: ViewFactory) -> None:
    view = with_config(make_view(), auto_map="configuration.Config")
    with pytest.raises(CheckpointError, match="auto_map: required an object, got 'configuration"):
        check_server_rules(view)


def test_weight_only_is_known_to_both_servers(make_view: ViewFactory) -> None:
    checks = [c for c in check_server_rules(make_view("nvfp4-w4a16")) if c.rule == "C9"]
    assert [check.passed for check in checks] == [True, True]


@pytest.mark.parametrize(("up_proj", "held"), [("fp8", True), ("nvfp4", False)])
def test_lm_head_of_a_mixed_checkpoint_needs_no_pattern(
    make_view: ViewFactory, up_proj: Format, held: bool
) -> None:
    view = make_view(lambda fqn: up_proj if fqn.endswith("up_proj") else "nvfp4")
    part = view.config["quantization_config"]
    assert (part["quant_algo"] == "MIXED_PRECISION") == held
    ignore = [pattern for pattern in part["ignore"] if "lm_head" not in pattern]
    bare = with_config(view, quantization_config=part | {"ignore": ignore})
    (d6,) = (check for check in check_server_rules(bare) if check.rule == "D6")
    assert d6.passed is held


def test_rules_load_without_torch() -> None:
    code = "import sys, nvvl.export.server_rules; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
