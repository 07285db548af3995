"""Ways to force upon a search with DARTS what it would come to by itself only after a long time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from nni.nas.evaluator.pytorch import DataLoader
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from nni_cream.genotype import CELL_KINDS, Genotype, derive_genotype
from tests.strategies.darts.searches import CLASSES, OPERATIONS, TRAIN_BATCH, TRAINING
from tests.strategies.running import State

# Dominant eigenvalues of 14 epochs. Means over five of them: 1 and then, with the second 3, 1.36.
RISING = (1.0, 1.1, 0.9, 1.0, 1.0, 1.0, 0.8, 1.0, 1.0, 1.0, 3.0, 3.0, 3.0, 3.0)


def few_batches(number: int) -> DataLoader:
    return DataLoader(TensorDataset(*TRAINING[: number * TRAIN_BATCH]), batch_size=TRAIN_BATCH)


class SetAlpha(pl.Callback):
    """Makes α something else after the steps of an epoch, counted from 1."""

    def __init__(self, tables: dict[int, dict[str, Tensor]]) -> None:
        self.tables = tables

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        with torch.no_grad():
            for name, table in self.tables.get(trainer.current_epoch + 1, {}).items():
                pl_module.alphas[name].copy_(table)


class Favour(pl.Callback):
    """Makes the supernet answer one class in one epoch and another in the next, so that its accuracy varies."""

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        *_, self.last = (module for module in pl_module.model.modules() if isinstance(module, nn.Linear))
        self.bias = self.last.bias.detach().clone()
        self.last.bias.data[trainer.current_epoch % CLASSES] += 1e6

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.last.bias.data.copy_(self.bias)


def preferring(operation: str, rows: int, strengths: Sequence[float] | None = None) -> Tensor:
    table = torch.zeros(rows, len(OPERATIONS), dtype=torch.float64)
    table[:, OPERATIONS.index(operation)] = torch.tensor(
        strengths or [3 - 0.1 * i for i in range(rows)], dtype=torch.float64
    )
    return table


def genotype_of(alphas: State, **limit: Any) -> Genotype:
    return derive_genotype({kind: alphas[kind].numpy() for kind in CELL_KINDS}, OPERATIONS, **limit)
