"""Runs of both kinds in one report: how folders are told apart, and what is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from nvvl.errors import DataError
from nvvl.reports.collect import collect
from nvvl.reports.comparable import load_runs
from nvvl.reports.harness_run import HarnessRun
from nvvl.reports.harness_store import HarnessStore
from nvvl.reports.journal import Journal
from nvvl.reports.render import render_markdown
from nvvl.reports.run import Answer, RunResult, Settings

MakeRun = Callable[..., HarnessRun]


def evaluate(out: Path, label: str) -> RunResult:
    """Write a run of one suite with two answers."""
    settings = Settings(
        model_sha256=label * 8,
        teacher_sha256=None,
        suites=("line",),
        metrics=("exact_match",),
        num_items=2,
        seed=0,
        batch_size=2,
        gate_suite=None,
        gate_items=0,
        device="cpu",
        dtype="bfloat16",
        max_num_tiles=None,
        pruning_rate=0.0,
        nvvl_version="0.1.0",
    )
    about = {
        **{"label": label, "model": f"models/{label}", "format": label},
        **{"weights_bytes": 10, "folder_bytes": 12},
    }
    journal = Journal.open(out, settings, about, overwrite=False)
    journal.append(
        Answer(
            suite=suite,
            index=index,
            condition=condition,
            item_id=f"{suite}-{index}",
            item_sha256=f"{suite}-{index}",
            question="?",
            truth="7",
            answer="7",
            score=1.0,
            correct=True,
            cer=0.0,
            anls=1.0,
            nll=0.5,
            kl=None,
            top1=None,
            num_tokens=2,
            num_visual_tokens=4,
        )
        for suite, condition, index in settings.expected_keys()
    )
    return journal.finish()


def write(run: HarnessRun) -> Path:
    store = HarnessStore.open(replace(run, tasks={}, items={}), overwrite=False)
    for task, results in run.tasks.items():
        store.finish(task, results, run.items)
    return run.out


def test_settings_that_move_answers_are_told(tmp_path: Path) -> None:
    same, other = evaluate(tmp_path / "a", "bf16"), evaluate(tmp_path / "b", "fp8")
    assert collect([same, other]).differing == ()
    here, there = {"processor": "AVX512"}, {"processor": "AVX2"}
    first = replace(same, settings=replace(same.settings, arithmetic=here))
    changed = replace(other.settings, arithmetic=there, max_num_tiles=1, batch_size=4)
    report = collect([first, replace(other, settings=changed)])
    assert report.differing == (
        "batch size 2 for bf16, 4 for fp8",
        "max num tiles None for bf16, 1 for fp8",
        "processor AVX512 for bf16, AVX2 for fp8",
    )
    text = render_markdown(report)
    assert "Not asked in the same way: batch size 2 for bf16, 4 for fp8; max num tiles" in text


def test_folders_are_told_apart_by_their_files(make_harness_run: MakeRun, tmp_path: Path) -> None:
    both = write(make_harness_run("BF16", {"acc": [1.0]}, out=tmp_path / "BF16"))
    run = evaluate(both, "BF16")
    alone = write(make_harness_run("FP8", {"acc": [1.0]}, out=tmp_path / "FP8"))
    first, second, third = load_runs([both, alone])
    assert first == run
    assert isinstance(second, HarnessRun)
    assert isinstance(third, HarnessRun)
    assert [second.out, third.out] == [both, alone]
    assert load_runs([run, second]) == [run, second]


def test_a_folder_that_is_neither_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"has no run\.json and no lm-eval\.json; give a folder that nvvl evaluate or",
    ):
        load_runs([tmp_path])


def test_one_label_is_one_row(make_harness_run: MakeRun, tmp_path: Path) -> None:
    report = collect(
        [
            evaluate(tmp_path / "BF16", "BF16"),
            make_harness_run("BF16", {"acc": [1.0, 1.0]}),
            make_harness_run("FP8", {"acc": [1.0, 0.0]}),
        ]
    )
    assert (report.baseline, report.num_items) == ("BF16", 2)
    assert [(run.label, list(run.suites)) for run in report.runs] == [
        ("BF16", ["line"]),
        ("FP8", []),
    ]
    assert report.runs[1].out == "lm/FP8"
    (task,) = report.tasks
    assert task.outs == {"BF16": "lm/BF16", "FP8": "lm/FP8"}
    difference = task.metrics[0].scores["FP8"].difference
    assert difference is not None
    assert difference.score.estimate == -0.5


def test_tasks_alone_make_a_report(make_harness_run: MakeRun) -> None:
    report = collect([make_harness_run(label, {"acc": [1.0]}) for label in ("BF16", "FP8")])
    assert (report.baseline, report.seed, report.num_items) == ("BF16", None, None)
    assert [run.suites for run in report.runs] == [{}, {}]


def test_one_label_for_two_models_is_refused(make_harness_run: MakeRun, tmp_path: Path) -> None:
    run = evaluate(tmp_path / "BF16", "BF16")
    other = make_harness_run("BF16", {"acc": [1.0]}, settings={"model_sha256": "other"})
    with pytest.raises(DataError, match=r"lm/BF16: BF16 is another model there than in .*/BF16 \("):
        collect([run, other])


def test_kl_to_two_teachers_is_refused(tmp_path: Path) -> None:
    runs = [evaluate(tmp_path / label, label) for label in ("BF16", "FP8", "NVFP4")]
    taught = [
        replace(run, settings=replace(run.settings, teacher_sha256=teacher))
        for run, teacher in zip(runs, (None, "one", "other"), strict=True)
    ]
    assert len(collect(taught[:2]).runs) == 2
    with pytest.raises(DataError, match=r"NVFP4: its KL is to another teacher than that of .*FP8"):
        collect(taught)


def test_the_first_run_has_what_the_others_are_compared_in(
    make_harness_run: MakeRun, tmp_path: Path
) -> None:
    first, second = make_harness_run("BF16", {"acc": [1.0]}), evaluate(tmp_path / "FP8", "FP8")
    with pytest.raises(DataError, match=r"the first run, BF16, .* has no answers of nvvl evaluate"):
        collect([first, second])
    assert len(collect([second, first]).runs) == 2
