"""What is measured after every epoch, and what NNI is told of it."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from nni_cream.training import Measures
from tests.trainers import LIGHTNINGS_WARNINGS, QUIET
from tests.training.fitting import BATCH, CLASSES, IMAGES, VALIDATION, Run

pytestmark = LIGHTNINGS_WARNINGS


class TestMeasures:
    @pytest.fixture
    def logits(self, finished: Run) -> Tensor:
        with torch.no_grad():
            logits: Tensor = copy.deepcopy(finished.module.model).eval()(VALIDATION.tensors[0])
        return logits

    def test_accuracy_is_a_count(self, finished: Run, logits: Tensor) -> None:
        right = sum(
            row.index(max(row)) == target
            for row, target in zip(logits.tolist(), VALIDATION.tensors[1].tolist(), strict=True)
        )
        assert 0 < right < IMAGES
        assert finished.reports[-1]["val_accuracy"] == pytest.approx(right / IMAGES, rel=1e-6)

    def test_top5_is_a_count(self, finished: Run, logits: Tensor) -> None:
        right = sum(
            target in sorted(range(CLASSES), key=row.__getitem__)[-5:]
            for row, target in zip(logits.tolist(), VALIDATION.tensors[1].tolist(), strict=True)
        )
        assert 0 < right < IMAGES
        assert finished.reports[-1]["val_top5"] == pytest.approx(right / IMAGES, rel=1e-6)

    def test_loss_weighs_every_image_alike_and_is_not_smoothed(self, finished: Run, logits: Tensor) -> None:
        loss = F.nll_loss(logits.log_softmax(1), VALIDATION.tensors[1]).item()
        assert finished.reports[-1]["val_loss"] == pytest.approx(loss, rel=1e-5)

    def test_of_the_test_part_are_the_same(self, finished: Run, tmp_path: Path) -> None:
        trainer = pl.Trainer(**QUIET, default_root_dir=tmp_path)
        (tested,) = trainer.test(finished.module, DataLoader(VALIDATION, BATCH), verbose=False)
        last = finished.reports[-1]
        assert tested == pytest.approx({name.replace("val", "test"): last[name] for name in last if "val" in name})


class TestReports:
    def test_one_an_epoch_and_none_of_the_sanity_check(self, finished: Run) -> None:
        assert finished.trainer.num_sanity_val_steps > 0
        assert [report["epoch"] for report in finished.reports] == [1, 2]

    def test_nnis_default_metric_is_the_accuracy(self, finished: Run) -> None:
        assert [report["default"] for report in finished.reports] == [r["val_accuracy"] for r in finished.reports]

    def test_can_be_sent(self, finished: Run) -> None:
        assert json.loads(json.dumps(finished.reports)) == finished.reports


def test_few_classes_need_no_special_case() -> None:
    measures = Measures(2)
    measures.update(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1, 1]))
    assert measures.top1.compute().item() == pytest.approx(2 / 3)
    assert measures.top5.compute().item() == 1
