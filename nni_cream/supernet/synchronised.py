"""Batch norms whose batch is that of all processes together.

torch's own, ``SyncBatchNorm``, refuses images on the CPU and cannot be differentiated twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nni_cream.distributed import processes, reduce, replicate

_together: ContextVar[bool] = ContextVar("together", default=False)


@contextmanager
def synchronised() -> Iterator[None]:
    """Let every batch norm, of whatever class, normalise by the images that all processes have together."""
    with _mode(processes() > 1):
        yield


@contextmanager
def alone() -> Iterator[None]:
    """Within :func:`synchronised`: let every process normalise by its own images after all, all having the same."""
    with _mode(False):
        yield


@contextmanager
def _mode(together: bool) -> Iterator[None]:
    token = _together.set(together)
    try:
        with _SynchronisedNorms() if together else nullcontext():
            yield
    finally:
        _together.reset(token)


def sharers() -> int:
    """Return among how many processes a batch is divided: 1 where norms are not synchronised."""
    return processes() if _together.get() else 1


def averages(*means: Tensor) -> tuple[Tensor, ...]:
    """Return means over the images of a batch, of which all sharers have equally many, for the whole batch."""
    return tuple(total / sharers() for total in _totals(*means)) if _together.get() else means


def _totals(*sums: Tensor) -> tuple[Tensor, ...]:
    return replicate(*reduce(*sums))


class _SynchronisedNorms(TorchFunctionMode):
    """Stands in for ``torch.nn.functional.batch_norm``, which the modules call, and lets all else pass."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return (_batch_norm if func is F.batch_norm and _together.get() else func)(*args, **(kwargs or {}))


def _batch_norm(
    features: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Do what ``torch.nn.functional.batch_norm`` does, on [N, C, …], for the batch of all processes."""
    if not training:
        return F.batch_norm(features, running_mean, running_var, weight, bias, training, momentum, eps)
    shape = (1, -1, *(1,) * (features.dim() - 2))
    others = [dim for dim in range(features.dim()) if dim != 1]
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    count, total = _totals(wide.new_tensor(features.numel() / features.shape[1]), wide.sum(others))
    mean = total / count
    centred = wide - mean.view(shape)
    # Not from the sum of squares: their difference loses the digits of a small variance.
    (squares,) = _totals(centred.square().sum(others))
    variance = squares / count
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean), momentum)
            running_var.lerp_((squares / (count - 1)).to(running_var), momentum)
    scale = (variance + eps).rsqrt()
    result = centred * (scale if weight is None else scale * weight).view(shape)
    return (result if bias is None else result + bias.view(shape)).to(features.dtype)
