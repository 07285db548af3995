"""Searches with Cream whose budget is one of time."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from nni.nas.evaluator.pytorch import DataLoader
from torch.utils.data import TensorDataset

from nni_cream.board import PrioritizedBoard
from nni_cream.errors import UserError
from nni_cream.latency import LatencyBudget
from nni_cream.strategies.cream import CreamStrategy
from tests.six_paths import CLASSES
from tests.strategies.cream.by_hand import sample_of
from tests.strategies.cream.searches import BATCH, COSTS, SAMPLES, Search, images
from tests.strategies.running import SMALL_RUNS

pytestmark = SMALL_RUNS


@functools.cache
def _search() -> Search:
    data = images(6 * BATCH, seed=0)
    pixels, labels = data.tensors
    loader = DataLoader(TensorDataset(pixels, torch.full_like(labels, CLASSES)), batch_size=BATCH)
    budget = TestBudgetOfTime.BUDGET
    return Search(data, epochs=4, latency=budget, board_size=6, ranking_dataloader=loader).run()


class TestBudgetOfTime:
    """The dearer a path in MACs, the less time it takes here."""

    BUDGET = LatencyBudget({"first": (0.7, 0.4, 0.1), "second": (0.25, 0.05)}, 0.5, 0.8, 1.25)

    @pytest.fixture
    def search(self) -> Search:
        """Run once; it ranks by cost, since nobody ever answers with the class it wants."""
        return _search()

    @staticmethod
    def time(sample: dict[str, int]) -> float:
        return round(0.5 + (0.7, 0.4, 0.1)[sample["first"]] + (0.25, 0.05)[sample["second"]], 4)

    def test_every_path_lies_in_the_interval(self, search: Search) -> None:
        allowed = {str(sample) for sample in SAMPLES if 0.8 <= self.time(sample) <= 1.25}
        # One of 1.25 ms, the end, is among them.
        assert len(allowed) == 4
        assert {str(step.drawn) for step in search.steps} == allowed
        assert {str(sample_of(entry.path)) for entry in search.module.board.entries} == allowed

    def test_entries_and_what_is_remembered_of_them_have_both_costs(self, search: Search) -> None:
        entries = search.module.board.entries
        for entry in entries:
            assert entry.latency == self.time(sample_of(entry.path)) == entry.cost
            assert entry.macs == COSTS[str(sample_of(entry.path))]
        (*_, places) = search.module.history.epochs.values()
        assert [(place.macs, place.latency) for place in places] == [(entry.macs, entry.latency) for entry in entries]

    def test_of_equal_accuracies_the_quicker_path_is_first_and_told(self, search: Search) -> None:
        ranking = search.module.ranking
        assert {path.accuracy for path in ranking} == {0.0}
        times = [self.time(path.sample) for path in ranking]
        assert [path.latency for path in ranking] == times == sorted(times)
        assert [path.cost.macs for path in ranking] != sorted(path.cost.macs for path in ranking)
        (final,) = search.final
        assert (final["latency"], final["path"]) == (times[0], ranking[0].sample)

    def test_the_board_is_asked_for_time(self, data: TensorDataset, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[float] = []
        admits = PrioritizedBoard.admits

        def watched(self: PrioritizedBoard, score: float, cost: float) -> bool:
            asked.append(cost)
            return admits(self, score, cost)

        monkeypatch.setattr(PrioritizedBoard, "admits", watched)
        Search(data, latency=self.BUDGET, board_size=2, teacher="none").run()
        assert asked
        assert set(asked) <= {self.time(sample) for sample in SAMPLES}

    def test_an_interval_without_paths_is_an_error(self, data: TensorDataset) -> None:
        with pytest.raises(UserError, match=r"^No path costs 2 ms to 3 ms a batch: .* cost 0\.65 ms to 1\.45 ms, and"):
            Search(data, latency=replace(self.BUDGET, low=2, high=3)).run()

    def test_there_is_one_budget(self) -> None:
        with pytest.raises(UserError, match="CreamStrategy has one budget: give flops_range or latency, not both"):
            CreamStrategy(latency=self.BUDGET, flops_range=(1, 2))
