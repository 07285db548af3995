"""Batch norms that many paths share.

Running statistics of a supernet are a mixture over paths and fit none of them. So a path is judged either with the
statistics of the batch itself, or with running statistics that were recomputed for this path alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nni_cream.supernet.synchronised import synchronised


def _batch_norms(network: nn.Module) -> list[_BatchNorm]:
    return [module for module in network.modules() if isinstance(module, _BatchNorm)]


@contextmanager
def batch_statistics(network: nn.Module, groups: int = 1) -> Iterator[None]:
    """Normalise with the statistics of each batch, and leave the running statistics untouched.

    Args:
        network: the network.
        groups: number of groups of equal size, one after the other in a batch, that are normalised each by itself, as
            if each were a batch of its own.
    """
    norms = _batch_norms(network)
    before = [(norm.training, norm.track_running_stats) for norm in norms]
    for norm in norms:
        norm.training, norm.track_running_stats = True, False
        if groups > 1:
            norm.forward = partial(_normalise_groups, norm, groups)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for norm, (training, tracking) in zip(norms, before, strict=True):
            norm.training, norm.track_running_stats = training, tracking
            vars(norm).pop("forward", None)


def _normalise_groups(norm: _BatchNorm, groups: int, features: Tensor) -> Tensor:
    # The groups lie one after the other in memory, whatever the memory format.
    return torch.cat([type(norm).forward(norm, group) for group in features.chunk(groups)])


@contextmanager
def recalibrated(network: nn.Module, batches: Iterable[Tensor]) -> Iterator[None]:
    """Evaluate ``network`` with running statistics recomputed over ``batches`` of images.

    Each statistic becomes the plain average over the batches, of which several processes have a part each. On leaving,
    modes and statistics are as before.
    """
    norms = _batch_norms(network)
    modes = [(module, module.training) for module in network.modules()]
    buffers = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    momenta = [norm.momentum for norm in norms]
    try:
        network.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # torch's word for a cumulative average
            norm.train()
        with torch.no_grad():
            for images in batches:
                with synchronised():
                    network(images)
        network.eval()
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for buffer, value in buffers:
            buffer.copy_(value)
        for module, training in modes:
            module.training = training
