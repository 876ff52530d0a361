"""Sweeps as tables for the terminal."""

from rich import box
from rich.table import Table

from nvvl.reports.compare import Interval
from nvvl.reports.curves import Depth, Spread, Sweep


def sweep_table(sweep: Sweep) -> Table:
    """Return the points of a sweep as a rich table."""
    title = (
        f"{sweep.num_items:,} items a suite, seed {sweep.seed}; times of {sweep.num_timed} of them "
        f"on {sweep.machine}, {sweep.dtype}"
    )
    table = Table(
        title=title,
        caption="\n".join((*sweep.notes, "brackets: 95 % intervals; of times: quartiles")),
        box=box.SIMPLE_HEAD,
    )
    setting = "EVS rate" if sweep.kind == "evs" else "most tiles"
    for name in ("suite", "model", setting):
        table.add_column(name, overflow="fold")
    for name in ("score, %", "change", "visual tokens", "first token, ms", "tokens/s"):
        table.add_column(name, justify="right", overflow="fold")
    for point in sweep.points:
        table.add_row(
            point.suite.replace("_", " "),
            point.label,
            f"{point.value:g}",
            _interval(point.score, 100),
            _interval(point.difference, 100, signed=True),
            f"{point.visual_tokens:.0f}",
            _spread(point.speed.first_token_ms),
            _spread(point.speed.tokens_per_s),
        )
    return table


def depth_table(depth: Depth) -> Table:
    """Return the curves along depth as a rich table."""
    title = f"{depth.num_items} items of each of {', '.join(depth.suites)}, seed {depth.seed}"
    table = Table(title=title, caption="brackets: 95 % intervals", box=box.SIMPLE_HEAD)
    for name in ("model", "layer", "kind"):
        table.add_column(name, overflow="fold")
    for name in ("SQNR, dB", "KL up to here, nats", "KL of this alone, nats"):
        table.add_column(name, justify="right", overflow="fold")
    for label, layers in depth.layers.items():
        for layer in layers:
            table.add_row(
                label,
                str(layer.layer),
                layer.kind,
                "equal" if layer.sqnr_db is None else f"{layer.sqnr_db:.1f}",
                _small(layer.kl_through),
                _small(layer.kl_alone),
            )
    return table


def _interval(value: Interval, factor: float, *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    low, middle, high = (factor * v for v in (value.low, value.estimate, value.high))
    return f"{middle:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def _small(value: Interval) -> str:
    return f"{value.estimate:.2g} [{value.low:.2g}, {value.high:.2g}]"


def _spread(value: Spread) -> str:
    return f"{value.median:.1f} [{value.low:.1f}, {value.high:.1f}]"
