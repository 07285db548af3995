"""Averaged weights beside the plain ones, in the course of a training."""

from __future__ import annotations

import copy
from pathlib import Path
from types import MappingProxyType

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from nni_cream.ema import WeightAverage
from nni_cream.settings import Schedule
from tests.trainers import LIGHTNINGS_WARNINGS, QUIET
from tests.training.fitting import BATCH, VALIDATION, Run, fit

pytestmark = LIGHTNINGS_WARNINGS


class TestAveragedWeights:
    EMA = MappingProxyType({"decay": 0.7, "use_warmup": False})

    @pytest.fixture(scope="class")
    def averaged(self, tmp_path_factory: pytest.TempPathFactory) -> Run:
        return fit(tmp_path_factory.mktemp("averaged"), Schedule(), ema=self.EMA)

    def test_do_not_change_the_training(self, averaged: Run, finished: Run) -> None:
        for (name, ours), theirs in zip(
            averaged.module.model.state_dict().items(), finished.module.model.state_dict().values(), strict=True
        ):
            assert torch.equal(ours, theirs), name
        assert averaged.recorder.losses == finished.recorder.losses

    @pytest.mark.parametrize("stage", ["val", "test"])
    def test_are_measured_beside_the_plain_ones(self, tmp_path: Path, averaged: Run, stage: str) -> None:
        if stage == "val":
            measured = averaged.reports[-1]
        else:
            trainer = pl.Trainer(**QUIET, default_root_dir=tmp_path)
            (measured,) = trainer.test(averaged.module, DataLoader(VALIDATION, BATCH), verbose=False)
        network = copy.deepcopy(averaged.module.model).eval()
        average = copy.deepcopy(network)
        average.load_state_dict(averaged.module.ema.module.state_dict())
        expected = {}
        for prefix, weights in ((stage, average), (f"{stage}_plain", network)):
            with torch.no_grad():
                logits = weights(VALIDATION.tensors[0])
            labels = VALIDATION.tensors[1]
            expected[f"{prefix}_accuracy"] = (logits.argmax(1) == labels).double().mean().item()
            expected[f"{prefix}_top5"] = (logits.topk(5).indices == labels[:, None]).any(1).double().mean().item()
            expected[f"{prefix}_loss"] = F.nll_loss(logits.log_softmax(1), labels).item()
        assert {name: value for name, value in measured.items() if stage in name} == pytest.approx(expected, rel=1e-5)
        assert abs(expected[f"{stage}_loss"] - expected[f"{stage}_plain_loss"]) > 1e-3
        if stage == "val":
            assert measured["default"] == measured["val_accuracy"]

    def test_are_no_part_of_what_is_optimized(self, averaged: Run) -> None:
        optimized = {id(p) for group in averaged.trainer.optimizers[0].param_groups for p in group["params"]}
        assert optimized == {id(parameter) for parameter in averaged.module.model.parameters()}
        assert not any(parameter.requires_grad for parameter in averaged.module.ema.parameters())

    def test_are_averaged_once_a_step_however_often_it_is_measured(self, averaged: Run) -> None:
        found = [callback for callback in averaged.trainer.callbacks if isinstance(callback, WeightAverage)]
        assert len(found) == 1
        averaged.trainer.validate(averaged.module, DataLoader(VALIDATION, BATCH), verbose=False)
        assert [c for c in averaged.trainer.callbacks if isinstance(c, WeightAverage)] == found

    def test_go_on_where_they_were_after_an_interruption(self, tmp_path: Path, averaged: Run) -> None:
        first = fit(tmp_path, Schedule(), stop_after=1, ema=self.EMA)
        first.trainer.save_checkpoint(tmp_path / "last.ckpt")
        second = fit(tmp_path, Schedule(), checkpoint=tmp_path / "last.ckpt", ema=self.EMA)
        assert first.reports + second.reports == averaged.reports
        state = second.module.ema.state_dict()
        for name, tensor in averaged.module.ema.state_dict().items():
            assert torch.equal(state[name], tensor), name
