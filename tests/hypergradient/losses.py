"""What the tests of hypergradients share: losses whose hypergradient is known, random numbers, comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nni_cream.hypergradient import exact, finite_difference

SECOND_ORDER: Any = pytest.mark.parametrize("method", [finite_difference, exact])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def assert_close(actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    torch.testing.assert_close(list(actual), list(expected), rtol=0, atol=tolerance)


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
