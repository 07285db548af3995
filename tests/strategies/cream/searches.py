"""Searches of six paths with Cream, in double precision, and what every step of them began with and led to."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from nni.nas.evaluator.pytorch import Classification, DataLoader, Lightning, Trainer
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.oneshot.pytorch.supermodule.sampling import PathSamplingLayer
from nni.nas.space import RawFormatModelSpace
from torch import Tensor
from torch.utils.data import TensorDataset

from nni_cream.board import BoardEntry
from nni_cream.cost import measure_network
from nni_cream.strategies.cream import CreamStrategy
from nni_cream.strategies.cream_module import CreamLightningModule
from tests.six_paths import CLASSES, SixPaths
from tests.strategies.running import State, labelled_images, search
from tests.trainers import QUIET

SIZE = 6
BATCH = 10
KEPT = 4
LEARNING_RATE = 0.05
SAMPLES = [{"first": i, "second": j} for i in range(3) for j in range(2)]
COSTS = {str(sample): measure_network(SixPaths().freeze(sample), SIZE).macs for sample in SAMPLES}


def images(number: int, seed: int, size: int = SIZE) -> TensorDataset:
    return labelled_images(number, seed=seed, size=size, classes=CLASSES, brighter=0.3)


HELD_OUT = images(5 * BATCH, seed=1)


@dataclass(frozen=True)
class Step:
    """What a training step started from, and what it led to."""

    epoch: int
    batch: tuple[Tensor, Tensor]
    space: State
    matching: State
    board: tuple[BoardEntry, ...]
    drawn: dict[str, int]
    loss: float
    space_after: State
    matching_after: State
    board_after: tuple[BoardEntry, ...]


def snapshot(module: CreamLightningModule) -> tuple[State, State, tuple[BoardEntry, ...]]:
    return copy.deepcopy(module.model.state_dict()), copy.deepcopy(module.matching.state_dict()), module.board.entries


class Watcher(pl.Callback):
    """Notes every training step."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.before = snapshot(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        space, matching, board = self.before
        space_after, matching_after, board_after = snapshot(pl_module)
        drawn = {m.label: m._sampled for m in pl_module.model.modules() if isinstance(m, PathSamplingLayer)}
        loss = float(outputs["loss"])
        epoch = trainer.current_epoch
        self.steps.append(
            Step(epoch, tuple(batch), space, matching, board, drawn, loss, space_after, matching_after, board_after)
        )


class Search:
    """A search on the data, through NNI's own evaluator and engine, in double precision."""

    def __init__(
        self,
        data: TensorDataset,
        *,
        epochs: int = 3,
        trainer: dict[str, Any] | None = None,
        callbacks: tuple[Any, ...] = (),
        held_out: Any = None,
        classifier: Any = None,
        checkpoint: Path | None = None,
        space: type[SixPaths] = SixPaths,
        **settings: Any,
    ) -> None:
        self.data = data
        self.space = space
        self.watcher = Watcher()
        loaders = {
            "train_dataloaders": DataLoader(data, batch_size=BATCH),
            "val_dataloaders": held_out or DataLoader(HELD_OUT, batch_size=2 * BATCH),
        }
        trainer = {
            **QUIET,
            "num_sanity_val_steps": 0,
            "max_epochs": epochs,
            "callbacks": [self.watcher, *callbacks],
            **(trainer or {}),
        }
        if classifier:
            self.evaluator = Lightning(classifier, Trainer(**trainer), **loaders)
        else:
            self.evaluator = Classification(
                learning_rate=LEARNING_RATE, optimizer=torch.optim.SGD, num_classes=CLASSES, **loaders, **trainer
            )
        if checkpoint:
            self.evaluator.fit_kwargs = {"ckpt_path": str(checkpoint)}
        defaults = {"warmup_epochs": 1, "board_size": 4, "board_images": KEPT, "meta_interval": 10**6, "seed": 3}
        self.strategy = CreamStrategy(**{**defaults, **settings})
        self.reports: list[Any] = []
        self.final: list[Any] = []

    def initialize(self) -> None:
        """All that happens before anything is trained."""
        space = RawFormatModelSpace.from_model(self.space(), self.evaluator)
        self.strategy.initialize(space, SequentialExecutionEngine())

    def run(self) -> Search:
        torch.manual_seed(1)
        self.reports, self.final = search(self.strategy, self.space(), self.evaluator)
        return self

    @property
    def module(self) -> CreamLightningModule:
        return self.strategy.oneshot_module

    @property
    def steps(self) -> list[Step]:
        return self.watcher.steps

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        return batches(self.data, BATCH)


def batches(data: TensorDataset, size: int) -> list[tuple[Tensor, Tensor]]:
    images, labels = data.tensors
    return list(zip(images.split(size), labels.split(size), strict=True))


HELD_OUT_BATCHES = batches(HELD_OUT, 2 * BATCH)
