import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nvvl.errors import ConfigError, DataError, OutputError
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


def edit(out: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads((out / "run.json").read_text())
    change(values)
    (out / "run.json").write_text(json.dumps(values))


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
    with pytest.raises(OutputError, match="holds a run with --seed 0, asked for 1"):
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
        ("run.json", "[]", "required a JSON object, got \\[\\]"),
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


@pytest.mark.parametrize("label", ["..", "a/b", "a\nb", ""])
def test_a_label_that_cannot_name_a_folder_is_refused(tmp_path: Path, label: str) -> None:
    with pytest.raises(DataError, match="label: required a name of one line"):
        Journal.open(tmp_path / "new", SETTINGS, {**ABOUT, "label": label}, overwrite=False)
    assert not (tmp_path / "new").exists()
    open_journal(tmp_path).append(ANSWERS)
    edit(tmp_path, lambda values: values.update(label=label))
    with pytest.raises(DataError, match=r"run\.json: label: required a name of one line"):
        load_run(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": 5}, "run.label: required text, got 5"),
        ({"model": None}, "run.model: required a path, got null"),
        ({"model": "a\0b"}, "run.model: required a path"),
        ({"weights_bytes": "x"}, "run.weights_bytes: required a whole number"),
        ({"manifest_sha256": 5}, "run.manifest_sha256: required text, got 5"),
    ],
)
def test_a_run_with_other_values_is_named(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    open_journal(tmp_path).append(ANSWERS)
    edit(tmp_path, lambda values: values.update(changes))
    with pytest.raises(DataError, match=rf"run\.json: {message}.*; evaluate again"):
        load_run(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_items": "x"}, "settings.num_items: required a whole number"),
        ({"num_items": 0}, "settings.num_items: required at least 1, got 0"),
        ({"suites": "line"}, 'settings.suites: required a list, got "line"'),
        ({"suites": ["line", "line"]}, "settings: required different suites, each with a metric"),
        ({"metrics": []}, "settings: required different suites, each with a metric"),
        ({"metrics": ["luck"]}, r"settings.metrics\[0\]: required one of exact_match"),
        ({"arithmetic": 5}, "settings.arithmetic: required an object, got 5"),
        ({"gate_suite": "page"}, "settings: required a gate_suite that is one of the suites"),
        ({"gate_items": 0}, "settings: .*and gate_items from 1 to 3, got line and 0"),
        ({"gate_items": 4}, "settings: .*and gate_items from 1 to 3, got line and 4"),
        ({"pruning_rate": float("nan")}, "settings.pruning_rate: required a number"),
    ],
)
def test_settings_with_other_values_are_named(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    open_journal(tmp_path).append(ANSWERS)
    edit(tmp_path, lambda values: values["settings"].update(changes))
    with pytest.raises(DataError, match=rf"run\.json: {message}.*; evaluate again"):
        load_run(tmp_path)


@pytest.mark.parametrize("num_items", [10**8, 2**63 - 1])
def test_a_run_of_any_size_is_counted_without_listing_it(tmp_path: Path, num_items: int) -> None:
    open_journal(tmp_path).append(ANSWERS)
    edit(tmp_path, lambda values: values["settings"].update(num_items=num_items))
    message = f"not finished, {num_items - 3} of {num_items + 2} answers are missing"
    with pytest.raises(DataError, match=message):
        load_run(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nll": float("nan")}, "answer.nll: required a number"),
        ({"score": float("inf")}, "answer.score: required a number"),
        ({"cer": "x"}, "answer.cer: required a number"),
        ({"correct": 5}, "answer.correct: required true or false, got 5"),
        ({"num_tokens": 0}, "answer.num_tokens: required at least 1, got 0"),
        ({"num_tokens": -1}, "answer.num_tokens: required a whole number"),
        ({"answer": None}, "answer.answer: required text, got null"),
        ({"index": [1]}, "answer.index: required a whole number"),
        ({"condition": "left"}, "answer.condition: required one of right, blank, other"),
    ],
)
def test_an_answer_with_other_values_is_named(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    open_journal(tmp_path).append(ANSWERS)
    path = tmp_path / "answers.jsonl"
    first, *rest = path.read_text().splitlines(keepends=True)
    path.write_text("".join([json.dumps(json.loads(first) | changes) + "\n", *rest]))
    for read in (load_run, open_journal):
        with pytest.raises(
            DataError, match=rf"answers\.jsonl: line 1 is not an answer \({message}"
        ):
            read(tmp_path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' + "9" * 5000 + "}"])
def test_json_that_python_cannot_hold_is_named(tmp_path: Path, text: str) -> None:
    open_journal(tmp_path).append(ANSWERS)
    answers = (tmp_path / "answers.jsonl").read_text()
    (tmp_path / "answers.jsonl").write_text(answers + text + "\n")
    with pytest.raises(DataError, match=r"answers\.jsonl: line 6 is not an answer"):
        load_run(tmp_path)
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(DataError, match=r"run\.json: not valid JSON"):
        load_run(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json: not valid JSON"):
        describe_model(tmp_path)


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


def test_weights_are_the_files_that_the_index_names(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "weights.safetensors").write_bytes(bytes(30))
    (tmp_path / "other.safetensors").write_bytes(bytes(7))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "weights.safetensors"}}))
    assert describe_model(tmp_path)["weights_bytes"] == 30
    for text in ("[]", '{"weight_map": 5}', "{"):
        index.write_text(text)
        with pytest.raises(ConfigError, match=r"model\.safetensors\.index\.json: "):
            describe_model(tmp_path)


def test_formats_that_are_no_object_are_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"quantization_config": "fp8"}')
    with pytest.raises(ConfigError, match='quantization_config: required an object, got "fp8"'):
        describe_model(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json: cannot be read"):
        describe_model(tmp_path)
