"""The model that lmms-eval finds by the name nvvl, against a stand-in of lmms-eval's interface.

lmms-eval cannot be a dependency here: it needs torchvision. The stand-in has what version 0.7.3
asks of a model: an abstract base class, requests with six arguments, a manifest naming the class.
"""

import abc
import importlib
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from nvvl.errors import DataError
from nvvl.model.generate import generate
from nvvl.model.load import load_model
from nvvl.model.processor import Processor, collate
from nvvl.model.prompt import Message

NAMES = ["lmms_eval", "lmms_eval.api", "lmms_eval.api.model", "lmms_eval.models"]
REGISTRY = "lmms_eval.models.registry_v2"


class StandIn(abc.ABC):
    """lmms_eval.api.model.lmms, as far as a model sees it."""

    is_simple = True

    def __init__(self) -> None:
        self.cached: list[tuple[str, Any, Any]] = []
        self.cache_hook = SimpleNamespace(add_partial=lambda *entry: self.cached.append(entry))
        self.task_dict: dict[str, Any] = {}

    @abc.abstractmethod
    def loglikelihood(self, requests: Any) -> Any: ...

    @abc.abstractmethod
    def generate_until(self, requests: Any) -> Any: ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests: Any) -> Any: ...


@dataclass(frozen=True)
class Manifest:
    model_id: str
    simple_class_path: str | None = None


@pytest.fixture
def lmms_model(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    for name in [*NAMES, REGISTRY]:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["lmms_eval.api.model"].lmms = StandIn  # type: ignore[attr-defined]
    sys.modules[REGISTRY].ModelManifest = Manifest  # type: ignore[attr-defined]
    yield importlib.import_module("nvvl.reports.lmms_model")
    sys.modules.pop("nvvl.reports.lmms_model")


@pytest.fixture
def model(lmms_model: ModuleType, tiny_checkpoint: Path) -> Any:
    made = lmms_model.NvvlModel(str(tiny_checkpoint), batch_size="2", device="cpu", dtype="float32")
    images = [Image.new("RGB", (32 + 40 * n, 32), (60 * n, 90, 20)) for n in range(4)]
    made.task_dict["task"] = {"test": [[], [images[0]], [[images[1], images[2]]], images[3]]}
    return made


def ask(context: str, doc_id: int, **settings: Any) -> Any:
    values = {"max_new_tokens": 6, "do_sample": False, "temperature": 0, "num_beams": 1} | settings
    return SimpleNamespace(args=(context, values, lambda doc: doc, doc_id, "task", "test"))


def write(source: Path, text: str, images: list[Image.Image]) -> str:
    model, processor = load_model(source, dtype=torch.float32), Processor.from_folder(source)
    inputs = processor([Message("user", text)], images=images, add_generation_prompt=True)
    (ids,) = generate(model, collate([inputs], 0), eos_token_id=12, max_new_tokens=6)
    return processor.decode(ids).strip()


def test_answers_are_those_of_the_model_asked_one_by_one(model: Any, tiny_checkpoint: Path) -> None:
    docs = model.task_dict["task"]["test"]
    requests = [ask(f"the thing {doc}", doc) for doc in range(4)]
    found = model.generate_until(requests)
    expected = [
        write(tiny_checkpoint, "the thing 0", []),
        write(tiny_checkpoint, "<image>\nthe thing 1", docs[1]),
        write(tiny_checkpoint, "<image>\n<image>\nthe thing 2", docs[2][0]),
        write(tiny_checkpoint, "<image>\nthe thing 3", [docs[3]]),
    ]
    assert found == expected
    assert len(set(found)) > 1
    kinds = {kind for kind, _, _ in model.cached}
    assert kinds == {"generate_until"}
    assert sorted(text for _, _, text in model.cached) == sorted(expected)


def test_pictures_are_opened_a_batch_at_a_time(model: Any) -> None:
    events: list[Any] = []

    class Documents(list[Any]):
        def __getitem__(self, place: Any) -> Any:
            events.append(place)
            return super().__getitem__(place)

    model.task_dict["task"]["test"] = Documents(model.task_dict["task"]["test"])
    model.cache_hook = SimpleNamespace(add_partial=lambda *_: events.append("answer"))
    requests = [ask("the" * (1 + doc), doc) for doc in range(4)]
    found = model.generate_until(requests)
    assert events == [3, 2, "answer", "answer", 1, 0, "answer", "answer"]
    assert found == [model.generate_until([request])[0] for request in requests]


def test_text_may_say_where_images_stand(model: Any, tiny_checkpoint: Path) -> None:
    text = "in <image> the <image>"
    (found,) = model.generate_until([ask(text, 2)])
    assert found == write(tiny_checkpoint, text, model.task_dict["task"]["test"][2][0])


def test_text_that_names_a_picture_twice_has_each_once(model: Any, tiny_checkpoint: Path) -> None:
    (found,) = model.generate_until([ask("in <image> the <image> <image>", 2)])
    expected = "<image>\n<image>\nin  the  "
    assert found == write(tiny_checkpoint, expected, model.task_dict["task"]["test"][2][0])


def test_answer_ends_before_a_stop_string(model: Any) -> None:
    (whole,) = model.generate_until([ask("the", 1)])
    (found,) = model.generate_until([ask("the", 1, until=[whole[2]])])
    assert found == whole.split(whole[2])[0].strip()


@pytest.mark.parametrize(
    "settings", [{"do_sample": True, "temperature": 0.5}, {"num_beams": 3}], ids=str
)
def test_sampling_and_search_are_refused(settings: dict[str, Any], model: Any) -> None:
    with pytest.raises(DataError, match="nvvl measures greedy answers"):
        model.generate_until([ask("the", 1, **settings)])


def test_what_is_not_served_is_refused(
    model: Any, lmms_model: ModuleType, tiny_checkpoint: Path
) -> None:
    with pytest.raises(DataError, match="scores given answers"):
        model.loglikelihood([])
    with pytest.raises(DataError, match="several rounds"):
        model.generate_until_multi_round([])
    model.task_dict["task"]["test"].append(3.5)
    with pytest.raises(DataError, match="task gives a float; required images, or paths of videos"):
        model.generate_until([ask("the", 4)])
    make: Callable[..., Any] = lmms_model.NvvlModel
    for wrong in ({"dtype": "int8"}, {"batch_size": "auto"}, {"max_batch_size": 4}):
        with pytest.raises(DataError, match="required dtype of bfloat16"):
            make(str(tiny_checkpoint), **wrong)


def test_entry_point_names_the_class(lmms_model: ModuleType) -> None:
    root = Path(__file__).resolve().parents[2]
    points = tomllib.loads((root / "pyproject.toml").read_text())["project"]["entry-points"]
    module, _, function = points["lmms_eval.models"]["nvvl"].partition(":")
    assert module == lmms_model.__name__
    manifest = getattr(lmms_model, function)()
    assert (manifest.model_id, manifest.simple_class_path) == ("nvvl", f"{module}.NvvlModel")
