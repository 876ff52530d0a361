"""The language model as two graphs: ``prefill`` takes any number of tokens, ``decode`` one.

Both take the states that the tokens before left behind and give the states after the new ones, so a
prompt may be prefilled in pieces and decoding goes on from either. Both give the logits of the last
new token, as float32. The states of layer ``i``, in this order:

    past_conv.i   present_conv.i    Mamba2     (B, conv_dim, K - 1)   graph's dtype
    past_ssm.i    present_ssm.i     Mamba2     (B, H, P, N)           float32
    past_key.i    present_key.i     attention  (B, V, S, D)           graph's dtype, or FP8
    past_value.i  present_value.i   attention  (B, V, S, D)           graph's dtype, or FP8

Either may be made as several graphs of consecutive layers: each but the first takes ``hidden_in``,
each but the last gives ``hidden_out`` (B, T, hidden), and each has the states of its own layers.

They take embeddings, or token ids and, in prefill, the image embeddings of these tokens.
At the start of a sequence all states are zero (a growing cache: S = 0). All rows of a batch have
the same number of tokens; there is no padding mask.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from nvvl.export.onnx_data import DataFile
from nvvl.export.onnx_graph import ONNX_DTYPES, TO_END, Dim, Graph
from nvvl.export.onnx_layers import POSITIONS, AttentionMixer, mlp, rms_norm
from nvvl.export.onnx_linear import linear
from nvvl.export.onnx_mamba import MambaMixer
from nvvl.export.onnx_recipe import GraphRecipe
from nvvl.export.onnx_weights import CheckpointWeights
from nvvl.model.config import LanguageConfig
from nvvl.progress import Progress

BACKBONE = "language_model.backbone"
EMBEDDINGS = f"{BACKBONE}.embeddings"


@dataclass(frozen=True)
class StatePair:
    """One state of one layer: what goes in and what comes out."""

    layer: int
    kind: str
    dtype: str
    past: tuple[Dim, ...]
    present: tuple[Dim, ...]

    @property
    def past_name(self) -> str:
        """Name of the input."""
        return f"past_{self.kind}.{self.layer}"

    @property
    def present_name(self) -> str:
        """Name of the output."""
        return f"present_{self.kind}.{self.layer}"


def list_states(
    config: LanguageConfig, recipe: GraphRecipe, layers: range | None = None
) -> list[StatePair]:
    """List the states of every layer, or of some, in the order of the graphs' inputs."""
    layers = range(len(config.layers)) if layers is None else layers
    return [state for layer in layers for state in _states(config, recipe, layer)]


def build_language_graph(
    weights: CheckpointWeights,
    recipe: GraphRecipe,
    data: DataFile,
    *,
    is_decode: bool,
    name: str | None = None,
    layers: range | None = None,
    progress: Progress | None = None,
) -> Graph:
    """Build ``prefill`` or ``decode``, or a part of it, writing weights to ``data`` by the layer.

    Args:
        weights: the checkpoint's tensors.
        recipe: what the graph looks like.
        data: the file both graphs share.
        is_decode: which of the two.
        name: of the graph, if it is a part.
        layers: consecutive layers to put in; all if None.
        progress: called after each layer.
    """
    config = weights.checkpoint.config.language
    name = name or ("decode" if is_decode else "prefill")
    layers = range(len(config.layers)) if layers is None else layers
    g = Graph(name, recipe.dtype, data)
    length: Dim = 1 if is_decode else "tokens"
    hidden: tuple[Dim, ...] = ("batch", length, config.hidden_size)
    if layers.start > 0:
        x = g.input("hidden_in", recipe.dtype, hidden)
    elif recipe.token_embedding == "inside":
        x = _embed(g, weights, length)
    else:
        x = g.input("inputs_embeds", recipe.dtype, hidden)
    if recipe.kv_cache == "fixed" and "attention" in [config.layers[layer] for layer in layers]:
        g.input(POSITIONS, "int64", (length,))
    states = list_states(config, recipe, layers)
    for state in states:
        g.input(state.past_name, state.dtype, state.past)
    mamba = MambaMixer(config, is_decode)
    attention = AttentionMixer(config, recipe.kv_cache, recipe.kv_dtype, is_decode)
    for layer in layers:
        kind = config.layers[layer]
        fqn = f"{BACKBONE}.layers.{layer}"
        mixer = f"{fqn}.mixer"
        normed = rms_norm(g, weights, f"{fqn}.norm", x, eps=config.layer_norm_epsilon)
        if kind == "mlp":
            mixed = mlp(g, weights, mixer, normed)
        else:
            pairs = [state for state in states if state.layer == layer]
            emit = mamba if kind == "mamba" else attention
            mixed, after = emit(g, weights, mixer, normed, (pairs[0].past_name, pairs[1].past_name))
            for pair, value in zip(pairs, after, strict=True):
                g.output(value, pair.present_name, pair.dtype, pair.present, at=mixer)
        x = g.op("Add", x, mixed, at=fqn)
        if progress is not None:
            progress(f"{name}: layer {layer}", layer + 1, len(config.layers))
    if layers.stop == len(config.layers):
        _emit_logits(g, weights, x, config, is_decode=is_decode)
    else:
        g.output(x, "hidden_out", recipe.dtype, hidden, at=f"{BACKBONE}.layers.{layers[-1]}")
    return g


def _embed(g: Graph, weights: CheckpointWeights, length: Dim) -> str:
    """Look token ids up; in prefill, image embeddings take the places of image tokens, in order.

    A model may write the image token, which then stands for no image: decode leaves it alone.
    """
    config, at = weights.checkpoint.config, EMBEDDINGS
    hidden = config.language.hidden_size
    ids = g.input("input_ids", "int64", ("batch", length))
    table = g.weight(f"{at}.weight", weights.graph)
    embeds = g.op("Gather", table, ids, at=at)
    if length == 1:
        return embeds
    images = g.input("image_embeds", g.dtype, ("image_tokens", hidden))
    # one more row, which all other tokens pick and do not use: there may be no image at all
    blank = g.op("Slice", table, g.constant([0]), g.constant([1]), g.constant([0]), at=at)
    rows = g.op("Concat", images, blank, at=at, axis=0)
    is_image = g.op("Equal", ids, g.constant(config.image_token_id), at=at)
    flat = g.reshape(is_image, (-1,), at=at)
    counts = g.op(
        "CumSum", g.op("Cast", flat, at=at, to=ONNX_DTYPES["int64"]), g.constant(0), at=at
    )
    numbers = g.op("Sub", counts, g.constant(1), at=at)
    places = g.op("Where", flat, numbers, g.dim(images, 0, at=at), at=at)
    picked = g.op("Gather", rows, places, at=at)
    shape = g.op("Shape", embeds, at=at)
    picked = g.op("Reshape", picked, shape, at=at)
    return g.op("Where", g.unsqueeze(is_image, -1, at=at), picked, embeds, at=at)


def _emit_logits(
    g: Graph, weights: CheckpointWeights, x: str, config: LanguageConfig, *, is_decode: bool
) -> None:
    """Emit norm and head over the last token."""
    norm, head = f"{BACKBONE}.norm_f", "language_model.lm_head"
    if not is_decode:
        x = g.slice(x, -1, TO_END, 1, at=norm)
    x = rms_norm(g, weights, norm, x, eps=config.layer_norm_epsilon)
    logits = g.to_float(linear(g, weights, head, x), at=head)
    logits = g.reshape(logits, (-1, config.vocab_size), at=head)
    g.output(logits, "logits", "f32", ("batch", config.vocab_size), at=head)
    # logits first: it is what most readers of a graph look for
    g.outputs.insert(0, g.outputs.pop())


def _states(config: LanguageConfig, recipe: GraphRecipe, layer: int) -> Iterator[StatePair]:
    kind = config.layers[layer]
    if kind == "mamba":
        conv = ("batch", config.conv_dim, config.conv_kernel - 1)
        ssm = ("batch", config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size)
        yield StatePair(layer, "conv", recipe.dtype, conv, conv)
        yield StatePair(layer, "ssm", "f32", ssm, ssm)
    elif kind == "attention":
        lengths: tuple[Dim, Dim] = (recipe.kv_capacity, recipe.kv_capacity)
        if recipe.kv_cache == "growing":
            lengths = ("past_tokens", "all_tokens")
        past, present = (
            ("batch", config.num_key_value_heads, length, config.head_dim) for length in lengths
        )
        dtype = recipe.dtype if recipe.kv_dtype == "same" else recipe.kv_dtype
        for leaf in ("key", "value"):
            yield StatePair(layer, leaf, dtype, past, present)
