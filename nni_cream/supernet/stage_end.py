"""The end of the stages of separable convolutions as one operation, with its first and second derivatives written out.

Of one edge with the input x [P, in], whose mean is μ and covariance Σ, and with the pointwise convolution W, the result
is x·F + b; F and b are what the norm makes of (W, μ, Σ). With the gradient g of the result, and A = xᵀ·g, that of x is
g·Fᵀ + x·M + c, where M and c are functions of (W, μ, Σ, A, Σₚ g). So all that is large, here and in the derivative of
the gradient, are products; what is small is left to :func:`nni_cream.supernet.pointwise.norm`,
:func:`nni_cream.supernet.pointwise.norm_gradients`, and autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nni_cream.supernet.matrices import (
    add_product,
    begin_sum,
    block_count,
    column_sums,
    cross_product,
    diagonal_blocks,
    joined,
)
from nni_cream.supernet.pointwise import Norm, norm, norm_gradients


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

    @property
    def groups(self) -> int:
        """Number of groups of the products: the states of a node are one, whose sum the product forms."""
        return self.edges if self.nodes is None else self.nodes

    def parts(self, folded: Tensor) -> list[Tensor]:
        """Return weights [kinds · edges, in, out] as those of the products, for every kind."""
        return [joined(each) for each in folded.reshape(self.kinds, self.groups, -1, folded.shape[2]).unbind()]

    def shifts(self, offset: Tensor) -> list[Tensor]:
        """Return biases [kinds · edges, out] as those of the results: for every kind, or [nodes · out] for the sum."""
        if self.nodes is None:
            return list(offset.reshape(self.kinds, -1).unbind())
        states = self.edges // self.nodes
        return [offset.view(self.kinds, self.nodes, states, -1).sum((0, 2)).flatten()]

    def each(self, results: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the result that every kind goes into."""
        return results if self.nodes is None else [results[0]] * self.kinds


class _Kept(NamedTuple):
    """What the derivatives need besides the inputs.

    Attributes:
        mean: of the inputs, [kinds · edges, in].
        covariance: likewise, [kinds · edges, in, in].
        found: what the norms have made of them.
        parts: weights of the products, for every kind.
        passed: the results, where a ReLU has made them.
        needs: which inputs need a gradient: weight, mixing, bias, before, and the others.
    """

    mean: Tensor
    covariance: Tensor
    found: Norm
    parts: Sequence[Tensor]
    passed: Sequence[Tensor] = ()
    needs: Sequence[bool] = ()


class _End(torch.autograd.Function):
    """See :func:`end`."""

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
        mean = torch.cat([column_sums(matrix) for matrix in matrices]).view(-1, channels).div_(rows)
        squares = torch.cat([cross_product(matrix, matrix, blocks) for matrix in matrices])
        covariance = (
            diagonal_blocks(squares, len(mean)).div(rows).baddbmm_(mean[:, :, None], mean[:, None, :], alpha=-1)
        )
        found = norm(weight, mean, covariance, mixing, eps)
        parts = ending.parts((weight * found.scale[..., None]).transpose(1, 2))
        shifts = ending.shifts((found.scale * found.outer_mean).neg_())
        results: list[Tensor] = []
        if nodes is None:
            for matrix, part, shift in zip(matrices, parts, shifts, strict=True):
                results.append(_product(matrix, part, shift).relu_())
        else:
            (shift,) = shifts
            total = begin_sum(shift if bias is None else shift.add_(bias), before, rows)
            for matrix, part in (*zip(matrices, parts, strict=True), *zip(others[::2], others[1::2], strict=True)):
                total = add_product(matrix, part, total)
            assert total is not None
            results.append(total)
        # What is in a graph has to be kept by these, all else need not.
        ctx.save_for_backward(weight, mixing, *tensors, *(results if nodes is None else ()))
        ctx.ending, ctx.kept = ending, _Kept(mean, covariance, found, parts)
        variance = found.variance.clamp_min(0)
        ctx.mark_non_differentiable(found.outer_mean, variance)
        return *results, found.outer_mean, variance

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ending = ctx.ending
        weight, mixing, *saved = ctx.saved_tensors
        inputs, passed = (saved[: ending.kinds], saved[ending.kinds :]) if ending.nodes is None else (saved, [])
        needs = ctx.needs_input_grad[1:]
        kept = ctx.kept._replace(needs=needs, passed=[result.detach() for result in passed])
        outputs = gradients[:-2]
        if torch.is_grad_enabled():
            slopes = _EndGradient.apply(ending, kept, weight, mixing, *inputs, *outputs)
        else:
            outputs = tuple(output.contiguous() for output in outputs)
            if ending.nodes is None:
                for output, result in zip(outputs, passed, strict=True):
                    torch.ops.aten.threshold_backward.grad_input(output, result, 0, grad_input=output)
            slopes = _first_gradients(ending, kept, weight, mixing, inputs, outputs)[0]
        by_weight, by_mixing, by_bias, *by_inputs = slopes
        return None, by_weight, by_mixing, by_bias, outputs[0] if needs[3] else None, *by_inputs


class _EndGradient(torch.autograd.Function):
    """(…, weight, mixing, inputs, gradients of the results) to those of weight, mixing, bias and inputs."""

    @staticmethod
    def forward(
        ctx: Any, ending: Ending, kept: _Kept, weight: Tensor, mixing: Tensor | None, *tensors: Tensor
    ) -> tuple[Tensor | None, ...]:
        results = ending.kinds if ending.nodes is None else 1
        inputs, outputs = tensors[:-results], [output.contiguous() for output in tensors[-results:]]
        if ending.nodes is None:
            outputs = _masked(outputs, kept.passed)
        slopes, ctx.small = _first_gradients(ending, kept, weight, mixing, inputs, outputs)
        ctx.save_for_backward(weight, mixing, *inputs, *outputs)
        ctx.ending, ctx.kept = ending, kept
        ctx.set_materialize_grads(False)
        return slopes

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        ending, kept = ctx.ending, ctx.kept
        weight, mixing, *saved = ctx.saved_tensors
        kinds, edges, nodes, _ = ending
        inputs, outputs = (saved[:kinds], saved[kinds:]) if nodes is None else (saved[:-1], saved[-1:])
        of_weight, of_mixing, of_bias, *given = cotangents
        of_inputs = [None if along is None else along.contiguous() for along in given]
        matrices, directions = inputs[:kinds], of_inputs[:kinds]
        rows, channels = matrices[0].shape[0], weight.shape[2]
        blocks = block_count(edges, channels)

        none = weight.new_zeros(edges, channels, weight.shape[1])
        none_square = weight.new_zeros(edges, channels, channels)
        of_folded, of_square, of_sums = [], [], []
        for matrix, along, output, part in zip(matrices, directions, ending.each(outputs), kept.parts, strict=True):
            if along is None:
                of_folded.append(none)
                of_square.append(none_square)
                of_sums.append(none_square[..., 0])
                continue
            crossed = diagonal_blocks(cross_product(along, output, len(part)), ending.groups)
            of_folded.append(crossed.reshape(none.shape))
            of_square.append(diagonal_blocks(cross_product(matrix, along, blocks), edges))
            of_sums.append(column_sums(along).view(edges, channels))
        small = _second_gradients(
            ending,
            kept,
            weight,
            mixing,
            rows,
            ctx.small,
            (of_weight, of_mixing, torch.cat(of_sums), torch.cat(of_square), torch.cat(of_folded)),
        )
        shifts = ending.shifts(small.by_offset)
        if of_bias is not None:
            shifts[0] = shifts[0] + of_bias
        parts = ending.parts(small.by_folded)
        squares = small.by_square.view(kinds, edges, channels, channels).unbind()
        factors = ctx.small.square.view(kinds, edges, channels, channels).unbind()
        by_inputs: list[Tensor | None] = []
        by_outputs = [begin_sum(shift, None, rows) for shift in shifts]
        for number, (matrix, along) in enumerate(zip(matrices, directions, strict=True)):
            position = number if nodes is None else 0
            total = add_product(matrix, parts[number], by_outputs[position])
            slope = _product(outputs[position], parts[number].transpose(1, 2), small.by_sums.view(kinds, -1)[number])
            add_product(matrix, joined(squares[number]), slope)
            if along is not None:
                add_product(along, kept.parts[number], total)
                add_product(along, joined(factors[number]), slope)
            by_inputs.append(slope)
        for number in range(kinds, len(inputs), 2):
            matrix, factor = inputs[number : number + 2]
            of_matrix, of_factor = of_inputs[number : number + 2]
            by_matrix = by_factor = None
            if of_matrix is not None:
                add_product(of_matrix, factor, by_outputs[0])
                by_factor = cross_product(of_matrix, outputs[0], len(factor))
            if of_factor is not None:
                add_product(matrix, of_factor, by_outputs[0])
                by_matrix = add_product(outputs[0], of_factor.transpose(1, 2))
            by_inputs += [by_matrix, by_factor]
        if nodes is None:
            by_outputs = _masked(by_outputs, kept.passed)
        return None, None, small.by_weight, small.by_mixing, *by_inputs, *by_outputs


class _Small(NamedTuple):
    """What gradients of a stage's end have besides large products, all of M = kinds · edges.

    Attributes:
        by_folded: the gradient in the weights F, xᵀ·g, [M, in, out].
        by_offset: that in the biases, Σₚ g, [M, out].
        square: what x is multiplied by in its own gradient, symmetric, [M, in, in].
    """

    by_folded: Tensor
    by_offset: Tensor
    square: Tensor


def _first_gradients(
    ending: Ending,
    kept: _Kept,
    weight: Tensor,
    mixing: Tensor | None,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
) -> tuple[tuple[Tensor | None, ...], _Small]:
    """Return the gradients in weight, mixing, bias and inputs, and what of them their derivatives need.

    Args:
        ending: how the stages end.
        kept: from the pass forward.
        weight: likewise.
        mixing: likewise.
        inputs: likewise.
        outputs: the gradients of the results, behind the ReLU.
    """
    kinds, edges, nodes, _ = ending
    matrices, rows, channels = inputs[:kinds], inputs[0].shape[0], weight.shape[2]
    of_weight, of_mixing, of_bias, _, *of_inputs = kept.needs
    totals = [column_sums(output) for output in outputs]
    if nodes is None:
        by_offset = torch.cat(totals).view(kinds * edges, -1)
    else:
        # A copy: this is kept for the derivative, and must not be a view of a result, which would keep that itself.
        by_offset = totals[0].view(1, nodes, 1, -1).repeat(kinds, 1, edges // nodes, 1).view(kinds * edges, -1)
    each = ending.each(outputs)
    by_parts = [
        diagonal_blocks(cross_product(matrix, output, len(part)), ending.groups)
        for matrix, output, part in zip(matrices, each, kept.parts, strict=True)
    ]
    by_folded = torch.cat(by_parts).view(kinds * edges, channels, -1)
    by_weight, by_mean, by_covariance, by_mixing = norm_gradients(
        weight, kept.mean, mixing, kept.found, by_folded, by_offset, of_weight
    )
    by_sums, square = _by_sums(by_mean, by_covariance, kept.mean, rows)
    by_inputs: list[Tensor | None] = []
    for number in range(kinds):
        slope = None
        if of_inputs[number]:
            slope = _product(each[number], kept.parts[number].transpose(1, 2), by_sums.view(kinds, -1)[number])
            add_product(matrices[number], joined(square.view(kinds, edges, channels, channels)[number]), slope)
        by_inputs.append(slope)
    for number in range(kinds, len(inputs), 2):
        matrix, factor = inputs[number : number + 2]
        by_inputs.append(add_product(outputs[0], factor.transpose(1, 2)) if of_inputs[number] else None)
        by_inputs.append(cross_product(matrix, outputs[0], len(factor)) if of_inputs[number + 1] else None)
    by_bias = totals[0] if of_bias else None
    return (by_weight, by_mixing if of_mixing else None, by_bias, *by_inputs), _Small(by_folded, by_offset, square)


def _by_sums(by_mean: Tensor, by_covariance: Tensor, mean: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Return gradients in mean and covariance, symmetric, as those in the sums of the rows and of their squares.

    The second one is what a row is to be multiplied by: both of its factors are that row.
    """
    by_sums = (by_mean - 2 * (by_covariance @ mean[..., None])[..., 0]) / rows
    return by_sums, by_covariance * (2 / rows)


class _Second(NamedTuple):
    """Gradients of a function of first gradients, as those of :class:`_Small`, and in weights, mixing and sums."""

    by_weight: Tensor | None
    by_mixing: Tensor | None
    by_sums: Tensor
    by_square: Tensor
    by_folded: Tensor
    by_offset: Tensor


def _second_gradients(
    ending: Ending,
    kept: _Kept,
    weight: Tensor,
    mixing: Tensor | None,
    rows: int,
    small: _Small,
    cotangents: Sequence[Tensor | None],
) -> _Second:
    """Differentiate what is small of the first gradients.

    Args:
        ending: how the stages end.
        kept: from the pass forward.
        weight: likewise.
        mixing: likewise.
        rows: of the inputs, P.
        small: from the first gradients.
        cotangents: of the first gradients in weight and mixing, and of the sums, the squares and F in those of x.
    """
    given = [weight, kept.mean, kept.covariance, small.by_folded, small.by_offset]
    with torch.enable_grad():
        variables = [tensor.detach().requires_grad_() for tensor in given]
        own, mean, covariance, by_folded, by_offset = variables
        mixed = None if mixing is None else mixing.detach().requires_grad_()
        found = norm(own, mean, covariance, mixed, ending.eps)
        by_weight, by_mean, by_covariance, by_mixing = norm_gradients(
            own, mean, mixed, found, by_folded, by_offset, cotangents[0] is not None
        )
        sums, square = _by_sums(by_mean, by_covariance, mean, rows)
        folded = (own * found.scale[..., None]).transpose(1, 2)
    pairs = [
        (result, along)
        for result, along in zip((by_weight, by_mixing, sums, square, folded), cotangents, strict=True)
        if result is not None and along is not None
    ]
    slopes: Any = torch.autograd.grad(
        [result for result, _ in pairs],
        variables if mixed is None else [*variables, mixed],
        [along for _, along in pairs],
    )
    of_weight, of_mean, of_covariance, of_folded, of_offset, *of_mixing = slopes
    of_covariance = (of_covariance + of_covariance.transpose(1, 2)) / 2
    of_sums, of_square = _by_sums(of_mean, of_covariance, kept.mean, rows)
    return _Second(of_weight, of_mixing[0] if of_mixing else None, of_sums, of_square, of_folded, of_offset)


def _masked(gradients: Sequence[Any], passed: Sequence[Tensor]) -> list[Any]:
    pairs = zip(gradients, passed, strict=True)
    return [torch.ops.aten.threshold_backward.default(gradient, result, 0) for gradient, result in pairs]


def _product(matrix: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return bias + matrix·weight, group by group."""
    if weight.shape[0] == 1:
        return torch.addmm(bias, matrix, weight[0])
    return add_product(matrix, weight, begin_sum(bias, None, matrix.shape[0]))


def end(ending: Ending, *tensors: Tensor | None) -> Sequence[Tensor]:
    """End stages, with mean and variance of the batch, such that gradients can be differentiated once more.

    Args:
        ending: how they end.
        tensors: weight, mixing, bias, total, matrices, and matrices and weights of the pairs in turn, as of
            :func:`nni_cream.supernet.stages.added`.

    Returns:
        The results, as of :func:`nni_cream.supernet.stages.activated` or :func:`nni_cream.supernet.stages.added`, and
        mean and variance of what the norms have normalised, [kinds · edges, out], not differentiated.
    """
    results: Sequence[Tensor] = _End.apply(ending, *tensors)
    return results
