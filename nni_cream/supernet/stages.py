"""How stages of separable convolutions end, on all edges of some states at once: pointwise convolution and batch norm.

:mod:`nni_cream.supernet.pointwise` has the parts, each with derivatives of any order and mode. All parts of a stage are
one operation (:mod:`nni_cream.supernet.stage_end`), since on small images the bookkeeping of autograd between the parts
costs as much as the products themselves. They run one by one in forward mode, where norms are synchronised between
processes, or do not normalise by the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.autograd import forward_ad

from nni_cream.supernet.pointwise import moments, normalised, products
from nni_cream.supernet.stage_end import Ending, end
from nni_cream.supernet.synchronised import sharers


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
    if known is None and sharers() == 1 and not any(_has_tangent(tensor) for tensor in tensors):
        results = end(ending, *tensors)
    else:
        results = _end_by_parts(ending, known, *tensors)
    return results


def _has_tangent(tensor: Tensor | None) -> bool:
    return tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None


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
    parts, shifts = ending.parts(folded), ending.shifts(offset)
    if nodes is None:
        each = zip(matrices, parts, shifts, strict=True)
        return *(products(shift, (matrix, part)).relu_() for matrix, part, shift in each), mean, variance
    pairs = [*zip(matrices, parts, strict=True), *zip(tensors[kinds::2], tensors[kinds + 1 :: 2], strict=True)]
    return products(shifts[0] if bias is None else bias + shifts[0], *pairs, total=before), mean, variance
