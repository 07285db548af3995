from __future__ import annotations

import copy
import functools
import io
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nni.nas.nn.pytorch as nas
import pytest
import pytorch_lightning as pl
import torch
from nni.nas.evaluator import FunctionalEvaluator
from nni.nas.evaluator.pytorch import Classification, DataLoader
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

from nni_cream.board import BoardEntry
from nni_cream.cost import measure_network
from nni_cream.errors import UserError
from nni_cream.strategies.cream import CreamStrategy
from nni_cream.strategies.cream_module import CreamLightningModule
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


@pytest.fixture(scope="module")
def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(6 * BATCH, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, CLASSES, (6 * BATCH,), generator=generator)
    images[torch.arange(len(labels)), labels] += 0.3
    return TensorDataset(images, labels)


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
        space_after, matching_after, _ = snapshot(pl_module)
        drawn = {m.label: m._sampled for m in pl_module.model.modules() if isinstance(m, PathSamplingLayer)}
        loss = float(outputs["loss"])
        epoch = trainer.current_epoch
        self.steps.append(Step(epoch, tuple(batch), space, matching, board, drawn, loss, space_after, matching_after))


class Search:
    """A search on the data, through NNI's own evaluator and engine, in double precision."""

    def __init__(
        self,
        data: TensorDataset,
        *,
        epochs: int = 3,
        trainer: dict[str, Any] | None = None,
        callbacks: tuple[Any, ...] = (),
        checkpoint: Path | None = None,
        **settings: Any,
    ) -> None:
        self.data = data
        self.watcher = Watcher()
        self.evaluator = Classification(
            learning_rate=LEARNING_RATE,
            optimizer=torch.optim.SGD,
            num_classes=CLASSES,
            train_dataloaders=DataLoader(data, batch_size=BATCH),
            val_dataloaders=DataLoader(data, batch_size=2 * BATCH),
            max_epochs=epochs,
            **{**TRAINER, "callbacks": [self.watcher, *callbacks], **(trainer or {})},
        )
        if checkpoint:
            self.evaluator.fit_kwargs = {"ckpt_path": str(checkpoint)}
        defaults = {"warmup_epochs": 1, "board_size": 4, "board_images": KEPT, "meta_interval": 10**6, "seed": 3}
        self.strategy = CreamStrategy(**{**defaults, **settings})
        self.reports: list[Any] = []
        self.final: list[Any] = []

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

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = self.data.tensors
        return zip(images.split(size), labels.split(size), strict=True)


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


class TestBoard:
    def test_scores_are_measured_on_all_held_out_images(self, run: Callable[..., Search]) -> None:
        search = run(teacher="matching")
        state = search.strategy.supernet.state_dict()
        for entry in search.module.board.entries:
            correct = sum(
                int((answers(state, sample_of(entry.path), images).argmax(-1) == labels).sum())
                for images, labels in search.batches(2 * BATCH)
            )
            assert entry.score == pytest.approx(100 * correct / len(search.data), abs=1e-9)

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


class TestRanking:
    def test_accuracy_has_batch_norms_of_the_path(self, run: Callable[..., Search]) -> None:
        search = run(teacher="matching")
        accuracies = {}
        for entry in search.module.board.entries:
            network = space_of(search.strategy.supernet.state_dict()).freeze(sample_of(entry.path))
            for module in network.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.momentum = None
                    module.reset_running_stats()
            with torch.no_grad():
                for images, _ in search.batches(BATCH):
                    network.train()(images)
                correct = sum(
                    int((network.eval()(images).argmax(-1) == labels).sum()) for images, labels in search.batches(BATCH)
                )
            accuracies[entry.path] = correct / len(search.data)
        assert {path_of(ranked.sample): ranked.accuracy for ranked in search.module.ranking} == accuracies
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

    def test_calibrated_network_has_the_accuracy_of_the_ranking(self, run: Callable[..., Search]) -> None:
        search = run(teacher="matching")
        best = search.module.ranking[0]
        network = search.module.calibrated_network(best.sample).eval()
        images, labels = search.data.tensors
        with torch.no_grad():
            assert (network(images).argmax(-1) == labels).double().mean().item() == pytest.approx(best.accuracy)


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

    def test_an_interrupted_search_ends_as_an_uninterrupted_one(self, data: TensorDataset, tmp_path: Path) -> None:
        checkpoint = self.checkpoint(data, tmp_path)
        self.assert_same_end(self.run_to_the_end(data, checkpoint), self.run_to_the_end(data, None))

    def test_lightnings_sanity_check_leaves_the_board_alone(self, data: TensorDataset, tmp_path: Path) -> None:
        # Lightning validates on two batches before it trains, unless told not to; on resuming there is a board by then.
        checkpoint = self.checkpoint(data, tmp_path)
        resumed = self.run_to_the_end(data, checkpoint, num_sanity_val_steps=2)
        self.assert_same_end(resumed, self.run_to_the_end(data, None))

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
    search = Search(TensorDataset(images.float(), labels), meta_interval=3, trainer={"precision": precision}).run()
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
