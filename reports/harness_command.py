"""The verb ``nvvl lm-eval``."""

from pathlib import Path
from typing import Annotated

import typer

from nvvl.options import DeviceOption, JsonOption, ResumableOverwriteOption, choose_device
from nvvl.reports.command import BatchOption, LabelOption, name_models
from nvvl.reports.json_values import MOST


def lm_eval(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="BF16 or quantized checkpoints.")
    ],
    *,
    task: Annotated[
        list[str],
        typer.Option(
            help="Task, group or tag of the harness, or several with commas; may be given several "
            "times. Without a Hub: nvvl_copy, nvvl_next_words, nvvl_prose."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder; each model gets one in it.")],
    label: LabelOption = None,
    limit: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="First items of each task; else all.")
    ] = None,
    fewshot: Annotated[
        int | None,
        typer.Option(min=0, max=MOST, help="Examples before a question; else what the task says."),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put prompts into the model's chat template.")
    ] = False,
    tasks_folder: Annotated[
        Path | None, typer.Option("--tasks", help="Folder with task files of your own.")
    ] = None,
    max_length: Annotated[
        int,
        typer.Option(
            min=2, max=MOST, help="Most tokens of a request; a longer one loses its beginning."
        ),
    ] = 4096,
    batch: BatchOption = 32,
    device: DeviceOption = "auto",
    overwrite: ResumableOverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run tasks of the lm-evaluation-harness (text alone); goes on where it stopped."""
    from nvvl.console import print_json, print_table, show_progress
    from nvvl.reports.harness import HarnessOptions, require_lm_eval, run_tasks
    from nvvl.reports.harness_store import require_startable
    from nvvl.reports.harness_text import task_table
    from nvvl.reports.tasks import compare_tasks

    require_lm_eval()
    tasks = [name.strip() for names in task for name in names.split(",") if name.strip()]
    options = HarnessOptions(
        limit=limit,
        num_fewshot=fewshot,
        chat=chat,
        batch_size=batch,
        max_length=max_length,
        device=choose_device(device),
    )
    folders = name_models(models, label)
    for name in folders.values():
        require_startable(out / name)
    with show_progress() as progress:
        runs = [
            run_tasks(
                folder,
                out / name,
                tasks,
                options,
                label=name,
                tasks_folder=tasks_folder,
                overwrite=overwrite,
                progress=progress,
            )
            for folder, name in folders.items()
        ]
    if as_json:
        print_json([run.to_dict() | {"out": str(run.out)} for run in runs])
        return
    labels = [run.label for run in runs]
    print_table(task_table(compare_tasks(runs, labels[0]), labels, labels[0]))
    print(*(run.out for run in runs), sep="\n")
