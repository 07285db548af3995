"""The ranking with which a Cream search ends."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from nni.nas.evaluator.pytorch import DataLoader
from torch import nn
from torch.utils.data import TensorDataset

from nni_cream.cost import measure_network
from tests.six_paths import CLASSES, SixPaths
from tests.strategies.cream.by_hand import path_of, sample_of, space_of
from tests.strategies.cream.searches import BATCH, HELD_OUT, SIZE, Search
from tests.strategies.running import SMALL_RUNS

pytestmark = SMALL_RUNS


class TestRanking:
    @staticmethod
    def network(search: Search, sample: dict[str, int], batches: int | None) -> nn.Module:
        """The path with batch-norm statistics that are the average over the first training batches."""
        network = space_of(search.strategy.supernet.state_dict()).freeze(sample)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
                module.reset_running_stats()
        with torch.no_grad():
            for images, _ in search.batches()[:batches]:
                network.train()(images)
        return network.eval()

    @pytest.mark.parametrize("calibration", [1, 2, 20])
    def test_accuracy_has_batch_norms_of_the_path(self, calibration: int, run: Callable[..., Search]) -> None:
        search = run(teacher="matching", recalibration_batches=calibration)
        accuracies = {}
        for entry in search.module.board.entries:
            network = self.network(search, sample_of(entry.path), calibration)
            images, labels = HELD_OUT.tensors
            accuracies[entry.path] = (network(images).argmax(-1) == labels).double().mean().item()
        found = {path_of(ranked.sample): ranked.accuracy for ranked in search.module.ranking}
        assert found == pytest.approx(accuracies, abs=1e-12)
        assert len(set(accuracies.values())) > 1

    def test_order_and_costs(self, run: Callable[..., Search]) -> None:
        ranking = run(teacher="matching").module.ranking
        assert [path.accuracy for path in ranking] == sorted((path.accuracy for path in ranking), reverse=True)
        for path in ranking:
            assert path.cost == measure_network(SixPaths().freeze(path.sample), SIZE)

    @pytest.mark.parametrize("limit", [1, 2, None])
    def test_models_come_in_the_order_of_the_ranking(self, limit: int | None, run: Callable[..., Search]) -> None:
        search = run(teacher="matching")
        models = list(search.strategy.list_models(limit=limit))
        expected = [path.sample for path in search.module.ranking][:limit]
        assert len(expected) == (limit or len(search.module.board))
        assert [model.sample for model in models] == expected
        images = search.data.tensors[0][:5]
        for model in models:
            network = space_of(search.strategy.supernet.state_dict()).freeze(model.sample)
            ours = model.executable_model()
            assert torch.equal(ours.eval()(images), network.eval()(images))

    def test_best_path_is_exported(self, run: Callable[..., Search]) -> None:
        module = run(teacher="matching").module
        assert module.export() == module.ranking[0].sample

    def test_other_images_may_rank(self, data: TensorDataset) -> None:
        # With labels turned by one class, what was right is wrong.
        images, labels = data.tensors
        turned = DataLoader(TensorDataset(images, (labels + 1) % CLASSES), batch_size=BATCH)
        straight = Search(data, teacher="none").run().module.ranking
        other = Search(data, teacher="none", ranking_dataloader=turned).run().module.ranking
        for path in other:
            same = next(p for p in straight if p.sample == path.sample)
            assert path.accuracy <= 1 - same.accuracy
        assert [p.accuracy for p in other] != [p.accuracy for p in straight]

    @pytest.mark.parametrize("calibration", [1, 2, 20])
    def test_calibrated_network_is_that_of_the_ranking(self, calibration: int, run: Callable[..., Search]) -> None:
        search = run(teacher="matching", recalibration_batches=calibration)
        sample = search.module.ranking[0].sample
        network = search.module.calibrated_network(sample).eval()
        images, _ = HELD_OUT.tensors
        logits = network(images)
        torch.testing.assert_close(logits, self.network(search, sample, calibration)(images), rtol=1e-9, atol=1e-12)
        assert not torch.allclose(logits, self.network(search, sample, 3)(images))

    def test_of_equal_accuracies_the_cheaper_path_is_first(self, data: TensorDataset) -> None:
        # Nobody ever answers with this class.
        images, labels = data.tensors
        loader = DataLoader(TensorDataset(images, torch.full_like(labels, CLASSES)), batch_size=BATCH)
        search = Search(data, teacher="none", board_size=6, ranking_dataloader=loader).run()
        assert {path.accuracy for path in search.module.ranking} == {0.0}
        costs = [path.cost.macs for path in search.module.ranking]
        assert len(costs) == len(set(costs)) >= 4
        assert costs == sorted(costs)
        assert costs != sorted(costs, reverse=True) != [entry.macs for entry in search.module.board.entries] != costs
