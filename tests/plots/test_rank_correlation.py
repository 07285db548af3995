from __future__ import annotations

import math

import pytest

from nni_cream.plots.rank_correlation import Panel, draw_rank_correlation
from tests.plots.reading import assert_readable, points_of, texts_of

ALONE = [0.985, 0.99, 0.978, 0.99]
CREAM = Panel("cream_mnist5k", (0.93, 0.95, 0.9, 0.94), 400, "0.91 [0.33, 1.00]")
UNIFORM = Panel("uniform_mnist5k", (0.94, 0.92, 0.95, 0.93), 400, "-0.55 [-1.00, 0.20]")


def test_a_point_is_a_path_with_both_accuracies_in_percent() -> None:
    figure = draw_rank_correlation([CREAM, UNIFORM], ALONE, 1000)
    assert points_of(figure, "paths") == [
        [pytest.approx((100 * x, 100 * y)) for x, y in zip(panel.shared, ALONE, strict=True)]
        for panel in (CREAM, UNIFORM)
    ]
    first, second = figure.axes
    assert first.get_ylim() == second.get_ylim()
    assert first.get_xlim() != second.get_xlim()
    assert first.get_xlabel() == "with shared weights (% of 400 images)"
    assert first.get_ylabel() == "trained by itself (% of 1,000 images)"


def test_the_names_and_their_tau_stand_above() -> None:
    figure = draw_rank_correlation([CREAM, UNIFORM], ALONE, 1000)
    titles = [axes.get_title("left") for axes in figure.axes]
    assert titles == ["cream_mnist5k\nτ = 0.91 [0.33, 1.00]", "uniform_mnist5k\nτ = -0.55 [-1.00, 0.20]"]
    assert any("95 % interval" in text.get_text() for text in texts_of(figure))


def test_bars_are_standard_errors_of_shares() -> None:
    figure = draw_rank_correlation([CREAM], ALONE, 1000)
    bars = points_of(figure, "errors")
    assert len(bars) == 2 * len(ALONE)
    for place, (x, y) in enumerate(zip(CREAM.shared, ALONE, strict=True)):
        wide, high = 100 * math.sqrt(x * (1 - x) / 400), 100 * math.sqrt(y * (1 - y) / 1000)
        x, y = 100 * x, 100 * y
        across, up = bars[2 * place : 2 * place + 2]
        assert across == [pytest.approx((x - wide, y)), pytest.approx((x + wide, y))]
        assert up == [pytest.approx((x, y - high)), pytest.approx((x, y + high))]


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_it_can_be_read(number: int) -> None:
    panels = [Panel(f"{place}-{'a-long-name' * 9}", CREAM.shared, 50_000, UNIFORM.tau) for place in range(number)]
    figure = draw_rank_correlation(panels, ALONE, 50_000)
    assert_readable(figure)
    assert [axes.get_title("left").partition("\n")[0] for axes in figure.axes] == [
        f"{place}-{'a-long-name' * 9}"[:29] + "…" for place in range(number)
    ]


def test_networks_that_are_all_alike_can_be_drawn() -> None:
    assert_readable(draw_rank_correlation([Panel("a", (1.0, 1.0), 10, "undefined")], (0.0, 0.0), 10))
