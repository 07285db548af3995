"""A depthwise convolution whose first and second derivatives are depthwise convolutions as well.

PyTorch's backward of larger and of dilated depthwise convolutions is slow on a CPU, and its second derivative of a
grouped convolution loops over the groups. But a convolution is bilinear, and so are its gradients: all derivatives, of
any order and in either mode, are one of the three forms of :mod:`nni_cream.supernet.depthwise_forms`, with exchanged
roles. ``docs/darts.md`` and ``docs/performance.md`` have what that gains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nni_cream.differentiation import leaves_out_weights
from nni_cream.supernet import depthwise_forms as forms
from nni_cream.supernet.depthwise_forms import Geometry, Pair

# Measured on an AMD EPYC (AVX2): up to so many pixels an image products are faster than 1×1 convolutions, both ways.
_FEW_PIXELS: Final = 64


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

    compute = staticmethod(forms.convolve)

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
        return _bilinear_tangent(forms.convolve, ctx, tangents)


class _InputGradient(_Form):
    """(gradient of the output, weight) to gradient of the input."""

    compute = staticmethod(forms.input_gradient)

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
        return _bilinear_tangent(forms.input_gradient, ctx, tangents)


class _WeightGradient(_Form):
    """(input, gradient of the output) to gradient of the weight."""

    compute = staticmethod(forms.weight_gradient)

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
        return _bilinear_tangent(forms.weight_gradient, ctx, tangents)


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
    """A 1×1 convolution, [N, in, H, W] to [N, out, H', W']: a product of matrices where that is faster.

    That is on a GPU, where all derivatives of a product are products, while torch computes the second derivative of a
    convolution by convolving images with images; and for few pixels, channels last, on a CPU, where a convolution
    rearranges its weights first.

    Args:
        in_channels: number of input channels.
        out_channels: number of output channels.
        stride: of the convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """Convolve."""
        few = features.shape[2] * features.shape[3] <= _FEW_PIXELS
        if features.is_cuda or (few and features.is_contiguous(memory_format=torch.channels_last)):
            return self.as_product(features)
        # Without a stride: with one, and fewer than 8 input channels in channels_last, the gradient of the weights
        # overwrites other memory in torch 2.13 on CPUs.
        return F.conv2d(self._seen(features), self.weight, self.bias)

    def as_product(self, features: Tensor) -> Tensor:
        """Convolve by a product of matrices."""
        pixels = self._seen(features).permute(0, 2, 3, 1)
        return F.linear(pixels, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)

    def _seen(self, features: Tensor) -> Tensor:
        down, right = self.stride
        return features[:, :, ::down, ::right]


def with_explicit_derivatives(module: nn.Module) -> nn.Module:
    """Let convolutions whose derivatives torch computes slowly be of the classes here; all else about them stays.

    Depthwise ones become :class:`DepthwiseConv2d`, and 1×1 ones :class:`PointwiseConv2d`. Left as they are: depthwise
    ones with a bias, a rectangular kernel, or padding other than a number of zeros, and 1×1 ones with padding.
    """
    for layer in module.modules():
        if type(layer) is nn.Conv2d:
            if _is_plain_depthwise(layer):
                layer.__class__ = DepthwiseConv2d
            elif _is_plain_pointwise(layer):
                layer.__class__ = PointwiseConv2d
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
    return layer.kernel_size == (1, 1) and layer.padding == (0, 0) and layer.groups == 1
