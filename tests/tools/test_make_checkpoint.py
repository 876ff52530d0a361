"""The benchmark's random checkpoints: whole, the same each time, and with outliers as trained."""

import json
from pathlib import Path

import pytest
import torch

from nvvl.benchmarks.make_checkpoint import draw, make_checkpoint, make_tokenizer
from nvvl.calib_data.manifest import load_calibration_set
from nvvl.model.checkpoint import Checkpoint, TensorSpec
from nvvl.model.config import VLMConfig
from nvvl.model.load import load_model
from nvvl.model.processor import Processor


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("make") / "tiny"
    make_checkpoint("tiny", folder)
    return folder


def test_tiny_is_a_sharded_model_that_computes(tiny: Path) -> None:
    checkpoint = Checkpoint(tiny)
    assert len({info.file for info in checkpoint.tensors.values()}) > 1
    assert checkpoint.info("language_model.backbone.layers.0.mixer.A_log").dtype == "F32"
    model, processor = load_model(tiny), Processor.from_folder(tiny)
    items = load_calibration_set("default", num_items=4).items
    item = next(item for item in items if item.images)
    inputs = processor(item.messages, images=item.images)
    with torch.no_grad():
        logits = model(inputs.input_ids[None], pixel_values=inputs.pixel_values).logits
    assert logits.isfinite().all()
    assert logits.float().std() > 0.1


def test_same_seed_gives_the_same_bytes(tiny: Path, tmp_path: Path) -> None:
    make_checkpoint("tiny", tmp_path / "again")
    make_checkpoint("tiny", tmp_path / "other", seed=1)
    for path in sorted(tiny.iterdir()):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    name = "mlp1.1.weight"
    assert Checkpoint(tmp_path / "other").sha256(name) != Checkpoint(tiny).sha256(name)


def test_existing_checkpoint_is_kept(tiny: Path) -> None:
    with pytest.raises(SystemExit, match="holds a checkpoint already"):
        make_checkpoint("tiny", tiny)


def test_weights_and_norms_have_outliers(tiny: Path) -> None:
    config = Checkpoint(tiny).config
    up_proj = TensorSpec(
        "language_model.backbone.layers.1.mixer.up_proj.weight", "BF16", (4096, 2048)
    )
    weight = draw(up_proj, config, depth=62, seed=0).float()
    columns = weight.square().mean(0).sqrt()
    assert 5 < columns.max() / columns.median() < 8  # the few columns that are 6 times larger
    assert weight.abs().max() / weight.std() > 15  # a normal matrix of this size gives 5.4
    assert weight.std() * 2048**0.5 == pytest.approx(1, abs=0.15)
    norm = draw(TensorSpec("norm.weight", "BF16", (4096,)), config, depth=62, seed=0).float()
    assert 3 <= int((norm > 4).sum()) <= 30
    down_proj = TensorSpec(up_proj.name.replace("up_", "down_"), "BF16", (2048, 4096))
    smaller = draw(down_proj, config, depth=62, seed=0).float()
    assert smaller.std() * 4096**0.5 == pytest.approx((2 * 62) ** -0.5, rel=0.15)


def test_tokenizer_has_the_ids_of_the_full_size_config() -> None:
    path = Path(__file__).parents[2] / "benchmarks" / "config-12b.json"
    config = VLMConfig.from_dict(json.loads(path.read_text()))
    tokenizer = make_tokenizer(config)
    assert tokenizer.token_to_id("<image>") == config.image_token_id == 131072
    assert tokenizer.token_to_id("<video>") == 131081
    assert tokenizer.get_vocab_size() == 131082
    Processor(config, tokenizer)  # refuses what does not fit
    assert max(tokenizer.encode("Total: 12,345.67").ids) < 1000
