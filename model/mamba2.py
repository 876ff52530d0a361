"""The Mamba2 mixer: projection, causal convolution, state-space scan, gated norm, projection.

The scan is the chunked form of Mamba2 (Dao and Gu, arXiv 2405.21060, section 6): inside a chunk
the recurrence is a masked matrix product, between chunks one state per head is carried. Heads of a
group share B and C; the products below work on groups, so B and C are never repeated per head.
States go in and come out explicitly, which is what chunked prefill, decoding and graph export need.

The time step is clamped to ``time_step_limit`` in every path, as the released remote code and the
servers do. transformers clamps it at ``time_step_min`` in its prefill alone, so it agrees
with this file wherever no time step lies below that bound.

Shapes: B batch, T tokens, H heads, P head dim, G groups, J heads per group (H = G J), N state,
C chunks, Q tokens of a chunk, K convolution kernel, E inner size H P.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvvl.model.config import LanguageConfig
from nvvl.model.mamba_kernels import pick_kernels
from nvvl.model.packing import Packing
from nvvl.model.products import Linear, product_dtype
from nvvl.model.scan import CHUNK, pick_scan

MambaState = tuple[Tensor, Tensor]

# On a CPU, longer chunks spend their time inside chunks, shorter ones on states; the tokens that
# are scanned at once are few, so that memory does not grow with the prompt and stays in the caches.
CPU_CHUNK_SIZE = CHUNK
CPU_SPAN = 256


class GatedRMSNorm(nn.Module):
    """RMSNorm over groups of channels of ``x * silu(gate)``, in float32."""

    def __init__(self, size: int, *, num_groups: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.num_groups = num_groups
        self.eps = eps

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """Normalize ``x`` (..., E) gated by ``gate`` (..., E); returns the dtype of ``gate``."""
        gated = x.float() * F.silu(gate.float())
        groups = gated.unflatten(-1, (self.num_groups, -1))
        groups = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight.float() * groups.flatten(-2)).to(gate.dtype)


class Mamba2Mixer(nn.Module):
    """Mamba2 mixer with explicit convolution and state-space states.

    ``in_proj`` gives gate (E), the convolved xBC (E + 2 G N) and dt (H), in this order.
    """

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.config = config
        inner, heads = config.mamba_inner_size, config.mamba_num_heads
        self.in_proj = Linear(config.hidden_size, inner + config.conv_dim + heads, bias=False)
        self.conv1d = nn.Conv1d(
            config.conv_dim,
            config.conv_dim,
            config.conv_kernel,
            groups=config.conv_dim,
            bias=config.use_conv_bias,
        )
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.norm = GatedRMSNorm(inner, num_groups=config.n_groups, eps=config.layer_norm_epsilon)
        self.out_proj = Linear(inner, config.hidden_size, bias=False)

    def forward(
        self,
        x: Tensor,
        *,
        state: MambaState | None = None,
        padding_mask: Tensor | None = None,
        packing: Packing | None = None,
    ) -> tuple[Tensor, MambaState]:
        """Mix ``x`` (B, T, hidden) along T.

        Args:
            x: normalized hidden states.
            state: (conv (B, conv_dim, K - 1), ssm (B, H, P, N) float32) of the tokens before, or
                None at the start of a sequence.
            padding_mask: (B, T) bool, True on real tokens; padding must be on the left.
            packing: the sequences each row holds; needs a state of None.

        Returns:
            The mixed hidden states (B, T, hidden) and the state after the last token.
        """
        cfg = self.config
        batch, length, _ = x.shape
        gate, xbc, dt = self.in_proj(x).split(
            [cfg.mamba_inner_size, cfg.conv_dim, cfg.mamba_num_heads], dim=-1
        )
        if padding_mask is not None:
            xbc = xbc * padding_mask[..., None]
        conv_state = (
            xbc.new_zeros(batch, cfg.conv_dim, cfg.conv_kernel - 1) if state is None else state[0]
        )
        taps, bias = self.conv1d.weight, self.conv1d.bias
        if packing is None:
            xbc, conv_state = causal_conv(xbc, taps, bias, conv_state)
        else:
            xbc, conv_state = packed_conv(xbc, taps, bias, packing)
        width = cfg.n_groups * cfg.ssm_state_size
        values, b, c = F.silu(xbc).split([cfg.mamba_inner_size, width, width], dim=-1)

        dt = F.softplus(dt.float() + self.dt_bias.float()).clamp(*cfg.time_step_limit)
        if padding_mask is not None:
            dt = dt * padding_mask[..., None]
        ssm_state = (
            torch.zeros(
                batch,
                cfg.mamba_num_heads,
                cfg.mamba_head_dim,
                cfg.ssm_state_size,
                device=x.device,
            )
            if state is None
            else state[1]
        )
        arguments = (
            values.unflatten(-1, (cfg.mamba_num_heads, -1)),  # (B, T, H, P)
            dt,
            -torch.exp(self.A_log.float()),
            b.unflatten(-1, (cfg.n_groups, -1)),  # (B, T, G, N)
            c.unflatten(-1, (cfg.n_groups, -1)),
            self.D.float(),
            ssm_state,
        )
        if packing is not None:
            y, ssm_state = packed_scan(*arguments, chunk_size=cfg.chunk_size, packing=packing)
        else:
            scan = ssm_step if length == 1 else ssm_scan
            y, ssm_state = scan(*arguments, chunk_size=cfg.chunk_size)
        y = self.norm(y.flatten(-2), gate)
        return self.out_proj(y.to(x.dtype)), (conv_state, ssm_state)


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Convolve each channel over the tokens up to and including its own.

    Args:
        x: (B, T, channels).
        weight: (channels, 1, K).
        bias: (channels,) or None.
        state: (B, channels, K - 1), the last inputs before ``x``.

    Returns:
        The convolved (B, T, channels) and the state after ``x``.
    """
    length = x.shape[1]
    window = torch.cat([state.to(x.dtype).transpose(1, 2), x], dim=1)  # (B, K-1+T, channels)
    if x.is_cuda:  # depthwise convolutions are slow there, their weight gradients above all
        taps = weight.squeeze(1).float().unbind(-1)
        start = torch.zeros_like(taps[0]) if bias is None else bias.float()
        products = (window[:, k : k + length] * tap for k, tap in enumerate(taps))
        out = sum(products, start).to(x.dtype)
    else:  # two-dimensional, because only that takes channels last without a transposed copy
        wide = product_dtype(x)
        image = window.to(wide).transpose(1, 2).unsqueeze(2)  # (B, channels, 1, K-1+T)
        kernel = weight.to(wide).unsqueeze(2)
        bias = None if bias is None else bias.to(wide)
        out = F.conv2d(image, kernel, bias, groups=weight.shape[0]).squeeze(2)
        out = out.transpose(1, 2).to(x.dtype)
    # a copy, because a view would keep the whole window alive
    return out, window[:, length:].transpose(1, 2).contiguous()


def packed_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, packing: Packing
) -> tuple[Tensor, Tensor]:
    """Do what `causal_conv` does for each sequence of a packed ``x`` from an empty state.

    K - 1 zeros before each sequence keep the sequences apart.
    """
    gap = weight.shape[-1] - 1
    places = packing.places(gap)
    spread = _spread(x, places, x.shape[1] + gap * len(packing.lengths))
    out, state = causal_conv(spread[:, gap:], weight, bias, spread[:, :gap].transpose(1, 2))
    return out.index_select(1, places - gap), state


def ssm_step(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    state: Tensor,
    *,
    chunk_size: int = 1,
) -> tuple[Tensor, Tensor]:
    """Advance the recurrence by one token; arguments and results as `ssm_scan` with T = 1."""
    groups = b.shape[2]
    x, dt = x[:, 0].float(), dt[:, 0]  # (B, H, P), (B, H)
    b, c = (side[:, 0].float().unsqueeze(2) for side in (b, c))  # (B, G, 1, N)
    scaled = (x * dt[..., None]).unflatten(1, (groups, -1))  # (B, G, J, P)
    update = scaled[..., None] * b[..., None, :]  # (B, G, J, P, N)
    state = state * torch.exp(dt * a)[..., None, None] + update.flatten(1, 2)
    y = (state.unflatten(1, (groups, -1)) * c[..., None, :]).sum(-1).flatten(1, 2)
    return (y + d[:, None] * x).unsqueeze(1), state


def ssm_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    state: Tensor,
    *,
    chunk_size: int,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the Mamba2 recurrence over T tokens in chunks.

    A GPU takes all chunks at once, or runs `nvvl.model.mamba_kernels`; a CPU takes shorter chunks,
    and ``CPU_SPAN`` tokens at once, or runs `nvvl.model.scan`.

    ``state_t = exp(dt_t a) state_(t-1) + dt_t x_t b_t^T`` and ``y_t = state_t c_t + d x_t``.

    Args:
        x: (B, T, H, P).
        dt: (B, T, H) float32, after softplus; zero leaves the state untouched.
        a: (H,) float32, negative.
        b: (B, T, G, N).
        c: (B, T, G, N).
        d: (H,) float32.
        state: (B, H, P, N) float32, before the first token.
        chunk_size: Q; any value gives the same result up to rounding.
        keep: (C,) float32 for T of whole chunks, 0 where the state is set to zero before a chunk,
            1 elsewhere; chunks are those of `chunk_length`.

    Returns:
        y (B, T, H, P) float32 and the state after the last token (B, H, P, N) float32.
    """
    chunk = chunk_length(chunk_size, x.device)
    compiled = pick_scan(x, dt, a, b, c, d, state) if chunk == CHUNK else None  # packed rows or not
    if compiled is not None:
        return compiled(x, dt, a, b, c, d, state, keep=keep)
    kernels = pick_kernels(x, dt, a, b, c, d, state, chunk_size=chunk)
    if kernels is not None:
        return kernels(x, dt, a, b, c, d, state, chunk_size=chunk, keep=keep)
    if x.is_cuda or x.shape[1] <= CPU_SPAN:
        return scan_chunks(x, dt, a, b, c, d, state, chunk_size=chunk, keep=keep)
    outputs = []
    num_chunks = max(1, CPU_SPAN // chunk)
    for start in range(0, x.shape[1], num_chunks * chunk):
        span, first = slice(start, start + num_chunks * chunk), start // chunk
        span_keep = None if keep is None else keep[first : first + num_chunks]
        arguments = (x[:, span], dt[:, span], a, b[:, span], c[:, span], d, state)
        y, state = scan_chunks(*arguments, chunk_size=chunk, keep=span_keep)
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


def packed_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    state: Tensor,
    *,
    chunk_size: int,
    packing: Packing,
) -> tuple[Tensor, Tensor]:
    """Do what `ssm_scan` does for each sequence of a packed row, from a state of zeros.

    Each sequence begins with a chunk, so that a reset falls between chunks and a sequence gives the
    same bits wherever it stands. What fills the last chunk of a sequence has a time step of zero.
    """
    chunk = chunk_length(chunk_size, x.device)
    places, keep = packing.align(chunk)
    x, dt, b, c = (_spread(part, places, len(keep) * chunk) for part in (x, dt, b, c))
    y, state = ssm_scan(x, dt, a, b, c, d, state, chunk_size=chunk_size, keep=keep)
    return y.index_select(1, places), state


def chunk_length(chunk_size: int, device: torch.device) -> int:
    """Return the tokens of a chunk: the configured number, or fewer on a CPU."""
    return chunk_size if device.type == "cuda" else min(chunk_size, CPU_CHUNK_SIZE)


def scan_chunks(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    state: Tensor,
    *,
    chunk_size: int,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Do what `ssm_scan` does, with the chunks as one more batch dimension.

    Only the state goes from chunk to chunk in turn. The operands of matrix products that give y
    have the product dtype of ``x``; decays, sums over several products and states are float32.
    """
    length, groups, dtype = x.shape[1], b.shape[2], product_dtype(x)
    x, b, c = x.to(dtype), b.to(dtype), c.to(dtype)
    chunk = min(chunk_size, length)
    x, dt, b, c = (_into_chunks(part, chunk) for part in (x, dt, b, c))  # (B, C, Q, ...)
    x = x.unflatten(3, (groups, -1)).transpose(2, 3).contiguous()  # (B, C, G, Q, J, P)
    b, c = b.transpose(2, 3), c.transpose(2, 3)  # (B, C, G, Q, N)
    dt = dt.unflatten(3, (groups, -1)).permute(0, 1, 3, 4, 2)  # (B, C, G, J, Q)
    total = (dt * a.view(groups, -1, 1)).cumsum(-1)

    # Inside a chunk: token l reads token s <= l, decayed by everything in between. The mask is a
    # factor of the exponent, so that s > l cannot overflow; CPUs are slow at exp(-inf).
    causal = torch.ones(chunk, chunk, device=x.device).tril()
    between = (total[..., :, None] - total[..., None, :]).mul_(causal)  # (B, C, G, J, Q, Q)
    products = (c @ b.mT).float() * causal  # (B, C, G, Q, Q)
    scores = between.exp_() * dt[..., None, :] * products.unsqueeze(3)
    inside = scores.to(dtype) @ x.transpose(3, 4)  # (B, C, G, J, Q, P)

    # what each chunk adds to the state, and the state each chunk starts from
    to_end = dt * torch.exp(total[..., -1:] - total)
    weighted = x * to_end.transpose(3, 4)[..., None]  # (B, C, G, Q, J, P)
    added = weighted.flatten(4).mT @ b.float()  # (B, C, G, J P, N)
    added = added.unflatten(3, (-1, x.shape[-1]))  # (B, C, G, J, P, N)
    chunk_decay = torch.exp(total[..., -1])[..., None, None]
    running = state.unflatten(1, (groups, -1))  # (B, G, J, P, N)
    starts = []
    for index in range(added.shape[1]):
        if keep is not None:
            running = running * keep[index]
        starts.append(running.to(dtype))
        running = running * chunk_decay[:, index] + added[:, index]
    rows = torch.stack(starts, dim=1).flatten(3, 4)  # (B, C, G, J P, N)
    carried = (c @ rows.mT).unflatten(4, (-1, x.shape[-1]))  # (B, C, G, Q, J, P)

    from_start = torch.exp(total).transpose(3, 4)[..., None]
    y = (d.view(groups, 1, -1, 1) * x).add_(inside.transpose(3, 4)).add_(carried * from_start)
    y = y.transpose(2, 3).flatten(3, 4)  # (B, C, Q, H, P)
    return y.flatten(1, 2)[:, :length], running.flatten(1, 2)


def _spread(x: Tensor, places: Tensor, length: int) -> Tensor:
    """Put tokens of (B, T, ...) at places of a row of ``length``, zeros elsewhere."""
    return x.new_zeros(x.shape[0], length, *x.shape[2:]).index_copy(1, places, x)


def _into_chunks(x: Tensor, chunk: int) -> Tensor:
    """Pad T with zeros to whole chunks: (B, T, ...) -> (B, C, Q, ...)."""
    padding = (chunk - x.shape[1] % chunk) % chunk
    if padding:
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, padding))
    return x.unflatten(1, (-1, chunk))
