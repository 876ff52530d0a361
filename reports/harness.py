"""Runs tasks of EleutherAI's lm-evaluation-harness on checkpoints and keeps what comes out.

What is kept is in `nvvl.reports.harness_run`. Given again, finished tasks are not run, and a task
that was interrupted goes on with the responses there are. Tasks can be added one after the other;
other settings need another folder.

The tasks named ``nvvl_...`` lie in ``lm_eval_tasks/`` and need no Hub. Any other name is the
harness's own, whose data it fetches; that is then what the user asked for.
"""

import difflib
import hashlib
import logging
import os
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import nvvl
from nvvl.errors import DataError, HardwareError
from nvvl.progress import Progress
from nvvl.quantize.identity import describe_arithmetic
from nvvl.quantize.load import load_any
from nvvl.reports.harness_output import read_output
from nvvl.reports.harness_run import (
    RESPONSES_NAME,
    HarnessRun,
    HarnessSettings,
    ItemScores,
    TaskResult,
)
from nvvl.reports.harness_store import HarnessStore
from nvvl.reports.journal import keeping_answers
from nvvl.reports.run import describe_model, fingerprint
from nvvl.staging import locked

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from nvvl.reports.harness_model import HarnessModel

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
                "lm-eval: required --max-length of at least 2 and --batch of at least 1, got "
                f"{self.max_length} and {self.batch_size}"
            )


def run_tasks(
    folder: Path,
    out: Path,
    tasks: Sequence[str],
    options: HarnessOptions | None = None,
    *,
    label: str | None = None,
    tasks_folder: Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
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
        OutputError: if the folder holds results of other settings, or another run is writing
            there.
        ConfigError, CheckpointError: if the checkpoint cannot be loaded.
        KeyboardInterrupt: again, saying how to go on.
    """
    require_lm_eval()
    options = options or HarnessOptions()
    manager = _open_tasks(tasks, tasks_folder)
    with locked(out):
        store = HarnessStore.open(
            _new_run(folder, out, options, tasks_folder, label), overwrite=overwrite
        )
        missing = [task for task in tasks if task not in store.run.tasks]
        with _quiet_harness(all_local=set(missing) <= set(LOCAL_TASKS)):
            loaded = {task: _load_task(manager, task, options) for task in missing}
            store.begin(missing)
            if missing:
                model = _load_model(folder, out, options, store.run.label, progress)
                with keeping_answers(out):
                    for task in missing:
                        results, items = _run_task(model, loaded[task], options)
                        store.finish(task, results, items)
                        _say_what_was_cut(task, results, options)
        return store.run.select(tasks)


def require_lm_eval() -> None:
    """Refuse if the extra ``nvvl[eval]`` is not installed.

    Raises:
        HardwareError: saying how to install it.
    """
    if find_spec("lm_eval") is None:
        raise HardwareError("lm-eval is not installed; install it with: pip install 'nvvl[eval]'")


def _new_run(
    folder: Path, out: Path, options: HarnessOptions, tasks_folder: Path | None, label: str | None
) -> HarnessRun:
    """Describe a run that has no results yet."""
    about = describe_model(folder)
    return HarnessRun(
        out=out,
        label=label or about["format"],
        model=folder,
        settings=HarnessSettings(
            model_sha256=fingerprint(folder),
            limit=options.limit,
            num_fewshot=options.num_fewshot,
            chat=options.chat,
            batch_size=options.batch_size,
            max_length=options.max_length,
            device=options.device,
            arithmetic=describe_arithmetic(torch.device(options.device)),
            dtype=str(options.dtype).removeprefix("torch."),
            tasks_folder=None if tasks_folder is None else str(tasks_folder),
            tasks_sha256=None if tasks_folder is None else _hash_tasks(tasks_folder),
            lm_eval_version=version("lm-eval"),
            nvvl_version=nvvl.__version__,
        ),
        tasks={},
        unfinished=(),
        items={},
        **about,
    )


def _hash_tasks(folder: Path) -> str:
    """Hash the task files of a folder, and the functions that they name."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".yaml", ".py")):
        digest.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _open_tasks(tasks: Sequence[str], tasks_folder: Path | None) -> "TaskManager":
    """Find the tasks; the harness's own are looked through only if one of them is asked for."""
    from lm_eval.tasks import TaskManager

    if not tasks or len(set(tasks)) < len(tasks):
        raise DataError(f"lm-eval: required different tasks, got {', '.join(tasks) or 'none'}")
    if tasks_folder is not None:
        if not tasks_folder.is_dir():
            raise DataError(f"{tasks_folder}: not a folder; required one with task files (*.yaml)")
        if not TaskManager(include_path=str(tasks_folder), include_defaults=False).all_tasks:
            raise DataError(
                f"{tasks_folder}: no file there (*.yaml) names a task; give the folder of your "
                "task files, or leave --tasks out"
            )
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
        _require_examples(part)
    return loaded


def _require_examples(task: Any) -> None:
    """Refuse more examples before a question than a task has to draw them from."""
    asked = task.get_config("num_fewshot")
    if not asked:
        return
    num_examples = len(task.sampler.fewshot_docs())
    if task.fewshot_cfg.split == task.config.test_split:
        num_examples -= 1  # a question is no example of itself
    if asked > num_examples:
        raise DataError(
            f"lm-eval: the task {task.config.task} has {num_examples} examples to put before a "
            f"question, asked for {asked}; give a smaller --fewshot"
        )


def _load_model(
    folder: Path,
    out: Path,
    options: HarnessOptions,
    label: str,
    progress: Progress | None,
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


def _run_task(
    model: "HarnessModel", loaded: Any, options: HarnessOptions
) -> tuple[list[TaskResult], dict[str, tuple[ItemScores, ...]]]:
    """Run one task, or the tasks of a group; return results and, by task, scores of the items."""
    from lm_eval.evaluator import evaluate

    before = model.num_shortened.copy()
    found: Any = evaluate(
        model,
        loaded,
        limit=options.limit,
        apply_chat_template=options.chat,
        fewshot_as_multiturn=options.chat,
        log_samples=True,
        bootstrap_iters=_BOOTSTRAP_DRAWS,
    )
    return read_output(found, loaded["tasks"], num_shortened=model.num_shortened - before)


def _say_what_was_cut(task: str, results: Sequence[TaskResult], options: HarnessOptions) -> None:
    """Say on stderr of how many requests of a task the model did not see the beginning."""
    count = sum(result.num_shortened for result in results if result.num_items is not None)
    if count:
        print(
            f"{task}: {count:,} requests lost their beginning to --max-length "
            f"{options.max_length}, and the scores are of what was left; raise --max-length",
            file=sys.stderr,
        )


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
