"""Images that stay on the device that computes with them, as one tensor, and are varied there.

Nothing is decoded, resized or copied in a step then. That is possible where all images fit, and where varying one only
moves its pixels or blots some out: cropping after padding, mirroring, cutout, as the papers do with CIFAR-10. An image
is the same as one that a worker loads, to the last bit, if it is moved the same way; which way is another draw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data.transforms import MaybeToTensor
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms

from nni_cream.cutout import Cutout
from nni_cream.data import LabelledImages
from nni_cream.shards import Draw

LARGEST: Final = 2**30  # bytes

_FIXED: Final = (transforms.Resize, transforms.CenterCrop, transforms.Normalize, MaybeToTensor)

# Increment and multipliers of SplitMix64 (Steele et al., "Fast Splittable Pseudorandom Number Generators", 2014).
_GAMMA: Final = np.uint64(0x9E3779B97F4A7C15)
_MIX: Final = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)))
_LAST_SHIFT: Final = np.uint64(31)


@dataclass(frozen=True)
class Variation:
    """How the pixels of an image move.

    Attributes:
        padding: pixels of black that are added on every side before a square of the old size is cut out.
        hflip: probability of mirroring left to right.
        vflip: probability of mirroring top to bottom.
        cutout: side of the square that is blotted out, in pixels; 0 for none.
    """

    padding: int = 0
    hflip: float = 0.0
    vflip: float = 0.0
    cutout: int = 0


class ResidentImages(Dataset[Any]):
    """The batches of a part of a data set, from one tensor.

    Args:
        source: the part.
        variation: how its images vary.
        fixed: what all images go through, PIL image to float32 [3, R, R].
        device: where they stay.
    """

    def __init__(
        self,
        source: LabelledImages,
        variation: Variation,
        fixed: Callable[[Image.Image], Tensor],
        device: torch.device,
    ) -> None:
        self.source = source
        self.variation = variation
        self._fixed = fixed
        self._device = device
        self._loaded: tuple[Tensor, Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor]:
        """Return one image and its label, likewise."""
        pixels, labels = self.__getitems__([position])
        return pixels[0], labels[0]

    def __getitems__(self, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return images, float32 [N, 3, R, R], and labels, int64 [N], at ``positions``.

        Raises:
            UserError: in the first call, if the file of an image cannot be read.
        """
        pixels, labels, black = self._load()
        chosen = torch.tensor(positions, device=self._device)
        found = pixels[chosen]
        if self.variation != Variation():
            found = self._varied(found, _seeds(positions), black)
        return found, labels[chosen]

    def _load(self) -> tuple[Tensor, Tensor, Tensor]:
        if self._loaded is None:
            # Lightning validates in inference mode, whose tensors no gradient goes through.
            with torch.inference_mode(False):
                parts = [self._fixed(self.source.images.rgb(int(index))) for index in self.source.indices]
                pixels = torch.stack(parts)
                black = self._fixed(Image.new("RGB", (pixels.shape[3], pixels.shape[2])))[:, 0, 0]
                labels = torch.from_numpy(self.source.labels)
                self._loaded = (pixels.to(self._device), labels.to(self._device), black.to(self._device))
        return self._loaded

    def _varied(self, pixels: Tensor, seeds: NDArray[np.uint64], black: Tensor) -> Tensor:
        number, channels, height, width = pixels.shape
        draws = [torch.from_numpy(_uniform(seeds, which)).to(self._device) for which in range(6)]
        margin = self.variation.padding
        rows, columns = (
            _moved(length, (draws[i] * (2 * margin + 1)).long(), draws[i + 2] < probability)
            for i, (length, probability) in enumerate(
                ((height, self.variation.vflip), (width, self.variation.hflip)),
            )
        )
        if margin:
            framed = black.view(-1, 1, 1).expand(number, channels, height + 2 * margin, width + 2 * margin).clone()
            framed[:, :, margin:-margin, margin:-margin] = pixels
            pixels = framed
        which = torch.arange(number, device=self._device)
        pixels = pixels[which[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        if self.variation.cutout:
            tall, wide = (
                _covered(length, (draws[4 + i] * length).long(), self.variation.cutout)
                for i, length in enumerate((height, width))
            )
            pixels = pixels.masked_fill((tall[:, :, None] & wide[:, None, :])[:, None], 0.0)
        return pixels.contiguous()


def _moved(length: int, first: Tensor, mirrored: Tensor) -> Tensor:
    """Return which rows (or columns) of the padded images are cut out, [N, length], from ``first`` on."""
    steps = torch.arange(length, device=first.device).expand(len(first), length)
    return first[:, None] + torch.where(mirrored[:, None], length - 1 - steps, steps)


def _covered(length: int, centre: Tensor, size: int) -> Tensor:
    """Return which rows (or columns) a square of ``size`` around ``centre`` covers, bool [N, length]."""
    steps = torch.arange(length, device=centre.device)
    first = (centre - size // 2)[:, None]
    return (steps >= first) & (steps < first + size)


def _seeds(positions: Sequence[int]) -> NDArray[np.uint64]:
    given = [p.seed if isinstance(p, Draw) else int(torch.randint(2**63 - 1, ())) for p in positions]
    return np.array(given, dtype=np.uint64)


def _uniform(seeds: NDArray[np.uint64], which: int) -> NDArray[np.float64]:
    """Return the draw number ``which`` of every seed, uniform in [0, 1)."""
    with np.errstate(over="ignore"):
        mixed = seeds + np.uint64(which + 1) * _GAMMA
        for shift, factor in _MIX:
            mixed = (mixed ^ (mixed >> shift)) * factor
    mixed ^= mixed >> _LAST_SHIFT
    return (mixed >> np.uint64(11)).astype(np.float64) / 2**53


def as_resident(images: LabelledImages, resolution: int, device: torch.device) -> ResidentImages | None:
    """Return ``images`` as one tensor on ``device``; None if they do not fit, or vary in another way.

    Args:
        images: a part of a data set.
        resolution: height and width of its images, in pixels.
        device: where they are computed with.
    """
    steps = getattr(images.transform, "transforms", None)
    if steps is None or len(images) * 3 * resolution**2 * 4 > LARGEST:
        return None
    found: dict[str, Any] = {}
    fixed = []
    for position, step in enumerate(steps):
        if isinstance(step, transforms.RandomCrop):
            if "hflip" in found or "vflip" in found or not _pads_with_black(step, resolution):
                return None
            found["padding"] = step.padding
        elif isinstance(step, transforms.RandomHorizontalFlip):
            found["hflip"] = step.p
        elif isinstance(step, transforms.RandomVerticalFlip):
            found["vflip"] = step.p
        elif isinstance(step, Cutout) and position == len(steps) - 1:
            found["cutout"] = step.size
        elif type(step) not in _FIXED:
            return None
        else:
            fixed.append(step)
    return ResidentImages(images, Variation(**found), transforms.Compose(fixed), device)


def _pads_with_black(step: Any, resolution: int) -> bool:
    plain = step.padding_mode == "constant" and step.fill == 0 and not step.pad_if_needed
    return plain and isinstance(step.padding, int) and tuple(step.size) == (resolution, resolution)
