"""Training a layer at a time: it helps, it is proved, it goes on, and it needs little memory."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nvvl.calib_data.manifest import CalibrationSet
from nvvl.distill import backbone, block
from nvvl.distill.block import BlockStudent
from nvvl.distill.blockwise import BlockwiseResult, LayerResult, _KeptLayers, distill_blockwise
from nvvl.distill.embed import embed_items
from nvvl.distill.execution import Execution
from nvvl.distill.recipe import DistillRecipe
from nvvl.distill.state import Standing, StateFolder
from nvvl.distill.survey import STAGE
from nvvl.distill.train import distill
from nvvl.distill.train_folder import hold_train_folder
from nvvl.errors import CheckpointError, OutputError, RecipeError
from nvvl.export.verify import verify
from nvvl.model import products
from nvvl.model.checkpoint import Checkpoint
from nvvl.model.config import LanguageConfig
from nvvl.model.load import load_model
from nvvl.model.packing import Packing
from nvvl.model.processor import Processor
from nvvl.model.vlm import Layer
from nvvl.quantize.amaxes import Amax
from nvvl.quantize.load import load_any
from nvvl.quantize.recipe import Format, Recipe, Rule
from nvvl.quantize.walk import quantize_checkpoint

NVVL = Execution(command=["nvvl"])
NUM_LAYERS = 7
LAYER = "language_model.backbone.layers.0"


class Killed(Exception):
    """Stands for a process that ends in the middle of a run."""


@pytest.fixture(scope="module")
def recipe() -> DistillRecipe:
    return DistillRecipe(
        name="test",
        method="layers",
        learning_rate=1e-3,
        safe_learning_rate=3e-3,
        num_steps=15,
        items_per_step=10,
        tokens_per_batch=160,
        num_validation_items=4,
    )


@pytest.fixture(scope="module")
def finished(
    run: Path,
    tiny_checkpoint: Path,
    items: CalibrationSet,
    recipe: DistillRecipe,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, BlockwiseResult]:
    out = tmp_path_factory.mktemp("blockwise") / "out"
    return out, distill_blockwise(run, tiny_checkpoint, out, recipe, items, execution=NVVL)


def test_layers_come_nearer_to_bf16(finished: tuple[Path, BlockwiseResult]) -> None:
    layers = finished[1].layers
    assert len(layers) == NUM_LAYERS
    assert all(layer.error <= layer.start_error for layer in layers)
    assert sum(layer.error < layer.start_error for layer in layers) >= NUM_LAYERS - 1, layers
    assert layers[0].error < 0.85 * layers[0].start_error, layers


def test_the_model_comes_nearer_to_its_teacher(
    finished: tuple[Path, BlockwiseResult],
    run: Path,
    tiny_checkpoint: Path,
    items: CalibrationSet,
) -> None:
    processor = Processor.from_folder(tiny_checkpoint)
    before, after = (
        mean_kl(folder, tiny_checkpoint, items, processor) for folder in (run, finished[0])
    )
    assert after < 0.9 * before


def mean_kl(folder: Path, teacher: Path, items: CalibrationSet, processor: Processor) -> float:
    ours, theirs = load_any(folder), load_model(teacher)
    total, count = 0.0, 0
    with torch.no_grad():
        for item in items.items:
            inputs = processor(item.messages, images=item.images)
            ids, pixels = inputs.input_ids[None], inputs.pixel_values
            one, two = (
                model(ids, pixel_values=pixels).logits[0].float().log_softmax(-1)
                for model in (ours, theirs)
            )
            total += float((two.exp() * (two - one)).sum())
            count += len(one)
    return total / count


def test_what_is_written_is_proved_against_the_trained_weights(
    finished: tuple[Path, BlockwiseResult],
) -> None:
    report = verify(finished[0], finished[1].bf16, logits=False)
    failed = [check.rule for check in report.checks if check.passed is False]
    # rules about server configs (C, E) concern keys that the tiny config does not have
    assert [rule for rule in failed if not rule.startswith(("C", "E"))] == []
    layers = finished[1].manifest.distillation["layers"]
    assert [layer["layer"] for layer in layers] == [result.layer for result in finished[1].layers]


def test_killed_run_goes_on_to_the_same_bytes(
    finished: tuple[Path, BlockwiseResult],
    run: Path,
    tiny_checkpoint: Path,
    items: CalibrationSet,
    recipe: DistillRecipe,
    tmp_path: Path,
) -> None:
    def kill(stage: str, done: int, _total: int) -> None:
        if stage != STAGE and done == 4:
            raise Killed

    out = tmp_path / "out"
    execution = dataclasses.replace(NVVL, progress=kill)
    with pytest.raises(Killed):
        distill_blockwise(run, tiny_checkpoint, out, recipe, items, execution=execution)
    other = dataclasses.replace(recipe, num_steps=16)
    message = r"holds a run with other settings: recipe\.num_steps \(--steps\): \d+ then, 16 now;"
    with pytest.raises(OutputError, match=message):
        distill_blockwise(run, tiny_checkpoint, out, other, items, execution=NVVL)
    distill_blockwise(run, tiny_checkpoint, out, recipe, items, execution=NVVL)
    for name in ("model.safetensors", "calibration.amax"):
        assert (out / name).read_bytes() == (finished[0] / name).read_bytes()
    assert not out.with_name("out.train").exists()


def test_interrupted_run_says_what_is_kept_and_goes_on(
    run: Path, tiny_checkpoint: Path, items: CalibrationSet, recipe: DistillRecipe, tmp_path: Path
) -> None:
    short = dataclasses.replace(recipe, num_steps=1)
    out = tmp_path / "out"
    stop_at = 2
    done: list[int] = []

    def interrupt(stage: str, num_done: int, _total: int) -> None:
        if stage != STAGE:
            done.append(num_done)
            if num_done == stop_at:
                raise KeyboardInterrupt

    execution = dataclasses.replace(NVVL, progress=interrupt)
    message = r"^interrupted; the finished layers are kept in .*out\.train, and the same command "
    with pytest.raises(KeyboardInterrupt, match=message):
        distill_blockwise(run, tiny_checkpoint, out, short, items, execution=execution)
    assert [path.name for path in tmp_path.iterdir()] == ["out.train"]
    stop_at = 0
    distill_blockwise(run, tiny_checkpoint, out, short, items, execution=execution)
    assert done == [1, 2, *range(1, NUM_LAYERS + 1)]


def test_interruption_before_the_first_layer_says_nothing_of_layers(
    run: Path,
    tiny_checkpoint: Path,
    items: CalibrationSet,
    recipe: DistillRecipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nvvl.distill.blockwise.embed_items", interrupt)
    with pytest.raises(KeyboardInterrupt) as caught:
        distill_blockwise(run, tiny_checkpoint, tmp_path / "out", recipe, items)
    assert str(caught.value) == ""
    assert list(tmp_path.iterdir()) == []


def keep_layer(folder: Path, *, overwrite: bool = False) -> _KeptLayers:
    """Keep a first layer, unless it is there."""
    kept = _KeptLayers(folder, {"recipe": "x"}, overwrite=overwrite)
    if LAYER not in kept:
        kept.add(LayerResult(LAYER, 2.0, 1.0), {f"{LAYER}.norm.weight": torch.ones(3)})
    return kept


def save_whole(folder: Path) -> None:
    """Save the state of a run of the whole model."""
    state = StateFolder(folder, {"recipe": "x"})
    state.open(size_bytes=0, overwrite=False)
    state.save(Standing(0, 1.0, 1.0), {"a": torch.ones(3)}, {"a": torch.ones(3)})


def test_overwrite_goes_on_after_the_layers_that_are_whole(tmp_path: Path) -> None:
    folder = tmp_path / "out.train"
    keep_layer(folder)
    assert LAYER in _KeptLayers(folder, {"recipe": "x"}, overwrite=True)
    (folder / "layer-00000.safetensors").write_bytes(b"else")
    with pytest.raises(CheckpointError, match="missing or changed since it was saved"):
        keep_layer(folder).load(LAYER)
    assert LAYER not in _KeptLayers(folder, {"recipe": "x"}, overwrite=True)
    assert list(folder.iterdir()) == []


def test_unreadable_record_of_layers_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "out.train"
    keep_layer(folder)
    (folder / "blocks.json").write_text('{"identity": {}, "files": {}}')
    with pytest.raises(CheckpointError, match=r"blocks\.json: not a training state"):
        keep_layer(folder)


def test_each_method_leaves_the_run_of_the_other_alone(tmp_path: Path) -> None:
    for method, save, other in (
        ("whole", save_whole, keep_layer),
        ("layers", keep_layer, save_whole),
    ):
        folder = tmp_path / method
        save(folder)
        before = sorted(folder.iterdir())
        with pytest.raises(OutputError, match=f'holds a run of method "{method}"'):
            other(folder)
        assert sorted(folder.iterdir()) == before


def test_overwrite_discards_the_run_of_the_other_method_and_nothing_else(tmp_path: Path) -> None:
    save_whole(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    keep_layer(tmp_path, overwrite=True).discard()
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_layer_that_gets_no_better_stays_as_it_was(
    run: Path, tiny_checkpoint: Path, items: CalibrationSet, recipe: DistillRecipe, tmp_path: Path
) -> None:
    wild = dataclasses.replace(recipe, learning_rate=1.0, safe_learning_rate=1.0, num_steps=3)
    result = distill_blockwise(run, tiny_checkpoint, tmp_path / "out", wild, items)
    assert all(layer.error == layer.start_error for layer in result.layers)
    for name in Checkpoint(tiny_checkpoint).tensors:
        assert Checkpoint(result.bf16).sha256(name) == Checkpoint(tiny_checkpoint).sha256(name)


def test_layer_that_stays_bf16_shows_the_error_of_those_before_it(
    tiny_checkpoint: Path, items: CalibrationSet, recipe: DistillRecipe, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    rule = Rule(target="*.mixer.*", format="nvfp4", layers=(1, 4))
    quantize_checkpoint(tiny_checkpoint, run, Recipe(name="two", rules=(rule,)), items)
    short = dataclasses.replace(recipe, num_steps=1)
    result = distill_blockwise(run, tiny_checkpoint, tmp_path / "out", short, items)
    assert [index for index, layer in enumerate(result.layers) if layer.trained] == [1, 4]
    for index, layer in enumerate(result.layers):
        assert (layer.start_error > 0) == (index > 0), layer
        assert layer.trained or layer.error == layer.start_error


def test_rate_above_the_safe_one_warns_without_the_rates_of_whole_models(
    run: Path, tiny_checkpoint: Path, items: CalibrationSet, recipe: DistillRecipe, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    fast = dataclasses.replace(recipe, learning_rate=0.01)
    with (
        pytest.warns(UserWarning, match=r"^learning_rate 0\.01 is above 0\.003: ") as warned,
        pytest.raises(OutputError, match="exists already"),
    ):
        distill_blockwise(run, tiny_checkpoint, tmp_path / "out", fast, items)
    assert "2e-5" not in str(warned[0].message)


def test_output_that_another_run_trains_is_refused(
    run: Path, tiny_checkpoint: Path, items: CalibrationSet, recipe: DistillRecipe, tmp_path: Path
) -> None:
    overwrite = Execution(overwrite=True)
    with (
        hold_train_folder(tmp_path / "out"),
        pytest.raises(OutputError, match=r"out\.train: another run is writing there"),
    ):
        distill_blockwise(
            run, tiny_checkpoint, tmp_path / "out", recipe, items, execution=overwrite
        )


@pytest.mark.parametrize("read", ["run", "teacher"])
def test_what_is_read_is_never_replaced(
    read: str,
    run: Path,
    tiny_checkpoint: Path,
    items: CalibrationSet,
    recipe: DistillRecipe,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "manifest.json").write_text("{}")
    given = {"run": run, "teacher": tiny_checkpoint} | {read: out}
    overwrite = Execution(overwrite=True)
    with pytest.raises(OutputError, match=f"out: holds {out}, which is read"):
        distill_blockwise(given["run"], given["teacher"], out, recipe, items, execution=overwrite)
    assert (out / "manifest.json").exists()


def test_run_of_another_processor_is_not_gone_on_with(
    run: Path,
    tiny_checkpoint: Path,
    items: CalibrationSet,
    recipe: DistillRecipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def kill(stage: str, *_: object) -> None:
        if stage != STAGE:
            raise Killed

    short = dataclasses.replace(recipe, num_steps=1)
    out = tmp_path / "out"
    with pytest.raises(Killed):
        distill_blockwise(
            run, tiny_checkpoint, out, short, items, execution=Execution(progress=kill)
        )
    arithmetic = {"processor": "PDP-11"}
    monkeypatch.setattr("nvvl.distill.blockwise.describe_arithmetic", lambda _: arithmetic)
    with pytest.raises(
        OutputError, match=r"out\.train: holds a run with other settings: .*processor"
    ):
        distill_blockwise(run, tiny_checkpoint, out, short, items)


def test_embeddings_are_those_of_the_whole_model(
    tiny_checkpoint: Path, items: CalibrationSet
) -> None:
    processor = Processor.from_folder(tiny_checkpoint)
    inputs = [processor(item.messages, images=item.images) for item in items.items[:4]]
    found = embed_items(Checkpoint(tiny_checkpoint), iter(inputs), torch.device("cpu"))
    model = load_model(tiny_checkpoint)
    with torch.no_grad():
        for one, embeds in zip(inputs, found, strict=True):
            features = model.encode_images(one.pixel_values) if len(one.pixel_values) else None
            assert torch.equal(embeds, model.embed(one.input_ids[None], features))


def test_training_a_layer_takes_the_memory_of_four(
    make_config: Callable[..., dict[str, Any]],
    randomize: Callable[..., None],
    live_memory: Callable[[], Any],
    recipe: DistillRecipe,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # slices and chunks as small beside these weights as they are beside those of a 12B
    monkeypatch.setattr(block, "SLICE_ELEMENTS", 4096)
    monkeypatch.setattr(backbone, "_GRADIENT_ROWS", 16)
    monkeypatch.setattr(products, "_CHUNK_ELEMENTS", 4096)
    values = make_config(language={"hidden_size": 256, "intermediate_size": 1024})
    layer = Layer("mlp", LanguageConfig.from_dict(values["llm_config"]))
    randomize(layer)
    layer.bfloat16()
    layer_bytes = sum(p.nbytes for p in layer.parameters())
    names = ("mixer.up_proj", "mixer.down_proj")
    formats: dict[str, Format] = {f"l.{name}": "nvfp4" for name in names}
    amax = Amax(torch.tensor(1.0), torch.tensor(4.0))
    x = torch.randn(1, 8, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    with live_memory() as memory:
        student = BlockStudent(layer, "l", formats, dict.fromkeys(formats, amax), recipe)
        errors = [student.step(x, x, Packing.of([8])) for _ in range(3)]
    assert errors[2] < errors[0]
    # the layer itself was there before: its weights are where the forward reads rounded ones
    assert layer_bytes + memory.peak <= 4 * layer_bytes
    assert memory.peak >= 2 * layer_bytes  # the FP32 masters at least: the counter does count


@pytest.mark.parametrize(
    ("execution", "message"),
    [
        (Execution(shard=True), "--shard: has no meaning"),
        (Execution(logits=Path("x")), "--logits: has no meaning"),
    ],
)
def test_options_of_the_whole_model_are_refused(
    execution: Execution,
    message: str,
    run: Path,
    tiny_checkpoint: Path,
    items: CalibrationSet,
    recipe: DistillRecipe,
    tmp_path: Path,
) -> None:
    with pytest.raises(RecipeError, match=message):
        distill_blockwise(
            run, tiny_checkpoint, tmp_path / "out", recipe, items, execution=execution
        )


def test_each_method_takes_its_own_recipes(
    run: Path, tiny_checkpoint: Path, items: CalibrationSet, recipe: DistillRecipe, tmp_path: Path
) -> None:
    whole = DistillRecipe(name="whole", learning_rate=1e-5)
    with pytest.raises(RecipeError, match='required "layers", got "whole"'):
        distill_blockwise(run, tiny_checkpoint, tmp_path / "out", whole, items)
    with pytest.raises(RecipeError, match='required "whole", got "layers"'):
        distill(run, tiny_checkpoint, tmp_path / "out", recipe, items)
