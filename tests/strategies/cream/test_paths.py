"""Which paths a Cream search draws."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import nni.nas.nn.pytorch as nas
import numpy as np
import pytest
from scipy.stats import chisquare
from torch.utils.data import TensorDataset

from nni_cream.errors import UserError
from tests.six_paths import SixPaths
from tests.strategies.cream.by_hand import sample_of
from tests.strategies.cream.searches import COSTS, SAMPLES, Search
from tests.strategies.running import SMALL_RUNS

pytestmark = SMALL_RUNS


class TestPaths:
    ORDERED = sorted(COSTS.values())

    @pytest.mark.parametrize("interval", [(1, 3), (0, 1), (4, 4)])
    def test_every_path_lies_in_the_interval(self, interval: tuple[int, int], run: Callable[..., Search]) -> None:
        low, high = (self.ORDERED[i] for i in interval)
        search = run(flops_range=(low, high))
        drawn = {str(step.drawn) for step in search.steps}
        allowed = {name for name, cost in COSTS.items() if low <= cost <= high}
        assert drawn == allowed
        assert {str(sample_of(entry.path)) for entry in search.module.board.entries} <= allowed
        for entry in search.module.board.entries:
            assert entry.macs == COSTS[str(sample_of(entry.path))]

    def test_without_an_interval_every_path_is_drawn(self, run: Callable[..., Search]) -> None:
        assert len({str(step.drawn) for step in run(teacher="none").steps}) == len(SAMPLES)

    def test_an_interval_without_paths_is_an_error(self, data: TensorDataset) -> None:
        with pytest.raises(UserError, match="No path costs"):
            Search(data, flops_range=(1.0, 2.0)).run()

    def test_a_prior_without_paths_in_the_interval_is_an_error(self, data: TensorDataset) -> None:
        # Inside lies only the path that begins with the first candidate.
        assert SAMPLES[0] == {"first": 0, "second": 0}
        interval = (COSTS[str(SAMPLES[0])],) * 2
        with pytest.raises(UserError, match="The prior gives hardly any path"):
            Search(data, flops_range=interval, prior={"first": (0.0, 0.5, 0.5)}).initialize()
        Search(data, flops_range=interval, prior={"first": (0.1, 0.9, 0.0)}).initialize()

    def test_given_prior_applies_to_choices_of_its_length(self, run: Callable[..., Search]) -> None:
        drawn = [step.drawn for step in run(prior=(0.0, 2.0, 0.0), teacher="none").steps]
        assert {sample["first"] for sample in drawn} == {1}
        assert {sample["second"] for sample in drawn} == {0, 1}

    def test_a_prior_may_be_an_array(self, data: TensorDataset) -> None:
        drawn = [step.drawn for step in Search(data, prior=np.array([0.0, 2.0, 0.0])).run().steps]
        assert {sample["first"] for sample in drawn} == {1}

    def test_the_weights_of_a_layer_choice_are_its_prior(self, data: TensorDataset) -> None:
        class Weighted(SixPaths):
            def __init__(self) -> None:
                super().__init__()
                candidates = [self.candidate(6, kernel) for kernel in (1, 3)]
                self.second = nas.LayerChoice(candidates, weights=[0.0, 1.0], label="second")

        drawn = [step.drawn for step in Search(data, space=Weighted).run().steps]
        assert {sample["second"] for sample in drawn} == {1}
        assert {sample["first"] for sample in drawn} == {0, 1, 2}
        given = Search(data, space=Weighted, prior={"second": (1.0, 0.0)}).run().steps
        assert {step.drawn["second"] for step in given} == {0}

    def test_prior_that_fits_no_choice_is_an_error(self, data: TensorDataset) -> None:
        with pytest.raises(UserError, match=r"prior has 6 probabilities, but .* have \[2, 3\] candidates"):
            Search(data, prior=(1 / 6,) * 6).run()

    def test_prior_by_label(self, data: TensorDataset) -> None:
        drawn = [step.drawn for step in Search(data, prior={"second": (0.0, 3.0)}, teacher="none").run().steps]
        assert {sample["second"] for sample in drawn} == {1}
        assert {sample["first"] for sample in drawn} == {0, 1, 2}

    def test_given_prior_is_what_paths_are_drawn_from(self, data: TensorDataset) -> None:
        prior = {"first": (0.1, 0.6, 0.3), "second": (0.2, 0.8)}
        module = Search(data, prior=prior, teacher="none").run().module
        counts = Counter((sample["first"], sample["second"]) for sample in (module.resample() for _ in range(2000)))
        expected = {(i, j): 2000 * prior["first"][i] * prior["second"][j] for i in range(3) for j in range(2)}
        assert chisquare([counts[path] for path in expected], list(expected.values())).pvalue > 1e-3

    @pytest.mark.parametrize(
        ("prior", "message"),
        [
            ({"third": (0.5, 0.5)}, "The prior of the choice 'third' has 2 probabilities, but there is no such choice"),
            ({"first": (0.5, 0.5)}, "The prior of the choice 'first' has 2 probabilities, but it has 3 candidates"),
            ({"second": (0.0, 0.0)}, r"The prior of the choice 'second' is \[0.0, 0.0\], but .* not all 0"),
            ((1.0, -0.5), r"The prior of the choice 'second' is \[1.0, -0.5\], but probabilities are not negative"),
        ],
    )
    def test_prior_that_is_none_is_an_error(self, prior: Any, message: str, data: TensorDataset) -> None:
        with pytest.raises(UserError, match=message):
            Search(data, prior=prior).run()

    def test_prior_from_the_board(self, run: Callable[..., Search]) -> None:
        search = run(prior="board", board_size=2)
        module = search.module
        paths = [entry.path for entry in module.board.entries]
        counts = [[[path[c] for path in paths].count(i) / len(paths) for i in range(n)] for c, n in ((0, 3), (1, 2))]
        order = [module.paths.labels.index(label) for label in ("first", "second")]
        assert [module.prior[position] for position in order] == counts
        # A candidate that is not on the board while a step is drawn is not drawn.
        for step in search.steps:
            for position, label in enumerate(("first", "second")):
                assert not step.board or step.drawn[label] in {entry.path[position] for entry in step.board}

    def test_paths_follow_from_the_seed(self, run: Callable[..., Search], data: TensorDataset) -> None:
        first = [step.drawn for step in run(teacher="none").steps]
        again = Search(data, teacher="none").run()
        assert [step.drawn for step in again.steps] == first
        assert [step.drawn for step in run(teacher="none", seed=4).steps] != first
