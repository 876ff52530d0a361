"""The verb ``nvvl export serve``."""

from typing import Annotated, Literal

import typer

from nvvl.options import EXIT_CHECK_FAILED, JsonOption


def serve(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="Checkpoint: a folder that nvvl quantize wrote.")
    ],
    *,
    server: Annotated[
        Literal["vllm", "tensorrt-llm", "sglang", "edge-llm"],
        typer.Option("--for", help="vllm, tensorrt-llm, sglang or edge-llm."),
    ],
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The BF16 source, to compare names with.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check a checkpoint by a server's rules and print the command that serves it."""
    from nvvl.console import print_json
    from nvvl.export.serve import make_serving_plan
    from nvvl.export.view import open_source, open_view
    from nvvl.model.resolve import resolve_model

    source = None if against is None else open_source(resolve_model(against))
    plan = make_serving_plan(open_view(resolve_model(run), source=source), server)
    if as_json:
        print_json(plan.to_dict())
    else:
        print("\n".join(plan.lines()))
    if not plan.passed:
        raise typer.Exit(EXIT_CHECK_FAILED)
