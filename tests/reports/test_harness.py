"""The lm-evaluation-harness on our forward: against plain references, and against interruptions."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from tokenizers import Tokenizer
from typer.testing import CliRunner

from nvvl.cli import app
from nvvl.errors import DataError, HardwareError, OutputError
from nvvl.model.load import load_model
from nvvl.model.processor import Processor
from nvvl.model.resolve import resolve_model
from nvvl.reports import harness
from nvvl.reports.harness import LOCAL_TASKS, HarnessOptions, run_tasks
from nvvl.reports.harness_data import copies, next_words, prose
from nvvl.reports.harness_journal import ResponseJournal
from nvvl.reports.harness_model import HarnessModel
from nvvl.reports.harness_run import load_harness_run
from nvvl.reports.harness_text import make_task_rows
from nvvl.reports.tasks import compare_tasks

TEXTS = ["the thing in the thing", "in the", "a longer text about the thing, in the end", "x"]


def ask(kind: str, *args: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=args, idx=0)  # type: ignore[arg-type]


@pytest.fixture
def make_model(tiny_checkpoint: Path, tmp_path: Path) -> Callable[..., HarnessModel]:
    def make(**options: int) -> HarnessModel:
        return HarnessModel(
            load_model(tiny_checkpoint, dtype=torch.float32),
            Processor.from_folder(tiny_checkpoint),
            journal=ResponseJournal(tmp_path / f"responses{len(options)}.jsonl"),
            **{"batch_size": 3, "max_length": 300} | options,  # type: ignore[arg-type]
        )

    return make


def log_probs(model: HarnessModel, ids: list[int]) -> list[float]:
    """Log-probability of each token after the first, one plain forward."""
    with torch.no_grad():
        logits = model.model(torch.tensor([ids])).logits[0].double()
    rows = logits.log_softmax(-1)[:-1]
    return [float(row[token]) for row, token in zip(rows, ids[1:], strict=True)]


def encode(model: HarnessModel, text: str) -> list[int]:
    return list(model.processor.tokenizer.encode(text, add_special_tokens=False).ids)


def test_loglikelihood_equals_a_plain_forward(make_model: Callable[..., HarnessModel]) -> None:
    model = make_model()
    pairs = [(context, " " + answer) for context in ("", *TEXTS) for answer in TEXTS]
    found = model.loglikelihood([ask("loglikelihood", *pair) for pair in pairs])
    for (context, answer), (nats, _) in zip(pairs, found, strict=True):
        before = encode(model, context)
        whole = encode(model, context + answer)
        ids = (before or [1]) + whole[len(before) :]  # 1 starts a text
        expected = sum(log_probs(model, ids)[len(before or [1]) - 1 :])
        # float32, padded batches against single rows
        assert nats == pytest.approx(expected, abs=1e-3)


def test_greedy_is_what_the_model_would_write(make_model: Callable[..., HarnessModel]) -> None:
    model = make_model()
    context = "the thing"
    (answer,) = model.generate_until([ask("generate_until", context, {"max_gen_toks": 4})])
    ids = encode(model, context + answer)
    pairs = [(context, answer), (context, " thing in")]
    found = [is_greedy for _, is_greedy in model.loglikelihood([ask("x", *p) for p in pairs])]
    with torch.no_grad():
        logits = model.model(torch.tensor([ids])).logits[0]
    start = len(encode(model, context))
    greedy = logits[start - 1 : -1].argmax(-1).tolist() == ids[start:]
    assert found == [greedy, False]


def test_spaces_between_belong_to_the_continuation(
    make_model: Callable[..., HarnessModel],
) -> None:
    model = make_model()
    requests = [("the thing ", "in the"), ("the thing", " in the")]
    first, second = model.loglikelihood([ask("loglikelihood", *request) for request in requests])
    assert first[0] == pytest.approx(second[0], abs=1e-4)  # rows of one batch, in float32


@pytest.mark.parametrize("max_length", [64, 9, 4])
def test_rolling_predicts_every_token_once(
    max_length: int, make_model: Callable[..., HarnessModel]
) -> None:
    model = make_model(max_length=max_length)
    found = model.loglikelihood_rolling([ask("loglikelihood_rolling", text) for text in TEXTS])
    for text, nats in zip(TEXTS, found, strict=True):
        ids = encode(model, text)
        window = max_length - 1
        expected = 0.0
        for start in range(0, len(ids), window):  # the last window reaches back, to be full
            end = min(start + window, len(ids))
            row = ([1, *ids])[max(0, end - window) : end + 1]
            expected += sum(log_probs(model, row)[-(end - start) :])
        assert nats == pytest.approx(expected, abs=1e-3), text


def test_long_requests_lose_their_beginning_and_are_counted(
    make_model: Callable[..., HarnessModel],
) -> None:
    model = make_model(max_length=8)
    context = " ".join(["the thing"] * 20)
    ((nats, _),) = model.loglikelihood([ask("loglikelihood", context, " in the")])
    ids = encode(model, context + " in the")
    scored = len(ids) - len(encode(model, context))
    assert nats == pytest.approx(sum(log_probs(model, ids[-8:])[-scored:]), abs=1e-3)
    assert model.num_shortened.total() == 1
    settings = {"max_gen_toks": 3}
    long, short = (ask("generate_until", text, settings) for text in (context, context[-4:]))
    answers = model.generate_until([long, short])
    assert model.num_shortened.total() == 2
    assert len(answers) == 2


def test_answers_end_before_the_first_stop_string(make_model: Callable[..., HarnessModel]) -> None:
    model = make_model()
    requests = [ask("generate_until", text, {"max_gen_toks": 12}) for text in TEXTS]
    whole = model.generate_until(requests)
    stop = next(text[3:5] for text in whole if len(text) > 8)
    settings = {"max_gen_toks": 12, "until": [stop, "never"]}
    cut = model.generate_until([ask("generate_until", text, settings) for text in TEXTS])
    assert cut == [text.split(stop)[0] for text in whole]
    assert cut != whole


def test_sampling_is_refused(make_model: Callable[..., HarnessModel]) -> None:
    request = ask("generate_until", "x", {"do_sample": True, "temperature": 0.7})
    with pytest.raises(DataError, match="the task samples its answers"):
        make_model().generate_until([request])


def test_answer_that_leaves_no_room_is_refused(make_model: Callable[..., HarnessModel]) -> None:
    with pytest.raises(DataError, match="answers of 256 tokens leave no room in 200; raise --max"):
        make_model(max_length=200).generate_until([ask("generate_until", "x", {})])


def test_empty_continuation_is_refused(make_model: Callable[..., HarnessModel]) -> None:
    with pytest.raises(DataError, match="empty continuation"):
        make_model().loglikelihood([ask("loglikelihood", "the", "")])


def test_responses_are_reused_and_half_a_line_is_dropped(
    make_model: Callable[..., HarnessModel], tmp_path: Path
) -> None:
    requests = [ask("loglikelihood", text, " the") for text in TEXTS]
    first = make_model().loglikelihood(requests)
    path = tmp_path / "responses0.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]) + lines[-1][:9])
    model = make_model()
    calls: list[int] = []
    score = model._score
    model._score = lambda batch: calls.append(len(batch)) or score(batch)  # type: ignore[method-assign,func-returns-value]
    assert model.loglikelihood(requests) == first
    assert calls == [1]  # the second batch alone, as it was formed before
    assert path.read_text().splitlines(keepends=True) == lines


def test_chat_puts_a_question_into_the_models_own_turns(
    make_model: Callable[..., HarnessModel],
) -> None:
    prompt = make_model().apply_chat_template([{"role": "user", "content": "Why?"}])
    assert prompt == (
        "<SPECIAL_10>System\n\n<SPECIAL_11>User\nWhy?\n<SPECIAL_11>Assistant\n<think></think>"
    )


def test_begun_answer_stays_open(make_model: Callable[..., HarnessModel]) -> None:
    """Tasks with a ``gen_prefix`` give the model the first words of its answer."""
    model = make_model()
    question = {"role": "user", "content": "Why?"}
    begun = {"role": "assistant", "content": "The answer is"}
    opened = model.apply_chat_template([question]) + "The answer is"
    assert model.apply_chat_template([question, begun], add_generation_prompt=False) == opened
    answer = encode(model, opened + " B")[len(encode(model, opened)) :]
    ((nats, _),) = model.loglikelihood([ask("loglikelihood", opened, " B")])
    expected = sum(log_probs(model, encode(model, opened) + answer)[-len(answer) :])
    assert nats == pytest.approx(expected, abs=1e-3)  # float32, as below


@pytest.mark.parametrize("question", ["Why?", "/think Why?"])
def test_answer_in_a_chat_is_scored_in_the_tokens_it_is_generated_in(
    question: str, make_model: Callable[..., HarnessModel]
) -> None:
    model = make_model()
    values = json.loads(model.processor.tokenizer.to_str())
    values["model"]["vocab"][">$"] = 290
    values["model"]["merges"].append([">", "$"])
    model.processor.tokenizer = Tokenizer.from_str(json.dumps(values))
    assert len(encode(model, "</think>$3")) < len(encode(model, "</think>") + encode(model, "$3"))
    prompt = model.apply_chat_template([{"role": "user", "content": question}])
    answer = encode(model, "$3")
    ((nats, _),) = model.loglikelihood([ask("loglikelihood", prompt, "$3")])
    expected = sum(log_probs(model, encode(model, prompt) + answer)[-len(answer) :])
    assert nats == pytest.approx(expected, abs=1e-3)  # float32, as above


def test_local_data_is_prose_that_does_not_overlap() -> None:
    rows = next_words()["test"]
    assert len(rows) > 1000
    for row in rows.select(range(50)):
        assert len(row["context"].split()) == 40
        assert len(set(row["choices"])) == 4
    passages = prose()["test"]["passage"]
    assert len(passages) == len(set(passages)) > 50
    assert len(copies()["test"]) > 1000
    assert LOCAL_TASKS == ("nvvl_copy", "nvvl_next_words", "nvvl_prose")


def test_task_on_the_embedded_model_equals_five_lines(tmp_path: Path) -> None:
    source, count = resolve_model("embedded"), 12
    options = HarnessOptions(limit=count, batch_size=16, dtype=torch.float32)
    run = run_tasks(source, tmp_path / "run", ["nvvl_next_words"], options, label="bf16")
    model, tokenizer = (
        load_model(source, dtype=torch.float32),
        Processor.from_folder(source).tokenizer,
    )
    hits = 0
    for row in next_words()["test"].select(range(count)):
        scores = []
        for choice in row["choices"]:
            ids = torch.tensor([tokenizer.encode(f"{row['context']} {choice}").ids])
            start = len(tokenizer.encode(row["context"]).ids)
            with torch.no_grad():
                rows = model(ids).logits[0].log_softmax(-1)
            scores.append(float(rows[:-1].gather(-1, ids[0, 1:, None])[start - 1 :].sum()))
        hits += scores.index(max(scores)) == row["label"]
    (result,) = run.results
    accuracy = next(metric for metric in result.metrics if metric.name == "acc")
    assert result.num_items == count
    assert accuracy.value == pytest.approx(hits / count)
    expected = math.sqrt(accuracy.value * (1 - accuracy.value) / (count - 1))
    assert accuracy.stderr == pytest.approx(expected)


@pytest.fixture(scope="module")
def options() -> HarnessOptions:
    return HarnessOptions(limit=6, batch_size=4)


def test_runs_are_kept_and_tasks_added(
    tiny_checkpoint: Path,
    tmp_path: Path,
    options: HarnessOptions,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = run_tasks(tiny_checkpoint, tmp_path, ["nvvl_copy"], options, label="tiny")
    both = run_tasks(tiny_checkpoint, tmp_path, ["nvvl_copy", "nvvl_prose"], options, label="tiny")
    assert both.results[0] == first.results[0]
    assert [result.task for result in both.results] == ["nvvl_copy", "nvvl_prose"]
    metrics = {metric.name: metric for metric in both.results[1].metrics}
    assert metrics.keys() == {"word_perplexity", "byte_perplexity", "bits_per_byte"}
    assert metrics["bits_per_byte"].value == pytest.approx(
        math.log2(metrics["byte_perplexity"].value)
    )

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a finished task was run again")

    monkeypatch.setattr(harness, "load_any", fail)
    again = run_tasks(tiny_checkpoint, tmp_path, ["nvvl_prose"], options, label="tiny")
    assert again.results == both.results[1:]
    stored = json.loads((tmp_path / "lm-eval.json").read_text())
    assert list(stored["tasks"]) == ["nvvl_copy", "nvvl_prose"]
    assert stored["settings"]["limit"] == 6


def test_scores_of_every_item_are_kept(
    tiny_checkpoint: Path, tmp_path: Path, options: HarnessOptions
) -> None:
    run = run_tasks(
        tiny_checkpoint, tmp_path, ["nvvl_copy", "nvvl_prose", "nvvl_next_words"], options
    )
    assert load_harness_run(tmp_path) == run
    for result in run.results:
        items = run.items[result.task]
        assert [item.index for item in items] == list(range(6))
        assert len({item.sha256 for item in items}) == 6
        for metric in result.metrics:
            scores = np.array([item.scores[metric.key] for item in items])
            if metric.aggregation == "mean":
                expected = scores.mean()
            else:
                nats = -scores[:, 0].sum() / scores[:, 1].sum()
                expected = nats / math.log(2) if metric.name == "bits_per_byte" else math.exp(nats)
            assert metric.value == pytest.approx(expected), metric.name


def test_items_are_known_by_what_was_asked(
    tiny_checkpoint: Path, tmp_path: Path, options: HarnessOptions
) -> None:
    few = replace(options, num_fewshot=1)
    alike, again, other = (
        run_tasks(tiny_checkpoint, tmp_path / name, ["nvvl_copy"], how, label=name)
        for name, how in (("a", options), ("b", replace(options, batch_size=2)), ("c", few))
    )
    hashes = [[item.sha256 for item in run.items["nvvl_copy"]] for run in (alike, again, other)]
    assert hashes[0] == hashes[1]
    assert not set(hashes[0]) & set(hashes[2])
    (task,) = compare_tasks([alike, again], "a")
    difference = task.metrics[0].scores["b"].difference
    assert difference is not None
    assert difference.p_value is not None
    with pytest.raises(DataError, match=r"--fewshot 1 \(there 0\)"):
        compare_tasks([alike, other], "a")


def test_group_has_a_number_and_no_items(
    tiny_checkpoint: Path, tmp_path: Path, options: HarnessOptions
) -> None:
    (tmp_path / "pair.yaml").write_text(
        "group: pair\ntask: [nvvl_next_words]\n"
        "aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]\n"
    )
    runs = [
        run_tasks(
            tiny_checkpoint, tmp_path / name, ["pair"], options, label=name, tasks_folder=tmp_path
        )
        for name in ("a", "b")
    ]
    assert list(runs[0].items) == ["nvvl_next_words"]
    tasks = {task.task: task for task in compare_tasks(runs, "a")}
    assert (tasks["pair"].num_items, tasks["nvvl_next_words"].num_items) == (None, 6)
    assert tasks["pair"].metrics[0].scores["b"].difference is None
    assert tasks["nvvl_next_words"].metrics[0].scores["b"].difference is not None
    _, rows = make_task_rows(list(tasks.values()), ["a", "b"], "a")
    assert rows.about.startswith("a group of tasks")


def test_cut_requests_are_said_and_counted_by_task(
    tiny_checkpoint: Path,
    tmp_path: Path,
    options: HarnessOptions,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = (harness.TASKS_FOLDER / "nvvl_next_words.yaml").read_text()
    text = text.replace("nvvl_next_words", "brief").replace("{{context}}", "{{context[:9]}}")
    (tmp_path / "brief.yaml").write_text(text)
    (tmp_path / "pair.yaml").write_text(
        "group: pair\ntask: [nvvl_next_words, brief]\n"
        "aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]\n"
    )
    short = replace(options, max_length=128)
    run = run_tasks(
        tiny_checkpoint, tmp_path / "a", ["brief", "pair"], short, label="a", tasks_folder=tmp_path
    )
    assert {result.task: result.num_shortened for result in run.results} == {
        "nvvl_next_words": 24,  # 6 items, 4 choices each
        "brief": 0,
        "pair": 24,
    }
    said = [line for line in capsys.readouterr().err.splitlines() if "lost their beginning" in line]
    assert said == [
        "pair: 24 requests lost their beginning to --max-length 128, and the scores are of what "
        "was left; raise --max-length"
    ]


def test_other_settings_need_another_folder(
    tiny_checkpoint: Path, tmp_path: Path, options: HarnessOptions
) -> None:
    run_tasks(tiny_checkpoint, tmp_path, ["nvvl_copy"], options)
    shorter = HarnessOptions(limit=3, batch_size=4)
    with pytest.raises(
        OutputError, match=r"results with other settings \(--limit\); choose another"
    ):
        run_tasks(tiny_checkpoint, tmp_path, ["nvvl_copy"], shorter)
    run = run_tasks(tiny_checkpoint, tmp_path, ["nvvl_copy"], shorter, overwrite=True)
    assert run.results[0].num_items == 3


@pytest.mark.parametrize("overwrite", [False, True])
def test_folder_of_something_else_is_left_as_it_is(
    tiny_checkpoint: Path, tmp_path: Path, options: HarnessOptions, overwrite: bool
) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(OutputError, match="required a new or empty folder for a run"):
        run_tasks(tiny_checkpoint, tmp_path, ["nvvl_copy"], options, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_every_folder_is_looked_at_before_the_first_model_is_asked(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("mine")
    models = [str(shutil.copytree(tiny_checkpoint, tmp_path / name)) for name in ("one", "two")]
    labels = ["--label", "a", "--label", "b"]
    options = ["--task", "nvvl_copy", "-o", str(tmp_path), "--limit", "1"]
    done = CliRunner().invoke(app, ["lm-eval", *models, *options, *labels])
    assert done.exit_code == 2
    assert "b: required a new or empty folder for a run" in done.stderr
    assert not (tmp_path / "a").exists()


def test_more_examples_than_a_task_has_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    text = (harness.TASKS_FOLDER / "nvvl_copy.yaml").read_text().replace("nvvl_copy", "mine")
    (tmp_path / "mine.yaml").write_text(text + "fewshot_split: test\n")
    for task, num_examples in (
        ("nvvl_copy", len(copies()["test"])),
        ("mine", len(copies()["test"]) - 1),
    ):
        too_many = HarnessOptions(limit=1, num_fewshot=num_examples + 1)
        message = f"the task {task} has {num_examples} examples .* asked for {num_examples + 1}"
        with pytest.raises(DataError, match=message):
            run_tasks(tiny_checkpoint, tmp_path / "run", [task], too_many, tasks_folder=tmp_path)


def test_tasks_do_not_go_on_with_other_arithmetic(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = HarnessOptions(limit=1)
    monkeypatch.setattr(harness, "describe_arithmetic", lambda _: {"products": "bfloat16"})
    run_tasks(tiny_checkpoint, tmp_path, ["nvvl_copy"], one)
    monkeypatch.setattr(harness, "describe_arithmetic", lambda _: {"products": "float32"})
    with pytest.raises(OutputError, match=r"results with other settings \(products\)"):
        run_tasks(tiny_checkpoint, tmp_path, ["nvvl_copy"], one)


def test_a_second_run_does_not_write_beside_the_first(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    one = HarnessOptions(limit=1)
    refused: list[str] = []

    def start_another(*_: object) -> None:
        with pytest.raises(OutputError, match="another run is writing there") as caught:
            run_tasks(tiny_checkpoint, tmp_path, ["nvvl_copy"], one)
        refused.append(str(caught.value))

    first = run_tasks(tiny_checkpoint, tmp_path, ["nvvl_copy"], one, progress=start_another)
    assert refused
    assert load_harness_run(tmp_path) == first


def test_task_files_of_ones_own_are_found(
    tiny_checkpoint: Path, tmp_path: Path, options: HarnessOptions
) -> None:
    text = (harness.TASKS_FOLDER / "nvvl_next_words.yaml").read_text()
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mine.yaml").write_text(text.replace("nvvl_next_words", "mine"))
    folder = tmp_path / "tasks"
    run = run_tasks(tiny_checkpoint, tmp_path / "run", ["mine"], options, tasks_folder=folder)
    assert run.results[0].task == "mine"
    edited = folder / "mine.yaml"
    edited.write_text(edited.read_text() + "\n# another filter\n")
    with pytest.raises(OutputError, match=r"results with other settings \(files of --tasks\)"):
        run_tasks(tiny_checkpoint, tmp_path / "run", ["mine"], options, tasks_folder=folder)
    with pytest.raises(DataError, match="not a folder; required one with task files"):
        run_tasks(tiny_checkpoint, tmp_path, ["mine"], options, tasks_folder=tmp_path / "none")
    with pytest.raises(DataError, match=r"run: no file there \(\*\.yaml\) names a task"):
        run_tasks(tiny_checkpoint, tmp_path, ["nvvl_copy"], tasks_folder=tmp_path / "run")


def test_data_that_cannot_be_had_is_one_line(
    tiny_checkpoint: Path, tmp_path: Path, options: HarnessOptions
) -> None:
    text = (harness.TASKS_FOLDER / "nvvl_copy.yaml").read_text().replace("nvvl_copy", "broken")
    text = text.replace("nvvl.reports.harness_data.copies", "nvvl.reports.harness_data._as_test")
    (tmp_path / "broken.yaml").write_text(text)
    with pytest.raises(DataError, match="the task broken or its data cannot be loaded"):
        run_tasks(tiny_checkpoint, tmp_path / "run", ["broken"], options, tasks_folder=tmp_path)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [([], "got none"), (["nvvl_copy", "nvvl_copy"], "required different tasks")],
)
def test_tasks_are_named_once(
    tasks: list[str], message: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        run_tasks(tiny_checkpoint, tmp_path, tasks)


def test_missing_library_is_named(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(HardwareError, match=r"pip install 'nvvl\[eval\]'"):
        run_tasks(tiny_checkpoint, tmp_path, ["nvvl_copy"])


def test_results_that_are_none_are_refused(
    tiny_checkpoint: Path, tmp_path: Path, options: HarnessOptions
) -> None:
    (tmp_path / "lm-eval.json").write_text("[]")
    with pytest.raises(DataError, match="not results of nvvl lm-eval"):
        run_tasks(tiny_checkpoint, tmp_path, ["nvvl_copy"], options)
