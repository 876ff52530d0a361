import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from nvvl.errors import CheckpointError, ConfigError
from nvvl.model.checkpoint import Checkpoint
from nvvl.model.config import VLMConfig
from nvvl.model.load import (
    check_tensors,
    expected_tensors,
    load_model,
    materialize,
    resolve_model,
)
from nvvl.model.vlm import NemotronNanoVL

FULL_SIZE = Path(__file__).parents[2] / "benchmarks" / "config-12b.json"
LAYERS = "language_model.backbone.layers"
RADIO = "vision_model.radio_model"


def full_size_tensors() -> dict[str, tuple[int, ...]]:
    config = VLMConfig.from_dict(json.loads(FULL_SIZE.read_text(encoding="utf-8")))
    return expected_tensors(config)


# --- names and shapes ---------------------------------------------------------------------------


def test_full_size_names_and_shapes_are_the_released_ones() -> None:
    tensors = full_size_tensors()
    expected = {
        "language_model.backbone.embeddings.weight": (131584, 5120),
        "language_model.backbone.norm_f.weight": (5120,),
        "language_model.lm_head.weight": (131584, 5120),
        f"{LAYERS}.0.norm.weight": (5120,),
        f"{LAYERS}.0.mixer.in_proj.weight": (22656, 5120),
        f"{LAYERS}.0.mixer.conv1d.weight": (12288, 1, 4),
        f"{LAYERS}.0.mixer.conv1d.bias": (12288,),
        f"{LAYERS}.0.mixer.A_log": (128,),
        f"{LAYERS}.0.mixer.D": (128,),
        f"{LAYERS}.0.mixer.dt_bias": (128,),
        f"{LAYERS}.0.mixer.norm.weight": (10240,),
        f"{LAYERS}.0.mixer.out_proj.weight": (5120, 10240),
        f"{LAYERS}.1.mixer.up_proj.weight": (20480, 5120),
        f"{LAYERS}.1.mixer.down_proj.weight": (5120, 20480),
        f"{LAYERS}.7.mixer.q_proj.weight": (5120, 5120),
        f"{LAYERS}.7.mixer.k_proj.weight": (1024, 5120),
        f"{LAYERS}.7.mixer.v_proj.weight": (1024, 5120),
        f"{LAYERS}.7.mixer.o_proj.weight": (5120, 5120),
        f"{RADIO}.input_conditioner.norm_mean": (3, 1, 1),
        f"{RADIO}.input_conditioner.norm_std": (3, 1, 1),
        f"{RADIO}.model.patch_generator.cls_token.token": (10, 1280),
        f"{RADIO}.model.patch_generator.pos_embed": (1, 16384, 1280),
        f"{RADIO}.model.patch_generator.embedder.weight": (1280, 768),
        f"{RADIO}.model.blocks.31.norm1.weight": (1280,),
        f"{RADIO}.model.blocks.31.norm2.bias": (1280,),
        f"{RADIO}.model.blocks.31.attn.qkv.weight": (3840, 1280),
        f"{RADIO}.model.blocks.31.attn.qkv.bias": (3840,),
        f"{RADIO}.model.blocks.31.attn.proj.weight": (1280, 1280),
        f"{RADIO}.model.blocks.31.mlp.fc1.bias": (5120,),
        f"{RADIO}.model.blocks.31.mlp.fc2.weight": (1280, 5120),
        "mlp1.0.weight": (5120,),
        "mlp1.1.weight": (20480, 5120),
        "mlp1.3.weight": (5120, 20480),
    }
    assert expected.items() <= tensors.items()
    # nothing beyond these names, at any depth
    pattern = {re.sub(r"\.\d+\.(?=[a-z])", ".N.", name) for name in expected}
    pattern |= {name.replace("norm2.bias", "norm2.weight") for name in pattern}
    pattern |= {name.replace("norm1.weight", "norm1.bias") for name in pattern}
    pattern |= {name.replace("proj.weight", "proj.bias") for name in pattern if "attn" in name}
    pattern |= {name.replace("fc1.bias", "fc1.weight") for name in pattern}
    pattern |= {name.replace("fc2.weight", "fc2.bias") for name in pattern}
    assert {re.sub(r"\.\d+\.(?=[a-z])", ".N.", name) for name in tensors} == pattern


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        (r"mixer\.(in_proj|out_proj)\.weight", 28 * (22656 * 5120 + 5120 * 10240)),
        (r"mixer\.(up_proj|down_proj)\.weight", 28 * 2 * 20480 * 5120),
        (r"mixer\.[qkvo]_proj\.weight", 6 * (2 * 5120 + 2 * 1024) * 5120),
        (r"mixer\.\w+_proj\.weight", 10_965_483_520),  # all linears of the language model
        (r"(embeddings|lm_head)\.weight", 2 * 131584 * 5120),
        (r"^mlp1", 209_720_320),
        (r"vision.*patch_generator", (10 + 16384 + 768) * 1280),
        (r"vision.*blocks", 32 * (12 * 1280**2 + 13 * 1280)),
    ],
)
def test_full_size_parameter_budget(pattern: str, count: int) -> None:
    tensors = full_size_tensors()
    found = sum(math.prod(shape) for name, shape in tensors.items() if re.search(pattern, name))
    assert found == count


# --- loading ------------------------------------------------------------------------------------


def test_loaded_tensors_are_those_on_disk(tiny_checkpoint: Path) -> None:
    model = load_model(tiny_checkpoint, dtype=None)
    checkpoint = Checkpoint(tiny_checkpoint)
    state = model.state_dict()
    assert state.keys() == checkpoint.tensors.keys()
    for name, tensor in state.items():
        stored = checkpoint.load(name)
        assert tensor.dtype == stored.dtype
        assert tensor.equal(stored)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_parameters_are_converted_but_for_ssm_parameters_and_buffers(
    dtype: torch.dtype, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    ssm_dtype = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    folder = make_checkpoint(tmp_path / "x", ssm_dtype=ssm_dtype)
    model = load_model(folder, dtype=dtype)
    for name, parameter in model.named_parameters():
        kept = name.endswith((".A_log", ".D", ".dt_bias"))
        assert parameter.dtype == (ssm_dtype if kept else dtype), name
    buffers = dict(model.named_buffers())
    assert buffers[f"{RADIO}.input_conditioner.norm_mean"].dtype == torch.float32
    assert buffers[f"{RADIO}.summary_idxs"].tolist() == [0, 1]


def test_sharded_folder_loads_like_a_single_file(
    tiny_checkpoint: Path, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    sharded = make_checkpoint(tmp_path / "sharded", max_shard_bytes=100_000)
    one, many = (load_model(folder).state_dict() for folder in (tiny_checkpoint, sharded))
    assert all(one[name].equal(many[name]) for name in one)


def test_checkpoint_without_summary_idxs_loads(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_checkpoint(tmp_path / "x", replace={f"{RADIO}.summary_idxs": None})
    assert f"{RADIO}.summary_idxs" not in load_model(folder).state_dict()


def test_one_layer_is_filled_and_the_rest_stays_unread(tiny_checkpoint: Path) -> None:
    checkpoint = Checkpoint(tiny_checkpoint)
    with torch.device("meta"):
        model = NemotronNanoVL(checkpoint.config)
    layer = model.language_model.backbone.get_submodule("layers.0")
    materialize(layer, f"{LAYERS}.0", checkpoint, dtype=torch.bfloat16, device="cpu")
    assert {parameter.device.type for parameter in layer.parameters()} == {"cpu"}
    assert model.language_model.lm_head.weight.is_meta
    stored = checkpoint.load(f"{LAYERS}.0.mixer.in_proj.weight")
    assert layer.get_parameter("mixer.in_proj.weight").equal(stored)


def test_every_misfit_is_listed_in_one_error(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_checkpoint(
        tmp_path / "x",
        replace={
            "mlp1.0.weight": None,
            f"{LAYERS}.3.mixer.q_proj.weight": None,
            "mlp1.1.bias": torch.zeros(128),
            "mlp1.3.weight": torch.zeros(64, 64),
        },
    )
    with pytest.raises(CheckpointError) as caught:
        load_model(folder)
    assert str(caught.value).endswith(
        "4 tensors do not fit config.json: "
        f"{LAYERS}.3.mixer.q_proj.weight is missing; mlp1.0.weight is missing; "
        "mlp1.1.bias is unexpected; "
        "mlp1.3.weight has shape (64, 64), required (64, 128); download it again"
    )


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("mlp1.0.weight", torch.full((256,), math.nan), "mlp1.0.weight: holds NaN or Inf"),
        ("mlp1.0.weight", torch.full((256,), -math.inf), "mlp1.0.weight: holds NaN or Inf"),
        (f"{LAYERS}.0.mixer.D", torch.tensor([1, math.inf, 1, 1]), "mixer.D: holds NaN or Inf"),
        (
            "mlp1.0.weight",
            torch.zeros(256, dtype=torch.uint8),
            "mlp1.0.weight: required one of BF16, F16, F32, F64, got U8",
        ),
    ],
)
def test_unusable_weight_is_refused_by_name(
    name: str,
    tensor: torch.Tensor,
    message: str,
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    folder = make_checkpoint(tmp_path / "x", replace={name: tensor})
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8"), (torch.uint8, "U8")]
)
def test_codes_that_no_config_declares_are_refused_from_the_headers(
    dtype: torch.dtype, name: str, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    codes: dict[str, torch.Tensor | None] = {
        "mlp1.3.weight": torch.zeros(64, 128).to(dtype),
        f"{LAYERS}.6.mixer.up_proj.weight": torch.zeros(128, 64).to(dtype),
    }
    checkpoint = Checkpoint(make_checkpoint(tmp_path / "x", replace=codes))
    with pytest.raises(CheckpointError) as caught:
        check_tensors(checkpoint, expected_tensors(checkpoint.config))
    assert str(caught.value).endswith(
        f"model.safetensors: {LAYERS}.6.mixer.up_proj.weight: required one of BF16, F16, F32, F64, "
        f"got {name} (and 1 more tensors); give the BF16 checkpoint that it was made from"
    )


def test_quantized_folder_is_refused(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "x", quantization_config={"quant_method": "modelopt"})
    with pytest.raises(CheckpointError, match="has a quantization_config; required the BF16"):
        load_model(folder)


# --- what MODEL may be --------------------------------------------------------------------------


def test_existing_folder_is_itself(tiny_checkpoint: Path) -> None:
    assert resolve_model(str(tiny_checkpoint)) == tiny_checkpoint


def test_embedded_names_the_folder_in_the_package(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nvvl.model.__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(ConfigError, match=r"embedded: .*holds no model; .*tools/embedded_model"):
        resolve_model("embedded")
    shutil.copytree(tiny_checkpoint, tmp_path / "embedded")
    assert resolve_model("embedded") == tmp_path / "embedded"


@pytest.mark.parametrize("model", ["nothing", "/no/such/folder", "a/b/c", "../x", "s3://a/b", ""])
def test_what_is_neither_folder_nor_hub_id_is_refused(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where nothing of these names is
    with pytest.raises(ConfigError, match="required 'embedded', an existing folder or a Hub id"):
        resolve_model(model)


@pytest.mark.parametrize("weights", [True, False])
def test_hub_id_is_downloaded_without_pickles(
    weights: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, object] = {}

    def download(repo_id: str, *, allow_patterns: list[str]) -> str:
        asked.update(repo_id=repo_id, allow_patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("nvidia/some-model", weights=weights) == tmp_path
    texts = ["*.json", "*.txt", "*.jinja", "*.model", "*.py"]
    assert asked == {
        "repo_id": "nvidia/some-model",
        "allow_patterns": [*texts, "*.safetensors"] if weights else texts,
    }


def test_unreachable_hub_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("Cannot reach the Hub.\nSecond line.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ConfigError, match=r"org/name: no such folder.*\(Cannot reach the Hub\.\)"):
        resolve_model("org/name")
