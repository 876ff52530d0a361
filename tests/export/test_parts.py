"""Graphs cut into consecutive parts compute what the whole ones do."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest

from nvvl.errors import EngineError
from nvvl.export.onnx_export import export_onnx
from nvvl.export.onnx_recipe import GraphRecipe
from nvvl.export.parts import largest_part, layer_sizes, split_layers

Arrays = dict[str, npt.NDArray[Any]]

# float32, which onnxruntime has every kernel for
WHOLE = GraphRecipe(dtype="f32", kv_capacity=32, prefill_tokens=16)
DTYPES = {"f32": np.float32, "int64": np.int64}


@pytest.fixture(scope="module")
def exported(
    written: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], Path]:
    """Return a function that gives the FP8 graphs in a number of parts."""
    folder = tmp_path_factory.mktemp("graphs")

    def export(num_parts: int) -> Path:
        dest = folder / str(num_parts)
        if not dest.exists():
            export_onnx(written("fp8"), dest, replace(WHOLE, num_parts=num_parts))
        return dest

    return export


def run_chain(folder: Path, base: str, inputs: Arrays) -> Arrays:
    """Run the parts of a graph one after the other, as io.json joins them."""
    io = json.loads((folder / "io.json").read_text())
    values = dict(inputs)
    for name in io["parts"][base]:
        entry = io["graphs"][name]
        session = onnxruntime.InferenceSession(folder / entry["file"])
        outputs = [port["name"] for port in entry["outputs"]]
        given = session.run(
            outputs, {port["name"]: values[port["name"]] for port in entry["inputs"]}
        )
        values |= dict(zip(outputs, given, strict=True))
        if "hidden_out" in values:
            values["hidden_in"] = values.pop("hidden_out")
    return {name: value for name, value in values.items() if name not in inputs | {"hidden_in": 0}}


def first_inputs(folder: Path, tokens: int) -> Arrays:
    io = json.loads((folder / "io.json").read_text())
    rng = np.random.default_rng(0)
    sizes = {"batch": 2, "tokens": tokens}
    inputs: Arrays = {"positions": np.arange(tokens)}
    for name in io["parts"]["prefill"]:
        for port in io["graphs"][name]["inputs"]:
            shape = [sizes.get(dim, dim) for dim in port["shape"]]
            inputs.setdefault(port["name"], np.zeros(shape, DTYPES[port["dtype"]]))
    inputs.pop("hidden_in", None)
    embeds = inputs["inputs_embeds"]
    return {**inputs, "inputs_embeds": rng.standard_normal(embeds.shape).astype(np.float32)}


def next_inputs(before: Arrays, outputs: Arrays, tokens: int) -> Arrays:
    states = {
        name.replace("present_", "past_"): value
        for name, value in outputs.items()
        if name.startswith("present_")
    }
    return {
        "inputs_embeds": before["inputs_embeds"][:, :1],
        "positions": np.array([tokens]),
        **states,
    }


@pytest.mark.parametrize("num_parts", [2, 3, 7])
def test_parts_give_what_the_whole_gives(exported: Callable[[int], Path], num_parts: int) -> None:
    whole, parts = exported(1), exported(num_parts)
    inputs = first_inputs(whole, tokens=11)
    expected, got = (run_chain(folder, "prefill", inputs) for folder in (whole, parts))
    step = next_inputs(inputs, expected, tokens=11)
    decoded = [run_chain(folder, "decode", step) for folder in (whole, parts)]
    for one, other in ((expected, got), decoded):
        assert one.keys() == other.keys()
        for name, value in one.items():
            # the same operations in the same order; onnxruntime may fuse across a cut
            np.testing.assert_allclose(other[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


def test_parts_hold_each_layer_once(exported: Callable[[int], Path]) -> None:
    io = json.loads((exported(3) / "io.json").read_text())
    assert io["parts"] == {
        base: [f"{base}.{number}" for number in range(3)] for base in ("prefill", "decode")
    }
    states = [s["input"] for name in io["parts"]["prefill"] for s in io["graphs"][name]["states"]]
    whole = json.loads((exported(1) / "io.json").read_text())
    assert whole["parts"] == {"prefill": ["prefill"], "decode": ["decode"]}
    assert states == [s["input"] for s in whole["graphs"]["prefill"]["states"]]


@pytest.mark.parametrize(
    ("sizes", "num_parts", "expected"),
    [
        ([5, 5, 5, 5], 2, [range(0, 2), range(2, 4)]),
        ([5, 5, 5, 5], 1, [range(0, 4)]),
        ([1, 1, 1, 9], 2, [range(0, 3), range(3, 4)]),
        ([9, 1, 1, 1], 2, [range(0, 1), range(1, 4)]),
        ([1, 1, 100], 3, [range(0, 1), range(1, 2), range(2, 3)]),
        ([100, 1, 1], 3, [range(0, 1), range(1, 2), range(2, 3)]),
    ],
)
def test_cuts_leave_about_equal_weights(
    sizes: list[int], num_parts: int, expected: list[range]
) -> None:
    assert split_layers(sizes, num_parts) == expected
    assert largest_part(sizes, num_parts) == max(sum(sizes[i] for i in part) for part in expected)


@pytest.mark.parametrize("num_parts", [0, 4])
def test_more_parts_than_layers_are_refused(num_parts: int) -> None:
    with pytest.raises(EngineError, match=f"--parts {num_parts}: the language model has 3 layers"):
        split_layers([1, 1, 1], num_parts)


def test_norm_and_head_belong_to_the_last_layer() -> None:
    prefix = "language_model.backbone"
    sizes = {
        f"{prefix}.embeddings.weight": 1000,
        f"{prefix}.layers.0.mixer.up_proj.weight": 5,
        f"{prefix}.layers.0.norm.weight": 1,
        f"{prefix}.layers.10.mixer.up_proj.weight": 7,
        f"{prefix}.layers.9.mixer.up_proj.weight": 6,
        f"{prefix}.norm_f.weight": 2,
        "language_model.lm_head.weight": 50,
        "mlp1.1.weight": 1000,
    }
    assert layer_sizes(sizes) == [6, 6, 59]
