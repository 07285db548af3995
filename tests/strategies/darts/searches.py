"""Searches of a small space with DARTS, in double precision, and what every step of them began with and led to."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import nni.nas.nn.pytorch as nas
import pytorch_lightning as pl
import torch
from nni.nas.evaluator.pytorch import DataLoader, Lightning, LightningModule, Trainer
from torch import Tensor, nn

from nni_cream.cost import measure_network
from nni_cream.strategies.darts import DartsStrategy
from nni_cream.strategies.darts_module import DartsLightningModule
from search_spaces.darts import DartsSpace
from tests.strategies.running import State, assert_same, labelled_images, search
from tests.trainers import QUIET

CLASSES = 3
SIZE = 4
TRAIN_BATCH, TRAIN_BATCHES = 5, 5
ALPHA_BATCH, ALPHA_BATCHES = 6, 2
LEARNING_RATE, FALL, MOMENTUM, DECAY = 0.1, 0.6, 0.9, 0.01
ALPHA_RATE, ALPHA_BETAS, ALPHA_DECAY = 0.1, (0.5, 0.999), 0.01
OPERATIONS = ("none", "skip_connect", "avg_pool_3x3", "sep_conv_3x3")


def candidate(kernel: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 4, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(4), nn.Softplus())


class Space(nas.ModelSpace):
    """A user's own space, with all the kinds of choices that can be relaxed."""

    def __init__(self, nested: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        self.first = nas.LayerChoice([candidate(1), candidate(3)], label="kernel")
        self.second = nas.LayerChoice([candidate(1), candidate(3)], label="kernel")
        inner: Any = nas.LayerChoice([candidate(1), candidate(1)], label="inner") if nested else candidate(1)
        self.third = nas.LayerChoice({"inner": inner, "plain": candidate(3), "nothing": nn.Identity()}, label="third")
        self.pick = nas.InputChoice(3, n_chosen=1, reduction="mean", label="pick")
        self.two = nas.InputChoice(3, n_chosen=2, reduction="sum", label="two")
        self.average = nas.InputChoice(3, n_chosen=2, reduction="mean", label="average")
        self.head = nn.Linear(4, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        a = self.stem(images)
        b = self.first(a)
        c = self.second(b)
        d = self.third(c)
        features = self.pick([a, b, c]) + self.two([b, c, d]) * self.average([a, c, d])
        return self.head(features.mean((2, 3)))


def cells(nodes: int = 1) -> DartsSpace:
    return DartsSpace(CLASSES, channels=2, cells=3, nodes=nodes, operations=OPERATIONS)


def two_nodes() -> DartsSpace:
    return cells(nodes=2)


TRAINING, FOR_ALPHA, HELD_OUT = (
    labelled_images(number, seed=seed, size=SIZE, classes=CLASSES, brighter=0.5)
    for seed, number in enumerate((TRAIN_BATCH * TRAIN_BATCHES, ALPHA_BATCH * ALPHA_BATCHES, 17))
)


def held_out() -> DataLoader:
    return DataLoader(HELD_OUT, batch_size=7)


class Classifier(LightningModule):
    """What the evaluator trains with; it notes the norms of the gradients around the clipping."""

    def __init__(self, optimizer: Any = torch.optim.SGD, fall: float = FALL, **arguments: Any) -> None:
        super().__init__()
        sgd = {"lr": LEARNING_RATE, "momentum": MOMENTUM, "weight_decay": DECAY}
        self.make_optimizer = functools.partial(optimizer, **(arguments or sgd))
        self.fall = fall
        self.norms: list[tuple[float, float]] = []
        self.told: list[str] = []

    def on_train_start(self) -> None:
        self.told.append("start")

    def on_train_epoch_start(self) -> None:
        self.told.append("epoch")

    def on_train_epoch_end(self) -> None:
        self.told.append("epoch's end")

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: self.fall**epoch)
        return [optimizer], [{"scheduler": schedule, "interval": "epoch"}]

    def configure_gradient_clipping(self, *arguments: Any, **named: Any) -> None:
        before = self.norm()
        super().configure_gradient_clipping(*arguments, **named)
        self.norms.append((before, self.norm()))

    def norm(self) -> float:
        return torch.stack([p.grad.norm() for p in self.parameters() if p.grad is not None]).norm().item()


@dataclass(frozen=True)
class Step:
    """What a training step started from, and what it led to; α by the names of the choices."""

    epoch: int
    batch: dict[str, tuple[Tensor, Tensor]]
    space: State
    alphas: State
    loss: float
    space_after: State
    alphas_after: State


def snapshot(module: DartsLightningModule) -> tuple[State, State]:
    return copy.deepcopy(module.model.state_dict()), {n: module.alphas[n].detach().clone() for n in module.alphas}


class Watcher(pl.Callback):
    """Notes every training step."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.before = snapshot(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        for table in pl_module.alphas.parameters():
            assert table.grad is None
            assert table.requires_grad
        loss = float(outputs["loss"])
        self.steps.append(Step(trainer.current_epoch, batch, *self.before, loss, *snapshot(pl_module)))


class Search:
    """A search through NNI's own evaluator and engine, in double precision."""

    def __init__(
        self,
        space: Callable[[], nas.ModelSpace] = Space,
        *,
        epochs: int = 3,
        training: Any = None,
        for_alpha: Any = None,
        classifier: Classifier | None = None,
        trainer: dict[str, Any] | None = None,
        callbacks: Sequence[Any] = (),
        checkpoint: Path | None = None,
        seed: int = 1,
        **settings: Any,
    ) -> None:
        self.make_space, self.seed = space, seed
        self.watcher = Watcher()
        self.classifier = classifier or Classifier()
        trainer = {
            **QUIET,
            "num_sanity_val_steps": 0,
            "max_epochs": epochs,
            "callbacks": [self.watcher, *callbacks],
            **(trainer or {}),
        }
        self.evaluator = Lightning(
            self.classifier,
            Trainer(**trainer),
            train_dataloaders=training or DataLoader(TRAINING, batch_size=TRAIN_BATCH),
            val_dataloaders=for_alpha or DataLoader(FOR_ALPHA, batch_size=ALPHA_BATCH),
        )
        if checkpoint:
            self.evaluator.fit_kwargs = {"ckpt_path": str(checkpoint)}
        rates = {"alpha_lr": ALPHA_RATE, "alpha_betas": ALPHA_BETAS, "alpha_weight_decay": ALPHA_DECAY}
        self.strategy = DartsStrategy(**{**rates, **settings})
        self.reports: list[Any] = []
        self.final: list[Any] = []

    def run(self) -> Search:
        torch.manual_seed(self.seed)
        self.reports, self.final = search(self.strategy, self.make_space(), self.evaluator)
        return self

    @property
    def module(self) -> DartsLightningModule:
        return self.strategy.oneshot_module

    @property
    def steps(self) -> list[Step]:
        return self.watcher.steps

    @property
    def alphas(self) -> State:
        return snapshot(self.module)[1]

    def alphas_after_epoch(self, epoch: int) -> State:
        """Counted from 1, as in reports."""
        return [step.alphas_after for step in self.steps if step.epoch == epoch - 1][-1]


def assert_equal(ours: State, theirs: State) -> None:
    assert_same(ours, theirs, rtol=0, atol=0)


def differs(ours: State, theirs: State) -> bool:
    return any(not torch.allclose(tensor, theirs[name], rtol=0, atol=1e-6) for name, tensor in ours.items())


@functools.cache
def prices() -> dict[tuple[int, int], int]:
    """MACs of the networks of the space, by the candidate of "kernel" and that of "third"."""
    names = ("inner", "plain", "nothing")
    inputs = {"pick": [0], "two": [0, 1], "average": [0, 1]}
    return {
        (i, j): measure_network(Space().freeze({"kernel": i, "third": names[j], **inputs}), SIZE).macs
        for i, j in itertools.product(range(2), range(3))
    }


def nested() -> Space:
    return Space(nested=True)


def frozen() -> Space:
    space = Space()
    space.second[1][0].weight.requires_grad_(False)
    space.head.bias.requires_grad_(False)
    return space


@functools.cache
def cheap() -> float:
    """Fewer MACs than are expected where all candidates weigh the same, and more than the cheapest network has."""
    return 0.9 * fmean(prices().values())


WHOLE: dict[str, dict[str, Any]] = {
    "second order": {"gradient_clip": None},
    "first order": {"order": "first", "space": nested},
    "warm-up": {"warmup_epochs": 1, "gradient_clip": 0.3},
    "nested, smoothed": {"space": nested, "label_smoothing": 0.2, "gradient_clip": 0.3},
    "frozen weights": {"space": frozen},
    "expected cost": {"flops_target": cheap(), "flops_weight": 2.5},
    "expected cost, first order": {"order": "first", "flops_target": 0.8 * cheap()},
}
