"""Marks of charts, antialiased by matplotlib: lines with markers, areas, sectors.

Texts stay with `nvvl.calib_data.drawing.Canvas`, which knows where each glyph lies. No axes and no
``pyplot`` are used, and every property that a user's ``matplotlibrc`` could change is given, so the
pixels follow from the version of matplotlib alone. Coordinates are those of the canvas: pixels, y
downwards.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from nvvl.calib_data.drawing import Canvas, Color

if TYPE_CHECKING:
    from matplotlib.artist import Artist

Point = tuple[float, float]

# At 72 dots an inch a point, matplotlib's unit of widths, is a pixel.
_DPI = 72


class Marks:
    """What will be drawn onto one canvas, in order."""

    def __init__(self, canvas: Canvas) -> None:
        """Begin without any mark."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self._canvas = canvas
        size = canvas.width / _DPI, canvas.height / _DPI
        self._figure = Figure(figsize=size, dpi=_DPI, facecolor="none", edgecolor="none")
        self._agg = FigureCanvasAgg(self._figure)

    def line(
        self,
        points: Sequence[Point],
        color: Color,
        *,
        width: float,
        dash: Sequence[float] = (),
        marker: str = "",
        marker_size: float = 0,
    ) -> None:
        """Add a line through points.

        Args:
            points: At least two.
            color: Of line and markers.
            width: Of the line in pixels.
            dash: Pixels drawn and left out in turn; nothing for a line without gaps.
            marker: Matplotlib's letter of the marker at each point, or nothing.
            marker_size: In pixels.
        """
        from matplotlib import rc_context
        from matplotlib.lines import Line2D

        with rc_context({"lines.scale_dashes": False}):  # the one setting that no argument has
            drawn = Line2D(
                *np.transpose([self._flip(point) for point in points]),
                color=_rgb(color),
                linewidth=width,
                linestyle=(0, tuple(dash)) if dash else "-",
                dash_capstyle="butt",
                solid_capstyle="round",
                dash_joinstyle="round",
                solid_joinstyle="round",
                marker=marker or "None",
                markersize=marker_size,
                markerfacecolor=_rgb(color),
                markeredgecolor=_rgb(color),
                markeredgewidth=0,
                fillstyle="full",
                antialiased=True,
            )
        self._add(drawn)

    def area(self, points: Sequence[Point], color: Color, *, opacity: float) -> None:
        """Fill a polygon."""
        from matplotlib.patches import Polygon

        corners = np.array([self._flip(point) for point in points])
        self._add(Polygon(corners, closed=True, facecolor=(*_rgb(color), opacity), linewidth=0))

    def sector(
        self,
        center: Point,
        radius: float,
        angles: tuple[float, float],
        color: Color,
        *,
        edge: Color,
        ring: float | None = None,
    ) -> None:
        """Add a sector of a circle.

        Args:
            center: Of the circle.
            radius: In pixels.
            angles: Start and end in degrees, counted from the right against the clock.
            color: Of its area.
            edge: Of its outline.
            ring: Width in pixels of the part of the radius that is filled; all of it if None.
        """
        from matplotlib.patches import Wedge

        drawn = Wedge(
            self._flip(center),
            radius,
            *angles,
            width=ring,
            facecolor=_rgb(color),
            edgecolor=_rgb(edge),
            linewidth=1,
            linestyle="-",
            joinstyle="round",
            antialiased=True,
        )
        self._add(drawn)

    def draw(self) -> None:
        """Draw all marks onto the canvas."""
        self._agg.draw()
        marks = Image.fromarray(np.asarray(self._agg.buffer_rgba()))
        self._canvas.image.paste(marks.convert("RGB"), mask=marks.getchannel("A"))

    def _add(self, artist: "Artist") -> None:
        from matplotlib.transforms import IdentityTransform

        artist.set_transform(IdentityTransform())
        artist.set_snap(False)
        artist.set_sketch_params(None)
        artist.set_path_effects([])
        self._figure.add_artist(artist)

    def _flip(self, point: Point) -> Point:
        return point[0], self._canvas.height - point[1]


def on_circle(center: Point, radius: float, degrees: float) -> Point:
    """Return the point of a circle at an angle, counted as in `Marks.sector`."""
    radians = math.radians(degrees)
    return center[0] + radius * math.cos(radians), center[1] - radius * math.sin(radians)


def _rgb(color: Color) -> tuple[float, float, float]:
    red, green, blue = color
    return red / 255, green / 255, blue / 255
