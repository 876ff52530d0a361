"""The runs of a report, and whether they may be compared.

A folder is known by the file that its verb has written: ``run.json`` of ``nvvl evaluate``,
``lm-eval.json`` of ``nvvl lm-eval``. A folder may have both, and a label may have runs of both
kinds if they are of one model. Answers to suites are compared only over the same items, by their
hashes; what must be equal of the harness's tasks is in `nvvl.reports.tasks`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from nvvl.errors import DataError
from nvvl.reports.harness_run import RESULTS_NAME, HarnessRun, load_harness_run
from nvvl.reports.run import SETTINGS_NAME, RunResult, load_run, settings_by_name

# By the file that tells what a folder is.
_LOADERS: Mapping[str, Callable[[Path], RunResult | HarnessRun]] = {
    SETTINGS_NAME: load_run,
    RESULTS_NAME: load_harness_run,
}

RUN_FILES = tuple(_LOADERS)

# Settings that say which model and questions; what must be equal of them is refused elsewhere.
_NOT_MOVING = {
    *("model_sha256", "teacher_sha256", "suites", "metrics", "num_items", "seed", "gate_suite"),
    *("gate_items", "nvvl_version"),
}


def load_runs(runs: Sequence[RunResult | HarnessRun | Path]) -> list[RunResult | HarnessRun]:
    """Read folders of ``nvvl evaluate`` and of ``nvvl lm-eval``; one may be both.

    Raises:
        DataError: if a folder is neither, or a run is not finished or does not parse.
    """
    return [
        found for run in runs for found in (_load_folder(run) if isinstance(run, Path) else [run])
    ]


def require_comparable(runs: Sequence[RunResult | HarnessRun]) -> None:
    """Refuse runs that cannot stand in one report.

    Raises:
        DataError: if there is no run, one label is of two models or of two evaluations, the first
            run lacks the answers that others have, or runs were asked different items.
    """
    if not runs:
        raise DataError("report: required at least one run, got none")
    _require_one_model_a_label(runs)
    evaluated = [run for run in runs if isinstance(run, RunResult)]
    if evaluated and evaluated[0].label != runs[0].label:
        raise DataError(
            f"report: the first run, {runs[0].label}, is what the others are compared with, and "
            f"has no answers of nvvl evaluate as {evaluated[0].label} has; give one that has first"
        )
    _require_same_items(evaluated)


def describe_differing(runs: Sequence[RunResult]) -> list[str]:
    """Say which settings that move answers differ from those of the first run, and how."""
    lines = []
    settings = [(run.label, settings_by_name(asdict(run.settings))) for run in runs]
    names = dict.fromkeys(name for _, values in settings for name in values)
    for name in names:
        if name in _NOT_MOVING:
            continue
        first = settings[0][1].get(name, "unknown")
        others = [(label, values.get(name, "unknown")) for label, values in settings[1:]]
        said = [f"{value} for {label}" for label, value in others if value != first]
        if said:
            lines.append(f"{name.replace('_', ' ')} {first} for {runs[0].label}, {', '.join(said)}")
    return lines


def _load_folder(folder: Path) -> list[RunResult | HarnessRun]:
    found = [load(folder) for name, load in _LOADERS.items() if (folder / name).is_file()]
    if not found:
        raise DataError(
            f"{folder}: has no {' and no '.join(_LOADERS)}; give a folder that nvvl evaluate or "
            "nvvl lm-eval has written"
        )
    return found


def _require_one_model_a_label(runs: Sequence[RunResult | HarnessRun]) -> None:
    first: dict[str, RunResult | HarnessRun] = {}
    for run in runs:
        other = first.setdefault(run.label, run)
        if run.settings.model_sha256 != other.settings.model_sha256:
            raise DataError(
                f"{run.out}: {run.label} is another model there than in {other.out} (their "
                "model_sha256 differ); run one with another --label"
            )


def _require_same_items(runs: Sequence[RunResult]) -> None:
    """Refuse answers that cannot be compared item by item with those of the first run."""
    labels = [run.label for run in runs]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise DataError(
            f"report: two runs are labelled {', '.join(twice)}; evaluate with another --label"
        )
    taught = [run for run in runs if run.settings.teacher_sha256 is not None]
    for run in taught[1:]:
        if run.settings.teacher_sha256 != taught[0].settings.teacher_sha256:
            raise DataError(
                f"{run.out}: its KL is to another teacher than that of {taught[0].out}; evaluate "
                "both with the same --teacher"
            )
    for baseline, run in ((runs[0], run) for run in runs[1:]):
        asked, hashes = (
            {a.key: a.item_sha256 for a in r.answers if a.condition == "right"}
            for r in (baseline, run)
        )
        if hashes != asked:
            keys = asked.keys() | hashes.keys()
            differing = sorted(key for key in keys if asked.get(key) != hashes.get(key))
            suite, _, index = differing[0]
            raise DataError(
                f"{run.out}: {len(differing)} items differ from those of {baseline.out}, first "
                f"{suite} {index}; evaluate both with the same suites, number of items and seed"
            )
