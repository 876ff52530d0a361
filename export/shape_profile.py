"""The range of every dynamic dimension that an engine is built for.

A graph leaves dimensions open by a word (``tokens``, ``tiles``); an engine needs the smallest, the
usual and the largest value of each. The defaults come with the graphs, in ``io.json``, and
``--shape`` replaces them one by one, as far as the graphs allow.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from nvvl.errors import EngineError
from nvvl.export.engine_graphs import GraphInfo, GraphSet
from nvvl.export.engine_worker import ShapeRange


class Span(NamedTuple):
    """Smallest, usual and largest value of one dynamic dimension."""

    low: int
    usual: int
    high: int

    def __str__(self) -> str:
        return f"{self.low}:{self.usual}:{self.high}"


def parse_spans(options: Sequence[str]) -> dict[str, Span]:
    """Read ``--shape`` options such as ``tokens=1:512:2048``.

    Raises:
        EngineError: if one has another form or order, or a dimension is given twice.
    """
    spans: dict[str, Span] = {}
    for option in options:
        match = re.fullmatch(r"(\w+)=(\d+):(\d+):(\d+)", option)
        if match is None:
            raise EngineError(
                f"--shape {option}: required DIMENSION=SMALLEST:USUAL:LARGEST, such as "
                "tokens=1:512:2048"
            )
        name, span = match[1], Span(int(match[2]), int(match[3]), int(match[4]))
        if name in spans:
            raise EngineError(f"--shape {option}: {name} is given twice")
        if not span.low <= span.usual <= span.high or span.high == 0:
            raise EngineError(
                f"--shape {option}: required smallest <= usual <= largest, and a largest above 0"
            )
        spans[name] = span
    return spans


def choose_spans(graphs: GraphSet, given: Mapping[str, Span]) -> dict[str, Span]:
    """Return the span of every dynamic dimension of a folder's graphs.

    Args:
        graphs: The graphs, with their defaults.
        given: Spans to take instead.

    Raises:
        EngineError: if one is of no dimension, or goes beyond what the model can hold.
    """
    defaults = {name: Span(*values) for name, values in graphs.io["dimensions"].items()}
    unknown = sorted(given.keys() - defaults.keys())
    if unknown:
        raise EngineError(
            f"--shape {unknown[0]}: the graphs have no such dimension; they have "
            f"{', '.join(sorted(defaults))}"
        )
    for name, span in given.items():
        low = defaults[name].low
        if span.low < low or (span.low > low and low == 0):
            raise EngineError(
                f"--shape {name}={span}: the smallest must be {low}"
                + (", which is where a conversation begins" if low == 0 else " or more")
            )
    capacity: int = graphs.io["model"]["kv_capacity"]
    for name in ("tokens", "past_tokens"):
        if name in given and given[name].high > capacity:
            raise EngineError(
                f"--shape {name}={given[name]}: the graphs hold {capacity} tokens of prompt and "
                "answer; lower it, or export graphs with a larger kv_capacity"
            )
    return {**defaults, **given}


def make_shape_profile(graph: GraphInfo, spans: Mapping[str, Span]) -> dict[str, ShapeRange]:
    """Return the range of shapes of each input that has a dynamic dimension.

    Args:
        graph: The graph to be built.
        spans: Of dimensions, by word; those of other graphs may be among them.

    Raises:
        EngineError: if a dimension has no span.
    """
    missing = sorted(graph.symbols - spans.keys())
    if missing:
        raise EngineError(
            f"{graph.path}: io.json gives no range of {', '.join(missing)}; export the graphs again"
        )
    profile: dict[str, ShapeRange] = {}
    for name, shape in graph.inputs.items():
        if any(isinstance(dim, str) for dim in shape):
            ranges = [spans[dim] if isinstance(dim, str) else Span(dim, dim, dim) for dim in shape]
            low, usual, high = zip(*ranges, strict=True)
            profile[name] = (low, usual, high)
    return profile
