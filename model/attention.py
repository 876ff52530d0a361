"""Grouped-query causal attention without any position embedding.

Order comes from the Mamba2 layers around it, so keys are stored as they are projected and dropping
tokens (EVS) needs no remapping.

Shapes: B batch, T new tokens, S all tokens so far, H query heads, V key-value heads, D head dim.
"""

import torch
from torch import Tensor, nn

from nvvl.model.config import LanguageConfig
from nvvl.model.packing import Packing
from nvvl.model.products import Linear, attention

AttentionState = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """Causal self-attention with an explicit, growing key-value state."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = Linear(config.hidden_size, queries, bias=False)
        self.k_proj = Linear(config.hidden_size, keys, bias=False)
        self.v_proj = Linear(config.hidden_size, keys, bias=False)
        self.o_proj = Linear(queries, config.hidden_size, bias=False)

    def forward(
        self,
        x: Tensor,
        *,
        state: AttentionState | None = None,
        padding_mask: Tensor | None = None,
        packing: Packing | None = None,
    ) -> tuple[Tensor, AttentionState]:
        """Attend from ``x`` (B, T, hidden) to itself and to the state.

        Args:
            x: normalized hidden states.
            state: (keys, values), each (B, V, S - T, D), of the tokens before.
            padding_mask: (B, S) bool over state and new tokens, True on real tokens.
            packing: the sequences each row holds; needs a state and a mask of None.

        Returns:
            The mixed hidden states (B, T, hidden) and the state with the new tokens appended.
        """
        query = self.q_proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        key = self.k_proj(x).unflatten(-1, (self.num_kv_heads, -1)).transpose(1, 2)
        value = self.v_proj(x).unflatten(-1, (self.num_kv_heads, -1)).transpose(1, 2)
        if state is not None:
            key = torch.cat([state[0], key], dim=2)  # (B, V, S, D)
            value = torch.cat([state[1], value], dim=2)
        if packing is not None:
            y = packed_attention(query, key, value, packing)
            return self.o_proj(y.transpose(1, 2).flatten(-2)), (key, value)
        mask = causal_mask(query.shape[2], key.shape[2], padding_mask, device=x.device)
        y = attention(
            query,
            key,
            value,
            mask=mask,
            is_causal=mask is None and query.shape[2] > 1,
            enable_gqa=True,
        )
        return self.o_proj(y.transpose(1, 2).flatten(-2)), (key, value)


def packed_attention(query: Tensor, key: Tensor, value: Tensor, packing: Packing) -> Tensor:
    """Attend causally within each sequence of a packed row, (B, H, T, D).

    One call a sequence: a mask would compute, and on some devices hold, T x T scores.
    """
    parts = (side.split(list(packing.lengths), dim=2) for side in (query, key, value))
    outputs = [
        attention(q, k, v, is_causal=True, enable_gqa=True) for q, k, v in zip(*parts, strict=True)
    ]
    return torch.cat(outputs, dim=2)


def causal_mask(
    num_queries: int, num_keys: int, padding_mask: Tensor | None, *, device: torch.device
) -> Tensor | None:
    """Build the boolean mask of `num_queries` last tokens against `num_keys` tokens.

    Returns:
        None where a plain causal (or, for one query, a full) attention says the same, else a
        mask broadcastable to (B, 1, T, S), True where a query may look. A padding token looks at
        itself, so that no row of the softmax is empty.
    """
    if padding_mask is None and num_queries in (1, num_keys):
        return None
    past = num_keys - num_queries
    mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(past)
    if padding_mask is None:
        return mask
    itself = torch.ones_like(mask).tril(past).triu(past)
    return (mask & padding_mask[:, None, None, :]) | itself
