from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nni_cream.supernet.functional import has_tied_parameters, pure_loss

IMAGES = torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(1))
TARGETS = torch.tensor([0, 1, 2, 0, 1, 2])


def network(dropout: float = 0.5) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Conv2d(4, 3, 3),
        nn.BatchNorm2d(3, affine=False),
        nn.Flatten(),
    )
    layers[5].eval()
    return layers


def criterion(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, TARGETS)


def modes(layers: nn.Module) -> list[object]:
    return [(m.training, getattr(m, "track_running_stats", None), set(vars(m))) for m in layers.modules()]


WEIGHTS, BIASES = ["0.weight", "4.weight"], ["4.bias", "1.bias"]


class TestPureLoss:
    def test_is_the_loss_in_training(self) -> None:
        layers = network(dropout=0)
        names = (WEIGHTS, BIASES)
        given = [[torch.randn_like(layers.get_parameter(name)) for name in group] for group in names]
        other = copy.deepcopy(layers).train()
        with torch.no_grad():
            for group, tensors in zip(names, given, strict=True):
                for name, tensor in zip(group, tensors, strict=True):
                    other.get_parameter(name).copy_(tensor)
        loss = pure_loss(layers, names, criterion, IMAGES)
        torch.testing.assert_close(loss(*given), criterion(other(IMAGES)))
        # What no group names keeps its value.
        with torch.no_grad():
            layers[1].weight.mul_(2)
            other[1].weight.mul_(2)
        torch.testing.assert_close(loss(*given), criterion(other(IMAGES)))

    def test_gradients_go_to_what_is_given(self) -> None:
        layers = network(dropout=0)
        given = [layers.get_parameter(name).detach().clone().requires_grad_() for name in WEIGHTS]
        gradients = torch.autograd.grad(pure_loss(layers, (WEIGHTS,), criterion, IMAGES)(given), given)
        other = copy.deepcopy(layers).train()
        criterion(other(IMAGES)).backward()
        for name, gradient in zip(WEIGHTS, gradients, strict=True):
            torch.testing.assert_close(gradient, other.get_parameter(name).grad)
        assert all(parameter.grad is None for parameter in layers.parameters())

    @pytest.mark.parametrize("training", [False, True])
    def test_leaves_the_network_alone(self, training: bool) -> None:
        layers = network().train(training)
        state, before, random = copy.deepcopy(layers.state_dict()), modes(layers), torch.get_rng_state()
        parameters = list(layers.parameters())
        given = [torch.zeros_like(layers.get_parameter(name)) for name in WEIGHTS]
        pure_loss(layers, (WEIGHTS,), criterion, IMAGES)(given)
        assert modes(layers) == before
        assert torch.equal(torch.get_rng_state(), random)
        assert all(a is b for a, b in zip(layers.parameters(), parameters, strict=True))
        for name, tensor in layers.state_dict().items():
            assert torch.equal(tensor, state[name]), name

    def test_an_error_leaves_the_network_alone(self) -> None:
        layers = network()
        before, random = modes(layers), torch.get_rng_state()

        def fail(logits: Tensor) -> Tensor:
            torch.rand(1)
            raise ArithmeticError

        with pytest.raises(ArithmeticError):
            pure_loss(layers, (WEIGHTS,), fail, IMAGES)([layers.get_parameter(name) for name in WEIGHTS])
        assert modes(layers) == before
        assert torch.equal(torch.get_rng_state(), random)

    def test_the_same_dropout_at_every_call(self) -> None:
        layers = network()
        given = [layers.get_parameter(name).detach() for name in WEIGHTS]
        loss = pure_loss(layers, (WEIGHTS,), criterion, IMAGES)
        torch.manual_seed(5)
        values = [loss(given).item() for _ in range(3)]
        assert values[0] == values[1] == values[2]
        # The mask that the network itself would draw next, and another one later.
        other = copy.deepcopy(layers).train()
        assert criterion(other(IMAGES)).item() == pytest.approx(values[0], rel=1e-6)
        assert loss(given).item() != pytest.approx(values[0], rel=1e-3)
        # Modes other than that of batch norms count: no dropout in evaluation.
        assert loss(given).item() != pure_loss(layers.eval(), (WEIGHTS,), criterion, IMAGES)(given).item()

    def test_full_precision_inside_autocast(self) -> None:
        layers = network(dropout=0)
        given = [layers.get_parameter(name).detach() for name in WEIGHTS]
        loss = pure_loss(layers, (WEIGHTS,), criterion, IMAGES)
        with torch.autocast("cpu", torch.bfloat16):
            assert layers[0](IMAGES).dtype == torch.bfloat16
            inside = loss(given)
        assert torch.equal(inside, loss(given))

    @pytest.mark.parametrize("groups", [0, 2])
    def test_as_many_groups_as_names(self, groups: int) -> None:
        layers = network()
        given = [layers.get_parameter(name).detach() for name in WEIGHTS]
        with pytest.raises(ValueError, match="zip"):
            pure_loss(layers, (WEIGHTS,), criterion, IMAGES)(*[given] * groups)
        with pytest.raises(ValueError, match="zip"):
            pure_loss(layers, (WEIGHTS,), criterion, IMAGES)(given[:1])

    def test_tied_parameters_change_together(self) -> None:
        layers = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
        assert not has_tied_parameters(layers)
        layers[2].weight = layers[0].weight
        assert has_tied_parameters(layers)
        images, weight = torch.eye(3), torch.full((3, 3), 0.5)
        other = copy.deepcopy(layers)
        with torch.no_grad():
            other[0].weight.copy_(weight)
        loss = pure_loss(layers, (["0.weight"],), torch.sum, images)
        torch.testing.assert_close(loss([weight]), other(images).sum())
        # Who says that there are none saves looking for them.
        alone = pure_loss(layers, (["0.weight"],), torch.sum, images, tied=False)
        with torch.no_grad():
            layers[2].weight = nn.Parameter(layers[0].weight.clone())
            expected = layers[2](layers[1](images @ weight.t() + layers[0].bias)).sum()
        torch.testing.assert_close(alone([weight]), expected)

    def test_tied_buffers_are_seen(self) -> None:
        layers = nn.Sequential(nn.BatchNorm1d(3, affine=False), nn.BatchNorm1d(3, affine=False))
        assert not has_tied_parameters(layers)
        layers[1].running_mean = layers[0].running_mean
        assert has_tied_parameters(layers)
