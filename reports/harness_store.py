"""Writing a run of the harness so that it can be interrupted at any moment and go on.

The items of a task are appended before its results are written, and results replace the file at
once: a task that has results has all its items. Items of a task without results are dropped when
the run is taken up; its responses are not (`nvvl.reports.harness_journal`).
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from nvvl.errors import OutputError, writing
from nvvl.reports.harness_run import (
    ITEMS_NAME,
    RESPONSES_NAME,
    RESULTS_NAME,
    HarnessRun,
    HarnessSettings,
    ItemScores,
    TaskResult,
    read_harness_run,
)
from nvvl.reports.journal import replace_text, require_run_folder
from nvvl.reports.run import ANSWERS_NAME, SETTINGS_NAME, name_setting, settings_by_name


class HarnessStore:
    """The growing folder of a run.

    Attributes:
        run: what there is.
    """

    def __init__(self, run: HarnessRun) -> None:
        self.run = run

    @classmethod
    def open(cls, run: HarnessRun, *, overwrite: bool) -> "HarnessStore":
        """Start the folder of a run, or take up the results that are there.

        Args:
            run: without results; its folder is made if needed.
            overwrite: discard results that have other settings instead of refusing.

        Raises:
            DataError: if there are files by the names of results that are none.
            OutputError: if there are results of other settings or files of something else, or the
                folder cannot be written.
        """
        require_startable(run.out)
        path = run.out / RESULTS_NAME
        if path.exists():
            present = read_harness_run(run.out)
            if present.settings == run.settings:
                return cls(_take_up(run, present))
            if not overwrite:
                raise OutputError(
                    f"{run.out}: has results with other settings "
                    f"({', '.join(_differing(present.settings, run.settings))}); choose another "
                    "folder, or say --overwrite"
                )
        with writing(run.out):
            path.unlink(missing_ok=True)
            run.out.mkdir(parents=True, exist_ok=True)
            for name in (ITEMS_NAME, RESPONSES_NAME):  # of which settings, nobody knows
                (run.out / name).unlink(missing_ok=True)
        return cls(run)

    def begin(self, tasks: Sequence[str]) -> None:
        """Name the tasks that results are to come of; others that were named no longer are."""
        self.run = replace(self.run, unfinished=tuple(tasks))
        self._write()

    def finish(
        self,
        task: str,
        results: Sequence[TaskResult],
        items: Mapping[str, tuple[ItemScores, ...]],
    ) -> None:
        """Add the results of a task that was begun; they are on disk when this returns."""
        path = self.run.out / ITEMS_NAME
        with writing(path), path.open("a", encoding="utf-8") as file:
            file.write(_to_lines(items.values()))
        self.run = replace(
            self.run,
            tasks={**self.run.tasks, task: tuple(results)},
            unfinished=tuple(name for name in self.run.unfinished if name != task),
            items={**self.run.items, **items},
        )
        self._write()

    def _write(self) -> None:
        text = json.dumps(self.run.to_dict(), indent=1) + "\n"
        replace_text(self.run.out / RESULTS_NAME, text)


def require_startable(out: Path) -> None:
    """Refuse a folder that has no results of the harness, and something else than answers.

    Raises:
        OutputError: naming it.
    """
    if not (out / RESULTS_NAME).exists():
        require_run_folder(out, {SETTINGS_NAME, ANSWERS_NAME, ITEMS_NAME, RESPONSES_NAME})


def _take_up(run: HarnessRun, present: HarnessRun) -> HarnessRun:
    """Put the finished tasks that are there into a run, and drop the items of others."""
    tasks = {task: r for task, r in present.tasks.items() if not present.lacks_items(task)}
    names = {result.task for results in tasks.values() for result in results}
    items = {task: scores for task, scores in present.items.items() if task in names}
    replace_text(run.out / ITEMS_NAME, _to_lines(items.values()))
    return replace(run, tasks=tasks, items=items)


def _differing(present: HarnessSettings, asked: HarnessSettings) -> list[str]:
    """Name the settings in which two runs differ, as a user calls them, sorted."""
    there, wanted = settings_by_name(asdict(present)), settings_by_name(asdict(asked))
    names = (name for name in {**there, **wanted} if there.get(name) != wanted.get(name))
    return sorted(map(name_setting, names))


def _to_lines(items: Iterable[Sequence[ItemScores]]) -> str:
    return "".join(json.dumps(asdict(item)) + "\n" for scores in items for item in scores)
