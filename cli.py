"""The command ``nvvl``: one verb a stage, each in ``command.py`` of its room.

A verb parses its arguments and makes one call. It imports what it needs when it is called, so
``nvvl --help`` answers without loading torch. What the user can cause (`NvvlError`) becomes one
line on stderr and exit code 2, and so does what is wrong with the command line itself, or with a
file, where nothing says more of it; a check that fails gives 1; anything else is a bug of nvvl's
own and keeps its traceback. Results go to stdout, progress to stderr.
"""

import re
import sys
import warnings
from itertools import pairwise
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

import nvvl
from nvvl.calib_data.command import show
from nvvl.distill.command import distill, precompute, rotate
from nvvl.errors import NvvlError, ReportedError, first_line
from nvvl.export.command import chat, onnx, plan, verify
from nvvl.export.engine_command import engine
from nvvl.export.serve_command import serve
from nvvl.options import ModelArgument
from nvvl.quantize.command import quantize, show_statistics
from nvvl.reports.command import build_calibration_set, demo, evaluate, report, sweep
from nvvl.reports.harness_command import lm_eval

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # what shells report of a process ended by Ctrl-C


class _Verbs(TyperGroup):
    """The verbs, with every error a user can cause turned into one line."""

    def main(self, *args: Any, **extra: Any) -> NoReturn:
        """Read the command line, run a verb, and exit."""
        from nvvl.console import print_error

        code = EXIT_USER_ERROR
        try:
            try:
                ended = super().main(*args, **{**extra, "standalone_mode": False})
            finally:
                sys.stdout.flush()  # while what goes wrong can still be told
            code = ended or 0
        except ReportedError:  # one line for all processes of a run
            pass
        except NvvlError as error:
            print_error(str(error))
        except typer.TyperException as error:
            if error.format_message():  # else only a verb was missing, and the help is printed
                print_error(_describe_misuse(error))
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            print_error(
                f"out of memory ({first_line(error)}); use a machine or GPU with more, --device "
                "cpu, or a smaller --batch for evaluate, sweep and lm-eval; nvvl quantize keeps "
                "within --memory"
            )
        sys.exit(code)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take the words of a command line, all of which say something."""
        _refuse_empty(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run a verb."""
        from nvvl.console import print_error

        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:  # of which Typer would say nothing
            print_error(str(error) or "interrupted; an output that was not complete is not there")
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except OSError as error:
            print_error(_describe_fault(error))
            raise typer.Exit(EXIT_USER_ERROR) from None


def _describe_fault(error: OSError) -> str:
    """Name the files of an error of the system."""
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    return ": ".join([*names, error.strerror or first_line(error)])


def _refuse_empty(args: list[str]) -> None:
    """Refuse a word without letters, which as a path would mean the current folder."""
    for before, word in pairwise(["nvvl", *args]):
        if not word or re.fullmatch("--[a-z-]+=", word):
            where = word.removesuffix("=") or before
            what = where if where.startswith("-") else f"the argument after {where}"
            raise NvvlError(f"{what}: required a value, got an empty one; is a variable unset?")


def _describe_misuse(error: typer.TyperException) -> str:
    """Say on one line what is wrong with a command line, and where its help is."""
    said = " ".join(error.format_message().split()).replace("Value error, ", "").rstrip(".?")
    context = getattr(error, "ctx", None)
    return f"{said}; see {context.command_path} --help" if context else said


def _is_out_of_memory(error: Exception) -> bool:
    """Tell it apart from other errors of torch, which must have been loaded to raise them."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or torch is None:
        return isinstance(error, MemoryError)
    marks = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(mark in str(error) for mark in marks)


app = typer.Typer(
    name="nvvl",
    cls=_Verbs,
    help="Quantize the Nemotron Nano V2 VL family to FP8 and NVFP4, and prove what was written.",
    epilog="Example: nvvl demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
calib_app = typer.Typer(
    help="Build and look at calibration sets.",
    epilog="Example: nvvl calib show default",
    no_args_is_help=True,
)
app.add_typer(calib_app, name="calib")
export_app = typer.Typer(
    help="Turn a checkpoint into what other software runs.",
    epilog="Example: nvvl export serve OUT --for vllm",
    no_args_is_help=True,
)
app.add_typer(export_app, name="export")

app.command(epilog="Example: nvvl plan embedded --format nvfp4")(plan)
app.command(epilog="Example: nvvl quantize nvfp4 embedded OUT --calib my-images/")(quantize)
app.command(epilog="Example: nvvl rotate embedded OUT")(rotate)
app.command(epilog="Example: nvvl distill RUN --teacher embedded -o OUT")(distill)
app.command(epilog="Example: nvvl precompute embedded -o LOGITS")(precompute)
app.command(epilog="Example: nvvl verify OUT --against embedded")(verify)
export_app.command(epilog="Example: nvvl export onnx OUT graphs")(onnx)
export_app.command(epilog="Example: nvvl export engine OUT engines --target sm120")(engine)
export_app.command(epilog="Example: nvvl export serve OUT --for vllm")(serve)
app.command(epilog="Example: nvvl evaluate embedded OUT --teacher embedded -o runs")(evaluate)
app.command("lm-eval", epilog="Example: nvvl lm-eval embedded OUT --task nvvl_next_words -o tasks")(
    lm_eval
)
app.command(epilog="Example: nvvl sweep evs embedded OUT -o sweep")(sweep)
app.command(epilog="Example: nvvl report runs/embedded runs/OUT tasks/embedded tasks/OUT")(report)
calib_app.command("build", epilog="Example: nvvl calib build my-set.toml my-set")(
    build_calibration_set
)
calib_app.command(epilog="Example: nvvl calib show default --samples 16 --save pictures")(show)
calib_app.command("stats", epilog="Example: nvvl calib stats embedded default --samples 64")(
    show_statistics
)
app.command(epilog='Example: nvvl chat embedded --image page.png "What is the total?"')(chat)
app.command(epilog="Example: nvvl demo -o demo")(demo)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"nvvl {nvvl.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Take what belongs to no verb."""


@app.command(epilog="Example: ls $(nvvl path embedded)")
def path(model: ModelArgument) -> None:
    """Print the folder that a MODEL argument means."""
    from nvvl.model.resolve import resolve_model

    print(resolve_model(model))


def _format_warning(message: Warning | str, *_: object, **__: object) -> str:
    """Return a warning as a user reads it: what is said, without where in the source it is."""
    return f"warning: {' '.join(str(message).split())}\n"


def main() -> None:
    """Run ``nvvl``."""
    from nvvl.console import standard_streams

    warnings.formatwarning = _format_warning
    with standard_streams():
        app(prog_name="nvvl")


def quantize_main() -> None:
    """Run ``nvvl-quantize``, the same as ``nvvl quantize``."""
    sys.argv.insert(1, "quantize")  # a manifest records the command line
    main()
