"""Geometry of the report's plots; the templates draw them as SVG.

Two kinds: scatter plots in a fixed frame (accuracy against size, noise against depth), and a forest
plot, whose rows are drawn over the width of their column, in per cent of one common scale. Colours
and fonts are the page's own, so the plots follow light and dark.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from nvvl.reports.collect import Report, RunScore
from nvvl.reports.compare import Interval

# The frame of a scatter plot, in SVG units; they are CSS pixels on a narrow screen.
WIDTH, HEIGHT = 360, 230
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 12, 38

_DB_MARGIN = 1.0  # keeps marks off the edge of the frame
_MARK_WIDTH = 10
_MIN_POINTS = 10.0  # a narrower range of scores would blow up what is no difference

_KINDS = {
    "Mamba": ("in_proj", "out_proj"),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "MLP": ("up_proj", "down_proj"),
}
_OTHER_KIND = "other"
SHAPES = {"Mamba": "circle", "attention": "square", "MLP": "triangle", _OTHER_KIND: "diamond"}
_RUN_SHAPES = ("circle", "square", "triangle", "diamond")
_NUMBERED = re.compile(r"(.*?)\.(\d{1,9})(?:\.|$)")


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis."""

    at: float
    text: str


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A point of a scatter plot, in SVG units.

    Attributes:
        low: y of the lower end of its interval; equal to y without one.
        series: number of the run, which decides the colour.
        hint: shown by a pointer that rests on it.
        note: written beside it.
    """

    x: float
    y: float
    low: float
    high: float
    shape: str
    series: int
    hint: str
    note: str = ""


@dataclass(frozen=True)
class Line:
    """A line through points (x, y) of one series."""

    points: tuple[tuple[float, float], ...]
    series: int


@dataclass(frozen=True, kw_only=True)
class Scatter:
    """A scatter plot, with lines where its marks are points of curves."""

    title: str
    summary: str
    x_label: str
    y_label: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    marks: tuple[Mark, ...]
    lines: tuple[Line, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ForestRow:
    """One difference with its interval, in per cent of the width."""

    label: str
    series: int
    low: float
    middle: float
    high: float
    differs: bool
    points: Interval
    num_gained: int
    num_lost: int
    p_value: float


@dataclass(frozen=True, kw_only=True)
class Forest:
    """Paired differences of every run and suite on one scale."""

    ticks: tuple[Tick, ...]
    zero: float
    suites: tuple[tuple[str, tuple[ForestRow, ...]], ...]


@dataclass(frozen=True)
class _Scale:
    """A linear map from values onto a line of the drawing."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def plot_forest(report: Report) -> Forest | None:
    """Lay out the differences to the baseline; None if there is only the baseline."""
    if sum(bool(run.suites) for run in report.runs) < 2:
        return None
    pairs = [(run, suite) for run in report.runs[1:] for suite in run.suites]
    intervals = [_points(run, suite) for run, suite in pairs]
    ticks = nice_ticks(
        min(-1.0, *(i.low for i in intervals)), max(1.0, *(i.high for i in intervals)), 6
    )
    step = ticks[1] - ticks[0]
    scale = _Scale(ticks[0] - step / 4, ticks[-1] + step / 4, 0.0, 100.0)
    return Forest(
        ticks=tuple(Tick(scale(value), f"{_format(value, step, signed=True)}") for value in ticks),
        zero=scale(0.0),
        suites=tuple(
            (
                suite,
                tuple(
                    _forest_row(run, suite, series, scale)
                    for series, run in enumerate(report.runs)
                    if series and run.suites
                ),
            )
            for suite in report.runs[0].suites
        ),
    )


def plot_sizes(report: Report) -> list[Scatter]:
    """Lay out each suite's score against the size of the weights."""
    sizes = [run.weights_bytes / 1e6 for run in report.runs]
    unit, sizes = ("GB", [size / 1e3 for size in sizes]) if max(sizes) >= 2e3 else ("MB", sizes)
    plots = []
    for suite, baseline in report.runs[0].suites.items():
        scores = [run.suites[suite].score for run in report.runs if run.suites]
        low, high = 100 * min(s.low for s in scores), 100 * max(s.high for s in scores)
        name = suite.replace("_", " ")
        metric = baseline.metric.replace("_", " ")
        x_ticks = nice_ticks(0.0, max(sizes), 5)
        y_ticks = nice_ticks(min(low, high - _MIN_POINTS), high, 5)
        x, y = frame(x_ticks, y_ticks)
        marks = [
            Mark(
                x=x(size),
                y=y(100 * score.estimate),
                low=y(100 * score.low),
                high=y(100 * score.high),
                shape=shape_of(series),
                series=series,
                hint=f"{run.label}: {size:.2f} {unit}, {100 * score.estimate:.1f} % "
                f"[{100 * score.low:.1f}, {100 * score.high:.1f}]",
            )
            for series, (run, size) in enumerate(zip(report.runs, sizes, strict=True))
            if run.suites
            for score in [run.suites[suite].score]
        ]
        plots.append(
            Scatter(
                title=name,
                summary="; ".join(mark.hint for mark in marks),
                x_label=f"weights on disk, {unit}",
                y_label=f"{metric}, %",
                x_ticks=ticks(x, x_ticks),
                y_ticks=ticks(y, y_ticks),
                marks=tuple(_spread(marks)),
            )
        )
    return plots


def plot_noise(sqnr_db: Mapping[str, Mapping[str, float]], labels: Sequence[str]) -> list[Scatter]:
    """Lay out the SQNR of each weight along the depth, a plot for each run and stack of layers.

    Args:
        sqnr_db: by run label and module name, in dB.
        labels: of all runs; the place gives the colour.
    """
    everything = [value for values in sqnr_db.values() for value in values.values()]
    if not everything:
        return []
    y_ticks = nice_ticks(min(everything) - _DB_MARGIN, max(everything) + _DB_MARGIN, 6)
    plots = []
    for label, values in sqnr_db.items():
        for stack, modules in _by_stack(values).items():
            plots.append(_plot_stack(label, labels.index(label), stack, modules, y_ticks))
    return plots


def nice_ticks(low: float, high: float, num: int) -> list[float]:
    """Return about ``num`` round values, evenly spaced, that enclose a range."""
    span = max(high - low, 1e-9 * max(abs(low), abs(high)), 1e-6)
    power = 10.0 ** math.floor(math.log10(span / num))
    step = next(power * factor for factor in (1, 2, 5, 10, 20) if power * factor * num >= span)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * index for index in range(first, max(last, first + 1) + 1)]


def shape_of(series: int) -> str:
    """Return the shape of a run's mark, so that colour is not all that tells runs apart."""
    return _RUN_SHAPES[series % len(_RUN_SHAPES)]


def kind_of(module: str) -> str:
    """Return what kind of layer a linear belongs to, as the plots tell them apart."""
    leaf = module.rsplit(".", 1)[-1]
    return next((kind for kind, leaves in _KINDS.items() if leaf in leaves), _OTHER_KIND)


def _by_stack(values: Mapping[str, float]) -> dict[str, list[tuple[int, str, float]]]:
    """Group weights by the list of layers they are in: (layer, module, dB), sorted."""
    stacks: dict[str, list[tuple[int, str, float]]] = {}
    for module, value in values.items():
        match = _NUMBERED.match(module)
        stack, layer = (match[1], int(match[2])) if match else (module, 0)
        stacks.setdefault(stack, []).append((layer, module, value))
    return {stack: sorted(modules) for stack, modules in stacks.items()}


def _plot_stack(
    label: str,
    series: int,
    stack: str,
    modules: Sequence[tuple[int, str, float]],
    y_ticks: Sequence[float],
) -> Scatter:
    x_ticks = nice_ticks(0, max(layer for layer, _, _ in modules), 6)
    x_ticks = [tick for tick in x_ticks if tick == int(tick)]
    x, y = frame([x_ticks[0] - 0.5, max(x_ticks[-1], modules[-1][0]) + 0.5], y_ticks)
    worst = min(modules, key=lambda entry: entry[2])
    mean = sum(value for _, _, value in modules) / len(modules)
    return Scatter(
        title=f"{label}, {stack}",
        summary=f"{len(modules)} weights, mean {mean:.1f} dB, lowest {worst[2]:.1f} dB "
        f"in {worst[1]}",
        x_label="layer",
        y_label="SQNR, dB",
        x_ticks=ticks(x, x_ticks),
        y_ticks=ticks(y, y_ticks),
        marks=tuple(
            Mark(
                x=x(layer),
                y=y(value),
                low=y(value),
                high=y(value),
                shape=SHAPES[kind_of(module)],
                series=series,
                hint=f"{module}: {value:.1f} dB",
            )
            for layer, module, value in modules
        ),
    )


def _points(run: RunScore, suite: str) -> Interval:
    """Return a difference in percentage points."""
    difference = run.suites[suite].difference
    assert difference is not None, "every run but the first has differences"
    score = difference.score
    return Interval(100 * score.estimate, 100 * score.low, 100 * score.high, score.n)


def _forest_row(run: RunScore, suite: str, series: int, scale: _Scale) -> ForestRow:
    points, difference = _points(run, suite), run.suites[suite].difference
    assert difference is not None
    return ForestRow(
        label=run.label,
        series=series,
        low=scale(points.low),
        middle=scale(points.estimate),
        high=scale(points.high),
        differs=points.low > 0 or points.high < 0,
        points=points,
        num_gained=difference.num_gained,
        num_lost=difference.num_lost,
        p_value=difference.p_value,
    )


def frame(x_values: Sequence[float], y_values: Sequence[float]) -> tuple[_Scale, _Scale]:
    """Return the maps of two ranges, given by their first and last value, onto the frame."""
    x = _Scale(x_values[0], x_values[-1], LEFT, WIDTH - RIGHT)
    return x, _Scale(y_values[0], y_values[-1], HEIGHT - BOTTOM, TOP)


def ticks(scale: _Scale, values: Sequence[float]) -> tuple[Tick, ...]:
    """Label evenly spaced values on an axis."""
    step = values[1] - values[0] if len(values) > 1 else 1.0
    return tuple(Tick(scale(value), _format(value, step)) for value in values)


def _format(value: float, step: float, *, signed: bool = False) -> str:
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    text = f"{value:{'+' if signed else ''}.{decimals}f}"
    return (text if float(text) else f"{0:.{decimals}f}").replace("-", "\N{MINUS SIGN}")


def _spread(marks: Sequence[Mark]) -> list[Mark]:
    """Move marks to the right until none covers another; formats of one size would else do."""
    spread: list[Mark] = []
    for mark in sorted(marks, key=lambda mark: (mark.x, mark.series)):
        least = spread[-1].x + _MARK_WIDTH if spread else mark.x
        spread.append(replace(mark, x=max(mark.x, least)))
    return spread
