"""Gradients on a GPU are those on a CPU, in double precision, of all operations of the paper."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nni_cream.hypergradient import exact, finite_difference, first_order, sgd_step
from nni_cream.strategies.darts import DartsStrategy
from nni_cream.supernet.functional import pure_loss
from nni_cream.supernet.fused_cell import FusedCell
from search_spaces.darts import DartsSpace
from tests.darts_reference import Together

ON_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=ON_A_GPU)]
ORDERS = (first_order, finite_difference, exact)


def gradients(execution: Any, device: str, memory_format: Any) -> dict[str, list[Tensor]]:
    """The gradient of the training loss, and hypergradients of every kind."""
    torch.manual_seed(0)
    strategy = DartsStrategy(execution=execution)
    space: Any = strategy.mutate_model(DartsSpace(3, channels=4, cells=3, nodes=2))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for table in strategy.alphas.parameters():
            table.normal_(generator=generator)
    network = Together(space, strategy.alphas).double().to(device, memory_format=memory_format)
    weights, alphas = list(space.parameters()), list(strategy.alphas.parameters())
    names = [[f"{part}.{n}" for n, _ in getattr(network, part).named_parameters()] for part in ("space", "alphas")]
    images = torch.randn(10, 3, 16, 16, dtype=torch.float64, generator=generator)
    labels = torch.randint(3, (10,), generator=generator)

    def loss(part: slice) -> Callable[..., Tensor]:
        targets = labels[part].to(device)
        given = images[part].to(device, memory_format=memory_format)
        return pure_loss(network, names, lambda logits: F.cross_entropy(logits, targets), given)

    training, validation = loss(slice(0, 5)), loss(slice(5, 10))
    step = sgd_step(torch.optim.SGD(weights, 0.1, momentum=0.9, weight_decay=1e-3), weights)
    found = {
        order.__name__: list(order(training, validation, weights, alphas, step).gradients)  # type: ignore[operator]
        for order in ORDERS
    }
    slopes = torch.autograd.grad(training(weights, alphas), weights, allow_unused=True, materialize_grads=True)
    return {**found, "weights": list(slopes)}


@functools.cache
def oracle() -> dict[str, list[Tensor]]:
    return gradients("textbook", "cpu", torch.contiguous_format)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("execution", ["textbook", "fused"])
@pytest.mark.parametrize("device", DEVICES)
def test_gradients(device: str, execution: str, memory_format: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fused = []
    can_run = FusedCell._can_run_fused
    monkeypatch.setattr(FusedCell, "_can_run_fused", lambda *a: (fused.append(can_run(*a)), fused[-1])[1])
    found = gradients(execution, device, memory_format)
    assert all(fused)
    assert bool(fused) == (execution == "fused")
    for name, expected in oracle().items():
        ours, theirs = (torch.cat([tensor.cpu().flatten() for tensor in part]) for part in (found[name], expected))
        assert theirs.norm() > 1e-3
        # A difference of gradients loses digits.
        limit = 1e-7 if name == "finite_difference" else 1e-10
        assert ((ours - theirs).norm() / theirs.norm()).item() < limit, name
