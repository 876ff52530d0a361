"""RADIO, pixel shuffle and the projector: tiles in, language-model embeddings out.

RADIO is a pre-norm vision transformer with a position table larger than any tile (CPE, "cropped
position embedding"), interpolated to the patch grid, and with cls and register tokens in front
whose outputs are dropped here. Pixel values arrive normalized; the ``input_conditioner`` buffers
are carried along so that a written checkpoint has every tensor of its source.

Shapes: n tiles, S tile side in pixels, R patches per side, L tokens (prefix + patches), C channels.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvvl.model.config import VisionConfig, VLMConfig
from nvvl.model.products import Linear, attention


class Token(nn.Module):
    """The learned cls and register tokens, (num_prefix_tokens, C)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(config.num_prefix_tokens, config.hidden_size))


class PatchGenerator(nn.Module):
    """Cut tiles into patches, embed them, add positions, put the prefix tokens in front."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.cls_token = Token(config)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.num_positions, config.hidden_size))
        self.embedder = Linear(3 * config.patch_size**2, config.hidden_size, bias=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Embed tiles (n, 3, S, S) as token sequences (n, L, C)."""
        size = self.patch_size
        rows, cols = pixel_values.shape[-2] // size, pixel_values.shape[-1] // size
        patches = pixel_values.unflatten(-1, (cols, size)).unflatten(-3, (rows, size))
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (n, R*R, 3*size^2)
        tokens = self.embedder(patches.to(self.embedder.weight.dtype))
        tokens = tokens + self.positions(rows, cols).to(tokens.dtype)
        prefix = self.cls_token.token.to(tokens.dtype).expand(tokens.shape[0], -1, -1)
        return torch.cat([prefix, tokens], dim=1)

    def positions(self, rows: int, cols: int) -> Tensor:
        """Interpolate the position table to a patch grid: (1, rows * cols, C)."""
        side = round(self.pos_embed.shape[1] ** 0.5)
        table = self.pos_embed.unflatten(1, (side, side)).permute(0, 3, 1, 2).float()
        longest = max(rows, cols)
        table = F.interpolate(table, size=(longest, longest), mode="bilinear", align_corners=False)
        return table[..., :rows, :cols].flatten(2).transpose(1, 2)


class VisionAttention(nn.Module):
    """Full self-attention with a fused ``qkv`` projection."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Attend within each tile: (n, L, C) -> (n, L, C)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (n, L, 3, heads, head dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        y = attention(query, key, value)
        return self.proj(y.transpose(1, 2).flatten(-2))


class VisionMLP(nn.Module):
    """Linear, exact GELU, Linear."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token: (n, L, C) -> (n, L, C)."""
        return self.fc2(F.gelu(self.fc1(x)))


class VisionBlock(nn.Module):
    """One pre-norm transformer block of RADIO."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=1e-6)
        self.attn = VisionAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=1e-6)
        self.mlp = VisionMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        """Transform token sequences (n, L, C)."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Patch generator and blocks; ``radio_model.model`` in the released names."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_generator = PatchGenerator(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.num_layers))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode normalized tiles (n, 3, S, S) to patch features (n, R*R, C)."""
        x = self.patch_generator(pixel_values)
        for block in self.blocks:
            x = block(x)
        return x[:, self.patch_generator.cls_token.token.shape[0] :]


class InputConditioner(nn.Module):
    """The normalization RADIO was trained with; applied by the processor, kept for the record."""

    norm_mean: Tensor
    norm_std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("norm_mean", torch.zeros(3, 1, 1))
        self.register_buffer("norm_std", torch.ones(3, 1, 1))


class Radio(nn.Module):
    """RADIO with the buffers its checkpoint carries."""

    summary_idxs: Tensor

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.input_conditioner = InputConditioner()
        self.model = VisionTransformer(config)
        if config.num_summary_idxs:
            summary_idxs = torch.zeros(config.num_summary_idxs, dtype=torch.int64)
            self.register_buffer("summary_idxs", summary_idxs)


class VisionModel(nn.Module):
    """``vision_model`` of the released names."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.radio_model = Radio(config)


class RMSNorm(nn.Module):
    """RMSNorm computed in float32, result in the dtype of its input."""

    def __init__(self, size: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension of ``x`` (..., size)."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight.float() * wide).to(x.dtype)


class SquaredReLU(nn.Module):
    """``relu(x)^2``, the activation of the projector and of the language model's MLPs."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply element by element."""
        return F.relu(x).square()


def make_projector(config: VLMConfig) -> nn.Sequential:
    """Build ``mlp1``: RMSNorm, Linear, squared ReLU, Linear."""
    width = config.projector_input_size
    return nn.Sequential(
        RMSNorm(width, eps=1e-5),
        Linear(width, config.projector_hidden_size, bias=False),
        SquaredReLU(),
        Linear(config.projector_hidden_size, config.language.hidden_size, bias=False),
    )


def pixel_shuffle(x: Tensor, *, factor: int, version: Literal["v1", "v2"]) -> Tensor:
    """Fold ``factor`` x ``factor`` neighbouring patches into the channels of one token.

    The channel order of the result is (row within the square, column within it, C), in both
    versions; v1 leaves the token grid transposed (columns first), v2 keeps it row-major.

    Args:
        x: (n, R*R, C) patch features, row-major.
        factor: patches per side of a square (2).
        version: ``ps_version`` of the config.

    Returns:
        (n, (R / factor)^2, C * factor^2).
    """
    side = round(x.shape[1] ** 0.5)
    x = x.unflatten(1, (side // factor, factor, side // factor, factor))
    order = (0, 1, 3, 2, 4, 5) if version == "v2" else (0, 3, 1, 2, 4, 5)
    return x.permute(*order).flatten(3).flatten(1, 2)
