"""Tiny random models in the released layout, and the random weights that tests give to modules.

Everything is drawn from a seed and a tensor's name, so a fixture gives the same bytes in every
test and in whatever order tests run.
"""

import contextlib
import copy
import json
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn

from nvvl.compiler import load_library
from nvvl.errors import HardwareError
from nvvl.model import scan
from nvvl.model.checkpoint import CheckpointWriter, TensorSpec
from nvvl.model.config import VLMConfig
from nvvl.model.load import expected_tensors
from nvvl.model.safetensors_io import dtype_name
from nvvl.quantize import kernels

BASE_SPECIALS = ["<unk>", "<s>", "</s>", *(f"<SPECIAL_{i}>" for i in range(3, 20))]
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n")]
VISION_SPECIALS = [
    *("<image>", "<img>", "</img>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"),
    "<video>",
]

TINY_CONFIG: dict[str, Any] = {
    "architectures": ["NemotronH_Nano_VL_V2"],
    "model_type": "NemotronH_Nano_VL_V2",
    "torch_dtype": "bfloat16",
    "force_image_size": 32,
    "patch_size": 8,
    "downsample_ratio": 0.5,
    "ps_version": "v2",
    "image_tag_type": "internvl",
    "use_thumbnail": True,
    "max_num_tiles": 12,
    "vit_hidden_size": 64,
    "projector_hidden_size": 128,
    "img_context_token": "<image>",
    "img_context_token_id": 280,
    "img_start_token": "<img>",
    "img_end_token": "</img>",
    "video_context_token": "<video>",
    "video_context_token_id": 289,
    "norm_mean": [0.48145466, 0.4578275, 0.40821073],
    "norm_std": [0.26862954, 0.26130258, 0.27577711],
    "llm_config": {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "torch_dtype": "bfloat16",
        "vocab_size": 304,
        "hidden_size": 64,
        "num_hidden_layers": 7,
        "hybrid_override_pattern": "M-M*-M-",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 128,
        "mlp_hidden_act": "relu2",
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 2,
        "conv_kernel": 4,
        "chunk_size": 8,
        "mamba_hidden_act": "silu",
        "use_conv_bias": True,
        "layer_norm_epsilon": 1e-05,
        "tie_word_embeddings": False,
        "time_step_limit": [0.0, "Infinity"],
        "bos_token_id": 1,
        "eos_token_id": 12,
        "pad_token_id": 0,
    },
    "vision_config": {
        "model_type": "radio",
        "patch_size": 8,
        "args": {
            "model": "vit_tiny_test",
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "cpe_max_size": 64,
            "cls_token_per_teacher": True,
            "teachers": [{"name": "clip"}, {"name": "siglip"}, {"name": "dino_v2"}],
            "register_multiple": 4,
        },
    },
}

ConfigFactory = Callable[..., dict[str, Any]]
CheckpointFactory = Callable[..., Path]


def random_tensor(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Draw a float32 tensor at the scale a trained tensor of that name has."""
    # torch's CPU generator uses the low 32 bits of a seed only, so the seed is hashed in
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode(), seed))
    leaf = name.rsplit(".", 1)[-1]
    noise = torch.randn(shape, generator=generator)
    if leaf == "A_log":
        return torch.log(1 + 15 * torch.rand(shape, generator=generator))
    if leaf == "dt_bias":  # time steps from 0.001 to 0.1 after softplus
        steps = torch.exp(torch.rand(shape, generator=generator) * 4.6 - 6.9)
        return torch.log(torch.expm1(steps))
    if leaf == "norm_mean":
        return torch.tensor(TINY_CONFIG["norm_mean"]).reshape(shape)
    if leaf == "norm_std":
        return torch.tensor(TINY_CONFIG["norm_std"]).reshape(shape)
    if leaf == "D" or (leaf == "weight" and len(shape) == 1):
        return 1 + 0.1 * noise
    if leaf == "bias":
        return 0.1 * noise
    if len(shape) == 2 and leaf == "weight" and "embeddings" not in name:
        return noise / shape[1] ** 0.5
    return 0.5 * noise


def pytest_configure(config: pytest.Config) -> None:
    """Compile the kernels before any test process starts, else each does so within a test."""
    if not hasattr(config, "workerinput"):
        with contextlib.suppress(HardwareError):  # without a compiler, tests say so themselves
            for source in (kernels._SOURCE, scan._SOURCE):
                load_library(source)


@pytest.fixture(scope="session")
def memory_for_engines() -> Iterator[None]:
    """Let tiny engines be built whatever is free; a builder asks for 600 MB at least."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nvvl.export.engine.available_memory", lambda: 2**36)
        yield


@pytest.fixture
def compiler() -> str:
    """Give the C compiler; without one these tests would prove the plain path alone."""
    found = shutil.which("cc")
    if found is None:
        pytest.fail("no C compiler: the kernels cannot be tested; install gcc (Debian: gcc)")
    return found


@pytest.fixture(scope="session")
def randomize() -> Callable[..., None]:
    """Return a function that fills a module's parameters with random values of a seed."""

    def fill(module: nn.Module, *, seed: int = 0) -> None:
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(random_tensor(name, tuple(parameter.shape), seed))
                parameter.requires_grad_(False)

    return fill


@pytest.fixture(scope="session")
def make_config() -> ConfigFactory:
    """Return a function that builds a tiny config.json as a dict.

    ``language``, ``vision`` and ``vision_args`` update the nested parts, other keywords the top
    level; the layer count follows ``hybrid_override_pattern``.
    """

    def build(
        *,
        language: dict[str, Any] | None = None,
        vision: dict[str, Any] | None = None,
        vision_args: dict[str, Any] | None = None,
        **top: Any,
    ) -> dict[str, Any]:
        config = copy.deepcopy(TINY_CONFIG) | top
        config["llm_config"] |= language or {}
        pattern = config["llm_config"]["hybrid_override_pattern"]
        config["llm_config"]["num_hidden_layers"] = len(pattern)
        config["vision_config"] |= vision or {}
        config["vision_config"]["args"] |= vision_args or {}
        return config

    return build


@pytest.fixture(scope="session")
def tiny_config(make_config: ConfigFactory) -> VLMConfig:
    """A hybrid model of seven layers with 32-pixel tiles of four tokens."""
    return VLMConfig.from_dict(make_config())


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Tokenizer:
    """A byte-level BPE with the special tokens at the ids the tiny config names."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = [*BASE_SPECIALS, *alphabet, *("".join(pair) for pair in MERGES)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocab)}, MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True) for token in [*BASE_SPECIALS, *VISION_SPECIALS]]
    )
    return tokenizer


@pytest.fixture(scope="session")
def make_checkpoint(make_config: ConfigFactory, tiny_tokenizer: Tokenizer) -> CheckpointFactory:
    """Return a function that writes a random BF16 checkpoint folder in the released layout.

    Keywords: ``seed``; ``max_shard_bytes`` for several shards; ``ssm_dtype`` of A_log, D and
    dt_bias; ``replace`` a mapping of tensor names to tensors (or None to leave one out); the rest
    as `make_config`.
    """

    def build(
        folder: Path,
        *,
        seed: int = 0,
        max_shard_bytes: int = 10**9,
        ssm_dtype: torch.dtype = torch.float32,
        replace: dict[str, Tensor | None] | None = None,
        **overrides: Any,
    ) -> Path:
        values = make_config(**overrides)
        config = VLMConfig.from_dict(values)
        vision = config.vision
        config = config.with_shapes(
            prefix_tokens=vision.num_prefix_tokens, positions=vision.num_positions, summary_idxs=2
        )
        tensors: dict[str, Tensor] = {}
        for name, shape in expected_tensors(config).items():
            tensor = random_tensor(name, shape, seed)
            if name.endswith("summary_idxs"):
                tensor = torch.tensor([0, 1])
            elif name.endswith(("A_log", ".D", "dt_bias")):
                tensor = tensor.to(ssm_dtype)
            elif "input_conditioner" not in name:
                tensor = tensor.bfloat16()
            tensors[name] = tensor
        for name, changed in (replace or {}).items():
            tensors.pop(name, None)
            if changed is not None:
                tensors[name] = changed
        layout = [TensorSpec(n, dtype_name(t.dtype), tuple(t.shape)) for n, t in tensors.items()]
        with CheckpointWriter(folder, layout, max_shard_bytes=max_shard_bytes) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)
            writer.finish()
        write_side_files(folder, values, tiny_tokenizer)
        return folder

    return build


def write_side_files(folder: Path, config: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Write config.json, the tokenizer and the small files that come with a released model."""
    files: dict[str, Any] = {
        "config.json": config,
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": [12], "pad_token_id": 0},
        "preprocessor_config.json": {"image_size": config["force_image_size"]},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "<SPECIAL_12>",
            "unk_token": "<unk>",
            "clean_up_tokenization_spaces": False,
        },
    }
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values, indent=1), encoding="utf-8")
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="session")
def tiny_checkpoint(
    make_checkpoint: CheckpointFactory, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with the tiny model; tests must not change it."""
    return make_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")
