"""The network of a Cream path as a picture: its blocks, stage by stage, and how large the features are there."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, Final

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path as Curve

from nni_cream.architecture import CreamPath
from nni_cream.description import describe_path
from nni_cream.models.cream import HEAD_FEATURES, STEM_CHANNELS, Choice, DilConvChoice, known_operations
from nni_cream.plots.style import INK, QUIET, TITLE_SIZE, our_style

# Inches.
_MARGIN: Final = 0.15
_TITLE: Final = 0.42
_NAMES: Final = 2.15
_BLOCK: Final = 1.1
_BETWEEN: Final = 0.3
_ROW: Final = 0.6
_LEGEND: Final = 0.3
_CORNER: Final = 0.07
# Of a box: of most, and of the wider of two expansions.
_HEIGHT: Final = 0.27
_TALL: Final = 0.38
# Points.
_SMALL: Final = 8.5

# Of light and dark, which people tell apart who see no colours.
_KERNELS: Final = {3: "#e3eff8", 5: "#a9cfea", 7: "#5fa8d8"}
_DILATED: Final = "#fbe3c0"
_UNIT: Final = "#d8f1e8"
_FIXED: Final = "#eeeeee"
_WIDER: Final = 6
_LEGEND_TEXT: Final = "k×k, ×e: inverted residual of kernel k (darker where larger) and expansion e (taller: 6)"


@dataclass(frozen=True)
class _Box:
    """A block where it stands: ``x`` is its left, ``y`` its middle, in inches from the lower left corner."""

    row: int
    place: int
    x: float
    y: float
    height: float
    text: str
    fill: str

    @property
    def name(self) -> str:
        return f"{self.row}-{self.place}"


def draw_path(path: CreamPath, resolution: int) -> Figure:
    """Draw the network of a path, from the image at the top to the classes at the bottom, a row for every stage.

    Args:
        path: of the stage table: seven stages.
        resolution: of the images, in pixels.

    Returns:
        A figure with the ids (``gid``) ``box-<row>-<place>`` and ``text-<row>-<place>`` of the blocks,
        ``arrow-<row>-<place>`` of what leads to them, and ``row-<row>`` of the texts on the left; row 0 is the stem,
        the last one the head.

    Raises:
        UserError: if the path does not fit the stage table.
    """
    rows = _rows(path, resolution)
    width = 2 * _MARGIN + _NAMES + max(4, *(len(blocks) for _, blocks in rows)) * (_BLOCK + _BETWEEN)
    height = 2 * _MARGIN + _TITLE + len(rows) * _ROW + _LEGEND
    levels = [height - _MARGIN - _TITLE - (row + 0.5) * _ROW for row in range(len(rows))]
    boxes = [
        _Box(row, place, _MARGIN + _NAMES + place * (_BLOCK + _BETWEEN), levels[row], tall, text, fill)
        for row, (_, blocks) in enumerate(rows)
        for place, (text, fill, tall) in enumerate(blocks)
    ]
    with our_style():
        figure = Figure(figsize=(width, height), facecolor="white")
        _write(figure, "The network, block by block", _MARGIN, height - _MARGIN - 0.16, TITLE_SIZE, weight="bold")
        for row, (name, _) in enumerate(rows):
            _write(figure, name, _MARGIN, levels[row], _SMALL, color=QUIET, gid=f"row-{row}")
        for box in boxes:
            _draw_box(figure, box)
        for before, box in itertools.pairwise(boxes):
            _draw_arrow(figure, _way(before, box), f"arrow-{box.name}")
        _write(figure, _LEGEND_TEXT, _MARGIN, _MARGIN + 0.1, _SMALL, color=QUIET)
    return figure


def _rows(path: CreamPath, resolution: int) -> list[tuple[str, list[tuple[str, str, float]]]]:
    """Return the text of every row, and of its blocks text, fill and height."""
    stages = describe_path(path, resolution)
    stem = f"stem · {STEM_CHANNELS} channels · {stages[0].size}×{stages[0].size}"
    return [
        (stem, [("conv 3×3", _FIXED, _HEIGHT)]),
        *(
            (
                f"stage {stage.number} · {stage.channels} channels · {stage.size}×{stage.size}",
                [(block.short, *_look(block.operation)) for block in stage.blocks],
            )
            for stage in stages
        ),
        (f"head · {HEAD_FEATURES:,} features", [("pool", _FIXED, _HEIGHT), ("linear", _FIXED, _HEIGHT)]),
    ]


def _look(index: int | None) -> tuple[str, float]:
    """Return fill and height of a block."""
    operation = None if index is None else known_operations()[index]
    if isinstance(operation, Choice):
        return _KERNELS[operation.kernel], _TALL if operation.expansion == _WIDER else _HEIGHT
    if isinstance(operation, DilConvChoice):
        return _DILATED, _HEIGHT
    return _FIXED if operation is None else _UNIT, _HEIGHT


def _way(before: _Box, box: _Box) -> list[tuple[float, float]]:
    """Return the corners of the way from one block to the next."""
    end, top = before.x + _BLOCK, (box.x + _BLOCK / 2, box.y + box.height / 2)
    if before.row == box.row:
        return [(end, before.y), (box.x, box.y)]
    if before.place == 0:
        return [(top[0], before.y - before.height / 2), top]
    # Out to the right, down between the rows, back to the left, and down into the first block.
    aside, between = end + _BETWEEN / 2, box.y + _ROW / 2
    return [(end, before.y), (aside, before.y), (aside, between), (top[0], between), top]


def _draw_box(figure: Figure, box: _Box) -> None:
    style = f"round,pad=0,rounding_size={_CORNER}"
    corner = (box.x, box.y - box.height / 2)
    shape = FancyBboxPatch(corner, _BLOCK, box.height, style, facecolor=box.fill, edgecolor=INK, zorder=2)
    shape.set_transform(figure.dpi_scale_trans)
    shape.set_gid(f"box-{box.name}")
    figure.add_artist(shape)
    _write(figure, box.text, box.x + _BLOCK / 2, box.y, _SMALL + 0.5, ha="center", gid=f"text-{box.name}")


def _draw_arrow(figure: Figure, corners: list[tuple[float, float]], name: str) -> None:
    style = "-|>,head_width=2.2,head_length=4.5"
    arrow = FancyArrowPatch(path=Curve(corners), arrowstyle=style, color=QUIET, linewidth=1.1, zorder=1, gid=name)
    arrow.set_transform(figure.dpi_scale_trans)
    figure.add_artist(arrow)


def _write(figure: Figure, text: str, x: float, y: float, size: float, **look: Any) -> None:
    look = {"ha": "left", "va": "center_baseline", **look}
    figure.text(x, y, text, transform=figure.dpi_scale_trans, fontsize=size, zorder=3, **look)
