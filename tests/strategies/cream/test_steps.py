"""Every training step of a Cream search, beside the same by hand: student, teacher, meta step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import TensorDataset

from nni_cream.settings import Optimizer, Schedule
from nni_cream.strategies.cream_module import CreamLightningModule
from nni_cream.supernet.depthwise import PointwiseConv2d
from nni_cream.training import ImageClassifier
from tests.reference import run_through
from tests.six_paths import CLASSES
from tests.strategies.cream.by_hand import (
    answers,
    cross_entropy,
    distillation,
    matching_logits,
    path_of,
    sample_of,
    space_of,
    step_by_hand,
    teaching_by_hand,
)
from tests.strategies.cream.searches import KEPT, LEARNING_RATE, Search, Step
from tests.strategies.running import SMALL_RUNS, State, assert_same

pytestmark = SMALL_RUNS


@pytest.mark.parametrize("mode", ["matching", "top1", "none"])
class TestStep:
    def test_loss_and_update_are_those_computed_by_hand(self, mode: str, run: Callable[..., Search]) -> None:
        # Buffers too: what a teacher, a comparison, or a score on held-out images takes must not move a batch norm.
        for step in run(teacher=mode).steps:
            loss, state = step_by_hand(step, mode, step.space, step.matching)
            assert step.loss == pytest.approx(loss, rel=1e-9)
            assert_same(step.space_after, state, atol=1e-12)

    def test_on_a_cpu_convolutions_have_derivatives_of_our_own(self, mode: str, run: Callable[..., Search]) -> None:
        module = run(teacher=mode).module
        kinds = {tuple(m.kernel_size): type(m) for m in module.model.modules() if isinstance(m, nn.Conv2d)}
        assert kinds == {(1, 1): PointwiseConv2d, (3, 3): nn.Conv2d, (5, 5): nn.Conv2d}

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

    def by_hand(self, step: Step) -> tuple[State, State]:
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
        assert_same(step.space_after, after, atol=1e-12)

    @pytest.mark.parametrize("mode", ["top1", "none"])
    def test_without_matching_there_is_none(self, mode: str, run: Callable[..., Search]) -> None:
        for step in run(teacher=mode, meta_interval=1).steps:
            loss, state = step_by_hand(step, mode, step.space, step.matching)
            assert step.loss == pytest.approx(loss, rel=1e-9)
            assert_same(step.space_after, state, atol=1e-12)


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
