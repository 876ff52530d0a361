import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nvvl.errors import ConfigError
from nvvl.model.config import VLMConfig

FULL_SIZE = Path(__file__).parents[2] / "benchmarks" / "config-12b.json"
Config = dict[str, Any]


@pytest.fixture(scope="module")
def full_size() -> Config:
    values: Config = json.loads(FULL_SIZE.read_text(encoding="utf-8"))
    return values


def test_full_size_geometry(full_size: Config) -> None:
    config = VLMConfig.from_dict(full_size)
    language, vision = config.language, config.vision
    assert [i for i, kind in enumerate(language.layers) if kind == "attention"] == [
        *(7, 16, 25, 34, 43, 52)
    ]
    assert (language.layers.count("mamba"), language.layers.count("mlp")) == (28, 28)
    assert (language.mamba_inner_size, language.conv_dim) == (10240, 12288)
    assert (vision.hidden_size, vision.num_layers, vision.num_heads) == (1280, 32, 16)
    assert (vision.num_prefix_tokens, vision.num_positions) == (10, 16384)
    assert (config.tokens_per_side, config.tokens_per_tile) == (16, 256)
    assert (config.shuffle, config.projector_input_size) == (2, 5120)
    assert config.image_token_id == 131072


def test_raw_config_is_kept_to_be_written_back(full_size: Config) -> None:
    assert VLMConfig.from_dict(full_size).raw == full_size


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("[0.0, Infinity]", (0.0, math.inf)),
        ('[0.0, "Infinity"]', (0.0, math.inf)),
        ('[0.0, {"__float__": "Infinity"}]', (0.0, math.inf)),  # as transformers 5 writes it
        ("[0.001, 0.1]", (0.001, 0.1)),
    ],
)
def test_time_step_limit_is_read_in_every_spelling(
    limit: str, expected: tuple[float, float], make_config: Callable[..., Config], tmp_path: Path
) -> None:
    text = json.dumps(make_config(language={"time_step_limit": "LIMIT"}))
    (tmp_path / "config.json").write_text(text.replace('"LIMIT"', limit))
    assert VLMConfig.from_folder(tmp_path).language.time_step_limit == expected


def test_language_part_may_be_called_text_config(make_config: Callable[..., Config]) -> None:
    values = make_config()
    renamed = {("text_config" if k == "llm_config" else k): v for k, v in values.items()}
    assert VLMConfig.from_dict(renamed) == VLMConfig.from_dict(values)


def test_explicit_vision_sizes_override_the_timm_name(make_config: Callable[..., Config]) -> None:
    values = make_config(
        vit_hidden_size=32, vision_args={"model": "vit_huge_patch16_224", "hidden_size": 32}
    )
    vision = VLMConfig.from_dict(values).vision
    assert (vision.hidden_size, vision.num_layers) == (32, 2)


@pytest.mark.parametrize(
    ("teachers", "multiple", "expected"),
    [
        (["a", "b", "c"], 10, 10),
        (["a", "b", "a"], 8, 8),  # a teacher named twice has one token
        (["a", "b", "c"], None, 3),
        (["a", "b", "c", "d"], 4, 8),  # a whole multiple gets another one of registers
    ],
)
def test_prefix_tokens_are_counted_as_radio_does(
    teachers: list[str], multiple: int | None, expected: int, make_config: Callable[..., Config]
) -> None:
    args = {"teachers": [{"name": name} for name in teachers], "register_multiple": multiple}
    assert VLMConfig.from_dict(make_config(vision_args=args)).vision.num_prefix_tokens == expected


@pytest.mark.parametrize(
    "key",
    [
        "ps_version",
        "norm_mean",
        "img_context_token_id",
        "use_thumbnail",
        "vision_config",
        "downsample_ratio",
    ],
)
def test_missing_top_level_key_is_named(key: str, make_config: Callable[..., Config]) -> None:
    values = make_config()
    del values[key]
    with pytest.raises(ConfigError, match=f"config.json: missing {key}"):
        VLMConfig.from_dict(values)


@pytest.mark.parametrize(
    ("language", "message"),
    [
        ({"hybrid_override_pattern": "M-E*"}, r"layers \['E'\] are not supported"),
        ({"hidden_size": 0}, "llm_config.hidden_size: required a positive integer, got 0"),
        ({"hidden_size": "64"}, "llm_config.hidden_size: required a positive integer"),
        ({"head_dim": None}, "llm_config.head_dim: required a positive integer, got None"),
        ({"chunk_size": 0}, "llm_config.chunk_size: required a positive integer, got 0"),
        ({"time_step_limit": None}, "llm_config.time_step_limit: required 2 numbers, got None"),
        ({"time_step_limit": [0, "x"]}, r"time_step_limit: required 2 numbers, got \[0, 'x'\]"),
        ({"time_step_limit": [math.nan] * 2}, "time_step_limit: required a finite number and one"),
        ({"time_step_limit": [5, 1]}, r"that is no less, got \[5, 1\]"),
        ({"time_step_limit": [math.inf] * 2}, "time_step_limit: required a finite number and one"),
        ({"time_step_limit": [0, 10**400]}, "required 2 numbers that a float can hold"),
        ({"layer_norm_epsilon": math.inf}, "epsilon: required a positive number of at most 1"),
        ({"layer_norm_epsilon": 0}, "epsilon: required a positive number of at most 1, got 0"),
        ({"layer_norm_epsilon": True}, "epsilon: required a positive number of at most 1"),
        ({"vocab_size": 10**30}, "llm_config.vocab_size: required at most 16777216, got 10000"),
        ({"hidden_size": 10**12}, "llm_config.hidden_size: required at most 16777216, got 1000"),
        ({"use_conv_bias": "false"}, "use_conv_bias: required true or false, got 'false'"),
        ({"attention_bias": "false"}, "attention_bias: required true or false, got 'false'"),
        ({"pad_token_id": "x"}, "pad_token_id: required a token id below the vocab_size of"),
        ({"pad_token_id": 10**6}, "pad_token_id: required a token id below the vocab_size of"),
        ({"hybrid_override_pattern": ""}, "required 1 to 1024 layers, got 0"),
        ({"hybrid_override_pattern": "M" * 1025}, "required 1 to 1024 layers, got 1025"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple"),
        ({"n_groups": 3}, "mamba_num_heads 4 is not a multiple of n_groups 3"),
        ({"attention_bias": True}, "attention_bias: only false is supported"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings: only false is supported"),
        ({"mlp_hidden_act": "silu"}, "mlp_hidden_act: required relu2, got silu"),
    ],
)
def test_unsupported_language_config_is_refused(
    language: Config, message: str, make_config: Callable[..., Config]
) -> None:
    with pytest.raises(ConfigError, match=message):
        VLMConfig.from_dict(make_config(language=language))


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "eos_token_id", "ssm_state_size"])
def test_missing_language_key_is_named(key: str, make_config: Callable[..., Config]) -> None:
    values = make_config()
    del values["llm_config"][key]
    with pytest.raises(ConfigError, match=f"llm_config: missing {key}"):
        VLMConfig.from_dict(values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
            r"required architecture NemotronH_Nano_VL_V2, got \['LlamaForCausalLM'\]",
        ),
        ({"ps_version": "v3"}, "ps_version: required v1 or v2, got 'v3'"),
        ({"vit_hidden_size": 128}, "vit_hidden_size 128 disagrees"),
        ({"patch_size": 16}, "patch_size 16 disagrees"),
        ({"force_image_size": 40}, "force_image_size: 40 is not a multiple"),
        ({"norm_mean": [0.5]}, r"norm_mean: required 3 numbers, got \[0\.5\]"),
        ({"norm_std": None}, "norm_std: required 3 numbers, got None"),
        ({"downsample_ratio": 0}, r"downsample_ratio: required a number from 0\.01 to 1, got 0"),
        ({"downsample_ratio": 5e-324}, r"downsample_ratio: required a number from 0\.01 to 1"),
        ({"norm_mean": [math.nan] * 3}, "norm_mean: required 3 numbers from -1e.06 to 1e.06, got"),
        ({"norm_mean": [10**400] * 3}, "norm_mean: required 3 numbers that a float can hold, got"),
        ({"norm_std": [0, 0, 0]}, r"norm_std: required 3 numbers from 1e-06 .*, got \[0, 0, 0\]"),
        ({"norm_std": [1, math.inf, 1]}, "norm_std: required 3 numbers from 1e-06"),
        ({"norm_std": [True, 1, 1]}, "norm_std: required 3 numbers, got"),
        ({"use_thumbnail": "false"}, "use_thumbnail: required true or false, got 'false'"),
        ({"max_num_tiles": 300_000}, "max_num_tiles: required at most 1024, got 300000"),
        ({"force_image_size": 16 * 10**30}, "force_image_size: required at most 8192, got 160"),
        ({"img_context_token_id": 764.0}, "img_context_token_id: required a token id below"),
        ({"img_context_token_id": None}, "img_context_token_id: required a token id, got null"),
        ({"img_context_token": 3}, "img_context_token: required the text of a token, got 3"),
        ({"img_start_token": ""}, "img_start_token: required the text of a token, got ''"),
        ({"quantization_config": "x"}, "quantization_config: required a JSON object, got str"),
        ({"auto_map": "x"}, "auto_map: required a JSON object, got str"),
        ({"downsample_ratio": "0.5"}, "downsample_ratio: required a number .*, got '0.5'"),
        ({"max_num_tiles": 0}, "max_num_tiles: required a positive integer, got 0"),
        ({"force_image_size": None}, "force_image_size: required a positive integer, got None"),
        ({"vision": {"patch_size": 0}}, "vision_config.patch_size: required a positive integer"),
        ({"vision_args": {"intermediate_size": "4"}}, "args.intermediate_size: required a posi"),
        ({"vision_args": {"hidden_size": None, "model": "vit_odd"}}, "'vit_odd' is not one of"),
        ({"vision_args": {"model": ["vit"]}}, r"args.model: required a name, got \['vit'\]"),
        ({"vision_args": {"teachers": "clip"}}, "args.teachers: required a list of objects"),
        ({"vision_args": {"teachers": [{"name": []}]}}, r"teachers: required names as text, got "),
        ({"vision_args": {"cls_token_per_teacher": "no"}}, "cls_token_per_teacher: required true"),
        ({"vision_args": {"num_hidden_layers": 2000}}, "num_hidden_layers: required at most 1024"),
        ({"vision_args": {"register_multiple": "8"}}, "register_multiple: required a count"),
        ({"architectures": 3}, "architectures: required a list, got 3"),
        ({"language": {"layer_norm_epsilon": "1e-5"}}, "epsilon: required a positive number"),
        ({"language": {"eos_token_id": None}}, "eos_token_id: required a token id or a list"),
        ({"language": {"eos_token_id": [2, "x"]}}, "eos_token_id: required a token id or a list"),
    ],
)
def test_contradictory_config_is_refused(
    changes: Config, message: str, make_config: Callable[..., Config]
) -> None:
    with pytest.raises(ConfigError, match=message):
        VLMConfig.from_dict(make_config(**changes))


def test_several_tokens_may_end_an_answer(make_config: Callable[..., Config]) -> None:
    config = VLMConfig.from_dict(make_config(language={"eos_token_id": [2, 12]}))
    assert config.language.eos_token_ids == (2, 12)


def test_tokens_may_be_null_where_there_is_a_usual_one(make_config: Callable[..., Config]) -> None:
    config = VLMConfig.from_dict(make_config(video_context_token=None, quantization_config=None))
    assert config.video_token == "<video>"


def test_teachers_may_be_null(make_config: Callable[..., Config]) -> None:
    config = VLMConfig.from_dict(make_config(vision_args={"teachers": None}))
    assert config.vision.num_prefix_tokens == 4  # one class token and three registers


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"vision_config": None}, "vision_config"),
        ({"vision_config": {"args": None}}, r"vision_config\.args"),
        ({"llm_config": None}, "llm_config"),
    ],
)
def test_part_that_is_no_object_is_named(
    change: Config, name: str, make_config: Callable[..., Config]
) -> None:
    with pytest.raises(ConfigError, match=f"{name}: required a JSON object, got NoneType"):
        VLMConfig.from_dict(make_config() | change)


def test_layer_count_must_fit_the_pattern(make_config: Callable[..., Config]) -> None:
    values = make_config()
    values["llm_config"]["num_hidden_layers"] = 8
    with pytest.raises(ConfigError, match=r"num_hidden_layers is 8 .* has 7 layers"):
        VLMConfig.from_dict(values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "required a JSON object, got list"),
        (b"\xff", "not valid"),
        ("[" * 100_000, "not valid JSON"),
        ("9" * 5000, "not valid JSON"),
    ],
)
def test_unreadable_file_is_named(text: str | bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=message):
        VLMConfig.from_folder(tmp_path)
