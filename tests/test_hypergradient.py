from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nni_cream.errors import UserError
from nni_cream.hypergradient import (
    PUBLISHED_RADIUS,
    Hypergradient,
    Loss,
    ParameterStep,
    exact,
    finite_difference,
    first_order,
    sgd_step,
)
from nni_cream.supernet.functional import pure_loss
from tests.darts_reference import GoldenSearch, golden_search

SECOND_ORDER: Any = pytest.mark.parametrize("method", [finite_difference, exact])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def assert_close(actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    torch.testing.assert_close(list(actual), list(expected), rtol=0, atol=tolerance)


@pytest.fixture(
    scope="module", params=["search_2_nodes.json", pytest.param("search_4_nodes.json", marks=pytest.mark.slow)]
)
def search(request: pytest.FixtureRequest) -> GoldenSearch:
    return golden_search(request.param)


class TestPublishedNumbers:
    def tables(self, search: GoldenSearch, numbers: dict[str, Any]) -> list[Tensor]:
        return [torch.tensor(numbers[kind], dtype=torch.float64) for kind in search.alphas]

    def test_first_order(self, search: GoldenSearch) -> None:
        result = first_order(search.loss("train"), search.loss("valid"), search.weights, search.tables, ())
        assert_close(result.gradients, self.tables(search, search.data["first_order"]), 1e-9)
        assert result.valid_loss.item() == pytest.approx(search.data["valid_loss_train_mode"], abs=1e-12)
        assert_close(result.implicit, [torch.zeros_like(table) for table in search.tables], 0)

    @pytest.mark.parametrize("momentum_buffers", [False, True])
    def test_second_order(self, search: GoldenSearch, momentum_buffers: bool) -> None:
        expected = search.data["with_momentum_buffer" if momentum_buffers else "no_momentum_buffer"]
        step = sgd_step(search.sgd(momentum_buffers=momentum_buffers), search.weights)
        given = search.loss("train"), search.loss("valid"), search.weights, search.tables, step
        results = {"exact": exact(*given), "finite_difference": finite_difference(*given)}
        for name, result in results.items():
            assert_close(result.gradients, self.tables(search, expected[name]), 1e-9)
            assert result.valid_loss.item() == pytest.approx(expected["unrolled_valid_loss"], abs=1e-12)
        a, b = (flat(results[name].gradients) for name in ("exact", "finite_difference"))
        relative = ((a - b).norm() / a.norm()).item()
        assert relative == pytest.approx(expected["relative_difference_of_the_two"], rel=1e-6)
        # The rest is the same in both: they differ in the implicit term alone.
        direct = [flat(r.gradients) - flat(r.implicit) for r in results.values()]
        torch.testing.assert_close(*direct, rtol=0, atol=1e-14)

    def test_the_published_radius(self, search: GoldenSearch) -> None:
        assert search.data["hyperparameters"]["finite_difference_r"] == PUBLISHED_RADIUS


class Quadratic:
    """Losses in which dL_val/dα after a step can be written down.

    L_train = Σ ½·a·w² + α·w and L_val = Σ ½·b·(w − t)² + ½·c·α², so that dL_val(w'(α), α)/dα = c·α − s·b·(w' − t).
    """

    def __init__(self) -> None:
        self.a, self.b, self.t, self.c = (random(2, 3, seed=seed) for seed in range(4))
        self.weights = [nn.Parameter(random(3, seed=seed)) for seed in (4, 5)]
        self.buffers = [random(3, seed=seed) for seed in (6, 7)]
        self.alphas = [random(3, seed=seed) for seed in (8, 9)]

    def train_loss(self, weights: Sequence[Tensor], alphas: Sequence[Tensor]) -> Tensor:
        w = torch.stack(list(weights))
        return (self.a * w**2 / 2 + torch.stack(list(alphas)) * w).sum()

    def valid_loss(self, weights: Sequence[Tensor], alphas: Sequence[Tensor]) -> Tensor:
        return (
            self.b * (torch.stack(list(weights)) - self.t) ** 2 / 2 + self.c * torch.stack(list(alphas)) ** 2 / 2
        ).sum()


class TestClosedForm:
    @SECOND_ORDER
    @pytest.mark.parametrize("with_buffers", [False, True])
    def test_groups_with_momentum_and_weight_decay(
        self, method: Callable[..., Hypergradient], with_buffers: bool
    ) -> None:
        case = Quadratic()
        plain: dict[str, Any] = {"lr": 0.2, "momentum": 0.9, "nesterov": False, "weight_decay": 0.3}
        nesterov: dict[str, Any] = {"lr": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 0.2}
        optimizer = torch.optim.SGD(
            [{"params": [case.weights[1]], **nesterov}, {"params": [case.weights[0]], **plain}], lr=1
        )
        if with_buffers:
            for weight, buffer in zip(case.weights, case.buffers, strict=True):
                optimizer.state[weight]["momentum_buffer"] = buffer
        m = case.buffers if with_buffers else [torch.zeros(3), torch.zeros(3)]
        w = [weight.detach() for weight in case.weights]
        g = [case.a[k] * w[k] + case.alphas[k] for k in range(2)]
        after = [
            w[0] - 0.2 * (0.9 * m[0] + g[0] + 0.3 * w[0]),
            w[1] - 0.1 * (g[1] + 0.2 * w[1] + 0.8 * (0.8 * m[1] + g[1] + 0.2 * w[1])),
        ]
        direct = [case.c[k] * case.alphas[k] for k in range(2)]
        slopes = [case.b[k] * (after[k] - case.t[k]) for k in range(2)]
        implicit = [-0.2 * slopes[0], -0.1 * 1.8 * slopes[1]]

        step = sgd_step(optimizer, case.weights)
        result = method(case.train_loss, case.valid_loss, case.weights, case.alphas, step)
        # The training gradient is linear in w, so the central difference is exact as well, but for rounding.
        tolerance = 1e-14 if method is exact else 1e-11
        assert_close(result.implicit, implicit, tolerance)
        assert_close(result.gradients, [a + b for a, b in zip(direct, implicit, strict=True)], tolerance)
        torch.testing.assert_close(result.valid_loss, case.valid_loss(after, case.alphas))

    def test_first_order_takes_no_step(self) -> None:
        case = Quadratic()

        def never(weights: Sequence[Tensor], alphas: Sequence[Tensor]) -> Tensor:
            raise AssertionError

        result = first_order(never, case.valid_loss, case.weights, case.alphas, ())
        assert_close(result.gradients, [case.c[k] * case.alphas[k] for k in range(2)], 1e-14)
        torch.testing.assert_close(result.valid_loss, case.valid_loss(case.weights, case.alphas).detach())

    @pytest.mark.parametrize(("radius", "sign"), [(0.01, 1), (0.5, 1), (0.5, -1)])
    def test_radius_is_how_far_the_weights_move(self, radius: float, sign: int) -> None:
        # L_train = α·w³: the central difference of w³ over ±r is 3·w² + r².
        w, alpha, lr = 0.7, -0.4, 0.3
        after = w - lr * alpha * 3 * w**2
        slope = sign * 2 * after

        def train_loss(weights: Sequence[Tensor], alphas: Sequence[Tensor]) -> Tensor:
            return (alphas[0] * weights[0] ** 3).sum()

        def valid_loss(weights: Sequence[Tensor], alphas: Sequence[Tensor]) -> Tensor:
            return sign * (weights[0] ** 2).sum()

        given = (
            train_loss,
            valid_loss,
            [torch.tensor([w], dtype=torch.float64)],
            [torch.tensor([alpha], dtype=torch.float64)],
            [ParameterStep(lr, 0.0, 0.0, None)],
        )
        (implicit,) = finite_difference(*given, radius=radius).implicit
        assert implicit.item() == pytest.approx(-lr * slope * (3 * w**2 + radius**2), rel=1e-9)
        assert exact(*given).implicit[0].item() == pytest.approx(-lr * slope * 3 * w**2, rel=1e-12)
        if radius == PUBLISHED_RADIUS:
            assert_close(finite_difference(*given).implicit, [implicit], 0)


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


class Dropped(nn.Module):
    """A network with batch norms, dropout, and α in it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.second = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, 3)
        self.alpha = nn.Parameter(torch.randn(2))

    def forward(self, images: Tensor) -> Tensor:
        features = self.first(images)
        a, b = self.alpha.softmax(0)
        logits: Tensor = self.head((a * features + b * self.second(features)).mean((2, 3)))
        return logits


class TestPurity:
    @pytest.mark.parametrize("method", [first_order, finite_difference, exact])
    @pytest.mark.parametrize("existing_gradients", [False, True])
    def test_nothing_changes(self, method: Callable[..., Hypergradient], existing_gradients: bool) -> None:
        torch.manual_seed(0)
        network = Dropped().double()
        network.head.eval()
        names = [name for name, _ in network.named_parameters() if name != "alpha"]
        weights = [network.get_parameter(name) for name in names]
        optimizer = torch.optim.SGD(weights, 0.1, momentum=0.9, weight_decay=0.01)
        # A real step, for buffers of every kind.
        F.cross_entropy(network(random(4, 3, 6, 6, seed=1)), torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()
        if not existing_gradients:
            network.zero_grad(set_to_none=True)
        targets = torch.tensor([2, 1, 0, 1])
        losses = [
            pure_loss(
                network, (names, ["alpha"]), lambda out: F.cross_entropy(out, targets), random(4, 3, 6, 6, seed=seed)
            )
            for seed in (2, 3)
        ]
        state = copy.deepcopy(network.state_dict())
        gradients = [None if p.grad is None else p.grad.clone() for p in network.parameters()]
        momenta = copy.deepcopy(optimizer.state_dict())
        modes = [(module.training, getattr(module, "track_running_stats", None)) for module in network.modules()]
        random_state = torch.get_rng_state()

        results = [
            method(*losses, weights, [network.alpha], sgd_step(optimizer, weights) if method is not first_order else ())
            for _ in range(2)
        ]
        assert torch.equal(torch.get_rng_state(), random_state)
        assert modes == [
            (module.training, getattr(module, "track_running_stats", None)) for module in network.modules()
        ]
        for name, tensor in network.state_dict().items():
            assert torch.equal(tensor, state[name]), name
        for parameter, before in zip(network.parameters(), gradients, strict=True):
            assert (parameter.grad is None) == (before is None) == (not existing_gradients)
            assert before is None or torch.equal(parameter.grad, before)  # type: ignore[arg-type]
        after = optimizer.state_dict()
        assert str(after["param_groups"]) == str(momenta["param_groups"])
        for k, entry in momenta["state"].items():
            assert torch.equal(after["state"][k]["momentum_buffer"], entry["momentum_buffer"])
        # The same dropout mask each time.
        assert_close(results[0].gradients, results[1].gradients, 0)
        assert results[0].gradients[0].norm() > 1e-6

    def test_exact_with_dropout_against_numbers(self) -> None:
        torch.manual_seed(0)
        network = Dropped().double()
        names = [name for name, _ in network.named_parameters() if name != "alpha"]
        weights = [network.get_parameter(name) for name in names]
        targets = torch.tensor([2, 1, 0, 1])
        train_loss, valid_loss = (
            pure_loss(
                network, (names, ["alpha"]), lambda out: F.cross_entropy(out, targets), random(4, 3, 6, 6, seed=seed)
            )
            for seed in (2, 3)
        )
        alpha = network.alpha.detach()
        step = [ParameterStep(0.5, 0.0, 0.0, None)] * len(weights)
        result = exact(train_loss, valid_loss, weights, [alpha], step)

        def unrolled(alpha: Tensor) -> float:
            slopes = torch.autograd.grad(train_loss(weights, [alpha]), weights)
            moved = [w.detach() - 0.5 * s for w, s in zip(weights, slopes, strict=True)]
            return valid_loss(moved, [alpha]).item()

        h = 1e-6
        numeric = [(unrolled(alpha + h * unit) - unrolled(alpha - h * unit)) / (2 * h) for unit in torch.eye(2)]
        assert_close(result.gradients, [torch.tensor(numeric, dtype=torch.float64)], 1e-8)
        assert result.implicit[0].norm() > 1e-3


class TestSgdStep:
    @pytest.mark.parametrize(
        ("momentum", "nesterov", "weight_decay", "steps_before"),
        [
            (momentum, nesterov, decay, steps)
            for momentum, nesterov, decay, steps in itertools.product((0, 0.9), (False, True), (0, 0.1), (0, 1, 3))
            if momentum or not nesterov
        ],
    )
    def test_is_the_step_of_the_optimizer(
        self, momentum: float, nesterov: bool, weight_decay: float, steps_before: int
    ) -> None:
        weights = [nn.Parameter(random(5, seed=k)) for k in range(3)]
        # The groups are in another order than the weights.
        optimizer = torch.optim.SGD(
            [{"params": [weights[2]], "lr": 0.05}, {"params": weights[:2]}],
            lr=0.2,
            momentum=momentum,
            nesterov=nesterov,
            weight_decay=weight_decay,
        )
        for seed in range(steps_before):
            for k, weight in enumerate(weights):
                weight.grad = random(5, seed=100 + 10 * seed + k)
            optimizer.step()
        slopes = [random(5, seed=50 + k) for k in range(3)]
        steps = sgd_step(optimizer, weights)
        expected = [
            weight.detach()
            - how.scale * slope
            - how.decay * weight.detach()
            - how.drift * (torch.zeros(5) if how.buffer is None else how.buffer)
            for weight, slope, how in zip(weights, slopes, steps, strict=True)
        ]
        for weight, slope in zip(weights, slopes, strict=True):
            weight.grad = slope
        optimizer.step()
        assert_close([weight.detach() for weight in weights], expected, 1e-14)
        assert [how.buffer is None for how in steps] == [not (momentum and steps_before)] * 3

    def test_follows_the_schedule(self) -> None:
        weight = nn.Parameter(torch.ones(2))
        optimizer = torch.optim.SGD([weight], 0.4)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        assert sgd_step(optimizer, [weight]) == [ParameterStep(0.4, 0.0, 0.0, None)]
        optimizer.step()
        schedule.step()
        assert sgd_step(optimizer, [weight]) == [ParameterStep(0.2, 0.0, 0.0, None)]

    @SECOND_ORDER
    def test_weight_that_the_optimizer_does_not_know(self, method: Callable[..., Hypergradient]) -> None:
        case = Quadratic()
        optimizer = torch.optim.SGD(case.weights[:1], 0.2, momentum=0.9, weight_decay=0.1)
        optimizer.state[case.weights[0]]["momentum_buffer"] = case.buffers[0]
        step = sgd_step(optimizer, case.weights)
        assert step == [ParameterStep(0.2, 0.2 * 0.1, 0.2 * 0.9, case.buffers[0]), ParameterStep(0.0, 0.0, 0.0, None)]
        result = method(case.train_loss, case.valid_loss, case.weights, case.alphas, step)
        # It stays where it is, so no gradient comes through it.
        w = case.weights[1].detach()
        assert_close(result.implicit[1:], [torch.zeros_like(w)], 0)
        assert result.implicit[0].norm() > 0.01
        g = case.a[0] * case.weights[0].detach() + case.alphas[0]
        after = case.weights[0].detach() * (1 - 0.02) - 0.2 * g - 0.18 * case.buffers[0]
        torch.testing.assert_close(result.valid_loss, case.valid_loss([after, w], case.alphas))

    @pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.RMSprop, torch.optim.AdamW])
    def test_other_optimizer(self, optimizer: Any) -> None:
        weights = [nn.Parameter(torch.ones(2))]
        with pytest.raises(UserError, match=rf"one of SGD, but .* is {optimizer.__name__}; take torch.optim.SGD"):
            sgd_step(optimizer(weights, lr=0.1), weights)

    def test_subclass_may_step_otherwise(self) -> None:
        class Mine(torch.optim.SGD):
            pass

        weights = [nn.Parameter(torch.ones(2))]
        with pytest.raises(UserError, match="but the optimizer of the weights is Mine"):
            sgd_step(Mine(weights, lr=0.1), weights)

    @pytest.mark.parametrize("settings", [{"momentum": 0.9, "dampening": 0.1}, {"maximize": True}], ids=str)
    def test_other_formula(self, settings: dict[str, Any]) -> None:
        weights = [nn.Parameter(torch.ones(2)) for _ in range(2)]
        groups = [{"params": weights[:1]}, {"params": weights[1:], **settings}]
        with pytest.raises(UserError, match="knows neither dampening nor maximize"):
            sgd_step(torch.optim.SGD(groups, lr=0.1), weights)
