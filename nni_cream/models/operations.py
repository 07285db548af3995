"""Operations that timm has no block for, and what the registers of operations share."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class AveragePool(nn.AvgPool2d):
    """An average pool, [N, C, H, W] to [N, C, H', W'], whose gradient is right on every device.

    With padding and channels last, torch's own on CUDA gives wrong gradients, without a word, in releases up to the
    middle of 2026 (pytorch/pytorch#188344).
    """

    def forward(self, features: Tensor) -> Tensor:
        """Average."""
        return super().forward(features if features.device.type == "cpu" else features.contiguous())


class DilConv(nn.Module):
    """ReLU, depthwise convolution with dilation 2, pointwise convolution, batch norm: ``dil_conv`` of DARTS.

    It sees 5×5 pixels with a kernel of 3, and 9×9 with one of 5: [N, in, H, W] to [N, out, H / stride, W / stride].
    There is no residual connection. Source: Liu et al., "DARTS", ICLR 2019, appendix A.1.1, and its published code.

    Args:
        in_channels: number of input channels.
        out_channels: number of output channels.
        kernel: kernel size, odd.
        stride: stride of the depthwise convolution.
        affine: whether the batch norm scales and shifts.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int, *, affine: bool = True) -> None:
        super().__init__()
        self.op = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(
                in_channels,
                in_channels,
                kernel,
                stride,
                padding=kernel - 1,
                dilation=2,
                groups=in_channels,
                bias=False,
            ),
            nn.Conv2d(in_channels, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels, affine=affine),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Apply the operation."""
        out: Tensor = self.op(features)
        return out


def defined_again(before: Any, now: Any) -> bool:
    """Tell whether a function takes the place of one that the same line of code has defined, as in a notebook."""
    names = [(getattr(f, "__module__", None), getattr(f, "__qualname__", f)) for f in (before, now)]
    return names[0] == names[1]
