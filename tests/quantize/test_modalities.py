"""Inputs of linears by modality, and input scales that weigh the two."""

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nvvl.calib_data.items import Item
from nvvl.calib_data.manifest import CalibrationSet
from nvvl.errors import CalibrationError, DataError, RecipeError
from nvvl.model.load import load_model
from nvvl.model.processor import Processor
from nvvl.quantize import activations as activations_module
from nvvl.quantize import fp8, nvfp4
from nvvl.quantize.amaxes import read_amaxes
from nvvl.quantize.limits import Limits
from nvvl.quantize.modalities import CANDIDATES, LayerInputs
from nvvl.quantize.presets import PRESETS
from nvvl.quantize.recipe import CALIBRATED_FORMATS, Format, Recipe, Rule
from nvvl.quantize.spill import SpillWriter
from nvvl.quantize.statistics import InputStatistics, collect_input_statistics
from nvvl.quantize.statistics_text import statistics_table
from nvvl.quantize.walk import quantize_checkpoint

QuantizeTiny = Callable[[str], Path]
FAKE_QUANTIZE = {"fp8": fp8.fake_quantize, "nvfp4": nvfp4.fake_quantize}
LARGEST = {"fp8": 448.0, "nvfp4": 6 * 448.0}


@contextmanager
def captured_inputs(source: Path, items: tuple[Item, ...]) -> Iterator[dict[str, Any]]:
    """Run the whole model over items; give the inputs of each linear by (name, is image)."""
    model = load_model(source)
    processor = Processor.from_folder(source)
    found: dict[str, dict[bool, list[Tensor]]] = {}
    images = torch.zeros(0)

    def keep(name: str, x: Tensor) -> None:
        for image in (True, False):
            found.setdefault(name, {True: [], False: []})[image].append(x[images == image])

    for name, module in model.named_modules():
        if ".mixer." in name and isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, args, name=name: keep(name, args[0]))
    with torch.no_grad():
        for item in items:
            inputs = processor(item.messages, images=item.images, videos=item.videos)
            images = inputs.input_ids[None] == 280  # img_context_token_id of the tiny config
            model(inputs.input_ids[None], pixel_values=inputs.pixel_values)
    yield {name: {k: torch.cat(rows) for k, rows in parts.items()} for name, parts in found.items()}


def relative_error(x: Tensor, to: Format, amax: float) -> float:
    """Compute the relative mean square error in float64, apart from the fake quantization."""
    scale = torch.tensor(amax, dtype=torch.float32) / LARGEST[to]
    error = FAKE_QUANTIZE[to](x, scale).double() - x.double()
    return float(error.square().sum() / x.double().square().sum())


@pytest.fixture(scope="module")
def statistics(tiny_checkpoint: Path, items: tuple[Item, ...]) -> list[InputStatistics]:
    return collect_input_statistics(tiny_checkpoint, PRESETS["nvfp4"](), items)


def test_statistics_are_those_of_the_whole_model(
    statistics: list[InputStatistics], tiny_checkpoint: Path, items: tuple[Item, ...]
) -> None:
    with captured_inputs(tiny_checkpoint, items) as captured:
        assert [found.name for found in statistics] == list(captured)
        for found in statistics:
            image, text = captured[found.name][True], captured[found.name][False]
            amax = float(max(image.abs().max(), text.abs().max()))
            assert found.scale_amax == {"fp8": amax, "nvfp4": amax}
            for part, rows in ((found.parts["image"], image), (found.parts["text"], text)):
                assert (part.num_tokens, part.amax) == (len(rows), float(rows.abs().max()))
                for to in CALIBRATED_FORMATS:
                    # sums of squares in float32 a span at a time, here in float64 at once
                    expected = relative_error(rows, to, amax)
                    assert part.errors[to] == pytest.approx(expected, rel=1e-4)


def test_larger_amax_of_the_two_is_the_calibrated_one(
    statistics: list[InputStatistics], quantize_tiny: QuantizeTiny
) -> None:
    names = [found.name for found in statistics]
    amaxes = read_amaxes(quantize_tiny("nvfp4") / "calibration.amax", names)
    for found in statistics:
        amax = amaxes[found.name].input
        assert amax is not None
        assert float(amax) == max(part.amax for part in found.parts.values())


def test_items_in_spans_keep_their_modality(
    statistics: list[InputStatistics],
    tiny_checkpoint: Path,
    items: tuple[Item, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(activations_module, "SPAN_TOKENS", 5)
    found = collect_input_statistics(tiny_checkpoint, PRESETS["nvfp4"](), items)
    for one, other in zip(found, statistics, strict=True):
        for modality, part in other.parts.items():
            assert one.parts[modality].num_tokens == part.num_tokens
            # BF16 sums in another order along the layers: a part in 2**8, a few layers deep
            assert one.parts[modality].amax == pytest.approx(part.amax, rel=0.05)


def test_items_that_memory_does_not_hold_give_the_same_statistics(
    statistics: list[InputStatistics],
    tiny_checkpoint: Path,
    items: tuple[Item, ...],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    added: list[str] = []
    add = SpillWriter.add

    def count(writer: SpillWriter, name: str, tensor: Tensor) -> None:
        added.append(name)
        add(writer, name, tensor)

    monkeypatch.setattr(SpillWriter, "add", count)
    for budget, is_written in ((None, False), (1, True)):
        limits = Limits(activation_bytes=budget)
        monkeypatch.setattr("nvvl.quantize.statistics.default_limits", lambda held=limits: held)
        found = collect_input_statistics(tiny_checkpoint, PRESETS["nvfp4"](), items)
        assert found == statistics
        assert bool(added) == is_written
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("preset", "image_weight"), [("fp8", 1.0), ("nvfp4", 0.3)])
def test_weighted_scale_has_the_least_weighted_error(
    preset: Format,
    image_weight: float,
    tiny_checkpoint: Path,
    items: tuple[Item, ...],
    calibration_set: CalibrationSet,
    tmp_path: Path,
) -> None:
    recipe = replace(PRESETS[preset](), image_weight=image_weight)
    quantize_checkpoint(tiny_checkpoint, tmp_path / "out", recipe, calibration_set)
    with captured_inputs(tiny_checkpoint, items) as captured:
        amaxes = read_amaxes(tmp_path / "out" / "calibration.amax", captured)
        for name, parts in captured.items():
            plain = float(max(rows.abs().max() for rows in parts.values()))
            errors = {
                round(plain * ratio, 4): image_weight
                * relative_error(parts[True], preset, plain * ratio)
                + (1 - image_weight) * relative_error(parts[False], preset, plain * ratio)
                for ratio in CANDIDATES
            }
            chosen = amaxes[name].input
            assert chosen is not None
            # of two candidates that are as good, summation order may pick either
            assert errors[round(float(chosen), 4)] <= min(errors.values()) * (1 + 1e-5), name


def test_statistics_show_the_scales_that_quantize_writes(
    tiny_checkpoint: Path, items: tuple[Item, ...], calibration_set: CalibrationSet, tmp_path: Path
) -> None:
    recipe = replace(PRESETS["fp8"](), image_weight=0.5)
    quantize_checkpoint(tiny_checkpoint, tmp_path / "out", recipe, calibration_set)
    statistics = collect_input_statistics(tiny_checkpoint, recipe, items)
    names = [found.name for found in statistics]
    amaxes = read_amaxes(tmp_path / "out" / "calibration.amax", names)
    shown = {found.name: found.scale_amax["fp8"] for found in statistics}
    assert shown == {name: float(amax.input) for name, amax in amaxes.items() if amax.input}
    plain = {found.name: max(part.amax for part in found.parts.values()) for found in statistics}
    assert shown != plain


class OneLinear(nn.Module):
    """A layer of one linear, and items for it: rows of which some are image tokens."""

    def __init__(self, rows: Tensor, images: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(rows.shape[-1], 1)
        self.rows, self.images = rows, images

    def observe_layer(self, layer: "OneLinear", name: str, announce: Callable[..., None]) -> None:
        announce(self.images[None])
        layer.linear(self.rows[None])


def look(rows: Tensor, images: Tensor, to: Format) -> LayerInputs:
    layer = OneLinear(rows, images)
    inputs = LayerInputs("block", {"block.linear": (to,)}, CANDIDATES)
    inputs.survey(layer, layer)  # type: ignore[arg-type]
    with inputs.rounding(layer) as announce:
        layer.observe_layer(layer, "block", announce)
    return inputs


def test_weight_decides_who_is_clipped() -> None:
    """One huge value of a text token, beside image tokens that FP8 holds as subnormals under it."""
    rows = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)) * 0.05
    rows[0, 0] = 4000.0
    images = torch.arange(64) > 0
    inputs = look(rows, images, "fp8")
    amaxes = [float(inputs.scale_amax("block.linear", "fp8", w)) for w in (0.0, 1.0)]
    assert amaxes[0] >= 4000
    assert amaxes[1] == 500
    assert float(inputs.scale_amax("block.linear", "fp8", None)) == 4000


def test_plain_amax_wins_a_tie() -> None:
    rows = torch.full((4, 16), 2.0)  # powers of two are exact under every power of two
    inputs = look(rows, torch.tensor([True, True, False, False]), "nvfp4")
    assert float(inputs.scale_amax("block.linear", "nvfp4", 0.5)) == 2.0


def test_weight_of_a_modality_without_tokens_is_refused() -> None:
    inputs = look(torch.ones(4, 16), torch.zeros(4, dtype=torch.bool), "fp8")
    message = r"image_weight = 0\.5: required calibration items with image tokens, got none"
    with pytest.raises(DataError, match=message):
        inputs.scale_amax("block.linear", "fp8", 0.5)
    assert float(inputs.scale_amax("block.linear", "fp8", 0.0)) > 0


def test_input_that_is_not_finite_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"block\.linear: NaN or Inf among its inputs"):
        look(torch.full((2, 16), torch.inf), torch.zeros(2, dtype=torch.bool), "fp8")


def test_recipe_without_weight_is_written_as_before() -> None:
    assert json.dumps(PRESETS["nvfp4"]().to_dict()) == (
        '{"name": "nvfp4", "rules": [{"target": "language_model.backbone.layers.*.mixer.*", '
        '"format": "nvfp4"}], "algorithm": "max", "num_calibration_items": 1024}'
    )
    weighted = replace(PRESETS["nvfp4"](), image_weight=0.25)
    assert weighted.to_dict()["image_weight"] == 0.25
    assert "image_weight = 0.25\n" in weighted.to_toml()


@pytest.mark.parametrize(
    ("weight", "linear_format", "message"),
    [
        (1.5, "fp8", r"image_weight: required a number from 0 to 1, got 1\.5"),
        ("0.5", "fp8", "image_weight: required a number from 0 to 1, got '0.5'"),
        (True, "fp8", "image_weight: required a number from 0 to 1, got True"),
        (float("nan"), "fp8", "image_weight: required a number from 0 to 1, got nan"),
        (0.5, "nvfp4-w4a16", "image_weight: weighs errors of inputs, and no rule quantizes inputs"),
    ],
)
def test_faulty_weight_is_refused(weight: Any, linear_format: Format, message: str) -> None:
    rule = Rule(target="*", format=linear_format)
    with pytest.raises(RecipeError, match=message):
        Recipe(name="x", rules=(rule,), image_weight=weight)


def test_killed_weighted_run_goes_on_to_the_same_bytes(
    tiny_checkpoint: Path, calibration_set: CalibrationSet, tmp_path: Path
) -> None:
    recipe = replace(PRESETS["nvfp4"](), image_weight=0.5)

    def run(name: str, **options: Any) -> None:
        quantize_checkpoint(tiny_checkpoint, tmp_path / name, recipe, calibration_set, **options)

    run("whole")
    stages: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        run(
            "parts",
            progress=lambda stage, *_: stages.append(stage),
            stop=lambda: stages[-1].endswith("layers.3"),
        )
    run("parts")
    whole, parts = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("whole", "parts")
    )
    assert whole == parts


def test_weighted_scales_serve_their_own_format_alone(
    tiny_checkpoint: Path,
    calibration_set: CalibrationSet,
    quantize_tiny: QuantizeTiny,
    tmp_path: Path,
) -> None:
    def weighted(preset: str) -> Recipe:
        return replace(PRESETS[preset](), image_weight=0.5)

    def pack(name: str, recipe: Recipe, calibration: Path) -> None:
        quantize_checkpoint(
            tiny_checkpoint, tmp_path / name, recipe, None, from_calibration=calibration
        )

    first = tmp_path / "first"
    quantize_checkpoint(tiny_checkpoint, first, weighted("nvfp4"), calibration_set)
    pack("again", weighted("nvfp4"), first)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        first / "model.safetensors"
    ).read_bytes()
    with pytest.raises(
        RecipeError, match=r"in_proj: its input scale in .*first was chosen by .*nvfp4"
    ):
        pack("other", weighted("fp8"), first)
    with pytest.raises(
        RecipeError, match=r"with image_weight 0\.5, the recipe has no image_weight"
    ):
        pack("other", PRESETS["nvfp4"](), first)
    with pytest.raises(
        RecipeError, match=r"with no image_weight, the recipe has image_weight 0\.5"
    ):
        pack("other", weighted("nvfp4"), quantize_tiny("nvfp4"))


def test_recipe_that_quantizes_no_inputs_has_no_statistics(
    tiny_checkpoint: Path, items: tuple[Item, ...]
) -> None:
    with pytest.raises(RecipeError, match="nvfp4-w4a16: required a rule that quantizes inputs"):
        collect_input_statistics(tiny_checkpoint, PRESETS["nvfp4-w4a16"](), items)
    with pytest.raises(DataError, match="required at least one calibration item, got none"):
        collect_input_statistics(tiny_checkpoint, PRESETS["fp8"](), [])


def test_table_has_a_row_for_each_input(statistics: list[InputStatistics]) -> None:
    table = statistics_table(statistics, image_weight=None)
    names = list(table.columns[0].cells)
    assert "layers.3.mixer.[qkv]_proj" in names
    assert len(names) == len(statistics) - 2 + 1  # q, k, v in one row; the mean below
    assert len(table.columns) + 2 == len(statistics_table(statistics, image_weight=0.5).columns)
