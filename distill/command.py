"""The verb ``nvvl distill``."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from nvvl.options import DeviceOption, JsonOption, OverwriteOption, SeedOption, choose_device


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
    data: Annotated[
        str,
        typer.Option(metavar="SET", help="Items: default, a folder of images, or a JSONL file."),
    ] = "default",
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Preset or TOML file; else qad_nvfp4, or qad_nvfp4_embedded for that teacher."
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps; else the recipe's.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate; else the recipe's.")] = None,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train a quantized checkpoint towards its BF16 teacher; goes on where it stopped."""
    from nvvl.calib_data.manifest import load_calibration_set
    from nvvl.console import print_json, show_progress
    from nvvl.distill.presets import load_distill_recipe
    from nvvl.distill.train import distill as distill_run
    from nvvl.model.load import resolve_model

    preset = "qad_nvfp4_embedded" if teacher == "embedded" else "qad_nvfp4"
    chosen = load_distill_recipe(recipe or preset)
    chosen = replace(
        chosen, num_steps=steps or chosen.num_steps, learning_rate=lr or chosen.learning_rate
    )
    num_items = chosen.num_training_items + chosen.num_validation_items
    source = resolve_model(teacher)
    items = load_calibration_set(data, num_items=num_items, seed=seed)
    with show_progress() as progress:
        result = distill_run(
            run,
            source,
            out,
            chosen,
            items,
            seed=seed,
            device=choose_device(device),
            overwrite=overwrite,
            progress=progress,
            command=["nvvl", *sys.argv[1:]],
        )
    if as_json:
        losses = {"start_loss": result.start_loss, "best_loss": result.best_loss}
        print_json(
            {"out": str(out), "bf16": str(result.bf16), **losses, "best_step": result.best_step}
        )
        return
    print(
        f"{out}: validation loss {result.start_loss:.5f} before, {result.best_loss:.5f} at step "
        f"{result.best_step}, which is written"
    )
    print(f"prove it: nvvl verify {out} --against {result.bf16}")
