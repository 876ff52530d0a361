"""Runs the teacher over a set once and keeps its logits (``logits.py``)."""

from pathlib import Path

import torch

from nvvl.calib_data.manifest import CalibrationSet
from nvvl.distill.data import DistillData
from nvvl.distill.logits import LogitsWriter, logits_identity, require_logits_suffice
from nvvl.distill.prepare import Preparer
from nvvl.distill.recipe import DistillRecipe
from nvvl.errors import RecipeError
from nvvl.model.config import VLMConfig
from nvvl.model.load import load_model
from nvvl.progress import Progress
from nvvl.staging import staged_folder

# Items that are made ready together: enough to fill rows, few enough to hold their pixels.
_GROUP = 16


def precompute_logits(
    teacher: Path,
    items: CalibrationSet,
    recipe: DistillRecipe,
    out: Path,
    *,
    num_tokens: int = 64,
    seed: int = 0,
    device: torch.device | str = "cpu",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> int:
    """Write the teacher's most likely tokens at every position of a set that counts.

    Args:
        teacher: The BF16 checkpoint.
        items: All of them, those for validation included.
        recipe: Says which positions count and what EVS drops.
        out: The folder to make.
        num_tokens: Kept of each position.
        seed: Of the split, which is only checked here.
        device: Where the teacher runs.
        overwrite: Replace an earlier output.
        progress: Called after each item that is looked through, then after each group of items.

    Returns:
        Positions written.

    Raises:
        RecipeError: if the recipe needs more of the teacher than its logits, or the teacher has
            fewer tokens.
        DataError: if an item cannot be used.
        OutputError: if ``out`` exists, or the disk is full.
    """
    require_logits_suffice(recipe)
    vocabulary = VLMConfig.from_folder(teacher).language.vocab_size
    if num_tokens > vocabulary:
        raise RecipeError(
            f"--top {num_tokens}: {teacher} knows {vocabulary} tokens; give as many or fewer"
        )
    sources = [teacher, *items.files]
    with staged_folder(out, sources=sources, overwrite=overwrite) as folder, torch.no_grad():
        device = torch.device(device)
        data = DistillData.from_set(
            items, teacher, recipe, seed=seed, keep_together=False, progress=progress
        )
        data.require_answers()
        model = load_model(teacher, device=device)
        prepare = Preparer(model, recipe, device=device)
        head = model.language_model.lm_head.weight
        identity = logits_identity(teacher, recipe, items)
        writer = LogitsWriter(folder, identity, num_tokens=num_tokens)
        num_positions, num_items = 0, len(items.items)
        for start in range(0, num_items, _GROUP):
            for batch in data.pack(range(start, min(start + _GROUP, num_items))):
                prepared = prepare(batch)
                assert isinstance(prepared.teacher, torch.Tensor)
                sizes = [int(mask.sum()) for mask in batch.loss_masks]
                parts = zip(batch.indices, prepared.teacher.split(sizes), strict=True)
                for index, hidden in parts:
                    writer.add(items.items[index], hidden, head)
                    num_positions += len(hidden)
            if progress is not None:
                progress("teacher", min(start + _GROUP, num_items), num_items)
        writer.finish()
    return num_positions
