"""Accuracy against cost of the paths that a Cream search ends with, and which of them no other one beats."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from nni_cream.plots.style import (
    COLOURS,
    INK,
    MACS,
    QUIET,
    TEXT_SIZE,
    TITLE_SIZE,
    CostAxis,
    inches,
    keep_limits,
    limits_of,
    our_style,
    widened,
)

# Inches.
_WIDTH: Final = 7.6
_HEIGHT: Final = 4.4
_LEFT: Final = 0.85
_RIGHT: Final = 0.3
_ABOVE: Final = 0.75
_BELOW: Final = 0.55
# Points.
_MARKER: Final = 9
_AWAY: Final = 11
# Where a rank may stand, in degrees: above to the left there is neither the line nor an error.
_TURNS: Final = (135, 45, 315, 225, 0, 180, 90, 270)


@dataclass(frozen=True)
class Measured:
    """A path as it was ranked: its accuracy in [0, 1], and what the budget counts of it."""

    accuracy: float
    cost: float


def front_of(paths: Sequence[Measured]) -> list[int]:
    """Return the positions of the paths than which none is as good and cheaper, or better and as cheap.

    The cheapest comes first. Of equals all belong to it.
    """
    front = [
        place
        for place, path in enumerate(paths)
        if not any(other.accuracy >= path.accuracy and other.cost <= path.cost and other != path for other in paths)
    ]
    return sorted(front, key=lambda place: (paths[place].cost, place))


def draw_pareto(paths: Sequence[Measured], budget: tuple[float, float], images: int, costs: CostAxis = MACS) -> Figure:
    """Draw accuracy against cost of paths, each with its rank, and the line of those that no other one beats.

    Args:
        paths: in the order of their ranks, the best first.
        budget: the least and the most cost that was asked for; a least one of 0 is no limit.
        images: how many the accuracies were measured on, from which their standard errors follow.
        costs: what the budget counts.

    Returns:
        A figure with the ids (``gid``) ``front`` and ``others`` of the points, ``stairs`` of the line, ``errors`` and
        ``budget``.
    """
    front = front_of(paths)
    with our_style():
        figure = Figure(figsize=(_WIDTH, _HEIGHT), facecolor="white")
        place = inches(figure, _LEFT, _BELOW, _WIDTH - _LEFT - _RIGHT, _HEIGHT - _ABOVE - _BELOW)
        axes = figure.add_axes(place)
        meaning: str | None = f"± one standard error of {images:,} images"
        for path in paths:
            error = math.sqrt(path.accuracy * (1 - path.accuracy) / images)
            ends = [100 * (path.accuracy - error), 100 * (path.accuracy + error)]
            across = [path.cost / costs.scale] * 2
            axes.plot(across, ends, color="#b0b0b0", linewidth=1.2, zorder=1, gid="errors", label=meaning)
            meaning = None
        stairs = [_point(paths[position], costs) for position in front]
        corners = [stairs[0]]
        for (_, below), (right, above) in itertools.pairwise(stairs):
            corners += [(right, below), (right, above)]
        axes.plot(*zip(*corners, strict=True), color=COLOURS[0], linewidth=1.2, zorder=2, gid="stairs")
        looks = (
            ("front", front, COLOURS[0], COLOURS[0], "beaten by no other"),
            ("others", [i for i in range(len(paths)) if i not in front], "white", QUIET, "beaten by another"),
        )
        for name, positions, fill, edge, meaning in looks:
            if positions:
                axes.plot(
                    *zip(*(_point(paths[position], costs) for position in positions), strict=True),
                    "o",
                    markersize=_MARKER,
                    markerfacecolor=fill,
                    markeredgecolor=edge,
                    label=meaning,
                    zorder=3,
                    gid=name,
                )
        for limit in limits_of(budget):
            axes.axvline(limit / costs.scale, color=QUIET, linewidth=1, linestyle=(0, (4, 3)), gid="budget")
        axes.set_xlabel(f"{costs.words} ({costs.unit}; dashed: the budget)")
        axes.set_ylabel("right answers (% of held-out images)")
        axes.set_title("Accuracy against cost of the paths on the board", fontsize=TITLE_SIZE, pad=26)
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(-0.01, 1.0),
            ncols=3,
            frameon=False,
            borderpad=0,
            handletextpad=0.4,
            columnspacing=1.6,
        )
        axes.set_xlim(widened(*axes.get_xlim()))
        axes.ticklabel_format(axis="x", style="plain", useOffset=False)
        keep_limits(axes)
        _write_ranks(axes, [_point(path, costs) for path in paths])
    return figure


def _point(path: Measured, costs: CostAxis) -> tuple[float, float]:
    return path.cost / costs.scale, 100 * path.accuracy


def _write_ranks(axes: Axes, points: Sequence[tuple[float, float]]) -> None:
    """Write the rank beside every point, where it touches no point and no other rank, if there is such a place."""
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    scale = figure.dpi / 72
    centres = [axes.transData.transform(point) for point in points]
    half = scale * _MARKER / 2
    taken = [Bbox([[x - half, y - half], [x + half, y + half]]) for x, y in centres]
    for rank, (x, y) in enumerate(centres, start=1):
        width, height = scale * 0.65 * TEXT_SIZE * len(str(rank)), scale * TEXT_SIZE
        boxes = []
        for distance, turn in itertools.product((_AWAY, 1.6 * _AWAY, 2.2 * _AWAY), _TURNS):
            angle = math.radians(turn)
            mid_x, mid_y = x + scale * distance * math.cos(angle), y + scale * distance * math.sin(angle)
            boxes.append(Bbox.from_bounds(mid_x - width / 2, mid_y - height / 2, width, height))
        free = (box for box in boxes if not any(Bbox.intersection(box, other) for other in taken))
        chosen = next(free, None)
        if chosen is None:
            continue
        taken.append(chosen)
        offset = ((chosen.x0 + chosen.x1) / 2 - x) / scale, ((chosen.y0 + chosen.y1) / 2 - y) / scale
        axes.annotate(
            str(rank),
            points[rank - 1],
            offset,
            textcoords="offset points",
            ha="center",
            va="center",
            color=INK,
            gid=f"rank-{rank}",
        )
