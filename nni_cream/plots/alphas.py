"""α over time: the mixing weights of every operation on every edge of a cell, epoch by epoch, as heat maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from nni_cream.genotype import CELL_INPUTS, CellKind, Genotype, edges_of, mixing_weights
from nni_cream.plots.style import COLOURS, QUIET, TITLE_SIZE, inches, our_style

# Cells with more nodes have too many edges for a picture.
MOST_NODES: Final = 6

# Inches.
_MARGIN: Final = 0.15
_NAMES: Final = 1.15
_MAP: Final = 1.15
_ROW: Final = 0.155
_BETWEEN: Final = 0.12
_TITLE: Final = 0.62
_EDGE_NAME: Final = 0.27
_BELOW: Final = 0.5
_BAR: Final = 0.14
_BESIDE_BAR: Final = 0.75
# Points.
_SMALL: Final = 8.5


def draw_alphas(
    tables: Sequence[NDArray[np.float32]], operations: Sequence[str], genotype: Genotype, kind: CellKind
) -> Figure:
    """Draw the mixing weights of one kind of cell over the epochs.

    There is a map for every edge: a row of maps for each node, a column for each state that it may take. In a map the
    operations stand below each other, and epochs go to the right. What the genotype keeps has a frame.

    Args:
        tables: α after every epoch, [edges, operations], the rows in the order of
            :func:`nni_cream.genotype.edges_of`.
        operations: their names.
        genotype: what was found.
        kind: which cell.

    Returns:
        A figure with the ids (``gid``) ``edge<node>-<state>`` of the maps, each [operations, epochs], and
        ``kept<node>-<state>`` of the frames.

    Raises:
        ValueError: if the cell has more than :data:`MOST_NODES` nodes.
    """
    nodes = genotype.nodes(kind)
    if nodes > MOST_NODES:
        raise ValueError(f"A cell of {nodes} nodes has too many edges to draw.")
    weights = np.stack([mixing_weights(table) for table in tables], axis=-1)
    columns, block = nodes + CELL_INPUTS - 1, _EDGE_NAME + _ROW * len(operations)
    names = max(_NAMES, 0.075 * max(map(len, operations)) + 0.15)
    width = names + columns * (_MAP + _BETWEEN) + _BESIDE_BAR + _BAR
    height = _TITLE + nodes * (block + _BETWEEN) + _BELOW
    epochs = weights.shape[-1]
    kept = {
        (node, state): operation
        for node in range(CELL_INPUTS, CELL_INPUTS + nodes)
        for operation, state in genotype.edges_to(kind, node)
    }
    title = {"normal": "normal cell", "reduce": "reduction cell"}[kind]
    with our_style():
        figure = Figure(figsize=(width, height), facecolor="white")
        figure.text(
            _MARGIN / width,
            1 - 0.2 / height,
            f"Mixing weights of the {title}",
            fontsize=TITLE_SIZE,
            weight="bold",
            va="top",
        )
        figure.text(
            _MARGIN / width,
            1 - 0.43 / height,
            "framed in colour: the operation that is kept on an edge that is kept",
            fontsize=_SMALL,
            color=QUIET,
            va="top",
        )
        image: Any = None
        for (node, state), table in zip(edges_of(nodes), weights, strict=True):
            below = _BELOW + (nodes - 1 - (node - CELL_INPUTS)) * (block + _BETWEEN)
            place = inches(figure, names + state * (_MAP + _BETWEEN), below, _MAP, _ROW * len(operations))
            axes = figure.add_axes(place)
            image = axes.imshow(
                table,
                cmap="viridis",
                vmin=float(weights.min()),
                vmax=float(weights.max()),
                aspect="auto",
                interpolation="none",
                extent=(0.5, epochs + 0.5, len(operations) - 0.5, -0.5),
                gid=f"edge{node}-{state}",
            )
            axes.grid(visible=False)
            chosen = kept.get((node, state))
            heading = f"{_state(state)} → node {node - CELL_INPUTS}"
            axes.set_title(heading, fontsize=_SMALL, pad=3, weight="bold" if chosen else "normal")
            axes.set_yticks(range(len(operations)), operations if state == 0 else [], fontsize=_SMALL)
            axes.tick_params(labelsize=_SMALL, length=2)
            axes.tick_params("y", length=0)
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
            if node == CELL_INPUTS + nodes - 1:
                axes.set_xlabel("epoch", fontsize=_SMALL)
            else:
                axes.set_xticklabels([])
            if chosen:
                row = list(operations).index(chosen)
                frame = Rectangle(
                    (0.5, row - 0.5),
                    epochs,
                    1,
                    fill=False,
                    edgecolor=COLOURS[1],
                    linewidth=1.8,
                    clip_on=False,
                    gid=f"kept{node}-{state}",
                )
                axes.add_patch(frame)
        bar = figure.add_axes(
            inches(figure, width - _BESIDE_BAR, _BELOW, _BAR, height - _TITLE - _BELOW - _EDGE_NAME - _BETWEEN)
        )
        figure.colorbar(image, cax=bar)
        bar.set_ylabel("mixing weight, softmax(α)", fontsize=_SMALL)
        bar.tick_params(labelsize=_SMALL)
    return figure


def _state(state: int) -> str:
    return f"$c_{{k{{-}}{CELL_INPUTS - state}}}$" if state < CELL_INPUTS else f"node {state - CELL_INPUTS}"
