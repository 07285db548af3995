"""The guards that end a DARTS search before it collapses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from nni.nas.evaluator.pytorch import DataLoader
from torch import Tensor

from nni_cream.genotype import Genotype
from nni_cream.strategies import darts_module
from nni_cream.strategies.darts import DartsStrategy
from tests.strategies.darts.by_hand import cross_entropy, logits_by_hand
from tests.strategies.darts.forcing import RISING, Favour, SetAlpha, few_batches, genotype_of, preferring
from tests.strategies.darts.searches import (
    ALPHA_BATCH,
    FOR_ALPHA,
    TRAIN_BATCH,
    TRAINING,
    Search,
    assert_equal,
    cells,
    held_out,
    two_nodes,
)
from tests.strategies.running import SMALL_RUNS

pytestmark = SMALL_RUNS


class TestSkipGuard:
    """Few skip connections in the first epochs, and then too many."""

    FEW = preferring("sep_conv_3x3", 5)
    MANY = preferring("skip_connect", 5)

    def search(self, tables: dict[int, Tensor], kind: str = "normal", **settings: Any) -> Search:
        forced = SetAlpha({epoch: {kind: table} for epoch, table in tables.items()})
        defaults: dict[str, Any] = {"epochs": 5, "order": "first", "stop_above_skips": 3}
        defaults["callbacks"] = [forced, Favour()]
        return Search(two_nodes, training=few_batches(2), **{**defaults, **settings}).run()

    def test_ends_the_search_with_alpha_of_the_epoch_before(self) -> None:
        second = preferring("avg_pool_3x3", 5)
        search = self.search({1: self.FEW, 2: second, 3: self.MANY})
        assert [report["epoch"] for report in search.reports] == [1, 2, 3]
        assert [report["skip_connections_normal"] for report in search.reports] == [0, 0, 4]
        assert torch.equal(search.alphas["normal"], second)
        # The other table goes back as well.
        assert torch.equal(search.alphas["reduce"], search.alphas_after_epoch(2)["reduce"])
        assert not torch.equal(search.alphas["reduce"], search.alphas_after_epoch(3)["reduce"])
        assert search.module.ended_because == (
            "the normal cell keeps 4 skip connections, more than 3; the result is that of epoch 2"
        )
        (final,) = search.final
        assert Genotype.from_sample(final["architecture"]) == genotype_of(search.alphas)
        assert final["default"] == search.reports[1]["val_accuracy"] != search.reports[2]["val_accuracy"]

    def test_in_the_first_epoch_there_is_nothing_to_go_back_to(self) -> None:
        search = self.search({1: self.MANY})
        assert len(search.reports) == 1
        assert "epoch 1" in str(search.module.ended_because)
        assert torch.equal(search.alphas["normal"], self.MANY)

    def test_does_not_go_back_into_the_warm_up(self) -> None:
        search = self.search({3: self.MANY}, warmup_epochs=2)
        assert len(search.reports) == 3
        assert "epoch 3" in str(search.module.ended_because)

    def test_says_nothing_during_the_warm_up(self) -> None:
        search = self.search({1: self.MANY, 2: self.FEW, 3: self.MANY}, warmup_epochs=1)
        assert [report["skip_connections_normal"] for report in search.reports] == [4, 0, 4]
        assert "epoch 2" in str(search.module.ended_because)

    @pytest.mark.parametrize(
        ("tables", "settings"),
        [
            ({2: MANY}, {"stop_above_skips": 4}),
            ({2: MANY}, {"stop_above_skips": None}),
            ({2: MANY}, {"kind": "reduce"}),
        ],
        ids=["as many as allowed", "off", "reduction cell"],
    )
    def test_otherwise_it_goes_on(self, tables: dict[int, Tensor], settings: dict[str, Any]) -> None:
        search = self.search(tables, epochs=3, **settings)
        assert len(search.reports) == 3
        assert search.module.ended_because is None
        assert_equal(search.alphas, search.alphas_after_epoch(3))

    def test_counts_before_the_limit_of_the_result(self) -> None:
        search = self.search({1: self.FEW, 2: self.MANY}, skip_limit=1)
        assert len(search.reports) == 2

    def test_a_space_without_cells_has_no_skip_connections(self) -> None:
        assert len(Search(stop_above_skips=0, epochs=2, order="first").run().reports) == 2


class TestEigenvalue:
    @pytest.mark.parametrize("reporting", [False, True])
    def test_is_that_of_the_hessian(self, reporting: bool) -> None:
        loader = held_out() if reporting else None
        search = Search(
            epochs=2, warmup_epochs=1, label_smoothing=0.2, eigenvalue="track", reporting_dataloader=loader
        ).run()
        assert "eigenvalue" not in search.reports[0]
        last = search.steps[-1]
        # Of the loss that α learns from, on the last of the batches that α learns from.
        images, labels = last.batch["alpha"]

        def loss(flat: Tensor) -> Tensor:
            pieces = flat.split([len(table) for table in last.alphas_after.values()])
            alphas = dict(zip(last.alphas_after, pieces, strict=True))
            return cross_entropy(logits_by_hand(last.space_after, alphas, images), labels, 0.2)

        hessian = torch.autograd.functional.hessian(loss, torch.cat(list(last.alphas_after.values())))
        largest = torch.linalg.eigvalsh(hessian)[-1].item()
        assert largest > 1e-3
        assert search.reports[1]["eigenvalue"] == pytest.approx(largest, rel=2e-3)

    def test_to_look_at_it_changes_nothing(self) -> None:
        def search(eigenvalue: Any) -> Search:
            loaders = [
                DataLoader(data, batch_size=size, shuffle=True)
                for data, size in ((TRAINING, TRAIN_BATCH), (FOR_ALPHA, ALPHA_BATCH))
            ]
            return Search(
                training=loaders[0], for_alpha=loaders[1], reporting_dataloader=held_out(), eigenvalue=eigenvalue
            ).run()

        tracked, usual = search("track"), search("off")
        assert_equal(tracked.alphas, usual.alphas)
        assert_equal(tracked.steps[-1].space_after, usual.steps[-1].space_after)
        for ours, theirs in zip(tracked.reports, usual.reports, strict=True):
            assert ours.pop("eigenvalue") > 0
            assert ours == theirs

    def scripted(self, values: Sequence[float], monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Search:
        series = iter(values)
        monkeypatch.setattr(darts_module, "dominant_eigenvalue", lambda *_: next(series))
        return Search(epochs=14, order="first", training=few_batches(1), callbacks=[Favour()], **settings).run()

    def test_stop(self, monkeypatch: pytest.MonkeyPatch) -> None:
        search = self.scripted(RISING, monkeypatch, eigenvalue="stop")
        assert [report["eigenvalue"] for report in search.reports] == list(RISING[:11])
        assert search.module.ended_because == (
            "the dominant eigenvalue of the validation Hessian rises sharply; the result is that of epoch 11"
        )
        assert_equal(search.alphas, search.alphas_after_epoch(11))
        assert search.final[0]["default"] == search.reports[10]["val_accuracy"]

    def test_rollback(self, monkeypatch: pytest.MonkeyPatch) -> None:
        search = self.scripted(RISING, monkeypatch, eigenvalue="rollback")
        assert len(search.reports) == 11
        assert_equal(search.alphas, search.alphas_after_epoch(6))
        assert str(search.module.ended_because).endswith("the result is that of epoch 6")
        assert search.final[0]["default"] == search.reports[5]["val_accuracy"] != search.reports[10]["val_accuracy"]
        assert search.final[0]["architecture"] == search.module.export()

    def test_warm_up_does_not_count(self, monkeypatch: pytest.MonkeyPatch) -> None:
        search = self.scripted(RISING, monkeypatch, eigenvalue="rollback", warmup_epochs=2)
        assert len(search.reports) == 2 + 11
        assert_equal(search.alphas, search.alphas_after_epoch(2 + 6))

    @pytest.mark.parametrize("eigenvalue", ["track", "off"])
    def test_otherwise_it_goes_on(self, eigenvalue: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        search = self.scripted(RISING, monkeypatch, eigenvalue=eigenvalue)
        assert len(search.reports) == 14
        assert search.module.ended_because is None
        assert ("eigenvalue" in search.reports[0]) == (eigenvalue == "track")

    def test_too_many_skip_connections_come_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(darts_module, "dominant_eigenvalue", lambda *_: 1.0)
        monkeypatch.setattr(darts_module, "rises_sharply", lambda values: len(values) >= 3)
        forced = SetAlpha({3: {"normal": preferring("skip_connect", 2)}})
        settings: dict[str, Any] = {"order": "first", "eigenvalue": "stop", "stop_above_skips": 1}
        search = Search(cells, training=few_batches(1), callbacks=[forced], **settings).run()
        assert "skip connections" in str(search.module.ended_because)
        assert_equal(search.alphas, search.alphas_after_epoch(2))


def test_guards_are_off_by_default() -> None:
    settings = DartsStrategy().settings
    assert settings.stop_above_skips is settings.skip_limit is settings.flops_target is None
    assert settings.eigenvalue == "off"
