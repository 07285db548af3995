"""The loss of a network as a pure function of its parameters: nothing in the network changes when it is called."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nni_cream.supernet.batch_norm import batch_statistics


def pure_loss(
    network: nn.Module,
    names: Sequence[Sequence[str]],
    criterion: Callable[[Tensor], Tensor],
    images: Tensor,
) -> Callable[..., Tensor]:
    """Return the loss of one batch as a function of groups of parameters.

    Batch norms use the statistics of the batch and leave the running ones alone. Random numbers (dropout) are the same
    at every call, and the generators are afterwards where they were. The result is in the parameters' own precision,
    outside any autocast.

    Args:
        network: the network. What ``names`` leaves out keeps its value.
        names: for every argument of the function, the names of the parameters in it.
        criterion: maps the network's output to a scalar.
        images: the network's input.
    """
    devices = [images.device] if images.is_cuda else []

    def loss(*groups: Sequence[Tensor]) -> Tensor:
        given = {
            name: tensor
            for group_names, group in zip(names, groups, strict=True)
            for name, tensor in zip(group_names, group, strict=True)
        }
        with (
            torch.random.fork_rng(devices),
            batch_statistics(network),
            torch.autocast(images.device.type, enabled=False),
        ):
            return criterion(functional_call(network, given, (images,)))

    return loss
