"""The loss of a network as a pure function of its parameters: nothing in the network changes when it is called."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nni_cream.cuda_graphs import is_recording
from nni_cream.distributed import processes, reduce, replicate
from nni_cream.supernet.batch_norm import batch_statistics
from nni_cream.supernet.synchronised import synchronised


def has_tied_parameters(network: nn.Module) -> bool:
    """Tell whether a parameter or buffer of ``network`` has several names."""
    lists = (network.named_parameters, network.named_buffers)
    return any(len(list(each())) != len(list(each(remove_duplicate=False))) for each in lists)


def pure_loss(
    network: nn.Module,
    names: Sequence[Sequence[str]],
    criterion: Callable[[Tensor], Tensor],
    images: Tensor,
    tied: bool = True,
) -> Callable[..., Tensor]:
    """Return the loss of one batch as a function of groups of parameters.

    Batch norms use the statistics of the batch and leave the running ones alone. Random numbers (dropout) are the same
    at every call, and the generators are afterwards where they were. The result is in the parameters' own precision,
    outside any autocast.

    Of several processes, each gives its part of the batch, equally many images, and all get the loss of the whole; its
    derivatives, of any order, are those of the whole too.

    Args:
        network: the network. What ``names`` leaves out keeps its value.
        names: for every argument of the function, the names of the parameters in it.
        criterion: maps the network's output to a scalar.
        images: the network's input.
        tied: whether a parameter may have several names, which are then looked for at every call.
    """
    devices = [images.device] if images.is_cuda else []

    def loss(*groups: Sequence[Tensor]) -> Tensor:
        given = {
            name: tensor
            for group_names, group in zip(names, groups, strict=True)
            # Group by group: what is not differentiated by is not added up.
            for name, tensor in zip(group_names, replicate(*group), strict=True)
        }
        with (
            # What is recorded draws no random numbers.
            torch.random.fork_rng(devices, enabled=not is_recording()),
            batch_statistics(network),
            synchronised(),
            torch.autocast(images.device.type, enabled=False),
        ):
            (mean,) = reduce(criterion(functional_call(network, given, (images,), tie_weights=tied)) / processes())
            return mean

    return loss
