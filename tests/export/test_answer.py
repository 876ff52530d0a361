"""One question, several backends: the same tokens from each.

Compared in float32 and without quantized inputs, where nothing can lie on the edge of a step; what
quantized formats do with such edges is proved in test_onnx_parity.py.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from nvvl.cli import app
from nvvl.errors import EngineError, HardwareError
from nvvl.export import onnx_extra
from nvvl.export.answer import Answer, TorchBackend, answer
from nvvl.export.backends import BackendName, open_backend
from nvvl.export.graph_backend import GraphBackend
from nvvl.export.onnx_backend import open_graphs
from nvvl.export.onnx_export import export_onnx
from nvvl.export.onnx_recipe import GraphRecipe
from nvvl.export.onnx_session import GraphFolder
from nvvl.model.generate import Sampling, ThinkingBudget, generate
from nvvl.model.load import load_model
from nvvl.model.processor import Message, ModelInputs, Processor, Video, collate
from nvvl.model.vlm import NemotronNanoVL

NUM_TOKENS = 64


def pictures(count: int) -> list[Image.Image]:
    return [
        Image.frombytes("RGB", (48, 32), bytes((i * (k + 1)) % 256 for i in range(4608)))
        for k in range(count)
    ]


def ask(
    processor: Processor, *, images: Sequence[Image.Image] = (), videos: Sequence[Video] = ()
) -> ModelInputs:
    text = "<image>\n" * len(images) + "<video>\n" * len(videos) + "read the text"
    return processor(
        [Message("user", text)], images=images, videos=videos, add_generation_prompt=True
    )


@pytest.fixture(scope="module")
def processor(source: Path) -> Processor:
    return Processor.from_folder(source)


@pytest.fixture(scope="module")
def model(source: Path) -> NemotronNanoVL:
    return load_model(source, dtype=torch.float32)


@pytest.fixture(scope="module")
def prompts(processor: Processor) -> dict[str, ModelInputs]:
    clip = Video(pictures(4), fps=2.0, frame_indices=(0, 1, 2, 3))
    return {
        "text": ask(processor),
        "images": ask(processor, images=pictures(2)),
        "image and video": ask(processor, images=pictures(1), videos=[clip]),
    }


def run(backend: Any, processor: Processor, inputs: ModelInputs, **options: Any) -> Answer:
    return answer(
        backend,
        processor.config,
        inputs,
        max_new_tokens=NUM_TOKENS,
        eos_token_ids=(),
        **options,
    )


@pytest.mark.parametrize("prompt", ["text", "images", "image and video"])
def test_torch_answers_as_generate_does(
    processor: Processor, model: NemotronNanoVL, prompts: dict[str, ModelInputs], prompt: str
) -> None:
    result = run(TorchBackend(model), processor, prompts[prompt])
    batch = collate([prompts[prompt]], 0)
    (wanted,) = generate(model, batch, eos_token_id=(), max_new_tokens=NUM_TOKENS)
    assert result.ids == wanted
    assert result.prompt_tokens == len(prompts[prompt].input_ids)
    assert result.tokens_per_s > 0


@pytest.mark.parametrize("tokens", [None, 0, 9])
def test_sampled_and_cut_short_as_generate_does(
    processor: Processor, model: NemotronNanoVL, tokens: int | None
) -> None:
    message = Message("user", "<image>\nread the text")
    inputs = processor(
        [message], images=pictures(1), add_generation_prompt=True, reasoning=tokens is not None
    )
    budget = None
    if tokens is not None:
        budget = ThinkingBudget.from_tokenizer(processor.tokenizer, tokens=tokens, grace=3)
    options: dict[str, Any] = {
        "sampling": Sampling(temperature=0.8, top_p=0.9, seed=5),
        "thinking_budget": budget,
    }
    result = run(TorchBackend(model), processor, inputs, **options)
    batch = collate([inputs], 0)
    (wanted,) = generate(model, batch, eos_token_id=(), max_new_tokens=NUM_TOKENS, **options)
    assert result.ids == wanted
    text = processor.tokenizer.decode(wanted, skip_special_tokens=False)
    assert ("</think>" in text) == (tokens is not None)
    assert result.ids != run(TorchBackend(model), processor, inputs).ids


@pytest.mark.parametrize(
    "recipe",
    [
        {"prefill_tokens": 7, "max_tiles": 2},  # prompts are cut into pieces, tiles into groups
        {"kv_cache": "growing", "token_embedding": "inside", "prefill_tokens": 9},
        {"dtype": "f32"},
    ],
    ids=str,
)
def test_graphs_give_the_answers_of_torch(
    source: Path,
    processor: Processor,
    model: NemotronNanoVL,
    prompts: dict[str, ModelInputs],
    tmp_path: Path,
    recipe: dict[str, Any],
) -> None:
    values = {"kv_capacity": 512, "prefill_tokens": 128} | recipe
    export_onnx(source, tmp_path / "graphs", GraphRecipe.from_dict(values))
    graphs = GraphFolder(tmp_path / "graphs")
    for rate in (0.0, 0.6):
        for inputs in prompts.values():
            theirs = run(GraphBackend(graphs), processor, inputs, pruning_rate=rate)
            ours = run(TorchBackend(model), processor, inputs, pruning_rate=rate)
            assert theirs.ids == ours.ids
            assert theirs.prompt_tokens == ours.prompt_tokens
            assert len(theirs.ids) == NUM_TOKENS


def test_evs_drops_the_tokens_that_repeat(
    processor: Processor, model: NemotronNanoVL, prompts: dict[str, ModelInputs]
) -> None:
    inputs = prompts["image and video"]
    pruned = run(TorchBackend(model), processor, inputs, pruning_rate=0.5)
    half_of_four_frames = 2 * processor.config.tokens_per_tile
    assert pruned.prompt_tokens == len(inputs.input_ids) - half_of_four_frames


def test_answer_ends_at_the_stop_token_and_streams(
    processor: Processor, model: NemotronNanoVL, prompts: dict[str, ModelInputs]
) -> None:
    whole = run(TorchBackend(model), processor, prompts["text"]).ids
    place = next(i for i, token in enumerate(whole) if token not in whole[:i] and i > 2)
    seen: list[list[int]] = []
    cut = answer(
        TorchBackend(model),
        processor.config,
        prompts["text"],
        max_new_tokens=NUM_TOKENS,
        eos_token_ids=(whole[place],),
        on_token=lambda ids: seen.append(list(ids)),
    )
    assert cut.ids == whole[:place]
    assert seen == [whole[: i + 1] for i in range(place)]


def test_answer_beyond_a_fixed_cache_is_refused(
    source: Path, processor: Processor, prompts: dict[str, ModelInputs], tmp_path: Path
) -> None:
    capacity = len(prompts["text"].input_ids) + 5
    recipe = GraphRecipe(kv_capacity=capacity, prefill_tokens=capacity)
    export_onnx(source, tmp_path / "graphs", recipe)
    backend = GraphBackend(GraphFolder(tmp_path / "graphs"))
    with pytest.raises(EngineError, match=rf"{capacity + 1} tokens, but the graphs hold"):
        run(backend, processor, prompts["text"])


def test_checkpoint_is_turned_into_graphs_for_the_time_being(source: Path) -> None:
    with open_graphs(source) as graphs:
        folder = graphs.folder
        assert graphs.model["dtype"] == "f32"
        assert folder.is_dir()
    assert not folder.exists()


def test_changed_graphs_are_refused(source: Path, tmp_path: Path) -> None:
    dest = tmp_path / "graphs"
    export_onnx(source, dest, GraphRecipe(kv_capacity=64, prefill_tokens=32))
    with (dest / "decode.onnx").open("ab") as file:
        file.write(b"\0")
    refused = pytest.raises(EngineError, match=r"decode\.onnx: bytes changed")
    with refused, open_graphs(dest):
        pass


def test_folder_that_is_neither_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(EngineError, match="required a checkpoint, or graphs"),
        open_graphs(tmp_path),
    ):
        pass


def test_missing_extra_is_named(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_extra, "find_spec", lambda name: None if "run" in name else name)
    refused = pytest.raises(HardwareError, match=r"need onnxruntime, .*pip install 'nvvl\[onnx\]'")
    with refused, open_backend(source, "onnx", device="cpu"):
        pass


@pytest.mark.parametrize(
    ("file", "kind", "meant"),
    [
        ("prefill.engine", "engines", "engine"),
        ("prefill.onnx", "ONNX graphs", "onnx"),
        ("model.safetensors", "a checkpoint", "torch"),
    ],
)
def test_folder_that_another_backend_runs_is_refused(
    file: str, kind: str, meant: str, tmp_path: Path
) -> None:
    (tmp_path / file).touch()
    backends: tuple[BackendName, ...] = ("torch", "engine", "onnx")
    for backend in backends:
        if backend == meant or (backend, meant) == ("onnx", "torch"):
            continue
        refused = pytest.raises(EngineError, match=rf": holds {kind}; pass --backend {meant}$")
        with refused, open_backend(tmp_path, backend, device="cpu"):
            pass


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_chat_answers_from_a_checkpoint_and_from_its_graphs_alike(
    source: Path, tmp_path: Path
) -> None:
    image = tmp_path / "page.png"
    pictures(1)[0].save(image)
    dest = tmp_path / "graphs"
    exported = invoke("export", "onnx", source, dest, "--json")
    assert exported.exit_code == 0, exported.output
    assert json.loads(exported.stdout)["files"].keys() >= {"prefill.onnx", "vision.data"}
    question = ("read the text", "--image", image, "--max-new-tokens", "6")
    results = [
        invoke("chat", folder, *question, "--backend", backend, "--json")
        for folder, backend in ((source, "torch"), (source, "onnx"), (dest, "onnx"))
    ]
    assert [result.exit_code for result in results] == [0, 0, 0]
    values = [json.loads(result.stdout) for result in results]
    assert values[1]["answer"] == values[2]["answer"]  # both in float32; torch runs in BF16
    assert [value["backend"] for value in values] == [
        "torch, cpu",
        "bf16 on onnxruntime",
        "bf16 on onnxruntime",
    ]
    streamed = invoke("chat", dest, *question, "--backend", "onnx")
    assert streamed.stdout == values[1]["answer"] + "\n"
    assert "tokens/s" in streamed.stderr


def test_pruning_without_a_video_is_refused(source: Path, tmp_path: Path) -> None:
    image = tmp_path / "page.png"
    pictures(1)[0].save(image)
    result = invoke("chat", source, "read", "--image", image, "--pruning-rate", "0.9")
    assert result.exit_code == 2
    assert "--pruning-rate 0.9: drops tokens of videos, and there is none" in result.stderr


def test_images_that_no_graph_is_calibrated_on_are_refused(source: Path, tmp_path: Path) -> None:
    result = invoke("export", "onnx", source, tmp_path / "graphs", "--calib", "my-images")
    assert result.exit_code == 2
    assert "--calib my-images: only an FP8 vision graph finds scales" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_foreign_verify_fails_in_one_line(
    written: Callable[[str], Path], source: Path, tmp_path: Path
) -> None:
    dest = tmp_path / "graphs"
    export_onnx(source, dest, GraphRecipe(kv_capacity=64, prefill_tokens=32))
    result = invoke("verify", written("fp8"), "--no-logits", "--onnx", dest)
    assert result.exit_code == 1
    assert "failed: O1" in result.stdout
    assert "is not the checkpoint that the graphs were made from" in result.stdout
