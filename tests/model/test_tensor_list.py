"""The list of tensors made from a config is the one the network itself has."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nvvl.model.checkpoint import Checkpoint
from nvvl.model.config import VLMConfig
from nvvl.model.load import expected_tensors
from nvvl.model.tensor_list import list_tensors

CONFIG_12B = Path(__file__).resolve().parents[2] / "benchmarks" / "config-12b.json"


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"language": {"use_conv_bias": False, "hybrid_override_pattern": "M*-"}},
        {"language": {"num_key_value_heads": 4, "n_groups": 1}, "projector_hidden_size": 96},
    ],
)
def test_list_is_that_of_the_network(
    overrides: dict[str, Any], make_config: Callable[..., dict[str, Any]]
) -> None:
    config = VLMConfig.from_dict(make_config(**overrides))
    with_summary = config.with_shapes(prefix_tokens=6, positions=49, summary_idxs=2)
    for variant in (config, with_summary):
        found = {spec.name: spec.shape for spec in list_tensors(variant)}
        assert found == expected_tensors(variant)


def test_list_of_the_full_size_is_that_of_the_network() -> None:
    config = VLMConfig.from_dict(json.loads(CONFIG_12B.read_text()))
    assert {spec.name: spec.shape for spec in list_tensors(config)} == expected_tensors(config)


def test_dtypes_are_the_usual_ones(tiny_checkpoint: Path) -> None:
    checkpoint = Checkpoint(tiny_checkpoint)
    found = {spec.name: spec.dtype for spec in list_tensors(checkpoint.config)}
    assert found == {name: info.dtype for name, info in checkpoint.tensors.items()}
