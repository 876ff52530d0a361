"""The command ``nvvl``: one verb a stage; each parses its arguments and makes one call.

Rooms are imported inside the verbs, so ``nvvl --help`` answers without loading torch. What the user
can cause (`NvvlError`) becomes one line on stderr and exit code 2; a check that fails gives 1;
anything else is a bug of nvvl's own and keeps its traceback. Results go to stdout, progress to
stderr.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from nvvl.errors import DataError, HardwareError, NvvlError, OutputError, RecipeError

if TYPE_CHECKING:
    from nvvl.quantize.recipe import Recipe

Preset = Literal["fp8", "nvfp4", "nvfp4-w4a16", "mixed"]
Device = Literal["auto", "cpu", "cuda"]

EXIT_CHECK_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # what shells report of a process ended by Ctrl-C


class _Verbs(TyperGroup):
    """The verbs, with every error a user can cause turned into one line."""

    def invoke(self, ctx: Any) -> Any:
        """Run a verb."""
        from nvvl.console import print_error

        try:
            return super().invoke(ctx)
        except NvvlError as error:
            print_error(str(error))
            raise typer.Exit(EXIT_USER_ERROR) from None
        except KeyboardInterrupt as error:
            print_error(str(error) or "interrupted; an output that was not complete is not there")
            raise typer.Exit(EXIT_INTERRUPTED) from None


app = typer.Typer(
    name="nvvl",
    cls=_Verbs,
    help="Quantize the Nemotron Nano V2 VL family to FP8 and NVFP4, and prove what was written.",
    epilog="Example: nvvl demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
calib_app = typer.Typer(help="Look at calibration sets.", no_args_is_help=True)
app.add_typer(calib_app, name="calib")

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A folder, a Hub id, or the word: embedded.")
]
CalibArgument = Annotated[
    str,
    typer.Argument(metavar="SET", help="The word: default, a folder of images, or a JSONL file."),
]
DeviceOption = Annotated[Device, typer.Option(help="Where to compute.")]
SeedOption = Annotated[int, typer.Option(min=0, help="Seed of generated items.")]
MemoryOption = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Refuse before work starts if it takes more, e.g. 6GB."),
]
RecipeOption = Annotated[
    Path | None, typer.Option(help="TOML recipe to use in place of the format's own.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output.")]


@app.command(epilog="Example: nvvl plan embedded --format nvfp4")
def plan(
    model: ModelArgument,
    *,
    preset: Annotated[
        Preset, typer.Option("--format", help="fp8, nvfp4, nvfp4-w4a16 or mixed.")
    ] = "nvfp4",
    samples: Annotated[
        int | None, typer.Option(min=1, help="Calibration items; else as many as the recipe says.")
    ] = None,
    recipe: RecipeOption = None,
    device: Annotated[
        Literal["cpu", "cuda"], typer.Option(help="Where the run would compute.")
    ] = "cpu",
    memory: MemoryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a run would do: bytes, memory, time, server rules; reads headers only."""
    from nvvl.console import print_json, print_table
    from nvvl.export.planned import planned_view, summarize_rules
    from nvvl.export.server_rules import check_server_rules
    from nvvl.model.resolve import resolve_model
    from nvvl.quantize.estimate import parse_memory, require_memory
    from nvvl.quantize.plan import make_plan
    from nvvl.quantize.plan_text import plan_lines, plan_table

    chosen = _choose_recipe(preset, recipe, samples)
    planned = make_plan(resolve_model(model), chosen, device=device)
    if memory is not None:
        require_memory(planned.estimate, parse_memory(memory))
    view = planned_view(
        planned.shards,
        config=planned.json_files["config.json"],
        hf_quant_config=planned.json_files["hf_quant_config.json"],
        source_config=planned.source.config.raw,
        source_tensors=planned.source.tensors,
    )
    checks = check_server_rules(view)
    if as_json:
        rules = [check.to_dict() for check in checks]
        print_json({"model": model, **planned.to_dict(), "server_rules": rules})
        return
    print_table(plan_table(planned))
    print("\n".join(plan_lines(planned)))
    for server in ("vLLM", "TensorRT-LLM"):
        print(summarize_rules(server, checks))


@app.command(epilog="Example: nvvl quantize nvfp4 embedded OUT --calib my-images/")
def quantize(
    preset: Annotated[
        Preset, typer.Argument(metavar="FORMAT", help="fp8, nvfp4, nvfp4-w4a16 or mixed.")
    ],
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    *,
    calib: Annotated[
        str,
        typer.Option(
            metavar="SET", help="Calibration set: default, a folder of images, or a JSONL file."
        ),
    ] = "default",
    samples: Annotated[
        int | None, typer.Option(min=1, help="Calibration items; else as many as the recipe says.")
    ] = None,
    recipe: RecipeOption = None,
    from_calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="OUT",
            help="Output of a finished run over MODEL: pack from its scales, calibrate nothing.",
        ),
    ] = None,
    device: DeviceOption = "auto",
    memory: MemoryOption = None,
    seed: SeedOption = 0,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a quantized checkpoint in the layout that servers load.

    A run that was killed or interrupted goes on where it stopped, when the same command is given
    again.
    """
    from nvvl.calib_data.manifest import load_calibration_set
    from nvvl.console import defer_interrupt, print_json, show_progress
    from nvvl.model.load import resolve_model
    from nvvl.quantize.estimate import parse_memory, require_memory
    from nvvl.quantize.plan import make_plan
    from nvvl.quantize.recipe import CALIBRATED_FORMATS
    from nvvl.quantize.walk import quantize_checkpoint

    chosen = _choose_recipe(preset, recipe, samples)
    source = resolve_model(model)
    if memory is not None:
        planned = make_plan(source, chosen, calibrate=from_calibration is None)
        require_memory(planned.estimate, parse_memory(memory))
    items = None
    if from_calibration is not None and (calib != "default" or samples is not None):
        raise DataError("--from-calibration takes no --calib and no --samples: leave them out")
    needs_items = any(rule.format in CALIBRATED_FORMATS for rule in chosen.rules)
    if needs_items and from_calibration is None:
        num_items = chosen.num_calibration_items
        items = load_calibration_set(calib, num_items=num_items, seed=seed)
    with show_progress() as progress, defer_interrupt() as stop:
        manifest = quantize_checkpoint(
            source,
            out,
            chosen,
            items,
            device=_choose_device(device),
            overwrite=overwrite,
            progress=progress,
            stop=stop,
            command=["nvvl", *sys.argv[1:]],
            from_calibration=from_calibration,
        )
    if as_json:
        print_json({"out": str(out), **manifest.to_dict()})
    else:
        print(f"{out}: {manifest.format}, {len(manifest.tensors)} tensors")
        print(f"prove it: nvvl verify {out} --against {model}")


@app.command(epilog="Example: nvvl distill RUN --teacher embedded -o OUT")
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
            device=_choose_device(device),
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


@app.command(epilog="Example: nvvl verify OUT --against embedded")
def verify(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder that nvvl quantize wrote.")],
    *,
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The BF16 source, to compare values with.")
    ] = None,
    no_logits: Annotated[
        bool, typer.Option("--no-logits", help="Leave out the comparison of logits.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Prove a written checkpoint; exit 1 and name the fault if it is not what it claims to be."""
    from nvvl.console import print_json, show_progress
    from nvvl.export.verify import verify as verify_checkpoint
    from nvvl.model.load import resolve_model

    source = None if against is None else resolve_model(against)
    with show_progress() as progress:
        report = verify_checkpoint(out, source, logits=not no_logits, progress=progress)
    if as_json:
        print_json(report.to_dict())
    else:
        print("\n".join(report.summary_lines()))
    if not report.passed:
        raise typer.Exit(EXIT_CHECK_FAILED)


@app.command(epilog="Example: nvvl evaluate embedded OUT --teacher embedded -o runs")
def evaluate(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="BF16 or quantized checkpoints.")
    ],
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder; each model gets one in it.")],
    suite: Annotated[
        list[str] | None, typer.Option(help="Suite to ask; may be given several times.")
    ] = None,
    items: Annotated[int, typer.Option(min=1, help="Items of each suite.")] = 1000,
    teacher: Annotated[
        str | None, typer.Option(metavar="MODEL", help="BF16 model to measure KL against.")
    ] = None,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Ask models the same generated questions and keep every answer; goes on where it stopped."""
    from nvvl.console import show_progress
    from nvvl.model.load import resolve_model
    from nvvl.reports.evaluate import Candidate, Options
    from nvvl.reports.evaluate import evaluate as evaluate_models
    from nvvl.reports.suites import DEFAULT_SUITES, find_suites

    folders = [resolve_model(model).resolve() for model in models]
    runs = [Candidate(folder=path, out=out / path.name, label=path.name) for path in folders]
    gate_items = min(items, Options.gate_items)
    options = Options(
        num_items=items, seed=seed, gate_items=gate_items, device=_choose_device(device)
    )
    with show_progress() as progress:
        evaluate_models(
            runs,
            find_suites(suite or DEFAULT_SUITES),
            options,
            teacher=None if teacher is None else resolve_model(teacher),
            overwrite=overwrite,
            progress=progress,
        )
    _show_report([run.out for run in runs], out, as_json)


@app.command(epilog="Example: nvvl report runs/embedded runs/OUT -o report.html")
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...", help="Folders of nvvl evaluate; the first is compared to."
        ),
    ],
    *,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the report, or its page: NAME.html.")
    ] = Path("report"),
    proof: Annotated[
        list[Path] | None,
        typer.Option(
            help="Output of nvvl verify --json; may be given several times. "
            "verify-NAME.json beside a checkpoint NAME is found without."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare runs item by item: a page, a model card of each checkpoint, JSON and a table."""
    _show_report(runs, out, as_json, proofs=proof or ())


@calib_app.command(epilog="Example: nvvl calib show default --samples 16 --save pictures")
def show(
    spec: CalibArgument = "default",
    *,
    samples: Annotated[int, typer.Option(min=1, help="Items to look at.")] = 8,
    save: Annotated[
        Path | None, typer.Option(help="New folder to save images and video frames in, as PNG.")
    ] = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Show items of a calibration set: id, hash, pictures, and what is asked and answered."""
    from nvvl.calib_data.items import item_hash
    from nvvl.calib_data.manifest import load_calibration_set
    from nvvl.console import print_json

    if save is not None:
        _make_new_folder(save)
    rows = []
    for item in load_calibration_set(spec, num_items=samples, seed=seed).items:
        pictures = [*item.images, *(frame for video in item.videos for frame in video.frames)]
        row = {"id": item.item_id, "sha256": item_hash(item), "domain": item.domain}
        turns = [asdict(message) for message in item.messages]
        rows.append({**row, "pictures": [list(p.size) for p in pictures], "messages": turns})
        if save is not None:
            name = item.item_id.replace("/", "-")
            for number, picture in enumerate(pictures):
                picture.save(save / f"{name}-{number}.png")
        if not as_json:
            print(*row.values(), *(f"{p.width}x{p.height}" for p in pictures))
            for message in item.messages:
                print(f"  {message.role}: {shorten(message.content, 90)}")
    if as_json:
        print_json(rows)


@app.command(epilog='Example: nvvl chat embedded --image page.png "What is the total?"')
def chat(
    model: ModelArgument,
    question: Annotated[str, typer.Argument(help="What to ask.")],
    *,
    image: Annotated[
        list[Path] | None, typer.Option(help="Image to ask about; may be given several times.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Ask a BF16 or quantized model one question; greedy, in torch."""
    from nvvl.console import print_json
    from nvvl.model.generate import generate
    from nvvl.model.load import resolve_model
    from nvvl.model.processor import Message, Processor, collate
    from nvvl.model.tiling import open_image
    from nvvl.quantize.load import load_any

    folder = resolve_model(model)
    processor = Processor.from_folder(folder)
    images = [open_image(path) for path in image or []]
    prompt = Message("user", "<image>\n" * len(images) + question)
    inputs = processor([prompt], images=images, add_generation_prompt=True)
    language = processor.config.language
    (ids,) = generate(
        load_any(folder, device=_choose_device(device)),
        collate([inputs], language.pad_token_id),
        eos_token_id=language.eos_token_id,
        max_new_tokens=max_new_tokens,
    )
    answer = processor.decode(ids)
    if as_json:
        print_json({"model": str(folder), "question": question, "answer": answer})
    else:
        print(answer)


@app.command(epilog="Example: nvvl demo -o demo")
def demo(
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")] = Path("demo"),
    items: Annotated[int, typer.Option(min=1, help="Items of each suite.")] = 1000,
    as_json: JsonOption = False,
) -> None:
    """Take the embedded model to FP8 and NVFP4, prove both, evaluate, and print the table."""
    from nvvl.console import print_json, print_table, show_progress
    from nvvl.model.load import resolve_model
    from nvvl.reports.demo import run_demo
    from nvvl.reports.render import make_table

    source = resolve_model("embedded")
    with show_progress() as progress:
        result = run_demo(source, out, num_items=items, progress=progress)
    if as_json:
        print_json(asdict(result.report))
    else:
        print_table(make_table(result.report))
        for name, path in result.outputs.items():
            print(f"{name:8} {path}")
    if not result.passed:
        raise typer.Exit(EXIT_CHECK_FAILED)


@app.command(epilog="Example: ls $(nvvl path embedded)")
def path(model: ModelArgument) -> None:
    """Print the folder that a MODEL argument means."""
    from nvvl.model.load import resolve_model

    print(resolve_model(model))


def _make_new_folder(path: Path) -> None:
    """Make a folder that was not there, so that nothing in it can be overwritten."""
    try:
        path.mkdir(parents=True)
    except OSError as error:
        raise OutputError(f"{path}: required a new folder ({error.strerror})") from None


def _choose_recipe(preset: Preset, file: Path | None, num_items: int | None) -> "Recipe":
    """Return the recipe of a format, or the one in a file if it quantizes to that format."""
    from nvvl.quantize.presets import load_recipe
    from nvvl.quantize.recipe import Recipe

    recipe = load_recipe(preset)
    if file is not None:
        recipe = Recipe.from_toml(file)
        formats = {rule.format for rule in recipe.rules} - {"bf16"}
        if preset != "mixed" and formats != {preset}:
            raise RecipeError(
                f"{file}: required a recipe of {preset} alone, got {', '.join(sorted(formats))}; "
                "give FORMAT as mixed"
            )
    return recipe if num_items is None else replace(recipe, num_calibration_items=num_items)


def _choose_device(device: Device) -> str:
    """Return the torch device that an option means."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise HardwareError("--device cuda: torch finds no CUDA device here; use --device cpu")
    return device


def _show_report(
    runs: Sequence[Path], out: Path, as_json: bool, *, proofs: Sequence[Path] = ()
) -> None:
    """Compare runs, write everything about them and print the table."""
    from nvvl.console import print_json, print_table
    from nvvl.reports.publish import publish
    from nvvl.reports.render import make_table

    published = publish(runs, out, proofs=proofs)
    if as_json:
        print_json(asdict(published.report))
        return
    print_table(make_table(published.report))
    print(*published.paths, sep="\n")


def main() -> None:
    """Run ``nvvl``."""
    app(prog_name="nvvl")


def quantize_main() -> None:
    """Run ``nvvl-quantize``, the same as ``nvvl quantize``."""
    app(["quantize", *sys.argv[1:]], prog_name="nvvl")
