"""A tiny NVFP4 run, its teacher, and items with answers."""

import json
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nvvl.calib_data.items import Item
from nvvl.calib_data.manifest import CalibrationSet
from nvvl.distill.recipe import DistillRecipe
from nvvl.model.load import load_model
from nvvl.model.processes import Processes
from nvvl.model.prompt import Message
from nvvl.model.vlm import NemotronNanoVL
from nvvl.quantize.presets import PRESETS
from nvvl.quantize.walk import quantize_checkpoint


def make_item(index: int) -> Item:
    """Text of several lengths; every third item has an image."""
    question = "the thing in " * (1 + index % 4)
    images: tuple[Image.Image, ...] = ()
    if index % 3 == 0:
        pixels = np.random.default_rng(index).integers(0, 256, (32, 40, 3), dtype=np.uint8)
        images = (Image.fromarray(pixels),)
        question = f"<image>\n{question}"
    messages = (Message("user", question), Message("assistant", f"answer {index * 7919}"))
    return Item(item_id=f"item {index}", messages=messages, images=images)


@pytest.fixture(scope="session")
def items() -> CalibrationSet:
    made = tuple(make_item(index) for index in range(14))
    return CalibrationSet(items=made, spec="test", num_requested=len(made))


@pytest.fixture(scope="session")
def item_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine pictures with answers, as a user has them."""
    folder = tmp_path_factory.mktemp("items")
    lines = []
    for index in range(9):
        Image.new("RGB", (32, 32), (25 * index, 0, 0)).save(folder / f"{index}.png")
        messages = [
            {"role": "user", "content": "<image>\n" + "the thing " * (1 + index % 4)},
            {"role": "assistant", "content": f"answer {index}"},
        ]
        lines.append(json.dumps({"image": f"{index}.png", "messages": messages}))
    (folder / "items.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="session")
def run(
    tiny_checkpoint: Path, items: CalibrationSet, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny model as NVFP4; tests must not change it."""
    out = tmp_path_factory.mktemp("run") / "nvfp4"
    quantize_checkpoint(tiny_checkpoint, out, PRESETS["nvfp4"](), items)
    return out


@pytest.fixture
def teacher(tiny_checkpoint: Path) -> NemotronNanoVL:
    return load_model(tiny_checkpoint)


@pytest.fixture(scope="session")
def recipe() -> DistillRecipe:
    return DistillRecipe(
        name="test",
        learning_rate=1e-3,
        safe_learning_rate=1.0,
        num_steps=20,
        items_per_step=3,
        tokens_per_batch=160,
        num_validation_items=4,
        validate_every=5,
    )


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of storages made inside the mode and still alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._users: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self._add(tensor, known)
        return out

    def _add(self, tensor: Tensor, known: set[int]) -> None:
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key in known and key not in self._users:
            return  # an input of the computation, or a view of one
        if key not in self._users:
            self._users[key] = 0
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
        self._users[key] += 1
        weakref.finalize(tensor, self._drop, key, storage.nbytes())

    def _drop(self, key: int, size: int) -> None:
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key]
            self.now -= size


@pytest.fixture(scope="session")
def live_memory() -> type[LiveMemory]:
    """Return a context that counts the bytes made in it."""
    return LiveMemory


class ThreadProcess(Processes):
    """One of two threads that stand for processes; real ones are in test_processes.py."""

    def __init__(self, index: int, rows: list[Tensor], meet: Barrier) -> None:
        super().__init__("cpu", join=False)
        self.index, self.count = index, 2
        self._rows = rows
        self._meet = meet

    def sum(self, value: Tensor) -> Tensor:
        return self._stack(value).sum(0)

    def _stack(self, value: Tensor) -> Tensor:
        self._rows[self.index] = value.clone()
        self._meet.wait()
        stacked = torch.stack(self._rows)
        self._meet.wait()
        return stacked


@pytest.fixture
def in_two_processes() -> Callable[[Callable[[Processes], Any]], list[Any]]:
    """Return what runs a function as two processes, and gives what each returned or raised."""

    def run(work: Callable[[Processes], Any]) -> list[Any]:
        rows, meet = [torch.empty(0)] * 2, Barrier(2, timeout=600)
        with ThreadPoolExecutor(2) as pool:
            futures = [pool.submit(work, ThreadProcess(index, rows, meet)) for index in range(2)]
        return [future.exception() or future.result() for future in futures]

    return run
