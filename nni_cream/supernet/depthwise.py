"""A depthwise convolution whose first and second derivatives are depthwise convolutions as well.

PyTorch's backward of larger and of dilated depthwise convolutions is slow on a CPU, and its second derivative of a
grouped convolution loops over the groups. But a convolution is bilinear, and so are its gradients: all derivatives, of
any order and in either mode, are one of the three forms here, with exchanged roles. ``docs/darts.md`` has what
that gains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nni_cream.differentiation import leaves_out_weights
from nni_cream.supernet.kernels import LARGEST, kernels_for

Pair = tuple[int, int]

_STRIP: Final = 3


class Geometry(NamedTuple):
    """What a depthwise convolution is besides its input and weight; pairs are of height and width."""

    stride: Pair
    padding: Pair
    dilation: Pair
    input_size: Pair
    kernel_size: Pair


def _convolve(features: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
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


def _input_gradient(grad: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
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


def _weight_gradient(features: Tensor, grad: Tensor, geometry: Geometry) -> Tensor:
    stride, padding, dilation, size, kernel = geometry
    images, channels = features.shape[:2]
    if kernels := _kernels_for(features, grad, geometry):
        result: Tensor = kernels.weight_gradient(features, grad, kernel, stride, padding, dilation)
        return result
    # Measured on CPUs: nothing is gained for a plain 3×3. Other devices have kernels of their own.
    if features.device.type != "cpu" or (kernel == (_STRIP, _STRIP) and dilation == (1, 1)):
        weight = features.new_empty(channels, 1, *kernel)
        return _torch_gradient(grad, features, weight, geometry, 1)
    if _is_channels_last(features) and kernel[1] in (_STRIP, 5):
        large = all(out >= k for out, k in zip(grad.shape[2:], kernel, strict=True))
        if dilation == (1, 1) and (kernel[1], padding[1]) == (5, 2) and large:
            return _weight_gradient_of_five(features, grad, geometry)
        if _is_dense(geometry, grad):
            # The pixels between two taps take no part in a convolution of the others.
            plain = geometry._replace(
                padding=(padding[0] // dilation[0], padding[1] // dilation[1]),
                dilation=(1, 1),
                input_size=(size[0] // dilation[0], size[1] // dilation[1]),
            )
            return _weight_gradient(_between(features, dilation), _between(grad, dilation), plain)
    # Every channel of every image becomes a channel of one image, and its output's gradient that channel's kernel;
    # stride and dilation exchange their roles.
    planes = features.reshape(1, images * channels, *features.shape[2:])
    kernels = grad.reshape(images * channels, 1, *grad.shape[2:])
    products = F.conv2d(planes, kernels, None, dilation, padding, stride, groups=images * channels)
    return products[:, :, : kernel[0], : kernel[1]].reshape(images, channels, 1, *kernel).sum(0)


def _weight_gradient_of_five(features: Tensor, grad: Tensor, geometry: Geometry) -> Tensor:
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
    weight = features.new_empty(1).expand(channels, 1, *strip.kernel_size)
    left, right = (
        _torch_gradient(grad, memory[first : first + pixels].view_as(rows).permute(0, 3, 1, 2), weight, strip, which=1)
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


def _torch_gradient(grad: Tensor, features: Tensor, weight: Tensor, geometry: Geometry, which: int) -> Tensor:
    stride, padding, dilation = geometry[:3]
    needed = (which == 0, which == 1, False)
    gradients: tuple[Tensor, ...] = torch.ops.aten.convolution_backward.default(
        grad, features, weight, None, stride, padding, dilation, False, (0, 0), len(weight), needed
    )
    return gradients[which]


class _Form(torch.autograd.Function):
    """A bilinear form of two tensors; its derivatives are forms again.

    ``forward`` takes the context itself, not ``setup_context``: with that, a call costs as much as a small convolution.

    Attributes:
        compute: the form itself, without derivatives.
    """

    compute: Callable[[Tensor, Tensor, Geometry], Tensor]

    @classmethod
    def keep(cls, ctx: Any, first: Tensor, second: Tensor, geometry: Geometry) -> Tensor:
        """Return the value, and keep the arguments for the derivatives."""
        ctx.geometry = geometry
        ctx.save_for_backward(first, second)
        ctx.save_for_forward(first, second)
        return cls.compute(first, second, geometry)


def _differentiable(form: type[_Form], first: Tensor, second: Tensor, geometry: Geometry) -> Tensor:
    # Where derivatives are not recorded, the call of a Function is saved.
    call = form.apply if torch.is_grad_enabled() else form.compute
    result: Tensor = call(first, second, geometry)
    return result


def _wants_weight(needs: Sequence[bool]) -> bool:
    return needs[1] and not leaves_out_weights()


class _Convolve(_Form):
    """(input, weight) to output."""

    compute = staticmethod(_convolve)

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        return _Convolve.keep(ctx, features, weight, geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        features, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        return (
            _differentiable(_InputGradient, grad, weight, ctx.geometry) if needs[0] else None,
            _differentiable(_WeightGradient, features, grad, ctx.geometry) if _wants_weight(needs) else None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _bilinear_tangent(_convolve, ctx, tangents)


class _InputGradient(_Form):
    """(gradient of the output, weight) to gradient of the input."""

    compute = staticmethod(_input_gradient)

    @staticmethod
    def forward(ctx: Any, grad: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        return _InputGradient.keep(ctx, grad, weight, geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        output_grad, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        return (
            _differentiable(_Convolve, grad, weight, ctx.geometry) if needs[0] else None,
            _differentiable(_WeightGradient, grad, output_grad, ctx.geometry) if _wants_weight(needs) else None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _bilinear_tangent(_input_gradient, ctx, tangents)


class _WeightGradient(_Form):
    """(input, gradient of the output) to gradient of the weight."""

    compute = staticmethod(_weight_gradient)

    @staticmethod
    def forward(ctx: Any, features: Tensor, grad: Tensor, geometry: Geometry) -> Tensor:
        return _WeightGradient.keep(ctx, features, grad, geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        features, output_grad = ctx.saved_tensors
        needs = ctx.needs_input_grad
        return (
            _differentiable(_InputGradient, output_grad, grad, ctx.geometry) if needs[0] else None,
            _differentiable(_Convolve, features, grad, ctx.geometry) if needs[1] else None,
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


def convolve(features: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """Convolve [N, C, H, W] depthwise with ``weight`` [C, 1, k, k], with the derivatives of this module.

    Under autocast in its precision, as torch's own convolutions.
    """
    kind = features.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        # Here, so that what is kept for the derivatives is of one type.
        dtype = torch.get_autocast_dtype(kind)
        features, weight = features.to(dtype), weight.to(dtype)
    height, width, kernel = *features.shape[2:], weight.shape[2:]
    geometry = Geometry(stride, padding, dilation, (height, width), (kernel[0], kernel[1]))
    output: Tensor = _Convolve.apply(features, weight, geometry)
    return output


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
        pairs: Any = (self.stride, self.padding, self.dilation)
        return convolve(features, self.weight, *pairs)


class PointwiseConv2d(nn.Conv2d):
    """A 1×1 convolution without bias, [N, in, H, W] to [N, out, H', W']: on a GPU a product of matrices.

    All derivatives of a product are products. For the second derivative of a convolution, torch convolves images with
    images, which is slow.

    Args:
        in_channels: number of input channels.
        out_channels: number of output channels.
        stride: of the convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """Convolve."""
        return self.as_product(features) if features.is_cuda else super().forward(features)

    def as_product(self, features: Tensor) -> Tensor:
        """Convolve by a product of matrices."""
        down, right = self.stride
        pixels = features[:, :, ::down, ::right].permute(0, 2, 3, 1)
        return F.linear(pixels, self.weight.flatten(1)).permute(0, 3, 1, 2)


def with_explicit_derivatives(module: nn.Module) -> nn.Module:
    """Replace convolutions whose derivatives torch computes slowly, in place; their weights stay.

    Depthwise ones become :class:`DepthwiseConv2d`, and 1×1 ones :class:`PointwiseConv2d`. One with a bias, a
    rectangular kernel, or padding other than a number of zeros is left as it is.
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
        elif type(child) is nn.Conv2d and _is_plain_pointwise(child):
            # Without numbers of its own, which would change those that are drawn next.
            with torch.device("meta"):
                pointwise = PointwiseConv2d(child.in_channels, child.out_channels, child.stride[0])
            pointwise.weight = child.weight
            setattr(module, name, pointwise)
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


def _is_plain_pointwise(layer: nn.Conv2d) -> bool:
    return (
        layer.kernel_size == (1, 1)
        and layer.padding == (0, 0)
        and layer.groups == 1
        and layer.bias is None
        and layer.stride[0] == layer.stride[1]
    )
