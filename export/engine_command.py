"""The verb ``nvvl export engine``."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from nvvl.options import JsonOption, OverwriteOption


def engine(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            help="Checkpoint: a folder that nvvl quantize wrote, or a BF16 MODEL; or the folder "
            "that nvvl export onnx wrote of one.",
        ),
    ],
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="Folder to write.")],
    *,
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="GPU to build for: sm80, sm86, sm89, sm120 or sm121; may be given several times. "
            "FP8 needs sm89 or newer, NVFP4 sm120 or sm121. With --builder tensorrt, the GPU of "
            "this machine.",
        ),
    ] = None,
    builder: Annotated[
        Literal["tensorrt-rtx", "tensorrt"],
        typer.Option(help="tensorrt-rtx needs no GPU; tensorrt builds for the GPU it finds."),
    ] = "tensorrt-rtx",
    recipe: Annotated[
        Path | None, typer.Option(help="TOML recipe of the graphs, as for nvvl export onnx.")
    ] = None,
    parts: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Consecutive engines of the language model, 1 to its number of layers.",
        ),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DIM=MIN:USUAL:MAX",
            help="Range of a dynamic dimension, such as tokens=1:512:2048 or batch=1:1:8; may be "
            "given several times.",
        ),
    ] = None,
    weight_streaming: Annotated[
        bool, typer.Option("--weight-streaming", help="Let engines leave weights in CPU memory.")
    ] = False,
    timing_cache: Annotated[
        Path | None, typer.Option(help="File of measured kernel times, for --builder tensorrt.")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Refuse graphs that, by an estimate, take more memory than this to build, e.g. "
            "6GB; else than this machine has free. A build is not kept to it.",
        ),
    ] = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Build TensorRT engines of vision, prefill and decode."""
    from nvvl.console import print_json, show_progress
    from nvvl.errors import EngineError
    from nvvl.export.engine_targets import choose_builder
    from nvvl.export.onnx_extra import require_onnx
    from nvvl.model.resolve import resolve_model
    from nvvl.quantize.limits import parse_memory

    chosen_builder, targets = choose_builder(builder, target or ())
    require_onnx()
    from nvvl.export.engine import EngineOptions, build_engines
    from nvvl.export.engine_run import build_from_checkpoint
    from nvvl.export.onnx_io import IO_NAME
    from nvvl.export.onnx_recipe import GraphRecipe
    from nvvl.export.shape_profile import parse_spans

    options = EngineOptions(
        builder=chosen_builder,
        targets=targets,
        spans=parse_spans(shape or ()),
        weight_streaming=weight_streaming,
        timing_cache=timing_cache,
        memory_bytes=None if memory is None else parse_memory(memory),
    )
    folder = resolve_model(run)
    command = ["nvvl", *sys.argv[1:]]
    with show_progress() as progress:
        if (folder / IO_NAME).exists():
            if recipe is not None or parts is not None:
                raise EngineError(
                    f"{run}: holds graphs already, so --recipe and --parts cannot change them; "
                    "leave these out, or give the checkpoint"
                )
            result = build_engines(
                folder, dest, options, overwrite=overwrite, progress=progress, command=command
            )
        else:
            graphs = GraphRecipe() if recipe is None else GraphRecipe.from_toml(recipe)
            graphs = graphs if parts is None else replace(graphs, num_parts=parts)
            result = build_from_checkpoint(
                folder,
                dest,
                graphs,
                options,
                overwrite=overwrite,
                progress=progress,
                command=command,
            )
    if as_json:
        print_json(result.to_dict())
        return
    for built in result.engines.values():
        print(f"{built.path.name:20} {built.size_bytes:>14,}  built in {built.seconds:.1f} s")
