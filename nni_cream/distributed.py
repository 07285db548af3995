"""Several processes that compute one loss together, each on its part of a batch (SPMD), and derivatives across them.

Two operators are enough. :func:`replicate` takes what is the same in every process to where each goes on with its own
images; :func:`reduce` adds up what each has got and is the same everywhere again. The derivative of one is the other,
so that a loss written with them has the right derivatives of any order, in every process::

    weights = replicate(*weights)
    (loss,) = reduce(criterion(network(weights, own_images)) / processes())

Every process has to call the same operators in the same order. In a process by itself they are the identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Value = TypeVar("Value")


def processes() -> int:
    """Return how many processes there are; 1 where none have been started together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


# With derivatives.


def replicate(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return ``tensors``, which are the same in every process; their gradients are added up over the processes."""
    return tuple(_Replicate.apply(*tensors)) if processes() > 1 and tensors else tensors


def reduce(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the sums of ``tensors`` over the processes; a gradient is that of the sum."""
    return tuple(_Reduce.apply(*tensors)) if processes() > 1 and tensors else tensors


class _Replicate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        # What has no gradient keeps having none: an optimizer leaves it alone.
        ctx.set_materialize_grads(False)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return _where_given(reduce, gradients)


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(piece.clone() for piece in _sums(tensors))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return _where_given(replicate, gradients)


def _where_given(operator: Any, gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    results = iter(operator(*(gradient for gradient in gradients if gradient is not None)))
    return tuple(None if gradient is None else next(results) for gradient in gradients)


def _sums(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the sums over the processes, from one all-reduce, as parts of one tensor."""
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    pieces = flat.split([tensor.numel() for tensor in tensors])
    return [piece.view(tensor.shape).to(tensor.dtype) for piece, tensor in zip(pieces, tensors, strict=True)]


# Without derivatives.


def average_(tensors: Sequence[Tensor]) -> None:
    """Replace ``tensors`` by their means over the processes."""
    if processes() > 1 and tensors:
        for tensor, total in zip(tensors, _sums(tensors), strict=True):
            tensor.copy_(total / processes())


def mean(tensor: Tensor) -> Tensor:
    """Return the mean of ``tensor`` over the processes, detached."""
    result = tensor.detach().clone()
    average_([result])
    return result


def total(*numbers: int) -> list[int]:
    """Return the sums of ``numbers`` over the processes."""
    if processes() == 1:
        return list(numbers)
    counts = torch.tensor(numbers, device=_device())
    dist.all_reduce(counts)
    result: list[int] = counts.tolist()
    return result


def gathered(tensor: Tensor) -> Tensor:
    """Return the ``tensor`` of every process, of one shape, joined along the first dimension; detached."""
    if processes() == 1:
        return tensor.detach()
    own = tensor.detach().contiguous()
    parts = [torch.empty_like(own) for _ in range(processes())]
    dist.all_gather(parts, own)
    return torch.cat(parts)


def agreed(value: Value) -> Value:
    """Return the ``value`` that the first process has."""
    if processes() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, device=_device())
    return values[0]


def _device() -> torch.device:
    """Return where numbers have to be to travel."""
    on_gpu = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
