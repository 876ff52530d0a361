import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from nvvl.calib_data.items import Item
from nvvl.errors import CheckpointError, DataError, OutputError
from nvvl.model.load import load_model
from nvvl.model.processor import Message, Processor
from nvvl.reports.curves import Depth, LayerNoise, load_depth, require_replaceable, write_curves
from nvvl.reports.depth import measure_depth
from nvvl.reports.question import prepare_question
from nvvl.reports.suites import Suite

PREFIX = "language_model.backbone.layers"


def make_item(index: int, seed: int) -> Item:
    question = "<image>\n" + "Which number? " * (1 + index % 3)
    return Item(
        item_id=f"number-{seed}-{index}",
        messages=(Message("user", question), Message("assistant", str(7 * index))),
        images=(Image.new("RGB", (32, 32), (9 * index, seed, 200)),),
    )


NUMBERS = Suite(
    name="number", description="", metric="exact_match", max_new_tokens=3, make_item=make_item
)


@pytest.fixture(scope="module")
def folders(
    make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A model, and one whose layers 2 and 5 are others."""
    root = tmp_path_factory.mktemp("depth")
    source = make_checkpoint(root / "source")
    model = load_model(make_checkpoint(root / "drawn", seed=1))
    changed = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name.startswith((f"{PREFIX}.2.", f"{PREFIX}.5.")) and tensor.ndim == 2
    }
    return source, make_checkpoint(root / "changed", replace=changed)


@pytest.fixture(scope="module")
def measured(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Depth:
    source, changed = folders
    return measure_depth(
        {"changed": changed, "same": source},
        source,
        tmp_path_factory.mktemp("out"),
        [NUMBERS],
        num_items=5,
        batch_size=2,
        dtype=torch.float32,
    )


def test_noise_enters_where_layers_differ(measured: Depth) -> None:
    layers = measured.layers["changed"]
    assert [layer.kind for layer in layers[:4]] == ["mamba", "mlp", "mamba", "attention"]
    assert [layer.kl_alone.estimate > 0 for layer in layers] == [
        i in (2, 5) for i in range(len(layers))
    ]
    assert [layer.kl_through.estimate > 0 for layer in layers] == [
        i >= 2 for i in range(len(layers))
    ]
    assert [layer.sqnr_db is None for layer in layers] == [i < 2 for i in range(len(layers))]
    assert layers[2].kl_alone.estimate == layers[2].kl_through.estimate
    assert layers[4].kl_through.estimate == pytest.approx(layers[2].kl_through.estimate, rel=1e-4)


def test_the_curve_ends_at_the_divergence_of_the_whole_model(
    measured: Depth, folders: tuple[Path, Path]
) -> None:
    source, changed = (load_model(folder, dtype=torch.float32) for folder in folders)
    processor = Processor.from_folder(folders[0])
    kls = []
    for item in NUMBERS.items(5):
        inputs = prepare_question(item, processor).answered
        with torch.inference_mode():
            p, q = (
                model(inputs.input_ids[None], pixel_values=inputs.pixel_values)
                .logits[0, :-1][inputs.answer_mask[1:]]
                .double()
                .log_softmax(-1)
                for model in (source, changed)
            )
        kls.append(float((p.exp() * (p - q)).sum(-1).mean()))
    last = measured.layers["changed"][-1].kl_through
    # float32 forward, padded against unpadded
    assert last.estimate == pytest.approx(sum(kls) / len(kls), rel=1e-3)
    assert last.n == 5


def test_a_model_has_no_noise_against_itself(measured: Depth) -> None:
    for layer in measured.layers["same"]:
        assert layer.sqnr_db is None
        assert layer.kl_through.estimate == layer.kl_alone.estimate == 0.0


def test_what_was_written_is_read_back(folders: tuple[Path, Path], tmp_path: Path) -> None:
    depth = measure_depth({"A": folders[1]}, folders[0], tmp_path, [NUMBERS], num_items=2)
    path = tmp_path / "depth.json"
    assert load_depth(path) == depth
    path.write_text(json.dumps({"layers": {"A": [{}]}}))
    with pytest.raises(DataError, match="required what nvvl sweep depth has written"):
        load_depth(path)
    broken: list[dict[str, tuple[LayerNoise, ...]]] = [{}, {"A": ()}]
    for layers in broken:
        write_curves(replace(depth, layers=layers), tmp_path)
        with pytest.raises(DataError, match=r"depth\.json: required layers of each model"):
            load_depth(path)


def test_a_quantized_reference_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    reference = tmp_path / "fp8"
    shutil.copytree(tiny_checkpoint, reference)
    (reference / "hf_quant_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"fp8: is quantized; the teacher must be the BF16"):
        measure_depth({"A": tiny_checkpoint}, reference, tmp_path / "out", [NUMBERS])


def test_curves_of_another_model_are_not_replaced_without_a_word(
    measured: Depth, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    write_curves(measured, tmp_path)
    with pytest.raises(OutputError, match=r"depth\.json: has curves of changed, which would be l"):
        measure_depth({"same": folders[0]}, folders[0], tmp_path, [NUMBERS])
    for plan, lost in (
        (replace(measured, num_items=6), "curves with --items 5, asked for 6"),
        (replace(measured, seed=1), "curves with --seed 0, asked for 1"),
        (
            replace(measured, model_sha256={**measured.model_sha256, "same": "b"}),
            "curves of same with other weights",
        ),
        (replace(measured, reference_sha256="a"), "curves against another --teacher"),
    ):
        with pytest.raises(OutputError, match=rf"depth\.json: has {lost}, which would be lost"):
            require_replaceable(plan.plan, tmp_path, overwrite=False)
    require_replaceable(measured.plan, tmp_path, overwrite=False)
    assert load_depth(tmp_path / "depth.json") == measured
    depth = measure_depth(
        {"same": folders[0]}, folders[0], tmp_path, [NUMBERS], num_items=1, overwrite=True
    )
    assert load_depth(tmp_path / "depth.json") == depth


def test_a_file_is_refused_before_anything_is_measured(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("nvvl.reports.depth.load_any")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="file: required a folder for the sweep, got a file"):
        measure_depth({"A": tiny_checkpoint}, tiny_checkpoint, tmp_path / "file", [NUMBERS])
    assert (tmp_path / "file").read_text() == "mine"


def test_a_model_in_another_basis_is_refused(
    make_checkpoint: Callable[..., Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    other = make_checkpoint(tmp_path / "other", seed=1)
    with pytest.raises(DataError, match=r"other: has other embeddings than .* \(nvvl rotate"):
        measure_depth({"other": other}, tiny_checkpoint, tmp_path, [NUMBERS], num_items=1)


def test_a_model_with_other_layers_is_refused(
    make_checkpoint: Callable[..., Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    other = make_checkpoint(tmp_path / "other", language={"hybrid_override_pattern": "M-M-"})
    with pytest.raises(DataError, match="has other layers than"):
        measure_depth({"other": other}, tiny_checkpoint, tmp_path, [NUMBERS], num_items=1)
