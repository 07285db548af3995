"""The loss of a step: smoothed, with an auxiliary head, of mixed images."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nni_cream.mixing import Mixing
from nni_cream.settings import Schedule
from tests.trainers import LIGHTNINGS_WARNINGS
from tests.training.fitting import BATCH, CLASSES, STEPS, TRAINING, VALIDATION, Run, TwoHeads, fit, small_network

pytestmark = LIGHTNINGS_WARNINGS


class TestAuxiliaryHead:
    @pytest.mark.parametrize("weight", [0.0, 0.4, 2.0])
    def test_its_loss_is_added_with_its_weight(self, tmp_path: Path, weight: float) -> None:
        run = fit(tmp_path, Schedule(), network=TwoHeads(), epochs=1, auxiliary_weight=weight)
        inputs, targets = (tensor[:BATCH] for tensor in TRAINING.tensors)
        wanted = F.one_hot(targets, CLASSES) * 0.8 + 0.2 / CLASSES
        losses = [-(wanted * logits.log_softmax(1)).sum(1).mean().item() for logits in run.before.train()(inputs)]
        assert run.recorder.losses[0] == pytest.approx(losses[0] + weight * losses[1], rel=1e-5)
        moved = not torch.equal(run.module.model.auxiliary.bias, run.before.auxiliary.bias)
        assert moved == (weight > 0)

    def test_does_not_take_part_in_what_is_measured(self, tmp_path: Path) -> None:
        run = fit(tmp_path, Schedule(), network=TwoHeads(), epochs=1, auxiliary_weight=0.4)
        with torch.no_grad():
            logits = run.module.model.body.eval()(VALIDATION.tensors[0])
        right = (logits.argmax(1) == VALIDATION.tensors[1]).double().mean().item()
        assert run.reports[-1]["val_accuracy"] == pytest.approx(right, rel=1e-6)


class TestLoss:
    def test_is_smoothed(self, finished: Run) -> None:
        inputs, targets = (tensor[:BATCH] for tensor in TRAINING.tensors)
        logits = copy.deepcopy(finished.before).train()(inputs)
        log_p = logits - logits.exp().sum(1, keepdim=True).log()
        wanted = F.one_hot(targets, CLASSES) * 0.8 + 0.2 / CLASSES
        loss = -(wanted * log_p).sum(1).mean().item()
        assert finished.recorder.losses[0] == pytest.approx(loss, rel=1e-5)
        unsmoothed = -log_p[torch.arange(BATCH), targets].mean().item()
        assert abs(loss - unsmoothed) > 1e-3

    def test_reported_is_the_mean_of_the_epochs_steps(self, finished: Run) -> None:
        losses = finished.recorder.losses
        assert [report["train_loss"] for report in finished.reports] == pytest.approx(
            [sum(losses[:STEPS]) / STEPS, sum(losses[STEPS:]) / STEPS], rel=1e-5
        )


class TestMixing:
    @pytest.mark.parametrize("weight", [None, 0.4])
    def test_the_loss_is_that_of_both_classes(self, tmp_path: Path, weight: float | None) -> None:
        """Of the first batch, from the definition: λ times the loss of the one, 1 - λ that of the other."""
        np.random.seed(7)
        share = np.random.RandomState(7)
        share.rand()  # whether to mix at all
        lam = share.beta(0.4, 0.4)
        network = small_network() if weight is None else TwoHeads()
        settings: dict[str, Any] = {"mixing": Mixing(CLASSES, mixup=0.4, label_smoothing=0.2)}
        run = fit(tmp_path, Schedule(), network=network, epochs=1, auxiliary_weight=weight or 0.0, **settings)
        inputs, targets = (tensor[:BATCH] for tensor in TRAINING.tensors)
        outputs = run.before.train()(lam * inputs + (1 - lam) * inputs.flip(0))

        def loss(logits: Tensor) -> float:
            log_p = logits.log_softmax(1)
            wanted = F.one_hot(targets, CLASSES) * 0.8 + 0.2 / CLASSES
            own, others = -(wanted * log_p).sum(1), -(wanted.flip(0) * log_p).sum(1)
            return (lam * own + (1 - lam) * others).mean().item()

        losses = [loss(outputs)] if weight is None else [loss(logits) for logits in outputs]
        expected = losses[0] if weight is None else losses[0] + weight * losses[1]
        assert run.recorder.losses[0] == pytest.approx(expected, rel=1e-5)
        assert 0.01 < lam < 0.99

    def test_ends_with_its_epoch(self, tmp_path: Path, finished: Run) -> None:
        """What is not mixed has the loss and the derivatives that labels have."""
        np.random.seed(7)
        before = np.random.get_state()[1].copy()
        never = fit(tmp_path, Schedule(), mixing=Mixing(CLASSES, mixup=0.4, label_smoothing=0.2, off_epoch=0))
        assert never.recorder.losses == pytest.approx(finished.recorder.losses, rel=1e-4)
        assert (np.random.get_state()[1] == before).all()
        later = fit(tmp_path, Schedule(), mixing=Mixing(CLASSES, mixup=0.4, label_smoothing=0.2, off_epoch=1))
        state = np.random.get_state()
        np.random.seed(7)
        for _ in range(STEPS):
            np.random.rand()
            np.random.beta(0.4, 0.4)
        assert (np.random.get_state()[1] == state[1]).all()
        assert np.random.get_state()[2] == state[2]
        assert later.recorder.losses[0] != pytest.approx(never.recorder.losses[0], rel=1e-3)

    def test_what_is_measured_is_not_mixed(self, tmp_path: Path) -> None:
        run = fit(tmp_path, Schedule(), epochs=1, mixing=Mixing(CLASSES, mixup=0.4))
        with torch.no_grad():
            logits = run.module.model.eval()(VALIDATION.tensors[0])
        assert run.reports[-1]["val_loss"] == pytest.approx(
            F.nll_loss(logits.log_softmax(1), VALIDATION.tensors[1]).item(), rel=1e-5
        )
