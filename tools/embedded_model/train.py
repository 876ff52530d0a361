"""Train the embedded model, from nothing to a checkpoint folder in the released layout.

    python -m nvvl.tools.embedded_model.train OUT [--device cuda] [--scale 1.0] [--workers 14]
    python -m nvvl.tools.embedded_model.train OUT --plan refine --init model/embedded --rows 0.125

Seeds are fixed: the same command gives the same documents in the same order. The state is written
every few minutes and at the end of each stage; the same command goes on from there.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvvl.model.config import VLMConfig
from nvvl.model.load import load_model
from nvvl.model.products import has_fast_bf16
from nvvl.model.vlm import NemotronNanoVL
from nvvl.tools.embedded_model.data import (
    NUM_GLYPH_PLACES,
    TrainingBatch,
    batches,
    load_processor,
)
from nvvl.tools.embedded_model.muon import Muon
from nvvl.tools.embedded_model.publish import publish
from nvvl.tools.embedded_model.spec import TILE, make_config
from nvvl.tools.embedded_model.stages import PLANS, Stage
from nvvl.tools.embedded_model.state import load_state, save_state

MUON_RATE = 3e-3
ADAMW_RATE = 2e-3
SAVE_EVERY_SECONDS = 240
RESIDUAL_OUTPUTS = ("out_proj.weight", "down_proj.weight", "o_proj.weight", "fc2.weight")


class Trainee(nn.Module):
    """The model, and the glyph head that is thrown away after training."""

    def __init__(self, config: VLMConfig) -> None:
        super().__init__()
        self.model = NemotronNanoVL(config)
        self.glyph_head = nn.Linear(config.vision.hidden_size, NUM_GLYPH_PLACES)

    def losses(self, batch: TrainingBatch, stage: Stage) -> tuple[Tensor, Tensor]:
        """Return the answer loss (nats a token) and the glyph loss (nats a patch)."""
        zero = torch.zeros((), device=batch.input_ids.device)
        config = self.model.config
        features = None
        glyph_loss = zero
        if batch.pixels.shape[0]:
            patches = self.model.vision_model.radio_model.model(normalize(batch.pixels, config))
            if stage.glyph_weight and batch.glyphs.shape[0]:
                glyph_loss = self.glyph_loss(patches, batch.glyphs)
            if stage.answers:
                features = self.model.project(patches)
        if not stage.answers:
            return zero, glyph_loss
        embeds = self.model.embed(batch.input_ids, features)
        hidden, _ = self.model.language_model.hidden_states(embeds)
        targets = batch.input_ids[:, 1:]
        wanted = batch.answer_mask[:, 1:]
        logits = self.model.language_model.lm_head(hidden[:, :-1][wanted])
        return F.cross_entropy(logits.float(), targets[wanted]), glyph_loss

    def glyph_loss(self, patches: Tensor, glyphs: Tensor) -> Tensor:
        """Judge, patch by patch, which glyphs have their centre in which of its cells.

        Args:
            patches: (n, R*R, C) vision features.
            glyphs: (k, 3) int64 rows of tile, patch, and glyph and cell as `glyph_targets` counts.
        """
        logits = self.glyph_head(patches).float()
        wanted = torch.zeros_like(logits)
        wanted[glyphs[:, 0], glyphs[:, 1], glyphs[:, 2]] = 1.0
        return F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum") / (
            patches.shape[0] * patches.shape[1]
        )


def normalize(pixels: Tensor, config: VLMConfig) -> Tensor:
    """Normalize uint8 tiles (n, 3, S, S) as the processor does."""
    mean = torch.tensor(config.norm_mean, device=pixels.device).view(3, 1, 1)
    std = torch.tensor(config.norm_std, device=pixels.device).view(3, 1, 1)
    return (pixels.float() / 255 - mean) / std


def initialize(trainee: Trainee) -> None:
    """Draw the first weights; residual outputs start small, Mamba2 time steps in 0.001..0.1."""
    torch.manual_seed(0)
    depth = len(trainee.model.config.language.layers)
    for name, parameter in trainee.named_parameters():
        if name == "glyph_head.weight":
            parameter.data.zero_()  # judges thousands of places, of which few hold a glyph
        elif name.endswith("A_log"):
            parameter.data = torch.log(torch.linspace(1, 16, parameter.numel()))
        elif name.endswith("dt_bias"):
            steps = torch.exp(
                torch.rand(parameter.numel()) * (math.log(0.1) - math.log(0.001)) + math.log(0.001)
            )
            parameter.data = steps + torch.log(-torch.expm1(-steps))
        elif name.endswith(".D") or (parameter.ndim == 1 and name.endswith("weight")):
            parameter.data.fill_(1.0)
        elif name.endswith("bias"):
            parameter.data.fill_(-6.0 if name.startswith("glyph_head") else 0.0)
        elif name.endswith("conv1d.weight"):
            nn.init.uniform_(parameter, -0.5, 0.5)
        elif parameter.ndim == 2 and not name.endswith(("embeddings.weight", "token")):
            std = parameter.shape[1] ** -0.5
            if name.endswith(RESIDUAL_OUTPUTS):
                std /= math.sqrt(depth)
            nn.init.normal_(parameter, std=std)
        else:
            nn.init.normal_(parameter, std=0.02)


def make_optimizers(trainee: Trainee) -> list[torch.optim.Optimizer]:
    """Build Muon for the matrices inside blocks and AdamW for all else."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in trainee.named_parameters():
        is_matrix = parameter.ndim == 2 and name.endswith("weight")
        edge = name.endswith(("embeddings.weight", "lm_head.weight", "glyph_head.weight"))
        (matrices if is_matrix and not edge else others).append(parameter)
    return [
        Muon(matrices, lr=MUON_RATE, weight_decay=0.01),
        torch.optim.AdamW(others, lr=ADAMW_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def freeze(trainee: Trainee, stage: Stage) -> None:
    """Let only the stage's parts have gradients."""
    parts = {
        "vision": (trainee.model.vision_model,),
        "glyph_head": (trainee.glyph_head,),
        "projector": (trainee.model.mlp1,),
        "language": (trainee.model.language_model,),
    }
    for part, modules in parts.items():
        for module in modules:
            module.requires_grad_(part in stage.parts)


def rate(stage: Stage, step: int) -> float:
    """Return the share of the peak learning rate: a short warmup, then linear start to end."""
    warmup = min(1.0, (step + 1) / min(100, stage.steps))
    return warmup * (stage.start + (stage.end - stage.start) * step / stage.steps)


def train_stage(
    trainee: Trainee,
    optimizers: list[torch.optim.Optimizer],
    stage: Stage,
    stream: Iterator[TrainingBatch],
    *,
    first_step: int,
    checkpoint: Path,
    log: Path,
) -> None:
    """Run one stage from ``first_step`` on."""
    device = next(trainee.parameters()).device
    is_narrow = device.type != "cpu" or has_fast_bf16()
    freeze(trainee, stage)
    trainable = [p for p in trainee.parameters() if p.requires_grad]
    saved = started = time.monotonic()
    for step in range(first_step, stage.steps):
        batch = next(stream)
        for optimizer, peak in zip(optimizers, (MUON_RATE, ADAMW_RATE), strict=True):
            optimizer.param_groups[0]["lr"] = peak * rate(stage, step)
            optimizer.zero_grad(set_to_none=True)
        # most batches are single tiles; compiling the rarer shapes costs more than it saves
        stance = "default" if batch.group == "single" else "force_eager"
        narrow = torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_narrow)
        with torch.compiler.set_stance(stance), narrow:
            answer_loss, glyph_loss = trainee.losses(batch, stage)
        (answer_loss + stage.glyph_weight * glyph_loss).backward()
        norm = nn.utils.clip_grad_norm_(trainable, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if step % 50 == 0 or step == stage.steps - 1:
            row = {
                "stage": stage.name,
                "step": step,
                "group": batch.group,
                "answer_loss": round(answer_loss.item(), 4),
                "glyph_loss": round(glyph_loss.item(), 4),
                "grad_norm": round(float(norm), 3),
                "seconds": round(time.monotonic() - started, 1),
            }
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
        if time.monotonic() - saved > SAVE_EVERY_SECONDS:
            save_state(checkpoint, trainee, optimizers, stage=stage.name, step=step + 1)
            saved = time.monotonic()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder that receives the model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the steps")
    parser.add_argument("--workers", type=int, default=2, help="processes that draw documents")
    parser.add_argument("--compile", action="store_true", help="compile the layers (CUDA)")
    parser.add_argument("--init", type=Path, help="start from this checkpoint's weights")
    parser.add_argument("--plan", choices=PLANS, default="whole", help="stages, see stages.py")
    parser.add_argument("--seed", type=int, default=0, help="which documents are drawn")
    parser.add_argument("--rows", type=float, default=1.0, help="multiplies the rows of a batch")
    parser.add_argument(
        "--tile", type=int, default=TILE, help="side of a tile while training, in pixels"
    )
    parser.add_argument("--work", type=Path, help="resumable state (default OUT.work)")
    arguments = parser.parse_args()

    work = arguments.work or arguments.out.with_name(arguments.out.name + ".work")
    work.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    config = VLMConfig.from_dict(make_config(arguments.tile))
    processor = load_processor(work, config)
    trainee = Trainee(config)
    initialize(trainee)
    trainee.to(arguments.device)
    if arguments.compile:
        for block in (
            *trainee.model.vision_model.radio_model.model.blocks,
            *trainee.model.language_model.backbone.layers,
        ):
            block.compile(dynamic=False)
    optimizers = make_optimizers(trainee)
    checkpoint = work / "state.safetensors"
    stage_name, step = load_state(checkpoint, trainee, optimizers)
    if stage_name is None and arguments.init:
        weights = load_model(arguments.init, dtype=torch.float32).state_dict()
        weights.pop("vision_model.radio_model.summary_idxs")  # written by `publish`
        trainee.model.load_state_dict(weights)

    stages = PLANS[arguments.plan](arguments.scale)
    names = [stage.name for stage in stages]
    first = names.index(stage_name) if stage_name else 0
    for index, stage in enumerate(stages[first:], start=first):
        begin = step if index == first else 0
        stream = batches(
            stage,
            processor=processor,
            seed=1000 * arguments.seed + index,
            first=begin,
            workers=arguments.workers,
            rows=arguments.rows,
            device=torch.device(arguments.device),
        )
        train_stage(
            trainee,
            optimizers,
            stage,
            stream,
            first_step=begin,
            checkpoint=checkpoint,
            log=work / "log.jsonl",
        )
        following = names[index + 1] if index + 1 < len(names) else "done"
        if following != "done":
            save_state(checkpoint, trainee, optimizers, stage=following, step=0)
        publish(trainee.model, work / "tokenizer.json", arguments.out)


if __name__ == "__main__":
    main()
