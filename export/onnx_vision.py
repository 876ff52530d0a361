"""The ``vision`` graph: normalized tiles in, image embeddings of the language model out.

RADIO at a fixed tile size, pixel shuffle and ``mlp1``, with a dynamic number of tiles. The position
table is interpolated to the tile's grid when the graph is built. What ``model/vision.py`` does,
operation by operation.

Shapes: n tiles, S tile side, R patches per side, L tokens (prefix + patches), C channels.
"""

import torch

from nvvl.export.onnx_data import DataFile
from nvvl.export.onnx_graph import TO_END, Graph
from nvvl.export.onnx_layers import rms_norm, squared_relu
from nvvl.export.onnx_linear import linear
from nvvl.export.onnx_recipe import GraphRecipe
from nvvl.export.onnx_weights import CheckpointWeights
from nvvl.model.config import VLMConfig
from nvvl.model.vision import PatchGenerator
from nvvl.progress import Progress

RADIO = "vision_model.radio_model.model"


def build_vision_graph(
    weights: CheckpointWeights,
    recipe: GraphRecipe,
    data: DataFile,
    *,
    progress: Progress | None = None,
) -> Graph:
    """Build the graph; weights are written to ``data`` a block at a time.

    Args:
        weights: the checkpoint's tensors.
        recipe: what the graph looks like.
        data: the graph's data file.
        progress: called after each block.
    """
    config = weights.checkpoint.config
    size, num_layers = config.image_size, config.vision.num_layers
    g = Graph("vision", recipe.dtype, data)
    pixels = g.input("pixel_values", "f32", ("tiles", 3, size, size))
    x = _patches(g, weights, config, pixels)
    for index in range(num_layers):
        x = _block(g, weights, config, f"{RADIO}.blocks.{index}", x)
        if progress is not None:
            progress(f"vision: block {index}", index + 1, num_layers)
    x = g.slice(x, config.vision.num_prefix_tokens, TO_END, 1, at=RADIO)
    x = _project(g, weights, config, x)
    shape = ("tiles", config.tokens_per_tile, config.language.hidden_size)
    g.output(x, "image_embeds", recipe.dtype, shape, at="mlp1")
    return g


def _patches(g: Graph, weights: CheckpointWeights, config: VLMConfig, pixels: str) -> str:
    """Embed patches, add positions, put the prefix tokens in front: (n, L, C)."""
    fqn, vision = f"{RADIO}.patch_generator", config.vision
    side, size = config.image_size // vision.patch_size, vision.patch_size
    patches = g.reshape(pixels, (0, 3, side, size, side, size), at=fqn)
    patches = g.transpose(patches, (0, 2, 4, 1, 3, 5), at=fqn)
    patches = g.reshape(patches, (0, side * side, 3 * size * size), at=fqn)
    tokens = linear(g, weights, f"{fqn}.embedder", g.to_graph(patches, at=fqn))
    positions = g.weight(f"{fqn}.positions", lambda _: _positions(weights, config, side))
    tokens = g.op("Add", tokens, g.to_graph(positions, at=fqn), at=fqn)
    name = f"{fqn}.cls_token.token"
    prefix = g.unsqueeze(g.weight(name, weights.graph), 0, at=fqn)
    rest = g.constant([vision.num_prefix_tokens, vision.hidden_size])
    shape = g.op("Concat", g.dim(pixels, 0, at=fqn), rest, at=fqn, axis=0)
    prefix = g.op("Expand", prefix, shape, at=fqn)
    return g.op("Concat", prefix, tokens, at=fqn, axis=1)


def _positions(weights: CheckpointWeights, config: VLMConfig, side: int) -> torch.Tensor:
    """Interpolate the position table to the tile's grid: (1, R * R, C) float32."""
    with torch.device("meta"):
        generator = PatchGenerator(config.vision)
    table = weights.float(f"{RADIO}.patch_generator.pos_embed")
    generator.pos_embed = torch.nn.Parameter(table, requires_grad=False)
    return generator.positions(side, side).contiguous()


def _block(g: Graph, weights: CheckpointWeights, config: VLMConfig, fqn: str, x: str) -> str:
    attended = _attention(g, weights, config, f"{fqn}.attn", _layer_norm(g, weights, fqn, "1", x))
    x = g.op("Add", x, attended, at=fqn)
    inner = linear(g, weights, f"{fqn}.mlp.fc1", _layer_norm(g, weights, fqn, "2", x), bias=True)
    inner = g.op("Gelu", inner, at=f"{fqn}.mlp")
    return g.op("Add", x, linear(g, weights, f"{fqn}.mlp.fc2", inner, bias=True), at=fqn)


def _layer_norm(g: Graph, weights: CheckpointWeights, block: str, number: str, x: str) -> str:
    fqn = f"{block}.norm{number}"
    scale, bias = (g.weight(f"{fqn}.{leaf}", weights.graph) for leaf in ("weight", "bias"))
    return g.op("LayerNormalization", x, scale, bias, at=fqn, axis=-1, epsilon=1e-6)


def _attention(g: Graph, weights: CheckpointWeights, config: VLMConfig, fqn: str, x: str) -> str:
    heads = config.vision.num_heads
    qkv = linear(g, weights, f"{fqn}.qkv", x, bias=True)
    width = config.vision.hidden_size // heads
    qkv = g.reshape(qkv, (0, 0, 3, heads, width), at=fqn)
    qkv = g.transpose(qkv, (2, 0, 3, 1, 4), at=fqn)
    query, key, value = (
        g.op("Squeeze", part, g.constant([0]), at=fqn)
        for part in g.split(qkv, (1, 1, 1), at=fqn, axis=0)
    )
    y = g.op("Attention", query, key, value, at=fqn)
    y = g.reshape(g.transpose(y, (0, 2, 1, 3), at=fqn), (0, 0, config.vision.hidden_size), at=fqn)
    return linear(g, weights, f"{fqn}.proj", y, bias=True)


def _project(g: Graph, weights: CheckpointWeights, config: VLMConfig, x: str) -> str:
    """Pixel shuffle and projector: (n, R * R, C) -> (n, tokens_per_tile, hidden)."""
    at, side, factor = "mlp1", config.tokens_per_side, config.shuffle
    x = g.reshape(x, (0, side, factor, side, factor, config.vision.hidden_size), at=at)
    order = (0, 1, 3, 2, 4, 5) if config.ps_version == "v2" else (0, 3, 1, 2, 4, 5)
    x = g.transpose(x, order, at=at)
    x = g.reshape(x, (0, config.tokens_per_tile, config.projector_input_size), at=at)
    x = rms_norm(g, weights, "mlp1.0", x, eps=1e-5)
    x = squared_relu(g, linear(g, weights, "mlp1.1", x), at="mlp1.2")
    return linear(g, weights, "mlp1.3", x)
