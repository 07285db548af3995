"""The step of SGD as a formula, beside the step that it takes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nni_cream.errors import UserError
from nni_cream.hypergradient import Hypergradient, ParameterStep, _moved, sgd_numbers, sgd_step
from tests.hypergradient.losses import SECOND_ORDER, Quadratic, assert_close, random


class Operations(TorchDispatchMode):
    """Notes what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


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

    @pytest.mark.parametrize("recorded", [False, True])
    def test_all_weights_move_together(self, recorded: bool) -> None:
        """A GPU takes longer to begin with each than to be done with it."""

        def operations(number: int) -> list[str]:
            weights = [nn.Parameter(random(5, seed=k)) for k in range(number)]
            groups = [{"params": weights[::2]}, {"params": weights[1::2], "lr": 0.1}]
            optimizer = torch.optim.SGD(groups, 0.2, momentum=0.9, weight_decay=0.1)
            for weight in weights:
                weight.grad = random(5, seed=1)
            optimizer.step()
            numbers = sgd_numbers(optimizer, torch.device("cpu")) if recorded else None
            slopes = [random(5, seed=2)] * number
            with Operations() as mode:
                _moved(weights, slopes, sgd_step(optimizer, weights, numbers))
            return mode.names

        assert operations(4) == operations(40)
        assert sum(name.startswith("_foreach") for name in operations(4)) == 2 * 6

    def test_follows_the_schedule(self) -> None:
        weight = nn.Parameter(torch.ones(2))
        optimizer = torch.optim.SGD([weight], 0.4)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        assert sgd_step(optimizer, [weight]) == [ParameterStep(0.4, 0.0, 0.0, None)]
        optimizer.step()
        schedule.step()
        assert sgd_step(optimizer, [weight]) == [ParameterStep(0.2, 0.0, 0.0, None)]

    @pytest.mark.parametrize("nesterov", [False, True])
    def test_reads_nothing_but_the_numbers_that_it_is_given(self, nesterov: bool) -> None:
        weight = nn.Parameter(torch.ones(2))
        optimizer = torch.optim.SGD([weight], 0.4, 0.9, weight_decay=0.1, nesterov=nesterov)
        numbers, (expected,) = sgd_numbers(optimizer, weight.device), sgd_step(optimizer, [weight])
        optimizer.param_groups[0].update(lr=0.3, momentum=0.8, weight_decay=0.2)
        (found,) = sgd_step(optimizer, [weight], numbers)
        for name in ("scale", "decay", "drift"):
            assert float(getattr(found, name)) == pytest.approx(getattr(expected, name), rel=1e-15)

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
