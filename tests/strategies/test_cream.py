from __future__ import annotations

import copy
import functools
import io
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nni.nas.nn.pytorch as nas
import pytest
import pytorch_lightning as pl
import torch
from nni.nas.evaluator import FunctionalEvaluator
from nni.nas.evaluator.pytorch import Classification, DataLoader, Lightning, Trainer
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.execution.event import ModelEventType
from nni.nas.experiment import NasExperiment
from nni.nas.oneshot.pytorch.supermodule.sampling import PathSamplingLayer
from nni.nas.space import RawFormatModelSpace
from pytorch_lightning.callbacks import ModelCheckpoint
from scipy.stats import chisquare
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import TensorDataset

from nni_cream.board import BoardEntry, PrioritizedBoard
from nni_cream.cost import measure_network
from nni_cream.errors import UserError
from nni_cream.latency import LatencyBudget
from nni_cream.recipe import Optimizer, Schedule
from nni_cream.strategies.cream import CreamStrategy
from nni_cream.strategies.cream_module import CreamLightningModule
from nni_cream.training import ImageClassifier
from tests.reference import run_through

# NNI says so of every evaluator, and Lightning of every small run.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

CLASSES = 3
SIZE = 6
BATCH = 10
KEPT = 4
LEARNING_RATE = 0.05
SMOOTHING = 0.1
SAMPLES = [{"first": i, "second": j} for i in range(3) for j in range(2)]


class Space(nas.ModelSpace):
    """Six paths through two choices, with batch norms inside and outside of them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        self.first = nas.LayerChoice([self.candidate(4, kernel) for kernel in (1, 3, 5)], label="first")
        self.second = nas.LayerChoice([self.candidate(6, kernel) for kernel in (1, 3)], label="second")
        self.head = nn.Linear(6, CLASSES)

    @staticmethod
    def candidate(channels: int, kernel: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(4, channels, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(channels), nn.Softplus()
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.second(self.first(self.stem(images))).mean((2, 3)))


COSTS = {str(sample): measure_network(Space().freeze(sample), SIZE).macs for sample in SAMPLES}


@pytest.fixture(autouse=True)
def double_precision() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def labelled_images(number: int, seed: int, size: int = SIZE) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(number, 3, size, size, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, CLASSES, (number,), generator=generator)
    images[torch.arange(len(labels)), labels] += 0.3
    return TensorDataset(images, labels)


HELD_OUT = labelled_images(5 * BATCH, seed=1)


@pytest.fixture(scope="module")
def data() -> TensorDataset:
    return labelled_images(6 * BATCH, seed=0)


@dataclass(frozen=True)
class Step:
    """What a training step started from, and what it led to."""

    epoch: int
    batch: tuple[Tensor, Tensor]
    space: dict[str, Tensor]
    matching: dict[str, Tensor]
    board: tuple[BoardEntry, ...]
    drawn: dict[str, int]
    loss: float
    space_after: dict[str, Tensor]
    matching_after: dict[str, Tensor]
    board_after: tuple[BoardEntry, ...]


def snapshot(module: CreamLightningModule) -> tuple[dict[str, Tensor], dict[str, Tensor], tuple[BoardEntry, ...]]:
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
        **settings: Any,
    ) -> None:
        self.data = data
        self.watcher = Watcher()
        loaders = {
            "train_dataloaders": DataLoader(data, batch_size=BATCH),
            "val_dataloaders": held_out or DataLoader(HELD_OUT, batch_size=2 * BATCH),
        }
        trainer = {**TRAINER, "max_epochs": epochs, "callbacks": [self.watcher, *callbacks], **(trainer or {})}
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
        space = RawFormatModelSpace.from_model(Space(), self.evaluator)
        self.strategy.initialize(space, SequentialExecutionEngine())

    def run(self) -> Search:
        torch.manual_seed(1)
        engine = SequentialExecutionEngine()
        engine.register_model_event_callback(
            ModelEventType.IntermediateMetric, lambda event: self.reports.append(event.metric)
        )
        engine.register_model_event_callback(ModelEventType.FinalMetric, lambda event: self.final.append(event.metric))
        self.strategy(RawFormatModelSpace.from_model(Space(), self.evaluator), engine)
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

TRAINER: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


@pytest.fixture(scope="module")
def run(data: TensorDataset) -> Callable[..., Search]:
    """Run a search; those with the same settings only once."""

    @functools.cache
    def cached(**settings: Any) -> Search:
        return Search(data, **settings).run()

    return cached


# The same by hand, with NNI's unmutated space.


def space_of(state: dict[str, Tensor]) -> Space:
    space = Space().double().train()
    space.load_state_dict(state)
    return space


def path_of(sample: dict[str, int]) -> tuple[int, ...]:
    return (sample["first"], sample["second"])


def sample_of(path: tuple[int, ...]) -> dict[str, int]:
    return dict(zip(("first", "second"), path, strict=True))


def answers(state: dict[str, Tensor], sample: dict[str, int], images: Tensor) -> Tensor:
    """The softmax of a path with the statistics of the batch; the state stays as it is."""
    space = space_of(state)
    run_through(space, sample)
    with torch.no_grad():
        return space(images).softmax(-1)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    log = logits.log_softmax(-1)
    picked = log[torch.arange(len(labels)), labels]
    return -((1 - SMOOTHING) * picked + SMOOTHING * log.mean(-1)).mean()


def distillation(logits: Tensor, soft_targets: Tensor) -> Tensor:
    return -(soft_targets * logits.log_softmax(-1)).sum(-1).mean()


def matching_logits(step: Step, state: dict[str, Tensor], matching: dict[str, Tensor]) -> Tensor:
    differences = [(answers(state, step.drawn, entry.images) - entry.features).flatten() for entry in step.board]
    return torch.stack(differences) @ matching["linear.weight"][0] + matching["linear.bias"]


def teaching_by_hand(
    step: Step, mode: str, state: dict[str, Tensor], matching: dict[str, Tensor]
) -> tuple[BoardEntry, Tensor] | None:
    if mode == "none" or not step.board:
        return None
    if mode == "top1":
        return max(step.board, key=lambda entry: entry.score), torch.tensor(0.5)
    logits = matching_logits(step, state, matching)
    return step.board[int(logits.argmax())], logits.max().sigmoid()


def step_by_hand(
    step: Step, mode: str, state: dict[str, Tensor], matching: dict[str, Tensor]
) -> tuple[float, dict[str, Tensor]]:
    """The loss, and all parameters and buffers of the supernet after one SGD step on it."""
    images, labels = step.batch
    teaching = teaching_by_hand(step, mode, state, matching)
    space = space_of(state)
    run_through(space, step.drawn)
    logits = space(images)
    loss = cross_entropy(logits, labels)
    if teaching:
        entry, weight = teaching
        soft_targets = answers(state, sample_of(entry.path), images)
        loss = (weight * distillation(logits, soft_targets) + (2 - weight) * loss) / 2
    loss.backward()
    with torch.no_grad():
        for parameter in space.parameters():
            if parameter.grad is not None:
                parameter -= LEARNING_RATE * parameter.grad
    return loss.item(), space.state_dict()


def assert_same_state(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-9, atol=1e-12, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("mode", ["matching", "top1", "none"])
class TestStep:
    def test_loss_and_update_are_those_computed_by_hand(self, mode: str, run: Callable[..., Search]) -> None:
        # Buffers too: what a teacher, a comparison, or a score on held-out images takes must not move a batch norm.
        for step in run(teacher=mode).steps:
            loss, state = step_by_hand(step, mode, step.space, step.matching)
            assert step.loss == pytest.approx(loss, rel=1e-9)
            assert_same_state(step.space_after, state)

    def test_only_the_drawn_path_changes(self, mode: str, run: Callable[..., Search]) -> None:
        for step in run(teacher=mode).steps:
            changed = {name for name, tensor in step.space_after.items() if not torch.equal(tensor, step.space[name])}
            idle = [
                name
                for name in step.space
                if name.split(".")[0] in step.drawn and int(name.split(".")[1]) != step.drawn[name.split(".")[0]]
            ]
            assert len(idle) == 3 * 6
            assert changed == set(step.space) - set(idle)

    def test_the_board_opens_after_the_warm_up(self, mode: str, run: Callable[..., Search]) -> None:
        search = run(teacher=mode)
        assert [step.epoch for step in search.steps] == [0] * 6 + [1] * 6 + [2] * 6
        assert all(not step.board for step in search.steps[:7])
        assert len(search.steps[7].board) == 1
        assert len(search.steps[-1].board) >= 3

    def test_only_a_matching_teacher_needs_the_matching_layer(self, mode: str, run: Callable[..., Search]) -> None:
        for step in run(teacher=mode).steps:
            assert all(torch.equal(step.matching[name], step.matching_after[name]) for name in step.matching)


class TestTeacher:
    def test_selected_entry_is_not_always_the_same(self, run: Callable[..., Search]) -> None:
        # Otherwise the steps above could not tell the largest logit from the first or the last.
        chosen = [
            (int(matching_logits(step, step.space, step.matching).argmax()), len(step.board))
            for step in run(teacher="matching").steps
            if len(step.board) > 1
        ]
        assert {index == 0 for index, _ in chosen} == {True, False}
        assert {index == size - 1 for index, size in chosen} == {True, False}

    def test_weight_is_the_sigmoid_of_the_largest_logit(self, run: Callable[..., Search], data: TensorDataset) -> None:
        weights: list[float] = []

        class Log(pl.Callback):
            def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
                weights.append(float(trainer.callback_metrics.get("teaching_weight_step", -1)))

        search = Search(data, callbacks=(Log(),)).run()
        expected = [
            matching_logits(step, step.space, step.matching).max().sigmoid().item() if step.board else -1
            for step in search.steps
        ]
        assert weights == pytest.approx(expected, rel=1e-6)
        assert len(set(expected)) > 5

    def test_all_entries_are_compared_in_one_forward(self, data: TensorDataset) -> None:
        forwards: list[int] = []

        class Count(pl.Callback):
            def on_train_start(self, trainer: Any, pl_module: Any) -> None:
                pl_module.model.register_forward_hook(self.count)

            def count(self, *_: Any) -> None:
                self.number += 1

            def on_train_batch_start(self, *_: Any) -> None:
                self.number = 0

            def on_train_batch_end(self, *_: Any) -> None:
                forwards.append(self.number)

        steps = Search(data, board_size=6, callbacks=(Count(),)).run().steps
        # The student; to choose a teacher and to ask it; and, as there is always room, to score a path that is new.
        new = [step.epoch >= 1 and path_of(step.drawn) not in {entry.path for entry in step.board} for step in steps]
        assert forwards == [1 + 2 * bool(step.board) + unknown for step, unknown in zip(steps, new, strict=True)]
        assert max(len(step.board) for step in steps) >= 4

    def test_top1_is_the_best_entry(self, run: Callable[..., Search]) -> None:
        for step in run(teacher="top1").steps:
            if step.board:
                assert max(entry.score for entry in step.board) == step.board[0].score

    def test_without_teachers_nobody_is_asked(self, data: TensorDataset, monkeypatch: pytest.MonkeyPatch) -> None:
        def asked(*_: Any) -> Tensor:
            raise AssertionError("a teacher was asked")

        monkeypatch.setattr(CreamLightningModule, "_ask_teacher", asked)
        assert len(Search(data, teacher="none").run().module.board) >= 3
        with pytest.raises(AssertionError, match="asked"):
            Search(data, teacher="top1").run()


class TestMetaStep:
    MATCHING_RATE = 0.5

    def by_hand(self, step: Step) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Differentiate through w' = w - lr ρ(θ) ∇KD(w); return w' and the gradient in θ."""
        images, labels = step.batch
        matching = {name: tensor.clone().requires_grad_() for name, tensor in step.matching.items()}
        teaching = teaching_by_hand(step, "matching", step.space, matching)
        assert teaching is not None
        entry, weight = teaching
        soft_targets = answers(step.space, sample_of(entry.path), images[:KEPT])
        space = space_of(step.space)
        run_through(space, step.drawn)
        names, weights = zip(*space.named_parameters(), strict=True)
        loss = weight * distillation(space(images[:KEPT]), soft_targets)
        gradients = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
        after = {
            name: parameter if gradient is None else parameter - LEARNING_RATE * gradient
            for name, parameter, gradient in zip(names, weights, gradients, strict=True)
        }
        held_out = slice(KEPT, 2 * KEPT)
        validation_loss = cross_entropy(functional_call(space, after, (images[held_out],)), labels[held_out])
        gradient = torch.autograd.grad(validation_loss, list(matching.values()))
        state = {**space.state_dict(), **{name: tensor.detach() for name, tensor in after.items()}}
        return state, dict(zip(matching, gradient, strict=True))

    def test_whole_step(self, run: Callable[..., Search]) -> None:
        search = run(meta_interval=5, matching_lr=self.MATCHING_RATE)
        steps = search.steps
        moved = [
            index
            for index, step in enumerate(steps)
            if not torch.equal(step.matching["linear.weight"], step.matching_after["linear.weight"])
        ]
        due = [index for index, step in enumerate(steps) if index and index % 5 == 0 and step.board]
        # A path that is its own teacher already answers as it is told to, so nothing can be learnt from that.
        teachers = {i: teaching_by_hand(steps[i], "matching", steps[i].space, steps[i].matching) for i in due}
        assert moved == [i for i, (entry, _) in teachers.items() if entry.path != path_of(steps[i].drawn)]  # type: ignore[misc]
        assert 10 in due
        assert 5 not in due  # the board opens after step 6

        step = steps[moved[0]]
        state, gradient = self.by_hand(step)
        # The first step of Nesterov's momentum 0.9 goes 1.9 times the gradient.
        matching = {name: step.matching[name] - self.MATCHING_RATE * 1.9 * gradient[name] for name in gradient}
        assert gradient["linear.weight"].norm() > 1e-8
        for name, tensor in step.matching_after.items():
            change, expected = tensor - step.matching[name], matching[name] - step.matching[name]
            torch.testing.assert_close(change, expected, rtol=1e-6, atol=1e-15)

        # The ordinary step then starts from the weights and the matching layer that the meta step left.
        loss, after = step_by_hand(step, "matching", state, matching)
        assert step.loss == pytest.approx(loss, rel=1e-9)
        assert_same_state(step.space_after, after)

    @pytest.mark.parametrize("mode", ["top1", "none"])
    def test_without_matching_there_is_none(self, mode: str, run: Callable[..., Search]) -> None:
        for step in run(teacher=mode, meta_interval=1).steps:
            loss, state = step_by_hand(step, mode, step.space, step.matching)
            assert step.loss == pytest.approx(loss, rel=1e-9)
            assert_same_state(step.space_after, state)


class TestScheduleOfTheEvaluator:
    RATE = 0.3

    def test_learning_rate_falls_to_0_and_decay_spares_biases_and_batch_norms(self, data: TensorDataset) -> None:
        rates: list[list[float]] = []

        class Rates(pl.Callback):
            def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
                rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

            def on_train_end(self, trainer: Any, pl_module: Any) -> None:
                self.on_train_batch_start(trainer)
                names = {parameter: name for name, parameter in pl_module.model.named_parameters()}
                self.decay = {
                    names[p]: g["weight_decay"] for g in trainer.optimizers[0].param_groups for p in g["params"]
                }

        watcher = Rates()
        optimizer = Optimizer(name="sgd", lr=self.RATE, weight_decay=0.01).timm_arguments()
        classifier = ImageClassifier(CLASSES, optimizer, Schedule().timm_arguments())
        search = Search(data, classifier=classifier, callbacks=(watcher,), meta_interval=5, matching_lr=7.0).run()
        number = len(search.steps)
        assert number == 3 * 6
        for step, found in enumerate(rates):
            assert found == pytest.approx([self.RATE * (1 - step / number)] * 2, rel=1e-9, abs=1e-12)
        assert len(rates) == number + 1
        spared = {
            f"{prefix}.{name}"
            for prefix, module in search.strategy.supernet.named_modules()
            for name, _ in module.named_parameters(recurse=False)
            if name == "bias" or isinstance(module, nn.BatchNorm2d)
        }
        assert len(spared) == 2 * 6 + 1
        assert watcher.decay == {
            name: 0.0 if name in spared else 0.01 for name, _ in search.strategy.supernet.named_parameters()
        }


class TestPaths:
    ORDERED = sorted(COSTS.values())

    @pytest.mark.parametrize("interval", [(1, 3), (0, 1), (4, 4)])
    def test_every_path_lies_in_the_interval(self, interval: tuple[int, int], run: Callable[..., Search]) -> None:
        low, high = (self.ORDERED[i] for i in interval)
        search = run(flops_range=(low, high))
        drawn = {str(step.drawn) for step in search.steps}
        allowed = {name for name, cost in COSTS.items() if low <= cost <= high}
        assert drawn == allowed
        assert {str(sample_of(entry.path)) for entry in search.module.board.entries} <= allowed
        for entry in search.module.board.entries:
            assert entry.macs == COSTS[str(sample_of(entry.path))]

    def test_without_an_interval_every_path_is_drawn(self, run: Callable[..., Search]) -> None:
        assert len({str(step.drawn) for step in run(teacher="none").steps}) == len(SAMPLES)

    def test_an_interval_without_paths_is_an_error(self, data: TensorDataset) -> None:
        with pytest.raises(UserError, match="No path costs"):
            Search(data, flops_range=(1.0, 2.0)).run()

    def test_a_prior_without_paths_in_the_interval_is_an_error(self, data: TensorDataset) -> None:
        # Inside lies only the path that begins with the first candidate.
        assert SAMPLES[0] == {"first": 0, "second": 0}
        interval = (COSTS[str(SAMPLES[0])],) * 2
        with pytest.raises(UserError, match="The prior gives hardly any path"):
            Search(data, flops_range=interval, prior={"first": (0.0, 0.5, 0.5)}).initialize()
        Search(data, flops_range=interval, prior={"first": (0.1, 0.9, 0.0)}).initialize()

    def test_given_prior_applies_to_choices_of_its_length(self, run: Callable[..., Search]) -> None:
        drawn = [step.drawn for step in run(prior=(0.0, 2.0, 0.0), teacher="none").steps]
        assert {sample["first"] for sample in drawn} == {1}
        assert {sample["second"] for sample in drawn} == {0, 1}

    def test_prior_that_fits_no_choice_is_an_error(self, data: TensorDataset) -> None:
        with pytest.raises(UserError, match=r"prior has 6 probabilities, but .* have \[2, 3\] candidates"):
            Search(data, prior=(1 / 6,) * 6).run()

    def test_prior_by_label(self, data: TensorDataset) -> None:
        drawn = [step.drawn for step in Search(data, prior={"second": (0.0, 3.0)}, teacher="none").run().steps]
        assert {sample["second"] for sample in drawn} == {1}
        assert {sample["first"] for sample in drawn} == {0, 1, 2}

    def test_given_prior_is_what_paths_are_drawn_from(self, data: TensorDataset) -> None:
        prior = {"first": (0.1, 0.6, 0.3), "second": (0.2, 0.8)}
        module = Search(data, prior=prior, teacher="none").run().module
        counts = Counter((sample["first"], sample["second"]) for sample in (module.resample() for _ in range(2000)))
        expected = {(i, j): 2000 * prior["first"][i] * prior["second"][j] for i in range(3) for j in range(2)}
        assert chisquare([counts[path] for path in expected], list(expected.values())).pvalue > 1e-3

    @pytest.mark.parametrize(
        ("prior", "message"),
        [
            ({"third": (0.5, 0.5)}, "The prior of the choice 'third' has 2 probabilities, but there is no such choice"),
            ({"first": (0.5, 0.5)}, "The prior of the choice 'first' has 2 probabilities, but it has 3 candidates"),
            ({"second": (0.0, 0.0)}, r"The prior of the choice 'second' is \[0.0, 0.0\], but .* not all 0"),
            ((1.0, -0.5), r"The prior of the choice 'second' is \[1.0, -0.5\], but probabilities are not negative"),
        ],
    )
    def test_prior_that_is_none_is_an_error(self, prior: Any, message: str, data: TensorDataset) -> None:
        with pytest.raises(UserError, match=message):
            Search(data, prior=prior).run()

    def test_prior_from_the_board(self, run: Callable[..., Search]) -> None:
        search = run(prior="board", board_size=2)
        module = search.module
        paths = [entry.path for entry in module.board.entries]
        counts = [[[path[c] for path in paths].count(i) / len(paths) for i in range(n)] for c, n in ((0, 3), (1, 2))]
        order = [module.paths.labels.index(label) for label in ("first", "second")]
        assert [module.prior[position] for position in order] == counts
        # A candidate that is not on the board while a step is drawn is not drawn.
        for step in search.steps:
            for position, label in enumerate(("first", "second")):
                assert not step.board or step.drawn[label] in {entry.path[position] for entry in step.board}

    def test_paths_follow_from_the_seed(self, run: Callable[..., Search], data: TensorDataset) -> None:
        first = [step.drawn for step in run(teacher="none").steps]
        again = Search(data, teacher="none").run()
        assert [step.drawn for step in again.steps] == first
        assert [step.drawn for step in run(teacher="none", seed=4).steps] != first


@pytest.fixture(scope="module")
def run_timed(data: TensorDataset) -> Callable[[], Search]:
    """Run a search with a budget of time, once; it ranks by cost, since nobody ever answers with the class it wants."""
    images, labels = data.tensors

    @functools.cache
    def cached() -> Search:
        loader = DataLoader(TensorDataset(images, torch.full_like(labels, CLASSES)), batch_size=BATCH)
        budget = TestBudgetOfTime.BUDGET
        return Search(data, epochs=4, latency=budget, board_size=6, ranking_dataloader=loader).run()

    return cached


class TestBudgetOfTime:
    """The dearer a path in MACs, the less time it takes here."""

    BUDGET = LatencyBudget({"first": (0.7, 0.4, 0.1), "second": (0.25, 0.05)}, 0.5, 0.8, 1.25)

    @pytest.fixture
    def search(self, run_timed: Callable[[], Search]) -> Search:
        return run_timed()

    @staticmethod
    def time(sample: dict[str, int]) -> float:
        return round(0.5 + (0.7, 0.4, 0.1)[sample["first"]] + (0.25, 0.05)[sample["second"]], 4)

    def test_every_path_lies_in_the_interval(self, search: Search) -> None:
        allowed = {str(sample) for sample in SAMPLES if 0.8 <= self.time(sample) <= 1.25}
        # One of 1.25 ms, the end, is among them.
        assert len(allowed) == 4
        assert {str(step.drawn) for step in search.steps} == allowed
        assert {str(sample_of(entry.path)) for entry in search.module.board.entries} == allowed

    def test_entries_and_what_is_remembered_of_them_have_both_costs(self, search: Search) -> None:
        entries = search.module.board.entries
        for entry in entries:
            assert entry.latency == self.time(sample_of(entry.path)) == entry.cost
            assert entry.macs == COSTS[str(sample_of(entry.path))]
        (*_, places) = search.module.history.epochs.values()
        assert [(place.macs, place.latency) for place in places] == [(entry.macs, entry.latency) for entry in entries]

    def test_of_equal_accuracies_the_quicker_path_is_first_and_told(self, search: Search) -> None:
        ranking = search.module.ranking
        assert {path.accuracy for path in ranking} == {0.0}
        times = [self.time(path.sample) for path in ranking]
        assert [path.latency for path in ranking] == times == sorted(times)
        assert [path.cost.macs for path in ranking] != sorted(path.cost.macs for path in ranking)
        (final,) = search.final
        assert (final["latency"], final["path"]) == (times[0], ranking[0].sample)

    def test_the_board_is_asked_for_time(self, data: TensorDataset, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[float] = []
        admits = PrioritizedBoard.admits

        def watched(self: PrioritizedBoard, score: float, cost: float) -> bool:
            asked.append(cost)
            return admits(self, score, cost)

        monkeypatch.setattr(PrioritizedBoard, "admits", watched)
        Search(data, latency=self.BUDGET, board_size=2, teacher="none").run()
        assert asked
        assert set(asked) <= {self.time(sample) for sample in SAMPLES}

    def test_an_interval_without_paths_is_an_error(self, data: TensorDataset) -> None:
        with pytest.raises(UserError, match=r"^No path costs 2 ms to 3 ms a batch: .* cost 0\.65 ms to 1\.45 ms, and"):
            Search(data, latency=replace(self.BUDGET, low=2, high=3)).run()

    def test_there_is_one_budget(self) -> None:
        with pytest.raises(UserError, match="CreamStrategy has one budget: give flops_range or latency, not both"):
            CreamStrategy(latency=self.BUDGET, flops_range=(1, 2))


def share_of_held_out(state: dict[str, Tensor], sample: dict[str, int]) -> float:
    right = sum(int((answers(state, sample, x).argmax(-1) == labels).sum()) for x, labels in HELD_OUT_BATCHES)
    return 100 * right / len(HELD_OUT)


class TestBoard:
    def test_scores_are_measured_on_all_held_out_images(self, run: Callable[..., Search]) -> None:
        search = run(teacher="matching")
        state = search.strategy.supernet.state_dict()
        for entry in search.module.board.entries:
            assert entry.score == share_of_held_out(state, sample_of(entry.path))

    def test_the_history_has_the_board_after_every_epoch(self, run: Callable[..., Search]) -> None:
        search = run(teacher="matching")
        history = search.module.history.epochs
        assert list(history) == [1, 2, 3]
        assert history[1] == ()  # of the warm-up
        last = [(entry.path, entry.score, entry.macs) for entry in search.module.board.entries]
        assert [(place.path, place.score, place.macs) for place in history[3]] == last
        assert len(last) == 4
        for epoch, report in zip((2, 3), search.reports[1:], strict=True):
            assert history[epoch][0].score == pytest.approx(100 * report["val_accuracy"], abs=1e-9)

    def test_entries_keep_what_the_path_answered_in_training(self, run: Callable[..., Search]) -> None:
        search = run(teacher="matching")
        found = 0
        for step, following in zip(search.steps, search.steps[1:], strict=False):
            known = {entry.path for entry in step.board}
            for entry in following.board:
                if entry.path not in known:
                    found += 1
                    assert entry.path == path_of(step.drawn)
                    images, _ = step.batch
                    assert torch.equal(entry.images, images[:KEPT])
                    expected = answers(step.space, step.drawn, images)[:KEPT]
                    torch.testing.assert_close(entry.features.double(), expected, rtol=0, atol=1e-6)
        assert found >= 3

    def test_reports_to_nni(self, run: Callable[..., Search]) -> None:
        search = run(teacher="matching")
        assert [report["epoch"] for report in search.reports] == [1, 2, 3]
        assert search.reports[-1]["default"] == pytest.approx(search.module.board.entries[0].score / 100)
        losses = [[step.loss for step in search.steps if step.epoch == epoch] for epoch in range(3)]
        assert [report["train_loss"] for report in search.reports] == pytest.approx(
            [sum(epoch) / len(epoch) for epoch in losses], rel=1e-6
        )
        best = search.module.ranking[0]
        assert search.final == [
            {"default": best.accuracy, "flops": best.cost.macs, "params": best.cost.params, "path": best.sample}
        ]


def percent_correct(state: dict[str, Tensor], sample: dict[str, int], batch: tuple[Tensor, Tensor]) -> float:
    images, labels = batch
    return 100 * int((answers(state, sample, images).argmax(-1) == labels).sum()) / len(labels)


class TestAdmission:
    """All that is decided after every step, once more by hand."""

    # What can become of a path while the board has room, and while it is full.
    OUTCOMES = frozenset({"known", "room, though poor", "poor", "admitted", "refused"})

    def by_hand(self, search: Search, gap: float) -> Iterator[tuple[Step, str, list[tuple[Any, ...]]]]:
        """For every step with an open board: what became of its path, and path, score, and cost of all entries."""
        size = search.strategy.settings.board_size
        typical, measured = 0.0, 0
        for step in search.steps:
            if step.epoch < search.strategy.settings.warmup_epochs:
                continue
            board: list[tuple[Any, ...]] = [(entry.path, entry.score, entry.macs) for entry in step.board]
            path, macs = path_of(step.drawn), COSTS[str(step.drawn)]
            accuracy = percent_correct(step.space, step.drawn, step.batch)
            better, typical = accuracy > typical, 0.9 * typical + 0.1 * accuracy
            full = len(board) == size
            if path in [known for known, _, _ in board]:
                yield step, "known", board
            elif full and not better:
                yield step, "poor", board
            else:
                held_out = HELD_OUT_BATCHES[measured % len(HELD_OUT_BATCHES)]
                measured += 1
                score = percent_correct(step.space_after, step.drawn, held_out)
                _, worst, cost_of_worst = board[-1] if full else (None, -1000.0, 0)
                if score > worst + gap or (score > worst and macs < cost_of_worst):
                    outcome = "room" if not full else "admitted"
                    board = [*board[: size - 1], (path, score, macs)]
                    yield step, outcome if better or full else "room, though poor", board
                else:
                    yield step, "refused", board

    @pytest.mark.parametrize(("size", "gap", "seed"), [(3, 0.0, 9), (3, 5.0, 9), (5, 5.0, 4)])
    def test_as_by_hand(self, size: int, gap: float, seed: int, data: TensorDataset) -> None:
        search = Search(data, teacher="none", board_size=size, admission_gap=gap, epochs=8, seed=seed).run()
        outcomes: set[str] = set()
        for step, outcome, board in self.by_hand(search, gap):
            outcomes.add(outcome)
            assert {(e.path, e.score, e.macs) for e in step.board_after} == set(board), outcome
        assert outcomes >= self.OUTCOMES
        for step, following in zip(search.steps, search.steps[1:], strict=False):
            for entry in following.board if following.epoch != step.epoch else ():
                assert entry.score == share_of_held_out(step.space_after, sample_of(entry.path))


def test_a_single_image_left_over_scores_no_path() -> None:
    """Feature maps of one pixel: with its own statistics a single image would be an error."""
    data, held_out = labelled_images(6 * BATCH, 0, size=1), labelled_images(9, 1, size=1)
    search = Search(data, held_out=DataLoader(held_out, batch_size=4), board_size=6).run()
    state = search.strategy.supernet.state_dict()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        answers(state, SAMPLES[0], held_out.tensors[0][8:])
    entries = search.module.board.entries
    assert len(entries) >= 4
    for entry in entries:
        shares = [percent_correct(state, sample_of(entry.path), batch) for batch in batches(held_out, 4)[:2]]
        assert entry.score == pytest.approx(sum(shares) / 2)
    # The ranking normalises with running statistics, and can take all images.
    assert all(9 * path.accuracy == pytest.approx(round(9 * path.accuracy)) for path in search.module.ranking)
    assert not all(8 * path.accuracy == pytest.approx(round(8 * path.accuracy)) for path in search.module.ranking)


class TestRanking:
    @staticmethod
    def network(search: Search, sample: dict[str, int], batches: int | None) -> nn.Module:
        """The path with batch-norm statistics that are the average over the first training batches."""
        network = space_of(search.strategy.supernet.state_dict()).freeze(sample)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
                module.reset_running_stats()
        with torch.no_grad():
            for images, _ in search.batches()[:batches]:
                network.train()(images)
        return network.eval()

    @pytest.mark.parametrize("calibration", [1, 2, 20])
    def test_accuracy_has_batch_norms_of_the_path(self, calibration: int, run: Callable[..., Search]) -> None:
        search = run(teacher="matching", recalibration_batches=calibration)
        accuracies = {}
        for entry in search.module.board.entries:
            network = self.network(search, sample_of(entry.path), calibration)
            images, labels = HELD_OUT.tensors
            accuracies[entry.path] = (network(images).argmax(-1) == labels).double().mean().item()
        found = {path_of(ranked.sample): ranked.accuracy for ranked in search.module.ranking}
        assert found == pytest.approx(accuracies, abs=1e-12)
        assert len(set(accuracies.values())) > 1

    def test_order_and_costs(self, run: Callable[..., Search]) -> None:
        ranking = run(teacher="matching").module.ranking
        assert [path.accuracy for path in ranking] == sorted((path.accuracy for path in ranking), reverse=True)
        for path in ranking:
            assert path.cost == measure_network(Space().freeze(path.sample), SIZE)

    @pytest.mark.parametrize("limit", [1, 2, None])
    def test_models_come_in_the_order_of_the_ranking(self, limit: int | None, run: Callable[..., Search]) -> None:
        search = run(teacher="matching")
        models = list(search.strategy.list_models(limit=limit))
        expected = [path.sample for path in search.module.ranking][:limit]
        assert len(expected) == (limit or len(search.module.board))
        assert [model.sample for model in models] == expected
        images = search.data.tensors[0][:5]
        for model in models:
            network = space_of(search.strategy.supernet.state_dict()).freeze(model.sample)
            ours = model.executable_model()
            assert torch.equal(ours.eval()(images), network.eval()(images))

    def test_best_path_is_exported(self, run: Callable[..., Search]) -> None:
        module = run(teacher="matching").module
        assert module.export() == module.ranking[0].sample

    def test_other_images_may_rank(self, data: TensorDataset) -> None:
        # With labels turned by one class, what was right is wrong.
        images, labels = data.tensors
        turned = DataLoader(TensorDataset(images, (labels + 1) % CLASSES), batch_size=BATCH)
        straight = Search(data, teacher="none").run().module.ranking
        other = Search(data, teacher="none", ranking_dataloader=turned).run().module.ranking
        for path in other:
            same = next(p for p in straight if p.sample == path.sample)
            assert path.accuracy <= 1 - same.accuracy
        assert [p.accuracy for p in other] != [p.accuracy for p in straight]

    @pytest.mark.parametrize("calibration", [1, 2, 20])
    def test_calibrated_network_is_that_of_the_ranking(self, calibration: int, run: Callable[..., Search]) -> None:
        search = run(teacher="matching", recalibration_batches=calibration)
        sample = search.module.ranking[0].sample
        network = search.module.calibrated_network(sample).eval()
        images, _ = HELD_OUT.tensors
        logits = network(images)
        torch.testing.assert_close(logits, self.network(search, sample, calibration)(images), rtol=1e-9, atol=1e-12)
        assert not torch.allclose(logits, self.network(search, sample, 3)(images))

    def test_of_equal_accuracies_the_cheaper_path_is_first(self, data: TensorDataset) -> None:
        # Nobody ever answers with this class.
        images, labels = data.tensors
        loader = DataLoader(TensorDataset(images, torch.full_like(labels, CLASSES)), batch_size=BATCH)
        search = Search(data, teacher="none", board_size=6, ranking_dataloader=loader).run()
        assert {path.accuracy for path in search.module.ranking} == {0.0}
        costs = [path.cost.macs for path in search.module.ranking]
        assert len(costs) == len(set(costs)) >= 4
        assert costs == sorted(costs)
        assert costs != sorted(costs, reverse=True) != [entry.macs for entry in search.module.board.entries] != costs


class TestResume:
    def run_to_the_end(self, data: TensorDataset, checkpoint: Path | None, **trainer: Any) -> Search:
        return Search(data, epochs=4, meta_interval=3, checkpoint=checkpoint, trainer=trainer).run()

    def checkpoint(self, data: TensorDataset, folder: Path) -> Path:
        saver = ModelCheckpoint(folder, save_last=True)
        Search(data, epochs=2, meta_interval=3, callbacks=(saver,), trainer={"enable_checkpointing": True}).run()
        return folder / "last.ckpt"

    def assert_same_end(self, resumed: Search, straight: Search) -> None:
        assert [step.epoch for step in resumed.steps] == [2] * 6 + [3] * 6
        for ours, theirs in zip(resumed.steps, straight.steps[12:], strict=True):
            assert ours.drawn == theirs.drawn
            assert [entry.rank for entry in ours.board] == [entry.rank for entry in theirs.board]
            assert ours.loss == theirs.loss
        for name, tensor in straight.module.state_dict().items():
            assert torch.equal(resumed.module.state_dict()[name], tensor), name
        assert resumed.module.ranking == straight.module.ranking
        assert resumed.module.history.epochs == straight.module.history.epochs
        assert list(resumed.module.history.epochs) == [1, 2, 3, 4]

    def test_an_interrupted_search_ends_as_an_uninterrupted_one(self, data: TensorDataset, tmp_path: Path) -> None:
        checkpoint = self.checkpoint(data, tmp_path)
        self.assert_same_end(self.run_to_the_end(data, checkpoint), self.run_to_the_end(data, None))

    def test_lightnings_sanity_check_leaves_the_board_alone(self, data: TensorDataset, tmp_path: Path) -> None:
        # Lightning validates on two batches before it trains, unless told not to; on resuming there is a board by then.
        checkpoint = self.checkpoint(data, tmp_path)
        resumed = self.run_to_the_end(data, checkpoint, num_sanity_val_steps=2)
        self.assert_same_end(resumed, self.run_to_the_end(data, None))

    def test_a_search_that_was_interrupted_before_its_ranking(self, data: TensorDataset, tmp_path: Path) -> None:
        saver = ModelCheckpoint(tmp_path, save_last=True)
        straight = Search(data, callbacks=(saver,), trainer={"enable_checkpointing": True}).run()
        resumed = Search(data, checkpoint=tmp_path / "last.ckpt").run()
        assert not resumed.steps
        assert len(straight.module.ranking) >= 3
        assert resumed.module.ranking == straight.module.ranking
        assert resumed.final == straight.final
        assert len(resumed.final) == 1

    def test_state_is_plain_data(self, run: Callable[..., Search], data: TensorDataset) -> None:
        module = run(teacher="matching").module
        state: dict[str, Any] = {}
        module.on_save_checkpoint(state)
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        restored = torch.load(file, weights_only=True)
        other = Search(data, seed=9).run().module
        other.on_load_checkpoint(restored)
        assert [entry.rank for entry in other.board.entries] == [entry.rank for entry in module.board.entries]
        assert other._generator.random() == module._generator.random()


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true", "bf16-true"])
def test_other_precisions(precision: str, data: TensorDataset) -> None:
    torch.set_default_dtype(torch.float32)
    images, labels = data.tensors
    data = TensorDataset(images.float(), labels)
    held_out = DataLoader(data, batch_size=2 * BATCH)
    search = Search(data, held_out=held_out, meta_interval=3, trainer={"precision": precision}).run()
    assert len(search.module.ranking) >= 3
    assert all(torch.isfinite(parameter).all() for parameter in search.module.parameters())


class TestUserErrors:
    @pytest.mark.parametrize("epochs", [1, 2])
    def test_warm_up_that_never_ends(self, epochs: int, data: TensorDataset) -> None:
        search = Search(data, epochs=epochs, warmup_epochs=2)
        with pytest.raises(UserError, match=f"opens after 2 warm-up epochs, but training lasts {epochs}"):
            search.run()
        assert not search.steps

    def test_evaluator_that_is_not_lightning(self) -> None:
        space = RawFormatModelSpace.from_model(Space(), FunctionalEvaluator(len))
        with pytest.raises(UserError, match="needs a Lightning evaluator, not a FunctionalEvaluator"):
            CreamStrategy()(space, SequentialExecutionEngine())

    def test_no_validation_images(self, data: TensorDataset) -> None:
        evaluator = Classification(num_classes=CLASSES, train_dataloaders=DataLoader(data), **TRAINER)
        with pytest.raises(UserError, match="needs validation images"):
            CreamStrategy()(RawFormatModelSpace.from_model(Space(), evaluator), SequentialExecutionEngine())

    @pytest.mark.parametrize(
        ("batch", "kept", "message"),
        [(1, 4, "validation batch has 1, and board_images is 4"), (20, 1, "validation batch has 20, .* is 1")],
    )
    def test_batches_of_one_image(self, batch: int, kept: int, message: str, data: TensorDataset) -> None:
        with pytest.raises(UserError, match=f"at least 2 images: .*{message}"):
            Search(data, held_out=DataLoader(HELD_OUT, batch_size=batch), board_images=kept).initialize()
        Search(data, held_out=DataLoader(HELD_OUT, batch_size=2), board_images=2).initialize()

    def test_more_images_to_keep_than_a_batch_has(self, data: TensorDataset) -> None:
        # No path could ever enter the board, and the search would end without an architecture.
        with pytest.raises(UserError, match="board_images"):
            Search(data, board_images=BATCH + 1).run()


def test_a_nas_experiment_runs_it(data: TensorDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nni.nas.experiment.experiment as experiments

    # NNI keeps a list of experiments in the home directory, and knows that directory since it was imported.
    monkeypatch.setattr(experiments, "Experiments", functools.partial(experiments.Experiments, str(tmp_path)))
    search = Search(data)
    experiment = NasExperiment(Space(), search.evaluator, search.strategy)
    experiment.config.experiment_working_directory = str(tmp_path)
    try:
        experiment.run()
    finally:
        experiment.stop()
    ranking = [path.sample for path in search.module.ranking]
    assert len(ranking) >= 3
    assert experiment.export_top_models(2, formatter="dict") == ranking[:2]
    network = experiment.export_top_models(formatter="instance")[0]
    assert not any(isinstance(module, nas.LayerChoice) for module in network.modules())


@pytest.mark.slow
@pytest.mark.parametrize(
    "program",
    [
        "import nni_cream; from nni.nas.strategy import CreamStrategy",
        "import torch; import nni.nas.strategy; import nni_cream; from nni.nas.strategy import CreamStrategy",
        # torch imports us while NNI's strategies are half imported.
        "from nni.nas.strategy import CreamStrategy",
        "from nni_cream.strategies import CreamStrategy; import nni.nas.strategy as nni; assert nni.CreamStrategy",
    ],
    ids=["before", "after", "first", "itself"],
)
def test_nni_has_the_strategy_in_either_order_of_imports(program: str) -> None:
    check = "; assert CreamStrategy.__module__ == 'nni_cream.strategies.cream', CreamStrategy.__module__"
    result = subprocess.run([sys.executable, "-c", program + check], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
