"""Tensors side by side, such that the derivative of a gradient costs no more than the gradient.

torch's own ``cat`` divides its gradient by slices, and the derivative of each slice is as large as all of them
together: of n tensors, the second derivative takes n times as long. Here concatenating and dividing, and likewise
repeating and adding up, are each other's derivative.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class _Concatenation(torch.autograd.Function):
    """(tensors) to one, along a dimension."""

    @staticmethod
    def forward(ctx: Any, dim: int, *tensors: Tensor) -> Tensor:
        ctx.dim, ctx.shapes = dim, [tensor.shape for tensor in tensors]
        return torch.cat(tensors, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *grad.split([shape[ctx.dim] for shape in ctx.shapes], ctx.dim)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Tensor:
        like = next(tangent for tangent in tangents if tangent is not None)
        parts = [like.new_zeros(s) if t is None else t for t, s in zip(tangents, ctx.shapes, strict=True)]
        return torch.cat(parts, ctx.dim)


class _Repetition(torch.autograd.Function):
    """(features) to so many copies of their channels."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, times: int) -> Tensor:
        ctx.times = times
        return torch.cat([features] * times, dim=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total: Tensor = _Total.apply(grad, ctx.times)
        return total, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return torch.cat([tangent] * ctx.times, dim=1)


class _Total(torch.autograd.Function):
    """(copies of channels) to their sum."""

    @staticmethod
    def forward(ctx: Any, copies: Tensor, times: int) -> Tensor:
        ctx.times = times
        return _sum(copies, times)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        repeated: Tensor = _Repetition.apply(grad, ctx.times)
        return repeated, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return _sum(tangent, ctx.times)


def _sum(copies: Tensor, times: int) -> Tensor:
    first, second, *others = copies.chunk(times, dim=1)
    total = first + second
    for other in others:
        total += other
    return total


def concatenated(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Return tensors as one, along a dimension that is not negative."""
    result: Tensor = tensors[0] if len(tensors) == 1 else _Concatenation.apply(dim, *tensors)
    return result


def repeated(features: Tensor, times: int) -> Tensor:
    """Return so many copies of the channels of [N, C, …], one after the other."""
    result: Tensor = features if times == 1 else _Repetition.apply(features, times)
    return result
