"""What ``nvvl export serve`` says of checkpoints that servers can and cannot take."""

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from nvvl.calib_data.manifest import load_calibration_set
from nvvl.cli import app
from nvvl.export.serve import ServingPlan, make_serving_plan
from nvvl.export.servers import SERVERS, ServerName
from nvvl.export.view import open_view
from nvvl.quantize.presets import PRESETS
from nvvl.quantize.recipe import Rule
from nvvl.quantize.walk import quantize_checkpoint

SERVER_NAMES: tuple[ServerName, ...] = ("vllm", "tensorrt-llm", "sglang", "edge-llm")


def plan(folder: Path, name: ServerName) -> ServingPlan:
    return make_serving_plan(open_view(folder), name)


def change_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def as_released(folder: Path) -> Path:
    """Give a folder the code file, template and vision sizes that a released checkpoint brings."""
    (folder / "configuration.py").write_text("")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    vision = json.loads((folder / "config.json").read_text())["vision_config"]
    vision["args"] = {"model": "vit_huge_patch16_224", "teachers": vision["args"]["teachers"]}
    vision["args"]["register_multiple"] = 4
    return change_config(
        folder, auto_map={"AutoConfig": "configuration.Config"}, vision_config=vision
    )


@pytest.mark.parametrize("scheme", ["fp8", "nvfp4"])
@pytest.mark.parametrize("name", ["vllm", "tensorrt-llm", "sglang"])
def test_released_layout_is_served(
    copy_of: Callable[[str], Path], scheme: str, name: ServerName
) -> None:
    served = plan(as_released(copy_of(scheme)), name)
    assert served.passed
    assert served.obstacles == []


def test_commands_name_the_folder_and_the_format(copy_of: Callable[[str], Path]) -> None:
    folder = as_released(copy_of("nvfp4"))
    words = shlex.split(plan(folder, "vllm").commands[-1])
    assert words[:3] == ["vllm", "serve", str(folder)]
    assert "--trust-remote-code" in words
    media = json.loads(words[words.index("--media-io-kwargs") + 1])
    assert media == {"video": {"fps": 2, "num_frames": 128}}
    assert "--quantization modelopt_fp4" in plan(folder, "sglang").commands[0]
    config, command = plan(folder, "tensorrt-llm").commands
    assert "enable_block_reuse: false" in config
    assert command.startswith("trtllm-serve ")
    assert "--video_pruning_rate 0.75" in command
    assert "--max-kv-cache-capacity 8192" in plan(folder, "edge-llm").commands[-1]


def test_context_is_the_models_own(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("fp8")
    values = json.loads((folder / "config.json").read_text())
    language = {**values["llm_config"], "max_position_embeddings": 2048}
    change_config(folder, llm_config=language)
    assert "--max-model-len 2048" in plan(folder, "vllm").commands[0]


def test_path_with_a_space_is_quoted(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("fp8")
    renamed = folder.rename(folder.with_name("my checkpoint"))
    assert shlex.split(plan(renamed, "vllm").commands[0])[2] == str(renamed)


@pytest.mark.parametrize("name", SERVER_NAMES[:3])
def test_weights_only_is_served(copy_of: Callable[[str], Path], name: ServerName) -> None:
    served = plan(as_released(copy_of("nvfp4-w4a16")), name)
    assert served.passed
    assert (name == "vllm") != any("older releases" in note for note in served.notes)


def test_edge_llm_keeps_inputs_of_weights_only(copy_of: Callable[[str], Path]) -> None:
    commands = plan(as_released(copy_of("nvfp4-w4a16")), "edge-llm").commands
    assert len(commands) == 1  # its server has no such option
    assert "--no-quantize-activations" in commands[0]


def test_sglang_takes_mixed_layers_but_no_quantized_attention(
    copy_of: Callable[[str], Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    refused = plan(as_released(copy_of("mixed")), "sglang")
    assert [line.split(":")[0] for line in refused.obstacles] == [
        "quantized attention in MIXED_PRECISION"
    ]
    rules = (
        Rule(target="*.up_proj", format="fp8"),
        Rule(target="*.down_proj", format="nvfp4"),
    )
    recipe = replace(PRESETS["mixed"](), rules=rules)
    items = load_calibration_set("default", num_items=2)
    quantize_checkpoint(tiny_checkpoint, tmp_path / "mlp", recipe, items)
    served = plan(as_released(tmp_path / "mlp"), "sglang")
    assert served.obstacles == []
    assert "--quantization modelopt_mixed" in served.commands[0]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"model": "vit_tiny_test"}, "vision tower 'vit_tiny_test': it builds vit_small_patch16"),
        (
            {"model": "vit_small_patch16_224", "hidden_size": 256, "num_attention_heads": 6},
            "vision tower vit_small_patch16_224 with hidden_size 256 (not 384): it goes",
        ),
    ],
)
def test_sglang_builds_towers_by_name(
    copy_of: Callable[[str], Path], args: dict[str, Any], said: str
) -> None:
    folder = as_released(copy_of("fp8"))
    vision = json.loads((folder / "config.json").read_text())["vision_config"]
    change_config(folder, vision_config=vision | {"args": args})
    (obstacle,) = plan(folder, "sglang").obstacles
    assert obstacle.startswith(said)


def test_folder_without_code_cannot_be_configured(written: Callable[[str], Path]) -> None:
    served = plan(written("fp8"), "vllm")
    assert not served.passed
    assert "no configuration class" in served.obstacles[0]
    assert "--trust-remote-code" not in served.commands[0]


@pytest.mark.parametrize("name", ["vllm", "tensorrt-llm"])
@pytest.mark.parametrize(
    ("auto_map", "lost"),
    [
        ({"AutoConfig": "configuration.Config"}, "configuration.py"),
        ({"AutoConfig": "org/model--configuration.Config"}, "configuration.py"),
        (
            {"AutoConfig": "code.Config", "AutoTokenizer": ["tokenization.Slow", None]},
            "tokenization.py",
        ),
    ],
    ids=["name", "repository", "list"],
)
def test_code_that_the_config_names_must_be_in_the_folder(
    copy_of: Callable[[str], Path], name: ServerName, auto_map: dict[str, Any], lost: str
) -> None:
    folder = change_config(copy_of("fp8"), auto_map=auto_map)
    (folder / "code.py").write_text("")
    refused = plan(folder, name)
    assert not refused.passed
    assert any(line.startswith("FAILS C14 (") and lost in line for line in refused.lines())
    assert not any("trust" in command for command in refused.commands)
    (folder / lost).write_text("")
    served = plan(folder, name)
    assert served.passed
    assert any("trust" in command for command in served.commands)


def test_edge_llm_takes_only_its_own_vision_tower(copy_of: Callable[[str], Path]) -> None:
    refused = plan(copy_of("fp8"), "edge-llm")
    said = "\n".join(refused.obstacles)
    assert "heads of 16" in said  # 4 heads over a width of 64
    assert "2 layers" in said
    assert "no chat template" in said


def test_edge_llm_takes_the_released_vision_tower(copy_of: Callable[[str], Path]) -> None:
    folder = as_released(copy_of("fp8"))
    vision = {
        "args": {"model": "vit_huge_patch16_224", "teachers": [], "register_multiple": 10},
        "patch_size": 16,
        "preferred_resolution": [512, 512],
    }
    change_config(folder, vit_hidden_size=1280, vision_config=vision)
    said = plan(folder, "edge-llm").obstacles
    # the tensors are still the tiny model's, with another number of class tokens
    assert [line.split(":")[0] for line in said] == ["4 class and register tokens"]


def test_broken_rule_is_named_and_fails(copy_of: Callable[[str], Path]) -> None:
    folder = change_config(as_released(copy_of("fp8")), ps_version=None)
    broken = plan(folder, "sglang")
    assert not broken.passed
    assert any(line.startswith("FAILS C5 (") for line in broken.lines())


def test_only_rules_of_the_server_are_listed(written: Callable[[str], Path]) -> None:
    for name in SERVER_NAMES:
        checks = plan(written("nvfp4"), name).checks
        assert checks
        assert all(SERVERS[name].title in check.servers for check in checks)


def test_verb_prints_the_command_and_exits_by_the_verdict(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("nvfp4")
    refused = CliRunner().invoke(app, ["export", "serve", str(folder), "--for", "vllm"])
    assert refused.exit_code == 1
    assert "cannot take: no configuration class" in refused.stdout
    as_released(folder)
    served = CliRunner().invoke(app, ["export", "serve", str(folder), "--for", "vllm", "--json"])
    assert served.exit_code == 0
    assert json.loads(served.stdout)["commands"][0].startswith("vllm serve ")


def test_quantized_source_is_refused(written: Callable[[str], Path]) -> None:
    run = str(written("nvfp4"))
    refused = CliRunner().invoke(app, ["export", "serve", run, "--for", "vllm", "--against", run])
    assert refused.exit_code == 2
    assert "holds quantized weights; required the BF16 checkpoint" in refused.stderr
