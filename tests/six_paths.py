"""A small model space for Cream."""

from __future__ import annotations

import nni.nas.nn.pytorch as nas
from torch import Tensor, nn

CLASSES = 3


class SixPaths(nas.ModelSpace):
    """Six paths through two choices, with batch norms inside and outside of them."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        self.first = nas.LayerChoice([self.candidate(4, kernel) for kernel in (1, 3, 5)], label="first")
        self.second = nas.LayerChoice([self.candidate(6, kernel) for kernel in (1, 3)], label="second")
        self.head = nn.Linear(6, classes)

    @staticmethod
    def candidate(channels: int, kernel: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(4, channels, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(channels), nn.Softplus()
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.second(self.first(self.stem(images))).mean((2, 3)))
