"""Pictures read back: what is on them, and whether a person can read it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.transforms import Bbox


def points_of(figure: Figure, name: str) -> list[list[tuple[float, float]]]:
    """The points of every line of this name."""
    found = [line for axes in figure.axes for line in axes.lines if line.get_gid() == name]
    return [[(float(x), float(y)) for x, y in zip(*line.get_data(), strict=True)] for line in found]


def lines_of(figure: Figure) -> dict[str, list[Line2D]]:
    """All lines by their names."""
    found: dict[str, list[Line2D]] = {}
    for axes in figure.axes:
        for line in axes.lines:
            found.setdefault(str(line.get_gid()), []).append(line)
    return found


def _shown(axes: Axes) -> Iterator[Text]:
    yield from (axes.title, axes._left_title, axes._right_title, axes.xaxis.label, axes.yaxis.label)
    for axis, (low, high) in ((axes.xaxis, sorted(axes.get_xlim())), (axes.yaxis, sorted(axes.get_ylim()))):
        for tick in axis.get_major_ticks():
            if low <= tick.get_loc() <= high:
                yield from (tick.label1, tick.label2)
    yield from axes.texts
    legend = axes.get_legend()
    if legend is not None:
        yield from legend.get_texts()


def texts_of(figure: Figure) -> list[Text]:
    """Every text that is drawn."""
    everything = itertools.chain(figure.texts, *(_shown(axes) for axes in figure.axes))
    return [text for text in everything if text.get_visible() and text.get_text()]


def assert_readable(figure: Figure) -> None:
    """No text is small, leaves the picture, or lies on another."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer: Any = canvas.get_renderer()
    extents = []
    for text in texts_of(figure):
        assert text.get_fontsize() >= 8, text
        # Of an annotation the text alone, not the line that leads to it.
        extent = Text.get_window_extent(text, renderer)
        assert figure.bbox.x0 <= extent.x0 < extent.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= extent.y0 < extent.y1 <= figure.bbox.y1, text
        extents.append((text, extent))
    for (one, first), (other, second) in itertools.combinations(extents, 2):
        shared = Bbox.intersection(first, second)
        # The boxes of letters are a little larger than the letters.
        assert shared is None or min(shared.width, shared.height) < 1.5, (one, other)
