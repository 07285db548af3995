from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from nni_cream.architecture import CreamPath
from nni_cream.matching import MatchingLayer, inner_product, matching_gradient
from search_spaces.cream import CreamSpace
from tests.reference import apply_rule, golden, rule, run_through, standard_normal, use_exact_gates

CLASSES = 5
IMAGES = 3


def small_network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, CLASSES)).double()


class Problem:
    """A student in double precision, a board entry, and batches to be taught and validated on."""

    def __init__(self, seed: int) -> None:
        self.student, teacher = small_network(seed), small_network(seed + 1)
        self.matching = MatchingLayer(IMAGES, CLASSES).double()
        self.images = standard_normal(seed, 1, IMAGES, 7)
        self.stored = standard_normal(seed + 1, 1, IMAGES, CLASSES).softmax(-1)
        self.batch, self.held_out = standard_normal(seed + 2, 8, 7), standard_normal(seed + 3, 8, 7)
        self.labels = torch.arange(8) % CLASSES
        with torch.no_grad():
            self.soft_targets = (3 * teacher(self.batch)).softmax(-1)
            self.answers = self.student(self.images).softmax(-1)

    def weight(self) -> Tensor:
        return self.matching(self.answers, self.stored).squeeze().sigmoid()

    def by_double_backward(self, learning_rate: float) -> tuple[Tensor, ...]:
        """Differentiate the validation loss at w' = w - lr ρ(θ) ∇KD(w) through the step."""
        names, weights = zip(*self.student.named_parameters(), strict=True)
        teaching_loss = self.weight() * F.cross_entropy(self.student(self.batch), self.soft_targets)
        gradients = torch.autograd.grad(teaching_loss, weights, create_graph=True)
        stepped = {n: w - learning_rate * g for n, w, g in zip(names, weights, gradients, strict=True)}
        loss = F.cross_entropy(functional_call(self.student, stepped, (self.held_out,)), self.labels)
        return torch.autograd.grad(loss, list(self.matching.parameters()))

    def in_closed_form(self, learning_rate: float) -> tuple[Tensor, ...]:
        weight = self.weight()
        weights = list(self.student.parameters())
        teaching = torch.autograd.grad(F.cross_entropy(self.student(self.batch), self.soft_targets), weights)
        taught = copy.deepcopy(self.student)
        with torch.no_grad():
            for parameter, gradient in zip(taught.parameters(), teaching, strict=True):
                parameter -= learning_rate * weight * gradient
        validation_loss = F.cross_entropy(taught(self.held_out), self.labels)
        validation = torch.autograd.grad(validation_loss, list(taught.parameters()))
        return matching_gradient(weight, list(self.matching.parameters()), teaching, validation, learning_rate)


@pytest.mark.parametrize("learning_rate", [0.01, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_closed_form_equals_double_backward(seed: int, learning_rate: float) -> None:
    problem = Problem(seed)
    expected = problem.by_double_backward(learning_rate)
    assert sum(g.abs().sum() for g in expected) > 1e-6
    for ours, theirs in zip(problem.in_closed_form(learning_rate), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-15)


def test_gradient_predicts_the_change_of_the_validation_loss() -> None:
    problem = Problem(7)
    parameters = list(problem.matching.parameters())
    gradients = problem.in_closed_form(0.5)

    def loss_after_the_step() -> float:
        student = copy.deepcopy(problem.student)
        gradient = torch.autograd.grad(
            F.cross_entropy(student(problem.batch), problem.soft_targets), list(student.parameters())
        )
        with torch.no_grad():
            for parameter, g in zip(student.parameters(), gradient, strict=True):
                parameter -= 0.5 * problem.weight() * g
            return F.cross_entropy(student(problem.held_out), problem.labels).item()

    before = loss_after_the_step()
    size = 1e-5 / sum(g.square().sum() for g in gradients).item()
    with torch.no_grad():
        for parameter, g in zip(parameters, gradients, strict=True):
            parameter -= size * g
    assert loss_after_the_step() - before == pytest.approx(-1e-5, rel=1e-3)


class TestReference:
    """The outer gradient of the published code with its departures from the paper mended ("intended B")."""

    REFERENCE: dict[str, Any] = golden("cream/d_meta_update.json")

    def test_meta_update(self) -> None:
        reference, spec = self.REFERENCE, self.REFERENCE["spec"]
        space = CreamSpace(spec["sta_num"], 10).double().train()
        apply_rule(space)
        use_exact_gates(space)
        matching = MatchingLayer(4, 10).double()
        # In the published code the matching layer is part of the supernet.
        assert sum(p.numel() for p in (*space.parameters(), *matching.parameters())) == spec["params"]
        with torch.no_grad():
            matching.linear.weight.copy_(rule("meta_layer.weight", (1, 40)))
            matching.linear.bias.copy_(rule("meta_layer.bias", (1,)))
        batch, held_out = standard_normal(31, 12, 3, 64, 64)[:8].split(4)
        labels = torch.from_numpy(np.random.RandomState(32).randint(0, 10, 12))[4:8]
        student = CreamPath.of(spec["student"]).to_sample()

        # The board: which entry is the teacher?
        run_through(space, student)
        stored = torch.stack([F.softmax(2 * standard_normal(seed, 4, 10), 1) for seed in (21, 22, 23)])
        with torch.no_grad():
            entries = [standard_normal(seed, 4, 3, 64, 64) for seed in spec["board_input_seeds"]]
            answers = torch.stack([space(images).softmax(-1) for images in entries])
        logits = matching(answers, stored)
        torch.testing.assert_close(
            logits, torch.tensor(reference["board_meta_logits"], dtype=torch.float64), rtol=1e-9, atol=0
        )
        chosen = int(logits.argmax())
        assert chosen == reference["selected_idx"]
        assert spec["board_cands"][chosen] == reference["teacher_cand"]
        # Published sign; ours is sigmoid(+logit).
        weight = torch.sigmoid(-logits[chosen])
        assert weight.item() == pytest.approx(reference["meta_value"], rel=1e-9)

        # The student is taught.
        run_through(space, CreamPath.of(spec["board_cands"][chosen]).to_sample())
        with torch.no_grad():
            soft_targets = space(batch).softmax(-1)
        run_through(space, student)
        teaching_loss = F.cross_entropy(space(batch), soft_targets)
        # The reference logs the weighted loss.
        assert weight.item() * teaching_loss.item() == pytest.approx(reference["kd_loss"], rel=1e-9)
        named = dict(space.named_parameters())
        gradients = torch.autograd.grad(teaching_loss, list(named.values()), allow_unused=True)
        teaching = {name: g for name, g in zip(named, gradients, strict=True) if g is not None}
        norms = {name: weight.item() * g.norm().item() for name, g in teaching.items()}
        assert norms == pytest.approx(reference["first_grad_norms"], rel=1e-9)

        settings = spec["optimizer"]
        drawn = [named[name] for name in teaching]
        optimizer = torch.optim.SGD(
            [
                {"params": [p for p in drawn if p.dim() > 1], "weight_decay": settings["weight_decay"]},
                {"params": [p for p in drawn if p.dim() <= 1]},
            ],
            lr=settings["lr"],
            momentum=settings["momentum"],
            nesterov=settings["nesterov"],
        )
        for name, gradient in teaching.items():
            named[name].grad = weight.detach() * gradient
        optimizer.step()
        optimizer.zero_grad()

        # What did it do to other images?
        validation_loss = F.cross_entropy(space(held_out), labels, label_smoothing=0.1)
        assert validation_loss.item() == pytest.approx(reference["validation_loss"], rel=1e-9)
        validation = torch.autograd.grad(validation_loss, drawn)
        norm = torch.cat([g.flatten() for g in validation]).norm().item()
        assert norm == pytest.approx(reference["val_grad_norm"], rel=1e-9)
        ours = matching_gradient(
            weight, list(matching.parameters()), list(teaching.values()), validation, settings["lr"]
        )
        for gradient, name in zip(ours, ("meta_layer.weight", "meta_layer.bias"), strict=True):
            expected = torch.tensor(reference["meta_grad"][name], dtype=torch.float64)
            torch.testing.assert_close(gradient.flatten(), expected, rtol=1e-9, atol=0)


class TestLayer:
    def test_logit_is_linear_in_the_differences(self) -> None:
        layer = MatchingLayer(2, 3).double()
        student, stored = standard_normal(1, 4, 2, 3), standard_normal(2, 4, 2, 3)
        by_hand = [
            sum(
                layer.linear.weight[0, 3 * n + c] * (student[e, n, c] - stored[e, n, c])
                for n in range(2)
                for c in range(3)
            )
            + layer.linear.bias[0]
            for e in range(4)
        ]
        torch.testing.assert_close(layer(student, stored), torch.stack(by_hand), rtol=1e-12, atol=1e-12)

    def test_inner_product(self) -> None:
        left, right = (
            [torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])],
            [torch.tensor([4.0, 5.0]), torch.tensor([[6.0]])],
        )
        assert inner_product(left, right).item() == 1 * 4 + 2 * 5 + 3 * 6
        with pytest.raises(ValueError, match="shorter"):
            inner_product(left, right[:1])


@pytest.mark.parametrize("seed", range(3))
def test_the_layer_comes_to_prefer_the_useful_teacher(seed: int) -> None:
    """Entry 0 answers as the labels do, entry 1 the opposite; at first entry 1 is the one that is chosen."""
    torch.manual_seed(seed)
    truth = torch.randn(6, CLASSES, dtype=torch.float64)
    student = nn.Linear(6, CLASSES, bias=False).double()
    layer = MatchingLayer(IMAGES, CLASSES).double()

    def answer(entry: int, images: Tensor) -> Tensor:
        return ((1 - 2 * entry) * 2 * images @ truth).softmax(-1)

    images = torch.randn(2, IMAGES, 6, dtype=torch.float64)
    stored = torch.stack([answer(entry, images[entry]) for entry in range(2)])
    with torch.no_grad():
        differences = (student(images).softmax(-1) - stored).flatten(1)
        layer.linear.weight.copy_(differences[1:] - differences[:1])
        layer.linear.bias.zero_()

    chosen, weights = [], []
    start = student.weight.detach().clone()
    for _ in range(400):
        with torch.no_grad():
            student.weight.copy_(start)
            answers = student(images).softmax(-1)
        logits = layer(answers, stored)
        entry = int(logits.argmax())
        chosen.append(entry)
        weights.append(logits.sigmoid().tolist())
        batch, held_out = torch.randn(2, 32, 6, dtype=torch.float64)
        weight = logits[entry].sigmoid()
        teaching = torch.autograd.grad(F.cross_entropy(student(batch), answer(entry, batch)), student.weight)
        with torch.no_grad():
            student.weight -= 0.5 * weight * teaching[0]
        loss = F.cross_entropy(student(held_out), (held_out @ truth).argmax(1))
        validation = torch.autograd.grad(loss, student.weight)
        gradients = matching_gradient(weight, list(layer.parameters()), teaching, validation, 0.5)
        with torch.no_grad():
            for parameter, gradient in zip(layer.parameters(), gradients, strict=True):
                parameter -= gradient
    assert chosen[0] == 1
    assert set(chosen[-100:]) == {0}
    assert weights[-1][0] > max(weights[0][0], weights[-1][1], 0.5)


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_the_layer_learns_in_its_own_precision_under_autocast(precision: torch.dtype) -> None:
    """A slope of 5e-8, as of a small learning rate, is 0 in float16."""
    torch.manual_seed(0)
    matching = MatchingLayer(IMAGES, CLASSES)
    answers, stored = (torch.randn(1, IMAGES, CLASSES).softmax(-1) for _ in range(2))

    def gradients(enabled: bool) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", precision, enabled):
            weight = matching(answers, stored).squeeze().sigmoid()
            return matching_gradient(weight, list(matching.parameters()), [torch.tensor(0.05)], [torch.ones(())], 1e-6)

    for ours, exact in zip(gradients(True), gradients(False), strict=True):
        assert exact.norm() > 0
        assert torch.equal(ours, exact)
