"""What makes a step faster on some device must not make it another step: every setting against float32."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import pytorch_lightning as pl
import timm
import torch
from nni.nas.evaluator.pytorch import DataLoader, Lightning, Trainer
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.space import RawFormatModelSpace
from pytorch_lightning.plugins import MixedPrecision
from torch import Tensor
from torch.utils.data import TensorDataset

from nni_cream.settings import Optimizer
from nni_cream.strategies.cream import CreamStrategy
from nni_cream.strategies.darts import DartsStrategy
from nni_cream.training import ImageClassifier
from search_spaces.cream import CreamSpace
from search_spaces.darts import DartsSpace
from tests.trainers import QUIET

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

CLASSES, BATCH, STEPS = 4, 16, 3
SCALE = 16.0
PLAINEST = ("32-true", "contiguous_format", None)
# A fused step cannot clip gradients under mixed precision, and recipes refuse the two together.
COMBINATIONS = [
    (precision, memory_format, execution)
    for precision, memory_format, execution in itertools.product(
        ("32-true", "16-mixed", "bf16-mixed"), ("contiguous_format", "channels_last"), (None, "foreach", "fused")
    )
    if precision == "32-true" or execution != "fused"
]
# How far what has been learnt may be from the plainest, relative to how far it has moved: weights; α; the matching
# layer. What moves that layer is a product of two gradients from four images each.
TOLERANCE = {"32-true": (0.02, 0.02, 0.02), "16-mixed": (0.1, 0.03, 0.1), "bf16-mixed": (0.3, 0.04, 0.5)}


class Watch(pl.Callback):
    """Notes the losses, and where the parameters are in the beginning and in the end."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.start: dict[str, Tensor] = {}
        self.end: dict[str, Tensor] = {}
        self.alphas_after_a_step: list[Tensor] = []

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.start = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))
        self.end = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
        assert {parameter.dtype for parameter in self.end.values()} == {torch.float32}
        if not self.alphas_after_a_step:
            self.alphas_after_a_step = [value for name, value in self.end.items() if name.startswith("alphas.")]

    def moved(self, architecture: bool) -> Tensor:
        own = [n for n in self.end if n.startswith(("alphas.", "matching.")) == architecture]
        return torch.cat([(self.end[name] - self.start[name]).flatten() for name in own] or [torch.ones(1)])


def make_trainer(precision: str, watch: Watch, scale: float = SCALE) -> Any:
    # Given 16-mixed on a CPU by name, Lightning computes in bf16-mixed.
    half = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))
    given: dict[str, Any] = {"plugins": [half]} if precision == "16-mixed" else {"precision": precision}
    # What is validated is not looked at.
    return Trainer(**QUIET, max_epochs=1, callbacks=[watch], num_sanity_val_steps=0, limit_val_batches=1, **given)


def make_classifier(execution: Any, **arguments: Any) -> Any:
    optimizer = Optimizer(name="momentum", lr=0.001, weight_decay=1e-3, execution=execution)
    return ImageClassifier(CLASSES, optimizer.timm_arguments(), {"sched": "poly", "decay_rate": 1.0}, **arguments)


def make_loader(resolution: int) -> Any:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(BATCH * STEPS) % CLASSES
    images = torch.randn(len(labels), 3, resolution, resolution, generator=generator)
    return DataLoader(TensorDataset(images, labels), batch_size=BATCH)


def search(strategy: Any, space: Any, combination: tuple[Any, ...], resolution: int, scale: float = SCALE) -> Watch:
    precision, memory_format, execution = combination
    watch, data = Watch(), make_loader(resolution)
    evaluator = Lightning(
        make_classifier(execution),
        make_trainer(precision, watch, scale),
        train_dataloaders=data,
        val_dataloaders=data,
    )
    model = space.to(memory_format=getattr(torch, memory_format))
    strategy(RawFormatModelSpace.from_model(model, evaluator), SequentialExecutionEngine())
    return watch


def darts(combination: tuple[Any, ...], **settings: Any) -> Watch:
    pl.seed_everything(0, verbose=False)
    # A bound that the gradients exceed.
    strategy: Any = DartsStrategy(alpha_lr=0.02, gradient_clip=0.5, **settings)
    return search(strategy, DartsSpace(CLASSES, channels=4, cells=3, nodes=2), combination, 16)


def cream(combination: tuple[Any, ...], scale: float = SCALE) -> Watch:
    pl.seed_everything(0, verbose=False)
    settings: Any = {"board_size": 3, "board_images": 4, "admission_gap": 100, "warmup_epochs": 0, "meta_interval": 2}
    strategy = CreamStrategy(**settings, recalibration_batches=1, matching_lr=0.1, seed=3)
    return search(strategy, CreamSpace((1, 1, 1, 1, 1), CLASSES), combination, 48, scale)


def training(combination: tuple[Any, ...], mode: str = "off", **arguments: Any) -> Watch:
    precision, memory_format, execution = combination
    pl.seed_everything(0, verbose=False)
    network = timm.create_model("cream_14", num_classes=CLASSES).to(memory_format=getattr(torch, memory_format))
    if mode != "off":
        network.compile(mode=mode)
    module, watch = make_classifier(execution, **arguments), Watch()
    module.set_model(network)
    make_trainer(precision, watch).fit(module, make_loader(64))
    return watch


KINDS: dict[str, Any] = {
    "cream": cream,
    "exact": functools.partial(darts, hypergradient="exact"),
    "finite difference": functools.partial(darts, hypergradient="finite_difference"),
    "first order": functools.partial(darts, order="first"),
    "textbook": functools.partial(darts, hypergradient="exact", execution="textbook"),
    "training": training,
}


@functools.cache
def plainest(kind: str) -> Watch:
    watch: Watch = KINDS[kind](PLAINEST)
    return watch


def distance(found: Watch, exact: Watch, architecture: bool) -> float:
    """How far what has been learnt is from what it should be, relative to how far that has moved."""
    moved, should = found.moved(architecture), exact.moved(architecture)
    assert should.norm() > 0
    return ((moved - should).norm() / should.norm()).item()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("precision", "memory_format", "execution"), COMBINATIONS)
def test_agrees_with_float32(kind: str, precision: str, memory_format: str, execution: Any) -> None:
    found, exact = KINDS[kind]((precision, memory_format, execution)), plainest(kind)
    weights, alphas, matching = TOLERANCE[precision]
    assert found.losses == pytest.approx(exact.losses, rel=weights / 10)
    assert distance(found, exact, architecture=False) < weights
    assert distance(found, exact, architecture=True) < (matching if kind == "cream" else alphas)


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
@pytest.mark.parametrize("kind", ["exact", "finite difference"])
def test_a_hypergradient_is_computed_in_float32(kind: str, precision: str) -> None:
    found = KINDS[kind]((precision, *PLAINEST[1:])).alphas_after_a_step
    assert all(torch.equal(a, b) for a, b in zip(found, plainest(kind).alphas_after_a_step, strict=True))
    assert found


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
def test_averages_of_weights_are_float32_and_change_no_step(precision: str) -> None:
    plain = training((precision, *PLAINEST[1:]))
    averaged = training((precision, *PLAINEST[1:]), ema={"decay": 0.5, "use_warmup": False})
    assert averaged.losses == plain.losses
    for name, parameter in plain.end.items():
        assert torch.equal(averaged.end[name], parameter), name
    averages = [name for name in averaged.end if name.startswith("ema.")]
    assert len(averages) == len(plain.end)
    assert any(not torch.equal(averaged.end[name], averaged.start[name]) for name in averages)


def test_a_loss_scale_that_is_too_large_spoils_nothing() -> None:
    # Larger than any number of float16: the scaler leaves out every step, and halves it.
    watch = cream(("16-mixed", "contiguous_format", None), scale=2.0**24)
    for architecture in (False, True):
        assert watch.moved(architecture).isfinite().all()
    assert all(torch.isfinite(torch.tensor(watch.losses)))
