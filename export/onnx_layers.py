"""The layers around the Mamba2 mixer in a graph: norms, MLP and attention.

They follow ``model/vlm.py``, ``model/vision.py`` and ``model/attention.py`` operation by operation;
`nvvl.export.onnx_parity` proves that they do.

Keys and values are a state: either it grows by the new tokens, or it has a fixed capacity and the
new tokens are written at the places that the input ``positions`` names. A query looks at every key
up to its own. Where the state is FP8, new keys and values are rounded before anything looks at
them, so that prefill in one piece, in many, and decoding see the same numbers.

Shapes: B batch, T new tokens, S tokens of the state, H query heads, V key-value heads, D head dim.
"""

from dataclasses import dataclass
from typing import Literal

from nvvl.export.onnx_graph import ONNX_DTYPES, Graph
from nvvl.export.onnx_linear import linear
from nvvl.export.onnx_weights import CheckpointWeights
from nvvl.model.config import LanguageConfig

KVCache = Literal["fixed", "growing"]
KVDtype = Literal["same", "fp8"]

POSITIONS = "positions"


def rms_norm(g: Graph, weights: CheckpointWeights, fqn: str, x: str, *, eps: float) -> str:
    """Emit an RMSNorm over the last dimension, in float32."""
    wide = normalize_rms(g, fqn, g.to_float(x, at=fqn), eps=eps)
    name = f"{fqn}.weight"
    scaled = g.op("Mul", g.weight(name, weights.float), wide, at=fqn)
    return g.to_graph(scaled, at=fqn)


def normalize_rms(g: Graph, at: str, wide: str, *, eps: float) -> str:
    """Emit ``wide / sqrt(mean(wide^2) + eps)`` over the last dimension of a float32 value."""
    mean = g.op("ReduceMean", g.op("Mul", wide, wide, at=at), g.constant([-1]), at=at, keepdims=1)
    root = g.op("Sqrt", g.op("Add", mean, g.constant(eps), at=at), at=at)
    return g.op("Mul", wide, g.op("Reciprocal", root, at=at), at=at)


def squared_relu(g: Graph, x: str, *, at: str) -> str:
    """Emit ``relu(x)^2``."""
    positive = g.op("Relu", x, at=at)
    return g.op("Mul", positive, positive, at=at)


def mlp(g: Graph, weights: CheckpointWeights, fqn: str, x: str) -> str:
    """Emit the MLP mixer."""
    inner = squared_relu(g, linear(g, weights, f"{fqn}.up_proj", x), at=f"{fqn}.act")
    return linear(g, weights, f"{fqn}.down_proj", inner)


@dataclass(frozen=True)
class AttentionMixer:
    """Emits the attention mixers of one graph.

    Attributes:
        config: The language model.
        kv_cache: How keys and values are kept.
        kv_dtype: As what: ``fp8`` as E4M3 codes with a scale of 1.
        is_decode: Whether there is one new token.
    """

    config: LanguageConfig
    kv_cache: KVCache
    kv_dtype: KVDtype
    is_decode: bool

    def __call__(
        self, g: Graph, weights: CheckpointWeights, fqn: str, x: str, past: tuple[str, str]
    ) -> tuple[str, tuple[str, str]]:
        """Emit one mixer.

        Args:
            g: the graph.
            weights: the checkpoint's tensors.
            fqn: name of the mixer.
            x: (B, T, hidden) normalized.
            past: keys and values, each (B, V, S, D), in the dtype they are kept in.

        Returns:
            The mixed (B, T, hidden), and keys and values with the new tokens, in that dtype.
        """
        cfg = self.config
        query = self._heads(g, linear(g, weights, f"{fqn}.q_proj", x), cfg.num_attention_heads, fqn)
        new = [
            self._heads(
                g, linear(g, weights, f"{fqn}.{leaf}", x), cfg.num_key_value_heads, f"{fqn}.{leaf}"
            )
            for leaf in ("k_proj", "v_proj")
        ]
        keys, values = (
            self._extend(g, f"{fqn}.{kind}", old, add)
            for kind, old, add in zip(("key", "value"), past, new, strict=True)
        )
        mask = self._mask(g, past[0], x)
        y = g.op("Attention", query, keys, values, *([mask] if mask else []), at=fqn)
        y = g.reshape(
            g.transpose(y, (0, 2, 1, 3), at=fqn),
            (0, 0, cfg.num_attention_heads * cfg.head_dim),
            at=fqn,
        )
        kept = tuple(
            self._keep(g, f"{fqn}.{kind}", side)
            for kind, side in (("key", keys), ("value", values))
        )
        return linear(g, weights, f"{fqn}.o_proj", y), (kept[0], kept[1])

    def _extend(self, g: Graph, at: str, old: str, new: str) -> str:
        """Return old and new keys or values as what is computed with."""
        if self.kv_dtype == "fp8":
            one = g.constant(1.0, "graph")
            old = g.op("DequantizeLinear", old, one, at=f"{at}.past")
            new = g.op("DequantizeLinear", self._keep(g, f"{at}.new", new), one, at=f"{at}.new")
        return self._append(g, at, old, new)

    def _keep(self, g: Graph, at: str, side: str) -> str:
        """Return keys or values as they are kept; those that were FP8 are it again, unchanged."""
        if self.kv_dtype == "same":
            return side
        one, fp8 = g.constant(1.0, "graph"), ONNX_DTYPES["fp8"]
        return g.op("QuantizeLinear", side, one, at=at, output_dtype=fp8)

    def _heads(self, g: Graph, x: str, num_heads: int, at: str) -> str:
        """(B, T, heads x D) -> (B, heads, T, D)."""
        parts = g.reshape(x, (0, 0, num_heads, self.config.head_dim), at=at)
        return g.transpose(parts, (0, 2, 1, 3), at=at)

    def _append(self, g: Graph, at: str, old: str, new: str) -> str:
        if self.kv_cache == "growing":
            return g.op("Concat", old, new, at=at, axis=2)
        places = g.shared("kv places", lambda: self._places(g, new))
        return g.op("ScatterND", old, places, new, at=at)

    def _places(self, g: Graph, new: str) -> str:
        """Return where each new (b, v, t) goes in the cache: (B, V, T, 3) int64."""
        at = "language_model.kv_cache"
        batch = self._range(g, g.dim(new, 0, at=at), at=at)
        heads = g.constant(list(range(self.config.num_key_value_heads)))
        shape = g.op("Shape", new, at=at, start=0, end=3)
        sides = (
            g.op("Unsqueeze", batch, g.constant([1, 2]), at=at),
            g.op("Unsqueeze", heads, g.constant([0, 2]), at=at),
            g.op("Unsqueeze", POSITIONS, g.constant([0, 1]), at=at),
        )
        full = [g.unsqueeze(g.op("Expand", side, shape, at=at), -1, at=at) for side in sides]
        return g.op("Concat", *full, at=at, axis=-1)

    def _mask(self, g: Graph, past_key: str, x: str) -> str | None:
        """Return (T, keys) bool, True where a query may look; None if it may look everywhere."""
        if self.kv_cache == "fixed":
            return g.shared("attention mask", lambda: self._mask_of_positions(g, past_key))
        if self.is_decode:
            return None
        return g.shared("attention mask", lambda: self._causal_mask(g, past_key, x))

    def _mask_of_positions(self, g: Graph, past_key: str) -> str:
        at = "language_model.attention_mask"
        places = self._range(g, g.dim(past_key, 2, at=at), at=at)
        queries = g.unsqueeze(POSITIONS, 1, at=at)
        return g.op("LessOrEqual", g.unsqueeze(places, 0, at=at), queries, at=at)

    def _causal_mask(self, g: Graph, past_key: str, x: str) -> str:
        at = "language_model.attention_mask"
        past, length = g.dim(past_key, 2, at=at), g.dim(x, 1, at=at)
        places = self._range(g, g.op("Add", past, length, at=at), at=at)
        queries = g.op("Add", self._range(g, length, at=at), past, at=at)
        return g.op(
            "LessOrEqual", g.unsqueeze(places, 0, at=at), g.unsqueeze(queries, 1, at=at), at=at
        )

    @staticmethod
    def _range(g: Graph, count: str, *, at: str) -> str:
        """Return 0, 1, ... as an int64 vector; ``count`` is a vector of one."""
        return g.op("Range", g.constant(0), g.scalar(count, at=at), g.constant(1), at=at)
