"""Small trainings with everything that they come to written down."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nni
import pytest
import pytorch_lightning as pl
import torch
from nni.runtime import trial_command_channel
from nni.runtime.trial_command_channel import ParameterRecord, TrialCommandChannel
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from nni_cream.models.darts import DartsOutput
from nni_cream.settings import Optimizer, Schedule
from nni_cream.training import ImageClassifier
from tests.trainers import QUIET

CLASSES = 7
# 22 images in batches of 4: six steps an epoch, the last of two images.
IMAGES, BATCH, STEPS = 22, 4, 6


class Channel(TrialCommandChannel):
    """Writes down what is reported to NNI."""

    def __init__(self) -> None:
        self.reports: list[dict[str, Any]] = []

    def receive_parameter(self) -> ParameterRecord:
        return ParameterRecord(parameter_id=None, parameters={})

    def send_metric(self, **metric: Any) -> None:  # type: ignore[override]
        assert metric["type"] == "PERIODICAL"
        self.reports.append(metric["value"])


@dataclass
class Recorder(pl.Callback):
    """Writes down every step's learning rates and loss."""

    rates: list[set[float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.rates.append({group["lr"] for group in trainer.optimizers[0].param_groups})

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"].item())

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.rates.append({group["lr"] for group in trainer.optimizers[0].param_groups})


@dataclass
class Run:
    module: ImageClassifier
    trainer: pl.Trainer
    before: nn.Module
    recorder: Recorder
    reports: list[dict[str, Any]]


def images(seed: int) -> TensorDataset:
    random = torch.Generator().manual_seed(seed)
    return TensorDataset(
        torch.randn(IMAGES, 3, 4, 4, generator=random), torch.randint(CLASSES, (IMAGES,), generator=random)
    )


TRAINING, VALIDATION = images(0), images(1)


def small_network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, CLASSES))


def fit(
    tmp_path: Path,
    schedule: Schedule,
    *,
    epochs: int = 2,
    stop_after: int | None = None,
    checkpoint: Path | None = None,
    network: nn.Module | None = None,
    optimizer: dict[str, Any] | None = None,
    further: Sequence[pl.Callback] = (),
    **arguments: Any,
) -> Run:
    torch.manual_seed(3)
    module = ImageClassifier(
        CLASSES,
        Optimizer(**{"name": "sgd", "lr": 0.1, "weight_decay": 0.01, **(optimizer or {})}).timm_arguments(),
        schedule.timm_arguments(),
        label_smoothing=0.2,
        **arguments,
    )
    module.set_model(small_network() if network is None else network)
    before = copy.deepcopy(module.model)
    recorder = Recorder()
    callbacks: list[pl.Callback] = [recorder, *further]
    if stop_after is not None:
        callbacks.append(StopAfter(stop_after))
    trainer = pl.Trainer(**QUIET, max_epochs=epochs, default_root_dir=tmp_path, callbacks=callbacks)
    channel = Channel()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial_command_channel, "_channel", channel)
        patch.setattr(nni.trial, "_intermediate_seq", 0)
        trainer.fit(module, DataLoader(TRAINING, BATCH), DataLoader(VALIDATION, BATCH), ckpt_path=checkpoint)
    return Run(module, trainer, before, recorder, channel.reports)


@dataclass
class StopAfter(pl.Callback):
    epochs: int

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


class TwoHeads(nn.Module):
    """As a network with an auxiliary head: in training it gives the logits of both."""

    def __init__(self) -> None:
        super().__init__()
        self.body = small_network()
        self.auxiliary = nn.Linear(48, CLASSES)
        self.rate: float | None = None
        self.rates: list[float | None] = []

    def forward(self, images: Tensor) -> Any:
        if self.training and self.rates[-1:] != [self.rate]:
            self.rates.append(self.rate)
        logits = self.body(images)
        return DartsOutput(logits, self.auxiliary(images.flatten(1))) if self.training else logits

    def set_drop_path_rate(self, rate: float) -> None:
        self.rate = rate
