"""Arguments and options that several verbs of the command line have in common."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from nvvl.errors import HardwareError

Preset = Literal["fp8", "nvfp4", "nvfp4-w4a16", "mixed"]
Device = Literal["auto", "cpu", "cuda"]

EXIT_CHECK_FAILED = 1

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A folder, a Hub id, or `embedded`.")
]
SET_HELP = "`default`, a built set, a folder of images, or a JSONL file."
CalibArgument = Annotated[str, typer.Argument(metavar="SET", help=SET_HELP)]
DeviceOption = Annotated[Device, typer.Option(help="Where to compute.")]
SeedOption = Annotated[
    int,
    typer.Option(
        min=0,
        max=2**63 - 1,  # what JSON files and torch's generators hold
        help="Which items are generated, or which of your own are taken.",
    ),
]
MemoryOption = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Let no process take more memory, e.g. 6GB; refused at once if that is too little.",
    ),
]
RecipeOption = Annotated[
    Path | None, typer.Option(help="TOML recipe to use in place of the format's own.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output.")]
ResumableOverwriteOption = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Replace an earlier output, and discard an unfinished run with other settings; one "
        "with the same settings is resumed.",
    ),
]


def choose_device(device: Device) -> str:
    """Return the torch device that an option means."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise HardwareError("--device cuda: torch finds no CUDA device here; use --device cpu")
    return device
