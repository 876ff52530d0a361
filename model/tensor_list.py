"""The tensors a BF16 checkpoint of a config holds, known without torch and without weights.

The network itself says the same (`nvvl.model.load.expected_tensors` reads it off the modules); this
list exists so that a plan can be made in milliseconds, also where only config.json is at hand.
Tests compare the two.
"""

from collections.abc import Iterator

from nvvl.model.config import LanguageConfig, LayerKind, VisionConfig, VLMConfig
from nvvl.model.safetensors_io import TensorSpec

Entries = Iterator[tuple[str, tuple[int, ...]]]

# Dtypes that released checkpoints of this family use beside BF16; files may differ.
_OTHER_DTYPES = {
    "A_log": "F32",
    "D": "F32",
    "dt_bias": "F32",
    "norm_mean": "F32",
    "norm_std": "F32",
    "summary_idxs": "I64",
}


def list_tensors(config: VLMConfig) -> list[TensorSpec]:
    """Return name, usual dtype and shape of every tensor, in the order of the forward."""
    entries = [*_vision_tensors(config.vision), *_projector_tensors(config)]
    entries += _language_tensors(config.language)
    return [
        TensorSpec(name, _OTHER_DTYPES.get(name.rpartition(".")[2], "BF16"), shape)
        for name, shape in entries
    ]


def _vision_tensors(config: VisionConfig) -> Entries:
    size, wide = config.hidden_size, config.intermediate_size
    radio = "vision_model.radio_model"
    yield f"{radio}.input_conditioner.norm_mean", (3, 1, 1)
    yield f"{radio}.input_conditioner.norm_std", (3, 1, 1)
    if config.num_summary_idxs:
        yield f"{radio}.summary_idxs", (config.num_summary_idxs,)
    patches = f"{radio}.model.patch_generator"
    yield f"{patches}.cls_token.token", (config.num_prefix_tokens, size)
    yield f"{patches}.pos_embed", (1, config.num_positions, size)
    yield f"{patches}.embedder.weight", (size, 3 * config.patch_size**2)
    linears = {
        "attn.qkv": (3 * size, size),
        "attn.proj": (size, size),
        "mlp.fc1": (wide, size),
        "mlp.fc2": (size, wide),
    }
    for index in range(config.num_layers):
        block = f"{radio}.model.blocks.{index}"
        for norm in ("norm1", "norm2"):
            yield f"{block}.{norm}.weight", (size,)
            yield f"{block}.{norm}.bias", (size,)
        for leaf, (rows, columns) in linears.items():
            yield f"{block}.{leaf}.weight", (rows, columns)
            yield f"{block}.{leaf}.bias", (rows,)


def _projector_tensors(config: VLMConfig) -> Entries:
    yield "mlp1.0.weight", (config.projector_input_size,)
    yield "mlp1.1.weight", (config.projector_hidden_size, config.projector_input_size)
    yield "mlp1.3.weight", (config.language.hidden_size, config.projector_hidden_size)


def _language_tensors(config: LanguageConfig) -> Entries:
    size = config.hidden_size
    yield "language_model.backbone.embeddings.weight", (config.vocab_size, size)
    for index, kind in enumerate(config.layers):
        layer = f"language_model.backbone.layers.{index}"
        yield f"{layer}.norm.weight", (size,)
        for leaf, shape in _mixer_tensors(kind, config):
            yield f"{layer}.mixer.{leaf}", shape
    yield "language_model.backbone.norm_f.weight", (size,)
    yield "language_model.lm_head.weight", (config.vocab_size, size)


def _mixer_tensors(kind: LayerKind, config: LanguageConfig) -> Entries:
    size = config.hidden_size
    if kind == "mamba":
        inner, heads, channels = config.mamba_inner_size, config.mamba_num_heads, config.conv_dim
        yield "in_proj.weight", (inner + channels + heads, size)
        yield "conv1d.weight", (channels, 1, config.conv_kernel)
        if config.use_conv_bias:
            yield "conv1d.bias", (channels,)
        for leaf in ("A_log", "D", "dt_bias"):
            yield leaf, (heads,)
        yield "norm.weight", (inner,)
        yield "out_proj.weight", (size, inner)
    elif kind == "mlp":
        yield "up_proj.weight", (config.intermediate_size, size)
        yield "down_proj.weight", (size, config.intermediate_size)
    else:
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        yield "q_proj.weight", (queries, size)
        yield "k_proj.weight", (keys, size)
        yield "v_proj.weight", (keys, size)
        yield "o_proj.weight", (size, queries)
