from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from nni_cream.supernet.copies import concatenated, repeated


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@pytest.mark.parametrize("dim", [0, 1])
def test_concatenated(dim: int) -> None:
    tensors = [random(2, 3, 2), random(2, 3, 2, seed=1), random(*((4, 3, 2) if dim == 0 else (2, 5, 2)), seed=2)]
    assert torch.equal(concatenated(tensors, dim), torch.cat(tensors, dim))
    assert concatenated(tensors[:1], dim) is tensors[0]
    function = lambda *given: concatenated(given, dim).sin()  # noqa: E731
    assert gradcheck(function, tensors, check_forward_ad=True)
    assert gradgradcheck(function, tensors, check_fwd_over_rev=True)


@pytest.mark.parametrize("times", [1, 2, 4])
def test_repeated(times: int) -> None:
    features = random(2, 3, 2, 2)
    assert torch.equal(repeated(features, times), torch.cat([features] * times, dim=1))
    function = lambda given: repeated(given, times).sin()  # noqa: E731
    assert gradcheck(function, features, check_forward_ad=True)
    assert gradgradcheck(function, features, check_fwd_over_rev=True)


def test_some_of_the_tensors() -> None:
    first, second = random(2, 3), random(2, 3, seed=1)
    (slope,) = torch.autograd.grad(concatenated([first.detach(), second]).sin().sum(), second)
    torch.testing.assert_close(slope, second.detach().cos())


@pytest.mark.parametrize("join", [lambda tensors: concatenated(tensors), lambda tensors: repeated(tensors[0], 64)])
def test_a_second_derivative_adds_no_large_arrays(join: object) -> None:
    """torch's own pads the derivative of every slice to the size of all of them."""
    assert callable(join)
    tensors = [random(2, 3, seed=seed) for seed in range(64)]
    slopes = torch.autograd.grad(join(tensors).square().sum(), tensors, create_graph=True, allow_unused=True)
    together = sum(slope.square().sum() for slope in slopes if slope is not None)
    with torch.profiler.profile() as profile:
        torch.autograd.grad(together, tensors, allow_unused=True)
    names = [event.name for event in profile.events()]
    assert "aten::slice_backward" not in names
    assert "aten::cat" in names
