from __future__ import annotations

import itertools
import math
import time
from collections import Counter

import numpy as np
import pytest
from scipy.stats import chisquare

from nni_cream.errors import UserError
from nni_cream.sampling import Path, PathSampler, Prior
from tests.reference import golden

COSTS = [[11_003, 40_017, 25_441], [7_919, 90_001], [1_009, 20_011, 5_003, 60_013], [30_011, 1_301, 8_009]]
FIXED = 12_345
PRIOR = [[0.2, 0.5, 0.3], [0.7, 0.3], [0.1, 0.2, 0.3, 0.4], [0.6, 0.1, 0.3]]


def every_path(costs: list[list[int]]) -> list[Path]:
    return list(itertools.product(*(range(len(options)) for options in costs)))


def cost_of(path: Path) -> int:
    return FIXED + sum(options[i] for options, i in zip(COSTS, path, strict=True))


def probability_of(path: Path, prior: Prior) -> float:
    return math.prod(row[i] for row, i in zip(prior, path, strict=True))


def draws(sampler: PathSampler, prior: Prior, number: int, seed: int) -> Counter[Path]:
    generator = np.random.default_rng(seed)
    return Counter(sampler.draw(prior, generator) for _ in range(number))


def p_value(counts: Counter[Path], probabilities: dict[Path, float]) -> float:
    """Of Pearson's test; paths that are rarely expected are counted together."""
    number, total = sum(counts.values()), sum(probabilities.values())
    expected = {path: number * p / total for path, p in probabilities.items()}
    common = [path for path, mean in expected.items() if mean >= 5]
    observed = [counts[path] for path in common]
    means = [expected[path] for path in common]
    rest = number - sum(means)
    if rest > 1e-9 * number:
        observed.append(number - sum(observed))
        means.append(rest)
    return float(chisquare(observed, means).pvalue)


QUANTILES = sorted(cost_of(path) for path in every_path(COSTS))
INTERVALS = {
    "everything": (QUANTILES[0], QUANTILES[-1]),
    "middle": (QUANTILES[20], QUANTILES[50]),
    "narrow": (QUANTILES[30], QUANTILES[33]),
    "low end": (0, QUANTILES[5]),
    "high end": (QUANTILES[-6], 10**9),
}


@pytest.mark.parametrize("interval", INTERVALS.values(), ids=INTERVALS)
def test_distribution_is_the_prior_conditioned_on_the_interval(interval: tuple[int, int]) -> None:
    low, high = interval
    inside = {path: probability_of(path, PRIOR) for path in every_path(COSTS) if low <= cost_of(path) <= high}
    assert len(inside) >= 4
    counts = draws(PathSampler(COSTS, FIXED, low, high), PRIOR, 3000, seed=1)
    assert set(counts) <= set(inside)
    assert p_value(counts, inside) > 1e-3


def test_the_test_can_tell_distributions_apart() -> None:
    low, high = INTERVALS["middle"]
    inside = {path: probability_of(path, PRIOR) for path in every_path(COSTS) if low <= cost_of(path) <= high}
    even = [[1 / len(row)] * len(row) for row in PRIOR]
    assert p_value(draws(PathSampler(COSTS, FIXED, low, high), even, 3000, seed=1), inside) < 1e-6


def test_the_grid_is_coarser_than_the_costs_here() -> None:
    # Otherwise nothing above tests the rounding at the ends of the interval.
    assert QUANTILES[-1] - QUANTILES[0] > 4 * PathSampler._cells


def test_no_draw_leaves_a_narrow_interval_of_a_large_space() -> None:
    generator = np.random.default_rng(3)
    costs = generator.integers(10**5, 10**7, (18, 6)).tolist()
    middle = sum(sum(options) / 6 for options in costs)
    sampler = PathSampler(costs, 0, middle * 0.999, middle * 1.001)
    prior = generator.dirichlet(np.ones(6), 18).tolist()
    for _ in range(300):
        path = sampler.draw(prior, generator)
        assert middle * 0.999 <= sum(options[i] for options, i in zip(costs, path, strict=True)) <= middle * 1.001


def test_cost_and_contains() -> None:
    sampler = PathSampler(COSTS, FIXED, QUANTILES[10], QUANTILES[40])
    for path in every_path(COSTS):
        assert sampler.cost(path) == cost_of(path)
        assert sampler.contains(path) == (QUANTILES[10] <= cost_of(path) <= QUANTILES[40])


def test_a_new_prior_takes_effect_at_once() -> None:
    sampler = PathSampler(COSTS, FIXED, *INTERVALS["everything"])
    generator = np.random.default_rng(0)
    first: Prior = [[1.0, 0.0, 0.0], [0.0, 1.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    second: Prior = [[0.0, 0.0, 1.0], [1.0, 0.0], [0.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]
    for _ in range(3):
        assert sampler.draw(first, generator) == (0, 1, 2, 2)
        assert sampler.draw(second, generator) == (2, 0, 3, 1)


def test_draws_follow_from_the_generator() -> None:
    sampler = PathSampler(COSTS, FIXED, *INTERVALS["middle"])
    assert draws(sampler, PRIOR, 50, seed=4) == draws(sampler, PRIOR, 50, seed=4) != draws(sampler, PRIOR, 50, seed=5)


class TestPublishedPrior:
    """The published code passed the prior where numpy expects ``replace``, and so drew evenly: 0.165 to 0.169 each."""

    def test_frequencies(self) -> None:
        reference = golden("cream/e_board.json")
        prior = reference["published_prior"]
        blocks = sum(reference["sta_num"])
        sampler = PathSampler([[1] * 6] * blocks, 0, 0, blocks)
        generator = np.random.default_rng(42)
        counts = np.zeros(6)
        for _ in range(1500):
            counts += np.bincount(sampler.draw([prior] * blocks, generator), minlength=6)
        assert chisquare(counts, counts.sum() * np.array(prior)).pvalue > 1e-3
        # The reference measured its corrected sampling; both are estimates of the same probabilities.
        assert counts / counts.sum() == pytest.approx(reference["frequencies_of_published_prior"], abs=0.015)

    def test_every_choice_has_it_by_itself(self) -> None:
        prior = golden("cream/e_board.json")["published_prior"]
        sampler = PathSampler([[1] * 6, [1], [1] * 6], 0, 0, 3)
        counts = draws(sampler, [prior, [1.0], prior], 3000, seed=2)
        pairs = {(a, 0, b): prior[a] * prior[b] for a in range(6) for b in range(6)}
        assert p_value(counts, pairs) > 1e-3


class TestEmptyInterval:
    @pytest.mark.parametrize(
        ("low", "high"),
        [
            (0, QUANTILES[0] - 1),
            (QUANTILES[-1] + 1, 10**9),
            (QUANTILES[40], QUANTILES[30]),
            (QUANTILES[30] + 1, QUANTILES[31] - 1),
        ],
        ids=["below", "above", "reversed", "between two paths"],
    )
    def test_is_an_error_at_once(self, low: int, high: int, monkeypatch: pytest.MonkeyPatch) -> None:
        assert QUANTILES[31] - QUANTILES[30] > 2
        monkeypatch.setattr(PathSampler, "_patience", 1000)
        with pytest.raises(UserError, match=r"No path costs .* the paths of this space cost 0\.03358 M to 0\.2324 M\."):
            PathSampler(COSTS, FIXED, low, high)

    def test_prior_that_excludes_every_path_inside_is_an_error(self) -> None:
        sampler = PathSampler(COSTS, FIXED, *INTERVALS["low end"])
        dear: Prior = [[0.0, 1.0, 0.0], [0.0, 1.0], [0.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
        with pytest.raises(UserError, match="No path costs"):
            sampler.draw(dear, np.random.default_rng(0))


@pytest.mark.parametrize("position", [0, 30, len(QUANTILES) - 1])
def test_an_interval_that_holds_one_path_gives_that_path(position: int) -> None:
    only = QUANTILES[position]
    assert QUANTILES.count(only) == 1
    begin = time.perf_counter()
    path = PathSampler(COSTS, FIXED, only, only).draw(PRIOR, np.random.default_rng(0))
    assert cost_of(path) == only
    assert time.perf_counter() - begin < 2


def test_an_interval_may_have_no_upper_end() -> None:
    low = QUANTILES[60]
    counts = draws(PathSampler(COSTS, FIXED, low, math.inf), PRIOR, 100, seed=0)
    assert min(map(cost_of, counts)) >= low


def test_choices_that_cost_nothing() -> None:
    sampler = PathSampler([[0, 0, 0], [0]], 5, 5, 5)
    assert p_value(draws(sampler, [[0.2, 0.3, 0.5], [1.0]], 1000, seed=0), {(0, 0): 2, (1, 0): 3, (2, 0): 5}) > 1e-3
