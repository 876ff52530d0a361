"""The Mamba2 mixer in a graph: one token (decode), or any number of them in chunks (prefill).

Prefill has no loop. Inside a chunk the recurrence is a masked matrix product, as in
``model/mamba2.py``; between chunks, where that file carries the state from one to the next, all
states follow at once from a small triangular matrix of decays, one row a chunk, whose first column
takes the incoming state. Its exponents are running sums that start at zero in each column
("segment sums"): differences of one long sum would lose digits.

Shapes: B batch, T tokens, C chunks, Q tokens of a chunk, G groups, J heads of a group, H = G J
heads, P head dim, N state, K convolution kernel, E = H P inner size. In prefill all is laid out
(B, C, G, J, rows, columns).
"""

import math
from dataclasses import dataclass

import torch
from onnx import TensorProto

from nvvl.export.onnx_graph import TO_END, Graph
from nvvl.export.onnx_layers import normalize_rms
from nvvl.export.onnx_linear import linear
from nvvl.export.onnx_weights import CheckpointWeights
from nvvl.model.config import LanguageConfig

_LENGTHS = "language_model.chunks"


@dataclass(frozen=True)
class MambaMixer:
    """Emits the Mamba2 mixers of one graph.

    Attributes:
        config: The language model.
        is_decode: Whether there is one new token.
    """

    config: LanguageConfig
    is_decode: bool

    @property
    def _per_group(self) -> int:
        return self.config.mamba_num_heads // self.config.n_groups

    def __call__(
        self, g: Graph, weights: CheckpointWeights, fqn: str, x: str, past: tuple[str, str]
    ) -> tuple[str, tuple[str, str]]:
        """Emit one mixer.

        Args:
            g: the graph.
            weights: the checkpoint's tensors.
            fqn: name of the mixer.
            x: (B, T, hidden) normalized.
            past: conv (B, conv_dim, K - 1) in the graph's dtype, ssm (B, H, P, N) float32.

        Returns:
            The mixed (B, T, hidden), and both states after the last token.
        """
        cfg = self.config
        inner, width = cfg.mamba_inner_size, cfg.n_groups * cfg.ssm_state_size
        gate, xbc, dt = g.split(
            linear(g, weights, f"{fqn}.in_proj", x),
            (inner, cfg.conv_dim, cfg.mamba_num_heads),
            at=fqn,
        )
        xbc, conv = self._convolve(g, weights, f"{fqn}.conv1d", xbc, past[0])
        xbc = g.op("Mul", xbc, g.op("Sigmoid", xbc, at=fqn), at=fqn)
        dt = self._time_step(g, weights, fqn, dt)
        name = f"{fqn}.A_log"
        log_a = g.weight(name, weights.float)
        a = g.op("Neg", g.op("Exp", log_a, at=name), at=name)
        scan = self._step if self.is_decode else self._scan
        y, ssm = scan(g, weights, fqn, (xbc, (inner, width, width)), dt, a, past[1])
        y = self._gated_norm(g, weights, f"{fqn}.norm", y, gate)
        return linear(g, weights, f"{fqn}.out_proj", y), (conv, ssm)

    def _convolve(
        self, g: Graph, weights: CheckpointWeights, fqn: str, xbc: str, state: str
    ) -> tuple[str, str]:
        """Convolve xBC (B, T, conv_dim) behind its state; returns it and the new state."""
        cfg = self.config
        columns = g.transpose(xbc, (0, 2, 1), at=fqn)
        window = g.op("Concat", state, columns, at=fqn, axis=2)  # (B, conv_dim, K - 1 + T)
        names = [f"{fqn}.weight", *([f"{fqn}.bias"] if cfg.use_conv_bias else [])]
        tensors = [g.weight(name, weights.graph) for name in names]
        out = g.op("Conv", window, *tensors, at=fqn, group=cfg.conv_dim)
        state = g.slice(window, 1 - cfg.conv_kernel, TO_END, 2, at=fqn)
        return g.transpose(out, (0, 2, 1), at=fqn), state

    def _time_step(self, g: Graph, weights: CheckpointWeights, fqn: str, dt: str) -> str:
        name = f"{fqn}.dt_bias"
        bias = g.weight(name, weights.float)
        dt = g.op("Softplus", g.op("Add", g.to_float(dt, at=name), bias, at=name), at=name)
        low, high = self.config.time_step_limit
        if low > 0:
            dt = g.op("Max", dt, g.constant(low), at=name)
        if math.isfinite(high):
            dt = g.op("Min", dt, g.constant(high), at=name)
        return dt

    def _gated_norm(self, g: Graph, weights: CheckpointWeights, fqn: str, y: str, gate: str) -> str:
        """Normalize y (B, T, E) float32, gated, in groups of channels."""
        cfg = self.config
        wide = g.to_float(gate, at=fqn)
        gated = g.op("Mul", y, g.op("Mul", wide, g.op("Sigmoid", wide, at=fqn), at=fqn), at=fqn)
        groups = g.reshape(gated, (0, 0, cfg.n_groups, -1), at=fqn)
        groups = normalize_rms(g, fqn, groups, eps=cfg.layer_norm_epsilon)
        name = f"{fqn}.weight"
        flat = g.reshape(groups, (0, 0, cfg.mamba_inner_size), at=fqn)
        scaled = g.op("Mul", g.weight(name, weights.float), flat, at=fqn)
        return g.to_graph(scaled, at=fqn)

    def _step(
        self,
        g: Graph,
        weights: CheckpointWeights,
        fqn: str,
        xbc: tuple[str, tuple[int, int, int]],
        dt: str,
        a: str,
        state: str,
    ) -> tuple[str, str]:
        """Advance the recurrence by one token; y (B, 1, E) float32 and the state."""
        cfg, at = self.config, f"{fqn}.ssm"
        groups, heads, size = cfg.n_groups, self._per_group, cfg.ssm_state_size
        x, b, c = g.split(g.to_float(xbc[0], at=at), xbc[1], at=at)
        x = g.reshape(x, (0, groups, heads, cfg.mamba_head_dim, 1), at=at)  # (B, G, J, P, 1)
        b, c = (g.reshape(side, (0, groups, 1, 1, size), at=at) for side in (b, c))
        decay = g.op("Exp", g.op("Mul", dt, a, at=at), at=at)  # (B, 1, H)
        decay, dt = (g.reshape(side, (0, groups, heads, 1, 1), at=at) for side in (decay, dt))
        old = g.reshape(state, (0, groups, heads, cfg.mamba_head_dim, size), at=at)
        update = g.op("Mul", g.op("Mul", x, dt, at=at), b, at=at)
        new = g.op("Add", g.op("Mul", old, decay, at=at), update, at=at)
        product = g.op("Mul", new, c, at=at)
        y = g.op("ReduceSum", product, g.constant([-1]), at=at, keepdims=1)
        y = g.op("Add", y, g.op("Mul", self._skip(g, weights, fqn), x, at=at), at=at)
        y = g.reshape(y, (0, 1, cfg.mamba_inner_size), at=at)
        shape = (0, cfg.mamba_num_heads, cfg.mamba_head_dim, size)
        return y, g.reshape(new, shape, at=at)

    def _scan(
        self,
        g: Graph,
        weights: CheckpointWeights,
        fqn: str,
        xbc: tuple[str, tuple[int, int, int]],
        dt: str,
        a: str,
        state: str,
    ) -> tuple[str, str]:
        """Run the recurrence over T tokens; y (B, T, E) float32 and the state after them."""
        cfg, at = self.config, f"{fqn}.ssm"
        groups, heads, size = cfg.n_groups, self._per_group, cfg.ssm_state_size
        chunk, rows = cfg.chunk_size, cfg.mamba_head_dim
        length, pads, lower, strict = g.shared("chunks", lambda: self._chunks(g, xbc[0]))
        padded = g.op("Pad", xbc[0], pads, at=at)
        x, b, c = g.split(padded, xbc[1], at=at)
        x = g.reshape(x, (0, -1, chunk, groups, heads, rows), at=at)
        x = g.transpose(x, (0, 1, 3, 4, 2, 5), at=at)  # (B, C, G, J, Q, P)
        b, c = (
            g.transpose(
                g.reshape(side, (0, -1, chunk, groups, 1, size), at=at), (0, 1, 3, 4, 2, 5), at=at
            )
            for side in (b, c)
        )  # (B, C, G, 1, Q, N)
        dt = g.op("Pad", dt, pads, at=at)  # zero steps leave the state untouched
        decay = g.op("Mul", dt, a, at=at)
        dt, decay = (
            g.transpose(
                g.reshape(side, (0, -1, chunk, groups, heads, 1), at=at), (0, 1, 3, 4, 2, 5), at=at
            )
            for side in (dt, decay)
        )  # (B, C, G, J, Q, 1)
        total = g.op("CumSum", decay, g.constant(4), at=at)
        inside = self._inside(g, at, x, b, c, dt, total)

        end = g.slice(total, -1, TO_END, 4, at=at)  # (B, C, G, J, 1, 1)
        to_end = g.op("Mul", dt, g.op("Exp", g.op("Sub", end, total, at=at), at=at), at=at)
        wide_x = g.to_float(x, at=at)
        weighted = g.transpose(
            g.op("Mul", wide_x, to_end, at=at), (0, 1, 2, 3, 5, 4), at=at
        )  # (B, C, G, J, P, Q)
        added = g.op("MatMul", weighted, g.to_float(b, at=at), at=at)  # (B, C, G, J, P, N)
        starts, last = self._between(g, at, added, end, state, lower, strict)

        starts = g.to_graph(g.transpose(starts, (0, 1, 2, 3, 5, 4), at=at), at=at)
        carried = g.to_float(g.op("MatMul", c, starts, at=at), at=at)  # (B, C, G, J, Q, P)
        carried = g.op("Mul", carried, g.op("Exp", total, at=at), at=at)
        y = g.op("Add", g.op("Mul", self._skip(g, weights, fqn), wide_x, at=at), inside, at=at)
        y = g.op("Add", y, carried, at=at)
        y = g.transpose(y, (0, 1, 4, 2, 3, 5), at=at)
        y = g.reshape(y, (0, -1, cfg.mamba_inner_size), at=at)
        return g.slice(y, 0, length, 1, at=at), last

    def _inside(self, g: Graph, at: str, x: str, b: str, c: str, dt: str, total: str) -> str:
        """Return what tokens of a chunk get from tokens of the same chunk, float32."""
        chunk = self.config.chunk_size
        causal = g.constant(torch.ones(chunk, chunk).tril())
        turned = (0, 1, 2, 3, 5, 4)
        products = g.to_float(g.op("MatMul", c, g.transpose(b, turned, at=at), at=at), at=at)
        products = g.op("Mul", products, causal, at=at)
        # a factor of the exponent, so that tokens to come cannot overflow
        between = g.op("Sub", total, g.transpose(total, turned, at=at), at=at)
        decays = g.op("Exp", g.op("Mul", between, causal, at=at), at=at)
        scores = g.op("Mul", decays, g.transpose(dt, turned, at=at), at=at)
        scores = g.to_graph(g.op("Mul", scores, products, at=at), at=at)
        return g.to_float(g.op("MatMul", scores, x, at=at), at=at)

    def _between(
        self, g: Graph, at: str, added: str, end: str, state: str, lower: str, strict: str
    ) -> tuple[str, str]:
        """Return the state each chunk starts from (B, C, G, J, P, N), and the last one."""
        cfg = self.config
        groups, heads = cfg.n_groups, self._per_group
        rows, size = cfg.mamba_head_dim, cfg.ssm_state_size
        old = g.reshape(state, (0, 1, groups, heads, rows * size), at=at)
        new = g.reshape(added, (0, 0, groups, heads, rows * size), at=at)
        sources = g.op("Concat", old, new, at=at, axis=1)  # (B, 1 + C, G, J, P N)
        sources = g.transpose(sources, (0, 2, 3, 1, 4), at=at)
        decays = g.transpose(
            g.reshape(end, (0, 0, groups, heads, 1), at=at), (0, 2, 3, 1, 4), at=at
        )
        front = g.constant([0, 0, 0, 1, 0, 0, 0, 0, 0, 0])
        decays = g.op("Pad", decays, front, at=at)  # (B, G, J, 1 + C, 1)
        sums = g.op("CumSum", g.op("Mul", decays, strict, at=at), g.constant(3), at=at)
        factors = g.op("Mul", g.op("Exp", sums, at=at), lower, at=at)  # (B, G, J, 1 + C, 1 + C)
        states = g.op("MatMul", factors, sources, at=at)
        last = g.slice(states, -1, TO_END, 3, at=at)
        starts = g.transpose(g.slice(states, 0, -1, 3, at=at), (0, 3, 1, 2, 4), at=at)
        starts = g.reshape(starts, (0, 0, 0, 0, rows, size), at=at)
        return starts, g.reshape(last, (0, cfg.mamba_num_heads, rows, size), at=at)

    def _chunks(self, g: Graph, xbc: str) -> tuple[str, str, str, str]:
        """Return T, the padding to whole chunks, and the (1 + C, 1 + C) triangles as float32."""
        at, chunk = _LENGTHS, self.config.chunk_size
        length = g.dim(xbc, 1, at=at)
        more = g.op("Add", length, g.constant([chunk - 1]), at=at)
        chunks = g.op("Div", more, g.constant([chunk]), at=at)
        padded = g.op("Mul", chunks, g.constant([chunk]), at=at)
        padding = g.op("Sub", padded, length, at=at)
        zero = g.constant([0])
        pads = g.op("Concat", zero, zero, zero, zero, padding, zero, at=at, axis=0)
        states = g.scalar(g.op("Add", chunks, g.constant([1]), at=at), at=at)
        places = g.op("Range", g.constant(0), states, g.constant(1), at=at)
        rows = g.unsqueeze(places, 1, at=at)
        columns = g.unsqueeze(places, 0, at=at)
        lower, strict = (
            g.op("Cast", g.op(op, rows, columns, at=at), at=at, to=TensorProto.FLOAT)
            for op in ("GreaterOrEqual", "Greater")
        )
        return length, pads, lower, strict

    def _skip(self, g: Graph, weights: CheckpointWeights, fqn: str) -> str:
        """Return D as (G, J, 1, 1)."""
        name = f"{fqn}.D"
        d = g.weight(name, weights.float)
        return g.reshape(d, (self.config.n_groups, self._per_group, 1, 1), at=name)
