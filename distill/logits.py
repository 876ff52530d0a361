"""The teacher's answers, computed once and kept on disk.

    LOGITS/logits-00000.safetensors   of 64 items each: {n}.tokens, {n}.log_probs, {n}.log_tail
    LOGITS/manifest.json              teacher, settings, a hash of every file and of every item

The logits of a position are the vocabulary wide, so only its most likely tokens are kept, with the
probability of all others together (``losses.TopPositions``). A student that trains against them
needs no teacher beside it, and several can share them. They belong to one teacher, one choice of
counted tokens and one content of each item; anything else is refused.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import nvvl
from nvvl.calib_data.items import Item, item_hash
from nvvl.calib_data.manifest import CalibrationSet
from nvvl.distill.losses import TopPositions, chunk_positions, take_top
from nvvl.distill.recipe import DistillRecipe
from nvvl.distill.teacher import teacher_digest
from nvvl.errors import CheckpointError, DataError, RecipeError, describe_misfit, writing
from nvvl.model.checkpoint_writer import write_safetensors
from nvvl.model.hashing import changed_files, hash_file
from nvvl.model.safetensors_io import read_header, read_tensor
from nvvl.quantize.identity import describe_differences
from nvvl.staging import MANIFEST_NAME

_FORMAT = "nvvl teacher logits 1"
_PARTS = ("tokens", "log_probs", "log_tail")
ITEMS_PER_FILE = 64


class StoredLogits:
    """A finished folder, opened for reading.

    Attributes:
        folder: Where it lies.
        sha256: Of its manifest, which names everything else by hash.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        """Read the manifest and check every file against it.

        Args:
            folder: What `LogitsWriter` wrote.
            identity: What the logits must have been made with.

        Raises:
            CheckpointError: if it is not such a folder, a file changed, or it was made otherwise.
        """
        self.folder = folder
        path = folder / MANIFEST_NAME
        try:
            text = path.read_text(encoding="utf-8")
            manifest = json.loads(text)
            files, found = dict(manifest["files"]), dict(manifest["identity"])
            self._items = dict(manifest["items"])
            if manifest["format"] != _FORMAT:
                raise ValueError(f"format {manifest['format']!r}")
        except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path}: not a folder of teacher logits ({describe_misfit(error)}); "
                "give one that nvvl precompute wrote"
            ) from None
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()
        differing = describe_differences(found, identity)
        if differing:
            raise CheckpointError(
                f"{folder}: the logits were made otherwise: {'; '.join(differing)}; give another "
                "folder, or make them again: nvvl precompute ... --overwrite"
            )
        changed = changed_files(folder, files)
        if changed:
            raise CheckpointError(
                f"{folder}: {', '.join(changed)}: missing or changed; make the logits again"
            )
        self._headers = {name: read_header(folder / name) for name in files}

    def check(self, item: Item) -> None:
        """Refuse an item that the logits are not of.

        Raises:
            DataError: naming it.
        """
        entry = self._items.get(item.item_id)
        if entry is None or entry["sha256"] != item_hash(item):
            what = "has no entry" if entry is None else "has another content"
            raise DataError(
                f"item {item.item_id}: {what} in the logits of {self.folder}; give the set, the "
                "seed and the number of items they were made with"
            )

    def read(self, item_ids: Sequence[str], device: torch.device) -> TopPositions:
        """Return the positions of some items, one behind the other."""
        parts: list[list[Tensor]] = []
        for item_id in item_ids:
            entry = self._items[item_id]
            header = self._headers[entry["file"]]
            parts.append([read_tensor(header[f"{entry['key']}.{part}"]) for part in _PARTS])
        tokens, log_probs, log_tail = (
            torch.cat(part).to(device) for part in zip(*parts, strict=True)
        )
        return TopPositions(tokens.long(), log_probs, log_tail)


class LogitsWriter:
    """Writes a folder item by item; it is valid once `finish` has written the manifest."""

    def __init__(self, folder: Path, identity: Mapping[str, Any], *, num_tokens: int) -> None:
        """Start writing.

        Args:
            folder: An empty folder.
            identity: As `StoredLogits` will be asked for.
            num_tokens: Most likely tokens kept of each position.
        """
        self._folder = folder
        self._identity = dict(identity)
        self._num_tokens = num_tokens
        self._waiting: dict[str, Tensor] = {}
        self._items: dict[str, dict[str, Any]] = {}
        self._files: dict[str, str] = {}

    def add(self, item: Item, hidden: Tensor, head: Tensor) -> None:
        """Keep the logits of one item.

        Args:
            item: For its id and hash.
            hidden: (N, D) the teacher's last hidden states at the positions that count.
            head: (V, D).
        """
        wide = head.float()
        parts = hidden.split(chunk_positions(len(head)))
        tops = [take_top(part.float() @ wide.T, self._num_tokens) for part in parts]
        key = len(self._items) % ITEMS_PER_FILE
        name = f"logits-{len(self._files):05}.safetensors"
        self._items[item.item_id] = {"sha256": item_hash(item), "file": name, "key": key}
        self._waiting[f"{key}.tokens"] = torch.cat([top.tokens for top in tops]).int().cpu()
        self._waiting[f"{key}.log_probs"] = torch.cat([top.log_probs for top in tops]).cpu()
        self._waiting[f"{key}.log_tail"] = torch.cat([top.log_tail for top in tops]).cpu()
        if key == ITEMS_PER_FILE - 1:
            self._flush(name)

    def finish(self) -> None:
        """Write what is waiting, and the manifest.

        Raises:
            OutputError: if the disk is full.
        """
        if self._waiting:
            self._flush(f"logits-{len(self._files):05}.safetensors")
        manifest = {
            "format": _FORMAT,
            "nvvl_version": nvvl.__version__,
            "identity": self._identity,
            "files": self._files,
            "items": self._items,
        }
        path = self._folder / MANIFEST_NAME
        with writing(path):
            path.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")

    def _flush(self, name: str) -> None:
        write_safetensors(self._folder / name, self._waiting)
        self._files[name] = hash_file(self._folder / name)
        self._waiting = {}


def logits_identity(teacher: Path, recipe: DistillRecipe, items: CalibrationSet) -> dict[str, Any]:
    """Return what stored logits must have been made with."""
    return {
        "teacher": teacher_digest(teacher),
        "loss_tokens": recipe.loss_tokens,
        "video_pruning_rate": recipe.video_pruning_rate,
        "set": items.spec,
    }


def require_logits_suffice(recipe: DistillRecipe) -> None:
    """Refuse a recipe whose loss needs the teacher itself.

    Raises:
        RecipeError: naming the key.
    """
    if recipe.method != "whole":
        raise RecipeError(
            f'method: stored logits serve "whole" alone, got "{recipe.method}", which compares '
            "layers; train without --logits"
        )
    if recipe.loss != "kl":
        raise RecipeError(
            f'loss: stored logits serve "kl" alone, got "{recipe.loss}"; give a recipe with that '
            "loss, or train without --logits"
        )
    if recipe.layer_loss:
        raise RecipeError(
            "layer_loss: compares the layers of both models, and stored logits have none; set it "
            "to 0, or train without --logits"
        )
