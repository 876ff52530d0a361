"""A checkpoint that is only planned, as the server rules see it.

The rules judge names, dtypes, shapes and the two quantization configs, all of which are known
before a byte is written. Rules that need files or written scales say "not checked".
"""

from collections.abc import Mapping, Sequence
from typing import Any

from nvvl.export.view import CheckpointView, TensorHeader
from nvvl.model.checkpoint_writer import Shard
from nvvl.model.safetensors_io import TensorSpec


def planned_view(
    shards: Sequence[Shard],
    *,
    config: Mapping[str, Any],
    hf_quant_config: Mapping[str, Any],
    source_config: Mapping[str, Any],
    source_tensors: Sequence[TensorSpec],
) -> CheckpointView:
    """Build the view of a planned output.

    Args:
        shards: The weight files that would be written.
        config: config.json as it would be written.
        hf_quant_config: hf_quant_config.json as it would be written.
        source_config: config.json of the BF16 source.
        source_tensors: Every tensor of the source.
    """
    source = CheckpointView(
        config=source_config,
        hf_quant_config=None,
        tensors={spec.name: TensorHeader(spec.dtype, spec.shape, "") for spec in source_tensors},
    )
    return CheckpointView(
        config=config,
        hf_quant_config=hf_quant_config,
        tensors={
            spec.name: TensorHeader(spec.dtype, spec.shape, shard.name)
            for shard in shards
            for spec in shard.specs
        },
        source=source,
    )
