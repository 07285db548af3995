"""The prioritized board of a Cream search over time: how good its paths were, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nni_cream.history import Seen
from nni_cream.plots.style import (
    COLOURS,
    MACS,
    PALE,
    QUIET,
    TITLE_SIZE,
    CostAxis,
    epochs_below,
    inches,
    keep_limits,
    limits_of,
    name_ends,
    our_style,
)

# Inches.
_WIDTH: Final = 7.6
_LEFT: Final = 0.85
_RIGHT: Final = 1.35
_SCORES: Final = 2.9
_COSTS: Final = 1.9
_ABOVE: Final = 0.45
_BELOW: Final = 0.5
# So many ranks have room beside the picture.
_NAMED: Final = 10
# Of an epoch.
_HALF: Final = 0.4


def draw_board(
    epochs: Mapping[int, Sequence[Seen]],
    ranking: Sequence[str],
    budget: tuple[float, float],
    costs: CostAxis = MACS,
) -> Figure:
    """Draw the score of every path while it was on the board, and below it what the path costs.

    Args:
        epochs: from the number of an epoch to the board after it; empty ones are of the warm-up.
        ranking: the paths that were ranked in the end, the best first. The first of them have a colour, and the
            first ten their rank.
        budget: the least and the most cost that was asked for; a least one of 0 is no limit.
        costs: what the budget counts.

    Returns:
        A figure with the ids (``gid``) ``score-<path>`` and ``cost-<path>`` of the lines.
    """
    lives = _lives(epochs)
    cost_of = {place.path: place.cost / costs.scale for places in epochs.values() for place in places}
    first, last = min(epochs), max(epochs)
    warmup = [epoch for epoch, places in epochs.items() if not places]
    with our_style():
        height = 2 * (_ABOVE + _BELOW) + _SCORES + _COSTS
        figure = Figure(figsize=(_WIDTH, height), facecolor="white")
        width = _WIDTH - _LEFT - _RIGHT
        scores = figure.add_axes(inches(figure, _LEFT, 2 * _BELOW + _COSTS + _ABOVE, width, _SCORES))
        below = figure.add_axes(inches(figure, _LEFT, _BELOW, width, _COSTS))
        ends: dict[Axes, list[tuple[float, float, str, str]]] = {scores: [], below: []}
        # Those that are of interest lie above the others.
        ranks = {path: rank for rank, path in enumerate(ranking)}
        for path in sorted(lives, key=lambda path: -ranks.get(path, len(ranks))):
            rank = ranks.get(path)
            colour = PALE if rank is None else COLOURS[rank] if rank < len(COLOURS) else QUIET
            width = 1.2 if rank is None else 1.8
            for life in lives[path]:
                scores.plot(*zip(*life, strict=True), "o-", color=colour, lw=width, markersize=3.5, gid=f"score-{path}")
                # Half an epoch to each side, so that a path of one epoch can be seen.
                span = (life[0][0] - _HALF, life[-1][0] + _HALF)
                below.plot(span, (cost_of[path],) * 2, color=colour, lw=2 * width, gid=f"cost-{path}")
            if rank is not None and rank < _NAMED:
                epoch, score = lives[path][-1][-1]
                ends[scores].append((epoch, score, f"rank {rank + 1}", colour))
                ends[below].append((epoch + _HALF, cost_of[path], f"rank {rank + 1}", colour))
        for limit in limits_of(budget):
            below.axhline(limit / costs.scale, color=QUIET, linewidth=1, linestyle=(0, (4, 3)), gid="budget")
        scores.set_title("Paths on the board", fontsize=TITLE_SIZE, pad=8)
        scores.set_ylabel("score (% right)")
        below.set_title("What they cost (dashed: the budget)", fontsize=TITLE_SIZE, pad=8)
        below.set_ylabel(f"{costs.short} ({costs.unit})")
        for axes, names in ends.items():
            epochs_below(axes, first, last)
            keep_limits(axes)
            if warmup:
                axes.axvspan(first - 0.5, max(warmup) + 0.5, color="#f2f2f2", zorder=0)
                middle = ((first + max(warmup)) / 2, sum(axes.get_ylim()) / 2)
                axes.text(*middle, "warm-up", ha="center", va="center", color=QUIET)
            name_ends(axes, names)
    return figure


def _lives(epochs: Mapping[int, Sequence[Seen]]) -> dict[str, list[list[tuple[int, float]]]]:
    """Return, of every path, the stretches of epochs in which it was on the board without a break, with its scores."""
    lives: dict[str, list[list[tuple[int, float]]]] = {}
    before: set[str] = set()
    for epoch, places in epochs.items():
        for place in places:
            stretches = lives.setdefault(place.path, [])
            if place.path not in before:
                stretches.append([])
            stretches[-1].append((epoch, place.score))
        before = {place.path for place in places}
    return lives
