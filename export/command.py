"""The verbs ``nvvl plan``, ``nvvl verify``, ``nvvl export onnx`` and ``nvvl chat``."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from nvvl.errors import DataError, EngineError
from nvvl.options import (
    EXIT_CHECK_FAILED,
    DeviceOption,
    JsonOption,
    MemoryOption,
    ModelArgument,
    OverwriteOption,
    Preset,
    RecipeOption,
    choose_device,
)
from nvvl.quantize.command import SamplesOption, choose_recipe, refuse_unused

if TYPE_CHECKING:
    from nvvl.model.processor import ModelInputs, Processor


def plan(
    model: ModelArgument,
    *,
    preset: Annotated[
        Preset, typer.Option("--format", help="fp8, nvfp4, nvfp4-w4a16 or mixed.")
    ] = "nvfp4",
    samples: SamplesOption = None,
    recipe: RecipeOption = None,
    device: Annotated[
        Literal["cpu", "cuda"], typer.Option(help="Where the run would compute.")
    ] = "cpu",
    memory: MemoryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a run would do: bytes, memory, time, server rules; reads headers only."""
    from nvvl.console import print_json, print_table
    from nvvl.export.checks import summarize
    from nvvl.export.planned import planned_view
    from nvvl.export.server_rules import check_server_rules
    from nvvl.model.resolve import resolve_model
    from nvvl.quantize.limits import choose_limits, parse_memory
    from nvvl.quantize.plan import make_plan
    from nvvl.quantize.plan_text import plan_lines, plan_table

    chosen = choose_recipe(preset, recipe, samples)
    if not chosen.is_calibrated:
        refuse_unused(f"recipe {chosen.name}", {"--samples": samples})
    planned = make_plan(resolve_model(model, weights=False), chosen, device=device)
    limits = None
    if memory is not None:
        limits = choose_limits(planned.estimate, parse_memory(memory))
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
        held = None if limits is None else asdict(limits)
        print_json({"model": model, **planned.to_dict(), "limits": held, "server_rules": rules})
        return
    print_table(plan_table(planned))
    print("\n".join(plan_lines(planned, limits)))
    for server in ("vLLM", "TensorRT-LLM"):
        print("; ".join(summarize(server, checks)))


def verify(
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder that nvvl quantize or distill wrote.")
    ],
    *,
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The BF16 source, to compare values with.")
    ] = None,
    no_logits: Annotated[
        bool,
        typer.Option(
            "--no-logits",
            help="Leave out the comparison of logits, which holds a whole BF16 model in memory.",
        ),
    ] = False,
    onnx: Annotated[
        Path | None,
        typer.Option(metavar="DEST", help="Graphs that nvvl export onnx made of OUT; proved too."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Prove a written checkpoint; exit 1 and name the fault if it is not what it claims to be."""
    from nvvl.console import print_json, show_progress
    from nvvl.export.verify import verify as verify_checkpoint
    from nvvl.model.load import resolve_model

    source = None if against is None else resolve_model(against)
    with show_progress() as progress:
        report = verify_checkpoint(
            out, source, logits=not no_logits, graphs=onnx, progress=progress
        )
    if as_json:
        print_json(report.to_dict())
    else:
        print("\n".join(report.summary_lines()))
    if not report.passed:
        raise typer.Exit(EXIT_CHECK_FAILED)


def chat(
    model: ModelArgument,
    question: Annotated[str, typer.Argument(help="What to ask.")],
    *,
    image: Annotated[
        list[Path] | None, typer.Option(help="Image to ask about; may be given several times.")
    ] = None,
    video: Annotated[
        list[Path] | None, typer.Option(help="Video to ask about; may be given several times.")
    ] = None,
    pruning_rate: Annotated[
        float, typer.Option(min=0, max=0.99, help="Share of video tokens that EVS drops.")
    ] = 0.0,
    backend: Annotated[
        Literal["torch", "onnx", "engine"],
        typer.Option(
            help="onnx: graphs in float32 on onnxruntime, MODEL a checkpoint or exported folder; "
            "engine: MODEL is what nvvl export engine wrote, on a GPU."
        ),
    ] = "torch",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0, help="0 takes the likeliest token; above 0 samples.")
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="Sample from the likeliest tokens that together reach this probability.",
        ),
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Sampling seed.")] = 0,
    think: Annotated[
        bool, typer.Option("--think", help="Reason first, as with /think in the question.")
    ] = False,
    thinking_budget: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="TOKENS",
            help="End reasoning at the first newline after so many tokens, or 500 later.",
        ),
    ] = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Ask a BF16 or quantized model one question; tokens are printed as they come."""
    if pruning_rate and not video:
        raise DataError(
            f"--pruning-rate {pruning_rate:g}: drops tokens of videos, and there is none; add "
            "--video, or leave it out"
        )
    if not top_p:
        raise DataError("--top-p 0: leaves no token to draw; give a share above 0")
    if not temperature and (top_p < 1 or seed):
        raise DataError("--top-p, --seed: change nothing at --temperature 0; give one above 0")
    from nvvl.model.prompt import Message, resolve_reasoning

    if thinking_budget is not None and not resolve_reasoning([Message("user", question)], think):
        raise DataError(
            f"--thinking-budget {thinking_budget}: ends reasoning, and the model is not asked to "
            "reason; add --think, or leave it out"
        )
    from nvvl.console import TokenStream, print_json
    from nvvl.export.answer import answer
    from nvvl.export.backends import open_backend
    from nvvl.model.generate import Sampling, ThinkingBudget
    from nvvl.model.resolve import resolve_model

    folder = resolve_model(model)
    inputs, processor = _read_question(folder, question, image or (), video or (), reasoning=think)
    budget = None
    if thinking_budget is not None:
        budget = ThinkingBudget.from_tokenizer(processor.tokenizer, tokens=thinking_budget)
    stream = TokenStream(processor.decode, None if as_json else sys.stdout)
    with open_backend(folder, backend, device=choose_device(device)) as (runner, name):
        result = answer(
            runner,
            processor.config,
            inputs,
            max_new_tokens=max_new_tokens,
            pruning_rate=pruning_rate,
            sampling=Sampling(temperature=temperature, top_p=top_p, seed=seed),
            thinking_budget=budget,
            on_token=stream.show,
        )
    stream.end()
    if as_json:
        values = {"backend": name, "tokens": len(result.ids), "prompt_tokens": result.prompt_tokens}
        values |= {"first_token_s": result.first_token_s, "tokens_per_s": result.tokens_per_s}
        text = processor.decode(result.ids)
        print_json({"model": str(folder), "question": question, "answer": text, **values})
    else:
        rate = (
            f", {result.tokens_per_s:.1f} tokens/s after the first" if result.tokens_per_s else ""
        )
        said = f"tokens: {len(result.ids)}{rate}" if result.ids else "the model ended at once"
        print(
            f"{said} ({result.first_token_s:.2f} s, prompt of {result.prompt_tokens}), {name}",
            file=sys.stderr,
        )


def _read_question(
    folder: Path, question: str, images: Sequence[Path], videos: Sequence[Path], *, reasoning: bool
) -> "tuple[ModelInputs, Processor]":
    """Read a question's files and turn it into a prompt, images first, then videos."""
    from nvvl.calib_data.video_files import read_video
    from nvvl.model.processor import Message, Processor
    from nvvl.model.tiling import open_image

    processor = Processor.from_folder(folder)
    prompt = Message("user", "<image>\n" * len(images) + "<video>\n" * len(videos) + question)
    inputs = processor(
        [prompt],
        images=[open_image(path) for path in images],
        videos=[read_video(path) for path in videos],
        add_generation_prompt=True,
        reasoning=reasoning,
    )
    return inputs, processor


def onnx(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN", help="Checkpoint: a folder that nvvl quantize wrote, or a BF16 MODEL."
        ),
    ],
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="Folder to write.")],
    *,
    recipe: Annotated[
        Path | None, typer.Option(help="TOML recipe of the graphs: dtype, kv_cache, ...")
    ] = None,
    dtype: Annotated[
        Literal["bf16", "f32"] | None, typer.Option(help="Of activations; else the recipe's.")
    ] = None,
    vision: Annotated[
        Literal["checkpoint", "fp8"] | None,
        typer.Option(help="fp8: the BF16 vision tower in FP8, in the graph; else the recipe's."),
    ] = None,
    calib: Annotated[
        str | None,
        typer.Option(
            metavar="SET",
            help="Images that an FP8 vision graph finds its scales on, as for nvvl quantize; else "
            "the default set.",
        ),
    ] = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a checkpoint as three ONNX graphs: vision, prefill and decode."""
    from nvvl.console import print_json, show_progress
    from nvvl.export.onnx_extra import require_onnx
    from nvvl.model.resolve import resolve_model

    require_onnx()
    from nvvl.calib_data.manifest import load_calibration_set
    from nvvl.export.onnx_export import export_onnx
    from nvvl.export.onnx_recipe import GraphRecipe
    from nvvl.export.vision_fp8 import NUM_IMAGES

    chosen = GraphRecipe() if recipe is None else GraphRecipe.from_toml(recipe)
    chosen = chosen if dtype is None else replace(chosen, dtype=dtype)
    chosen = chosen if vision is None else replace(chosen, vision=vision)
    items = None
    if chosen.vision == "fp8":
        items = load_calibration_set(calib or "default", num_items=NUM_IMAGES).items
    elif calib is not None:
        raise EngineError(
            f"--calib {calib}: only an FP8 vision graph finds scales on images; add --vision fp8, "
            "or leave it out"
        )
    with show_progress() as progress:
        result = export_onnx(
            resolve_model(run),
            dest,
            chosen,
            overwrite=overwrite,
            vision_items=items,
            progress=progress,
            command=["nvvl", *sys.argv[1:]],
        )
    if as_json:
        print_json(result.to_dict())
        return
    for name, size in result.files.items():
        print(f"{name:24} {size:>14,}")
    print("prove it:", shlex.join(["nvvl", "verify", str(resolve_model(run)), "--onnx", str(dest)]))
