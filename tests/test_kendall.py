from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau

from nni_cream.kendall import Estimate, estimate_difference, estimate_tau, kendall_tau

# Few values, so that there are ties.
measurements = st.integers(2, 12).flatmap(
    lambda number: st.tuples(*[st.lists(st.integers(0, 5), min_size=number, max_size=number)] * 2)
)


class TestTau:
    @given(measurements)
    def test_is_scipys_with_ties(self, pair: tuple[list[int], list[int]]) -> None:
        x, y = pair
        expected = kendalltau(x, y, variant="b").statistic
        found = kendall_tau(x, y)
        if math.isnan(expected):
            assert found is None
            assert len(set(x)) == 1 or len(set(y)) == 1
        else:
            assert found == pytest.approx(expected, abs=1e-12)

    @settings(max_examples=30)
    @given(st.permutations(range(9)), st.permutations(range(9)))
    def test_counts_pairs(self, x: list[int], y: list[int]) -> None:
        pairs = list(itertools.combinations(range(9), 2))
        agreeing = sum((x[i] < x[j]) == (y[i] < y[j]) for i, j in pairs)
        assert kendall_tau(x, y) == pytest.approx((agreeing - (len(pairs) - agreeing)) / len(pairs))

    def test_of_the_same_order_and_of_the_reverse(self) -> None:
        assert kendall_tau([0.1, 0.5, 0.7], [1, 20, 21]) == 1
        assert kendall_tau([0.1, 0.5, 0.7], [3, 2, 1]) == -1
        # By hand: five pairs agree, one is tied in x; √(5 · 6) is below the line.
        assert kendall_tau([1, 1, 2, 3], [1, 2, 3, 4]) == pytest.approx(5 / math.sqrt(30))


def resampled(items: int, resamples: int, seed: int) -> list[list[int]]:
    """The items in each resample."""
    counts = np.random.default_rng(seed).multinomial(items, [1 / items] * items, size=resamples)
    return [np.repeat(np.arange(items), row).tolist() for row in counts]


X = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
Y = [2, 7, 1, 8, 2, 8, 1, 8, 2, 8, 4]
Z = [5, 3, 1, 4, 6, 9, 4, 2, 7, 3, 8]


class TestInterval:
    def test_holds_the_middle_of_what_resamples_have(self) -> None:
        taus = [kendalltau([X[i] for i in drawn], [Y[i] for i in drawn]).statistic for drawn in resampled(11, 300, 5)]
        found = estimate_tau(X, Y, resamples=300, seed=5)
        assert found.value == kendall_tau(X, Y)
        assert found.interval == pytest.approx(tuple(np.nanpercentile(taus, [2.5, 97.5])))
        assert estimate_tau(X, Y, resamples=300, seed=5) == found != estimate_tau(X, Y, resamples=300, seed=6)

    def test_leaves_out_resamples_without_an_order(self) -> None:
        # Most hold one of the two middle values alone, which have no order among themselves.
        x, y = [0, 1, 1], [5, 6, 6]
        orders = [drawn for drawn in resampled(3, 50, 0) if 0 in drawn and set(drawn) != {0}]
        assert 0 < len(orders) < 50
        assert estimate_tau(x, y, resamples=50) == Estimate(1.0, (1.0, 1.0))

    def test_where_there_is_no_order_at_all(self) -> None:
        assert estimate_tau([4, 4, 4], [1, 2, 3]) == Estimate(None, None)
        assert estimate_difference([4, 4, 4], [1, 2, 3], [1, 2, 3]) == Estimate(None, None)
        assert str(Estimate(None, None)) == "undefined"

    def test_covers_what_is_true(self) -> None:
        """Of pairs of normal numbers with correlation ρ, τ is 2/π · asin ρ."""
        draws = np.random.default_rng(0)
        true = 2 / math.pi * math.asin(0.6)
        covered, width = 0, 0.0
        for number in range(300):
            x = draws.normal(size=30)
            y = 0.6 * x + 0.8 * draws.normal(size=30)
            interval = estimate_tau(x.tolist(), y.tolist(), resamples=400, seed=number).interval
            assert interval is not None
            low, high = interval
            covered += low <= true <= high
            width += (high - low) / 300
        # Binomial with 0.95: one standard deviation is 0.013. The percentile bootstrap is a little narrow for 30 items.
        assert 0.89 <= covered / 300 <= 0.985
        assert 0.3 < width < 0.5


class TestDifference:
    def test_is_of_the_same_resamples(self) -> None:
        differences = [
            kendalltau([X[i] for i in drawn], [Y[i] for i in drawn]).statistic
            - kendalltau([Z[i] for i in drawn], [Y[i] for i in drawn]).statistic
            for drawn in resampled(11, 300, 5)
        ]
        found = estimate_difference(X, Z, Y, resamples=300, seed=5)
        assert found.value == pytest.approx(kendalltau(X, Y).statistic - kendalltau(Z, Y).statistic)
        assert found.interval == pytest.approx(tuple(np.nanpercentile(differences, [2.5, 97.5])))

    def test_to_itself_is_certainly_none(self) -> None:
        assert estimate_difference(X, X, Y) == Estimate(0.0, (0.0, 0.0))


def test_as_text() -> None:
    assert str(Estimate(0.4567, (-0.123, 0.8))) == "0.46 [-0.12, 0.80]"
