"""Embeddings of items with one module of the model in memory at a time."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from nvvl.model.checkpoint import Checkpoint
from nvvl.model.load import materialize
from nvvl.model.processor import ModelInputs
from nvvl.model.vlm import NemotronNanoVL
from nvvl.quantize.block_names import EMBEDDINGS, PATCHES, PROJECTOR, VISION_BLOCKS
from nvvl.quantize.blocks import EmbeddingRows


def embed_items(
    checkpoint: Checkpoint, items: Iterable[ModelInputs], device: torch.device
) -> list[Tensor]:
    """Return the embeddings of each item, (1, T, D) BF16 on the CPU.

    Args:
        checkpoint: The BF16 source.
        items: Taken one at a time, since pixels are larger than what comes of them.
        device: Where modules run.
    """
    steps = _Steps(checkpoint, device)
    model = steps.model
    with torch.no_grad():
        ids, tiles = steps.cut_patches(items)
        for index in range(model.config.vision.num_layers):
            name = f"{VISION_BLOCKS}.{index}"
            with steps.weights_of(name) as block:
                steps.map(tiles, block)
        prefix_tokens = model.config.vision.num_prefix_tokens
        with steps.weights_of(PROJECTOR):
            steps.map(tiles, lambda part: model.project(part[:, prefix_tokens:]))
        # the table is many times larger than a layer, so its rows are read where they are used
        rows = EmbeddingRows(checkpoint.info(f"{EMBEDDINGS}.weight"))
        model.language_model.backbone.set_submodule("embeddings", rows)
        features = [None if part is None else part.to(device) for part in tiles]
        return [model.embed(i.to(device), f).cpu() for i, f in zip(ids, features, strict=True)]


class _Steps:
    """The forward of `NemotronNanoVL.encode_images`, cut where a module ends."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        self._checkpoint = checkpoint
        self._device = device
        with torch.device("meta"):
            self.model = NemotronNanoVL(checkpoint.config).eval()

    @contextmanager
    def weights_of(self, name: str) -> Iterator[nn.Module]:
        """Give one module its weights for a while."""
        module = self.model.get_submodule(name)
        materialize(module, name, self._checkpoint, dtype=torch.bfloat16, device=self._device)
        yield module
        module.to("meta")

    def cut_patches(self, items: Iterable[ModelInputs]) -> tuple[list[Tensor], list[Tensor | None]]:
        """Return the ids of each item, and the patch tokens of those with images."""
        ids: list[Tensor] = []
        tiles: list[Tensor | None] = []
        with self.weights_of(PATCHES) as patch_generator:
            for inputs in items:
                ids.append(inputs.input_ids[None])
                pixels = inputs.pixel_values.to(self._device)
                tiles.append(patch_generator(pixels).cpu() if len(pixels) else None)
        return ids, tiles

    def map(self, tiles: list[Tensor | None], run: Callable[[Tensor], Tensor]) -> None:
        """Replace the tiles of each item by what they become."""
        for index, part in enumerate(tiles):
            if part is not None:
                tiles[index] = run(part.to(self._device)).cpu()
