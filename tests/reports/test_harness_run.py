"""Runs of the harness on disk: written, read again, interrupted."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nvvl.errors import DataError, OutputError
from nvvl.reports.harness_run import HarnessRun, load_harness_run, read_harness_run
from nvvl.reports.harness_store import HarnessStore

MakeRun = Callable[..., HarnessRun]


@pytest.fixture
def run(make_harness_run: MakeRun, tmp_path: Path) -> HarnessRun:
    """A finished run of two items, one of whose scores has a weight."""
    return make_harness_run(
        "BF16",
        {"acc": [1.0, 0.0], "ppl": [(-2.5, 3.0), (-1.0, 2.0)]},
        aggregations={"acc": "mean", "ppl": "weighted_perplexity"},
        out=tmp_path / "run",
    )


def start(run: HarnessRun, *, overwrite: bool = False) -> HarnessStore:
    return HarnessStore.open(replace(run, tasks={}, items={}), overwrite=overwrite)


def write(run: HarnessRun) -> None:
    store = start(run)
    store.begin(list(run.tasks))
    for task, results in run.tasks.items():
        store.finish(task, results, run.items)


def test_finished_run_is_read_as_it_was_written(run: HarnessRun) -> None:
    write(run)
    assert load_harness_run(run.out) == run
    assert (run.out / "lm-eval-items.jsonl").read_text().splitlines() == [
        '{"task": "arc", "index": 0, "sha256": "arc-0", '
        '"scores": {"acc,none": 1.0, "ppl,none": [-2.5, 3.0]}}',
        '{"task": "arc", "index": 1, "sha256": "arc-1", '
        '"scores": {"acc,none": 0.0, "ppl,none": [-1.0, 2.0]}}',
    ]
    values = json.loads((run.out / "lm-eval.json").read_text())
    assert list(values) == [
        *("label", "model", "format", "weights_bytes", "folder_bytes", "manifest_sha256"),
        *("settings", "tasks", "unfinished"),
    ]


def test_unfinished_run_is_refused_and_goes_on(run: HarnessRun) -> None:
    store = start(run)
    store.begin(["arc", "gsm8k"])
    store.finish("arc", run.tasks["arc"], run.items)
    with pytest.raises(
        DataError, match=r"run is not finished, .* missing of gsm8k; run .* goes on"
    ):
        load_harness_run(run.out)
    again = start(run)
    assert again.run.tasks == run.tasks
    again.begin([])  # gsm8k is not asked for any more
    assert load_harness_run(run.out) == run


def test_items_of_a_task_without_results_are_dropped(run: HarnessRun) -> None:
    write(run)
    path = run.out / "lm-eval-items.jsonl"
    whole = path.read_text()
    path.write_text(whole + whole.replace("arc", "gsm8k") + whole[:20])
    assert start(run).run.items == run.items
    assert path.read_text() == whole


def test_results_without_items_are_not_finished(run: HarnessRun) -> None:
    write(run)
    path = run.out / "lm-eval-items.jsonl"
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    with pytest.raises(DataError, match="results of all items are missing of arc"):
        load_harness_run(run.out)
    assert start(run).run.tasks == {}
    path.unlink()
    assert read_harness_run(run.out).items == {}


def test_an_item_that_comes_twice_has_its_last_scores(run: HarnessRun) -> None:
    write(run)
    path = run.out / "lm-eval-items.jsonl"
    path.write_text(path.read_text().replace("1.0", "0.0", 1) + path.read_text())
    assert load_harness_run(run.out) == run


def test_other_settings_are_refused_or_replaced(run: HarnessRun) -> None:
    write(run)
    (run.out / "lm-eval.jsonl").write_text("{}\n")
    other = replace(run, settings=replace(run.settings, limit=3, chat=True))
    with pytest.raises(
        OutputError, match=r"other settings \(--chat, --limit\); choose another folder"
    ):
        start(other)
    assert start(other, overwrite=True).run.tasks == {}
    assert list(run.out.iterdir()) == []


def test_other_arithmetic_is_refused_and_an_unknown_one_is_read(run: HarnessRun) -> None:
    write(run)
    path = run.out / "lm-eval.json"
    values = json.loads(path.read_text())
    del values["settings"]["arithmetic"]
    path.write_text(json.dumps(values))
    assert load_harness_run(run.out) == run
    here = replace(run, settings=replace(run.settings, arithmetic={"products": "float32"}))
    with pytest.raises(OutputError, match=r"other settings \(products\); choose another folder"):
        start(here)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("lm-eval.json", "{", "not results of nvvl lm-eval"),
        ("lm-eval.json", "[]", "not results of nvvl lm-eval"),
        ("lm-eval.json", '{"label": "x"}', "not results of nvvl lm-eval"),
        ("lm-eval-items.jsonl", "{}\n", "line 1 is not scores of an item"),
        ("lm-eval-items.jsonl", '{"scores": {"acc": "x"}}\n', "line 1 is not scores of an item"),
        ("lm-eval-items.jsonl", "[" * 100_000 + "\n", "line 1 is not scores of an item"),
        ("lm-eval.json", "[" * 100_000, "not results of nvvl lm-eval"),
        ("lm-eval.json", "9" * 5000, "not results of nvvl lm-eval"),
    ],
)
def test_files_that_are_something_else_are_named(
    name: str, text: str, message: str, run: HarnessRun
) -> None:
    write(run)
    (run.out / name).write_text(text)
    with pytest.raises(DataError, match=f"{name}: {message}"):
        load_harness_run(run.out)


def test_missing_results_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"lm-eval\.json: cannot be read \(No such file"):
        load_harness_run(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": ".."}, "label: required a name of one line"),
        ({"label": 5}, "run.label: required text, got 5"),
        ({"model": None}, "run.model: required a path, got null"),
        ({"weights_bytes": "x"}, "run.weights_bytes: required a whole number"),
        ({"settings": {}}, "run.settings: missing model_sha256"),
        ({"tasks": {"arc": [{}]}}, r"run.tasks.arc\[0\]: missing task"),
        ({"unfinished": "x"}, 'run.unfinished: required a list, got "x"'),
    ],
)
def test_results_with_other_values_are_named(
    changes: dict[str, Any], message: str, run: HarnessRun
) -> None:
    write(run)
    path = run.out / "lm-eval.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(DataError, match=rf"json: not results of nvvl lm-eval \({message}"):
        load_harness_run(run.out)
