"""Pictures of DARTS cells, drawn by matplotlib alone.

The layout is the layered one of Gansner et al., "A Technique for Drawing Directed Graphs", IEEE TSE 1993, which
graphviz computes too. States stand in columns by their longest way from the inputs. An edge has a slot of its own in
every column on its way, the last of which holds the name of its operation. The slots of a column do not overlap, and
an edge is level inside a column and bends only between two: so no arrow runs through a box or a name.
"""

from __future__ import annotations

import itertools
import random
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import matplotlib.style
import numpy as np
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import FancyBboxPatch, PathPatch, Polygon
from matplotlib.path import Path as Curve
from matplotlib.textpath import TextToPath
from scipy.optimize import lsq_linear

from nni_cream.genotype import CELL_INPUTS, CELL_KINDS, CellKind, Genotype
from nni_cream.plots.style import FONTS, INK, save_figure

_TITLES: Final[dict[CellKind, str]] = {"normal": "Normal cell", "reduce": "Reduction cell"}

# Points.
_LABEL_SIZE: Final = 10
_STATE_SIZE: Final = 12
_TITLE_SIZE: Final = 14
_EDGE_WIDTH: Final = 1.5
_FRAME_WIDTH: Final = 1.1

# Inches.
_MARGIN: Final = 0.2
_TITLE_HEIGHT: Final = 0.4
_BOX_WIDTH: Final = 0.56
_BOX_HEIGHT: Final = 0.46
_LABEL_HEIGHT: Final = 0.26
_LABEL_PADDING: Final = 0.1
_PASSING_HEIGHT: Final = 0.06
_CORNER: Final = 0.09
_ARROW: Final = 0.1
# Least distance between two slots of a column, and distance between edges where they touch the same box.
_SPACE: Final = 0.12
_PORT_SPACE: Final = 0.17
# Distance between columns: the least, and what is added for every inch that an edge climbs, so that none gets steep.
_GAP: Final = 0.42
_GAP_PER_CLIMB: Final = 0.16

# How often, and from how many orders, the columns are gone through for an order with fewer crossings.
_SWEEPS: Final = 8
_STARTS: Final = 40
# A bend along the way of an edge counts so many times as much as one next to the box where it begins or ends.
_LEVEL: Final = 20.0

_INPUT_FILL: Final = "#fff6cc"
_NODE_FILL: Final = "#ffffff"
_OUTPUT_FILL: Final = "#e6e6e6"
_CONCAT_LINE: Final = "#8a8a8a"


@dataclass(frozen=True)
class _Family:
    """What operations of one kind look like; ``dashes`` is a line style of matplotlib."""

    line: str
    fill: str
    dashes: Any = "solid"


# By a part of the name. The hues are of Okabe and Ito's palette, which colour-blind people can tell apart; the dashes
# are for those who print in grey.
_FAMILIES: Final = {
    "conv": _Family("#0072b2", "#dcebf6"),
    "pool": _Family("#d55e00", "#fde5d6", (0, (6, 1.5, 1.5, 1.5))),
    "skip": _Family("#009e73", "#d8f1e8", (0, (3.5, 2))),
}
_OTHER_FAMILY: Final = _Family("#5f5f5f", "#ececec", (0, (1, 1.5)))


def draw_cell(genotype: Genotype, kind: CellKind) -> Figure:
    """Draw one of the two cells of a genotype, from left to right.

    Nodes are numbered from 0, as in the published figures; c_{k-2} and c_{k-1} are the outputs of the cell before last
    and of the last cell, and c_{k} is the concatenation that the cell puts out. An arrow is an edge, and bears the name
    of its operation in the colour of its family. Every artist has an id (``gid``), which an SVG file keeps: ``box-…``
    and ``text-…`` of a state or an edge, ``line-…`` and ``head-…`` of an arrow, and ``text-title``.

    Args:
        genotype: holds the cell.
        kind: which cell.

    Returns:
        A figure as large as the cell needs. It does not depend on the settings of matplotlib, and is not one of
        pyplot's, so that nobody has to close it.
    """
    with matplotlib.style.context("default"):
        return _draw(_Layout(genotype, kind), _TITLES[kind])


def save_cells(genotype: Genotype, directory: Path) -> list[Path]:
    """Draw both cells of a genotype into files; the same genotype gives the same bytes.

    Args:
        genotype: what to draw.
        directory: where to; it is made if need be.

    Returns:
        The files: ``cell_normal.svg``, ``cell_normal.png``, ``cell_reduce.svg`` and ``cell_reduce.png``.
    """
    return [file for kind in CELL_KINDS for file in save_figure(draw_cell(genotype, kind), directory, f"cell_{kind}")]


@dataclass(eq=False)
class _Slot:
    """A place in a column: of a state, of the name of an operation, or of nothing but an edge that passes.

    ``x`` and ``y`` are those of its centre, in inches from the lower left corner of the picture. ``before`` and
    ``after`` are the slots in the columns beside it that an edge connects it to.
    """

    column: int
    width: float = 0.0
    height: float = _PASSING_HEIGHT
    text: str = ""
    name: str = ""
    x: float = 0.0
    y: float = 0.0
    before: list[_Slot] = field(default_factory=list, repr=False)
    after: list[_Slot] = field(default_factory=list, repr=False)


class _Layout:
    """Where everything in the picture of a cell is: states, and edges as the slots on their way from one to another.

    The last slot but one of an edge to a node is that of its name; ``concat`` are the edges to the output.
    """

    def __init__(self, genotype: Genotype, kind: CellKind) -> None:
        depths = [0] * CELL_INPUTS
        nodes = range(CELL_INPUTS, CELL_INPUTS + genotype.nodes(kind))
        for node in nodes:
            depths.append(1 + max(depths[state] for _, state in genotype.edges_to(kind, node)))
        # States are in every second column, names of operations in those between, and the output comes last.
        last = 2 * max(depths) + 1
        self.columns: list[list[_Slot]] = [[] for _ in range(last + 1)]
        self.inputs = [self._state(0, f"$c_{{k{{-}}{CELL_INPUTS - i}}}$", str(i)) for i in range(CELL_INPUTS)]
        self.nodes = [self._state(2 * depths[node], str(node - CELL_INPUTS), str(node)) for node in nodes]
        self.output = self._state(last, "$c_{k}$", "output")
        self.output.height = max(_BOX_HEIGHT, _PORT_SPACE * (len(genotype.concat(kind)) + 1))
        states = [*self.inputs, *self.nodes]
        self.edges: list[list[_Slot]] = []
        for node in nodes:
            for position, (operation, state) in enumerate(genotype.edges_to(kind, node)):
                width = _text_width(operation, _LABEL_SIZE) + 2 * _LABEL_PADDING
                label = _Slot(2 * depths[node] - 1, width, _LABEL_HEIGHT, operation, f"edge{node}-{position}")
                self.columns[label.column].append(label)
                self.edges.append(self._connect(states[state], label, states[node]))
        self.concat = [self._connect(states[state], self.output) for state in genotype.concat(kind)]
        self.columns = _untangle(self.columns)
        _choose_levels(self.columns)
        self._move()

    def _state(self, column: int, text: str, name: str) -> _Slot:
        slot = _Slot(column, _BOX_WIDTH, _BOX_HEIGHT, text, f"state-{name}")
        self.columns[column].append(slot)
        return slot

    def _connect(self, *stops: _Slot) -> list[_Slot]:
        way = [stops[0]]
        for stop in stops[1:]:
            for column in range(way[-1].column + 1, stop.column):
                way.append(_Slot(column))
                self.columns[column].append(way[-1])
            way.append(stop)
        for left, right in itertools.pairwise(way):
            left.after.append(right)
            right.before.append(left)
        return way

    def _move(self) -> None:
        """Choose the x of every column, then the size of the picture, and move everything to where it begins."""
        right = _MARGIN - _GAP
        for column in self.columns:
            climb = max((abs(slot.y - other.y) for slot in column for other in slot.before), default=0.0)
            left = right + _GAP + _GAP_PER_CLIMB * climb
            right = left + max(slot.width for slot in column)
            for slot in column:
                slot.x = (left + right) / 2
                # An edge that only passes is level all through the column.
                slot.width = slot.width or right - left
        self.width = right + _MARGIN
        slots = list(itertools.chain.from_iterable(self.columns))
        lift = _MARGIN - min(slot.y - slot.height / 2 for slot in slots)
        for slot in slots:
            slot.y += lift
        self.height = max(slot.y + slot.height / 2 for slot in slots) + _TITLE_HEIGHT

    def curve(self, way: list[_Slot]) -> Curve:
        """Return the line of an edge, up to the head of its arrow."""
        y = _port(way[0], way[1], way[0].after)
        points, codes = [(way[0].x + way[0].width / 2, y)], [Curve.MOVETO]
        for slot in way[1:]:
            x, before = points[-1]
            half = max(other.width for other in self.columns[slot.column]) / 2
            last = slot is way[-1]
            to_x, to_y = (
                (slot.x - half - _ARROW, _port(slot, way[-2], slot.before)) if last else (slot.x - half, slot.y)
            )
            points += [((x + to_x) / 2, before), ((x + to_x) / 2, to_y), (to_x, to_y)]
            codes += [Curve.CURVE4] * 3
            if not last:
                points.append((slot.x + half, slot.y))
                codes.append(Curve.LINETO)
        return Curve(points, codes)


def _port(box: _Slot, other: _Slot, others: list[_Slot]) -> float:
    """Return the y at which the edge from or to ``other`` touches the box: the edges stay in the order of columns."""
    apart = min(_PORT_SPACE, (box.height - _PORT_SPACE) / max(1, len(others) - 1))
    place = sorted(others, key=lambda slot: -slot.y).index(other)
    return box.y + apart * ((len(others) - 1) / 2 - place)


def _places(columns: list[list[_Slot]]) -> dict[_Slot, int]:
    return {slot: place for column in columns for place, slot in enumerate(column)}


def _mean_place(slot: _Slot, others: list[_Slot], places: dict[_Slot, int]) -> float:
    return statistics.fmean([places[other] for other in others] or [places[slot]])


def _untangle(columns: list[list[_Slot]]) -> list[list[_Slot]]:
    """Order the slots of every column but the first from top to bottom so that few edges cross.

    Going to and fro, each slot is put where its neighbours in the column before are on average, and then two that
    follow each other are swapped where that saves crossings. That ends in local optima, so it is done again from other
    orders, drawn at random but the same every time; the best order that was met is returned.
    """
    shuffle = random.Random(0).shuffle
    best, fewest = columns, _crossings(columns)
    for start in range(_STARTS):
        columns = [list(column) for column in columns]
        for column in columns[1:] if start else ():
            shuffle(column)
        for sweep in range(_SWEEPS):
            forward = sweep % 2 == 0
            for column in columns[1:] if forward else columns[:0:-1]:
                places = _places(columns)
                means = {slot: _mean_place(slot, slot.before if forward else slot.after, places) for slot in column}
                column.sort(key=means.__getitem__)
            for column in columns[1:]:
                _swap(column, _places(columns))
            if (crossings := _crossings(columns)) < fewest:
                best, fewest = [list(column) for column in columns], crossings
    return best


def _swap(column: list[_Slot], places: dict[_Slot, int]) -> None:
    def crossings(upper: _Slot, lower: _Slot) -> int:
        return sum(
            places[one] > places[other]
            for side in ("before", "after")
            for one, other in itertools.product(getattr(upper, side), getattr(lower, side))
        )

    for place in range(len(column) - 1):
        upper, lower = column[place : place + 2]
        if crossings(lower, upper) < crossings(upper, lower):
            column[place : place + 2] = lower, upper


def _crossings(columns: list[list[_Slot]]) -> int:
    places = _places(columns)
    count = 0
    for column in columns:
        ends = [place for slot in column for place in sorted(places[other] for other in slot.after)]
        count += sum(upper > lower for upper, lower in itertools.combinations(ends, 2))
    return count


def _choose_levels(columns: list[list[_Slot]]) -> None:
    """Choose the y of every slot: edges as level as can be, while the slots of a column keep order and distance.

    It is a problem of least squares. The unknowns are the y of the first slot of each column, and the distance of
    every other one from that above it, which has a lower bound.
    """
    slots = list(itertools.chain.from_iterable(columns))
    levels = np.zeros((len(slots), len(slots)))
    bounds = np.full(len(slots), -np.inf)
    number = 0
    for column in columns:
        first = number
        for place, slot in enumerate(column):
            if place:
                bounds[number] = (column[place - 1].height + slot.height) / 2 + _SPACE
            levels[number, first] = 1
            levels[number, first + 1 : number + 1] = -1
            number += 1
    rows = dict(zip(slots, levels, strict=True))
    climbs = []
    for left, right in ((slot, other) for slot in slots for other in slot.after):
        inside = not left.name.startswith("state") and not right.name.startswith("state")
        climbs.append((_LEVEL if inside else 1.0) * (rows[left] - rows[right]))
    # The last rows hold what no edge holds near the middle.
    system = np.vstack([*climbs, 0.02 * levels])
    solution = lsq_linear(system, np.zeros(len(system)), (bounds, np.inf), method="bvls").x
    for slot, y in zip(slots, levels @ solution, strict=True):
        slot.y = float(y)


def _draw(layout: _Layout, title: str) -> Figure:
    figure = Figure(figsize=(layout.width, layout.height), facecolor="white")
    for way in layout.concat:
        _draw_arrow(figure, layout.curve(way), f"concat-{way[0].name}", _CONCAT_LINE, "solid")
    for way in layout.edges:
        label = way[-2]
        family = next((family for part, family in _FAMILIES.items() if part in label.text), _OTHER_FAMILY)
        _draw_arrow(figure, layout.curve(way), label.name, family.line, family.dashes)
        _draw_box(figure, label, family.fill, family.line, _LABEL_SIZE)
    for slots, fill in ((layout.inputs, _INPUT_FILL), (layout.nodes, _NODE_FILL), ([layout.output], _OUTPUT_FILL)):
        for slot in slots:
            _draw_box(figure, slot, fill, INK, _STATE_SIZE)
    _write(figure, title, layout.width / 2, layout.height - _TITLE_HEIGHT / 2, _TITLE_SIZE, "title")
    return figure


def _draw_box(figure: Figure, slot: _Slot, fill: str, line: str, size: int) -> None:
    corner = (slot.x - slot.width / 2, slot.y - slot.height / 2)
    style = f"round,pad=0,rounding_size={_CORNER}"
    box = FancyBboxPatch(
        corner, slot.width, slot.height, style, facecolor=fill, edgecolor=line, linewidth=_FRAME_WIDTH, zorder=2
    )
    _add(figure, box, f"box-{slot.name}")
    _write(figure, slot.text, slot.x, slot.y, size, slot.name)


def _draw_arrow(figure: Figure, curve: Curve, name: str, line: str, dashes: Any) -> None:
    shape = PathPatch(curve, fill=False, edgecolor=line, linewidth=_EDGE_WIDTH, linestyle=dashes, zorder=1)
    _add(figure, shape, f"line-{name}")
    x, y = np.asarray(curve.vertices)[-1]
    corners = [(x + _ARROW, y), (x, y + _ARROW / 2), (x, y - _ARROW / 2)]
    _add(figure, Polygon(corners, facecolor=line, linewidth=0, zorder=1), f"head-{name}")


def _add(figure: Figure, artist: Artist, name: str) -> None:
    artist.set_transform(figure.dpi_scale_trans)
    artist.set_gid(name)
    figure.add_artist(artist)


def _write(figure: Figure, text: str, x: float, y: float, size: int, name: str) -> None:
    # By the baseline, because the middle of a text depends on which of its letters hang below.
    baseline = y - 0.36 * size / 72
    place: Any = {"ha": "center", "va": "baseline", "transform": figure.dpi_scale_trans}
    figure.text(x, baseline, text, **place, fontsize=size, family=FONTS, color=INK, zorder=3, gid=f"text-{name}")


def _text_width(text: str, size: int) -> float:
    font = FontProperties(family=FONTS, size=size)
    width, _, _ = TextToPath().get_text_width_height_descent(text, font, ismath=False)
    return float(width) / 72
