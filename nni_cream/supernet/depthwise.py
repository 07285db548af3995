"""A depthwise convolution whose first and second derivatives are depthwise convolutions as well.

PyTorch's backward of larger and of dilated depthwise convolutions is slow on a CPU, and its second derivative of a
grouped convolution loops over the groups. But a convolution is bilinear, and so are its gradients: all derivatives, of
any order and in either mode, are one of the three forms here, with exchanged roles. ``docs/darts.md`` has what
that gains.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Pair = tuple[int, int]


class Geometry(NamedTuple):
    """What a depthwise convolution is besides its input and weight; pairs are of height and width."""

    stride: Pair
    padding: Pair
    dilation: Pair
    input_size: Pair
    kernel_size: Pair


class _Form(torch.autograd.Function):
    """A bilinear form of two tensors; its derivatives are given by :attr:`partners`."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        first, second, ctx.geometry = inputs
        ctx.save_for_backward(first, second)
        ctx.save_for_forward(first, second)


class _Convolve(_Form):
    """(input, weight) to output."""

    @staticmethod
    def forward(features: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        return _convolve(features, weight, geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        features, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        return (
            _InputGradient.apply(grad, weight, ctx.geometry) if needs[0] else None,
            _WeightGradient.apply(features, grad, ctx.geometry) if needs[1] else None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _bilinear_tangent(_convolve, ctx, tangents)


class _InputGradient(_Form):
    """(gradient of the output, weight) to gradient of the input."""

    @staticmethod
    def forward(grad: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        return _input_gradient(grad, weight, geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        output_grad, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        return (
            _Convolve.apply(grad, weight, ctx.geometry) if needs[0] else None,
            _WeightGradient.apply(grad, output_grad, ctx.geometry) if needs[1] else None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _bilinear_tangent(_input_gradient, ctx, tangents)


class _WeightGradient(_Form):
    """(input, gradient of the output) to gradient of the weight."""

    @staticmethod
    def forward(features: Tensor, grad: Tensor, geometry: Geometry) -> Tensor:
        return _weight_gradient(features, grad, geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        features, output_grad = ctx.saved_tensors
        needs = ctx.needs_input_grad
        return (
            _InputGradient.apply(output_grad, grad, ctx.geometry) if needs[0] else None,
            _Convolve.apply(features, grad, ctx.geometry) if needs[1] else None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _bilinear_tangent(_weight_gradient, ctx, tangents)


def _bilinear_tangent(form: Callable[..., Tensor], ctx: Any, tangents: Any) -> Tensor:
    first, second = ctx.saved_tensors
    pairs = ((tangents[0], second), (first, tangents[1]))
    terms = [form(a, b, ctx.geometry) for a, b in pairs if a is not None and b is not None]
    return terms[0] if len(terms) == 1 else terms[0] + terms[1]


def _convolve(features: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    return F.conv2d(
        features, weight, None, geometry.stride, geometry.padding, geometry.dilation, groups=weight.shape[0]
    )


def _torch_is_fast(tensor: Tensor, geometry: Geometry) -> bool:
    # Measured on CPUs: nothing is gained for a plain 3×3. Other devices have kernels of their own.
    return tensor.device.type != "cpu" or (geometry.kernel_size == (3, 3) and geometry.dilation == (1, 1))


def _input_gradient(grad: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    stride, padding, dilation, size, kernel = geometry
    if _torch_is_fast(grad, geometry):
        features = grad.new_empty(1).expand(len(grad), len(weight), *size)
        return _torch_gradient(grad, features, weight, geometry, 0)
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if stride == (1, 1) and all(r >= p for r, p in zip(reach, padding, strict=True)):
        margin = [r - p for r, p in zip(reach, padding, strict=True)]
        return F.conv2d(grad, weight.flip(2, 3), None, 1, margin, dilation, groups=len(weight))
    # What the strides of the convolution left over at the end of the input.
    rest = [
        full - (s * (out - 1) + r + 1 - 2 * p)
        for full, out, s, r, p in zip(size, grad.shape[2:], stride, reach, padding, strict=True)
    ]
    return F.conv_transpose2d(grad, weight, None, stride, padding, rest, len(weight), dilation)


def _weight_gradient(features: Tensor, grad: Tensor, geometry: Geometry) -> Tensor:
    stride, padding, dilation, _, kernel = geometry
    images, channels = features.shape[:2]
    if _torch_is_fast(features, geometry):
        weight = features.new_empty(1).expand(channels, 1, *kernel)
        return _torch_gradient(grad, features, weight, geometry, 1)
    # Every channel of every image becomes a channel of one image, and its output's gradient that channel's kernel;
    # stride and dilation exchange their roles.
    planes = features.reshape(1, images * channels, *features.shape[2:])
    kernels = grad.reshape(images * channels, 1, *grad.shape[2:])
    products = F.conv2d(planes, kernels, None, dilation, padding, stride, groups=images * channels)
    return products[:, :, : kernel[0], : kernel[1]].reshape(images, channels, 1, *kernel).sum(0)


def _torch_gradient(grad: Tensor, features: Tensor, weight: Tensor, geometry: Geometry, which: int) -> Tensor:
    stride, padding, dilation = geometry[:3]
    gradients = torch.ops.aten.convolution_backward(
        grad,
        features,
        weight,
        None,
        stride,
        padding,
        dilation,
        False,
        (0, 0),
        len(weight),
        (which == 0, which == 1, False),
    )
    gradient: Tensor = gradients[which]
    return gradient


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution without bias, [N, C, H, W] to [N, C, H', W'], with derivatives of its own.

    Its parameter and state dict are those of ``nn.Conv2d`` with ``groups=channels``.

    Args:
        channels: number of channels, C.
        kernel_size: height and width of the kernel.
        stride: of the convolution.
        padding: zeros on every side.
        dilation: distance of the kernel's elements.
    """

    def __init__(self, channels: int, kernel_size: int, stride: int = 1, padding: int = 0, dilation: int = 1) -> None:
        super().__init__(
            channels, channels, kernel_size, stride, padding, dilation=dilation, groups=channels, bias=False
        )

    def forward(self, features: Tensor) -> Tensor:
        """Convolve."""
        height, width = features.shape[2:]
        geometry = Geometry(
            self.stride,  # type: ignore[arg-type]
            self.padding,  # type: ignore[arg-type]
            self.dilation,  # type: ignore[arg-type]
            (height, width),
            self.kernel_size,  # type: ignore[arg-type]
        )
        output: Tensor = _Convolve.apply(features, self.weight, geometry)
        return output


def with_explicit_derivatives(module: nn.Module) -> nn.Module:
    """Replace the depthwise convolutions in ``module`` by :class:`DepthwiseConv2d`, in place; their weights stay.

    One with a bias, a rectangular kernel, or padding other than a number of zeros is left as it is.
    """
    for name, child in list(module.named_children()):
        if type(child) is nn.Conv2d and _is_plain_depthwise(child):
            padding = child.padding[0]
            assert isinstance(padding, int)
            depthwise = DepthwiseConv2d(
                child.in_channels, child.kernel_size[0], child.stride[0], padding, child.dilation[0]
            )
            depthwise.weight = child.weight
            setattr(module, name, depthwise)
        else:
            with_explicit_derivatives(child)
    return module


def _is_plain_depthwise(layer: nn.Conv2d) -> bool:
    pairs = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    return (
        layer.groups == layer.in_channels == layer.out_channels > 1
        and layer.bias is None
        and layer.padding_mode == "zeros"
        and all(not isinstance(pair, str) and pair[0] == pair[1] for pair in pairs)
    )
