from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from nni_cream.history import Seen
from nni_cream.plots.board import draw_board
from nni_cream.plots.style import COLOURS, PALE, QUIET, TIME
from tests.plots.reading import assert_readable, lines_of, points_of, texts_of

BUDGET = (2_500_000, 4_000_000)
# One that stays, one that leaves and comes back, one that leaves.
EPOCHS = {
    1: [],
    2: [],
    3: [Seen("[[0]]", 40.0, 3_000_000), Seen("[[1]]", 35.0, 2_600_000)],
    4: [Seen("[[0]]", 50.0, 3_000_000), Seen("[[2]]", 45.0, 3_900_000)],
    5: [Seen("[[1]]", 55.0, 2_600_000), Seen("[[0]]", 52.5, 3_000_000)],
}
RANKING = ["[[0]]", "[[1]]"]


@pytest.fixture(scope="module")
def figure() -> Figure:
    return draw_board(EPOCHS, RANKING, BUDGET)


def test_scores_are_those_of_every_epoch(figure: Figure) -> None:
    assert points_of(figure, "score-[[0]]") == [[(3, 40), (4, 50), (5, 52.5)]]
    assert points_of(figure, "score-[[1]]") == [[(3, 35)], [(5, 55)]]
    assert points_of(figure, "score-[[2]]") == [[(4, 45)]]


def test_costs_last_as_long_as_the_path_was_there(figure: Figure) -> None:
    assert points_of(figure, "cost-[[0]]") == [[(2.6, 3.0), (5.4, 3.0)]]
    assert points_of(figure, "cost-[[1]]") == [[(2.6, 2.6), (3.4, 2.6)], [(4.6, 2.6), (5.4, 2.6)]]
    assert points_of(figure, "cost-[[2]]") == [[(3.6, 3.9), (4.4, 3.9)]]
    limits = [points[0][1] for points in points_of(figure, "budget")]
    assert limits == [2.5, 4.0]


def test_ranked_paths_have_a_colour_and_a_name_and_the_others_are_grey(figure: Figure) -> None:
    lines = lines_of(figure)
    assert {line.get_color() for line in lines["score-[[0]]"] + lines["cost-[[0]]"]} == {COLOURS[0]}
    assert {line.get_color() for line in lines["score-[[1]]"] + lines["cost-[[1]]"]} == {COLOURS[1]}
    assert {line.get_color() for line in lines["score-[[2]]"] + lines["cost-[[2]]"]} == {PALE}
    names = [(text.get_text(), text.get_color()) for text in texts_of(figure) if text.get_text().startswith("rank")]
    assert sorted(names) == [("rank 1", COLOURS[0])] * 2 + [("rank 2", COLOURS[1])] * 2


def test_axes_have_units_and_the_warm_up_is_marked(figure: Figure) -> None:
    scores, costs = figure.axes
    assert (scores.get_ylabel(), costs.get_ylabel()) == ("score (% right)", "MACs (million)")
    assert scores.get_xlim() == costs.get_xlim() == (0.5, 5.5)
    assert [text.get_text() for text in scores.texts].count("warm-up") == 1
    (band,) = scores.patches
    assert (band.get_x(), band.get_width()) == (0.5, 2)  # type: ignore[attr-defined]


def test_costs_are_milliseconds_where_the_budget_is_time() -> None:
    epochs = {1: [Seen("[[0]]", 40.0, 3_000_000, 1.25)], 2: [Seen("[[1]]", 50.0, 2_000_000, 1.5)]}
    figure = draw_board(epochs, ["[[1]]"], (1.2, 1.6), TIME)
    assert points_of(figure, "cost-[[0]]") == [[(0.6, 1.25), (1.4, 1.25)]]
    assert points_of(figure, "cost-[[1]]") == [[(1.6, 1.5), (2.4, 1.5)]]
    assert [points[0][1] for points in points_of(figure, "budget")] == [1.2, 1.6]
    assert figure.axes[1].get_ylabel() == "predicted time (ms)"
    assert_readable(figure)


def test_a_least_cost_of_zero_is_no_limit() -> None:
    figure = draw_board(EPOCHS, RANKING, (0, 4_000_000))
    assert [points[0][1] for points in points_of(figure, "budget")] == [4.0]
    assert 2 < figure.axes[1].get_ylim()[0] < 2.6
    assert_readable(figure)


def test_without_a_warm_up_there_is_no_mark() -> None:
    figure = draw_board({epoch: EPOCHS[epoch] for epoch in (3, 4, 5)}, RANKING, BUDGET)
    assert not figure.axes[0].patches
    assert "warm-up" not in [text.get_text() for text in texts_of(figure)]


@pytest.mark.parametrize("size", [1, 5, 10, 40])
def test_it_can_be_read_however_close_the_paths_are(size: int) -> None:
    seen = [Seen(f"[[{number}]]", 90 + number / 1000, 3_000_000 + number) for number in range(size)]
    figure = draw_board({1: [], 2: seen, 3: seen}, [path.path for path in seen], BUDGET)
    assert_readable(figure)
    found = lines_of(figure)
    colours = {line.get_color() for path in seen for line in found[f"score-{path.path}"]}
    names = [text.get_text() for text in texts_of(figure) if text.get_text().startswith("rank")]
    assert sorted(names) == sorted(2 * [f"rank {rank}" for rank in range(1, min(size, 10) + 1)])
    # Those beyond the palette have none of their own.
    assert colours == {*COLOURS[:size], *([QUIET] if size > len(COLOURS) else [])}
