from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from nni_cream.supernet.matrices import joined
from nni_cream.supernet.pointwise import moments, normalised, products, spread

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
        # Some columns of a wider matrix, which stay as they are.
        wider = random(7, groups * 5 + 2, seed=1)
        before, kept = wider[:, 1:-1], wider.clone()
        torch.testing.assert_close(products(bias, (matrix, weight), (other, shared), total=before), before + expected)
        assert torch.equal(wider, kept)

    def test_moments(self, groups: int, channels: int) -> None:
        matrices = [random(50, groups * channels) + 3, random(50, groups * channels, seed=1) - 1]
        same, mean, covariance = moments(matrices, groups)
        assert all(torch.equal(a, b) for a, b in zip(same, matrices, strict=True))
        assert len(mean) == len(covariance) == 2 * groups
        for group, part in enumerate(part for matrix in matrices for part in matrix.split(channels, dim=1)):
            torch.testing.assert_close(mean[group], part.mean(0))
            torch.testing.assert_close(covariance[group], torch.cov(part.t(), correction=0).reshape(channels, channels))

    def test_derivatives(self, groups: int, channels: int) -> None:
        matrix, weight = random(3, groups * channels).requires_grad_(), random(groups, channels, 2).requires_grad_()
        bias, before = random(groups * 2).requires_grad_(), random(3, groups * 2, seed=1).requires_grad_()

        def everything(bias: Tensor, before: Tensor, matrix: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            (same, other), mean, covariance = moments([matrix, matrix.sin()], groups)
            pairs = ((same, joined(weight)), (same, joined(weight.sin())), (other, joined(weight.cos())))
            return products(bias, *pairs, total=before), mean, covariance

        given = (bias, before, matrix, weight)
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
        (same,), _, covariance = moments([matrix], 2)
        loss = products(bias, (same, given)).sin().sum() + (covariance.sin() * given[:, :, :1]).sum()
        return torch.autograd.grad(loss, given)[0]

    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(gradient(forward_ad.make_dual(matrix, along))).tangent
    step = 1e-6
    expected = (gradient(matrix + step * along) - gradient(matrix - step * along)) / (2 * step)
    torch.testing.assert_close(tangent, expected, rtol=1e-6, atol=1e-6)


class TestSpread:
    def test_is_mean_and_variance(self) -> None:
        matrix = random(50, 6) + 3
        same, mean, variance = spread(matrix)
        assert torch.equal(same, matrix)
        torch.testing.assert_close(mean, matrix.mean(0))
        torch.testing.assert_close(variance, matrix.var(0, correction=0))

    def test_of_what_does_not_vary_is_not_negative(self) -> None:
        assert spread(torch.full((10, 3), 1e4 / 3))[2].min() >= 0

    def test_derivatives(self) -> None:
        matrix = random(4, 3).requires_grad_()

        def everything(matrix: Tensor) -> tuple[Tensor, ...]:
            same, mean, variance = spread(matrix)
            return same.sin(), mean, variance

        assert gradcheck(everything, matrix, check_forward_ad=True, fast_mode=True)
        assert gradgradcheck(everything, matrix, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("mixed", [False, True])
class TestNormalised:
    EPS = 1e-3

    def test_normalises_and_weighs(self, mixed: bool) -> None:
        images, weight, mixing = random(50, 4) + 2, random(3, 5, 4), random(3)
        (same,), mean, covariance = moments([images.repeat(1, 3)], 3)
        folded, bias, outer_mean, variance = normalised(weight, mean, covariance, mixing if mixed else None, self.EPS)
        outputs = same[:, :4] @ weight.transpose(1, 2)
        torch.testing.assert_close(outer_mean, outputs.mean(1))
        torch.testing.assert_close(variance, outputs.var(1, correction=0))
        expected = torch.stack([F.batch_norm(output, None, None, training=True, eps=self.EPS) for output in outputs])
        if mixed:
            expected = expected * mixing[:, None, None]
        torch.testing.assert_close(same[:, :4] @ folded + bias[:, None], expected)

    def test_derivatives(self, mixed: bool) -> None:
        weight, mean, root = random(2, 3, 4), random(2, 4, seed=1), random(2, 4, 4, seed=2)
        mixing = random(2, seed=3) if mixed else None
        given = [weight, mean, root, *([] if mixing is None else [mixing])]

        def everything(weight: Tensor, mean: Tensor, root: Tensor, mixing: Tensor | None = None) -> tuple[Tensor, ...]:
            return normalised(weight, mean, root @ root.transpose(1, 2), mixing, self.EPS)[:2]

        variables = tuple(tensor.requires_grad_() for tensor in given)
        assert gradcheck(everything, variables, check_forward_ad=True, fast_mode=True)
        assert gradgradcheck(everything, variables, check_fwd_over_rev=True, fast_mode=True)

    def test_of_nothing_is_nothing(self, mixed: bool) -> None:
        """A variance that rounding has made negative is zero, and a constant."""
        weight, covariance = random(1, 2, 2).requires_grad_(), -torch.eye(2, dtype=torch.float64)[None]
        mixing = torch.ones(1, dtype=torch.float64) if mixed else None
        folded, *_, variance = normalised(weight, random(1, 2), covariance, mixing, self.EPS)
        assert torch.equal(variance, torch.zeros(1, 2))
        torch.testing.assert_close(folded, weight.transpose(1, 2) * self.EPS**-0.5)
        (slope,) = torch.autograd.grad(folded.sum(), weight)
        torch.testing.assert_close(slope, torch.full_like(slope, self.EPS**-0.5))
