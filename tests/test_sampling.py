from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from scipy.stats import chisquare

from nni_cream.errors import UserError
from nni_cream.sampling import Path, PathSampler, Prior
from tests.reference import golden

COSTS = [[11_003, 40_017, 25_441], [7_919, 90_001], [1_009, 20_011, 5_003, 60_013], [30_011, 1_301, 8_009]]
FIXED = 12_345
PRIOR = [[0.2, 0.5, 0.3], [0.7, 0.3], [0.1, 0.2, 0.3, 0.4], [0.6, 0.1, 0.3]]


def every_path(costs: Sequence[Sequence[int]]) -> list[Path]:
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


@pytest.fixture
def exact_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PathSampler, "_cells", QUANTILES[-1] - QUANTILES[0])


@pytest.fixture
def coarse_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Far coarser than the costs, so that rounding at the ends of an interval matters."""
    monkeypatch.setattr(PathSampler, "_cells", 500)


@pytest.fixture(params=["exact_grid", "coarse_grid"])
def grid(request: pytest.FixtureRequest) -> str:
    request.getfixturevalue(request.param)
    return request.param


@pytest.mark.usefixtures("grid")
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


def test_an_exact_grid_rejects_nothing_and_a_coarse_one_does(grid: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Otherwise nothing above tests the rounding at the ends of the interval.
    tried: list[bool] = []
    contains = PathSampler.contains
    monkeypatch.setattr(PathSampler, "contains", lambda self, path: tried.append(contains(self, path)) or tried[-1])
    draws(PathSampler(COSTS, FIXED, *INTERVALS["narrow"]), PRIOR, 100, seed=0)
    assert sum(tried) == 100
    assert (len(tried) == 100) == (grid == "exact_grid")
    tried.clear()
    # An exact grid needs no margin either, even where costs lie as close as can be.
    sampler = PathSampler([[0, 1, 2]] * 4, 0, 4, 4)
    generator = np.random.default_rng(1)
    for _ in range(50):
        sampler.draw([[0.5, 0.3, 0.2]] * 4, generator)
    assert tried == [True] * 50


@pytest.mark.parametrize("cells", [2_000, PathSampler._cells])
def test_no_draw_leaves_a_narrow_interval_of_a_large_space(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PathSampler, "_cells", cells)
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
    # No path that the one prior allows has the beginning of one that the other allows, and ends inside.
    sampler = PathSampler(COSTS, FIXED, cost_of((2, 0, 3, 1)), cost_of((0, 1, 2, 2)))
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
    @pytest.fixture(autouse=True)
    def nothing_is_drawn(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def drawn(*_: object) -> None:
            raise AssertionError("paths were followed or drawn to see whether there is one")

        monkeypatch.setattr(PathSampler, "_probability_to_arrive", drawn)
        monkeypatch.setattr(PathSampler, "draw", drawn)

    @pytest.mark.parametrize(
        ("low", "high"),
        [
            (0, QUANTILES[0] - 1),
            (0, QUANTILES[0] - 0.5),
            (QUANTILES[-1] + 1, 10**9),
            (QUANTILES[-1] + 0.5, math.inf),
            (QUANTILES[40], QUANTILES[30]),
            (QUANTILES[30] + 1, QUANTILES[31] - 1),
            (QUANTILES[30] + 0.5, QUANTILES[31] - 0.5),
            (QUANTILES[0] + 1, QUANTILES[1] - 1),
            (QUANTILES[-2] + 1, QUANTILES[-1] - 1),
        ],
    )
    def test_is_an_error_that_names_the_nearest_costs(self, low: float, high: float) -> None:
        with pytest.raises(UserError) as error:
            PathSampler(COSTS, FIXED, low, high)
        assert str(error.value) == refusal(QUANTILES, low, high)

    def test_agrees_with_all_paths_of_many_spaces(self) -> None:
        generator = np.random.default_rng(0)
        refused = 0
        for _ in range(300):
            unit, offset = (int(n) for n in generator.integers(1, 40, 2))
            costs = [(unit * generator.integers(0, 12, size) + offset).tolist() for size in generator.integers(1, 4, 3)]
            low, high = sorted(generator.uniform(-20, 40 * unit + 3 * offset + 20, 2))
            low, high = generator.choice([(low, high), (low, low + 15), (high, low)])
            every = sorted(sum(costs[c][i] for c, i in enumerate(path)) for path in every_path(costs))
            if any(low <= cost <= high for cost in every):
                PathSampler(costs, 0, low, high)
            else:
                refused += 1
                with pytest.raises(UserError) as error:
                    PathSampler(costs, 0, low, high)
                assert str(error.value) == refusal(every, low, high)
        assert 60 < refused < 240

    def test_in_a_space_too_large_to_enumerate(self) -> None:
        # Sums of these are every multiple of 1,000 up to 95,000, and one more.
        with pytest.raises(
            UserError, match=r"0 M to 0\.095001 M, and .* nearest to the interval 0\.047001 M and 0\.048 M"
        ):
            PathSampler(LARGE, 0, 47_002, 47_999)
        PathSampler(LARGE, 0, 47_001, 47_001)
        PathSampler(LARGE, 0, 48_000, 48_000)


def refusal(costs: list[int], low: float, high: float) -> str:
    """The message, from the costs of all paths in ascending order."""
    below = [cost for cost in costs if cost < low]
    above = [cost for cost in costs if cost >= low and cost > high]
    nearest = " and ".join(f"{cost / 1e6:.12g} M" for cost in (*below[-1:], *above[:1]))
    return (
        f"No path costs {low / 1e6:.12g} M to {high / 1e6:.12g} M multiply-accumulates: the paths of this space cost "
        f"{costs[0] / 1e6:.12g} M to {costs[-1] / 1e6:.12g} M, and those nearest to the interval {nearest}."
    )


LARGE = [[1000 * digit for digit in range(6)]] * 19 + [[0, 1]]


@pytest.mark.parametrize("cells", [15_000, 10**6])
def test_exact_distribution_in_a_space_too_large_to_enumerate(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PathSampler, "_cells", cells)
    generator = np.random.default_rng(6)
    prior = [*generator.dirichlet(np.ones(6), 19).tolist(), [0.6, 0.4]]
    # Only digits that add up to 30, and then the odd last candidate, cost that much.
    sampler = PathSampler(LARGE, 0, 30_001, 30_999)
    paths = [sampler.draw(prior, generator) for _ in range(1500)]
    assert {(sum(path[:-1]), path[-1]) for path in paths} == {(30, 1)}
    for choice in (0, 9, 18):
        others = [1.0]
        for row in prior[:choice] + prior[choice + 1 : -1]:
            others = np.convolve(others, row)
        expected = {(digit,): prior[choice][digit] * others[30 - digit] for digit in range(6)}
        assert p_value(Counter((path[choice],) for path in paths), expected) > 1e-3


@pytest.mark.usefixtures("grid")
class TestPriorThatAllowsNoPathInside:
    def test_at_all(self) -> None:
        sampler = PathSampler(COSTS, FIXED, *INTERVALS["low end"])
        dear: Prior = [[0.0, 1.0, 0.0], [0.0, 1.0], [0.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
        with pytest.raises(UserError, match=r"^The prior gives hardly any path that costs 0 M to 0\.052009 M "):
            sampler.draw(dear, np.random.default_rng(0))

    def test_but_one_that_is_nearly_inside(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(PathSampler, "_patience", 50)
        path = next(path for path in every_path(COSTS) if cost_of(path) == QUANTILES[30])
        only: Prior = [[float(i == chosen) for i in range(len(row))] for row, chosen in zip(PRIOR, path, strict=True)]
        assert PathSampler(COSTS, FIXED, QUANTILES[30], QUANTILES[33]).draw(only, np.random.default_rng(0)) == path
        sampler = PathSampler(COSTS, FIXED, QUANTILES[30] + 1, QUANTILES[33])
        with pytest.raises(UserError, match=r"^The prior gives hardly any path that costs "):
            sampler.draw(only, np.random.default_rng(0))


@pytest.mark.usefixtures("grid")
@pytest.mark.parametrize("position", [0, 30, len(QUANTILES) - 1])
def test_an_interval_that_holds_one_path_gives_that_path(position: int) -> None:
    only = QUANTILES[position]
    assert QUANTILES.count(only) == 1
    assert cost_of(PathSampler(COSTS, FIXED, only, only).draw(PRIOR, np.random.default_rng(0))) == only


@pytest.mark.usefixtures("grid")
def test_an_interval_may_have_no_upper_end() -> None:
    low = QUANTILES[60]
    counts = draws(PathSampler(COSTS, FIXED, low, math.inf), PRIOR, 100, seed=0)
    assert min(map(cost_of, counts)) >= low


def test_choices_that_cost_nothing() -> None:
    sampler = PathSampler([[0, 0, 0], [0]], 5, 5, 5)
    assert p_value(draws(sampler, [[0.2, 0.3, 0.5], [1.0]], 1000, seed=0), {(0, 0): 2, (1, 0): 3, (2, 0): 5}) > 1e-3
