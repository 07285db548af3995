from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from nni_cream.supernet.pointwise import joined, moments, products

# Groups and their channels: alone, joined to one block, to several, not joined.
GROUPS = [(1, 3), (3, 4), (4, 8), (2, 16)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("groups", "channels"), GROUPS)
class TestValues:
    def test_products(self, groups: int, channels: int) -> None:
        bias, matrix, other = random(groups * 5), random(7, groups * channels), random(7, 2)
        weight, shared = random(groups, channels, 5), random(1, 2, groups * 5)
        convolved = F.conv1d(matrix[..., None], weight.transpose(1, 2).reshape(-1, channels, 1), groups=groups)[..., 0]
        expected = bias + convolved + other @ shared[0]
        torch.testing.assert_close(products(bias, (matrix, joined(weight)), (other, shared)), expected)
        torch.testing.assert_close(products(bias, (other, shared), (matrix, weight)), expected)

    def test_moments(self, groups: int, channels: int) -> None:
        matrix = random(50, groups * channels) + 3
        same, mean, covariance = moments(matrix, groups)
        assert torch.equal(same, matrix)
        for group, part in enumerate(matrix.split(channels, dim=1)):
            torch.testing.assert_close(mean[group], part.mean(0))
            torch.testing.assert_close(covariance[group], torch.cov(part.t(), correction=0).reshape(channels, channels))

    def test_derivatives(self, groups: int, channels: int) -> None:
        matrix, weight = random(3, groups * channels).requires_grad_(), random(groups, channels, 2).requires_grad_()
        bias = random(groups * 2).requires_grad_()

        def everything(bias: Tensor, matrix: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            same, mean, covariance = moments(matrix, groups)
            return products(bias, (same, joined(weight)), (same, joined(weight.sin()))), mean, covariance

        given = (bias, matrix, weight)
        assert gradcheck(everything, given, check_forward_ad=True, fast_mode=True)
        assert gradgradcheck(everything, given, check_fwd_over_rev=True, fast_mode=True)


def test_few_wide_blocks_instead_of_narrow_groups() -> None:
    assert joined(random(4, 8, 8)).shape == (2, 16, 16)
    assert joined(random(3, 8, 8)).shape == (1, 24, 24)
    assert joined(random(4, 16, 16)).shape == (4, 16, 16)


def test_derivative_of_a_gradient_that_keeps_no_graph() -> None:
    bias, matrix, weight = random(6), random(5, 32), random(2, 16, 3)
    along = random(5, 32, seed=1)

    def gradient(matrix: Tensor) -> Tensor:
        given = weight.clone().requires_grad_()
        same, _, covariance = moments(matrix, 2)
        loss = products(bias, (same, given)).sin().sum() + (covariance.sin() * given[:, :, :1]).sum()
        return torch.autograd.grad(loss, given)[0]

    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(gradient(forward_ad.make_dual(matrix, along))).tangent
    step = 1e-6
    expected = (gradient(matrix + step * along) - gradient(matrix - step * along)) / (2 * step)
    torch.testing.assert_close(tangent, expected, rtol=1e-6, atol=1e-6)
