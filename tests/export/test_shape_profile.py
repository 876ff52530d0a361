"""Ranges of dynamic dimensions: those of the graphs, or the user's where the graphs allow them."""

from pathlib import Path

import pytest

from nvvl.errors import EngineError
from nvvl.export.engine_graphs import GraphInfo, GraphSet
from nvvl.export.shape_profile import Span, choose_spans, make_shape_profile, parse_spans

GROWING = GraphInfo(
    path=Path("decode.onnx"),
    inputs={
        "inputs_embeds": ("batch", 1, 8),
        "positions": (1,),
        "past_key.0": ("batch", 2, "past_tokens", 4),
    },
    weights={},
    precisions=frozenset({"bf16"}),
    data_files=(),
)
DIMENSIONS = {"batch": [1, 1, 4], "past_tokens": [0, 10, 64], "tokens": [1, 8, 32]}


@pytest.fixture
def graphs() -> GraphSet:
    io = {"dimensions": DIMENSIONS, "model": {"kv_capacity": 64}}
    return GraphSet(folder=Path("graphs"), io=io, manifest={}, infos={"decode": GROWING})


def test_profile_has_every_input_with_a_dynamic_dimension(graphs: GraphSet) -> None:
    spans = choose_spans(graphs, {"batch": Span(1, 2, 8)})
    assert make_shape_profile(GROWING, spans) == {
        "inputs_embeds": ((1, 1, 8), (2, 1, 8), (8, 1, 8)),
        "past_key.0": ((1, 2, 0, 4), (2, 2, 10, 4), (8, 2, 64, 4)),
    }


def test_options_are_read() -> None:
    assert parse_spans(["tokens=1:512:2048", "batch=2:2:2"]) == {
        "tokens": Span(1, 512, 2048),
        "batch": Span(2, 2, 2),
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["tokens"], "--shape tokens: required DIMENSION=SMALLEST:USUAL:LARGEST"),
        (["tokens=1:2"], "--shape tokens=1:2: required"),
        (["tokens=1:-2:3"], "required DIMENSION"),
        (["tokens=4:2:8"], "--shape tokens=4:2:8: required smallest <= usual <= largest"),
        (["tokens=0:0:0"], "a largest above 0"),
        (["tokens=1:9:8"], "required smallest <= usual"),
        (["batch=1:1:1", "batch=1:1:2"], "batch is given twice"),
    ],
)
def test_impossible_options_are_refused(options: list[str], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        parse_spans(options)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"height": Span(1, 1, 1)}, "--shape height: the graphs have no such dimension; they have"),
        ({"tokens": Span(1, 8, 65)}, "--shape tokens=1:8:65: the graphs hold 64 tokens"),
        ({"tokens": Span(0, 8, 16)}, "--shape tokens=0:8:16: the smallest must be 1 or more"),
        ({"past_tokens": Span(1, 8, 64)}, "must be 0, which is where a conversation begins"),
        ({"past_tokens": Span(0, 8, 100)}, "export graphs with a larger kv_capacity"),
    ],
)
def test_shapes_that_contradict_the_model_are_refused(
    graphs: GraphSet, given: dict[str, Span], message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        choose_spans(graphs, given)


def test_dimension_without_range_is_refused() -> None:
    with pytest.raises(EngineError, match=r"io\.json gives no range of past_tokens; export"):
        make_shape_profile(GROWING, {"batch": Span(1, 1, 1)})
