"""Sums of grouped pointwise convolutions, and the moments from which their batch norms follow.

A matrix [P, C] here is a channels-last feature map, one row a pixel of an image. What a batch norm needs to know of the
output of a pointwise convolution follows from the mean and the covariance of its *input*: for y = W·x they are W·μ and
diag(W·Σ·Wᵀ). So the norm's scale goes into the weight before the convolution runs, its output is never stored, and
several convolutions that are added up become one accumulated product. Derivatives, of any order, are of the forms here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nni_cream.supernet.matrices import (
    add_product,
    begin_sum,
    block_count,
    column_sums,
    column_sums_and_squares,
    cross_product,
    diagonal_blocks,
)
from nni_cream.supernet.synchronised import averages


def _multiply(matrix: Tensor, weight: Tensor) -> Tensor:
    """Return matrix·weight, which can be differentiated where derivatives are recorded; a call is not free."""
    product: Tensor = (
        _Products.apply(None, None, matrix, weight) if torch.is_grad_enabled() else add_product(matrix, weight)
    )
    return product


def _correlate(first: Tensor, second: Tensor, groups: int) -> Tensor:
    """Return firstᵀ·second, likewise."""
    form = _Cross.apply if torch.is_grad_enabled() else cross_product
    product: Tensor = form(first, second, groups)
    return product


class _Products(torch.autograd.Function):
    """(bias, matrix, matrices and weights in turn) to bias + matrix + Σ matrix·weight."""

    @staticmethod
    def forward(ctx: Any, bias: Tensor | None, before: Tensor | None, *pairs: Tensor) -> Tensor:
        ctx.save_for_backward(*pairs)
        ctx.save_for_forward(*pairs)
        total = begin_sum(bias, before, len(pairs[0]))
        for matrix, weight in zip(pairs[::2], pairs[1::2], strict=True):
            total = add_product(matrix, weight, total)
        assert total is not None
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad.contiguous()
        needs = ctx.needs_input_grad
        gradients: list[Tensor | None] = [column_sums(grad) if needs[0] else None, grad if needs[1] else None]
        pairs = ctx.saved_tensors
        for position, (matrix, weight) in enumerate(zip(pairs[::2], pairs[1::2], strict=True)):
            by_matrix, by_weight = needs[2 + 2 * position : 4 + 2 * position]
            gradients.append(_multiply(grad, weight.transpose(1, 2)) if by_matrix else None)
            gradients.append(_correlate(matrix, grad, len(weight)) if by_weight else None)
        return tuple(gradients)

    @staticmethod
    def jvp(ctx: Any, bias: Tensor | None, before: Tensor | None, *tangents: Tensor | None) -> Tensor:
        total = begin_sum(bias, before, len(ctx.saved_tensors[0]))
        for position, tangent in enumerate(tangents):
            if tangent is not None:
                other = ctx.saved_tensors[position ^ 1]
                total = add_product(other, tangent, total) if position % 2 else add_product(tangent, other, total)
        assert total is not None
        return total


class _Cross(torch.autograd.Function):
    """(two matrices) to firstᵀ·second."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor, groups: int) -> Tensor:
        ctx.save_for_backward(first, second)
        ctx.save_for_forward(first, second)
        ctx.groups = groups
        return cross_product(first, second, groups)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        first, second = ctx.saved_tensors
        return (
            _multiply(second, grad.transpose(1, 2)) if ctx.needs_input_grad[0] else None,
            _multiply(first, grad) if ctx.needs_input_grad[1] else None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, by_first: Tensor | None, by_second: Tensor | None, _: None) -> Tensor:
        first, second = ctx.saved_tensors
        terms = [] if by_first is None else [cross_product(by_first, second, ctx.groups)]
        terms += [] if by_second is None else [cross_product(first, by_second, ctx.groups)]
        return terms[0] if len(terms) == 1 else terms[0] + terms[1]


class _Moments(torch.autograd.Function):
    """(matrix) to itself, the sum of its rows, and matrixᵀ·matrix.

    Whoever uses the matrix besides takes it from here, so that its gradient arrives together with those of the moments.
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(matrix)
        ctx.save_for_forward(matrix)
        ctx.groups = groups
        return matrix.view_as(matrix), column_sums(matrix), cross_product(matrix, matrix, groups)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, by_sum: Tensor, by_square: Tensor) -> tuple[Tensor | None, None]:
        (matrix,) = ctx.saved_tensors
        # Symmetric, so that one product does for both factors.
        weight = by_square + by_square.transpose(1, 2)
        if torch.is_grad_enabled():
            return grad + _Products.apply(by_sum, None, matrix, weight), None
        # Of the products that the matrix goes into, and of nothing else.
        return add_product(matrix, weight, grad.add_(by_sum)), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> tuple[Tensor, Tensor, Tensor]:
        (matrix,) = ctx.saved_tensors
        half = cross_product(matrix, tangent, ctx.groups)
        return tangent.view_as(tangent), tangent.sum(0), half + half.transpose(1, 2)


class _Spread(torch.autograd.Function):
    """(matrix) to itself, the sum of its rows, and that of their squares; see :class:`_Moments`."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(matrix)
        ctx.save_for_forward(matrix)
        return matrix.view_as(matrix), *column_sums_and_squares(matrix)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, by_sum: Tensor, by_square: Tensor) -> Tensor:
        matrix: Tensor
        (matrix,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return grad + by_sum + 2 * by_square * matrix
        return (grad + by_sum).addcmul_(matrix, by_square, value=2)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (matrix,) = ctx.saved_tensors
        return tangent.view_as(tangent), tangent.sum(0), 2 * (matrix * tangent).sum(0)


class _Normalised(torch.autograd.Function):
    """(weights W, mean μ and covariance Σ of their input, mixing m) to (m·W/σ)ᵀ, −m·W·μ/σ, W·μ, and σ² without ε.

    The last two are for what is remembered of them, and not differentiated. Derivatives are written out since the
    bookkeeping of autograd costs more than these small arrays.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, mean: Tensor, covariance: Tensor, mixing: Tensor | None, eps: float
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(weight, mean, covariance, mixing)
        ctx.save_for_forward(weight, mean, covariance, mixing)
        ctx.eps = eps
        found = norm(weight, mean, covariance, mixing, eps)
        variance = found.variance.clamp_min(0)
        ctx.mark_non_differentiable(found.outer_mean, variance)
        folded = (weight * found.scale[..., None]).transpose(1, 2)
        return folded, -found.scale * found.outer_mean, found.outer_mean, variance

    @staticmethod
    def backward(ctx: Any, by_weight: Tensor, by_bias: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        weight, mean, covariance, mixing = ctx.saved_tensors
        found = norm(weight, mean, covariance, mixing, ctx.eps)
        return *norm_gradients(weight, mean, mixing, found, by_weight, by_bias, ctx.needs_input_grad[0]), None

    @staticmethod
    def jvp(
        ctx: Any, by_weight: Tensor | None, by_mean: Tensor | None, by_covariance: Tensor | None, by_mixing: Any, _: Any
    ) -> tuple[Tensor | None, ...]:
        weight, mean, covariance, mixing = ctx.saved_tensors
        spread, outer_mean, raw, scale, inverse = norm(weight, mean, covariance, mixing, ctx.eps)
        moved, along, mean_moved = (
            torch.zeros_like(tensor) if tangent is None else tangent
            for tensor, tangent in ((weight, by_weight), (covariance, by_covariance), (mean, by_mean))
        )
        by_variance = (2 * (spread * moved).sum(-1) + ((weight @ along) * weight).sum(-1)) * (raw >= 0)
        by_scale = -0.5 * scale * inverse.square() * by_variance
        if by_mixing is not None:
            by_scale = by_scale + by_mixing[:, None] * inverse
        by_outer_mean = (moved @ mean[..., None] + weight @ mean_moved[..., None])[..., 0]
        return (
            (moved * scale[..., None] + weight * by_scale[..., None]).transpose(1, 2),
            -by_scale * outer_mean - scale * by_outer_mean,
            None,
            None,
        )


class Norm(NamedTuple):
    """What norms that follow pointwise convolutions W make of a mean μ and a covariance Σ of their input.

    Attributes:
        spread: W·Σ, [M, out, in].
        outer_mean: W·μ, [M, out].
        variance: diag(W·Σ·Wᵀ) as computed, [M, out]; rounding can make one of nothing negative.
        scale: m/σ, [M, out].
        inverse: 1/σ, [M, out].
    """

    spread: Tensor
    outer_mean: Tensor
    variance: Tensor
    scale: Tensor
    inverse: Tensor


def norm(weight: Tensor, mean: Tensor, covariance: Tensor, mixing: Tensor | None, eps: float) -> Norm:
    """Return what norms make of their input; arguments as of :func:`normalised`."""
    spread = weight @ covariance
    variance = (spread * weight).sum(-1)
    # Of a negative variance the norm is a constant.
    inverse = (variance.clamp_min(0) + eps).rsqrt()
    scale = inverse if mixing is None else inverse * mixing[:, None]
    return Norm(spread, (weight @ mean[..., None])[..., 0], variance, scale, inverse)


def norm_gradients(
    weight: Tensor,
    mean: Tensor,
    mixing: Tensor | None,
    found: Norm,
    by_folded: Tensor,
    by_bias: Tensor,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
    """Return the gradients of :func:`normalised` in W, μ, Σ (symmetric) and m.

    Args:
        weight: W, [M, out, in].
        mean: μ, [M, in].
        mixing: m, [M]; None for 1.
        found: what the norms have found.
        by_folded: the gradient in the weights that it returns, [M, in, out].
        by_bias: that in the biases, [M, out].
        needs_weight: whether the first one is needed; it is None otherwise.
    """
    by_folded = by_folded.transpose(1, 2)
    by_scale = (by_folded * weight).sum(-1) - by_bias * found.outer_mean
    by_outer_mean = -by_bias * found.scale
    by_variance = -0.5 * by_scale * found.scale * found.inverse.square()
    by_variance = (by_variance * (found.variance >= 0))[..., None]
    own = None
    if needs_weight:
        own = torch.addcmul(by_folded * found.scale[..., None], by_variance, found.spread, value=2)
        own = torch.addcmul(own, by_outer_mean[..., None], mean[:, None, :])
    return (
        own,
        (by_outer_mean[:, None, :] @ weight)[:, 0],
        (by_variance * weight).transpose(1, 2) @ weight,
        None if mixing is None else (by_scale * found.inverse).sum(-1),
    )


def products(bias: Tensor, *pairs: tuple[Tensor, Tensor], total: Tensor | None = None) -> Tensor:
    """Return bias + Σ matrix·weight, [P, groups · out], and what there is already.

    Args:
        bias: [groups · out].
        pairs: matrices [P, groups · in] and weights [groups, in, out], each pair with groups of its own.
        total: [P, groups · out], to which the rest is added; None for zeros.
    """
    result: Tensor = _Products.apply(bias, total, *(tensor for pair in pairs for tensor in pair))
    return result


def moments(matrices: Sequence[Tensor], groups: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """Return matrices [P, groups · in], for further use, and means and covariances of their channels.

    These are [matrices · groups, in] and [matrices · groups, in, in], of the rows of all processes where norms are
    synchronised.
    """
    rows, columns = matrices[0].shape
    found = [_Moments.apply(matrix, block_count(groups, columns // groups)) for matrix in matrices]
    same, totals, squares = zip(*found, strict=True)
    number = len(matrices) * groups
    mean, second = averages(
        torch.stack(totals).view(number, -1) / rows, diagonal_blocks(torch.cat(squares), number) / rows
    )
    return list(same), mean, second - mean[:, :, None] * mean[:, None, :]


def spread(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a matrix [P, C], for further use, and mean and variance of its columns, [C], of the rows as above."""
    matrix, total, squares = _Spread.apply(matrix)
    mean, second = averages(total / len(matrix), squares / len(matrix))
    # Rounding can make a variance of nothing negative.
    return matrix, mean, (second - mean.square()).clamp_min(0)


def normalised(
    weight: Tensor, mean: Tensor, covariance: Tensor, mixing: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Let pointwise convolutions normalise their output and weigh it.

    Args:
        weight: of M convolutions, [M, out, in].
        mean: of their inputs, [M, in].
        covariance: of their inputs, symmetric, [M, in, in].
        mixing: what each output is multiplied by, [M]; None for 1.
        eps: ε of the norms.

    Returns:
        Weights [M, in, out] and biases [M, out] that do all of it; mean and variance of the outputs before, [M, out],
        which are not differentiated.
    """
    found: tuple[Tensor, Tensor, Tensor, Tensor] = _Normalised.apply(weight, mean, covariance, mixing, eps)
    return found
