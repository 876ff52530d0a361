"""Curves on disk: what ``nvvl sweep`` has measured and ``nvvl report`` draws.

``sweep-evs.json`` and ``sweep-tiles.json`` have accuracy against speed while one setting changes,
``depth.json`` noise along the layers. No torch here: curves are drawn from these files alone.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TypeVar, get_args

from nvvl.errors import DataError, OutputError, writing
from nvvl.reports.compare import Interval
from nvvl.reports.json_values import read_object

_Curves = TypeVar("_Curves")

SweepKind = Literal["evs", "tiles"]

CurveKind = Literal["evs", "tiles", "depth"]

DEPTH_NAME = "depth.json"


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of ``n`` measurements."""

    median: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How fast a model answered.

    Attributes:
        first_token_ms: from pixels to the first token.
        tokens_per_s: tokens written over the whole time, the first token's wait included.
        num_new_tokens: tokens written for each question.
    """

    first_token_ms: Spread
    tokens_per_s: Spread
    num_new_tokens: int


@dataclass(frozen=True, kw_only=True)
class Point:
    """One model on one suite, at one value of the setting.

    Attributes:
        value: pruning rate, or most tiles.
        score: of the suite's metric.
        difference: to the first value of the same model, item by item.
        kl: mean KL(teacher || model) in nats, the teacher being shown everything; None without one.
        visual_tokens: mean image tokens of a prompt.
    """

    label: str
    suite: str
    value: float
    score: Interval
    difference: Interval
    kl: Interval | None
    visual_tokens: float
    speed: Speed


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Curves of one setting.

    Attributes:
        metrics: metric of each suite.
        points: by suite, model and value, in this order.
        machine: what the times were taken on.
        num_timed: questions that were timed.
        notes: values that were left out, and what no value changes, in words.
    """

    kind: SweepKind
    metrics: dict[str, str]
    points: tuple[Point, ...]
    num_items: int
    num_timed: int
    seed: int
    dtype: str
    machine: str
    nvvl_version: str
    notes: tuple[str, ...] = ()

    @property
    def subjects(self) -> set[str]:
        """The labels of the models and the names of the suites."""
        return {point.label for point in self.points} | set(self.metrics)


@dataclass(frozen=True, kw_only=True)
class LayerNoise:
    """What quantization does at one layer.

    Attributes:
        kind: mamba, mlp or attention.
        sqnr_db: infinite where the hidden states are equal, written as null.
    """

    layer: int
    kind: str
    sqnr_db: float | None
    kl_through: Interval
    kl_alone: Interval


@dataclass(frozen=True, kw_only=True)
class Depth:
    """The curves of some models against their BF16 source.

    Attributes:
        layers: by label.
    """

    suites: tuple[str, ...]
    num_items: int
    seed: int
    dtype: str
    layers: dict[str, tuple[LayerNoise, ...]]
    nvvl_version: str

    @property
    def subjects(self) -> set[str]:
        """The labels of the models and the names of the suites."""
        return {*self.layers, *self.suites}


def curves_path(kind: CurveKind, out: Path) -> Path:
    """Return where the curves of a kind lie in a folder of ``nvvl sweep``."""
    return out / (DEPTH_NAME if kind == "depth" else f"sweep-{kind}.json")


def load_sweep(path: Path) -> Sweep:
    """Read a ``sweep-KIND.json``.

    Raises:
        DataError: if it is missing or something else, or lacks points of a suite.
    """
    sweep = _load(path, Sweep, "nvvl sweep")
    suites = {point.suite for point in sweep.points}
    if not suites or suites != set(sweep.metrics):
        raise DataError(
            f"{path}: required points of the suites that have a metric, "
            f"{', '.join(sweep.metrics) or 'none'}, got points of {', '.join(suites) or 'none'}; "
            "run nvvl sweep again"
        )
    return sweep


def load_depth(path: Path) -> Depth:
    """Read a ``depth.json``.

    Raises:
        DataError: if it is missing or something else, or lacks layers.
    """
    depth = _load(path, Depth, "nvvl sweep depth")
    if not depth.layers or not all(depth.layers.values()):
        raise DataError(
            f"{path}: required layers of each model, and a model; run nvvl sweep depth again"
        )
    return depth


def _load(path: Path, cls: type[_Curves], verb: str) -> _Curves:
    try:
        return read_object(cls, json.loads(path.read_text(encoding="utf-8")), "curves")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError, DataError) as error:
        raise DataError(f"{path}: required what {verb} has written ({error})") from None


def load_curves(out: Path) -> tuple[list[Sweep], list[Depth]]:
    """Read what a folder holds of sweeps and depths.

    Raises:
        DataError: if it holds neither, or one that is not what it should be.
    """
    paths = [curves_path(kind, out) for kind in get_args(SweepKind)]
    sweeps = [load_sweep(path) for path in paths if path.is_file()]
    depth = curves_path("depth", out)
    depths = [load_depth(depth)] if depth.is_file() else []
    if not sweeps and not depths:
        names = " and no ".join(path.name for path in (*paths, depth))
        raise DataError(f"{out}: has no {names}; give a folder of nvvl sweep")
    return sweeps, depths


def require_replaceable(
    kind: CurveKind, out: Path, subjects: Iterable[str], *, overwrite: bool
) -> None:
    """Refuse to replace curves that the new ones have no equal of.

    Args:
        kind: of the curves to be measured.
        out: the folder they are to be written to.
        subjects: labels of the models and names of the suites to be measured.
        overwrite: replace them all the same.

    Raises:
        OutputError: if curves of other models or suites are there.
        DataError: if what is there cannot be read.
    """
    path = curves_path(kind, out)
    if overwrite or not path.exists():
        return
    present: Sweep | Depth = load_depth(path) if kind == "depth" else load_sweep(path)
    lost = sorted(present.subjects - set(subjects))
    if lost:
        raise OutputError(
            f"{path}: has curves of {', '.join(lost)}, which would be lost; give another folder, "
            "measure them again with these, or say --overwrite"
        )


def write_curves(curves: Sweep | Depth, out: Path) -> None:
    """Write the file of curves into a folder, made if needed.

    Raises:
        OutputError: if it cannot be written.
    """
    path = curves_path(curves.kind if isinstance(curves, Sweep) else "depth", out)
    with writing(path):
        out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(curves), indent=2) + "\n", encoding="utf-8")
