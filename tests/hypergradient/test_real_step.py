"""Hypergradients beside the difference quotient through a step that an optimizer really takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nni_cream.hypergradient import Hypergradient, Loss, ParameterStep, exact, finite_difference, first_order, sgd_step
from tests.hypergradient.losses import SECOND_ORDER, Quadratic, assert_close, flat, random


class Smooth:
    """A small smooth network with all the ways in which a weight can take part.

    Weights: two layers, one that the training loss does not use, one that the validation loss does not use, one whose
    gradient does not depend on α, and one that nothing uses. α: of two mixtures, and one that nothing uses.
    """

    SHAPES = ((4, 6), (6, 3), (3,), (3,), (3,), (2,))

    def __init__(self, **optimizer: Any) -> None:
        self.weights = [nn.Parameter(random(*shape, seed=k)) for k, shape in enumerate(self.SHAPES)]
        self.alphas = [random(3, seed=10), random(2, seed=11), random(2, seed=12)]
        self.data = {
            part: (random(8, 4, seed=s), random(8, 3, seed=s + 1)) for part, s in (("train", 20), ("valid", 30))
        }
        self.settings = {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.05} | optimizer
        self.optimizer = self.sgd(self.weights)

    def sgd(self, weights: Sequence[Tensor]) -> torch.optim.SGD:
        optimizer = torch.optim.SGD(
            [{"params": weights[:1]}, {"params": weights[1:], "lr": 0.7 * self.settings["lr"]}], **self.settings
        )
        if self.settings["momentum"]:
            for k, weight in enumerate(weights[:-1]):
                optimizer.state[weight]["momentum_buffer"] = random(*weight.shape, seed=40 + k)
        return optimizer

    def loss(self, part: str) -> Loss:
        images, targets = self.data[part]

        def loss(weights: Sequence[Tensor], alphas: Sequence[Tensor]) -> Tensor:
            a, b = alphas[0].softmax(0), alphas[1].softmax(0)
            hidden = images @ weights[0]
            hidden = a[0] * hidden.tanh() + a[1] * hidden.sin() + a[2] * hidden
            out = hidden @ weights[1]
            out = b[0] * out + b[1] * out.cos()
            only_here = {"train": weights[3], "valid": weights[2]}[part]
            linear = weights[4].sum() if part == "train" else (weights[4] ** 2).sum()
            return ((out - only_here - targets) ** 2).mean() + linear

        return loss

    def after_a_real_step(self, alphas: Sequence[Tensor]) -> Tensor:
        weights = [nn.Parameter(weight.detach().clone()) for weight in self.weights]
        optimizer = self.sgd(weights)
        self.loss("train")(weights, alphas).backward()
        optimizer.step()
        return self.loss("valid")(weights, alphas).detach()

    def numeric(self) -> list[Tensor]:
        h = 1e-5
        slopes = [torch.zeros_like(alpha) for alpha in self.alphas]
        for k, alpha in enumerate(self.alphas):
            for i in range(len(alpha)):
                ends = []
                for sign in (1, -1):
                    moved = [a.clone() for a in self.alphas]
                    moved[k][i] += sign * h
                    ends.append(self.after_a_real_step(moved))
                slopes[k][i] = (ends[0] - ends[1]) / (2 * h)
        return slopes

    def given(self) -> tuple[Loss, Loss, list[nn.Parameter], list[Tensor], list[ParameterStep]]:
        return (
            self.loss("train"),
            self.loss("valid"),
            self.weights,
            self.alphas,
            sgd_step(self.optimizer, self.weights),
        )


class TestRealStep:
    @pytest.mark.parametrize(
        "settings",
        [
            {"momentum": 0.0, "weight_decay": 0.0},
            {"momentum": 0.0},
            {"weight_decay": 0.0},
            {},
            {"nesterov": True},
        ],
        ids=str,
    )
    def test_exact_is_the_derivative_through_it(self, settings: dict[str, Any]) -> None:
        case = Smooth(**settings)
        result = exact(*case.given())
        assert_close(result.gradients, case.numeric(), 1e-8)
        torch.testing.assert_close(result.valid_loss, case.after_a_real_step(case.alphas), rtol=1e-14, atol=0)
        # The step matters here: the implicit term is no rounding error, and the first order is another vector.
        assert flat(result.implicit).norm() > 0.1 * flat(result.gradients).norm()
        plain = first_order(*case.given())
        assert (flat(plain.gradients) - flat(case.numeric())).norm() > 0.1 * flat(plain.gradients).norm()

    def test_finite_difference_tends_to_exact(self) -> None:
        case = Smooth()
        right = flat(exact(*case.given()).gradients)
        errors = [
            (flat(finite_difference(*case.given(), radius=radius).gradients) - right).norm().item()
            for radius in (0.1, 0.01, 0.001)
        ]
        assert errors[2] < 1e-6
        # Of second order in the radius.
        assert errors[0] / errors[1] == pytest.approx(100, rel=0.05)
        assert errors[1] / errors[2] == pytest.approx(100, rel=0.05)

    @SECOND_ORDER
    def test_alpha_that_nothing_uses(self, method: Callable[..., Hypergradient]) -> None:
        result = method(*Smooth().given())
        assert_close(result.gradients[2:], [torch.zeros(2, dtype=torch.float64)], 0)

    @pytest.mark.parametrize("method", [first_order, finite_difference, exact])
    def test_inside_no_grad(self, method: Callable[..., Hypergradient]) -> None:
        case = Smooth()
        with torch.no_grad():
            inside = method(*case.given())
        assert_close(inside.gradients, method(*case.given()).gradients, 0)

    @pytest.mark.parametrize("method", [first_order, finite_difference, exact])
    def test_result_needs_no_gradient(self, method: Callable[..., Hypergradient]) -> None:
        result = method(*Smooth().given())
        assert not any(t.requires_grad for t in (*result.gradients, *result.implicit, result.valid_loss))


class TestDegenerate:
    @SECOND_ORDER
    def test_validation_loss_without_weights(self, method: Callable[..., Hypergradient]) -> None:
        case = Smooth()
        train_loss, _, weights, alphas, step = case.given()
        result = method(train_loss, lambda weights, alphas: (alphas[0] ** 3).sum(), weights, alphas, step)
        assert_close(result.implicit, [torch.zeros_like(alpha) for alpha in alphas], 0)
        zeros = [torch.zeros_like(alpha) for alpha in alphas[1:]]
        assert_close(result.gradients, [3 * alphas[0] ** 2, *zeros], 1e-14)

    @SECOND_ORDER
    def test_alpha_and_weights_apart_in_the_training_loss(self, method: Callable[..., Hypergradient]) -> None:
        case = Smooth()
        train_loss, valid_loss, weights, alphas, step = case.given()
        fixed = [alpha.clone() for alpha in alphas]

        def apart(weights: Sequence[Tensor], alphas: Sequence[Tensor]) -> Tensor:
            return train_loss(weights, fixed) + (alphas[0] ** 2).sum()

        result = method(apart, valid_loss, weights, alphas, step)
        assert_close(result.implicit, [torch.zeros_like(alpha) for alpha in alphas], 0)
        assert flat(result.gradients).norm() > 0

    @SECOND_ORDER
    def test_training_loss_linear_in_the_weights(self, method: Callable[..., Hypergradient]) -> None:
        _, valid_loss, weights, alphas, step = Smooth().given()
        result = method(lambda weights, alphas: weights[0].sum() + alphas[0].sum(), valid_loss, weights, alphas, step)
        moved = [weight.detach().clone() for weight in weights]
        how = step[0]
        assert how.buffer is not None
        moved[0] = moved[0] - how.scale - how.decay * moved[0] - how.drift * how.buffer
        expected = first_order(valid_loss, valid_loss, moved, alphas, ())
        assert_close(result.gradients, expected.gradients, 1e-13)
        assert_close(result.implicit, [torch.zeros_like(alpha) for alpha in alphas], 0)

    @SECOND_ORDER
    def test_weights_of_the_validation_loss_alone_add_nothing(self, method: Callable[..., Hypergradient]) -> None:
        # L_val through a weight that no step moves: as if it were a constant, also in the length of v.
        case = Quadratic()
        step = [ParameterStep(0.1, 0.2, 0.3, case.buffers[k]) for k in range(2)]

        def train_loss(weights: Sequence[Tensor], alphas: Sequence[Tensor]) -> Tensor:
            return (alphas[0] * weights[0] ** 3).sum()

        def constant(weights: Sequence[Tensor], alphas: Sequence[Tensor]) -> Tensor:
            return case.valid_loss([weights[0], case.weights[1].detach()], alphas)

        given = case.weights, case.alphas, step
        result, expected = method(train_loss, case.valid_loss, *given), method(train_loss, constant, *given)
        assert_close(result.gradients, expected.gradients, 1e-14)
        assert flat(result.implicit).norm() > 0.01
