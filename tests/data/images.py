"""What the tests of data share: folders of images, and what is in the parts of a data set."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nni_cream.data import DataSplits, LabelledImages

PARTS = ("weights", "architecture", "validation", "test")


def write_images(root: Path, counts: dict[str, int], size: int = 12) -> Path:
    """A folder of class folders; the images of class number k are k * 40 bright, those within a class the same."""
    for number, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (size, size), (number * 40,) * 3).save(root / name / f"{index:03}.png")
    return root


def members(splits: DataSplits) -> list[set[int]]:
    return [set(getattr(splits, part).indices.tolist()) for part in PARTS]


def per_class(part: LabelledImages, num_classes: int) -> np.ndarray[Any, Any]:
    return np.bincount(part.labels, minlength=num_classes)


def drawn(part: LabelledImages, positions: range, seed: int = 0) -> Tensor:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return torch.stack([part[position][0] for position in positions])
