"""Cutout, which torchvision and timm do not have: their random erasing never reaches over an image's edge.

Source: DeVries and Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout", 2017.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Cutout(nn.Module):
    """Set a square to 0, the mean of a normalised image, around a random pixel; outside the image there is nothing.

    Args:
        size: side of the square, in pixels.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, image: Tensor) -> Tensor:
        """Return a copy of ``image``, [C, H, W], with a hole."""
        slices = []
        for length in image.shape[-2:]:
            first = int(torch.randint(length, ())) - self.size // 2
            slices.append(slice(max(0, first), max(0, first + self.size)))
        cut = image.clone()
        cut[:, slices[0], slices[1]] = 0
        return cut
