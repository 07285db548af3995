from __future__ import annotations

import copy
import functools
import io
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nni
import nni.nas.nn.pytorch as nas
import pytest
import pytorch_lightning as pl
import torch
from nni.nas.evaluator import FunctionalEvaluator
from nni.nas.evaluator.pytorch import Classification, DataLoader, Lightning, LightningModule, Trainer
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.execution.event import ModelEventType
from nni.nas.experiment import NasExperiment
from nni.nas.space import RawFormatModelSpace
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from nni_cream.cost import measure_network
from nni_cream.errors import UserError
from nni_cream.genotype import CELL_KINDS, Genotype, derive_genotype
from nni_cream.strategies import darts_module
from nni_cream.strategies.darts import DartsStrategy
from nni_cream.strategies.darts_module import DartsLightningModule
from search_spaces.darts import DartsSpace
from tests.darts_reference import GoldenSearch, golden_search

# NNI says so of every evaluator, and Lightning of every small run.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

CLASSES = 3
SIZE = 4
TRAIN_BATCH, TRAIN_BATCHES = 5, 5
ALPHA_BATCH, ALPHA_BATCHES = 6, 2
LEARNING_RATE, FALL, MOMENTUM, DECAY = 0.1, 0.6, 0.9, 0.01
ALPHA_RATE, ALPHA_BETAS, ALPHA_DECAY = 0.1, (0.5, 0.999), 0.01
OPERATIONS = ("none", "skip_connect", "avg_pool_3x3", "sep_conv_3x3")

TRAINER: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


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


@pytest.fixture(autouse=True)
def double_precision() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def labelled_images(number: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(number, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, CLASSES, (number,), generator=generator)
    images[torch.arange(len(labels)), labels] += 0.5
    return TensorDataset(images, labels)


TRAINING = labelled_images(TRAIN_BATCH * TRAIN_BATCHES, seed=0)
FOR_ALPHA = labelled_images(ALPHA_BATCH * ALPHA_BATCHES, seed=1)
HELD_OUT = labelled_images(17, seed=2)


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


State = dict[str, Tensor]


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
        trainer = {**TRAINER, "max_epochs": epochs, "callbacks": [self.watcher, *callbacks], **(trainer or {})}
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
        engine = SequentialExecutionEngine()
        engine.register_model_event_callback(
            ModelEventType.IntermediateMetric, lambda event: self.reports.append(event.metric)
        )
        engine.register_model_event_callback(ModelEventType.FinalMetric, lambda event: self.final.append(event.metric))
        self.strategy(RawFormatModelSpace.from_model(self.make_space(), self.evaluator), engine)
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


@pytest.fixture(scope="module")
def run() -> Callable[..., Search]:
    """Run a search; those with the same settings only once."""

    @functools.cache
    def cached(*arguments: Any, **settings: Any) -> Search:
        return Search(*arguments, **settings).run()

    return cached


def assert_same(ours: State, theirs: State, tolerance: float = 1e-9) -> None:
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        torch.testing.assert_close(
            tensor, theirs[name], rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_equal(ours: State, theirs: State) -> None:
    assert_same(ours, theirs, tolerance=0)


def differs(ours: State, theirs: State) -> bool:
    return any(not torch.allclose(tensor, theirs[name], rtol=0, atol=1e-6) for name, tensor in ours.items())


class TestPublishedStep:
    """One whole step of a search, beside that of the reference."""

    class Begin(pl.Callback):
        """Gives the search the reference's weights, α, and momentum."""

        def __init__(self, golden: GoldenSearch, momentum_buffers: bool) -> None:
            self.golden, self.momentum_buffers = golden, momentum_buffers

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.model.load_state_dict(self.golden.space.state_dict())
            pl_module.alphas.load_state_dict(self.golden.alphas.state_dict())
            if self.momentum_buffers:
                for name, parameter in pl_module.model.named_parameters():
                    trainer.optimizers[0].state[parameter]["momentum_buffer"] = self.golden.momentum(name)

    @pytest.fixture(
        scope="class", params=["search_2_nodes.json", pytest.param("search_4_nodes.json", marks=pytest.mark.slow)]
    )
    def golden(self, request: pytest.FixtureRequest) -> GoldenSearch:
        return golden_search(request.param)

    @pytest.mark.parametrize("momentum_buffers", [False, True])
    @pytest.mark.parametrize("kind", ["exact", "finite_difference"])
    def test_is_that_of_the_reference(self, golden: GoldenSearch, kind: Any, momentum_buffers: bool) -> None:
        data, given = golden.data, golden.data["hyperparameters"]
        expected = data["with_momentum_buffer" if momentum_buffers else "no_momentum_buffer"]
        expected = expected[f"one_search_step_with_{kind}"]
        network = data["network"]
        number = data["input_shape"][0]
        loaders = [
            DataLoader(TensorDataset(golden.images[part], golden.targets[part]), batch_size=number)
            for part in ("train", "valid")
        ]
        sgd = {"lr": given["eta"], "momentum": given["momentum"], "weight_decay": given["weight_decay"]}
        search = Search(
            lambda: DartsSpace(
                network["num_classes"],
                channels=network["C"],
                cells=network["layers"],
                nodes=network["steps"],
                concat=network["multiplier"],
            ),
            epochs=1,
            training=loaders[0],
            for_alpha=loaders[1],
            reporting_dataloader=loaders[1],
            classifier=Classifier(**sgd),
            callbacks=[self.Begin(golden, momentum_buffers)],
            # The rest are the defaults, which are the published ones.
            alpha_lr=given["arch_lr"],
            alpha_betas=tuple(given["arch_betas"]),
            alpha_weight_decay=given["arch_weight_decay"],
            gradient_clip=given["grad_clip"],
            hypergradient=kind,
        ).run()
        (step,) = search.steps
        (norms,) = search.classifier.norms
        assert step.loss == pytest.approx(expected["train_loss"], abs=1e-9)
        assert norms[0] == pytest.approx(expected["grad_norm_before_clip"], abs=1e-9)
        assert norms[1] == pytest.approx(min(expected["grad_norm_before_clip"], given["grad_clip"]), rel=1e-6)
        for name in CELL_KINDS:
            table = torch.tensor(expected[f"alphas_{name}"])
            torch.testing.assert_close(step.alphas_after[name], table, rtol=0, atol=1e-9)
        for name, _ in golden.space.named_parameters():
            weight = step.space_after[name]
            sums = [weight.sum().item(), weight.abs().sum().item()]
            assert sums == pytest.approx(expected["weights_after"][golden.names[name]], abs=1e-8), name
        assert len(expected["weights_after"]) == len(golden.weights)
        # As after a single forward pass in training mode; the reference's own step moves them four times.
        moved = torch.tensor(data["stem.1.running_mean_after_one_training_forward"])
        torch.testing.assert_close(step.space_after["stem.1.running_mean"], moved, rtol=0, atol=1e-12)
        for name, tensor in step.space_after.items():
            if name.endswith("num_batches_tracked"):
                assert tensor == 1, name

    def test_the_published_numbers_are_the_defaults(self, golden: GoldenSearch) -> None:
        given, settings = golden.data["hyperparameters"], DartsStrategy().settings
        assert settings.order == "second"
        assert settings.alpha_lr == given["arch_lr"]
        assert list(settings.alpha_betas) == given["arch_betas"]
        assert settings.alpha_weight_decay == given["arch_weight_decay"]
        assert settings.gradient_clip == given["grad_clip"]
        assert settings.radius == given["finite_difference_r"]
        assert settings.label_smoothing == settings.warmup_epochs == 0


# The same by hand, with nothing of ours: the relaxed space as one function, and derivatives through a whole step.


def batch_norm(state: State, name: str, x: Tensor, moved: State | None, training: bool) -> Tensor:
    mean, variance = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    if training:
        number = x.numel() / x.shape[1]
        if moved is not None:
            batch_mean, batch_variance = x.mean((0, 2, 3)), x.var((0, 2, 3))
            moved[f"{name}.running_mean"] = (0.9 * mean + 0.1 * batch_mean).detach()
            moved[f"{name}.running_var"] = (0.9 * variance + 0.1 * batch_variance).detach()
            moved[f"{name}.num_batches_tracked"] = state[f"{name}.num_batches_tracked"] + 1
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3)) * (number - 1) / number
    x = (x - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
    return x * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]


def logits_by_hand(
    state: State, alphas: State, images: Tensor, moved: State | None = None, training: bool = True
) -> Tensor:
    weights = {name: table.exp() / table.exp().sum() for name, table in alphas.items()}

    def convolve(name: str, x: Tensor) -> Tensor:
        kernel = state[f"{name}.0.weight"]
        x = nn.functional.conv2d(x, kernel, padding=kernel.shape[-1] // 2)
        return batch_norm(state, f"{name}.1", x, moved, training)

    def layer(name: str, x: Tensor) -> Tensor:
        return (1 + convolve(name, x).exp()).log()

    def mean(label: str, *features: Tensor) -> Tensor:
        return (weights[label].view(-1, 1, 1, 1, 1) * torch.stack(features)).sum(0)

    a = convolve("stem", images)
    b = mean("kernel", layer("first.0", a), layer("first.1", a))
    c = mean("kernel", layer("second.0", b), layer("second.1", b))
    if "inner" in weights:
        inner = mean("inner", layer("third.inner.0", c), layer("third.inner.1", c))
    else:
        inner = layer("third.inner", c)
    d = mean("third", inner, layer("third.plain", c), c)
    features = mean("pick", a, b, c) + 2 * mean("two", b, c, d) * mean("average", a, c, d)
    return features.mean((2, 3)) @ state["head.weight"].T + state["head.bias"]


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    log = logits - logits.exp().sum(1, keepdim=True).log()
    picked = log[torch.arange(len(labels)), labels]
    return -((1 - smoothing) * picked + smoothing * log.mean(1)).mean()


@functools.cache
def prices() -> dict[tuple[int, int], int]:
    """MACs of the networks of the space, by the candidate of "kernel" and that of "third"."""
    names = ("inner", "plain", "nothing")
    inputs = {"pick": [0], "two": [0, 1], "average": [0, 1]}
    return {
        (i, j): measure_network(Space().freeze({"kernel": i, "third": names[j], **inputs}), SIZE).macs
        for i, j in itertools.product(range(2), range(3))
    }


def expected_macs(alphas: State) -> Tensor:
    first, third = alphas["kernel"].softmax(0), alphas["third"].softmax(0)
    return sum(first[i] * third[j] * macs for (i, j), macs in prices().items())  # type: ignore[return-value]


@dataclass
class StepByHand:
    epoch: int
    loss: float
    correct: float
    alpha_loss: float
    space: State
    alphas: State


def search_by_hand(search: Search) -> Iterator[StepByHand]:
    """All steps of a search, from what its first one starts from; the batches are those that it was given."""
    settings = search.strategy.settings
    state, alphas = dict(search.steps[0].space), dict(search.steps[0].alphas)
    names = [name for name, parameter in search.module.model.named_parameters() if parameter.requires_grad]
    adam_moments = {name: (torch.zeros_like(t), torch.zeros_like(t)) for name, t in alphas.items()}
    buffers: State = {}
    updates = 0
    for step in search.steps:
        rate = LEARNING_RATE * FALL**step.epoch
        alpha_loss = float("nan")
        if step.epoch >= settings.warmup_epochs:
            variables = {name: table.clone().requires_grad_() for name, table in alphas.items()}
            w = {name: state[name].clone().requires_grad_() for name in names}
            if settings.order == "second":
                images, labels = step.batch["train"]
                loss = cross_entropy(
                    logits_by_hand({**state, **w}, variables, images), labels, settings.label_smoothing
                )
                slopes = torch.autograd.grad(loss, list(w.values()), create_graph=True)
                w = {
                    name: v - rate * (slope + DECAY * v + MOMENTUM * buffers.get(name, torch.zeros(())))
                    for (name, v), slope in zip(w.items(), slopes, strict=True)
                }
            images, labels = step.batch["alpha"]
            loss = cross_entropy(logits_by_hand({**state, **w}, variables, images), labels, settings.label_smoothing)
            alpha_loss = loss.item()
            if settings.flops_target is not None:
                loss = loss + settings.flops_weight * (expected_macs(variables) / settings.flops_target - 1).clamp(0)
            gradients = torch.autograd.grad(loss, list(variables.values()))
            updates += 1
            for (name, table), slope in zip(alphas.items(), gradients, strict=True):
                gradient = slope + settings.alpha_weight_decay * table
                beta1, beta2 = settings.alpha_betas
                first = beta1 * adam_moments[name][0] + (1 - beta1) * gradient
                second = beta2 * adam_moments[name][1] + (1 - beta2) * gradient**2
                adam_moments[name] = first, second
                size = (second / (1 - beta2**updates)).sqrt() + 1e-8
                alphas[name] = table - settings.alpha_lr * first / (1 - beta1**updates) / size
        w = {name: state[name].clone().requires_grad_() for name in names}
        images, labels = step.batch["train"]
        moved: State = {}
        logits = logits_by_hand({**state, **w}, alphas, images, moved)
        loss = cross_entropy(logits, labels, settings.label_smoothing)
        slopes = torch.autograd.grad(loss, list(w.values()))
        norm = torch.cat([slope.flatten() for slope in slopes]).norm()
        limit = settings.gradient_clip
        factor = 1.0 if limit is None else min(1.0, limit / (norm.item() + 1e-6))
        for (name, v), slope in zip(w.items(), slopes, strict=True):
            gradient = factor * slope + DECAY * v.detach()
            buffers[name] = MOMENTUM * buffers.get(name, torch.zeros(())) + gradient
            state[name] = v.detach() - rate * buffers[name]
        state |= moved
        correct = (logits.argmax(1) == labels).double().mean().item()
        yield StepByHand(step.epoch, loss.item(), correct, alpha_loss, dict(state), dict(alphas))


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


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
    return 0.9 * mean(list(prices().values()))


WHOLE: dict[str, dict[str, Any]] = {
    "second order": {"gradient_clip": None},
    "first order": {"order": "first", "space": nested},
    "warm-up": {"warmup_epochs": 1, "gradient_clip": 0.3},
    "nested, smoothed": {"space": nested, "label_smoothing": 0.2, "gradient_clip": 0.3},
    "frozen weights": {"space": frozen},
    "expected cost": {"flops_target": cheap(), "flops_weight": 2.5},
    "expected cost, first order": {"order": "first", "flops_target": 0.8 * cheap()},
}


@pytest.mark.parametrize("case", WHOLE)
class TestWholeSearch:
    def test_every_step_is_that_computed_by_hand(self, case: str, run: Callable[..., Search]) -> None:
        search = run(**WHOLE[case])
        assert len(search.steps) == 3 * TRAIN_BATCHES
        for step, by_hand in zip(search.steps, search_by_hand(search), strict=True):
            assert step.loss == pytest.approx(by_hand.loss, rel=1e-9)
            assert_same(step.alphas_after, by_hand.alphas)
            assert_same(step.space_after, by_hand.space)
        assert differs(search.steps[0].alphas, search.alphas)

    def test_reports_are_the_means_of_the_epoch(self, case: str, run: Callable[..., Search]) -> None:
        search = run(**WHOLE[case])
        by_hand = list(search_by_hand(search))
        warmup = search.strategy.settings.warmup_epochs
        assert [report["epoch"] for report in search.reports] == [1, 2, 3]
        for number, report in enumerate(search.reports):
            steps = [step for step in by_hand if step.epoch == number]
            assert report["train_loss"] == pytest.approx(mean([step.loss for step in steps]), rel=1e-6)
            assert report["train_accuracy"] == pytest.approx(mean([step.correct for step in steps]), rel=1e-6)
            assert ("alpha_loss" in report) == (number >= warmup)
            if number >= warmup:
                assert report["alpha_loss"] == pytest.approx(mean([step.alpha_loss for step in steps]), rel=1e-6)
            weights = [table.softmax(0) for table in steps[-1].alphas.values()]
            entropies = [-(w * w.log()).sum().item() for w in weights]
            assert report["entropy"] == pytest.approx(mean(entropies), rel=1e-6)
            cost = {"expected_flops": pytest.approx(expected_macs(steps[-1].alphas).item(), rel=1e-6)}
            assert {name: report[name] for name in report if "flops" in name} == (
                cost if search.strategy.settings.flops_target else {}
            )
            assert not {"eigenvalue", "entropy_normal", "skip_connections_normal"} & set(report)

    def test_accuracy_is_that_of_the_supernet_in_evaluation(self, case: str, run: Callable[..., Search]) -> None:
        search = run(**WHOLE[case])
        images, labels = FOR_ALPHA.tensors
        for number, report in enumerate(search.reports):
            last = [step for step in search.steps if step.epoch == number][-1]
            logits = logits_by_hand(last.space_after, last.alphas_after, images, training=False)
            accuracy = (logits.argmax(1) == labels).double().mean().item()
            assert report["default"] == report["val_accuracy"] == pytest.approx(accuracy, rel=1e-6)

    def test_result_is_what_weighs_most(self, case: str, run: Callable[..., Search]) -> None:
        search = run(**WHOLE[case])
        order = {name: table.argsort(descending=True).tolist() for name, table in search.alphas.items()}
        expected = {
            "kernel": order["kernel"][0],
            "third": ["inner", "plain", "nothing"][order["third"][0]],
            "pick": order["pick"][:1],
            "two": sorted(order["two"][:2]),
            "average": sorted(order["average"][:2]),
        }
        if "inner" in order:
            expected["inner"] = order["inner"][0]
        assert search.final == [{"default": search.reports[-1]["val_accuracy"], "architecture": expected}]
        assert search.module.export() == expected


def test_cases_make_a_difference(run: Callable[..., Search]) -> None:
    # Otherwise the comparisons above would show less than they seem to.
    results = [run(**WHOLE[case]).alphas for case in WHOLE if WHOLE[case].get("space") is None]
    assert all(differs(a, b) for a, b in itertools.combinations(results, 2))
    clipped = run(**WHOLE["warm-up"]).classifier.norms
    assert all(before > 0.3 for before, _ in clipped)
    assert {round(after, 5) for _, after in clipped} == {0.3}
    costs = [expected_macs(step.alphas).item() for step in run(**WHOLE["expected cost"]).steps]
    assert max(costs) > cheap() > min(costs)


class TestWarmUp:
    def test_leaves_alpha_alone(self, run: Callable[..., Search]) -> None:
        search = run(**WHOLE["warm-up"])
        moved = [any(not torch.equal(s.alphas[n], s.alphas_after[n]) for n in s.alphas) for s in search.steps]
        assert moved == [False] * TRAIN_BATCHES + [True] * 2 * TRAIN_BATCHES

    @pytest.mark.parametrize("epochs", [1, 2])
    def test_that_never_ends_is_an_error(self, epochs: int) -> None:
        search = Search(epochs=epochs, warmup_epochs=2)
        with pytest.raises(UserError, match=f"after 2 warm-up epochs, but training lasts {epochs}: make"):
            search.run()
        assert not search.steps

    def test_may_last_until_the_last_epoch(self) -> None:
        assert len(Search(epochs=2, warmup_epochs=1).run().steps) == 2 * TRAIN_BATCHES


class TestOptimizers:
    def test_alpha_is_not_among_the_weights(self, run: Callable[..., Search]) -> None:
        module = run(**WHOLE["second order"]).module
        weights, alpha = module.trainer.optimizers
        of_weights = {id(p) for group in weights.param_groups for p in group["params"]}
        of_alpha = [id(p) for group in alpha.param_groups for p in group["params"]]
        assert of_weights == {id(parameter) for parameter in module.model.parameters()}
        assert of_alpha == [id(parameter) for parameter in module.alphas.parameters()]
        assert not of_weights & set(of_alpha)
        # As Lightning counts steps, for max_steps and for loggers.
        assert module.trainer.global_step == 3 * TRAIN_BATCHES

    def test_alpha_is_in_the_order_of_the_space(self, run: Callable[..., Search]) -> None:
        assert list(run(**WHOLE["second order"]).alphas) == ["kernel", "third", "pick", "two", "average"]
        inner = list(run(**WHOLE["first order"]).alphas)
        assert inner == ["kernel", "third", "inner", "pick", "two", "average"]

    def test_the_second_order_needs_sgd(self) -> None:
        search = Search(classifier=Classifier(torch.optim.Adam, lr=0.01))
        with pytest.raises(UserError, match="the optimizer of the weights is Adam"):
            search.run()
        assert not search.steps
        # Not only when α begins to learn.
        late = Search(classifier=Classifier(torch.optim.Adam, lr=0.01), warmup_epochs=1)
        with pytest.raises(UserError, match="is Adam"):
            late.run()
        assert not late.steps
        dampened = Search(classifier=Classifier(lr=0.01, momentum=0.9, dampening=0.5), order="second")
        with pytest.raises(UserError, match="dampening"):
            dampened.run()
        assert not dampened.steps

    def test_the_first_order_takes_any(self) -> None:
        search = Search(classifier=Classifier(torch.optim.Adam, lr=0.01), order="first", epochs=1).run()
        assert differs(search.steps[0].alphas, search.alphas)


class TestData:
    @staticmethod
    def batches(data: TensorDataset, size: int) -> list[tuple[Tensor, Tensor]]:
        return list(zip(*(tensor.split(size) for tensor in data.tensors), strict=True))

    @pytest.mark.parametrize("size", [ALPHA_BATCH, 4, 2, 1])
    def test_pairs_of_batches(self, size: int) -> None:
        for_alpha = DataLoader(FOR_ALPHA, batch_size=size)
        search = Search(epochs=2, order="first", for_alpha=for_alpha).run()
        training, others = self.batches(TRAINING, TRAIN_BATCH), self.batches(FOR_ALPHA, size)
        assert [step.epoch for step in search.steps] == [0] * TRAIN_BATCHES + [1] * TRAIN_BATCHES
        for number, step in enumerate(search.steps):
            position = number % TRAIN_BATCHES
            for ours, expected in (
                (step.batch["train"], training[position]),
                (step.batch["alpha"], others[position % len(others)]),
            ):
                assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))

    def test_other_images_may_be_reported_on(self, run: Callable[..., Search]) -> None:
        usual = run(**WHOLE["second order"])
        search = Search(gradient_clip=None, reporting_dataloader=held_out()).run()
        assert_equal(search.alphas, usual.alphas)
        images, labels = HELD_OUT.tensors
        for number, report in enumerate(search.reports):
            last = [step for step in search.steps if step.epoch == number][-1]
            logits = logits_by_hand(last.space_after, last.alphas_after, images, training=False)
            assert report["val_accuracy"] == pytest.approx((logits.argmax(1) == labels).double().mean().item())
            assert report["alpha_loss"] == usual.reports[number]["alpha_loss"]
        assert search.final[0]["default"] == search.reports[-1]["val_accuracy"]
        assert [r["val_accuracy"] for r in search.reports] != [r["val_accuracy"] for r in usual.reports]

    def test_sanity_check_of_lightning_counts_for_nothing(self, run: Callable[..., Search]) -> None:
        checked = Search(gradient_clip=None, trainer={"num_sanity_val_steps": 2}).run()
        assert checked.reports == run(**WHOLE["second order"]).reports

    def test_data_module(self, run: Callable[..., Search]) -> None:
        class Data(pl.LightningDataModule):
            def train_dataloader(self) -> Any:
                return DataLoader(TRAINING, batch_size=TRAIN_BATCH)

            def val_dataloader(self) -> Any:
                return DataLoader(FOR_ALPHA, batch_size=ALPHA_BATCH)

        search = Search(gradient_clip=None)
        search.evaluator = Lightning(search.classifier, search.evaluator.trainer, datamodule=Data())
        assert_equal(search.run().alphas, run(**WHOLE["second order"]).alphas)


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


def two_nodes() -> DartsSpace:
    return cells(nodes=2)


class TestCells:
    def test_reports(self, run: Callable[..., Search]) -> None:
        search = run(two_nodes, epochs=2, order="first", alpha_lr=1.0)
        assert len(search.reports) == 2
        for report in search.reports:
            alphas = search.alphas_after_epoch(report["epoch"])
            genotype = genotype_of(alphas)
            entropies = {}
            for kind in CELL_KINDS:
                weights = alphas[kind].softmax(1)
                entropies[kind] = -(weights * weights.log()).sum(1).mean().item()
                assert report[f"entropy_{kind}"] == pytest.approx(entropies[kind], rel=1e-5)
                assert report[f"skip_connections_{kind}"] == genotype.skip_connections(kind)
            assert report["entropy"] == pytest.approx(mean(list(entropies.values())), rel=1e-5)
        seen = [report[f"entropy_{kind}"] for report in search.reports for kind in CELL_KINDS]
        assert len(set(seen)) == 4

    def test_every_edge_counts_the_same_in_the_entropy(self) -> None:
        class Mixed(nas.ModelSpace):
            """A cell with five edges, and one further choice."""

            def __init__(self) -> None:
                super().__init__()
                self.before = nas.LayerChoice([nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 3, padding=1)], label="before")
                self.space = two_nodes()

            def forward(self, images: Tensor) -> Tensor:
                return self.space(self.before(images))

            def extra_oneshot_hooks(self, strategy: Any) -> list[Any]:
                return self.space.extra_oneshot_hooks(strategy)

        search = Search(Mixed, epochs=1, order="first", alpha_lr=1.0).run()
        weights = [row.softmax(0) for table in search.alphas.values() for row in table.view(-1, table.shape[-1])]
        assert len(weights) == 5 + 5 + 1
        expected = mean([-(w * w.log()).sum().item() for w in weights])
        assert search.reports[0]["entropy"] == pytest.approx(expected, rel=1e-5)

    def test_result_is_that_of_the_published_rule(self, run: Callable[..., Search]) -> None:
        search = run(two_nodes, epochs=2, order="first", alpha_lr=1.0)
        (final,) = search.final
        assert final["default"] == search.reports[-1]["val_accuracy"]
        assert Genotype.from_sample(final["architecture"]) == genotype_of(search.alphas)
        assert genotype_of(search.alphas) != genotype_of(search.steps[0].alphas)

    def test_skip_limit_holds_for_the_normal_cell_of_the_result(self) -> None:
        skips = {kind: preferring("skip_connect", 5) for kind in CELL_KINDS}
        search = Search(two_nodes, epochs=1, order="first", skip_limit=1, callbacks=[SetAlpha({1: skips})]).run()
        genotype = Genotype.from_sample(search.final[0]["architecture"])
        assert genotype == genotype_of(skips, normal_skip_limit=1)
        assert [genotype.skip_connections(kind) for kind in CELL_KINDS] == [1, 4]
        # What is reported, and what guards watch, is what there would be without the limit.
        assert [search.reports[0][f"skip_connections_{kind}"] for kind in CELL_KINDS] == [4, 4]

    def test_models(self, run: Callable[..., Search]) -> None:
        search = run(two_nodes, epochs=2, order="first", alpha_lr=1.0)
        (model,) = search.strategy.list_models()
        assert model.sample == search.final[0]["architecture"]
        images, _ = HELD_OUT.tensors
        network = two_nodes()
        network.load_state_dict(dict(zip(network.state_dict(), search.steps[-1].space_after.values(), strict=True)))
        assert torch.equal(model.executable_model().eval()(images), network.freeze(model.sample).eval()(images))

    def test_cost(self) -> None:
        """A low target, whose term outweighs everything else, makes the child cheaper."""

        def child(**settings: Any) -> int:
            # The most expensive operation is ahead at first.
            begin = preferring("sep_conv_3x3", 2, [0.5, 0.5])

            class Begin(pl.Callback):
                def on_train_start(self, trainer: Any, pl_module: Any) -> None:
                    for kind in CELL_KINDS:
                        pl_module.alphas[kind].data.copy_(begin)

            search = Search(cells, epochs=1, order="first", callbacks=[Begin()], **settings).run()
            return measure_network(cells().freeze(search.final[0]["architecture"]), SIZE).macs

        usual = child(alpha_lr=0.1)
        assert child(alpha_lr=0.1, flops_target=1.0, flops_weight=1.0) < usual
        assert child(alpha_lr=0.1, flops_target=1e9, flops_weight=1e9) == usual


class TestCostTerm:
    @pytest.fixture
    def search(self, run: Callable[..., Search]) -> Search:
        return run(**WHOLE["expected cost"])

    def test_gradient_is_that_of_the_formula(self, search: Search) -> None:
        module, alphas = search.module, search.alphas
        target, weight = module.settings.flops_target, module.settings.flops_weight

        def penalty(tables: State) -> float:
            return weight * max(0.0, expected_macs(tables).item() / target - 1)  # type: ignore[operator]

        for sign in (1, -1):
            # Towards dear, then towards cheap candidates.
            tables = {name: table.clone() for name, table in alphas.items()}
            tables["kernel"] = torch.tensor([-1.0, 1.0], dtype=torch.float64) * sign * 3
            with torch.no_grad():
                for name, table in tables.items():
                    module.alphas[name].copy_(table)
            gradients = dict(zip(module.alphas, module._cost_gradients(), strict=True))
            for name, table in tables.items():
                for i in range(len(table)):
                    ends = []
                    for h in (1e-5, -1e-5):
                        shifted = {**tables, name: table.clone()}
                        shifted[name][i] += h
                        ends.append(penalty(shifted))
                    assert gradients[name][i].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, abs=1e-8)
            value = module.cost_penalty(list(tables.values())).item()
            assert value == pytest.approx(penalty(tables), rel=1e-9)
            assert (value > 0) == (sign == 1)
            assert any(gradient.any() for gradient in gradients.values()) == (sign == 1)
        with torch.no_grad():
            for name, table in alphas.items():
                module.alphas[name].copy_(table)

    def test_a_target_that_is_met_changes_nothing(self, run: Callable[..., Search]) -> None:
        search = Search(gradient_clip=None, flops_target=2.0 * max(prices().values()), flops_weight=100.0).run()
        assert_equal(search.alphas, run(**WHOLE["second order"]).alphas)
        assert search.reports[0]["expected_flops"] > 0

    def test_nested_choices_have_no_expected_cost(self) -> None:
        search = Search(nested, flops_target=1.0)
        with pytest.raises(UserError, match=r"'third'.*holds further choices"):
            search.run()


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

    FLAT = (1.0, 1.1, 0.9, 1.0, 1.0)
    # Means over five epochs: 1 and then, with the second 3, 1.36.
    RISING = (*FLAT, 1.0, 0.8, 1.0, 1.0, 1.0, 3.0, 3.0, 3.0, 3.0)

    def test_stop(self, monkeypatch: pytest.MonkeyPatch) -> None:
        search = self.scripted(self.RISING, monkeypatch, eigenvalue="stop")
        assert [report["eigenvalue"] for report in search.reports] == list(self.RISING[:11])
        assert search.module.ended_because == (
            "the dominant eigenvalue of the validation Hessian rises sharply; the result is that of epoch 11"
        )
        assert_equal(search.alphas, search.alphas_after_epoch(11))
        assert search.final[0]["default"] == search.reports[10]["val_accuracy"]

    def test_rollback(self, monkeypatch: pytest.MonkeyPatch) -> None:
        search = self.scripted(self.RISING, monkeypatch, eigenvalue="rollback")
        assert len(search.reports) == 11
        assert_equal(search.alphas, search.alphas_after_epoch(6))
        assert str(search.module.ended_because).endswith("the result is that of epoch 6")
        assert search.final[0]["default"] == search.reports[5]["val_accuracy"] != search.reports[10]["val_accuracy"]
        assert search.final[0]["architecture"] == search.module.export()

    def test_warm_up_does_not_count(self, monkeypatch: pytest.MonkeyPatch) -> None:
        search = self.scripted(self.RISING, monkeypatch, eigenvalue="rollback", warmup_epochs=2)
        assert len(search.reports) == 2 + 11
        assert_equal(search.alphas, search.alphas_after_epoch(2 + 6))

    @pytest.mark.parametrize("eigenvalue", ["track", "off"])
    def test_otherwise_it_goes_on(self, eigenvalue: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        search = self.scripted(self.RISING, monkeypatch, eigenvalue=eigenvalue)
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


class TestResume:
    def checkpoint(self, folder: Path, *arguments: Any, **settings: Any) -> tuple[Path, Search]:
        saver = ModelCheckpoint(folder, save_last=True)
        callbacks = [*settings.pop("callbacks", ()), saver]
        search = Search(*arguments, callbacks=callbacks, trainer={"enable_checkpointing": True}, **settings).run()
        return folder / "last.ckpt", search

    @pytest.mark.parametrize("sanity", [0, 2])
    def test_an_interrupted_search_ends_as_an_uninterrupted_one(self, sanity: int, tmp_path: Path) -> None:
        settings: dict[str, Any] = {"warmup_epochs": 1, "eigenvalue": "track"}
        file, _ = self.checkpoint(tmp_path, epochs=2, **settings)
        resumed = Search(epochs=4, checkpoint=file, seed=5, trainer={"num_sanity_val_steps": sanity}, **settings).run()
        straight = Search(epochs=4, **settings).run()
        assert [step.epoch for step in resumed.steps] == [2] * TRAIN_BATCHES + [3] * TRAIN_BATCHES
        assert_equal(resumed.alphas, straight.alphas)
        assert_equal(resumed.module.model.state_dict(), straight.module.model.state_dict())
        assert resumed.reports == straight.reports[2:]
        assert resumed.final == straight.final
        assert len(resumed.final) == 1
        for ours, theirs in zip(resumed.module.epochs, straight.module.epochs, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours.alphas, theirs.alphas, strict=True))
            assert (ours.val_accuracy, ours.eigenvalue) == (theirs.val_accuracy, theirs.eigenvalue)

    def test_guards_remember_what_was_before(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        series = iter(TestEigenvalue.RISING)
        monkeypatch.setattr(darts_module, "dominant_eigenvalue", lambda *_: next(series))
        settings: dict[str, Any] = {"order": "first", "eigenvalue": "rollback"}
        settings["training"] = few_batches(1)
        file, before = self.checkpoint(tmp_path, epochs=8, **settings)
        resumed = Search(epochs=14, checkpoint=file, **settings).run()
        assert [report["epoch"] for report in resumed.reports] == [9, 10, 11]
        assert_equal(resumed.alphas, before.alphas_after_epoch(6))

    def test_a_search_that_was_interrupted_after_its_last_epoch(self, tmp_path: Path) -> None:
        file, straight = self.checkpoint(tmp_path, epochs=2)
        resumed = Search(epochs=2, checkpoint=file).run()
        assert not resumed.steps
        assert not resumed.reports
        assert resumed.final == straight.final
        assert len(resumed.final) == 1
        assert_equal(resumed.alphas, straight.alphas)

    def test_a_search_that_was_ended_stays_so(self, tmp_path: Path) -> None:
        settings: dict[str, Any] = {"epochs": 5, "order": "first", "stop_above_skips": 1, "training": few_batches(1)}
        forced = SetAlpha({3: {"normal": preferring("skip_connect", 2)}})
        file, ended = self.checkpoint(tmp_path, cells, callbacks=[forced], **settings)
        assert len(ended.reports) == 3
        resumed = Search(cells, checkpoint=file, **settings).run()
        assert not resumed.steps
        assert resumed.module.ended_because == ended.module.ended_because is not None
        assert resumed.final == ended.final
        assert len(resumed.final) == 1
        assert_equal(resumed.alphas, ended.alphas)
        assert_equal(resumed.alphas, ended.alphas_after_epoch(2))

    def test_a_checkpoint_from_before_the_end_of_an_epoch(self, tmp_path: Path) -> None:
        # A user's own: of a time when the epoch's validation was over, but not the epoch.
        saver = ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=False)
        settings: dict[str, Any] = {"order": "first", "eigenvalue": "track"}
        Search(epochs=2, callbacks=[saver], trainer={"enable_checkpointing": True}, **settings).run()
        resumed = Search(epochs=3, checkpoint=tmp_path / "last.ckpt", **settings).run()
        straight = Search(epochs=3, **settings).run()
        assert_equal(resumed.alphas, straight.alphas)
        assert [report["epoch"] for report in resumed.reports] == [2, 3]
        assert resumed.reports[1] == straight.reports[2]
        assert resumed.final == straight.final

    def test_state_is_plain_data(self, run: Callable[..., Search]) -> None:
        module = run(**WHOLE["second order"]).module
        state: dict[str, Any] = {}
        module.on_save_checkpoint(state)
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        assert torch.load(file, weights_only=True)["darts"]["ended_because"] is None


def test_frozen_weights_stay_as_they_are(run: Callable[..., Search]) -> None:
    search = run(**WHOLE["frozen weights"])
    first, last = search.steps[0].space, search.steps[-1].space_after
    assert {n for n in first if torch.equal(first[n], last[n])} == {"second.1.0.weight", "head.bias"}


def test_no_epochs_no_result() -> None:
    search = Search(epochs=0).run()
    assert not search.reports
    assert not search.final


def test_hooks_of_the_user_come_first() -> None:
    seen: list[str] = []

    def keep(module: nn.Module, name: str, memo: Any, arguments: Any) -> bool:
        seen.append(name)
        return name.startswith("first")

    search = Search(epochs=1, mutation_hooks=[keep])
    supernet = search.strategy.mutate_model(Space())
    assert {"stem", "first", "second"} <= set(seen)
    assert type(supernet.first) is nas.LayerChoice
    assert type(supernet.second) is not nas.LayerChoice


def test_the_module_of_the_evaluator_is_told(run: Callable[..., Search]) -> None:
    assert run(**WHOLE["second order"]).classifier.told == ["start", *["epoch", "epoch's end"] * 3]


def test_what_loggers_and_callbacks_see(run: Callable[..., Search]) -> None:
    search = run(**WHOLE["second order"])
    seen, report = search.module.trainer.callback_metrics, search.reports[-1]
    for name in ("val_accuracy", "train_accuracy", "entropy"):
        assert float(seen[name]) == pytest.approx(report[name], rel=1e-6)
    assert float(seen["train_loss"]) == pytest.approx(search.steps[-1].loss, rel=1e-6)


def test_same_seed_same_result(run: Callable[..., Search]) -> None:
    first = run(**WHOLE["second order"])
    again = Search(**WHOLE["second order"]).run()
    assert_equal(again.alphas, first.alphas)
    assert again.reports == first.reports
    assert differs(Search(seed=2, **WHOLE["second order"]).run().alphas, first.alphas)


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_other_precisions(precision: str) -> None:
    torch.set_default_dtype(torch.float32)
    images, labels = TRAINING.tensors
    loader = DataLoader(TensorDataset(images.float(), labels), batch_size=TRAIN_BATCH)
    for hypergradient in ("exact", "finite_difference"):
        search = Search(
            training=loader,
            for_alpha=loader,
            epochs=1,
            trainer={"precision": precision},
            hypergradient=hypergradient,
            flops_target=cheap(),
            eigenvalue="track",
        ).run()
        assert differs(search.steps[0].alphas, search.alphas)
        assert all(torch.isfinite(parameter).all() for parameter in search.module.parameters())
        assert all(value == value for value in search.reports[0].values())


class WithMutable(nas.ModelSpace):
    def __init__(self, mutable: Callable[[], Any]) -> None:
        super().__init__()
        self.layer = nas.LayerChoice([nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 3, padding=1)], label="fine")
        self.odd = mutable()

    def forward(self, images: Tensor) -> Tensor:
        return self.odd(self.layer(images)).mean((2, 3))


class TestUserErrors:
    @pytest.mark.parametrize(
        "mutable",
        [
            lambda: nas.InputChoice(3, n_chosen=None, label="odd"),
            lambda: nas.InputChoice(3, n_chosen=1, reduction="concat", label="odd"),
            lambda: nas.Repeat(nn.Conv2d(3, 3, 1), (1, 3), label="odd"),
            lambda: nas.MutableConv2d(3, nni.choice("odd", [3, 6]), 1),
        ],
        ids=["any number", "concat", "repeat", "value"],
    )
    def test_choice_that_cannot_be_relaxed(self, mutable: Callable[[], Any]) -> None:
        search = Search(lambda: WithMutable(mutable))
        with pytest.raises(UserError, match=r"'odd'.*cannot be searched by DartsStrategy"):
            search.run()
        assert not search.steps

    def test_space_without_choices(self) -> None:
        class Plain(nas.ModelSpace):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(3, CLASSES)

        with pytest.raises(UserError, match="with choices: there is none"):
            Search(Plain).run()

    def test_evaluator_that_is_not_lightning(self) -> None:
        space = RawFormatModelSpace.from_model(Space(), FunctionalEvaluator(len))
        with pytest.raises(UserError, match="needs a Lightning evaluator, not a FunctionalEvaluator"):
            DartsStrategy()(space, SequentialExecutionEngine())

    def test_no_validation_images(self) -> None:
        evaluator = Classification(num_classes=CLASSES, train_dataloaders=DataLoader(TRAINING), **TRAINER)
        with pytest.raises(UserError, match="needs validation images"):
            DartsStrategy()(RawFormatModelSpace.from_model(Space(), evaluator), SequentialExecutionEngine())


def test_nnis_own_evaluator() -> None:
    """Its own reports are left out: they are of no architecture."""
    search = Search(epochs=2)
    search.evaluator = Classification(
        learning_rate=LEARNING_RATE,
        optimizer=torch.optim.SGD,
        num_classes=CLASSES,
        train_dataloaders=DataLoader(TRAINING, batch_size=TRAIN_BATCH),
        val_dataloaders=DataLoader(FOR_ALPHA, batch_size=ALPHA_BATCH),
        **TRAINER,
        max_epochs=2,
    )
    search.run()
    assert [report["epoch"] for report in search.reports] == [1, 2]
    assert [final["architecture"] for final in search.final] == [search.module.export()]


def test_survives_nnis_serialisation() -> None:
    strategy = DartsStrategy(order="first", alpha_betas=(0.9, 0.99), skip_limit=2, eigenvalue="rollback")
    loaded = nni.load(nni.dump(strategy))
    assert isinstance(loaded, DartsStrategy)
    assert loaded.settings.order == "first"
    assert tuple(loaded.settings.alpha_betas) == (0.9, 0.99)
    assert (loaded.settings.skip_limit, loaded.settings.eigenvalue) == (2, "rollback")
    assert loaded.settings.radius == strategy.settings.radius


def test_a_nas_experiment_runs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nni.nas.experiment.experiment as experiments

    # NNI keeps a list of experiments in the home directory, and knows that directory since it was imported.
    monkeypatch.setattr(experiments, "Experiments", functools.partial(experiments.Experiments, str(tmp_path)))
    search = Search(epochs=1)
    experiment = NasExperiment(cells(), search.evaluator, search.strategy)
    experiment.config.experiment_working_directory = str(tmp_path)
    try:
        experiment.run()
    finally:
        experiment.stop()
    (sample,) = experiment.export_top_models(formatter="dict")
    assert Genotype.from_sample(sample) == genotype_of(search.alphas)
    (network,) = experiment.export_top_models(formatter="instance")
    assert not any(isinstance(module, nas.LayerChoice | nas.InputChoice) for module in network.modules())
    images, _ = HELD_OUT.tensors
    assert network.eval()(images).shape == (len(images), CLASSES)


@pytest.mark.slow
@pytest.mark.parametrize(
    "program",
    [
        "import nni_cream; from nni.nas.strategy import DartsStrategy",
        "import torch; import nni.nas.strategy; import nni_cream; from nni.nas.strategy import DartsStrategy",
        # torch imports us while NNI's strategies are half imported.
        "from nni.nas.strategy import DartsStrategy",
        "from nni_cream.strategies import DartsStrategy; import nni.nas.strategy as nni; assert nni.DartsStrategy",
        "from nni.nas.strategy import CreamStrategy, DartsStrategy, DARTS; assert DARTS is not DartsStrategy",
    ],
    ids=["before", "after", "first", "itself", "beside others"],
)
def test_nni_has_the_strategy_in_either_order_of_imports(program: str) -> None:
    check = "; assert DartsStrategy.__module__ == 'nni_cream.strategies.darts', DartsStrategy.__module__"
    result = subprocess.run([sys.executable, "-c", program + check], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
