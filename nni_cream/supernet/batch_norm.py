"""Batch norms that many paths share.

Running statistics of a supernet are a mixture over paths and fit none of them. So a path is judged either with the
statistics of the batch itself, or with running statistics that were recomputed for this path alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Final

import torch
import torch.nn.functional as F
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nni_cream.supernet.synchronised import sharers, synchronised

# PyTorch's group norm is fast for so many pixels, and many times slower than anything else for fewer; measured on CPUs.
_LARGE: Final = 2048


def batch_norms(network: nn.Module) -> list[_BatchNorm]:
    """Return the batch norms in ``network``."""
    return [module for module in network.modules() if isinstance(module, _BatchNorm)]


@contextmanager
def batch_statistics(network: nn.Module | Sequence[_BatchNorm], groups: int = 1) -> Iterator[None]:
    """Normalise with the statistics of each batch, and leave the running statistics untouched.

    Args:
        network: the network, or its batch norms, since looking for them in a supernet takes milliseconds.
        groups: number of groups of equal size, one after the other in a batch, that are normalised each by itself, as
            if each were a batch of its own.
    """
    norms = batch_norms(network) if isinstance(network, nn.Module) else network
    # Past the checks of attributes in nn.Module, which take milliseconds for all norms of a supernet.
    before = [(own := vars(norm), own["training"], own["track_running_stats"]) for norm in norms]
    for own, _, _ in before:
        own["training"], own["track_running_stats"] = True, False
    if groups > 1:
        for norm in norms:
            vars(norm)["forward"] = partial(_normalise_groups, norm, groups)
    try:
        yield
    finally:
        for own, training, tracking in before:
            own["training"], own["track_running_stats"] = training, tracking
            own.pop("forward", None)


def _normalise_groups(norm: _BatchNorm, groups: int, features: Tensor) -> Tensor:
    plain = type(norm) in (nn.BatchNorm2d, BatchNormAct2d) and sharers() == 1
    if plain and features.is_contiguous(memory_format=torch.channels_last):
        images, channels, height, width = features.shape
        # The images of a group, one below the other.
        joint = features.permute(0, 2, 3, 1).reshape(groups, -1, width, channels)
        normalised = _normalise_images(joint, norm.weight, norm.bias, norm.eps)
        normalised = normalised.reshape(images, height, width, channels).permute(0, 3, 1, 2)
        if isinstance(norm, BatchNormAct2d):
            normalised = norm.act(norm.drop(normalised))
        return normalised
    # The groups lie one after the other in memory, whatever the memory format.
    return torch.cat([type(norm).forward(norm, group) for group in features.chunk(groups)])


def _normalise_images(images: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Normalise each channel of each image, [N, H, W, C], by itself."""
    if images.dtype in (torch.float16, torch.bfloat16):
        # As batch norms do it: squares would leave the range of float16.
        return _normalise_images(images.float(), weight, bias, eps).to(images.dtype)
    channels = images.shape[3]
    if images.shape[1] * images.shape[2] >= _LARGE:
        return F.group_norm(images.permute(0, 3, 1, 2), channels, weight, bias, eps).permute(0, 2, 3, 1)
    pixels = images.flatten(1, 2)
    mean = pixels.mean(1, keepdim=True)
    centred = pixels - mean
    scale = (centred.square().mean(1, keepdim=True) + eps).rsqrt()
    if weight is None or bias is None:
        return centred * scale
    return torch.addcmul(bias, centred, scale * weight)


@contextmanager
def recalibrated(network: nn.Module, batches: Iterable[Tensor]) -> Iterator[None]:
    """Evaluate ``network`` with running statistics recomputed over ``batches`` of images.

    Each statistic becomes the plain average over the batches, of which several processes have a part each. On leaving,
    modes and statistics are as before.
    """
    norms = batch_norms(network)
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


def count_right(
    network: nn.Module,
    classify: Callable[[Tensor], Tensor],
    calibration: Iterable[Tensor],
    held_out: Iterable[tuple[Tensor, Tensor]],
) -> tuple[int, int]:
    """Judge a path by running statistics of its own, as in :func:`recalibrated`.

    Args:
        network: with the batch norms; as before in the end.
        classify: from images [N, 3, R, R] to logits [N, classes], through ``network``.
        calibration: batches of images that the statistics are recomputed over.
        held_out: batches of images and labels.

    Returns:
        The number of right answers, and of images, in this process.
    """
    right = seen = 0
    with recalibrated(network, calibration), torch.no_grad():
        for images, targets in held_out:
            right += int((classify(images).argmax(-1) == targets).sum())
            seen += len(images)
    return right, seen
