"""Runs tasks of EleutherAI's lm-evaluation-harness on checkpoints and keeps what comes out.

A run is two files in the folder of a model, beside what ``nvvl evaluate`` keeps there:
``lm-eval.json`` has settings and the results of each task, as the harness computed them;
``lm-eval.jsonl`` every response. Given again, finished tasks are not run, and a task that was
interrupted goes on with the responses there are. Tasks can be added one after the other; other
settings need another folder.

The tasks named ``nvvl_...`` lie in ``lm_eval_tasks/`` and need no Hub. Any other name is the
harness's own, whose data it fetches; that is then what the user asked for.
"""

import difflib
import json
import logging
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import nvvl
from nvvl.errors import DataError, HardwareError, OutputError
from nvvl.quantize.load import load_any
from nvvl.reports.run import describe_model, fingerprint

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from nvvl.reports.harness_model import HarnessModel

# (model and kind of request, answered so far, all)
ProgressCallback = Callable[[str, int, int], None]

RESULTS_NAME = "lm-eval.json"
RESPONSES_NAME = "lm-eval.jsonl"
TASKS_FOLDER = Path(__file__).parent / "lm_eval_tasks"
LOCAL_TASKS = tuple(sorted(path.stem for path in TASKS_FOLDER.glob("*.yaml")))

# Draws of the harness's bootstrap, for metrics without a formula; it takes 100 for slow ones.
_BOOTSTRAP_DRAWS = 1000

# The harness's own seeds (``lm_eval.defaults``), so that examples and orders are those of others.
_SEED, _OTHER_SEED = 0, 1234


@dataclass(frozen=True, kw_only=True)
class HarnessOptions:
    """How tasks are run.

    Attributes:
        limit: first items of each task; None for all.
        num_fewshot: examples before each question; None for what the task says.
        chat: put prompts into the model's chat template.
        batch_size: requests run at a time.
        max_length: most tokens of a request; longer ones lose their beginning.
        device: where the model runs.
        dtype: of its computation.
    """

    limit: int | None = None
    num_fewshot: int | None = None
    chat: bool = False
    batch_size: int = 32
    max_length: int = 4096
    device: str = "cpu"
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        if self.max_length < 2 or self.batch_size < 1:
            raise DataError(
                f"lm-eval: required max_length of at least 2 and batch_size of at least 1, got "
                f"{self.max_length} and {self.batch_size}"
            )


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One number of a task.

    Attributes:
        name: such as ``acc``.
        filter: which reading of the answers it is of; ``none`` for the answers as they are.
        value: as the harness gives it.
        stderr: its standard error, if the harness has one.
    """

    name: str
    filter: str
    value: float
    stderr: float | None


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """What one task, or a group of tasks, came to.

    Attributes:
        num_items: items asked.
        version: of the task.
        num_shortened: requests that were longer than ``max_length``, of this call's tasks.
    """

    task: str
    num_items: int | None
    version: str | None
    num_shortened: int
    metrics: tuple[Metric, ...]


@dataclass(frozen=True, kw_only=True)
class HarnessRun:
    """The results of one model."""

    out: Path
    label: str
    model: Path
    format: str
    settings: dict[str, Any]
    results: tuple[TaskResult, ...]


def run_tasks(
    folder: Path,
    out: Path,
    tasks: Sequence[str],
    options: HarnessOptions | None = None,
    *,
    label: str | None = None,
    tasks_folder: Path | None = None,
    overwrite: bool = False,
    progress: ProgressCallback | None = None,
) -> HarnessRun:
    """Run tasks on one checkpoint, but for those its folder has results of.

    Args:
        folder: BF16 or quantized checkpoint.
        out: folder of the run.
        tasks: names of tasks, groups or tags.
        options: how they are run.
        label: name in tables; the format by default.
        tasks_folder: with task files of the user's own.
        overwrite: discard results that have other settings.
        progress: called after each batch.

    Raises:
        HardwareError: if lm-eval is not installed.
        DataError: if a task is unknown, its data cannot be had, or it needs sampling.
        OutputError: if the folder holds results of other settings.
        ConfigError, CheckpointError: if the checkpoint cannot be loaded.
    """
    require_lm_eval()
    options = options or HarnessOptions()
    manager = _open_tasks(tasks, tasks_folder)
    settings = _settings(folder, options, tasks_folder)
    about = {"model": str(folder), **describe_model(folder)}
    about = {"label": label or about["format"], **about}
    finished = _read_finished(out, settings, overwrite)
    missing = [task for task in tasks if task not in finished]
    if missing:
        with _quiet_harness(all_local=set(missing) <= set(LOCAL_TASKS)):
            loaded = {task: _load_task(manager, task, options) for task in missing}
            model = _load_model(folder, out, options, about["label"], progress)
            _write(out, about | {"settings": settings, "tasks": finished})
            for task in missing:
                finished[task] = _run_task(model, loaded[task], options)
                _write(out, about | {"settings": settings, "tasks": finished})
    return _to_run(out, about, settings, [finished[task] for task in tasks])


def require_lm_eval() -> None:
    """Refuse if the extra ``nvvl[eval]`` is not installed.

    Raises:
        HardwareError: saying how to install it.
    """
    if find_spec("lm_eval") is None:
        raise HardwareError("lm-eval is not installed; install it with: pip install 'nvvl[eval]'")


def _settings(folder: Path, options: HarnessOptions, tasks_folder: Path | None) -> dict[str, Any]:
    return {
        **asdict(options),
        "dtype": str(options.dtype).removeprefix("torch."),
        "model_sha256": fingerprint(folder),
        "tasks_folder": None if tasks_folder is None else str(tasks_folder),
        "lm_eval_version": version("lm-eval"),
        "nvvl_version": nvvl.__version__,
    }


def _open_tasks(tasks: Sequence[str], tasks_folder: Path | None) -> "TaskManager":
    """Find the tasks; the harness's own are looked through only if one of them is asked for."""
    from lm_eval.tasks import TaskManager

    if not tasks or len(set(tasks)) < len(tasks):
        raise DataError(f"lm-eval: required different tasks, got {', '.join(tasks) or 'none'}")
    if tasks_folder is not None and not tasks_folder.is_dir():
        raise DataError(f"{tasks_folder}: not a folder; required one with task files (*.yaml)")
    paths = [TASKS_FOLDER, *([] if tasks_folder is None else [tasks_folder])]
    manager = TaskManager(include_path=list(map(str, paths)), include_defaults=False)
    if not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=list(map(str, paths)), include_defaults=True)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        near = difflib.get_close_matches(unknown[0], manager.all_tasks, n=3)
        raise DataError(
            f"lm-eval: no task named {', '.join(unknown)}; near it: "
            f"{', '.join(near) or 'nothing'}; without a Hub: {', '.join(LOCAL_TASKS)}"
        )
    return manager


def _load_task(manager: "TaskManager", task: str, options: HarnessOptions) -> Any:
    """Let the harness load a task and its data, with the seeds and examples it would take."""
    random.seed(_SEED)
    np.random.seed(_OTHER_SEED)  # what tasks draw from
    torch.manual_seed(_OTHER_SEED)
    try:
        loaded: Any = manager.load([task])
    except Exception as error:  # whatever a loader of somebody's data set raises
        reason = f"{type(error).__name__}: {error}"
        raise DataError(
            f"lm-eval: the task {task} or its data cannot be loaded ({reason}); its data comes "
            "from the Hub, so check the network and your access to it"
        ) from error
    for part in loaded["tasks"].values():
        its_own = part.get_config("num_fewshot")
        if its_own is None or (options.num_fewshot is not None and its_own != 0):
            part.set_config(key="num_fewshot", value=options.num_fewshot or 0)
        part.set_fewshot_seed(seed=_OTHER_SEED)
    return loaded


def _load_model(
    folder: Path,
    out: Path,
    options: HarnessOptions,
    label: str,
    progress: ProgressCallback | None,
) -> "HarnessModel":
    from nvvl.model.processor import Processor
    from nvvl.reports.harness_journal import ResponseJournal
    from nvvl.reports.harness_model import HarnessModel

    def report(kind: str, num_done: int, num_all: int) -> None:
        if progress is not None:
            progress(f"{label} {kind}", num_done, num_all)

    processor = Processor.from_folder(folder)
    return HarnessModel(
        load_any(folder, dtype=options.dtype, device=options.device),
        processor,
        journal=ResponseJournal(out / RESPONSES_NAME),
        batch_size=options.batch_size,
        max_length=options.max_length,
        progress=report,
    )


def _run_task(model: "HarnessModel", loaded: Any, options: HarnessOptions) -> list[dict[str, Any]]:
    """Run one task, or the tasks of a group, and return their results as plain values."""
    from lm_eval.evaluator import evaluate

    before = model.num_shortened
    found: Any = evaluate(
        model,
        loaded,
        limit=options.limit,
        apply_chat_template=options.chat,
        fewshot_as_multiturn=options.chat,
        log_samples=False,
        bootstrap_iters=_BOOTSTRAP_DRAWS,
    )
    shortened = model.num_shortened - before
    return [_to_result(name, values, found, shortened) for name, values in found["results"].items()]


def _to_result(
    name: str, values: dict[str, Any], found: dict[str, Any], num_shortened: int
) -> dict[str, Any]:
    counts = found.get("n-samples", {}).get(name)
    metrics = []
    for key, value in values.items():
        metric, separator, reading = key.partition(",")
        if not separator or metric.endswith("_stderr"):
            continue
        stderr = values.get(f"{metric}_stderr,{reading}")
        metrics.append(
            {
                "name": metric,
                "filter": reading,
                "value": float(value),
                "stderr": float(stderr) if isinstance(stderr, int | float) else None,
            }
        )
    label = found.get("versions", {}).get(name)
    return {
        "task": name,
        "num_items": None if counts is None else counts["effective"],
        "version": None if label is None else str(label),
        "num_shortened": num_shortened,
        "metrics": metrics,
    }


@contextmanager
def _quiet_harness(*, all_local: bool) -> Iterator[None]:
    """Keep the harness from chatting, and from forking a process that holds a model.

    Of a local task it has nothing to warn of; what it says of its own tasks is shown.
    """
    logger = logging.getLogger("lm_eval")
    level, serial = logger.level, os.environ.get("DISABLE_MULTIPROC")
    logger.setLevel(logging.ERROR if all_local else logging.WARNING)
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        logger.setLevel(level)
        if serial is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = serial


def _read_finished(
    out: Path, settings: dict[str, Any], overwrite: bool
) -> dict[str, list[dict[str, Any]]]:
    """Return the results a folder has, by task; make the folder if there is none."""
    path = out / RESULTS_NAME
    if not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        (out / RESPONSES_NAME).unlink(missing_ok=True)  # of which settings, nobody knows
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        stored, tasks = values["settings"], dict(values["tasks"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not results of nvvl lm-eval ({error!r})") from None
    if stored == settings:
        return tasks
    differ = sorted(k for k in stored.keys() | settings if stored.get(k) != settings.get(k))
    if not overwrite:
        raise OutputError(
            f"{out}: has results with other settings ({', '.join(differ)}); choose another "
            "folder, or say --overwrite"
        )
    path.unlink()
    (out / RESPONSES_NAME).unlink(missing_ok=True)
    return {}


def _write(out: Path, values: dict[str, Any]) -> None:
    """Replace the results at once, so that a kill leaves the old ones."""
    temporary = out / f".{RESULTS_NAME}"
    temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    temporary.replace(out / RESULTS_NAME)


def _to_run(
    out: Path, about: dict[str, Any], settings: dict[str, Any], found: list[Any]
) -> HarnessRun:
    results = [
        TaskResult(**{**entry, "metrics": tuple(Metric(**m) for m in entry["metrics"])})
        for entries in found
        for entry in entries
    ]
    return HarnessRun(
        out=out,
        label=about["label"],
        model=Path(about["model"]),
        format=about["format"],
        settings=settings,
        results=tuple(results),
    )
