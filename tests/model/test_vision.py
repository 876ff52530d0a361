"""RADIO against transformers' `RadioModel`, and what follows it against plain torch, in float32.

Tolerance: 1e-5 of the largest feature; both sides compute in float32 (epsilon 6e-8) and differ
in the order of summation only.
"""

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import RadioConfig, RadioModel

from nvvl.errors import DataError
from nvvl.model.config import VisionConfig, VLMConfig
from nvvl.model.vision import VisionTransformer, make_projector, pixel_shuffle
from nvvl.model.vlm import NemotronNanoVL

TOLERANCE = 1e-5


def relative_error(ours: Tensor, oracle: Tensor) -> float:
    return float((ours - oracle).abs().max() / oracle.abs().max())


def radio_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename our tensors to those of `RadioModel`; the fused qkv is split in this order."""
    top = {
        "patch_generator.embedder.weight": "embeddings.patch_projection.weight",
        "patch_generator.pos_embed": "embeddings.position_embedding",
        "patch_generator.cls_token.token": "embeddings.cls_register_token",
    }
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name in top:
            renamed[top[name]] = tensor
            continue
        name = name.replace("blocks.", "encoder.layer.")
        if ".attn.qkv." in name:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                renamed[name.replace("attn.qkv", f"attention.{letter}_proj")] = part
        else:
            renamed[name.replace("attn.proj", "attention.o_proj")] = tensor
    return renamed


def make_oracle(config: VisionConfig, state: dict[str, Tensor]) -> RadioModel:
    side = round(config.num_positions**0.5)
    oracle = RadioModel(
        RadioConfig(
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            mlp_ratio=config.intermediate_size / config.hidden_size,
            patch_size=config.patch_size,
            max_img_size=side * config.patch_size,
            num_cls_tokens=3,
            num_registers=config.num_prefix_tokens - 3,
        )
    ).eval()
    oracle.make_preprocessor_external()
    missing, unexpected = oracle.load_state_dict(radio_state(state), strict=False)
    # LayerScale is 1 and the summary indices do not touch the features
    assert all("layer_scale" in name or name == "summary_idxs" for name in missing)
    assert unexpected == []
    return oracle.requires_grad_(False)


def make_vision(**changes: int) -> VisionConfig:
    sizes = {
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "intermediate_size": 128,
        "patch_size": 8,
        "num_prefix_tokens": 4,
        "num_positions": 64,
    }
    return VisionConfig(**(sizes | changes))


@pytest.mark.parametrize(
    ("changes", "tile"),
    [
        ({}, 32),
        ({}, 64),  # the whole position table
        ({}, 96),  # larger than the table: interpolated up
        ({"num_positions": 49}, 32),
        ({"patch_size": 16, "num_prefix_tokens": 10}, 64),
        ({"num_heads": 2, "num_layers": 3, "intermediate_size": 256}, 32),
    ],
)
def test_features_equal_transformers(
    changes: dict[str, int], tile: int, randomize: Callable[..., None]
) -> None:
    config = make_vision(**changes)
    ours = VisionTransformer(config)
    randomize(ours, seed=2)
    oracle = make_oracle(config, ours.state_dict())
    pixels = torch.randn(3, 3, tile, tile, generator=torch.Generator().manual_seed(0))
    features = ours(pixels)
    assert features.shape == (3, (tile // config.patch_size) ** 2, config.hidden_size)
    assert relative_error(features, oracle(pixels).features) <= TOLERANCE


def test_tiles_do_not_see_each_other(randomize: Callable[..., None]) -> None:
    ours = VisionTransformer(make_vision())
    randomize(ours)
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    together = ours(pixels)
    for index in range(3):
        assert relative_error(ours(pixels[index : index + 1])[0], together[index]) <= TOLERANCE


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_pixel_shuffle_gathers_squares_of_patches(version: Literal["v1", "v2"]) -> None:
    side, channels = 6, 5
    x = torch.randn(2, side * side, channels, generator=torch.Generator().manual_seed(2))
    grid = x.unflatten(1, (side, side))
    places = [(r, c) for r in range(0, side, 2) for c in range(0, side, 2)]
    if version == "v1":  # v1 walks the token grid column by column
        places = [(r, c) for c, r in places]
    expected = [grid[:, r : r + 2, c : c + 2].flatten(1) for r, c in places]
    assert pixel_shuffle(x, factor=2, version=version).equal(torch.stack(expected, dim=1))


def test_pixel_shuffle_by_three() -> None:
    x = torch.arange(36.0).reshape(1, 36, 1)
    tokens = pixel_shuffle(x, factor=3, version="v2")
    assert tokens[0, 1].tolist() == [3, 4, 5, 9, 10, 11, 15, 16, 17]


def test_projector_is_norm_linear_squared_relu_linear(
    tiny_config: VLMConfig, randomize: Callable[..., None]
) -> None:
    projector = make_projector(tiny_config)
    randomize(projector, seed=3)
    state = projector.state_dict()
    assert list(state) == ["0.weight", "1.weight", "3.weight"]
    x = torch.randn(2, 4, 256, generator=torch.Generator().manual_seed(3))
    normed = F.rms_norm(x, (256,), state["0.weight"], eps=1e-5)
    expected = F.linear(F.relu(F.linear(normed, state["1.weight"])) ** 2, state["3.weight"])
    assert relative_error(projector(x), expected) <= TOLERANCE


@pytest.fixture(scope="module")
def model(tiny_config: VLMConfig, randomize: Callable[..., None]) -> NemotronNanoVL:
    vlm = NemotronNanoVL(tiny_config)
    randomize(vlm, seed=4)
    return vlm.eval()


def test_encoded_tile_is_encoder_shuffle_projector(model: NemotronNanoVL) -> None:
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    features = make_oracle(model.config.vision, model.vision_model.radio_model.model.state_dict())(
        pixels
    ).features
    expected = model.mlp1(pixel_shuffle(features, factor=2, version="v2"))
    tokens = model.encode_images(pixels)
    assert tokens.shape == (2, 4, 64)
    assert relative_error(tokens, expected) <= TOLERANCE


def test_features_replace_image_tokens_in_order(model: NemotronNanoVL) -> None:
    ids = torch.tensor([[20, 280, 280, 21, 280], [280, 22, 23, 24, 280]])
    features = torch.arange(5.0)[:, None].expand(5, 64)
    embeds = model.embed(ids, features)
    assert embeds[ids == 280][:, 0].tolist() == [0, 1, 2, 3, 4]
    plain = model.language_model.backbone.embeddings(ids)
    assert embeds[ids != 280].equal(plain[ids != 280])


def test_features_may_come_by_tile(model: NemotronNanoVL) -> None:
    ids = torch.tensor([[20, 280, 280, 280, 280, 21]])
    features = torch.randn(2, 2, 64, generator=torch.Generator().manual_seed(5))
    assert model.embed(ids, features)[0, 1:5].equal(features.flatten(0, 1))


@pytest.mark.parametrize(
    ("num_tokens", "num_features", "message"),
    [
        (4, 8, "the prompt has 4, the tiles give 8"),
        (8, 4, "the prompt has 8, the tiles give 4"),
        (4, None, "the prompt has 4, the tiles give 0"),
        (0, 4, "the prompt has 0, the tiles give 4"),
    ],
)
def test_image_tokens_and_features_must_match(
    num_tokens: int, num_features: int | None, message: str, model: NemotronNanoVL
) -> None:
    ids = torch.full((1, 10), 20)
    ids[0, :num_tokens] = 280
    features: Any = None if num_features is None else torch.zeros(num_features, 64)
    with pytest.raises(DataError, match=message):
        model.embed(ids, features)


def test_forward_refuses_tiles_without_image_tokens(model: NemotronNanoVL) -> None:
    with pytest.raises(DataError, match="the prompt has 0, the tiles give 4"):
        model(torch.full((1, 10), 20), pixel_values=torch.zeros(1, 3, 32, 32))


def test_zero_tiles_are_text(model: NemotronNanoVL) -> None:
    ids = torch.full((1, 10), 20)
    empty = model(ids, pixel_values=torch.zeros(0, 3, 32, 32)).logits
    assert empty.equal(model(ids).logits)
