"""Geometry of sweeps and of noise along depth, in the frame of `nvvl.reports.plots`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nvvl.reports.compare import Interval
from nvvl.reports.curves import Depth, LayerNoise, Point, Sweep
from nvvl.reports.plots import Line, Mark, Scatter, frame, nice_ticks, shape_of, ticks

_KL_NAMES = ("up to this layer", "this layer alone")


@dataclass(frozen=True, kw_only=True)
class SweepPlots:
    """A sweep, ready to draw.

    Attributes:
        labels: of the models; the place gives colour and shape.
        plots: accuracy, then visual tokens, of each suite.
    """

    sweep: Sweep
    labels: tuple[str, ...]
    plots: tuple[Scatter, ...]


@dataclass(frozen=True, kw_only=True)
class DepthPlots:
    """Noise along depth, ready to draw.

    Attributes:
        plots: SQNR, then KL, of each model.
        kl_names: of the two curves of KL; the place gives colour and shape.
    """

    depth: Depth
    plots: tuple[Scatter, ...]
    kl_names: tuple[str, ...] = _KL_NAMES


@dataclass(frozen=True)
class _Dot:
    """A measured point before it has a place."""

    x: float
    y: Interval
    hint: str
    note: str = ""


def plot_sweep(sweep: Sweep) -> SweepPlots:
    """Lay out accuracy and visual tokens against tokens a second, for each suite."""
    labels = tuple(dict.fromkeys(point.label for point in sweep.points))
    plots = []
    for suite, metric in sweep.metrics.items():
        curves = [
            [point for point in sweep.points if (point.suite, point.label) == (suite, label)]
            for label in labels
        ]
        for y_label, height in (
            (f"{metric.replace('_', ' ')}, %", _percent),
            ("visual tokens a prompt", _visual_tokens),
        ):
            plots.append(_plot_points(sweep, suite, y_label, curves, height))
    return SweepPlots(sweep=sweep, labels=labels, plots=tuple(plots))


def plot_depth(depth: Depth) -> DepthPlots:
    """Lay out SQNR and KL along the layers, for each model."""
    plots = []
    for label, layers in depth.layers.items():
        noisy = [(layer, layer.sqnr_db) for layer in layers if layer.sqnr_db is not None]
        if noisy:
            dots = [
                _Dot(layer.layer, _exact(db), f"layer {layer.layer}, {layer.kind}: {db:.1f} dB")
                for layer, db in noisy
            ]
            plots.append(_draw(f"{label}: hidden states", "layer", "SQNR, dB", [dots]))
        plots.append(
            _draw(
                f"{label}: KL of the output",
                "layer",
                "KL to BF16, nats",
                [
                    [_kl_dot(layer, layer.kl_through, _KL_NAMES[0]) for layer in layers],
                    [_kl_dot(layer, layer.kl_alone, _KL_NAMES[1]) for layer in layers],
                ],
                least=0.0,
            )
        )
    return DepthPlots(depth=depth, plots=tuple(plots))


def _plot_points(
    sweep: Sweep,
    suite: str,
    y_label: str,
    curves: Sequence[Sequence[Point]],
    height: Callable[[Point], Interval],
) -> Scatter:
    dots = [
        [
            _Dot(
                point.speed.tokens_per_s.median,
                height(point),
                _describe(sweep, point),
                _name_value(sweep, point.value),
            )
            for point in curve
        ]
        for curve in curves
    ]
    return _draw(suite.replace("_", " "), "tokens/s, one question at a time", y_label, dots)


def _draw(
    title: str,
    x_label: str,
    y_label: str,
    curves: Sequence[Sequence[_Dot]],
    *,
    least: float | None = None,
) -> Scatter:
    """Put curves into a frame that holds all of their intervals."""
    everything = [dot for curve in curves for dot in curve]
    x_values, lows = [dot.x for dot in everything], [dot.y.low for dot in everything]
    x_ticks = nice_ticks(min(x_values), max(x_values), 6)
    low = min(lows) if least is None else min(least, *lows)
    y_ticks = nice_ticks(low, max(dot.y.high for dot in everything), 5)
    x, y = frame(x_ticks, y_ticks)
    lines, marks = [], []
    for series, curve in enumerate(curves):
        lines.append(Line(tuple((x(dot.x), y(dot.y.estimate)) for dot in curve), series))
        marks += [
            Mark(
                x=x(dot.x),
                y=y(dot.y.estimate),
                low=y(dot.y.low),
                high=y(dot.y.high),
                shape=shape_of(series),
                series=series,
                hint=dot.hint,
                note=dot.note if series == 0 else "",  # one curve is named, the others follow it
            )
            for dot in curve
        ]
    return Scatter(
        title=title,
        summary="; ".join(dot.hint for dot in everything),
        x_label=x_label,
        y_label=y_label,
        x_ticks=ticks(x, x_ticks),
        y_ticks=ticks(y, y_ticks),
        marks=tuple(marks),
        lines=tuple(lines),
    )


def _percent(point: Point) -> Interval:
    score = point.score
    return Interval(100 * score.estimate, 100 * score.low, 100 * score.high, score.n)


def _visual_tokens(point: Point) -> Interval:
    return _exact(point.visual_tokens)


def _exact(value: float) -> Interval:
    return Interval(value, value, value, 1)


def _kl_dot(layer: LayerNoise, kl: Interval, name: str) -> _Dot:
    hint = f"layer {layer.layer}, {layer.kind}, {name}: {kl.estimate:.2g} nats"
    return _Dot(layer.layer, kl, hint)


def _name_value(sweep: Sweep, value: float) -> str:
    if sweep.kind == "evs":
        return f"{100 * value:g} % off"
    return f"{value:g} {'tile' if value == 1 else 'tiles'}"


def _describe(sweep: Sweep, point: Point) -> str:
    score, speed = _percent(point), point.speed
    return (
        f"{point.label}, {_name_value(sweep, point.value)}: {score.estimate:.1f} % "
        f"[{score.low:.1f}, {score.high:.1f}], {point.visual_tokens:.0f} visual tokens, "
        f"{speed.tokens_per_s.median:.1f} tokens/s"
    )
