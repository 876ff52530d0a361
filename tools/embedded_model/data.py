"""Training batches: generated documents as token rows, uint8 tiles and glyph targets.

Worker processes draw whole batches; a batch depends on its stage and number alone, so a resumed
run sees the documents it would have seen. Tiles stay uint8 until they are on the device.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nvvl.calib_data.documents import Document, document_messages, make_document
from nvvl.calib_data.texts import text_passage
from nvvl.model.config import VLMConfig
from nvvl.model.processor import Processor
from nvvl.tools.embedded_model.stages import GROUPS, Stage
from nvvl.tools.embedded_model.tokenizer import train_tokenizer

MOST_TURNS = 6
REPLAY_POOL = 48

NUM_GLYPHS = 95
"""Printable ASCII, 0x20 to 0x7e."""

CELL_ROWS, CELL_COLUMNS = 2, 4
"""Cells of a patch. In print of 12 px a patch holds three letters of each of two lines; which of
them stands where is what the vision tower has to tell the language model."""

NUM_GLYPH_PLACES = CELL_ROWS * CELL_COLUMNS * NUM_GLYPHS
"""Glyphs of a patch, counted apart in each of its cells."""


@dataclass
class TrainingBatch:
    """One batch, padded on the right.

    Attributes:
        group: key of `GROUPS`.
        input_ids: (B, T) int64.
        answer_mask: (B, T) bool, True on tokens to be predicted.
        pixels: (n, 3, S, S) uint8 tiles of all rows, in order; n may be 0.
        glyphs: (k, 3) int64 rows of tile, patch, and cell * `NUM_GLYPHS` + glyph; only documents
            of one tile have any.
    """

    group: str
    input_ids: Tensor
    answer_mask: Tensor
    pixels: Tensor
    glyphs: Tensor

    def to(self, device: torch.device) -> "TrainingBatch":
        """Return the batch on ``device``."""
        return TrainingBatch(
            self.group,
            self.input_ids.to(device, non_blocking=True),
            self.answer_mask.to(device, non_blocking=True),
            self.pixels.to(device, non_blocking=True),
            self.glyphs.to(device, non_blocking=True),
        )


class Batches(Dataset[TrainingBatch]):
    """The batches of one stage by number."""

    def __init__(self, stage: Stage, processor: Processor, seed: int, rows: float) -> None:
        self.stage = stage
        self.rows = rows
        self.processor = processor
        self.seed = seed

    def __len__(self) -> int:
        return self.stage.steps

    def __getitem__(self, number: int) -> TrainingBatch:
        rng = random.Random(f"{self.seed}:{number}")
        group = pick(rng, self.stage.groups)
        kinds, size, length = GROUPS[group]
        size = max(1, round(size * self.rows))
        rows = [self.row(rng, pick(rng, kinds), length) for _ in range(size)]
        input_ids = torch.zeros(size, length, dtype=torch.int64)
        answer_mask = torch.zeros(size, length, dtype=torch.bool)
        glyphs = []  # tile and row number agree where a row has one tile, as all with glyphs do
        for index, row in enumerate(rows):
            input_ids[index, : len(row.input_ids)] = row.input_ids
            answer_mask[index, : len(row.input_ids)] = row.answer_mask
            glyphs.append(row.glyphs + np.array([index, 0, 0]))
        pixels = np.concatenate([row.pixels for row in rows])
        return TrainingBatch(
            group,
            input_ids,
            answer_mask,
            torch.from_numpy(pixels),
            torch.from_numpy(np.concatenate(glyphs)),
        )

    def row(self, rng: random.Random, kind: str, length: int) -> "Row":
        """Draw one document of ``kind`` as at most ``length`` token ids, and tiles."""
        if kind == "passage":
            return self.passage(rng, length)
        document = make_document(kind, rng.getrandbits(48), split="train")
        turns = rng.sample(document.turns, k=min(MOST_TURNS, len(document.turns)))
        return document_row(replace(document, turns=tuple(turns)), self.processor, length)

    def passage(self, rng: random.Random, length: int) -> "Row":
        """Draw plain text to be continued."""
        text = text_passage(rng.getrandbits(48), split="train")
        tokens = self.processor.tokenizer.encode(text, add_special_tokens=False).ids
        ids = torch.tensor(tokens[:length])
        size = self.processor.config.image_size
        empty = np.zeros((0, 3, size, size), dtype=np.uint8)
        return Row(ids, torch.ones(len(ids), dtype=torch.bool), empty, np.zeros((0, 3), np.int64))


@dataclass
class Row:
    """One document: ids (T,), answer mask (T,), tiles (n, 3, S, S), glyphs (k, 3)."""

    input_ids: Tensor
    answer_mask: Tensor
    pixels: np.ndarray
    glyphs: np.ndarray


def document_row(document: Document, processor: Processor, length: int) -> Row:
    """Turn a document into ids and uint8 tiles, as many of its turns as fit ``length`` tokens."""
    messages = document_messages(document)
    videos = () if document.video is None else (document.video,)
    images = () if videos else document.images
    while True:
        inputs = processor(messages, images=images, videos=videos, keep_thinking=True)
        if len(inputs.input_ids) <= length or len(messages) == 2:
            break
        messages = messages[:-2]
    config = processor.config
    mean = torch.tensor(config.norm_mean).view(3, 1, 1)
    std = torch.tensor(config.norm_std).view(3, 1, 1)
    pixels = ((inputs.pixel_values * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    glyphs = glyph_targets(document, config) if len(pixels) == 1 else np.zeros((0, 3), np.int64)
    return Row(inputs.input_ids[:length], inputs.answer_mask[:length], pixels.numpy(), glyphs)


def glyph_targets(document: Document, config: VLMConfig) -> np.ndarray:
    """Return (k, 3) rows of 0, patch, and cell * `NUM_GLYPHS` + glyph, for a document of one tile.

    A glyph stands where its centre is on the tile, which is the document's picture enlarged; cells
    are counted from the left, row after row.
    """
    size, patch = config.image_size, config.vision.patch_size
    width, height = document.images[0].size
    rows = []
    for glyph in document.glyphs[0]:
        if glyph.char == " ":
            continue
        x = min((glyph.x0 + glyph.x1) * size // (2 * width), size - 1)
        y = min((glyph.y0 + glyph.y1) * size // (2 * height), size - 1)
        cell = y % patch * CELL_ROWS // patch * CELL_COLUMNS + x % patch * CELL_COLUMNS // patch
        where = y // patch * (size // patch) + x // patch
        rows.append((0, where, cell * NUM_GLYPHS + ord(glyph.char) - 32))
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


def pick(rng: random.Random, shares: dict[str, float]) -> str:
    """Draw a key with the given shares."""
    return rng.choices(list(shares), weights=list(shares.values()))[0]


def batches(
    stage: Stage,
    *,
    processor: Processor,
    seed: int,
    first: int,
    workers: int,
    rows: float,
    device: torch.device,
) -> Iterator[TrainingBatch]:
    """Yield the batches of a stage from step ``first`` on.

    Drawing documents is slower than learning from them on a GPU, so each batch comes back
    ``stage.replays`` times, a while later and with another contrast.
    """
    loader = DataLoader(
        Batches(stage, processor, seed, rows),
        sampler=range(first // (1 + stage.replays), stage.steps),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
    )
    rng = random.Random(f"replay:{seed}:{first}")
    kept: list[TrainingBatch] = []
    for batch in loader:
        batch = batch.to(device)
        yield batch
        kept = [*kept[-REPLAY_POOL + 1 :], batch]
        for _ in range(stage.replays):
            old = rng.choice(kept)
            yield replace(old, pixels=change_contrast(old.pixels, rng))


def change_contrast(pixels: Tensor, rng: random.Random) -> Tensor:
    """Stretch and shift uint8 pixels a little, by one random draw for the batch."""
    scale, shift = rng.uniform(0.7, 1.1), rng.uniform(-20, 20)
    return ((pixels.float() - 128) * scale + 128 + shift).clamp(0, 255).to(torch.uint8)


def load_processor(work: Path, config: VLMConfig) -> Processor:
    """Return the processor, training its tokenizer first where ``work`` has none."""
    file = work / "tokenizer.json"
    if not file.exists():
        train_tokenizer(tokenizer_texts()).save(str(file))
    from tokenizers import Tokenizer

    return Processor(config, Tokenizer.from_file(str(file)))


def tokenizer_texts() -> Iterator[str]:
    """Yield text as the documents hold it, and prose."""
    for seed in range(3000):
        for kind in ("line", "card", "table", "receipt", "text"):
            for question, answer in make_document(kind, seed, split="train").turns:
                yield question
                yield answer
        yield text_passage(seed, split="train")
