"""The verbs ``nvvl distill``, ``nvvl precompute`` and ``nvvl rotate``."""

import shlex
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nvvl.distill.recipe import LossTokens
from nvvl.options import (
    SET_HELP,
    DeviceOption,
    JsonOption,
    ModelArgument,
    OverwriteOption,
    ResumableOverwriteOption,
    SeedOption,
    choose_device,
)
from nvvl.quantize.recipe import MOST_ITEMS

if TYPE_CHECKING:
    from nvvl.distill.blockwise import BlockwiseResult
    from nvvl.distill.recipe import DistillRecipe
    from nvvl.distill.train import DistillResult

DataOption = Annotated[str, typer.Option(metavar="SET", help=SET_HELP)]
DistillRecipeOption = Annotated[
    str | None,
    typer.Option(
        help="Preset or TOML file; else qad_nvfp4, or qad_nvfp4_embedded for the teacher "
        "'embedded', whose loss is then KL where logits are stored."
    ),
]
StepsOption = Annotated[int | None, typer.Option(min=1, help="Steps; else the recipe's.")]


def distill(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder that nvvl quantize wrote; is not changed.")
    ],
    *,
    teacher: Annotated[
        str, typer.Option(metavar="MODEL", help="The BF16 model that RUN was made from.")
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder to write; BF16 weights go to OUT.bf16.")
    ],
    data: DataOption = "default",
    recipe: DistillRecipeOption = None,
    steps: StepsOption = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate; else the recipe's.")] = None,
    logits: Annotated[
        Path | None,
        typer.Option(
            metavar="LOGITS",
            help="Folder that nvvl precompute wrote: the teacher's layers are then not needed.",
        ),
    ] = None,
    shard: Annotated[
        bool,
        typer.Option("--shard", help="With several processes: a slice of the state each (FSDP2)."),
    ] = False,
    tensorboard: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write TensorBoard events there too.")
    ] = None,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    overwrite: ResumableOverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train a quantized checkpoint towards its BF16 teacher; goes on where it stopped.

    Several processes: torchrun --nproc-per-node N -m nvvl distill ...
    """
    from nvvl.calib_data.manifest import load_calibration_set
    from nvvl.console import show_progress
    from nvvl.distill.blockwise import distill_blockwise
    from nvvl.distill.execution import Execution
    from nvvl.distill.train import distill as distill_run
    from nvvl.model.load import resolve_model
    from nvvl.model.processes import Processes

    processes = Processes(choose_device(device))
    with processes.agreed():
        chosen = _choose_recipe(teacher, recipe, steps, lr, stored=logits is not None)
        source = resolve_model(teacher)
        items = load_calibration_set(data, num_items=chosen.num_items, seed=seed)
    shown = show_progress() if processes.is_main else nullcontext(None)
    with shown as progress:
        execution = Execution(
            device=processes.device,
            processes=processes,
            shard=shard,
            logits=logits,
            tensorboard=tensorboard,
            overwrite=overwrite,
            progress=progress,
            command=["nvvl", *sys.argv[1:]],
        )
        result: BlockwiseResult | DistillResult | None
        if chosen.method == "layers":
            result = distill_blockwise(
                run, source, out, chosen, items, seed=seed, execution=execution
            )
        else:
            result = distill_run(run, source, out, chosen, items, seed=seed, execution=execution)
    if result is not None:  # otherwise the main process says it
        _show_distilled(out, result, as_json)


def precompute(
    model: ModelArgument,
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    data: DataOption = "default",
    recipe: DistillRecipeOption = None,
    steps: StepsOption = None,
    top: Annotated[int, typer.Option(min=1, help="Tokens kept of each position.")] = 64,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compute a teacher's logits once, for nvvl distill --logits.

    Give the data, recipe, steps and seed of the distillation they are for.
    """
    from nvvl.calib_data.manifest import load_calibration_set
    from nvvl.console import print_json, show_progress
    from nvvl.distill.precompute import precompute_logits
    from nvvl.model.load import resolve_model

    chosen = _choose_recipe(model, recipe, steps, None, stored=True)
    source = resolve_model(model)
    items = load_calibration_set(data, num_items=chosen.num_items, seed=seed)
    with show_progress() as progress:
        num_positions = precompute_logits(
            source,
            items,
            chosen,
            out,
            num_tokens=top,
            seed=seed,
            device=choose_device(device),
            overwrite=overwrite,
            progress=progress,
        )
    if as_json:
        print_json({"out": str(out), "items": len(items.items), "positions": num_positions})
    else:
        print(f"{out}: {num_positions} positions of {len(items.items)} items, {top} tokens each")


def rotate(
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    *,
    data: DataOption = "default",
    samples: Annotated[
        int,
        typer.Option(
            min=2, max=MOST_ITEMS, help="Items; an eighth of them, 64 at most, are held out."
        ),
    ] = 576,
    steps: Annotated[
        int, typer.Option(min=1, max=1_000_000, help="Gradient-descent steps per rotation.")
    ] = 400,
    loss_tokens: Annotated[
        LossTokens, typer.Option(help="Positions that count: answers alone, or all text.")
    ] = "answers",
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write an equal BF16 model whose hidden states round to NVFP4 with less harm.

    Quantize, distill and serve it as any other.
    """
    from nvvl.calib_data.manifest import load_calibration_set
    from nvvl.console import print_json, show_progress
    from nvvl.distill.rotate import rotate as rotate_model
    from nvvl.model.load import resolve_model

    source = resolve_model(model)
    items = load_calibration_set(data, num_items=samples, seed=seed)
    with show_progress() as progress:
        result = rotate_model(
            source,
            out,
            items,
            num_held_out=min(64, max(1, len(items.items) // 8)),
            num_steps=steps,
            loss_tokens=loss_tokens,
            seed=seed,
            device=choose_device(device),
            overwrite=overwrite,
            progress=progress,
            command=["nvvl", *sys.argv[1:]],
        )
    if as_json:
        print_json({"out": str(out), **vars(result)})
        return
    print(
        f"{out}: of what was turned, rounding to NVFP4 is expected to do {result.harm:.2f} times "
        f"the harm; KL to {model} {result.kl:.1e} nats a token of {result.num_held_out} items"
    )
    print("next:", shlex.join(["nvvl", "quantize", "nvfp4", str(out), "OUT"]))


def _show_distilled(out: Path, result: "BlockwiseResult | DistillResult", as_json: bool) -> None:
    from nvvl.console import print_json
    from nvvl.distill.train import DistillResult

    values: dict[str, Any]
    if isinstance(result, DistillResult):
        values = {
            "start_loss": result.start_loss,
            "best_loss": result.best_loss,
            "best_step": result.best_step,
        }
        text = (
            f"validation loss {result.start_loss:.5f} before, {result.best_loss:.5f} at step "
            f"{result.best_step}, which is written"
        )
    else:
        trained = [layer for layer in result.layers if layer.trained]
        better = [layer for layer in trained if layer.error < layer.start_error]
        last = trained[-1]
        values = {"layers": [vars(layer) for layer in result.layers]}
        text = (
            f"{len(better)} of {len(trained)} trained layers are nearer to BF16; error of the last "
            f"{last.start_error:.2e} before its training, {last.error:.2e} after"
        )
    if as_json:
        print_json({"out": str(out), "bf16": str(result.bf16), **values})
        return
    print(f"{out}: {text}")
    print("prove it:", shlex.join(["nvvl", "verify", str(out), "--against", str(result.bf16)]))


def _choose_recipe(
    teacher: str, recipe: str | None, steps: int | None, lr: float | None, *, stored: bool
) -> "DistillRecipe":
    """Return the recipe that is named, or the one for a teacher, with what was set apart.

    Args:
        teacher: The BF16 model.
        recipe: Preset or file.
        steps: In place of the recipe's.
        lr: In place of the recipe's.
        stored: Whether the teacher is there as stored logits, which serve KL alone.
    """
    from nvvl.distill.presets import load_distill_recipe

    preset = "qad_nvfp4_embedded" if teacher == "embedded" else "qad_nvfp4"
    chosen = load_distill_recipe(recipe or preset)
    if recipe is None and stored and chosen.loss != "kl":
        chosen = replace(chosen, name=f"{preset}_kl", loss="kl", layer_loss=0.0)
    if steps is not None:
        chosen = replace(chosen, num_steps=steps)
    return chosen if lr is None else replace(chosen, learning_rate=lr)
