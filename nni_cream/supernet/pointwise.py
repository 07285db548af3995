"""Sums of grouped pointwise convolutions, and the moments from which their batch norms follow.

A matrix [P, C] here is a channels-last feature map, one row a pixel of an image. What a batch norm needs to know of the
output of a pointwise convolution follows from the mean and the covariance of its *input*: for y = W·x they are W·μ and
diag(W·Σ·Wᵀ). So the norm's scale goes into the weight before the convolution runs, its output is never stored, and
several convolutions that are added up become one accumulated product. Derivatives, of any order, are of the forms here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nni_cream.supernet.synchronised import averages

# Products of narrower groups cost more than the zeros that join them; measured on CPUs.
_NARROWEST = 16


def _blocks(groups: int, channels: int) -> int:
    """Return the number of blocks that groups of so many channels are joined to."""
    wide = (n for n in range(1, groups + 1) if groups % n == 0 and n * channels >= _NARROWEST)
    return groups // next(wide, groups)


def joined(weight: Tensor) -> Tensor:
    """Return the weights [groups, in, out] of a grouped product, as fewer block-diagonal ones if they are narrow."""
    groups, rows, columns = weight.shape
    blocks = _blocks(groups, rows)
    if blocks == groups:
        return weight
    together = groups // blocks
    identity = torch.eye(together, dtype=weight.dtype, device=weight.device)
    parts = weight.view(blocks, together, rows, 1, columns) * identity[:, None, :, None]
    return parts.reshape(blocks, together * rows, together * columns)


def _diagonal(matrices: Tensor, groups: int) -> Tensor:
    """Return the [groups, channels, channels] on the diagonal of square matrices of groups that were joined."""
    blocks, size, _ = matrices.shape
    if blocks == groups:
        return matrices
    together = groups // blocks
    parts = matrices.view(blocks, together, size // together, together, size // together)
    return parts.diagonal(0, 1, 3).permute(0, 3, 1, 2).reshape(groups, size // together, size // together)


def _grouped(matrix: Tensor, groups: int) -> Tensor:
    return matrix.view(len(matrix), groups, -1).transpose(0, 1)


def _product(matrix: Tensor, weight: Tensor, total: Tensor | None = None) -> Tensor:
    """Return matrix·weight, group by group, added to ``total`` in place if there is one."""
    groups, _, columns = weight.shape
    if groups == 1:
        return torch.mm(matrix, weight[0]) if total is None else total.addmm_(matrix, weight[0])
    keep = 0 if total is None else 1
    total = matrix.new_empty(len(matrix), groups * columns) if total is None else total
    _grouped(total, groups).baddbmm_(_grouped(matrix, groups), weight, beta=keep)
    return total


def _cross(first: Tensor, second: Tensor, groups: int) -> Tensor:
    """Return firstᵀ·second, group by group: [groups, columns of first, columns of second]."""
    if groups == 1:
        return torch.mm(first.t(), second)[None]
    return torch.bmm(_grouped(first, groups).transpose(1, 2), _grouped(second, groups))


def _multiply(matrix: Tensor, weight: Tensor) -> Tensor:
    """Return matrix·weight, which can be differentiated where derivatives are recorded; a call is not free."""
    product: Tensor = (
        _Products.apply(None, None, matrix, weight) if torch.is_grad_enabled() else _product(matrix, weight)
    )
    return product


def _correlate(first: Tensor, second: Tensor, groups: int) -> Tensor:
    """Return firstᵀ·second, likewise."""
    form = _Cross.apply if torch.is_grad_enabled() else _cross
    product: Tensor = form(first, second, groups)
    return product


def _begun(bias: Tensor | None, before: Tensor | None, rows: int) -> Tensor | None:
    """Return a new matrix to add products to; None if there is nothing to begin with."""
    if bias is None:
        return None if before is None else before.clone(memory_format=torch.contiguous_format)
    return bias.expand(rows, -1).contiguous() if before is None else (before + bias).contiguous()


class _Products(torch.autograd.Function):
    """(bias, matrix, matrices and weights in turn) to bias + matrix + Σ matrix·weight."""

    @staticmethod
    def forward(ctx: Any, bias: Tensor | None, before: Tensor | None, *pairs: Tensor) -> Tensor:
        ctx.save_for_backward(*pairs)
        ctx.save_for_forward(*pairs)
        total = _begun(bias, before, len(pairs[0]))
        for matrix, weight in zip(pairs[::2], pairs[1::2], strict=True):
            total = _product(matrix, weight, total)
        assert total is not None
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad.contiguous()
        needs = ctx.needs_input_grad
        gradients: list[Tensor | None] = [grad.sum(0) if needs[0] else None, grad if needs[1] else None]
        pairs = ctx.saved_tensors
        for position, (matrix, weight) in enumerate(zip(pairs[::2], pairs[1::2], strict=True)):
            by_matrix, by_weight = needs[2 + 2 * position : 4 + 2 * position]
            gradients.append(_multiply(grad, weight.transpose(1, 2)) if by_matrix else None)
            gradients.append(_correlate(matrix, grad, len(weight)) if by_weight else None)
        return tuple(gradients)

    @staticmethod
    def jvp(ctx: Any, bias: Tensor | None, before: Tensor | None, *tangents: Tensor | None) -> Tensor:
        total = _begun(bias, before, len(ctx.saved_tensors[0]))
        for position, tangent in enumerate(tangents):
            if tangent is not None:
                other = ctx.saved_tensors[position ^ 1]
                total = _product(other, tangent, total) if position % 2 else _product(tangent, other, total)
        assert total is not None
        return total


class _Cross(torch.autograd.Function):
    """(two matrices) to firstᵀ·second."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor, groups: int) -> Tensor:
        ctx.save_for_backward(first, second)
        ctx.save_for_forward(first, second)
        ctx.groups = groups
        return _cross(first, second, groups)

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
        terms = [] if by_first is None else [_cross(by_first, second, ctx.groups)]
        terms += [] if by_second is None else [_cross(first, by_second, ctx.groups)]
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
        return matrix.view_as(matrix), matrix.sum(0), _cross(matrix, matrix, groups)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, by_sum: Tensor, by_square: Tensor) -> tuple[Tensor | None, None]:
        (matrix,) = ctx.saved_tensors
        # Symmetric, so that one product does for both factors.
        weight = by_square + by_square.transpose(1, 2)
        if torch.is_grad_enabled():
            return grad + _Products.apply(by_sum, None, matrix, weight), None
        # Of the products that the matrix goes into, and of nothing else.
        return _product(matrix, weight, grad.add_(by_sum)), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> tuple[Tensor, Tensor, Tensor]:
        (matrix,) = ctx.saved_tensors
        half = _cross(matrix, tangent, ctx.groups)
        return tangent.view_as(tangent), tangent.sum(0), half + half.transpose(1, 2)


class _Spread(torch.autograd.Function):
    """(matrix) to itself, the sum of its rows, and that of their squares; see :class:`_Moments`."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(matrix)
        ctx.save_for_forward(matrix)
        return matrix.view_as(matrix), matrix.sum(0), (matrix * matrix).sum(0)

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
        _, outer_mean, raw, scale, _ = _norm(weight, mean, covariance, mixing, eps)
        variance = raw.clamp_min(0)
        ctx.mark_non_differentiable(outer_mean, variance)
        return (weight * scale[..., None]).transpose(1, 2), -scale * outer_mean, outer_mean, variance

    @staticmethod
    def backward(ctx: Any, by_weight: Tensor, by_bias: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        weight, mean, covariance, mixing = ctx.saved_tensors
        spread, outer_mean, raw, scale, inverse = _norm(weight, mean, covariance, mixing, ctx.eps)
        by_weight = by_weight.transpose(1, 2)
        by_scale = (by_weight * weight).sum(-1) - by_bias * outer_mean
        by_outer_mean = -by_bias * scale
        by_variance = (-0.5 * by_scale * scale * inverse.square() * (raw >= 0))[..., None]
        own = None
        if ctx.needs_input_grad[0]:
            own = by_weight * scale[..., None] + 2 * by_variance * spread + by_outer_mean[..., None] * mean[:, None, :]
        return (
            own,
            (by_outer_mean[:, None, :] @ weight)[:, 0],
            (by_variance * weight).transpose(1, 2) @ weight,
            None if mixing is None else (by_scale * inverse).sum(-1),
            None,
        )

    @staticmethod
    def jvp(
        ctx: Any, by_weight: Tensor | None, by_mean: Tensor | None, by_covariance: Tensor | None, by_mixing: Any, _: Any
    ) -> tuple[Tensor | None, ...]:
        weight, mean, covariance, mixing = ctx.saved_tensors
        spread, outer_mean, raw, scale, inverse = _norm(weight, mean, covariance, mixing, ctx.eps)
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


def _norm(
    weight: Tensor, mean: Tensor, covariance: Tensor, mixing: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return W·Σ, W·μ, the variance as computed, m/σ and 1/σ of norms that follow pointwise convolutions."""
    spread = weight @ covariance
    variance = (spread * weight).sum(-1)
    # Rounding can make a variance of nothing negative; it is a constant then.
    inverse = (variance.clamp_min(0) + eps).rsqrt()
    scale = inverse if mixing is None else inverse * mixing[:, None]
    return spread, (weight @ mean[..., None])[..., 0], variance, scale, inverse


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
    found = [_Moments.apply(matrix, _blocks(groups, columns // groups)) for matrix in matrices]
    same, totals, squares = zip(*found, strict=True)
    number = len(matrices) * groups
    mean, second = averages(torch.stack(totals).view(number, -1) / rows, _diagonal(torch.cat(squares), number) / rows)
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
