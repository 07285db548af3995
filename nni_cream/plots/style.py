"""What the pictures share: colours and letters, and how figures are written."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import matplotlib
import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter
from matplotlib.transforms import ScaledTranslation

from nni_cream.runs import write_atomically

INK: Final = "#1a1a1a"
QUIET: Final = "#6b6b6b"
PALE: Final = "#c9c9c9"
# Okabe and Ito's palette, which colour-blind people can tell apart, but for its yellow, which is too light for lines.
COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
# For those who print in grey.
DASHES: Final[tuple[Any, ...]] = ("solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 1.5, 1.5, 1.5)))
FONTS: Final = ("DejaVu Sans", "sans-serif")
# Points.
TEXT_SIZE: Final = 10
TITLE_SIZE: Final = 12

# Text stays text, and the ids in a file are the same every time.
_SVG_SETTINGS: Final[dict[Any, Any]] = {"svg.fonttype": "none", "svg.hashsalt": "nni_cream"}
_LOOK: Final[dict[Any, Any]] = {
    "font.family": FONTS,
    "font.size": TEXT_SIZE,
    "axes.titlesize": TITLE_SIZE,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e8e8e8",
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
}
_PIXELS_PER_INCH: Final = 150


@dataclass(frozen=True)
class CostAxis:
    """How a picture shows what the budget counts.

    Attributes:
        words: what is counted.
        short: the same in a word or two.
        unit: in which it is shown.
        scale: how much of what is counted makes one of the unit.
    """

    words: str
    short: str
    unit: str
    scale: float


MACS: Final = CostAxis("multiply-accumulates for one image", "MACs", "million", 1e6)
TIME: Final = CostAxis("predicted time of a batch", "predicted time", "ms", 1)


@contextmanager
def our_style() -> Iterator[None]:
    """Draw in the style of our pictures, whatever the settings of matplotlib are, and leave those alone."""
    with matplotlib.style.context("default"), matplotlib.rc_context(_LOOK):
        yield


def save_figure(figure: Figure, directory: Path, name: str) -> list[Path]:
    """Write ``name.svg`` and ``name.png``, each atomically; the same figure gives the same bytes.

    Args:
        figure: what to write.
        directory: where to; it is made if need be.
        name: of the files.

    Returns:
        The two files.
    """
    files = []
    for suffix, metadata in (("svg", {"Date": None}), ("png", {})):
        files.append(directory / f"{name}.{suffix}")
        _save(figure, files[-1], suffix, metadata)
    return files


def _save(figure: Figure, file: Path, suffix: str, metadata: dict[str, None]) -> None:
    def write(temporary: Path) -> None:
        # The temporary name has no suffix that would tell the format.
        figure.savefig(temporary, format=suffix, dpi=_PIXELS_PER_INCH, metadata=metadata)

    with matplotlib.style.context("default"), matplotlib.rc_context(_SVG_SETTINGS):
        write_atomically(file, write)


def inches(
    figure: Figure, left: float, bottom: float, width: float, height: float
) -> tuple[float, float, float, float]:
    """Return a place in a figure, given in inches, as ``Figure.add_axes`` takes it."""
    across, up = figure.get_size_inches()
    return (left / across, bottom / up, width / across, height / up)


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move numbers apart where they are too near each other, so that texts at these heights do not overlap.

    Args:
        wanted: where each would best be, in any order, which is kept.
        gap: least distance of two; smaller if there is not so much room.
        low: the lowest possible.
        high: the highest possible.
    """
    if len(wanted) > 1:
        gap = min(gap, (high - low) / (len(wanted) - 1))
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    found = [min(max(number, low), high) for number in wanted]
    for before, this in itertools.pairwise(order):
        found[this] = max(found[this], found[before] + gap)
    ceiling = high
    for this in reversed(order):
        found[this] = min(found[this], ceiling)
        ceiling = found[this] - gap
    return found


def name_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]], size: int = TEXT_SIZE) -> None:
    """Write the names of lines to the right of ``axes``, level with where they end, and lead there.

    Args:
        axes: with limits that stay as they are.
        ends: of every line x and y of its last point in data, its name, and its colour.
        size: of the letters, in points.
    """
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    height = axes.get_position().height * figure.get_size_inches()[1] * 72
    low, high = axes.get_ylim()
    wanted = [height * (y - low) / (high - low) for _, y, _, _ in ends]
    levels = spread(wanted, 1.25 * size, 0, height)
    for (x, y, name, colour), level in zip(ends, levels, strict=True):
        axes.annotate(
            name,
            (x, y),
            (1, level / height),
            textcoords=_beside(axes),
            va="center",
            color=colour,
            fontsize=size,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.7,
                "shrinkA": 1,
                "shrinkB": 2,
                "relpos": (0, 0.5),
            },
        )


def _beside(axes: Axes) -> Any:
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    return axes.transAxes + ScaledTranslation(14 / 72, 0, figure.dpi_scale_trans)


def limits_of(budget: tuple[float, float]) -> list[float]:
    """Return the limits that a budget, the least and the most cost, sets; a least cost of 0 is none."""
    return sorted({*budget} - {0})


def widened(low: float, high: float) -> tuple[float, float]:
    """Return the ends of an axis, at least a five-hundredth of its values apart.

    So where values hardly differ the numbers beside the axis have few digits, and noise does not look like more.
    """
    missing = max(0.0, max(abs(low), abs(high)) / 500 - (high - low))
    return low - missing / 2, high + missing / 2


def keep_limits(axes: Axes) -> None:
    """Let the y axis stay as it is, but :func:`widened`, with plain numbers."""
    axes.set_ylim(widened(*axes.get_ylim()))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:.6g}"))


def epochs_below(axes: Axes, first: int, last: int) -> None:
    """Let the x axis be of the epochs from ``first`` to ``last``, with whole numbers."""
    axes.set_xlim(first - 0.5, last + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True, min_n_ticks=1))
    axes.set_xlabel("epoch")
