import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from nvvl.calib_data.items import Item
from nvvl.errors import DataError, OutputError
from nvvl.model.load import load_model
from nvvl.model.processor import Message, Processor, Video
from nvvl.model.vlm import NemotronNanoVL
from nvvl.reports.curves import (
    Sweep,
    load_curves,
    load_sweep,
    require_replaceable,
    write_curves,
)
from nvvl.reports.evaluate import Options
from nvvl.reports.question import encode_questions, prepare_question, prune_videos
from nvvl.reports.suites import Suite
from nvvl.reports.sweep import run_sweep
from nvvl.reports.sweep_text import sweep_table
from nvvl.reports.timing import Contender, measure_speed


def make_video(index: int, seed: int) -> Item:
    generator = torch.Generator().manual_seed(100 * seed + index)
    still = torch.randint(256, (3, 32, 32), dtype=torch.uint8, generator=generator)
    frames = []
    for step in range(4):
        pixels = still.clone()
        pixels[:, :16, :16] = 60 * step  # one of four tokens changes
        frames.append(Image.fromarray(pixels.permute(1, 2, 0).numpy()))
    return Item(
        item_id=f"film-{seed}-{index}",
        messages=(Message("user", "<video>\nWhat is it?"), Message("assistant", str(index))),
        videos=(Video(tuple(frames), 2.0, (0, 1, 2, 3)),),
    )


def make_page(index: int, seed: int) -> Item:
    return Item(
        item_id=f"sheet-{seed}-{index}",
        messages=(Message("user", "<image>\nWhat is it?"), Message("assistant", str(index))),
        images=(Image.new("RGB", (64, 64), (index, 80, seed)),),
    )


def make_mixed(index: int, seed: int) -> Item:
    item = make_page(index, seed)
    return item if index % 2 else replace(item, images=(item.images[0].resize((32, 32)),))


FILM = Suite(
    name="film", description="", metric="exact_match", max_new_tokens=3, make_item=make_video
)
SHEET = Suite(
    name="sheet", description="", metric="exact_match", max_new_tokens=3, make_item=make_page
)
OPTIONS = Options(num_items=6, batch_size=3, gate_items=0)


@pytest.fixture(scope="module")
def swept(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Sweep]:
    out = tmp_path_factory.mktemp("sweep")
    sweep = run_sweep(
        "evs",
        {"BF16": tiny_checkpoint},
        out,
        OPTIONS,
        suites=[FILM],
        values=(0.0, 0.5, 0.75),
        teacher=tiny_checkpoint,
        num_timed=2,
        num_new_tokens=3,
    )
    return out, sweep


def test_pruning_keeps_the_first_frame_and_what_changes(tiny_checkpoint: Path) -> None:
    model = load_model(tiny_checkpoint, dtype=torch.float32)
    question = prepare_question(make_video(0, 0), Processor.from_folder(tiny_checkpoint))
    (whole,) = encode_questions(model, [question])
    pruned = prune_videos(question, whole, model.config, 0.5)
    assert len(whole.features) == 16
    assert torch.equal(pruned.features[:4], whole.features[:4])
    rows = [(whole.features == row).all(-1).nonzero().item() for row in pruned.features]
    assert rows == sorted(rows)
    assert {4, 8, 12} <= set(rows), "the first token of each later frame is what changes"
    assert len(rows) == 8
    text = question.prompt.input_ids != model.config.image_token_id
    assert int((pruned.prompt_ids != model.config.image_token_id).sum()) == int(text.sum())
    assert len(pruned.prompt_ids) == len(question.prompt.input_ids) - 8


def test_pruned_prompts_give_the_logits_of_the_shorter_sequence(tiny_checkpoint: Path) -> None:
    model = load_model(tiny_checkpoint, dtype=torch.float32)
    question = prepare_question(make_video(1, 0), Processor.from_folder(tiny_checkpoint))
    (whole,) = encode_questions(model, [question])
    unpruned = prune_videos(question, whole, model.config, 0.0)
    assert torch.equal(unpruned.prompt_ids, whole.prompt_ids)
    assert unpruned.features is whole.features
    with torch.inference_mode():
        embeds = model.embed(whole.prompt_ids[None], whole.features)
        expected = model(question.prompt.input_ids[None], pixel_values=question.prompt.pixel_values)
        torch.testing.assert_close(model(inputs_embeds=embeds).logits, expected.logits)


def test_each_value_has_a_run_and_fewer_tokens(swept: tuple[Path, Sweep]) -> None:
    out, sweep = swept
    assert [point.value for point in sweep.points] == [0.0, 0.5, 0.75]
    assert [point.visual_tokens for point in sweep.points] == [16.0, 8.0, 4.0]
    assert sweep.points[0].difference.estimate == 0.0
    assert sweep.points[0].kl is not None
    assert sweep.points[0].kl.estimate == 0.0, "the teacher itself, shown everything"
    assert sweep.points[2].kl is not None
    assert sweep.points[2].kl.estimate > 0.001, "the teacher is shown everything"
    for value in ("0", "0.5", "0.75"):
        lines = (out / "BF16" / f"evs-{value}" / "answers.jsonl").read_text().splitlines()
        assert len(lines) == 6
    assert sweep == load_sweep(out / "sweep-evs.json")


def test_a_second_sweep_asks_nothing_again(
    swept: tuple[Path, Sweep], tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, sweep = swept
    monkeypatch.delattr("nvvl.reports.evaluate.load_any")
    again = run_sweep(
        "evs",
        {"BF16": tiny_checkpoint},
        out,
        OPTIONS,
        suites=[FILM],
        values=(0.0, 0.5, 0.75),
        teacher=tiny_checkpoint,
        num_timed=2,
        num_new_tokens=3,
    )
    assert [p.score for p in again.points] == [p.score for p in sweep.points]


def test_tiles_are_limited_one_run_a_limit(
    make_checkpoint: Callable[..., Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    other = make_checkpoint(tmp_path / "checkpoint", seed=1)
    sweep = run_sweep(
        "tiles",
        {"A": tiny_checkpoint, "B": other},
        tmp_path / "sweep",
        OPTIONS,
        suites=[SHEET],
        values=(1, 4),
        num_timed=1,
        num_new_tokens=3,
    )
    seen = [(p.label, p.value, p.visual_tokens, p.kl) for p in sweep.points]
    # a page of 2 x 2 tiles, and its thumbnail
    assert seen == [
        ("A", 1, 4.0, None),
        ("A", 4, 20.0, None),
        ("B", 1, 4.0, None),
        ("B", 4, 20.0, None),
    ]


def test_limits_that_change_no_tiles_are_left_out(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = run_sweep(
        "tiles",
        {"A": tiny_checkpoint},
        tmp_path,
        OPTIONS,
        suites=[SHEET, replace(SHEET, name="mixed", make_item=make_mixed)],
        num_timed=1,
        num_new_tokens=3,
    )
    assert [(p.suite, p.value) for p in sweep.points] == [
        *(("sheet", 1), ("sheet", 4)),
        *(("mixed", 1), ("mixed", 4)),
    ]
    assert sorted(path.name for path in (tmp_path / "A").iterdir()) == ["tiles-1", "tiles-4"]
    assert sweep.notes == (
        "most tiles 6, 12: left out, every image has the same tiles as under 4",
        "mixed: 3 of 6 items have the same tiles under every limit",
    )
    assert capsys.readouterr().err.splitlines()[:2] == list(sweep.notes)
    assert str(sweep_table(sweep).caption).startswith("most tiles 6, 12: left out")
    assert load_sweep(tmp_path / "sweep-tiles.json") == sweep


def test_limits_that_are_all_alike_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    message = r"limits that differ, got 4, 6, 12, under which every image has the same tiles of 32"
    with pytest.raises(DataError, match=message):
        run_sweep(
            "tiles", {"A": tiny_checkpoint}, tmp_path, OPTIONS, suites=[SHEET], values=(4, 6, 12)
        )
    assert list(tmp_path.iterdir()) == []


def test_curves_without_notes_are_read(swept: tuple[Path, Sweep], tmp_path: Path) -> None:
    path = swept[0] / "sweep-evs.json"
    values = json.loads(path.read_text())
    assert values.pop("notes") == []
    (tmp_path / "sweep-evs.json").write_text(json.dumps(values))
    assert load_curves(tmp_path) == ([load_sweep(path)], [])


def test_interrupt_while_times_are_taken_says_that_answers_are_kept(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nvvl.reports.sweep.measure_speed", interrupt)
    with pytest.raises(KeyboardInterrupt, match=f"kept in {tmp_path}, and .* goes on from there"):
        run_sweep("tiles", {"A": tiny_checkpoint}, tmp_path, OPTIONS, suites=[SHEET], values=(1,))


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("evs", (1.0,), "required a rate from 0 to below 1, got 1"),
        ("tiles", (0.5,), "required a whole number of tiles from 1 to 1024, as .*, got 0.5"),
        (
            "tiles",
            (float("inf"),),
            "required a whole number of tiles from 1 to 1024, as .*, got inf",
        ),
        (
            "tiles",
            (float("nan"),),
            "required a whole number of tiles from 1 to 1024, as .*, got nan",
        ),
        ("tiles", (1e30,), "required a whole number of tiles from 1 to 1024, as .*, got 1e\\+30"),
        ("evs", (0.5, 0.5), "each value may be given once"),
    ],
)
def test_impossible_values_are_refused(
    kind: str, values: tuple[float, ...], message: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        run_sweep(kind, {"A": tiny_checkpoint}, tmp_path, OPTIONS, suites=[FILM], values=values)  # type: ignore[arg-type]


def test_a_suite_without_videos_has_nothing_to_prune(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the suite sheet has no videos"):
        run_sweep("evs", {"A": tiny_checkpoint}, tmp_path, OPTIONS, suites=[SHEET])


def test_sweeps_of_two_kinds_lie_in_one_folder(swept: tuple[Path, Sweep], tmp_path: Path) -> None:
    evs = swept[1]
    tiles = replace(evs, kind="tiles")
    for curves in (tiles, evs):
        write_curves(curves, tmp_path)
    assert load_curves(tmp_path) == ([evs, tiles], [])
    with pytest.raises(DataError, match=r"no sweep-evs\.json and no sweep-tiles\.json and no d"):
        load_curves(tmp_path / "elsewhere")


def test_curves_of_other_models_or_suites_are_not_replaced_without_a_word(
    swept: tuple[Path, Sweep], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    write_curves(swept[1], tmp_path)
    other = replace(FILM, name="other")
    for label, suite, lost in (("FP8", FILM, "BF16"), ("BF16", other, "film")):
        with pytest.raises(
            OutputError, match=rf"sweep-evs\.json: has curves of {lost}, .*which wou"
        ):
            run_sweep("evs", {label: tiny_checkpoint}, tmp_path, OPTIONS, suites=[suite])
    assert load_curves(tmp_path) == ([swept[1]], [])


@pytest.mark.parametrize(
    ("changes", "lost"),
    [
        ({"values": (0.0, 0.5)}, "curves of --value 0.75, which"),
        ({"values": (0.5, 0.0, 0.75)}, "differences to 0, which"),
        ({"num_items": 5}, "curves with --items 6, asked for 5, which"),
        ({"num_timed": 1}, "curves with --timed 2, asked for 1, which"),
        ({"seed": 1}, "curves with --seed 0, asked for 1, which"),
        ({"dtype": "float32"}, "curves with dtype bfloat16, asked for float32, which"),
    ],
)
def test_curves_of_other_settings_are_not_replaced_without_a_word(
    changes: dict[str, Any], lost: str, swept: tuple[Path, Sweep]
) -> None:
    out, sweep = swept
    plan = sweep.plan
    more: dict[str, Any] = {
        "labels": ("FP8", "BF16"),
        "suites": ("page", "film"),
        "values": (0.0, 0.9, 0.75, 0.5),
    }
    for enough in (plan, replace(plan, **more)):
        require_replaceable(enough, out, overwrite=False)
    with pytest.raises(OutputError, match=rf"sweep-evs\.json: has {lost} would be lost"):
        require_replaceable(replace(plan, **changes), out, overwrite=False)
    require_replaceable(replace(plan, **changes), out, overwrite=True)


def test_curves_need_a_folder(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "sweep-evs.json").mkdir()
    for out, message in (
        (tmp_path / "file", "got a file"),
        (tmp_path, "required a file, got"),
    ):
        with pytest.raises(OutputError, match=message):
            run_sweep("evs", {"A": tiny_checkpoint}, out, OPTIONS, suites=[FILM], overwrite=True)


def test_something_else_is_not_read_as_a_sweep(swept: tuple[Path, Sweep], tmp_path: Path) -> None:
    values = json.loads((swept[0] / "sweep-evs.json").read_text())
    path = tmp_path / "sweep-evs.json"
    others: list[Any] = [{**values, "kind": "other"}, {**values, "points": [{}]}, []]
    for broken in others:
        path.write_text(json.dumps(broken))
        with pytest.raises(DataError, match="required what nvvl sweep has written"):
            load_curves(tmp_path)
    path.write_text("[" * 100_000)
    with pytest.raises(DataError, match="required what nvvl sweep has written"):
        load_curves(tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        load_sweep(tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("visual_tokens", 1e308, r"points\[0\].visual_tokens: required a number"),
        ("value", float("nan"), r"points\[0\].value: required a number"),
        ("label", [1], r"points\[0\].label: required text"),
        ("suite", "other", "required points of the suites that have a metric, film, got points of"),
        (None, None, "required points of the suites that have a metric, film, got points of none"),
    ],
)
def test_points_that_cannot_be_drawn_are_named(
    key: str | None, value: Any, message: str, swept: tuple[Path, Sweep], tmp_path: Path
) -> None:
    values = json.loads((swept[0] / "sweep-evs.json").read_text())
    if key is None:
        values["points"] = []
    else:
        values["points"][0][key] = value
    (tmp_path / "sweep-evs.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match=rf"sweep-evs\.json: .*{message}"):
        load_curves(tmp_path)


def test_speed_counts_every_token_and_waits_for_the_first(tiny_checkpoint: Path) -> None:
    model: NemotronNanoVL = load_model(tiny_checkpoint)
    processor = Processor.from_folder(tiny_checkpoint)
    questions = [prepare_question(make_video(index, 0), processor) for index in range(2)]
    (speed,) = measure_speed([Contender(model, questions, 0.5)], num_rounds=2, num_new_tokens=5)
    assert speed.first_token_ms.n == speed.tokens_per_s.n == 4
    assert 0 < speed.first_token_ms.low <= speed.first_token_ms.median <= speed.first_token_ms.high
    # five tokens take at least as long as the first of them
    assert speed.tokens_per_s.low <= 5 / (speed.first_token_ms.low / 1000)
