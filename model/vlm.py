"""The whole network, with a module tree that spells the released tensor names.

    vision_model.radio_model.model   tiles -> patch features            (vision.py)
    mlp1                             pixel-shuffled features -> tokens  (vision.py)
    language_model.backbone          embeddings, hybrid layers, norm_f  (mamba2.py, attention.py)
    language_model.lm_head           hidden states -> logits

Image tokens are rows of the embedding sequence whose id is ``image_token_id``, overwritten by
projector outputs in order. Every quantizable linear is an ``nn.Linear`` that is called as a
module, so that a quantizer placed on it sees each use.

Shapes: B batch, T tokens, n tiles, S tile side in pixels.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nvvl.errors import DataError
from nvvl.model.attention import Attention
from nvvl.model.config import LanguageConfig, LayerKind, VLMConfig
from nvvl.model.mamba2 import Mamba2Mixer
from nvvl.model.packing import Packing
from nvvl.model.products import Linear
from nvvl.model.vision import (
    RMSNorm,
    SquaredReLU,
    VisionModel,
    make_projector,
    pixel_shuffle,
)

LayerState = tuple[Tensor, Tensor] | None


@dataclass
class ModelState:
    """What the tokens seen so far leave behind, one entry a layer.

    Attributes:
        layers: (conv, ssm) of a Mamba2 layer, (keys, values) of an attention layer, None of an
            MLP layer and of any layer before its first token.
        padding_mask: (B, tokens so far) bool, True on real tokens; None where nothing is padded.
    """

    layers: list[LayerState]
    padding_mask: Tensor | None = None

    def select(self, rows: Tensor) -> "ModelState":
        """Return the state of some rows (indices or bool mask) of the batch."""
        layers = [
            None if layer is None else (layer[0][rows], layer[1][rows]) for layer in self.layers
        ]
        mask = None if self.padding_mask is None else self.padding_mask[rows]
        return ModelState(layers, mask)


@dataclass
class ModelOutput:
    """Logits (B, T or fewer, vocab) and the state after the last token."""

    logits: Tensor
    state: ModelState = field(repr=False)


class MLP(nn.Module):
    """Linear, squared ReLU, Linear; no gate and no bias."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.act = SquaredReLU()
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(
        self,
        x: Tensor,
        *,
        state: None = None,
        padding_mask: Tensor | None = None,
        packing: Packing | None = None,
    ) -> tuple[Tensor, None]:
        """Transform each token of ``x`` (B, T, hidden); stateless."""
        return self.down_proj(self.act(self.up_proj(x))), None


_MIXERS: dict[LayerKind, type[Mamba2Mixer] | type[Attention] | type[MLP]] = {
    "mamba": Mamba2Mixer,
    "attention": Attention,
    "mlp": MLP,
}


class Layer(nn.Module):
    """One layer: norm, mixer, residual."""

    def __init__(self, kind: LayerKind, config: LanguageConfig) -> None:
        super().__init__()
        self.kind = kind
        self.norm = RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mixer = _MIXERS[kind](config)

    def forward(
        self,
        x: Tensor,
        *,
        state: LayerState = None,
        padding_mask: Tensor | None = None,
        packing: Packing | None = None,
    ) -> tuple[Tensor, LayerState]:
        """Transform ``x`` (B, T, hidden).

        Args:
            x: hidden states.
            state: what this layer returned for the tokens before.
            padding_mask: (B, tokens so far) bool, True on real tokens.
            packing: the sequences that each row of ``x`` holds; needs a state and a mask of None.

        Returns:
            The hidden states after this layer and its state.
        """
        if padding_mask is not None and self.kind == "mamba":
            padding_mask = padding_mask[:, -x.shape[1] :]
        mixed, state = self.mixer(
            self.norm(x), state=state, padding_mask=padding_mask, packing=packing
        )
        return x + mixed, state


class Backbone(nn.Module):
    """Embeddings, layers and final norm."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(kind, config) for kind in config.layers)
        self.norm_f = RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)


class LanguageModel(nn.Module):
    """The hybrid Mamba2-Transformer language model over embeddings."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.backbone = Backbone(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    def hidden_states(
        self,
        inputs_embeds: Tensor,
        *,
        state: ModelState | None = None,
        padding_mask: Tensor | None = None,
        packing: Packing | None = None,
    ) -> tuple[Tensor, ModelState]:
        """Run all layers over ``inputs_embeds`` (B, T, hidden).

        Args:
            inputs_embeds: embeddings of the new tokens.
            state: the state after the tokens before, or None at the start.
            padding_mask: (B, T) bool of the new tokens, True on real ones; padding is on the left.
            packing: the sequences that each row holds, each to be run as if it stood alone.

        Returns:
            Hidden states after ``norm_f`` (B, T, hidden), and the new state.

        Raises:
            ValueError: if ``packing`` comes with a state or a mask, or is of another length.
        """
        if packing is not None:
            _require_alone(packing, inputs_embeds, state, padding_mask)
        layers = self.backbone.layers
        before = state or ModelState([None] * len(layers))
        mask = _extend_mask(before, inputs_embeds, padding_mask)
        after: list[LayerState] = []
        x = inputs_embeds
        for layer, layer_state in zip(layers, before.layers, strict=True):
            x, layer_state = layer(x, state=layer_state, padding_mask=mask, packing=packing)
            after.append(layer_state)
        return self.backbone.norm_f(x), ModelState(after, mask)


class NemotronNanoVL(nn.Module):
    """Nemotron Nano V2 VL: tiles and text in, logits out."""

    def __init__(self, config: VLMConfig) -> None:
        super().__init__()
        self.config = config
        self.language_model = LanguageModel(config.language)
        self.vision_model = VisionModel(config.vision)
        self.mlp1 = make_projector(config)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype activations have: that of the embedding table."""
        return self.language_model.backbone.embeddings.weight.dtype

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Turn normalized tiles (n, 3, S, S) into embeddings (n, tokens_per_tile, hidden)."""
        return self.project(self.vision_model.radio_model.model(pixel_values))

    def project(self, features: Tensor) -> Tensor:
        """Turn patch features (n, R*R, C) into embeddings (n, tokens_per_tile, hidden)."""
        config = self.config
        return self.mlp1(pixel_shuffle(features, factor=config.shuffle, version=config.ps_version))

    def embed(self, input_ids: Tensor, image_features: Tensor | None = None) -> Tensor:
        """Embed tokens and put image features where the image tokens are.

        Args:
            input_ids: (B, T) int64.
            image_features: (..., hidden), one row per image token of the batch, in order.

        Returns:
            (B, T, hidden).

        Raises:
            DataError: if the number of image tokens and of features differ.
        """
        embeds: Tensor = self.language_model.backbone.embeddings(input_ids)
        positions = input_ids == self.config.image_token_id
        num_features = 0 if image_features is None else image_features[..., 0].numel()
        num_tokens = int(positions.sum())
        if num_tokens != num_features:
            raise DataError(
                f"image tokens: the prompt has {num_tokens}, the tiles give {num_features}; "
                "build prompt and tiles with one Processor call"
            )
        if image_features is None or not num_tokens:
            return embeds
        rows = image_features.reshape(-1, embeds.shape[-1]).to(embeds.dtype)
        return embeds.masked_scatter(positions[..., None], rows)

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        pixel_values: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        state: ModelState | None = None,
        padding_mask: Tensor | None = None,
        logits_to_keep: int = 0,
    ) -> ModelOutput:
        """Compute logits of the next token at each position.

        Args:
            input_ids: (B, T) int64; or give ``inputs_embeds``.
            pixel_values: (n, 3, S, S) normalized tiles of the whole batch, in order of their
                image tokens; None or n = 0 for text.
            inputs_embeds: (B, T, hidden) in place of ids and pixels.
            state: the state after the tokens before.
            padding_mask: (B, T) bool, True on real tokens; padding is on the left.
            logits_to_keep: how many last positions get logits; 0 means all.

        Returns:
            Logits and the state after the last token.
        """
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("give input_ids or inputs_embeds")
            features = None
            if pixel_values is not None and pixel_values.shape[0] > 0:
                features = self.encode_images(pixel_values)
            inputs_embeds = self.embed(input_ids, features)
        hidden, state = self.language_model.hidden_states(
            inputs_embeds, state=state, padding_mask=padding_mask
        )
        hidden = hidden[:, -logits_to_keep:] if logits_to_keep else hidden
        return ModelOutput(self.language_model.lm_head(hidden), state)


def _require_alone(
    packing: Packing, x: Tensor, state: ModelState | None, padding_mask: Tensor | None
) -> None:
    if state is not None or padding_mask is not None:
        raise ValueError("packing: sequences start in it, so no state and no mask can be given")
    if sum(packing.lengths) != x.shape[1]:
        raise ValueError(f"packing: {sum(packing.lengths)} tokens, got rows of {x.shape[1]}")


def _extend_mask(
    state: ModelState, new_tokens: Tensor, padding_mask: Tensor | None
) -> Tensor | None:
    """Join the mask of the tokens so far with that of the new ones; None if nothing is padded."""
    if state.padding_mask is None:
        if padding_mask is None or bool(padding_mask.all()):
            return None
        return padding_mask
    if padding_mask is None:
        padding_mask = state.padding_mask.new_ones(new_tokens.shape[:2])
    return torch.cat([state.padding_mask, padding_mask], dim=1)
