"""The tools that train the embedded model: what they draw, keep and publish."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nvvl.calib_data.documents import make_document
from nvvl.model.config import VLMConfig
from nvvl.model.load import load_model, resolve_model
from nvvl.model.processor import Processor
from nvvl.tools.embedded_model.average import average
from nvvl.tools.embedded_model.data import NUM_GLYPHS, Batches, document_row, glyph_targets
from nvvl.tools.embedded_model.muon import Muon
from nvvl.tools.embedded_model.publish import publish
from nvvl.tools.embedded_model.spec import SPECIAL_TOKENS, VOCAB_SIZE, make_config
from nvvl.tools.embedded_model.stages import GROUPS, PLANS, Stage, make_refinement, make_stages
from nvvl.tools.embedded_model.state import load_state, save_state
from nvvl.tools.embedded_model.tokenizer import train_tokenizer
from nvvl.tools.embedded_model.train import Trainee, freeze, initialize, make_optimizers, rate

LENGTH = 256


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.from_folder(resolve_model("embedded"))


def test_shipped_model_is_small() -> None:
    assert (resolve_model("embedded") / "model.safetensors").stat().st_size <= 25_000_000


@pytest.fixture
def trainee() -> Trainee:
    trainee = Trainee(VLMConfig.from_dict(make_config()))
    initialize(trainee)
    return trainee


def everything(steps: int) -> Stage:
    return replace(make_stages(1.0)[3], steps=steps)


def test_shipped_config_is_the_one_the_tools_write() -> None:
    shipped = VLMConfig.from_folder(resolve_model("embedded"))
    assert dict(shipped.raw) == make_config()


def test_tokenizer_has_the_released_ids_and_single_digits() -> None:
    words = [f"{a}{b}{c} word" for a in "abcdefghij" for b in "klmnopqrst" for c in "uvwxyz"]
    tokenizer = train_tokenizer(words)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(20))
    assert tokenizer.token_to_id("<image>") == make_config()["img_context_token_id"]
    digits = tokenizer.encode("2026", add_special_tokens=False).tokens
    assert digits == ["2", "0", "2", "6"]


def test_too_few_texts_for_the_vocabulary_are_refused() -> None:
    with pytest.raises(ValueError, match="required 768 ids"):
        train_tokenizer(["a b"])


@pytest.mark.parametrize("group", GROUPS)
def test_batch_depends_on_its_number_alone(processor: Processor, group: str) -> None:
    stage = replace(everything(3), groups={group: 1.0})
    first, again = (Batches(stage, processor, 7, 0.02)[1] for _ in range(2))
    other = Batches(stage, processor, 7, 0.02)[2]
    assert torch.equal(first.input_ids, again.input_ids)
    assert torch.equal(first.pixels, again.pixels)
    assert not torch.equal(first.input_ids, other.input_ids)


def test_every_image_token_of_a_batch_has_a_feature(processor: Processor) -> None:
    batch = Batches(replace(everything(1), groups={"page": 1.0}), processor, 0, 0.03)[0]
    num_tokens = int((batch.input_ids == processor.config.image_token_id).sum())
    assert num_tokens == batch.pixels.shape[0] * processor.config.tokens_per_tile


def test_turns_that_do_not_fit_are_left_out_whole(processor: Processor) -> None:
    document = make_document("card", 3, split="train")
    long, short = (document_row(document, processor, length) for length in (4000, 150))
    assert len(short.input_ids) <= 150 < len(long.input_ids)
    assert short.answer_mask.any()
    assert processor.tokenizer.decode(short.input_ids.tolist()).endswith("\n")


def test_glyphs_fall_into_the_cell_that_shows_them(processor: Processor) -> None:
    document = make_document("scrambled_lines", 5, split="train")
    shown = [glyph for glyph in document.glyphs[0] if glyph.char != " "]
    targets = glyph_targets(document, processor.config)
    assert len(targets) == len(shown) > 30
    columns = processor.config.image_size // 16
    enlarged = processor.config.image_size / document.images[0].width
    for glyph, (_, patch, place) in zip(shown, targets.tolist(), strict=True):
        cell, code = divmod(place, NUM_GLYPHS)
        assert chr(code + 32) == glyph.char
        top, left = (
            16 * (patch // columns) + 8 * (cell // 4),
            16 * (patch % columns) + 4 * (cell % 4),
        )
        assert left <= enlarged * (glyph.x0 + glyph.x1) / 2 < left + 4
        assert top <= enlarged * (glyph.y0 + glyph.y1) / 2 < top + 8


@pytest.mark.parametrize("shape", [(48, 80), (80, 48)])
def test_muon_takes_the_steps_of_torchs(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    start = torch.randn(shape) * 0.1
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = (
        Muon([ours], lr=0.02, weight_decay=0.01),
        torch.optim.Muon([theirs], lr=0.02, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(3):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    # torch's iterations round to bfloat16, 2^-9 each: some 1 % after five
    assert torch.linalg.norm(ours - theirs) < 0.02 * torch.linalg.norm(theirs - start)


def test_frozen_parts_get_no_gradient(trainee: Trainee, processor: Processor) -> None:
    stage = replace(everything(1), parts=("projector",), glyph_weight=0.0)
    freeze(trainee, stage)
    batch = Batches(replace(stage, groups={"single": 1.0}), processor, 0, 0.008)[0]
    answer_loss, _ = trainee.losses(batch, stage)
    answer_loss.backward()
    moved = {name.split(".")[1] for name, p in trainee.named_parameters() if p.grad is not None}
    assert moved == {"mlp1"}


def test_refinement_starts_with_the_vision_tower_alone(
    trainee: Trainee, processor: Processor
) -> None:
    head, vision, language, *_ = make_refinement(1.0)
    moved = []
    for stage in (head, vision, language):
        freeze(trainee, stage)
        trainee.zero_grad(set_to_none=True)
        batch = Batches(replace(stage, groups={"dense": 1.0}), processor, 0, 0.008)[0]
        answer_loss, glyph_loss = trainee.losses(batch, stage)
        (answer_loss + stage.glyph_weight * glyph_loss).backward()
        names = [name for name, p in trainee.named_parameters() if p.grad is not None]
        moved.append({name.removeprefix("model.").split(".")[0] for name in names})
    assert moved == [
        {"glyph_head"},
        {"glyph_head", "vision_model"},
        {"mlp1", "language_model"},
    ]


@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_ends_with_the_rate_at_zero_and_can_be_resumed_by_stage_name(plan: str) -> None:
    stages = PLANS[plan](0.01)
    assert len({stage.name for stage in stages}) == len(stages)
    assert stages[-1].end == 0.0
    assert all(set(stage.groups) <= set(GROUPS) for stage in stages)
    assert all(sum(stage.groups.values()) == pytest.approx(1.0) for stage in stages)


def test_rate_warms_up_then_falls_to_its_end() -> None:
    stage = replace(everything(1000), start=1.0, end=0.0)
    assert rate(stage, 0) == pytest.approx(0.01)
    assert rate(stage, 500) == pytest.approx(0.5)
    assert rate(stage, 999) == pytest.approx(0.001)


def test_state_comes_back_as_it_was(trainee: Trainee, tmp_path: Path) -> None:
    optimizers = make_optimizers(trainee)
    for parameter in trainee.parameters():
        parameter.grad = torch.ones_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    save_state(tmp_path / "state.safetensors", trainee, optimizers, stage="documents", step=5)
    fresh = Trainee(trainee.model.config)
    fresh_optimizers = make_optimizers(fresh)
    assert load_state(tmp_path / "none.safetensors", fresh, fresh_optimizers) == (None, 0)
    place = load_state(tmp_path / "state.safetensors", fresh, fresh_optimizers)
    assert place == ("documents", 5)
    for name, tensor in trainee.state_dict().items():
        assert torch.equal(tensor, fresh.state_dict()[name]), name
    for ours, theirs in zip(optimizers, fresh_optimizers, strict=True):
        moments = theirs.state_dict()["state"]
        for index, entry in ours.state_dict()["state"].items():
            for key, value in entry.items():
                assert torch.equal(torch.as_tensor(value), moments[index][key]), (index, key)


def test_published_folder_loads_as_a_checkpoint(trainee: Trainee, tmp_path: Path) -> None:
    publish(trainee.model, resolve_model("embedded") / "tokenizer.json", tmp_path / "out")
    loaded = load_model(tmp_path / "out")
    assert loaded.language_model.lm_head.weight.equal(
        trainee.model.language_model.lm_head.weight.bfloat16()
    )
    a_log = "language_model.backbone.layers.0.mixer.A_log"
    assert loaded.get_parameter(a_log).dtype == torch.float32
    Processor.from_folder(tmp_path / "out")


def test_average_is_the_mean_of_every_weight(trainee: Trainee, tmp_path: Path) -> None:
    embedded = resolve_model("embedded")
    publish(trainee.model, embedded / "tokenizer.json", tmp_path / "drawn")
    average([embedded, tmp_path / "drawn"], tmp_path / "mean")
    one, other, mean = (
        load_file(folder / "model.safetensors")
        for folder in (embedded, tmp_path / "drawn", tmp_path / "mean")
    )
    assert one.keys() == other.keys() == mean.keys()
    for name, tensor in mean.items():
        expected = (one[name].double() + other[name].double()) / 2
        assert torch.equal(tensor, expected.to(tensor.dtype)), name
        assert tensor.dtype == one[name].dtype
