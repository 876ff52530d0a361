"""The blocks that the walk visits: their names, in order, and which tensors are whose.

A block is a module that the walk runs over the calibration items as a whole: the patch generator,
a RADIO block, the projector, a layer. Tables that are far larger than a block (embeddings, lm_head)
are no block's. Nothing here imports torch.
"""

from collections.abc import Iterable
from typing import TypeVar

from nvvl.model.config import VLMConfig
from nvvl.model.safetensors_io import TensorSpec
from nvvl.quantize.targets import LAYERS

PATCHES = "vision_model.radio_model.model.patch_generator"
VISION_BLOCKS = "vision_model.radio_model.model.blocks"
PROJECTOR = "mlp1"
EMBEDDINGS = "language_model.backbone.embeddings"

_Spec = TypeVar("_Spec", bound=TensorSpec)


def list_blocks(config: VLMConfig) -> list[str]:
    """Return the modules that are read and run one at a time, in the order of the forward."""
    return [
        PATCHES,
        *(f"{VISION_BLOCKS}.{index}" for index in range(config.vision.num_layers)),
        PROJECTOR,
        EMBEDDINGS,
        *(f"{LAYERS}.{index}" for index in range(len(config.language.layers))),
    ]


def tensors_by_block(tensors: Iterable[_Spec], blocks: Iterable[str]) -> dict[str, list[_Spec]]:
    """List each block's tensors, in the order given; none of the embedding table's.

    Args:
        tensors: Of the whole checkpoint.
        blocks: Names, as `list_blocks` gives them.
    """
    owned: dict[str, list[_Spec]] = {name: [] for name in blocks}
    for spec in tensors:
        parts = spec.name.split(".")
        prefixes = (".".join(parts[:count]) for count in range(1, len(parts)))
        owner = next((prefix for prefix in prefixes if prefix in owned), None)
        if owner is not None and owner != EMBEDDINGS:
            owned[owner].append(spec)
    return owned
