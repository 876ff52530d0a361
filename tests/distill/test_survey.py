"""What is noticed of a set before anything is trained: faulty items, and every change."""

import dataclasses
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, overload

import pytest
from PIL import Image

from nvvl.calib_data.items import Item
from nvvl.calib_data.manifest import CalibrationSet, LazyItems, load_calibration_set
from nvvl.calib_data.sources import failing_source
from nvvl.distill.data import DistillData
from nvvl.distill.execution import Execution
from nvvl.distill.precompute import precompute_logits
from nvvl.distill.recipe import DistillRecipe
from nvvl.distill.survey import STAGE, survey_set
from nvvl.distill.train import distill
from nvvl.errors import DataError, OutputError, ReportedError
from nvvl.model.processes import Processes
from nvvl.model.prompt import Message


def digest(spec: Path) -> str | None:
    return survey_set(load_calibration_set(spec, num_items=9), lambda _: None).sha256


@pytest.fixture
def folder(item_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(item_folder, tmp_path / "items"))


def edit_list(folder: Path) -> None:
    path = folder / "items.jsonl"
    path.write_text(path.read_text().replace("answer 3", "answer 4"))


def edit_picture(folder: Path) -> None:
    path = folder / "5.png"
    size = path.stat().st_size
    Image.new("RGB", (32, 32), (126, 0, 0)).save(path)  # one level brighter, as many bytes
    assert path.stat().st_size == size


@pytest.mark.parametrize("edit", [edit_list, edit_picture])
@pytest.mark.parametrize("spec", [".", "items.jsonl"])
def test_changed_set_has_another_digest(
    edit: Callable[[Path], None], spec: str, folder: Path
) -> None:
    before = digest(folder / spec)
    assert digest(folder / spec) == before
    edit(folder)
    assert digest(folder / spec) != before


def test_item_may_have_a_name_that_is_no_utf8(items: CalibrationSet) -> None:
    named = dataclasses.replace(items.items[1], item_id=os.fsdecode(b"menu\xe9.png"))
    sets = [dataclasses.replace(items, items=(item,)) for item in (named, items.items[1])]
    one, other = (survey_set(of, lambda _: None).sha256 for of in sets)
    assert one != other


def test_digest_is_the_one_that_states_on_disk_have(item_folder: Path) -> None:
    golden = "26db9a6e56b21ef9840dd21cbfe77488238bf479478231d11837abf50b6cef76"
    assert digest(item_folder) == golden


def from_set(
    items: CalibrationSet, model: Path, recipe: DistillRecipe, processes: Processes | None = None
) -> DistillData:
    return DistillData.from_set(items, model, recipe, seed=0, processes=processes)


class CountedItems(Sequence[Item]):
    """Items that count how often each is read."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.reads: Counter[int] = Counter()
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | Sequence[Item]:
        assert isinstance(index, int)
        self.reads[index] += 1
        return self._items[index]


InTwo = Callable[[Callable[[Processes], Any]], list[Any]]


@pytest.mark.parametrize("spec", ["test", "default"])
def test_two_processes_read_each_item_once_and_find_what_one_does(
    spec: str,
    items: CalibrationSet,
    tiny_checkpoint: Path,
    recipe: DistillRecipe,
    in_two_processes: InTwo,
) -> None:
    latin = dataclasses.replace(items.items[1], item_id=os.fsdecode(b"menu\xe9.png"))
    mute = say("mute", "<image>\nthe")
    mute = dataclasses.replace(mute, images=items.items[0].images)  # one group with that item
    every = (*items.items, latin, mute)
    alone = from_set(dataclasses.replace(items, items=every, spec=spec), tiny_checkpoint, recipe)
    counted = CountedItems(every)
    shared = dataclasses.replace(items, items=counted, spec=spec)
    both = in_two_processes(lambda one: from_set(shared, tiny_checkpoint, recipe, one))
    expected = range(len(every)) if spec == "test" else alone.validation
    assert counted.reads == Counter(expected)
    for data in both:
        assert data.sha256 == alone.sha256
        assert data.num_answers == alone.num_answers == (15 if spec == "test" else 16)
        assert (data.training, data.validation) == (alone.training, alone.validation)


def test_faulty_items_of_all_processes_are_named_together(
    items: CalibrationSet, tiny_checkpoint: Path, recipe: DistillRecipe, in_two_processes: InTwo
) -> None:
    faulty = [say(f"odd {i}", "the <SPECIAL_12>", "thing") for i in range(3)]
    spoilt = dataclasses.replace(items, items=(*items.items, *faulty))
    main, other = in_two_processes(lambda one: from_set(spoilt, tiny_checkpoint, recipe, one))
    with pytest.raises(DataError) as alone:
        from_set(spoilt, tiny_checkpoint, recipe)
    assert isinstance(main, DataError)
    assert isinstance(other, ReportedError)
    assert str(main) == str(other) == str(alone.value)
    assert str(main).count("item odd") == 3


def test_progress_shows_the_pass_over_the_items_before_the_first_step(
    run: Path, tiny_checkpoint: Path, items: CalibrationSet, recipe: DistillRecipe, tmp_path: Path
) -> None:
    seen: list[tuple[str, int, int]] = []
    execution = Execution(progress=lambda *said: seen.append(said))
    short = dataclasses.replace(recipe, num_steps=1)
    distill(run, tiny_checkpoint, tmp_path / "out", short, items, execution=execution)
    assert seen[:-1] == [(STAGE, index + 1, 14) for index in range(14)]
    assert seen[-1][1:] == (1, 1)


def test_progress_of_two_processes_is_that_of_all_items_and_of_the_main_one_alone(
    items: CalibrationSet, in_two_processes: InTwo
) -> None:
    odd = dataclasses.replace(items, items=items.items[:5])
    seen: list[tuple[str, int, int]] = []
    in_two_processes(
        lambda one: survey_set(
            odd, lambda _: None, processes=one, progress=lambda *said: seen.append(said)
        )
    )
    assert seen == [(STAGE, done, 5) for done in (2, 4, 5)]


def test_generated_items_are_told_by_those_held_out(
    items: CalibrationSet, tiny_checkpoint: Path, recipe: DistillRecipe
) -> None:
    default = dataclasses.replace(items, spec="default")
    reordered = dataclasses.replace(default, items=items.items[::-1])
    one, other = (from_set(of, tiny_checkpoint, recipe).sha256 for of in (default, reordered))
    assert one != other


def say(item_id: str, *contents: str) -> Item:
    turns = tuple(
        Message("assistant" if i % 2 else "user", text) for i, text in enumerate(contents)
    )
    return Item(item_id=item_id, messages=turns)


def test_faulty_items_are_named_together_before_anything_is_trained(
    items: CalibrationSet, tiny_checkpoint: Path, recipe: DistillRecipe
) -> None:
    faulty = [say(f"odd {i}", "the <SPECIAL_12>", "thing") for i in range(6)]
    spoilt = dataclasses.replace(items, items=(*items.items, *faulty, say("mute", "the")))
    with pytest.raises(DataError) as caught:
        from_set(spoilt, tiny_checkpoint, dataclasses.replace(recipe, loss_tokens="answers"))
    lines = str(caught.value).split("\n")
    assert lines[0] == "test: 7 of 21 items cannot be used:"
    assert [line.split(":")[0] for line in lines[1:6]] == [f"item odd {i}" for i in range(5)]
    assert lines[6] == "and 2 more"
    alone = dataclasses.replace(items, items=(*items.items, faulty[0]))
    with pytest.raises(DataError, match=r"^item odd 0: "):
        from_set(alone, tiny_checkpoint, recipe)


def test_unreadable_items_are_met_before_the_teacher_runs(
    tiny_checkpoint: Path, recipe: DistillRecipe, tmp_path: Path
) -> None:
    sources = [failing_source(str(i), DataError(f"{i} is gone")) for i in range(14)]
    broken = CalibrationSet(LazyItems(sources), "folder", 14)
    with pytest.raises(DataError, match="14 of 14 items cannot be used"):
        precompute_logits(tiny_checkpoint, broken, recipe, tmp_path / "logits")


def test_pictures_without_answers_are_refused(
    run: Path, tiny_checkpoint: Path, recipe: DistillRecipe, tmp_path: Path
) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for index in range(9):
        Image.new("RGB", (32, 32), (25 * index, 0, 0)).save(pictures / f"{index}.png")
    items = load_calibration_set(pictures, num_items=9)
    with pytest.raises(DataError, match="required items with an answer, got pictures"):
        distill(run, tiny_checkpoint, tmp_path / "out", recipe, items)
    assert not (tmp_path / "out").exists()


def test_set_is_not_replaced_by_what_is_made_of_it(
    tiny_checkpoint: Path, recipe: DistillRecipe, folder: Path
) -> None:
    (folder / "manifest.json").write_text(json.dumps({"nvvl_version": "an output before"}))
    items = load_calibration_set(folder / "items.jsonl", num_items=9)
    with pytest.raises(OutputError, match=r"holds .*items\.jsonl, which is read"):
        precompute_logits(tiny_checkpoint, items, recipe, folder, overwrite=True)
    assert (folder / "5.png").exists()
