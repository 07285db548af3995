"""Averages over the steps of an epoch."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchmetrics import MeanMetric


class StepMean(MeanMetric):
    """The mean of a scalar over the steps so far; what is not finite, of a step that was left out, does not count.

    It is part of checkpoints, which may be of the middle of an epoch.
    """

    def __init__(self) -> None:
        super().__init__(nan_strategy="ignore")
        self.persistent(True)

    def update(self, value: Tensor | float, weight: Any = 1.0) -> None:
        """Take the value of a step."""
        if isinstance(value, Tensor):
            value = value.where(value.isfinite(), float("nan"))
        super().update(value, weight)
