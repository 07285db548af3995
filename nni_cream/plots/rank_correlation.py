"""Accuracy by itself against accuracy with shared weights, of the same paths, for one or several searches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from nni_cream.kendall import LEVEL
from nni_cream.plots.style import COLOURS, QUIET, TEXT_SIZE, TITLE_SIZE, inches, keep_limits, our_style

# Inches.
_SIDE: Final = 3.3
_LEFT: Final = 0.85
_RIGHT: Final = 0.25
_ABOVE: Final = 0.55
_BELOW: Final = 0.65
_HEAD: Final = 0.65
_LEAST_WIDTH: Final = 6.0
_COLUMNS: Final = 3
# Of a name, what has room above a panel.
_NAME_CHARACTERS: Final = 30
# Points.
_MARKER: Final = 6


@dataclass(frozen=True)
class Panel:
    """What one search says of the paths.

    Attributes:
        name: of the search.
        shared: accuracy of every path with its shared weights, in [0, 1].
        images: how many they were measured on.
        tau: Kendall's τ and its interval, as text.
    """

    name: str
    shared: Sequence[float]
    images: int
    tau: str


def draw_rank_correlation(panels: Sequence[Panel], alone: Sequence[float], images: int) -> Figure:
    """Draw a panel for every search, in which each path is a point.

    Args:
        panels: one a search.
        alone: accuracy of every path trained by itself, in [0, 1], in the order of the panels' paths.
        images: how many a trained network was tested on.

    Returns:
        A figure with the ids (``gid``) ``paths`` of the points and ``errors`` of the bars, one standard error to each
        side, in every panel. All have the same y axis.
    """
    columns = min(len(panels), _COLUMNS)
    rows = -(-len(panels) // columns)
    across, down = _LEFT + _SIDE + _RIGHT, _ABOVE + _SIDE + _BELOW
    width, height = max(_LEAST_WIDTH, columns * across), _HEAD + rows * down
    with our_style():
        figure = Figure(figsize=(width, height), facecolor="white")
        top = height - 0.12
        figure.text(
            0.15 / width,
            top / height,
            "Do shared weights rank networks as training does?",
            fontsize=TITLE_SIZE,
            fontweight="bold",
            va="top",
        )
        figure.text(
            0.15 / width,
            (top - 0.25) / height,
            f"Kendall's τ with its {LEVEL} % interval; bars: ± one standard error of the images",
            color=QUIET,
            va="top",
        )
        for number, panel in enumerate(panels):
            row, column = divmod(number, columns)
            bottom = height - _HEAD - (row + 1) * down + _BELOW
            axes = figure.add_axes(inches(figure, _LEFT + column * across, bottom, _SIDE, _SIDE))
            _draw(axes, panel, alone, images, COLOURS[number % len(COLOURS)])
    return figure


def _draw(axes: Axes, panel: Panel, alone: Sequence[float], images: int, colour: str) -> None:
    points = [(100 * x, 100 * y) for x, y in zip(panel.shared, alone, strict=True)]
    for (x, y), of_x, of_y in zip(points, panel.shared, alone, strict=True):
        wide, high = 100 * _standard_error(of_x, panel.images), 100 * _standard_error(of_y, images)
        for ends in (([x - wide, x + wide], [y, y]), ([x, x], [y - high, y + high])):
            axes.plot(*ends, color="#c8c8c8", linewidth=1, zorder=1, gid="errors")
    axes.plot(
        *zip(*points, strict=True),
        "o",
        markersize=_MARKER,
        markerfacecolor=colour,
        markeredgecolor="white",
        markeredgewidth=0.7,
        zorder=2,
        gid="paths",
    )
    name = panel.name if len(panel.name) <= _NAME_CHARACTERS else f"{panel.name[: _NAME_CHARACTERS - 1]}…"
    axes.set_title(f"{name}\nτ = {panel.tau}", fontsize=TEXT_SIZE, pad=6)
    axes.set_xlabel(f"with shared weights (% of {panel.images:,} images)")
    axes.set_ylabel(f"trained by itself (% of {images:,} images)")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.6g}"))
    axes.set_xlim(axes.get_xlim())
    keep_limits(axes)


def _standard_error(share: float, images: int) -> float:
    return math.sqrt(share * (1 - share) / images)
