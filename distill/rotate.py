"""An equal model whose hidden states round with less harm: ``nvvl rotate``.

    measure sensitivity -> learn rotations and gains -> turn the weights one by one -> compare

What comes out is a BF16 checkpoint in the released layout, of the same config, that computes what
its source does but for BF16's rounding of the turned weights; how far it is from it is measured on
items that nothing was learned from. It is quantized, distilled and served like any other. Two kinds
of bases are turned (method: ``rotation.py``):

* the hidden states, between embeddings or projector and head. Each layer reads them through its
  norm, whose gain is merged into the weights behind it and replaced by the gains that were found;
* the values of each key-value head, between ``v_proj`` and ``o_proj``: attention only adds them up.

``rotation.json`` beside the weights says what was done, and goes along into what is made from them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nvvl.calib_data.manifest import CalibrationSet
from nvvl.distill.data import DistillData
from nvvl.distill.losses import Positions, chunked_loss
from nvvl.distill.prepare import Prepared, Preparer
from nvvl.distill.recipe import DistillRecipe, LossTokens
from nvvl.distill.rotation import best_gains, expected_harm, learn_rotation
from nvvl.distill.sensitivity import Sensitivity, measure_sensitivity, norm_key, values_key
from nvvl.distill.teacher import teacher_digest
from nvvl.distill.turn import Turn, TurnedWeights
from nvvl.distill.write import write_bf16
from nvvl.errors import CheckpointError, ConfigError, DataError
from nvvl.model.checkpoint import Checkpoint
from nvvl.model.config import VLMConfig
from nvvl.model.load import load_model
from nvvl.model.vlm import NemotronNanoVL
from nvvl.progress import Progress
from nvvl.quantize.formats import BLOCK_SIZE
from nvvl.quantize.side_files import ROTATION_NAME
from nvvl.staging import staged_folder

# Items in one row of the two passes; as the distillation of the embedded model has them.
_ITEMS_PER_ROW = 8
_TOKENS_PER_ROW = 4096
# Nats a token. Rounding the turned weights of the embedded model to BF16 costs 2e-4.
_MOST_KL = 0.01


@dataclass(frozen=True)
class RotateResult:
    """What came out.

    Attributes:
        harm: Expected harm of rounding, as a share of the source's.
        kl: Mean KL(source || rotated) in nats over tokens of held-out items.
        num_items: Items it was learned from.
        num_held_out: Items they were compared on.
    """

    harm: float
    kl: float
    num_items: int
    num_held_out: int


def rotate(
    source: Path,
    out: Path,
    items: CalibrationSet,
    *,
    num_held_out: int = 64,
    num_steps: int = 400,
    loss_tokens: LossTokens = "answers",
    seed: int = 0,
    device: torch.device | str = "cpu",
    overwrite: bool = False,
    progress: Progress | None = None,
    command: Sequence[str] = (),
) -> RotateResult:
    """Write a model equal to another whose hidden states round with less harm.

    Args:
        source: A BF16 checkpoint.
        out: The folder to make.
        items: What to learn from, and to compare on.
        num_held_out: Items that are kept for the comparison; fewer where items share a picture or
            a text and so must stay together.
        num_steps: Of gradient descent over each rotation.
        loss_tokens: Positions that count: ``answers``, or all ``text``.
        seed: Of the split and of the tokens that are drawn.
        device: Where the model runs.
        overwrite: Replace an earlier output.
        progress: Called now and then.
        command: The command line, for the manifest.

    Raises:
        ConfigError: if a basis has no whole blocks.
        CheckpointError: if the source cannot be read, or what was written is not equal to it.
        DataError: if an item cannot be used, or none is left to learn from.
        OutputError: if ``out`` exists, or the disk is full.
    """
    recipe = DistillRecipe(
        name="rotate",
        learning_rate=1.0,  # nothing is trained: data are packed and counted as a recipe says
        loss_tokens=loss_tokens,
        items_per_step=_ITEMS_PER_ROW,
        tokens_per_batch=_TOKENS_PER_ROW,
        num_validation_items=num_held_out,
    )
    report = progress or _no_progress
    if len(items.items) <= num_held_out:
        raise DataError(
            f"rotation: the set has {len(items.items)} items and {num_held_out} are kept for the "
            "comparison, so none is left to learn from; give more items (--data, --samples)"
        )
    with staged_folder(out, sources=[source, *items.files], overwrite=overwrite) as folder:
        checkpoint = Checkpoint(source)
        _require_blocks(checkpoint.config)
        device = torch.device(device)
        data = DistillData.from_set(items, source, recipe, seed=seed, progress=report)
        model = load_model(source, device=device)
        prepare = Preparer(model, recipe, device=device)
        sensitivities = measure_sensitivity(model, _prepared(data, prepare, report), seed=seed)
        turn, harm = learn_turn(model, sensitivities, num_steps=num_steps, progress=report)
        del sensitivities  # two matrices (hidden, hidden) a layer
        record = {
            "source": teacher_digest(source),
            "data": {"set": items.spec, "num_items": len(items.items), "seed": seed},
            "steps": num_steps,
            "loss_tokens": loss_tokens,
            "harm": harm,
        }
        weights = TurnedWeights(checkpoint, turn)
        write_bf16(source, folder, weights, command=command, files={ROTATION_NAME: record})
        expected = _answer(model, data, prepare)
        del model, prepare  # the rotated one takes its place
        kl = _compare(expected, folder, data, recipe, device)
    return RotateResult(harm, kl, len(data.training), len(data.validation))


def learn_turn(
    model: NemotronNanoVL,
    sensitivities: Mapping[str, Sensitivity],
    *,
    num_steps: int,
    progress: Progress | None = None,
) -> tuple[Turn, float]:
    """Find all bases of a model.

    Args:
        model: Gives the gains there are now.
        sensitivities: Of this model (`measure_sensitivity`).
        num_steps: Of gradient descent over each rotation.
        progress: Called at each step.

    Returns:
        The turn, and the harm that is expected of rounding as a share of what it was.
    """
    config = model.config.language
    report = progress or _no_progress
    attention = [index for index, kind in enumerate(config.layers) if kind == "attention"]
    bases = 1 + len(attention) * config.num_key_value_heads
    done = 0

    def step(_: int) -> None:
        nonlocal done
        done += 1
        report("rotations", done, bases * num_steps)

    readers = [sensitivities[norm_key(index)] for index in range(len(config.layers))]
    backbone = model.language_model.backbone
    norms = [
        backbone.get_parameter(f"layers.{index}.norm.weight").float()
        for index in range(len(config.layers))
    ]
    before = expected_harm(readers, norms)
    hidden, after = learn_rotation(readers, num_steps=num_steps, progress=step)
    values: dict[int, list[tuple[Tensor, Tensor]]] = {index: [] for index in attention}
    for index in attention:
        for kv_head in range(config.num_key_value_heads):
            sensitivity = sensitivities[values_key(index, kv_head)]
            rotation, harm = learn_rotation([sensitivity], num_steps=num_steps, progress=step)
            before, after = before + expected_harm([sensitivity]), after + harm
            gains = best_gains(sensitivity, rotation)
            values[index].append((rotation * gains, rotation / gains))
    gains_of_norms = [best_gains(reader, hidden) for reader in readers]
    return Turn(hidden, gains_of_norms, values), after / before


def _require_blocks(config: VLMConfig) -> None:
    language = config.language
    for name in ("hidden_size", "head_dim"):
        size = getattr(language, name)
        if size % BLOCK_SIZE:
            raise ConfigError(
                f"{name}: required a multiple of {BLOCK_SIZE}, the block of NVFP4, got {size}"
            )


def _prepared(data: DistillData, prepare: Preparer, report: Progress) -> Iterator[Prepared]:
    indices = data.training
    for start in range(0, len(indices), _ITEMS_PER_ROW):
        for batch in data.pack(indices[start : start + _ITEMS_PER_ROW]):
            yield prepare(batch)
        report("sensitivity", min(start + _ITEMS_PER_ROW, len(indices)), len(indices))


@torch.no_grad()
def _answer(model: NemotronNanoVL, data: DistillData, prepare: Preparer) -> list[Positions]:
    """Return what a model says of the held-out items, by batch."""
    answers = []
    for batch in data.validation_batches():
        hidden = prepare(batch).teacher
        assert isinstance(hidden, Tensor)
        answers.append(Positions(hidden, model.language_model.lm_head.weight))
    return answers


@torch.no_grad()
def _compare(
    expected: Sequence[Positions],
    folder: Path,
    data: DistillData,
    recipe: DistillRecipe,
    device: torch.device,
) -> float:
    """Return the mean KL of what was written to what the source said."""
    rotated = load_model(folder, device=device)
    found = _answer(rotated, data, Preparer(rotated, recipe, device=device))
    total, num_positions = 0.0, 0
    for ours, theirs in zip(found, expected, strict=True):
        total += float(chunked_loss("kl", ours, teacher=theirs)) * len(ours.hidden)
        num_positions += len(ours.hidden)
    kl = total / num_positions
    if not kl <= _MOST_KL:
        raise CheckpointError(
            f"{folder}: the rotated model is {kl:.4g} nats a token from its source, required at "
            f"most {_MOST_KL}; nothing is kept, please report it"
        )
    return kl


def _no_progress(what: str, done: int, total: int) -> None:
    pass
