"""The three bilinear forms of a depthwise convolution, each computed in the fastest way known for its size.

With an input x, a weight w and a gradient g of the output: the convolution itself, of x and w; the gradient in x, of g
and w; and the gradient in w, of x and g. :mod:`nni_cream.supernet.depthwise` differentiates them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nni_cream.supernet.kernels import LARGEST, kernels_for

Pair = tuple[int, int]

_STRIP: Final = 3
# Measured with 1 and 2 threads on an AMD EPYC (AVX2): up to so many pairs of a pixel of the input and one of the output
# products of matrices are the fastest way, and beyond so many bytes of an input torch's own.
_FEW_PAIRS: Final = 256
_LARGEST_STRIPS: Final = 2**25
_LARGEST_PLANES: Final = 2**24


class Geometry(NamedTuple):
    """What a depthwise convolution is besides its input and weight; pairs are of height and width."""

    stride: Pair
    padding: Pair
    dilation: Pair
    input_size: Pair
    kernel_size: Pair


def convolve(features: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Convolve [N, C, H, W] with a weight [C, 1, k, k]."""
    if kernels := _kernels_for(features, weight, geometry):
        steps = zip(geometry.input_size, *geometry[:3], geometry.kernel_size, strict=True)
        output = [(full + 2 * p - d * (k - 1) - 1) // s + 1 for full, s, p, d, k in steps]
        result: Tensor = kernels.convolve(features, weight, output, *geometry[:3], False)
        return result
    return F.conv2d(
        features, weight, None, geometry.stride, geometry.padding, geometry.dilation, groups=weight.shape[0]
    )


def _kernels_for(features: Tensor, other: Tensor, geometry: Geometry) -> Any:
    # Measured on a GPU: torch's kernels are good where they are not dilated.
    if geometry.dilation == (1, 1) or math.prod((*features.shape[:2], *geometry.input_size)) > LARGEST:
        return None
    return kernels_for(features, other)


def input_gradient(grad: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Return the gradient of the input, [N, C, H, W], given the gradient of the output."""
    stride, padding, dilation, size, kernel = geometry
    if kernels := _kernels_for(grad, weight, geometry):
        result: Tensor = kernels.convolve(grad, weight, size, stride, padding, dilation, True)
        return result
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if stride == (1, 1) and all(r >= p for r, p in zip(reach, padding, strict=True)):
        margin = [r - p for r, p in zip(reach, padding, strict=True)]
        return F.conv2d(grad, weight.flip(2, 3), None, 1, margin, dilation, groups=len(weight))
    if grad.device.type != "cpu":
        features = grad.new_empty(len(grad), len(weight), *size)
        if _is_channels_last(grad):
            features = features.to(memory_format=torch.channels_last)
        return _torch_gradient(grad, features, weight, geometry, 0)
    # What the strides of the convolution left over at the end of the input.
    rest = [
        full - (s * (out - 1) + r + 1 - 2 * p)
        for full, out, s, r, p in zip(size, grad.shape[2:], stride, reach, padding, strict=True)
    ]
    return F.conv_transpose2d(grad, weight, None, stride, padding, rest, len(weight), dilation)


def weight_gradient(features: Tensor, grad: Tensor, geometry: Geometry) -> Tensor:
    """Return the gradient of the weight, [C, 1, k, k], given the input and the gradient of the output."""
    stride, padding, dilation, size, kernel = geometry
    if kernels := _kernels_for(features, grad, geometry):
        result: Tensor = kernels.weight_gradient(features, grad, kernel, stride, padding, dilation)
        return result
    # Which way is fastest was measured on CPUs; other devices have kernels of their own.
    if features.device.type != "cpu" or (kernel == (_STRIP, _STRIP) and dilation == (1, 1) and min(size) >= _STRIP):
        return _torchs_weight_gradient(features, grad, geometry)
    if math.prod((*size, *grad.shape[2:])) <= _FEW_PAIRS:
        return _by_products(features, grad, geometry)
    if dilation == (1, 1):
        strips = _can_be_strips(features, grad, geometry)
        if features.nbytes > (_LARGEST_STRIPS // max(stride) if strips else _LARGEST_PLANES):
            return _torchs_weight_gradient(features, grad, geometry)
        return _by_strips(features, grad, geometry) if strips else _by_planes(features, grad, geometry)
    if _is_channels_last(features) and kernel[1] in (_STRIP, 5) and _is_dense(geometry, grad):
        # The pixels between two taps take no part in a convolution of the others.
        plain = geometry._replace(
            padding=(padding[0] // dilation[0], padding[1] // dilation[1]),
            dilation=(1, 1),
            input_size=(size[0] // dilation[0], size[1] // dilation[1]),
        )
        return weight_gradient(_between(features, dilation), _between(grad, dilation), plain)
    return _by_planes(features, grad, geometry)


def _can_be_strips(features: Tensor, grad: Tensor, geometry: Geometry) -> bool:
    kernel = geometry.kernel_size
    large = all(out >= k for out, k in zip(grad.shape[2:], kernel, strict=True))
    return _is_channels_last(features) and (kernel[1], geometry.padding[1]) == (5, 2) and large


def _by_products(features: Tensor, grad: Tensor, geometry: Geometry) -> Tensor:
    """Multiply every pixel with every gradient, over all images, and add up the products that meet in a tap.

    On planes that are smaller than the kernel oneDNN has no fast kernel and takes about ten to twenty times as long
    (``benchmarks/convolutions.py``).
    """
    if features.dtype in (torch.float16, torch.bfloat16):
        # What is added up has to be exact, as inside a convolution.
        return _by_products(features.float(), grad.float(), geometry).to(features.dtype)
    images, channels = features.shape[:2]
    # Transposed as one matrix each, which is fast; then products of matrices, one a channel.
    pixels, slopes = (
        tensor.permute(0, 2, 3, 1).reshape(images, -1).t().contiguous().view(-1, channels, images).transpose(0, 1)
        for tensor in (features, grad)
    )
    pairs = torch.bmm(pixels, slopes.transpose(1, 2)).flatten(1)
    return (pairs @ _taps(geometry, grad.shape[2:]).to(pairs)).view(channels, 1, *geometry.kernel_size)


def _taps(geometry: Geometry, output_size: Sequence[int]) -> Tensor:
    """Tell which tap joins a pixel of the input and one of the output, [pairs of pixels, taps]."""
    stride, padding, dilation, size, kernel = geometry
    rows, columns = (
        (torch.arange(full)[:, None] + p - s * torch.arange(out))[..., None] == d * torch.arange(k)
        for full, out, s, p, d, k in zip(size, output_size, stride, padding, dilation, kernel, strict=True)
    )
    joined: Tensor = rows[:, None, :, None, :, None] & columns[:, None, :, None, :]
    return joined.reshape(-1, math.prod(kernel))


def _by_planes(features: Tensor, grad: Tensor, geometry: Geometry) -> Tensor:
    """Let every channel of every image be a channel of one image, and its output's gradient that channel's kernel.

    Stride and dilation exchange their roles.
    """
    stride, padding, dilation, _, kernel = geometry
    images, channels = features.shape[:2]
    planes = features.reshape(1, images * channels, *features.shape[2:])
    kernels = grad.reshape(images * channels, 1, *grad.shape[2:])
    products = F.conv2d(planes, kernels, None, dilation, padding, stride, groups=images * channels)
    return products[:, :, : kernel[0], : kernel[1]].reshape(images, channels, 1, *kernel).sum(0)


def _by_strips(features: Tensor, grad: Tensor, geometry: Geometry) -> Tensor:
    """Return the weight gradient of an undilated k×5 convolution with a padding of 2, three columns at a time.

    oneDNN has a fast kernel for a width of three, and none for others. Between two rows of pixels in memory lie two
    zeros, padding on the right of one and on the left of the next, so that the columns on the right see the same memory
    two pixels further on.
    """
    images, channels, height, width = features.shape
    pixels = images * height * (width + 2)
    memory = features.new_empty(pixels + 2, channels)
    memory[pixels:].zero_()
    rows = memory[:pixels].view(images, height, width + 2, channels)
    rows[:, :, :2].zero_()
    rows[:, :, 2:].copy_(features.permute(0, 2, 3, 1))
    strip = geometry._replace(padding=(geometry.padding[0], 0), kernel_size=(geometry.kernel_size[0], _STRIP))
    left, right = (
        _torchs_weight_gradient(memory[first : first + pixels].view_as(rows).permute(0, 3, 1, 2), grad, strip)
        for first in (0, 2)
    )
    return torch.cat([left, right[..., 1:]], dim=3)


def _is_channels_last(features: Tensor) -> bool:
    return features.is_contiguous(memory_format=torch.channels_last) and not features.is_contiguous()


def _is_dense(geometry: Geometry, grad: Tensor) -> bool:
    """Tell whether a dilated convolution consists of undilated ones, large enough for their kernel, and no more."""
    sizes = zip(geometry.dilation, geometry.padding, geometry.input_size, geometry.kernel_size, strict=True)
    return (
        geometry.dilation != (1, 1)
        and geometry.stride == (1, 1)
        and tuple(grad.shape[2:]) == geometry.input_size
        and all(size % d == 0 and p % d == 0 and size // d >= k for d, p, size, k in sizes)
    )


def _between(features: Tensor, dilation: Pair) -> Tensor:
    """Make every set of pixels that a dilated convolution joins an image of its own."""
    images, channels, height, width = features.shape
    down, right = dilation
    pixels = features.permute(0, 2, 3, 1).reshape(images, height // down, down, width // right, right, channels)
    parts = pixels.permute(0, 2, 4, 1, 3, 5).reshape(-1, height // down, width // right, channels)
    return parts.permute(0, 3, 1, 2)


def _torchs_weight_gradient(features: Tensor, grad: Tensor, geometry: Geometry) -> Tensor:
    # Of the weight only the shape matters.
    weight = features.new_empty(features.shape[1], 1, *geometry.kernel_size)
    return _torch_gradient(grad, features, weight, geometry, 1)


def _torch_gradient(grad: Tensor, features: Tensor, weight: Tensor, geometry: Geometry, which: int) -> Tensor:
    stride, padding, dilation = geometry[:3]
    needed = (which == 0, which == 1, False)
    gradients: tuple[Tensor, ...] = torch.ops.aten.convolution_backward.default(
        grad, features, weight, None, stride, padding, dilation, False, (0, 0), len(weight), needed
    )
    return gradients[which]
