import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nvvl.errors import DataError, OutputError
from nvvl.reports.journal import Journal
from nvvl.reports.run import Answer, Settings, describe_model, fingerprint, load_run

SETTINGS = Settings(
    model_sha256="a" * 64,
    teacher_sha256=None,
    suites=("line",),
    metrics=("exact_match",),
    num_items=3,
    seed=0,
    batch_size=2,
    gate_suite="line",
    gate_items=1,
    device="cpu",
    dtype="bfloat16",
    max_num_tiles=None,
    pruning_rate=0.0,
    nvvl_version="0.1.0",
)
ABOUT: dict[str, Any] = {
    "label": "BF16",
    "model": "model",
    "format": "BF16",
    "weights_bytes": 10,
    "folder_bytes": 12,
}


def make_answer(key: tuple[Any, Any, int], text: str = "7") -> Answer:
    suite, condition, index = key
    return Answer(
        suite=suite,
        index=index,
        condition=condition,
        item_id=f"{suite}-{index}",
        item_sha256=f"{index:064x}",
        question="?",
        truth="7",
        answer=text,
        score=float(text == "7"),
        correct=text == "7",
        cer=0.0,
        anls=1.0,
        nll=0.5,
        kl=None,
        top1=None,
        num_tokens=2,
        num_visual_tokens=4,
    )


ANSWERS = [make_answer(key) for key in SETTINGS.expected_keys()]


def open_journal(out: Path, settings: Settings = SETTINGS, *, overwrite: bool = False) -> Journal:
    return Journal.open(out, settings, ABOUT, overwrite=overwrite)


def test_a_finished_run_reads_back_in_order(tmp_path: Path) -> None:
    out = tmp_path / "run"
    journal = open_journal(out)
    journal.append(ANSWERS[2:])
    journal.append(ANSWERS[:2])
    run = journal.finish()
    assert list(run.answers) == ANSWERS
    assert load_run(out) == run
    assert run.settings == SETTINGS
    assert [a.index for a in run.select("line")] == [0, 1, 2]
    assert [a.index for a in run.select("line", "other")] == [0]


@pytest.mark.parametrize("text", ["naïve 試", "a\nb\r\u2028c", '"quoted"', "\ud7ff\x00"])
def test_any_answer_survives_the_file(tmp_path: Path, text: str) -> None:
    journal = open_journal(tmp_path)
    answers = [replace(ANSWERS[0], answer=text), *ANSWERS[1:]]
    journal.append(answers)
    assert journal.finish().answers[0].answer == text


def test_an_interrupted_run_is_taken_up(tmp_path: Path) -> None:
    open_journal(tmp_path).append(ANSWERS[:2])
    assert list(open_journal(tmp_path).answers.values()) == ANSWERS[:2]


def test_half_a_line_is_dropped(tmp_path: Path) -> None:
    open_journal(tmp_path).append(ANSWERS[:2])
    path = tmp_path / "answers.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    journal = open_journal(tmp_path)
    assert list(journal.answers.values()) == ANSWERS[:1]
    journal.append(ANSWERS[1:])
    assert list(journal.finish().answers) == ANSWERS


def test_an_unfinished_run_is_not_reported(tmp_path: Path) -> None:
    open_journal(tmp_path).append(ANSWERS[:2])
    with pytest.raises(DataError, match="not finished, 3 of 5 answers are missing"):
        load_run(tmp_path)


def test_a_run_with_other_settings_is_refused_and_kept(tmp_path: Path) -> None:
    open_journal(tmp_path).append(ANSWERS)
    with pytest.raises(OutputError, match="holds a run with seed 0, asked for 1"):
        open_journal(tmp_path, replace(SETTINGS, seed=1))
    assert len(load_run(tmp_path).answers) == 5


def test_a_run_of_other_arithmetic_is_refused_with_what_differs(tmp_path: Path) -> None:
    here = replace(SETTINGS, arithmetic={"processor": "AVX2", "products": "float32"})
    open_journal(tmp_path, here).append(ANSWERS[:2])
    assert len(open_journal(tmp_path, here).answers) == 2
    there = replace(SETTINGS, arithmetic={"processor": "AVX2", "products": "bfloat16"})
    with pytest.raises(OutputError, match="holds a run with products float32, asked for bfloat16"):
        open_journal(tmp_path, there)


def test_a_run_that_did_not_record_its_arithmetic_is_read_and_not_gone_on_with(
    tmp_path: Path,
) -> None:
    open_journal(tmp_path).append(ANSWERS)
    values = json.loads((tmp_path / "run.json").read_text())
    del values["settings"]["arithmetic"]
    (tmp_path / "run.json").write_text(json.dumps(values))
    assert load_run(tmp_path).settings == SETTINGS
    here = replace(SETTINGS, arithmetic={"processor": "AVX2"})
    with pytest.raises(OutputError, match="holds a run with processor unknown, asked for AVX2"):
        open_journal(tmp_path, here)


def test_overwrite_discards_the_answers_of_other_settings(tmp_path: Path) -> None:
    open_journal(tmp_path).append(ANSWERS)
    assert open_journal(tmp_path, replace(SETTINGS, seed=1), overwrite=True).answers == {}
    with pytest.raises(DataError, match="5 of 5 answers are missing"):
        load_run(tmp_path)


def test_a_folder_that_cannot_be_made_or_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"notes\.txt/run: cannot be written \(Not a directory\)"):
        open_journal(tmp_path / "notes.txt" / "run")
    journal = open_journal(tmp_path / "run")
    journal.append(ANSWERS[:1])

    def fill_up(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fill_up)
        with pytest.raises(OutputError, match=r"answers\.jsonl: cannot be written \(No space left"):
            journal.append(ANSWERS[1:2])
    assert ANSWERS[0].key in open_journal(tmp_path / "run").answers


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_something_else_is_never_touched(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="required a new or empty folder"):
        open_journal(tmp_path, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("run.json", "{", "run.json: not valid JSON"),
        ("run.json", "[]", "required a JSON object, got list"),
        ("run.json", '{"settings": {"seed": 0}}', "settings must have exactly the keys"),
        ("answers.jsonl", '{"suite": "line"}\n', "line 1 is not an answer"),
        ("answers.jsonl", "x\n", "line 1 is not an answer"),
    ],
)
def test_a_damaged_run_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    open_journal(tmp_path).append(ANSWERS)
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        load_run(tmp_path)


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="give a folder that nvvl evaluate has written"):
        load_run(tmp_path)


def test_a_missing_label_is_named(tmp_path: Path) -> None:
    open_journal(tmp_path).append(ANSWERS)
    values = json.loads((tmp_path / "run.json").read_text())
    del values["label"]
    (tmp_path / "run.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match="missing label"):
        load_run(tmp_path)


def test_the_fingerprint_follows_contents_not_place(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(bytes(100))
    (tmp_path / "two" / "README.md").write_text("a card")
    first = fingerprint(tmp_path / "one")
    assert fingerprint(tmp_path / "two") == first
    (tmp_path / "two" / "model.safetensors").write_bytes(bytes(99) + b"\x01")
    assert fingerprint(tmp_path / "two") != first


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        (None, "BF16"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "NVFP4"),
        ({"quant_method": "gptq"}, "gptq"),
    ],
)
def test_format_and_sizes_are_read_from_the_folder(
    tmp_path: Path, quantization: dict[str, str] | None, expected: str
) -> None:
    config = {} if quantization is None else {"quantization_config": quantization}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(bytes(10))
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(bytes(20))
    (tmp_path / "calibration.amax").write_bytes(bytes(5))
    assert describe_model(tmp_path) == {
        "format": expected,
        "weights_bytes": 30,
        "folder_bytes": 35 + len(json.dumps(config)),
        "manifest_sha256": None,
    }
