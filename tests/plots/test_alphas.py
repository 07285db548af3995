from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from numpy.typing import NDArray

from nni_cream.genotype import Genotype, derive_edges, edges_of, mixing_weights
from nni_cream.plots.alphas import MOST_NODES, draw_alphas
from nni_cream.plots.style import COLOURS
from tests.plots.reading import assert_readable, texts_of

OPERATIONS = ("none", "max_pool_3x3", "skip_connect", "an_operation_with_a_long_name")


def search(nodes: int, epochs: int) -> tuple[list[NDArray[np.float32]], Genotype]:
    """α after every epoch, and what is read off the last."""
    draw = np.random.default_rng(nodes)
    shape = (len(edges_of(nodes)), len(OPERATIONS))
    tables = [draw.normal(size=shape).astype(np.float32) for _ in range(epochs)]
    edges = tuple(derive_edges(mixing_weights(tables[-1]), OPERATIONS))
    concat = tuple(range(2, 2 + nodes))
    return tables, Genotype(edges, concat, edges, concat)


def maps_of(figure: Figure) -> dict[str, Any]:
    return {str(image.get_gid()): image for axes in figure.axes for image in axes.images}


def test_every_edge_has_a_map_of_its_mixing_weights() -> None:
    tables, genotype = search(3, 5)
    figure = draw_alphas(tables, OPERATIONS, genotype, "normal")
    maps = maps_of(figure)
    assert list(maps) == [f"edge{node}-{state}" for node, state in edges_of(3)]
    for row, (node, state) in enumerate(edges_of(3)):
        found = np.asarray(maps[f"edge{node}-{state}"].get_array())
        assert found.shape == (4, 5)
        for epoch, table in enumerate(tables):
            shares = np.exp(table[row].astype(float))
            assert found[:, epoch] == pytest.approx(shares / shares.sum(), rel=1e-5)


def test_colours_mean_the_same_on_every_map_and_the_bar_says_what() -> None:
    tables, genotype = search(3, 5)
    figure = draw_alphas(tables, OPERATIONS, genotype, "reduce")
    weights = np.stack([mixing_weights(table) for table in tables])
    limits = {image.get_clim() for image in maps_of(figure).values()}
    assert limits == {(float(weights.min()), float(weights.max()))}
    assert {image.get_cmap().name for image in maps_of(figure).values()} == {"viridis"}
    assert figure.axes[-1].get_ylabel() == "mixing weight, softmax(α)"
    assert "Mixing weights of the reduction cell" in [text.get_text() for text in texts_of(figure)]


def test_frames_are_on_what_the_genotype_keeps() -> None:
    tables, genotype = search(4, 6)
    figure = draw_alphas(tables, OPERATIONS, genotype, "normal")
    frames = {str(patch.get_gid()): patch for axes in figure.axes for patch in axes.patches if patch.get_gid()}
    kept = {(node, state): name for node in range(2, 6) for name, state in genotype.edges_to("normal", node)}
    assert set(frames) == {f"kept{node}-{state}" for node, state in kept}
    assert len(kept) == 8
    for (node, state), operation in kept.items():
        frame: Any = frames[f"kept{node}-{state}"]
        row = OPERATIONS.index(operation)
        assert (frame.get_x(), frame.get_y(), frame.get_width(), frame.get_height()) == (0.5, row - 0.5, 6, 1)
        assert to_hex(frame.get_edgecolor()) == COLOURS[1]
        assert frame.axes is maps_of(figure)[f"edge{node}-{state}"].axes


def test_operations_stand_at_their_rows_and_maps_at_their_nodes() -> None:
    tables, genotype = search(2, 3)
    figure = draw_alphas(tables, OPERATIONS, genotype, "normal")
    maps = {name: image.axes for name, image in maps_of(figure).items()}
    for name in ("edge2-0", "edge3-0"):
        assert [label.get_text() for label in maps[name].get_yticklabels()] == list(OPERATIONS)
        assert list(maps[name].get_yticks()) == [0, 1, 2, 3]
        # The first is at the top.
        assert maps[name].get_ylim() == (3.5, -0.5)
    assert maps["edge2-0"].get_position().y0 > maps["edge3-0"].get_position().y1
    assert maps["edge3-0"].get_position().x1 < maps["edge3-1"].get_position().x0
    assert maps["edge3-2"].get_title(loc="left") == "node 0 → node 1"
    assert maps["edge3-1"].get_xlim() == (0.5, 3.5)


@pytest.mark.parametrize("nodes", range(1, MOST_NODES + 1))
@pytest.mark.parametrize("epochs", [1, 50])
def test_it_can_be_read(nodes: int, epochs: int) -> None:
    tables, genotype = search(nodes, epochs)
    assert_readable(draw_alphas(tables, OPERATIONS, genotype, "normal"))


def test_alphas_that_are_all_the_same_can_be_drawn() -> None:
    tables, genotype = search(2, 3)
    assert_readable(draw_alphas([np.zeros_like(table) for table in tables], OPERATIONS, genotype, "normal"))


def test_a_cell_with_too_many_edges_is_refused() -> None:
    tables, genotype = search(MOST_NODES + 1, 1)
    with pytest.raises(ValueError, match="too many edges to draw"):
        draw_alphas(tables, OPERATIONS, genotype, "normal")
