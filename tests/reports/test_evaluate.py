import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from nvvl.calib_data.items import Item
from nvvl.errors import CheckpointError, ConfigError, DataError, OutputError
from nvvl.model.processor import Message
from nvvl.progress import Progress
from nvvl.quantize.presets import PRESETS
from nvvl.quantize.walk import quantize_checkpoint
from nvvl.reports.collect import collect
from nvvl.reports.evaluate import Candidate, Options, evaluate
from nvvl.reports.run import RunResult, load_run
from nvvl.reports.suites import Suite


def make_item(index: int, seed: int) -> Item:
    question = "<image>\n" + "Which number? " * (1 + index % 3)
    return Item(
        item_id=f"number-{seed}-{index}",
        messages=(Message("user", question), Message("assistant", str(index // 2))),
        images=(Image.new("RGB", (32, 32), (index, seed, 200)),),
    )


def make_same_answer(index: int, seed: int) -> Item:
    item = make_item(index, seed)
    return Item(item.item_id, (item.messages[0], Message("assistant", "7")), item.images)


NUMBERS = Suite(
    name="number",
    description="a number",
    metric="exact_match",
    max_new_tokens=3,
    make_item=make_item,
)
WORDS = Suite(
    name="word", description="a word", metric="anls", max_new_tokens=3, make_item=make_item
)
SAME = Suite(
    name="same",
    description="always 7",
    metric="exact_match",
    max_new_tokens=3,
    make_item=make_same_answer,
)

Evaluate = Callable[..., RunResult]


@pytest.fixture(scope="module")
def run(tiny_checkpoint: Path) -> Evaluate:
    """Evaluate one model, the tiny one by default, on few items."""

    def call(
        out: Path,
        *,
        folder: Path = tiny_checkpoint,
        suites: Sequence[Suite] = (NUMBERS, WORDS),
        label: str | None = None,
        teacher: Path | None = None,
        progress: Progress | None = None,
        **options: int,
    ) -> RunResult:
        (result,) = evaluate(
            [Candidate(folder=folder, out=out, label=label)],
            suites,
            Options(**{"num_items": 20, "batch_size": 2, "gate_items": 3} | options),  # type: ignore[arg-type]
            teacher=teacher,
            progress=progress,
        )
        return result

    return call


@pytest.fixture(scope="module")
def whole(run: Evaluate, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return run(tmp_path_factory.mktemp("whole") / "run")


def test_every_item_of_every_suite_is_answered_in_order(whole: RunResult) -> None:
    for suite in ("number", "word"):
        answers = whole.select(suite)
        assert [a.index for a in answers] == list(range(20))
        assert [a.item_id for a in answers] == [f"number-0-{i}" for i in range(20)]
        assert [a.truth for a in answers] == [str(i // 2) for i in range(20)]
    assert len(whole.select("number", "blank")) == len(whole.select("number", "other")) == 3
    assert len(whole.answers) == 46
    assert whole.label == whole.format == "BF16"
    assert whole == load_run(whole.out)


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    run: Evaluate, whole: RunResult, tmp_path: Path
) -> None:
    calls: list[tuple[str, int, int]] = []

    def interrupt(suite: str, num_answers: int, num_expected: int) -> None:
        calls.append((suite, num_answers, num_expected))
        if len(calls) in (1, 2, 5):  # within a suite, between suites, within the gate
            raise KeyboardInterrupt

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, progress=interrupt)
    run(tmp_path, progress=interrupt)
    counts = [num_answers for _, num_answers, _ in calls]
    assert counts == sorted(set(counts))  # no window was asked twice
    assert calls[-1][1:] == (46, 46)
    assert (tmp_path / "answers.jsonl").read_bytes() == (whole.out / "answers.jsonl").read_bytes()


def test_candidates_side_by_side_answer_as_they_do_alone(
    run: Evaluate,
    make_checkpoint: Callable[..., Path],
    tiny_checkpoint: Path,
    tmp_path: Path,
) -> None:
    other = make_checkpoint(tmp_path / "checkpoint", seed=1)
    folders = (tiny_checkpoint, other)
    alone = [
        run(tmp_path / f"alone-{place}", folder=folder, teacher=tiny_checkpoint)
        for place, folder in enumerate(folders)
    ]
    together = evaluate(
        [
            Candidate(folder=folder, out=tmp_path / f"together-{place}")
            for place, folder in enumerate(folders)
        ],
        [NUMBERS, WORDS],
        Options(num_items=20, batch_size=2, gate_items=3),
        teacher=tiny_checkpoint,
    )
    assert [result.answers for result in together] == [result.answers for result in alone]


def test_two_runs_cannot_share_a_folder(tiny_checkpoint: Path, tmp_path: Path) -> None:
    candidate = Candidate(folder=tiny_checkpoint, out=tmp_path / "run")
    with pytest.raises(DataError, match="another folder for the run of each"):
        evaluate([candidate, candidate], [NUMBERS])
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_not_asked_again(
    run: Evaluate, whole: RunResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("nvvl.reports.evaluate.load_any")
    assert run(whole.out) == whole


def test_a_model_as_its_own_teacher_has_no_divergence(
    run: Evaluate, whole: RunResult, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    twin = run(tmp_path, teacher=tiny_checkpoint, label="twin")
    assert {(a.kl, a.top1) for a in twin.answers if a.condition == "right"} == {(0.0, 1.0)}
    score = collect([whole, twin]).runs[1]
    difference = score.suites["number"].difference
    assert difference is not None
    assert (difference.score.estimate, difference.score.low, difference.score.high) == (0, 0, 0)
    assert score.kl is not None
    assert (score.kl.estimate, score.kl.low, score.kl.high) == (0, 0, 0)


def test_another_model_diverges(
    run: Evaluate,
    whole: RunResult,
    make_checkpoint: Callable[..., Path],
    tiny_checkpoint: Path,
    tmp_path: Path,
) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint", seed=1)
    other = run(tmp_path / "run", folder=folder, teacher=tiny_checkpoint, label="other")
    score = collect([whole, other]).runs[1]
    assert score.kl is not None
    assert score.kl.low > 0
    assert [a.item_sha256 for a in other.select("number")] == [
        a.item_sha256 for a in whole.select("number")
    ]


def test_the_gate_shows_other_images_with_the_same_question(whole: RunResult) -> None:
    right, blank, other = (whole.select("number", c)[:3] for c in ("right", "blank", "other"))
    for a, b, c in zip(right, blank, other, strict=True):
        assert a.question == b.question == c.question
        assert a.truth == b.truth == c.truth
        assert len({a.item_sha256, b.item_sha256, c.item_sha256}) == 3
        assert b.kl is None


def test_the_other_image_belongs_to_another_answer(run: Evaluate, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="have the same answer; run the image gate on another"):
        run(tmp_path, suites=[SAME], num_items=1, gate_items=1)


def test_the_gate_needs_images(run: Evaluate, tmp_path: Path) -> None:
    def make_text(index: int, seed: int) -> Item:
        return Item("text", (Message("user", "Which number?"), Message("assistant", "7")))

    with pytest.raises(DataError, match=r"number: the image gate needs images.*--gate 0"):
        run(tmp_path, suites=[replace(NUMBERS, make_item=make_text)], num_items=9, gate_items=1)
    assert not list(tmp_path.iterdir()), "refused before anything was asked"


def test_pruning_needs_a_suite_with_videos(tiny_checkpoint: Path, tmp_path: Path) -> None:
    candidate = Candidate(folder=tiny_checkpoint, out=tmp_path / "run", pruning_rate=0.5)
    with pytest.raises(DataError, match=r"0\.5: the suites number, word have no videos to prune"):
        evaluate([candidate], [NUMBERS, WORDS], Options(num_items=2, gate_items=0))
    assert not (tmp_path / "run").exists()


def test_the_gate_can_be_left_out(run: Evaluate, tmp_path: Path) -> None:
    result = run(tmp_path, suites=[NUMBERS], num_items=3, gate_items=0)
    assert {a.condition for a in result.answers} == {"right"}
    assert collect([result]).runs[0].gate is None


def test_another_seed_asks_other_items(run: Evaluate, whole: RunResult, tmp_path: Path) -> None:
    other = run(tmp_path, suites=[NUMBERS], num_items=3, gate_items=0, seed=1)
    assert not {a.item_sha256 for a in other.answers} & {a.item_sha256 for a in whole.answers}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"suites": []}, "required at least one suite and one checkpoint"),
        ({"num_items": 0}, "--items: required at least 1, got 0"),
        ({"batch_size": 0}, "--batch: required at least 1, got 0"),
        ({"gate_items": 21}, "--gate: required 0 to 20, got 21"),
        ({"num_items": 10**20}, f"has {2**34} items, asked for {10**20}; ask for fewer items"),
        ({"max_num_tiles": 10**20}, f"--max-tiles: required 1 to 1024, got {10**20}"),
        ({"seed": 2**63}, f"--seed: required 0 to {2**63 - 1}, got {2**63}"),
    ],
)
def test_impossible_requests_are_refused_before_anything_is_written(
    run: Evaluate, tmp_path: Path, overrides: dict[str, object], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        run(tmp_path / "run", **overrides)
    assert not (tmp_path / "run").exists()


def test_a_folder_without_a_model_is_named(run: Evaluate, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: not found"):
        run(tmp_path / "run", folder=tmp_path)
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_mixed_with_another(run: Evaluate, whole: RunResult) -> None:
    with pytest.raises(OutputError, match="holds a run with --seed 0, asked for 1"):
        run(whole.out, seed=1)


def test_a_teacher_with_another_vocabulary_is_refused(
    run: Evaluate, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    teacher = make_checkpoint(tmp_path / "teacher", language={"vocab_size": 320})
    with pytest.raises(DataError, match=r"vocab_size differ from .*made from one BF16 model"):
        run(tmp_path / "run", teacher=teacher)
    assert not (tmp_path / "run").exists()


def test_a_quantized_teacher_is_refused(
    run: Evaluate, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    teacher = tmp_path / "fp8"
    shutil.copytree(tiny_checkpoint, teacher)
    (teacher / "hf_quant_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"fp8: is quantized; the teacher must be the BF16"):
        run(tmp_path / "run", teacher=teacher)
    assert not (tmp_path / "run").exists()


def test_a_run_does_not_go_on_with_other_arithmetic(
    run: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"suites": [NUMBERS], "num_items": 2, "gate_items": 0}
    describe = "nvvl.reports.evaluate.describe_arithmetic"
    monkeypatch.setattr(describe, lambda _: {"products": "bfloat16"})
    run(tmp_path, **options)
    monkeypatch.setattr(describe, lambda _: {"products": "float32"})
    with pytest.raises(OutputError, match="run with products bfloat16, asked for float32"):
        run(tmp_path, **options)


def test_a_second_run_does_not_write_beside_the_first(run: Evaluate, tmp_path: Path) -> None:
    options = {"suites": [NUMBERS], "num_items": 2, "gate_items": 0}
    refused: list[str] = []

    def start_another(*_: object) -> None:
        with pytest.raises(OutputError, match="another run is writing there") as caught:
            run(tmp_path / "run", **options)
        refused.append(str(caught.value))

    first = run(tmp_path / "run", progress=start_another, **options)
    assert len(refused) == 1
    assert run(tmp_path / "run", **options) == first


def test_llm_compressor_folder_is_asked_beside_ours(tiny_checkpoint: Path, tmp_path: Path) -> None:
    own, peer = tmp_path / "own", tmp_path / "peer"
    quantize_checkpoint(tiny_checkpoint, own, PRESETS["nvfp4-w4a16"](), None)
    shutil.copytree(tiny_checkpoint, peer, ignore=shutil.ignore_patterns("*.index.json"))
    tensors = load_file(own / "model.safetensors")
    for name in [name for name in tensors if name.endswith(".weight_scale_2")]:
        fqn = name.removesuffix(".weight_scale_2")
        tensors[f"{fqn}.weight_global_scale"] = (1 / tensors.pop(name)).reshape(1)
        tensors[f"{fqn}.weight_packed"] = tensors.pop(f"{fqn}.weight")
    save_file(tensors, peer / "model.safetensors")
    weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    config = json.loads((peer / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "config_groups": {"all": {"targets": ["re:.*mixer.*_proj"], "weights": weights}},
    }
    (peer / "config.json").write_text(json.dumps(config))
    runs = evaluate(
        [Candidate(folder=f, out=tmp_path / f"run-{f.name}", label=f.name) for f in (own, peer)],
        [NUMBERS],
        Options(num_items=20, batch_size=4, gate_items=0),
        teacher=tiny_checkpoint,
    )
    assert [run.format for run in runs] == ["W4A16_NVFP4", "W4A16_NVFP4"]
    for mine, theirs in zip(*(run.answers for run in runs), strict=True):
        assert mine.kl is not None
        assert mine.kl > 0
        # One over one over a scale may be another float32 next to it, and move single roundings.
        assert theirs.nll == pytest.approx(mine.nll, rel=0.01)
    report = collect([run.out for run in runs])
    assert [(run.label, run.format) for run in report.runs] == [
        ("own", "W4A16_NVFP4"),
        ("peer", "W4A16_NVFP4"),
    ]


def test_model_that_computes_nan_is_named(
    run: Evaluate, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "huge"))
    tensors = load_file(folder / "model.safetensors")
    tensors["language_model.lm_head.weight"][7] = 3e38  # finite, and its products are not
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(DataError, match=r"run: item number-0-\d+: nll is nan: the model"):
        run(tmp_path / "run", folder=folder)
