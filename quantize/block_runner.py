"""One block of the model run over the calibration items, with weights that were just read.

The model's modules are made without weights, filled one block at a time, and emptied again.
"""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from nvvl.model.checkpoint import Checkpoint
from nvvl.model.load import materialize
from nvvl.model.vlm import NemotronNanoVL
from nvvl.quantize.activations import Activations
from nvvl.quantize.block_names import EMBEDDINGS, PATCHES, PROJECTOR
from nvvl.quantize.blocks import EmbeddingRows, LoadedBlock
from nvvl.quantize.recipe import CALIBRATED_FORMATS, Format
from nvvl.quantize.targets import LAYERS, layer_index


def count_runs(blocks: Sequence[str], formats: Mapping[str, Format]) -> int:
    """Count the blocks up to the last one whose inputs are quantized: those that items run through.

    Args:
        blocks: Names in the order of the model.
        formats: Format of each quantizable linear; at least one whose inputs are quantized.
    """
    last = max(layer_index(fqn) for fqn, fmt in formats.items() if fmt in CALIBRATED_FORMATS)
    return blocks.index(f"{LAYERS}.{last}") + 1


class BlockRunner:
    """Runs the blocks of one checkpoint, in the order of `nvvl.quantize.block_names`."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        """Make the modules, without weights.

        Args:
            checkpoint: The BF16 source.
            device: Where blocks are run.
        """
        self._checkpoint = checkpoint
        self._device = device
        with torch.device("meta"):
            self._model = NemotronNanoVL(checkpoint.config).eval()

    def run(self, block: LoadedBlock, activations: Activations) -> None:
        """Run a block over the items; nothing observes."""
        name = block.name
        if name.startswith(LAYERS):
            activations.run_layer(self.fill_layer(block), name)
            return
        if name == EMBEDDINGS:
            # the table stays in its file: the items need few of its rows
            rows = EmbeddingRows(self._checkpoint.info(f"{EMBEDDINGS}.weight"))
            self._model.language_model.backbone.embeddings = rows  # type: ignore[assignment]
            activations.embed(self._model, name)
            return
        module = self._model.get_submodule(name)
        materialize(module, name, block, dtype=torch.bfloat16, device=self._device)
        if name == PATCHES:
            activations.cut_patches(module, name)
        elif name == PROJECTOR:
            activations.project(self._model, name)
        else:
            activations.encode(module, name)
        module.to("meta")

    def fill_layer(self, block: LoadedBlock) -> nn.Module:
        """Return a layer of the language model with the weights of a block.

        It is a copy, because quantizers replace its linears; it is dropped with its weights.
        """
        layer = copy.deepcopy(self._model.get_submodule(block.name))
        materialize(layer, block.name, block, dtype=torch.bfloat16, device=self._device)
        return layer
