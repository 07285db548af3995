from __future__ import annotations

import itertools
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nni_cream.plots.pareto import Measured, draw_pareto, front_of
from nni_cream.plots.style import TIME
from tests.plots.reading import assert_readable, points_of, texts_of

PATHS = [Measured(0.95, 3_500_000), Measured(0.94, 3_800_000), Measured(0.9, 2_600_000), Measured(0.85, 2_700_000)]
BUDGET = (2_500_000, 4_000_000)

measured = st.lists(
    st.builds(Measured, st.sampled_from([0.5, 0.6, 0.7, 0.8]), st.integers(1, 6)), min_size=1, max_size=9
)


@given(measured)
def test_the_front_is_what_no_other_beats(paths: list[Measured]) -> None:
    front = front_of(paths)
    assert len(set(front)) == len(front) > 0
    for place, path in enumerate(paths):
        cheaper_and_as_good = any(o.cost < path.cost and o.accuracy >= path.accuracy for o in paths)
        better_and_as_cheap = any(o.cost <= path.cost and o.accuracy > path.accuracy for o in paths)
        assert (place in front) == (not cheaper_and_as_good and not better_and_as_cheap)
    costs = [paths[place].cost for place in front]
    assert costs == sorted(costs)


def test_points_are_accuracy_in_percent_against_million_macs() -> None:
    figure = draw_pareto(PATHS, BUDGET, 400)
    (front,), (others,) = points_of(figure, "front"), points_of(figure, "others")
    assert front == [pytest.approx((2.6, 90)), pytest.approx((3.5, 95))]
    assert others == [pytest.approx((3.8, 94)), pytest.approx((2.7, 85))]
    (stairs,) = points_of(figure, "stairs")
    assert stairs == [pytest.approx(point) for point in ((2.6, 90), (3.5, 90), (3.5, 95))]
    assert [points[0][0] for points in points_of(figure, "budget")] == [2.5, 4.0]
    (axes,) = figure.axes
    assert axes.get_xlabel() == "multiply-accumulates for one image (million; dashed: the budget)"
    assert axes.get_ylabel() == "right answers (% of held-out images)"


def test_points_are_accuracy_against_milliseconds_where_the_budget_is_time() -> None:
    paths = [Measured(0.95, 1.5), Measured(0.9, 1.25), Measured(0.85, 1.375)]
    figure = draw_pareto(paths, (1.2, 1.6), 400, TIME)
    (front,), (others,) = points_of(figure, "front"), points_of(figure, "others")
    assert front == [pytest.approx((1.25, 90)), pytest.approx((1.5, 95))]
    assert others == [pytest.approx((1.375, 85))]
    assert [points[0][0] for points in points_of(figure, "budget")] == [1.2, 1.6]
    assert [points[0][0] for points in points_of(figure, "errors")] == [1.5, 1.25, 1.375]
    assert figure.axes[0].get_xlabel() == "predicted time of a batch (ms; dashed: the budget)"
    assert_readable(figure)


@pytest.mark.parametrize("most", [1.6, 1.5001])
def test_a_least_cost_of_zero_is_no_limit(most: float) -> None:
    paths = [Measured(0.95, 1.5), Measured(0.9, 1.4998), Measured(0.85, 1.4999)]
    figure = draw_pareto(paths, (0, most), 400, TIME)
    assert [points[0][0] for points in points_of(figure, "budget")] == [most]
    left, right = figure.axes[0].get_xlim()
    # The paths are not pushed to one end, and the numbers below are whole ones, not differences to another.
    assert 1.45 < left < 1.4998
    assert most < right < 1.65
    assert_readable(figure)
    numbers = [float(label.get_text()) for label in figure.axes[0].get_xticklabels()]
    assert 1.45 < statistics.median(numbers) < 1.65


def test_errors_are_those_of_shares() -> None:
    figure = draw_pareto(PATHS, BUDGET, 400)
    for path, points in zip(PATHS, points_of(figure, "errors"), strict=True):
        error = 100 * math.sqrt(path.accuracy * (1 - path.accuracy) / 400)
        assert points == [
            pytest.approx((path.cost / 1e6, 100 * path.accuracy - error)),
            pytest.approx((path.cost / 1e6, 100 * path.accuracy + error)),
        ]
    assert "± one standard error of 400 images" in [text.get_text() for text in texts_of(figure)]


def test_every_point_has_its_rank_beside_it() -> None:
    figure = draw_pareto(PATHS, BUDGET, 400)
    ranks = {text.get_text(): text.xy for text in figure.axes[0].texts}  # type: ignore[attr-defined]
    assert ranks == {
        str(rank): pytest.approx((path.cost / 1e6, 100 * path.accuracy)) for rank, path in enumerate(PATHS, start=1)
    }


@pytest.mark.parametrize("number", [1, 2, 5, 10, 20])
@pytest.mark.parametrize("budget", [BUDGET, (0, 600_000_000), (3_000_000, 3_000_000)], ids=str)
def test_it_can_be_read(number: int, budget: tuple[int, int]) -> None:
    low, high = budget
    paths = [Measured(0.9 - 0.013 * place, low + (high - low) * (37 * place % 100) // 100) for place in range(number)]
    assert_readable(draw_pareto(paths, budget, 500))


def test_ranks_of_points_that_are_near_each_other_can_be_told_apart() -> None:
    paths = [Measured(0.9 - 0.002 * place, 3_000_000 + 10_000 * place) for place in range(4)]
    figure = draw_pareto(paths, BUDGET, 500)
    assert_readable(figure)
    # And stand on no point.
    (axes,) = figure.axes
    centres = [axes.transData.transform((path.cost / 1e6, 100 * path.accuracy)) for path in paths]
    for text, centre in itertools.product(axes.texts, centres):
        extent = text.get_window_extent()
        middle = ((extent.x0 + extent.x1) / 2, (extent.y0 + extent.y1) / 2)
        assert math.dist(middle, centre) > figure.dpi / 72 * 6


def test_where_there_is_no_room_for_a_rank_there_is_none() -> None:
    figure = draw_pareto([PATHS[0]] * 60, BUDGET, 500)
    assert_readable(figure)
    assert 8 <= len(figure.axes[0].texts) < 60


def test_paths_that_are_the_same_in_both_are_all_beaten_by_none() -> None:
    figure = draw_pareto([PATHS[0], PATHS[0]], BUDGET, 400)
    assert points_of(figure, "others") == []
    assert len(points_of(figure, "front")[0]) == 2
