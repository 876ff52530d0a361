"""What a batch of items becomes: embeddings for the student, and what it is compared with.

The teacher's vision tower and embeddings make the inputs of both models. Its last hidden states are
what the student's are compared with, or, where its logits were computed before, those
(``logits.py``); its layers are then not needed at all. Nothing here has a gradient but the loss.

Shapes: T tokens of the row, N positions that count, D hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nvvl.distill.backbone import Backbone
from nvvl.distill.data import ItemBatch
from nvvl.distill.logits import StoredLogits
from nvvl.distill.losses import Positions, TopPositions, chunked_loss, relative_error
from nvvl.distill.recipe import DistillRecipe
from nvvl.model.packing import Packing
from nvvl.model.video import prune_prompt
from nvvl.model.vlm import NemotronNanoVL


@dataclass(frozen=True)
class Prepared:
    """One row, ready for the student.

    Attributes:
        item_ids: Of the items.
        embeds: (1, T, D).
        packing: Where items begin and end.
        loss_mask: (1, T) bool.
        targets: (N,) int64 next tokens.
        teacher: (N, D) last hidden states, or the stored distribution.
        layers: (1, T, D) output of each of the teacher's layers, where they are compared.
    """

    item_ids: tuple[str, ...]
    embeds: Tensor
    packing: Packing
    loss_mask: Tensor
    targets: Tensor
    teacher: Tensor | TopPositions
    layers: tuple[Tensor, ...] = ()

    @property
    def num_positions(self) -> int:
        """N."""
        return len(self.targets)

    def to(self, device: torch.device) -> "Prepared":
        """Return it with its tensors on a device."""
        teacher = self.teacher
        if isinstance(teacher, TopPositions):
            parts = (teacher.tokens, teacher.log_probs, teacher.log_tail)
            moved: Tensor | TopPositions = TopPositions(*(part.to(device) for part in parts))
        else:
            moved = teacher.to(device)
        return replace(
            self,
            embeds=self.embeds.to(device),
            packing=self.packing.to(device),
            loss_mask=self.loss_mask.to(device),
            targets=self.targets.to(device),
            teacher=moved,
            layers=tuple(layer.to(device) for layer in self.layers),
        )


class Preparer:
    """Makes rows ready, and computes losses on them."""

    def __init__(
        self,
        teacher: NemotronNanoVL,
        recipe: DistillRecipe,
        *,
        device: torch.device,
        logits: StoredLogits | None = None,
    ) -> None:
        """Take the teacher.

        Args:
            teacher: On its device; without layers if there are logits.
            recipe: Says what is compared.
            device: Where the student is.
            logits: The teacher's, computed before.
        """
        self._teacher = teacher
        self._recipe = recipe
        self._device = device
        self._logits = logits

    @torch.no_grad()
    def __call__(self, batch: ItemBatch) -> Prepared:
        """Embed a batch and run the teacher over it."""
        teacher, device = self._teacher, self._device
        pruned = self._prune(batch)
        input_ids = torch.cat([ids for ids, _, _ in pruned])[None].to(device)
        features = [part for _, part, _ in pruned if part is not None]
        embeds = teacher.embed(input_ids, torch.cat(features) if features else None)
        packing = Packing.of([len(ids) for ids, _, _ in pruned], device=device)
        loss_mask = torch.cat([mask for _, _, mask in pruned])[None].to(device)
        compared, layers = self._run_teacher(batch.item_ids, embeds, packing, loss_mask)
        targets = input_ids.roll(-1, dims=1)[loss_mask]
        return Prepared(batch.item_ids, embeds, packing, loss_mask, targets, compared, layers)

    def loss(self, backbone: Backbone, prepared: Prepared) -> tuple[Tensor, Tensor | None]:
        """Return the loss on logits and, where the recipe has one, the term of the layers."""
        keep_layers = bool(prepared.layers)
        hidden, outputs = backbone(
            prepared.embeds, packing=prepared.packing, keep_layers=keep_layers
        )
        head = self._teacher.language_model.lm_head.weight
        compared = prepared.teacher
        loss = chunked_loss(
            self._recipe.loss,
            Positions(hidden[prepared.loss_mask], head),
            teacher=compared if isinstance(compared, TopPositions) else Positions(compared, head),
            targets=prepared.targets,
        )
        return loss, layer_loss(outputs, prepared.layers) if keep_layers else None

    def _run_teacher(
        self, item_ids: Sequence[str], embeds: Tensor, packing: Packing, loss_mask: Tensor
    ) -> tuple[Tensor | TopPositions, tuple[Tensor, ...]]:
        if self._logits is not None:
            return self._logits.read(item_ids, loss_mask.device), ()
        backbone = self._teacher.language_model.backbone
        x, layers = embeds, []
        for layer in backbone.layers:
            x, _ = layer(x, packing=packing)
            if self._recipe.layer_loss:
                layers.append(x)
        return backbone.norm_f(x)[loss_mask], tuple(layers)

    def _prune(self, batch: ItemBatch) -> list[tuple[Tensor, Tensor | None, Tensor]]:
        """Return token ids, image features and loss mask of each item, what EVS drops left out."""
        pixels = [inputs.pixel_values for inputs in batch.inputs]
        sizes = [len(part) for part in pixels]
        if not sum(sizes):
            none = [None] * len(sizes)
            ids = [inputs.input_ids for inputs in batch.inputs]
            return list(zip(ids, none, batch.loss_masks, strict=True))
        features = self._teacher.encode_images(torch.cat(pixels).to(self._device))
        config, rate = self._teacher.config, self._recipe.video_pruning_rate
        pruned = []
        for inputs, part, mask in zip(
            batch.inputs, features.split(sizes), batch.loss_masks, strict=True
        ):
            kept, left = prune_prompt(config, inputs, part.flatten(0, 1), rate)
            pruned.append((inputs.input_ids[kept], left if len(part) else None, mask[kept]))
        return pruned


def layer_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Return the relative error of layer outputs, mean over layers."""
    pairs = zip(student, teacher, strict=True)
    return torch.stack([relative_error(ours, theirs) for ours, theirs in pairs]).mean()
