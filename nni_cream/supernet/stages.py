"""How stages of separable convolutions end, on all edges of some states at once: pointwise convolution and batch norm.

:mod:`nni_cream.supernet.pointwise` has the parts, each with derivatives of any order. Here all parts of a stage are one
operation with its gradient written out, since on small images the bookkeeping of autograd between the parts costs as
much as the products themselves. The parts run one by one where a gradient is to be differentiated
(:mod:`nni_cream.differentiation`), where norms are synchronised between processes, or do not normalise by the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nni_cream.differentiation import is_differentiated_twice
from nni_cream.supernet.matrices import add_product, begin_sum, block_count, cross_product, diagonal_blocks, joined
from nni_cream.supernet.pointwise import moments, norm, norm_gradients, normalised, products
from nni_cream.supernet.synchronised import sharers


class Ending(NamedTuple):
    """How the stages of several kinds of convolutions end, all on the same edges.

    Attributes:
        kinds: of convolutions, each with an input of its own.
        edges: of each kind, ordered by node, then by state.
        nodes: whose edges are added up; None if nothing is added, and a ReLU follows.
        eps: ε of the norms.
    """

    kinds: int
    edges: int
    nodes: int | None
    eps: float


class Found(NamedTuple):
    """Mean and variance of what the norms have normalised, [kinds · edges, channels], not differentiated."""

    mean: Tensor
    variance: Tensor


def activated(
    weight: Tensor, matrices: Sequence[Tensor], edges: int, eps: float, known: Found | None = None
) -> tuple[Sequence[Tensor], Found]:
    """End stages with a ReLU, each edge by itself.

    The gradients that arrive at the results are overwritten, so each result is for one use.

    Args:
        weight: of the pointwise convolutions, [kinds · edges, out, in].
        matrices: their inputs, a [P, edges · in] for every kind.
        edges: of each kind.
        eps: ε of the norms.
        known: what to normalise by; None for mean and variance of the batch.

    Returns:
        A [P, edges · out] for every kind, and what the norms have found.
    """
    ending = Ending(len(matrices), edges, None, eps)
    *results, mean, variance = _end(ending, known, weight, None, None, None, *matrices)
    return results, Found(mean, variance)


def added(
    weight: Tensor,
    matrices: Sequence[Tensor],
    mixing: Tensor,
    nodes: int,
    eps: float,
    known: Found | None = None,
    bias: Tensor | None = None,
    pairs: Sequence[tuple[Tensor, Tensor]] = (),
    total: Tensor | None = None,
) -> tuple[Tensor, Found]:
    """End stages with the sums that go into the nodes.

    Args:
        weight: of the pointwise convolutions, [kinds · edges, out, in].
        matrices: their inputs, a [P, edges · in] for every kind.
        mixing: what every edge is multiplied by, [kinds, edges].
        nodes: number of nodes.
        eps: ε of the norms.
        known: what to normalise by; None for mean and variance of the batch.
        bias: to be added besides, [nodes · out].
        pairs: products to be added besides, as of :func:`nni_cream.supernet.pointwise.products`.
        total: to be added besides, [P, nodes · out].

    Returns:
        The sums, [P, nodes · out], and what the norms have found.
    """
    ending = Ending(len(matrices), mixing.shape[1], nodes, eps)
    others = (tensor for pair in pairs for tensor in pair)
    result, mean, variance = _end(ending, known, weight, mixing.reshape(-1), bias, total, *matrices, *others)
    return result, Found(mean, variance)


def _end(ending: Ending, known: Found | None, *tensors: Any) -> Sequence[Tensor]:
    results: Sequence[Tensor]
    if known is None and sharers() == 1 and not is_differentiated_twice():
        results = _End.apply(ending, *tensors)
    else:
        results = _end_by_parts(ending, known, *tensors)
    return results


def _end_by_parts(
    ending: Ending,
    known: Found | None,
    weight: Tensor,
    mixing: Tensor | None,
    bias: Tensor | None,
    before: Tensor | None,
    *tensors: Tensor,
) -> tuple[Tensor, ...]:
    kinds, edges, nodes, eps = ending
    matrices: Sequence[Tensor] = tensors[:kinds]
    if known is None:
        matrices, inner_mean, covariance = moments(matrices, edges)
        folded, offset, mean, variance = normalised(weight, inner_mean, covariance, mixing, eps)
    else:
        mean, variance = known
        scale = (variance + eps).rsqrt()
        if mixing is not None:
            scale = scale * mixing[:, None]
        folded, offset = (weight * scale[..., None]).transpose(1, 2), -scale * mean
    channels, offset = folded.shape[1], offset.view(kinds, -1)
    if nodes is None:
        parts = zip(matrices, folded.view(kinds, edges, channels, -1).unbind(), offset.unbind(), strict=True)
        return *(products(shift, (matrix, joined(each))).relu_() for matrix, each, shift in parts), mean, variance
    # The states of a node become one group, whose sum the product forms.
    merged = folded.reshape(kinds, nodes, -1, folded.shape[2]).unbind()
    offset = _summed(offset, ending)
    pairs = [
        *zip(matrices, map(joined, merged), strict=True),
        *zip(tensors[kinds::2], tensors[kinds + 1 :: 2], strict=True),
    ]
    return products(offset if bias is None else bias + offset, *pairs, total=before), mean, variance


def _summed(offset: Tensor, ending: Ending) -> Tensor:
    """Add up the biases [kinds, edges · out] that go into a node, and return [nodes · out]."""
    kinds, edges, nodes, _ = ending
    assert nodes is not None
    return offset.view(kinds, nodes, edges // nodes, -1).sum((0, 2)).flatten()


class _End(torch.autograd.Function):
    """The same as :func:`_end_by_parts`, with mean and variance of the batch, as one operation."""

    @staticmethod
    def forward(
        ctx: Any,
        ending: Ending,
        weight: Tensor,
        mixing: Tensor | None,
        bias: Tensor | None,
        before: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        kinds, edges, nodes, eps = ending
        matrices, others = tensors[:kinds], tensors[kinds:]
        rows, channels = matrices[0].shape[0], weight.shape[2]
        blocks = block_count(edges, channels)
        mean = torch.cat([matrix.sum(0) for matrix in matrices]).view(-1, channels).div_(rows)
        squares = torch.cat([cross_product(matrix, matrix, blocks) for matrix in matrices])
        covariance = (
            diagonal_blocks(squares, len(mean)).div(rows).baddbmm_(mean[:, :, None], mean[:, None, :], alpha=-1)
        )
        found = norm(weight, mean, covariance, mixing, eps)
        folded = (weight * found.scale[..., None]).transpose(1, 2)
        offset = (found.scale * found.outer_mean).neg_().view(kinds, -1)
        groups = edges if nodes is None else nodes
        parts = [joined(each) for each in folded.reshape(kinds, groups, -1, folded.shape[2]).unbind()]
        results: list[Tensor] = []
        if nodes is None:
            for matrix, part, shift in zip(matrices, parts, offset.unbind(), strict=True):
                results.append(_product(matrix, part, shift).relu_())
        else:
            shift = _summed(offset, ending)
            total = begin_sum(shift if bias is None else shift.add_(bias), before, rows)
            for matrix, part in (*zip(matrices, parts, strict=True), *zip(others[::2], others[1::2], strict=True)):
                total = add_product(matrix, part, total)
            assert total is not None
            results.append(total)
        # What is in a graph has to be kept by these, all else need not.
        ctx.save_for_backward(weight, mixing, *tensors, *(results if nodes is None else ()))
        ctx.ending, ctx.mean, ctx.found, ctx.parts = ending, mean, found, parts
        variance = found.variance.clamp_min(0)
        ctx.mark_non_differentiable(found.outer_mean, variance)
        return *results, found.outer_mean, variance

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        kinds, edges, nodes, _ = ctx.ending
        if torch.is_grad_enabled():
            return _gradients_by_parts(ctx, gradients)
        weight, mixing, *tensors = ctx.saved_tensors
        matrices, rows, channels = tensors[:kinds], tensors[0].shape[0], weight.shape[2]
        of_weight, of_mixing, of_bias, of_before, *of_tensors = ctx.needs_input_grad[1:]
        if nodes is None:
            outputs = [gradient.contiguous() for gradient in gradients[:kinds]]
            for gradient, result in zip(outputs, tensors[kinds:], strict=True):
                torch.ops.aten.threshold_backward.grad_input(gradient, result, 0, grad_input=gradient)
            by_offset = torch.cat([gradient.sum(0) for gradient in outputs]).view(kinds * edges, -1)
        else:
            outputs = [gradients[0].contiguous()] * kinds
            by_bias = outputs[0].sum(0)
            states = edges // nodes
            by_offset = by_bias.view(1, nodes, 1, -1).expand(kinds, -1, states, -1).reshape(kinds * edges, -1)

        groups = edges if nodes is None else nodes
        by_parts = [
            diagonal_blocks(cross_product(matrix, gradient, len(part)), groups)
            for matrix, gradient, part in zip(matrices, outputs, ctx.parts, strict=True)
        ]
        by_folded = torch.cat(by_parts).view(kinds * edges, channels, -1)
        by_weight, by_mean, by_covariance, by_mixing = norm_gradients(
            weight, ctx.mean, mixing, ctx.found, by_folded, by_offset, of_weight
        )
        # Of the covariance, symmetric, in terms of the sums of the rows and of their squares.
        by_mean.sub_((by_covariance @ ctx.mean[..., None])[..., 0], alpha=2)
        by_sums = by_mean.div_(rows).view(kinds, -1).unbind()
        by_square = by_covariance.mul_(2 / rows).view(kinds, edges, channels, channels).unbind()
        by_tensors: list[Tensor | None] = []
        for number in range(kinds):
            slope = None
            if of_tensors[number]:
                slope = _product(outputs[number], ctx.parts[number].transpose(1, 2), by_sums[number])
                add_product(matrices[number], joined(by_square[number]), slope)
            by_tensors.append(slope)
        if nodes is None:
            return None, by_weight, by_mixing, None, None, *by_tensors
        for number in range(kinds, len(tensors), 2):
            matrix, factor = tensors[number : number + 2]
            by_tensors.append(add_product(outputs[0], factor.transpose(1, 2)) if of_tensors[number] else None)
            by_tensors.append(cross_product(matrix, outputs[0], len(factor)) if of_tensors[number + 1] else None)
        return (
            None,
            by_weight,
            by_mixing if of_mixing else None,
            by_bias if of_bias else None,
            outputs[0] if of_before else None,
            *by_tensors,
        )


def _product(matrix: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return bias + matrix·weight, group by group."""
    if weight.shape[0] == 1:
        return torch.addmm(bias, matrix, weight[0])
    return add_product(matrix, weight, begin_sum(bias, None, matrix.shape[0]))


def _gradients_by_parts(ctx: Any, gradients: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Return the gradients such that they can be differentiated: of the parts, which run once more."""
    weight, mixing, *tensors = ctx.saved_tensors
    kinds, _, nodes, _ = ctx.ending
    inputs = [weight, mixing, *(tensors[:kinds] if nodes is None else tensors)]
    of_weight, of_mixing, of_bias, of_before, *of_tensors = ctx.needs_input_grad[1:]
    needs = [of_weight, of_mixing, *of_tensors]
    slopes: list[Tensor | None] = [None] * len(inputs)
    if any(needs):
        *results, _, _ = _end_by_parts(ctx.ending, None, weight, mixing, None, None, *inputs[2:])
        needed = [each for each, need in zip(inputs, needs, strict=True) if need]
        found = iter(torch.autograd.grad(results, needed, gradients[: len(results)], create_graph=True))
        slopes = [next(found) if need else None for need in needs]
    by_bias = gradients[0].sum(0) if of_bias else None
    return None, *slopes[:2], by_bias, gradients[0] if of_before else None, *slopes[2:]
