"""Tables of what each server's matching does with a pattern, worked out by hand from its rules."""

import pytest

from nvvl.export.exclude_patterns import (
    older_trtllm_exclusion,
    trtllm_exclusion,
    vllm_exclusion,
    vllm_split_fusion,
)

LAYERS = "language_model.backbone.layers"


@pytest.mark.parametrize(
    ("pattern", "fqn", "excluded"),
    [
        # equality, after the prefix is mapped
        (f"{LAYERS}.1.mixer.up_proj", f"{LAYERS}.1.mixer.up_proj", True),
        (f"{LAYERS}.1.mixer.up_proj", f"{LAYERS}.11.mixer.up_proj", False),
        # substring: layer 1 also reaches 10 to 19
        (f"{LAYERS}.1", f"{LAYERS}.1.mixer.up_proj", True),
        (f"{LAYERS}.1", f"{LAYERS}.12.mixer.up_proj", True),
        (f"{LAYERS}.1*", f"{LAYERS}.1.mixer.up_proj", True),
        (f"{LAYERS}.1*", f"{LAYERS}.10.mixer.up_proj", True),
        (f"{LAYERS}.1*", f"{LAYERS}.2.mixer.up_proj", False),
        # a pattern that ends in .* is not split, and stays within its layer
        (f"{LAYERS}.1.*", f"{LAYERS}.1.mixer.up_proj", True),
        (f"{LAYERS}.1.*", f"{LAYERS}.10.mixer.up_proj", False),
        (f"{LAYERS}.1.mixer*", f"{LAYERS}.1.mixer.up_proj", True),
        (f"{LAYERS}.1.mixer*", f"{LAYERS}.11.mixer.up_proj", False),
        # fnmatch; only a prefix is mapped, so a leading wildcard never meets "backbone"
        ("*layers.1*", f"{LAYERS}.1.mixer.up_proj", True),
        ("*layers.1*", f"{LAYERS}.15.mixer.up_proj", False),  # split into *layers.1, *layers.1.*
        ("*backbone.layers.1.mixer.up_proj", f"{LAYERS}.1.mixer.up_proj", False),
        ("*.layers.1.mixer.up_proj", f"{LAYERS}.1.mixer.up_proj", True),
        ("*lm_head", "language_model.lm_head", True),
        ("lm_head", "language_model.lm_head", True),
        ("*lm_head*", "language_model.lm_head", True),
        ("vision_model*", "vision_model.radio_model.model.blocks.0.attn.qkv", True),
        ("mlp1*", "mlp1.3", True),
        ("*mlp*", "mlp1.1", False),  # split into *mlp and *mlp.*
        ("*mlp*", "vision_model.radio_model.model.blocks.0.mlp.fc1", True),
        ("*mlp*", f"{LAYERS}.1.mixer.up_proj", False),
        # q, k and v are one module, qkv_proj: only all three names together exclude it
        ("*mixer.q_proj", f"{LAYERS}.3.mixer.q_proj", False),
        (f"{LAYERS}.3.mixer.q_proj", f"{LAYERS}.3.mixer.q_proj", False),
        (f"{LAYERS}.3.mixer*", f"{LAYERS}.3.mixer.k_proj", True),
        ("*mixer.qkv_proj", f"{LAYERS}.3.mixer.v_proj", True),
        ("*mixer.o_proj", f"{LAYERS}.3.mixer.o_proj", True),
    ],
)
def test_vllm_matches_by_equality_substring_and_fnmatch(
    pattern: str, fqn: str, excluded: bool
) -> None:
    assert vllm_exclusion(fqn, [pattern]) == (pattern if excluded else None)


@pytest.mark.parametrize(
    ("pattern", "fqn", "main", "older"),
    [
        (f"{LAYERS}.1.mixer.up_proj", f"{LAYERS}.1.mixer.up_proj", True, False),
        ("*backbone.layers.1.mixer.conv1d", f"{LAYERS}.1.mixer.conv1d", True, True),
        ("*.layers.1.mixer.conv1d", f"{LAYERS}.1.mixer.conv1d", True, True),
        ("*.layers.1.mixer.conv1d", f"{LAYERS}.11.mixer.conv1d", False, False),
        ("backbone.layers.1.mixer.up_proj", f"{LAYERS}.1.mixer.up_proj", True, True),
        ("model.layers.backbone.layers.1.mixer.up_proj", f"{LAYERS}.1.mixer.up_proj", True, True),
        # only the main branch asks for parents, and takes X.* for X
        (f"{LAYERS}.1", f"{LAYERS}.1.mixer.up_proj", True, False),
        (f"{LAYERS}.1", f"{LAYERS}.11.mixer.up_proj", False, False),
        ("backbone.layers.1", f"{LAYERS}.1.mixer.up_proj", True, False),
        ("lm_head.*", "language_model.lm_head", True, False),
        (r"re:model\.layers\.1\.mixer\..*", f"{LAYERS}.1.mixer.up_proj", True, False),
        ("*layers.1*", f"{LAYERS}.15.mixer.up_proj", True, True),
        ("lm_head", "language_model.lm_head", True, True),
        ("language_model.lm_head", "language_model.lm_head", True, False),
        ("*lm_head", "language_model.lm_head", True, True),
        ("vision_model*", "vision_model.radio_model.model.blocks.0.mlp.fc1", True, True),
        ("mlp1*", "mlp1.1", True, True),
        # any of the parts excludes the fused module
        ("*mixer.q_proj", f"{LAYERS}.3.mixer.v_proj", True, True),
        ("*mixer.qkv_proj", f"{LAYERS}.3.mixer.v_proj", True, True),
    ],
)
def test_trtllm_matches_its_own_names_with_fnmatch(
    pattern: str, fqn: str, main: bool, older: bool
) -> None:
    assert trtllm_exclusion(fqn, [pattern]) == (pattern if main else None)
    assert older_trtllm_exclusion(fqn, [pattern]) == (pattern if older else None)


def test_vllm_excludes_qkv_when_all_three_are_named() -> None:
    patterns = [f"{LAYERS}.3.mixer.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj")]
    assert vllm_exclusion(f"{LAYERS}.3.mixer.k_proj", patterns) == patterns[0]
    assert vllm_split_fusion(f"{LAYERS}.3.mixer", patterns) == ()


def test_vllm_split_fusion_names_the_listed_parts() -> None:
    patterns = [f"{LAYERS}.3.mixer.q_proj", f"{LAYERS}.3.mixer.v_proj*"]
    assert vllm_split_fusion(f"{LAYERS}.3.mixer", patterns) == ("q_proj", "v_proj")
    assert vllm_split_fusion(f"{LAYERS}.13.mixer", patterns) == ()
