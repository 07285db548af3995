"""What the trainer of a DARTS search may do: end it by steps, validate, follow schedules, unfreeze weights."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from nni.nas.evaluator.pytorch import DataLoader
from pytorch_lightning.callbacks import ModelCheckpoint
from timm.scheduler.plateau_lr import PlateauLRScheduler
from torch.utils.data import BatchSampler, RandomSampler

from nni_cream.cuda_graphs import WARM_UP, Recorder
from nni_cream.errors import UserError
from nni_cream.strategies.darts_module import DartsLightningModule
from tests.stand_in_graphs import StandIn
from tests.strategies.darts.forcing import few_batches
from tests.strategies.darts.searches import (
    ALPHA_BATCH,
    ALPHA_BATCHES,
    FOR_ALPHA,
    TRAIN_BATCHES,
    Classifier,
    Search,
    Space,
    frozen,
)
from tests.strategies.running import SMALL_RUNS, assert_same

pytestmark = SMALL_RUNS


class TestEndedBySteps:
    def search(self, steps: int, **trainer: Any) -> Search:
        return Search(order="first", epochs=-1, trainer={"max_steps": steps, **trainer})

    @pytest.mark.parametrize("sanity", [0, 2])
    def test_only_epochs_with_a_validation_are_reported(self, sanity: int) -> None:
        search = self.search(2 * TRAIN_BATCHES + 1, num_sanity_val_steps=sanity).run()
        assert len(search.steps) == 2 * TRAIN_BATCHES + 1
        assert [report["epoch"] for report in search.reports] == [1, 2]
        assert len(search.module.epochs) == 2
        (final,) = search.final
        assert final["default"] == search.reports[-1]["val_accuracy"]
        assert final["architecture"] == search.module.export()

    @pytest.mark.parametrize("sanity", [0, 2])
    def test_before_the_first_validation(self, sanity: int) -> None:
        search = self.search(TRAIN_BATCHES - 1, num_sanity_val_steps=sanity)
        with pytest.raises(UserError, match=r"lasts 4 steps \(max_steps\), and the first validation comes after 5; "):
            search.run()
        assert not search.steps

    def test_validations_within_an_epoch_count(self) -> None:
        search = self.search(2, val_check_interval=2).run()
        assert [report["epoch"] for report in search.reports] == [1]
        assert 0 <= search.final[0]["default"] <= 1


def test_the_accuracy_of_an_epoch_whose_validation_was_before_a_checkpoint(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=False)
    straight = Search(epochs=2, order="first", callbacks=[saver], trainer={"enable_checkpointing": True}).run()
    resumed = Search(epochs=2, order="first", checkpoint=tmp_path / "last.ckpt").run()
    assert resumed.reports == straight.reports[1:]
    assert resumed.final == straight.final


class Plateau(Classifier):
    def __init__(self, schedule: Any) -> None:
        super().__init__()
        self.schedule = schedule

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())
        return [optimizer], [{"scheduler": self.schedule(optimizer), "interval": "epoch"}]


@pytest.mark.parametrize("schedule", [torch.optim.lr_scheduler.ReduceLROnPlateau, PlateauLRScheduler])
def test_a_schedule_that_waits_for_a_metric(schedule: Any) -> None:
    search = Search(classifier=Plateau(schedule))
    with pytest.raises(UserError, match=rf"schedule {schedule.__name__} waits for a metric.* of epochs or steps\.$"):
        search.run()
    assert not search.steps


class TestOrderOfValidationImages:
    """Two batches for α, beside one for the weights."""

    def warned(self, loader: Any, **settings: Any) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            Search(**{"for_alpha": loader, "training": few_batches(1), "epochs": 2, "order": "first", **settings}).run()
        return [str(warning.message) for warning in caught if "α learns" in str(warning.message)]

    @pytest.mark.parametrize(
        "settings", [{}, {"training": None, "trainer": {"limit_train_batches": 1}}], ids=["loader", "limit"]
    )
    def test_batches_that_are_never_used(self, settings: dict[str, Any]) -> None:
        (message,) = self.warned(DataLoader(FOR_ALPHA, batch_size=ALPHA_BATCH), **settings)
        assert "the same 1 of 2 validation batches in every epoch" in message
        assert message.endswith("shuffle the loader of the validation images (shuffle=True).")

    def test_shuffled(self) -> None:
        assert self.warned(DataLoader(FOR_ALPHA, batch_size=ALPHA_BATCH, shuffle=True)) == []

    def test_shuffled_by_a_batch_sampler(self) -> None:
        batches = BatchSampler(RandomSampler(FOR_ALPHA), ALPHA_BATCH, drop_last=False)
        assert self.warned(DataLoader(FOR_ALPHA, batch_sampler=batches)) == []

    def test_all_are_used(self) -> None:
        loader = DataLoader(FOR_ALPHA, batch_size=ALPHA_BATCH)
        assert self.warned(loader, training=few_batches(ALPHA_BATCHES)) == []


class Unfreeze(pl.Callback):
    """Lets everything be trained from an epoch on, counted from 0."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == self.epoch:
            pl_module.training_module.requires_grad_(True)


class TestUnfreezing:
    def test_from_the_first_epoch_it_is_a_search_without_frozen_weights(self) -> None:
        ours, usual = Search(frozen, epochs=1, callbacks=[Unfreeze(0)]).run(), Search(Space, epochs=1).run()
        assert len(ours.module._weights) == len(usual.module._weights)
        assert_same(ours.alphas, usual.alphas)
        assert_same(ours.module.model.state_dict(), usual.module.model.state_dict())

    def test_recorded_steps_are_recorded_anew(self, monkeypatch: pytest.MonkeyPatch) -> None:
        recording = StandIn()
        plain = Search(frozen, epochs=3, callbacks=[Unfreeze(1)]).run()
        start = DartsLightningModule.on_train_start

        def on_train_start(self: DartsLightningModule) -> None:
            start(self)
            self.record_steps(Recorder(recording))

        monkeypatch.setattr(DartsLightningModule, "on_train_start", on_train_start)
        replayed = Search(frozen, epochs=3, callbacks=[Unfreeze(1)]).run()
        assert recording.recordings == 4
        # Two functions, three epochs; the first calls after every change are watched.
        assert recording.replays == 2 * (3 * TRAIN_BATCHES - 2 * WARM_UP)
        for ours, theirs in zip(replayed.steps, plain.steps, strict=True):
            assert_same(ours.space_after, theirs.space_after, rtol=1e-12, atol=1e-12)
            assert_same(ours.alphas_after, theirs.alphas_after, rtol=1e-12, atol=1e-12)
