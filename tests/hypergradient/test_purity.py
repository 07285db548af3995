"""A hypergradient changes nothing but what it returns, batch norms and dropout in the network or not."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nni_cream.hypergradient import Hypergradient, ParameterStep, exact, finite_difference, first_order, sgd_step
from nni_cream.supernet.functional import pure_loss
from tests.hypergradient.losses import assert_close, random


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
