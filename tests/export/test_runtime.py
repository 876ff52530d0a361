"""The runtime around a stand-in for TensorRT: bindings, shapes, states, and what is refused.

The stand-in computes with onnxruntime on the graphs that engines were built from, so what a folder
of engines gives must be exactly what the folder of graphs gives.
"""

import functools
import importlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nvvl.errors import EngineError, HardwareError
from nvvl.export.answer import answer
from nvvl.export.backends import open_backend
from nvvl.export.engine import EngineOptions, build_engines
from nvvl.export.engine_folder import open_engine_folder
from nvvl.export.engine_targets import TENSORRT
from nvvl.export.graph_backend import GraphBackend
from nvvl.export.graph_runner import GraphRunner
from nvvl.export.onnx_export import export_onnx
from nvvl.export.onnx_recipe import GraphRecipe
from nvvl.export.onnx_session import GraphFolder
from nvvl.export.runtime import Engine, EngineRunner
from nvvl.model.hashing import hash_file
from nvvl.model.processor import Message, Processor

pytestmark = pytest.mark.usefixtures("memory_for_engines")

FAKE = Path(__file__).with_name("fake_tensorrt.py")
FIXED = GraphRecipe(dtype="f32", kv_capacity=32, prefill_tokens=16, max_batch=2, max_tiles=3)
RECIPES = {
    "fixed": FIXED,
    "growing": replace(FIXED, kv_cache="growing"),
    "parts": replace(FIXED, num_parts=3),
    "inside": replace(FIXED, token_embedding="inside", kv_capacity=64),  # room for a prompt
}

Folders = Callable[[str], tuple[Path, Path]]


@pytest.fixture(autouse=True)
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the stand-in run on the CPU: one stream, and a graph that launches each time."""
    stream = SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)

    def capture(engine: Engine, tensors: Mapping[str, Tensor]) -> SimpleNamespace:
        return SimpleNamespace(replay=functools.partial(engine._launch, tensors))

    monkeypatch.setattr(Engine, "_capture", capture)


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The stand-in, installed here and for the builder's process."""
    packages = tmp_path_factory.mktemp("packages")
    shutil.copyfile(FAKE, packages / "tensorrt.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(packages))
        patch.syspath_prepend(packages)
        yield importlib.import_module("tensorrt")
        del sys.modules["tensorrt"]


@pytest.fixture(scope="module")
def folders(
    fake: Any, written: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Folders:
    """Return a function that gives FP8 graphs of a recipe, and engines of them."""
    root = tmp_path_factory.mktemp("folders")
    options = EngineOptions(builder=TENSORRT, targets=("sm90",))

    def make(name: str) -> tuple[Path, Path]:
        graphs, engines = root / f"{name}-graphs", root / name
        if not engines.exists():
            export_onnx(written("fp8"), graphs, RECIPES[name])
            build_engines(graphs, engines, options)
        return graphs, engines

    return make


@pytest.fixture
def engines(folders: Folders, tmp_path: Path) -> Path:
    """A folder of engines that a test may break."""
    return Path(shutil.copytree(folders("fixed")[1], tmp_path / "engines"))


def converse(runner: GraphRunner, batch: int) -> list[Tensor]:
    """Prefill in two pieces, decode three tokens; give every logits and the last states."""
    generator = torch.Generator().manual_seed(0)
    hidden, vocab = runner.model["hidden_size"], runner.model["vocab_size"]
    states, position, seen = runner.start(batch), 0, []
    for length in (5, 3, 1, 1, 1):
        ids = torch.randint(20, vocab - 50, (batch, length), generator=generator)
        embeds = torch.randn((batch, length, hidden), generator=generator)
        inputs = runner.token_inputs(ids, None, functools.partial(torch.clone, embeds))
        output = runner.step(inputs, states, position=position)
        states, position = output.states, position + length
        seen.append(output.logits)
    return [*seen, *(states[name].float() for name in sorted(states))]


@pytest.mark.parametrize("name", RECIPES)
def test_engines_give_what_their_graphs_give(folders: Folders, name: str) -> None:
    graphs, engines = folders(name)
    for batch in (1, 2):
        expected = converse(GraphFolder(graphs), batch)
        got = converse(EngineRunner(engines, device="cpu"), batch)
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            assert torch.equal(one, other)


def test_streamed_weights_get_a_budget_before_they_are_needed(
    fake: Any, engines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int | None] = []
    create = fake.Engine.create_execution_context

    def keep(engine: Any) -> Any:
        seen.append(engine.weight_streaming_budget_v2)
        return create(engine)

    monkeypatch.setattr(fake.Engine, "create_execution_context", keep)
    converse(EngineRunner(engines, device="cpu"), 1)
    assert set(seen) == {None}
    monkeypatch.setattr(fake.Engine, "streamable_weights_size", 100)
    seen.clear()
    converse(EngineRunner(engines, device="cpu"), 1)
    assert set(seen) == {50}


def test_engine_that_does_not_fit_the_gpu_is_one_line(
    fake: Any, engines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake.Engine, "create_execution_context", lambda _: None)
    with pytest.raises(EngineError, match=r"\.engine: tensorrt cannot run it: out of GPU memory"):
        converse(EngineRunner(engines, device="cpu"), 1)


def test_an_answer_from_engines_is_that_of_their_graphs(folders: Folders) -> None:
    graphs, engines = folders("inside")
    processor = Processor.from_folder(engines)
    inputs = processor([Message("user", "read")], add_generation_prompt=True)
    runners = (GraphFolder(graphs), EngineRunner(engines, device="cpu"))
    answers = [
        answer(GraphBackend(r), processor.config, inputs, max_new_tokens=6, eos_token_ids=())
        for r in runners
    ]
    assert len(answers[0].ids) == 6
    assert answers[1].ids == answers[0].ids


def test_chat_with_engines_needs_their_gpu(
    folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused = pytest.raises(HardwareError, match="engines run on a GPU")
    with refused, open_backend(folders("fixed")[1], "engine", device="cpu"):
        pass


def test_tiles_are_encoded(folders: Folders) -> None:
    graphs, engines = folders("fixed")
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected, _ = GraphFolder(graphs).encode_images(pixels)
    got, _ = EngineRunner(engines, device="cpu").encode_images(pixels)
    assert torch.equal(got, expected)


def test_decoding_into_a_fixed_cache_is_captured_once(folders: Folders, fake: Any) -> None:
    _, engines = folders("fixed")
    runner = EngineRunner(engines, device="cpu")
    fake.Context.num_launches = 0
    converse(runner, 1)
    assert fake.Context.num_launches == 5
    decode = runner._engines["decode"]
    assert decode._graph is not None
    addresses = {name: tensor.data_ptr() for name, tensor in decode._buffers.items()}
    converse(runner, 1)
    assert {name: t.data_ptr() for name, t in decode._buffers.items()} == addresses


def test_states_of_an_earlier_step_survive_a_replay(folders: Folders) -> None:
    _, engines = folders("fixed")
    runner = EngineRunner(engines, device="cpu")
    embeds = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(1))
    after = runner.step({"inputs_embeds": embeds}, runner.start(1), position=0).states
    before = {name: tensor.clone() for name, tensor in after.items()}
    one = runner.step({"inputs_embeds": embeds[:, :1]}, after, position=4).logits
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    again = runner.step({"inputs_embeds": embeds[:, :1]}, after, position=4).logits
    assert torch.equal(one, again)


@pytest.mark.parametrize(
    ("batch", "tokens", "message"),
    [
        (3, 2, r"prefill\.engine: batch is 3, the engine was built for 1 to 2.*--shape batch"),
        (1, 17, r"prefill\.engine: tokens is 17, the engine was built for 1 to 16"),
    ],
)
def test_shapes_beyond_the_profile_are_refused(
    folders: Folders, batch: int, tokens: int, message: str
) -> None:
    runner = EngineRunner(folders("fixed")[1], device="cpu")
    inputs = {"inputs_embeds": torch.zeros(batch, tokens, 64)}
    with pytest.raises(EngineError, match=message):
        runner.step(inputs, runner.start(batch), position=0)


def test_inputs_that_do_not_fit_together_are_refused(folders: Folders) -> None:
    runner = EngineRunner(folders("fixed")[1], device="cpu")
    wide = {"inputs_embeds": torch.zeros(1, 2, 65)}
    with pytest.raises(EngineError, match=r"inputs_embeds: required .* got \[1, 2, 65\]"):
        runner.step(wide, runner.start(1), position=0)
    two = {"inputs_embeds": torch.zeros(2, 2, 64)}
    with pytest.raises(EngineError, match=r"past_conv\.0: required .*where batch is 2"):
        runner.step(two, runner.start(1), position=0)
    with pytest.raises(EngineError, match="input pixel_values was not given"):
        runner.run_graph("vision", {})


def test_tokens_beyond_the_cache_are_refused(folders: Folders) -> None:
    runner = EngineRunner(folders("fixed")[1], device="cpu")
    with pytest.raises(EngineError, match="33 tokens, but the graphs hold 32"):
        runner.step({"inputs_embeds": torch.zeros(1, 1, 64)}, runner.start(1), position=32)


def rewrite(engines: Path, name: str, text: str) -> None:
    """Change a file and its recorded hash, as if it had been written so."""
    (engines / name).write_text(text)
    manifest = json.loads((engines / "manifest.json").read_text())
    entries = [entry for entry in manifest["engines"].values() if entry["file"] == name]
    for entry in entries:
        entry["sha256"] = hash_file(engines / name)
    if not entries:
        manifest["files"][name] = hash_file(engines / name)
    (engines / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "pixels"}, "pixel_values: not in io.json; pixels: not in the engine"),
        ({"dtype": "bf16"}, "pixel_values: FLOAT in the engine, bf16 in io.json"),
        ({"shape": ["tiles", 3, 64, 64]}, r"pixel_values: \[-1, 3, 32, 32\] in the engine"),
    ],
)
def test_engine_that_is_not_what_io_json_says_is_refused(
    engines: Path, change: dict[str, Any], message: str
) -> None:
    io = json.loads((engines / "io.json").read_text())
    io["graphs"]["vision"]["inputs"][0] |= change
    rewrite(engines, "io.json", json.dumps(io))
    runner = EngineRunner(engines, device="cpu")
    with pytest.raises(EngineError, match=f"{message}.*build the engines again"):
        runner.encode_images(torch.zeros(1, 3, 32, 32))


def test_engine_of_another_gpu_is_refused(engines: Path) -> None:
    rewrite(engines, "vision.engine", "not of this machine")
    runner = EngineRunner(engines, device="cpu")
    with pytest.raises(EngineError, match=r"tensorrt 11\.4\.0\.fake does not take this engine"):
        runner.encode_images(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("name", ["decode.engine", "io.json", "embedding.safetensors"])
def test_changed_or_lost_file_is_refused(engines: Path, name: str) -> None:
    data = bytearray((engines / name).read_bytes())
    data[len(data) // 2] ^= 1
    (engines / name).write_bytes(data)
    with pytest.raises(EngineError, match=f"{name}: changed or lost since the engines were built"):
        open_engine_folder(engines)
    (engines / name).unlink()
    with pytest.raises(EngineError, match=f"{name}: changed or lost since the engines were built"):
        open_engine_folder(engines)


def test_folder_of_graphs_is_not_one_of_engines(folders: Folders, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"manifest\.json: not a manifest of engines"):
        open_engine_folder(folders("fixed")[0])
    with pytest.raises(EngineError, match=r"manifest\.json: cannot be read"):
        open_engine_folder(tmp_path)


def test_machine_without_gpu_is_told_what_to_do(
    engines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(HardwareError, match=r"engines run on a GPU.*nvvl chat --backend onnx"):
        EngineRunner(engines)


def test_missing_library_names_the_extra(engines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(HardwareError, match=r"need tensorrt .*pip install 'nvvl\[tensorrt\]'"):
        EngineRunner(engines, device="cpu")
