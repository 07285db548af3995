"""The operations of DARTS cells, for the search and for the networks that are trained afterwards.

Source: Liu et al., "DARTS: Differentiable Architecture Search", ICLR 2019, section 3.1, and its published code.
Convolutions have no bias. Every operation maps [N, C, H, W] to [N, C, H / stride, W / stride].
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn

from nni_cream.errors import UserError
from nni_cream.models.operations import AveragePool, DilConv, defined_again
from nni_cream.supernet.depthwise import with_explicit_derivatives

# What builds an operation, of (channels, stride, affine).
Builder = Callable[[int, int, bool], Any]

_CHECKED_CHANNELS: Final = 16


class ReLUConvBN(nn.Module):
    """ReLU, convolution (1×1 as a rule), batch norm; it brings the inputs of a cell to the cell's channels."""

    def __init__(self, in_channels: int, out_channels: int, *, affine: bool) -> None:
        super().__init__()
        self.op = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(in_channels, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels, affine=affine),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Apply the operation."""
        out: Tensor = self.op(features)
        return out


class FactorizedReduce(nn.Module):
    """Half the height and width by two 1×1 convolutions of stride 2, the second one pixel further down and right.

    They are of stride 1 and are given every second pixel: with fewer than 8 input channels in ``channels_last``, on a
    CPU, the gradient of the weights of a 1×1 convolution of stride 2 overwrites other memory in torch 2.13.

    Raises:
        UserError: if the number of output channels is odd: each convolution makes half of them.
    """

    def __init__(self, in_channels: int, out_channels: int, *, affine: bool) -> None:
        super().__init__()
        if out_channels % 2:
            raise UserError(f"A reduction in DARTS needs an even number of channels, not {out_channels}.")
        self.relu = nn.ReLU()
        self.conv_1 = nn.Conv2d(in_channels, out_channels // 2, 1, bias=False)
        self.conv_2 = nn.Conv2d(in_channels, out_channels // 2, 1, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, affine=affine)

    def forward(self, features: Tensor) -> Tensor:
        """Apply the operation.

        Raises:
            UserError: if the height or width is odd: the two convolutions would disagree about half of it.
        """
        height, width = features.shape[-2:]
        if height % 2 or width % 2:
            raise UserError(
                f"A reduction in DARTS needs an even height and width, not {height} × {width}; choose images whose "
                "sides can be halved at every reduction, such as multiples of 32 pixels."
            )
        active = self.relu(features)
        halves = [self.conv_1(active[:, :, ::2, ::2]), self.conv_2(active[:, :, 1::2, 1::2])]
        out: Tensor = self.bn(torch.cat(halves, dim=1))
        return out


class SepConv(nn.Module):
    """Depthwise-separable convolution, twice; only the first has the stride."""

    def __init__(self, channels: int, kernel: int, stride: int, *, affine: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for step in (stride, 1):
            layers += [
                nn.ReLU(),
                nn.Conv2d(channels, channels, kernel, step, padding=kernel // 2, groups=channels, bias=False),
                nn.Conv2d(channels, channels, 1, bias=False),
                nn.BatchNorm2d(channels, affine=affine),
            ]
        self.op = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        """Apply the operation."""
        out: Tensor = self.op(features)
        return out


class FactorizedConv7(nn.Module):
    """ReLU, 1×7 and 7×1 convolution, batch norm: ``conv_7x1_1x7`` of AmoebaNet."""

    def __init__(self, channels: int, stride: int, *, affine: bool) -> None:
        super().__init__()
        self.op = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, channels, (1, 7), stride=(1, stride), padding=(0, 3), bias=False),
            nn.Conv2d(channels, channels, (7, 1), stride=(stride, 1), padding=(3, 0), bias=False),
            nn.BatchNorm2d(channels, affine=affine),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Apply the operation."""
        out: Tensor = self.op(features)
        return out


class Zero(nn.Module):
    """``none``: zeros, of every second pixel where the stride is 2."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, features: Tensor) -> Tensor:
        """Apply the operation."""
        return features[:, :, :: self.stride, :: self.stride] * 0.0


def _pool(kind: str) -> Builder:
    def build(_channels: int, stride: int, _affine: bool) -> nn.Module:
        if kind == "max":
            return nn.MaxPool2d(3, stride, padding=1)
        return AveragePool(3, stride, padding=1, count_include_pad=False)

    return build


def _sep_conv(kernel: int) -> Builder:
    return lambda channels, stride, affine: SepConv(channels, kernel, stride, affine=affine)


def _dil_conv(kernel: int) -> Builder:
    return lambda channels, stride, affine: DilConv(channels, channels, kernel, stride, affine=affine)


def _skip(channels: int, stride: int, affine: bool) -> nn.Module:
    return nn.Identity() if stride == 1 else FactorizedReduce(channels, channels, affine=affine)


_BUILDERS: Final[dict[str, Builder]] = {
    "none": lambda _channels, stride, _affine: Zero(stride),
    "max_pool_3x3": _pool("max"),
    "avg_pool_3x3": _pool("avg"),
    "skip_connect": _skip,
    "sep_conv_3x3": _sep_conv(3),
    "sep_conv_5x5": _sep_conv(5),
    "sep_conv_7x7": _sep_conv(7),
    "dil_conv_3x3": _dil_conv(3),
    "dil_conv_5x5": _dil_conv(5),
    "conv_7x1_1x7": lambda channels, stride, affine: FactorizedConv7(channels, stride, affine=affine),
}

# What comes with the package, and what the paper searches among, in the order of the columns of α.
OPERATIONS: Final = tuple(_BUILDERS)
PAPER_OPERATIONS: Final = tuple(name for name in OPERATIONS if name not in ("sep_conv_7x7", "conv_7x1_1x7"))


def register_edge_operation(name: str) -> Callable[[Builder], Builder]:
    """Let genotypes and spaces name an operation of your own: a decorator for the function that builds it.

    The function takes (channels, stride, affine) and returns a module that maps [N, C, H, W] to [N, C, H / stride,
    W / stride] and leaves its input as it is, because other edges read it too. Without ``affine``, as in a search, its
    batch norms must not scale or shift. Exact second-order gradients differentiate it twice.

    Args:
        name: what genotypes and the setting ``space.operations`` call it. A function that is defined once more, as in
            a notebook, takes its own place.

    Raises:
        UserError: if the name is taken or no identifier, or, when the function is decorated, if what it builds is not
            as described.
    """
    if not name.isidentifier():
        raise UserError(f"An operation cannot be called {name!r}; a name such as conv_3x3 is expected.")

    def register(builder: Builder) -> Builder:
        if name in _BUILDERS and not defined_again(_BUILDERS[name], builder):
            raise UserError(f"There is an operation {name!r} already; give yours another name.")
        _check(name, builder)
        _BUILDERS[name] = builder
        return builder

    return register


def _check(name: str, builder: Builder) -> None:
    for stride, affine in itertools.product((1, 2), (False, True)):
        with torch.device("meta"):
            operation = builder(_CHECKED_CHANNELS, stride, affine)
            features = torch.empty(2, _CHECKED_CHANNELS, 8, 8)
        norms = [module for module in operation.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        if not affine and any(norm.affine for norm in norms):
            raise UserError(f"A batch norm of the operation {name!r} scales and shifts although affine is False.")
        version = features._version
        made, expected = tuple(operation(features).shape), (2, _CHECKED_CHANNELS, 8 // stride, 8 // stride)
        if made != expected:
            raise UserError(
                f"The operation {name!r} makes {list(made)} of {list(features.shape)} at stride {stride}, but an edge "
                f"needs {list(expected)}."
            )
        if features._version != version:
            raise UserError(f"The operation {name!r} changes its input in place, which other edges read as well.")


def build_operation(name: str, channels: int, stride: int, *, affine: bool) -> nn.Module:
    """Build an operation of a trained network.

    Args:
        name: one of :data:`OPERATIONS`, or one of your own (:func:`register_edge_operation`).
        channels: number of channels, C.
        stride: 1 or 2.
        affine: whether its batch norms scale and shift.

    Raises:
        UserError: if there is no such operation.
    """
    if name not in _BUILDERS:
        raise UserError(
            f"There is no operation {name!r} in DARTS; there are {', '.join(_BUILDERS)}, and those registered by a "
            "file that --import names."
        )
    operation: nn.Module = _BUILDERS[name](channels, stride, affine)
    for module in operation.modules():
        # Of a registered operation. In its place, so that whatever else was made of the module goes on to hold.
        if type(module) is nn.AvgPool2d:
            module.__class__ = AveragePool
    return operation


def build_searched(name: str, channels: int, stride: int) -> nn.Module:
    """Build an operation as a search leaves it: no batch norm scales or shifts, and every pool is followed by one.

    Raises:
        UserError: as :func:`build_operation`.
    """
    operation = build_operation(name, channels, stride, affine=False)
    if isinstance(operation, nn.MaxPool2d | nn.AvgPool2d):
        return nn.Sequential(operation, nn.BatchNorm2d(channels, affine=False))
    return operation


def build_candidate(name: str, channels: int, stride: int) -> nn.Module:
    """Build an operation of a search network: as :func:`build_searched`, for derivatives of any order.

    Raises:
        UserError: as :func:`build_operation`.
    """
    return with_explicit_derivatives(build_searched(name, channels, stride))
