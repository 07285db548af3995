"""Curves of a run over its epochs: accuracy, loss, and of DARTS the signs of how α is doing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nni_cream.plots.style import COLOURS, DASHES, TITLE_SIZE, epochs_below, inches, keep_limits, name_ends, our_style

# Inches. The names of the lines stand in the right margin.
_WIDTH: Final = 7.6
_LEFT: Final = 0.85
_RIGHT: Final = 2.05
_PANEL: Final = 1.75
_ABOVE: Final = 0.42
_BELOW: Final = 0.5
# With more epochs than these, a dot on each would hide the line.
_DOTS: Final = 20


@dataclass(frozen=True)
class _Panel:
    """What is drawn into one coordinate system: metrics of the table, with the names of their lines."""

    title: str
    unit: str
    factor: float
    lines: Mapping[str, str]
    whole: bool = False


_PANELS: Final = (
    _Panel(
        "Accuracy",
        "right answers (%)",
        100,
        {
            "val_accuracy": "held-out images",
            "train_accuracy": "training images",
            "mean_val_accuracy": "mean of the paths",
            "val_top5": "held-out, top 5",
        },
    ),
    _Panel(
        "Loss",
        "cross-entropy (nats)",
        1,
        {"val_loss": "held-out images", "train_loss": "training images", "alpha_loss": "images of α"},
    ),
    _Panel(
        "Indecision of α",
        "entropy (nats)",
        1,
        {"entropy_normal": "normal cell", "entropy_reduce": "reduction cell"},
    ),
    _Panel(
        "Skip connections",
        "in a cell",
        1,
        {"skip_connections_normal": "normal cell", "skip_connections_reduce": "reduction cell"},
        whole=True,
    ),
    _Panel("Curvature of the validation loss in α", "eigenvalue", 1, {"eigenvalue": "largest"}),
    _Panel("Expected cost", "MACs (million)", 1e-6, {"expected_flops": "of the mixture"}),
)


def draw_curves(rows: Sequence[Mapping[str, str]]) -> Figure:
    """Draw what was measured in every epoch, one panel below another.

    Args:
        rows: the lines of ``metrics.csv``, one an epoch; a metric may be missing in some of them.

    Returns:
        A figure whose lines have the names of the metrics as ids (``gid``), in epochs and in the unit of their axis.
    """
    epochs = [int(row["epoch"]) for row in rows]
    panels = [panel for panel in _PANELS if any(row.get(metric) for row in rows for metric in panel.lines)]
    step = _ABOVE + _PANEL + _BELOW
    with our_style():
        figure = Figure(figsize=(_WIDTH, step * len(panels)), facecolor="white")
        for place, panel in enumerate(reversed(panels)):
            axes = figure.add_axes(inches(figure, _LEFT, place * step + _BELOW, _WIDTH - _LEFT - _RIGHT, _PANEL))
            ends = []
            for number, (metric, name) in enumerate(panel.lines.items()):
                points = [
                    (e, panel.factor * float(row[metric]))
                    for e, row in zip(epochs, rows, strict=True)
                    if row.get(metric)
                ]
                if not points:
                    continue
                axes.plot(
                    *zip(*points, strict=True),
                    color=COLOURS[number],
                    linestyle=DASHES[number],
                    marker="o" if len(points) <= _DOTS else None,
                    markersize=4,
                    gid=metric,
                )
                ends.append((*points[-1], name, COLOURS[number]))
            epochs_below(axes, epochs[0], epochs[-1])
            if panel.whole:
                axes.yaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
            axes.set_ylabel(panel.unit)
            axes.set_title(panel.title, fontsize=TITLE_SIZE, pad=8)
            keep_limits(axes)
            name_ends(axes, ends)
    return figure
