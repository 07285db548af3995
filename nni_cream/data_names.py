"""The words a recipe has for its data: names of data sets, augmentation, fractions.

Plain values only: a recipe is checked with these before torch, timm or an image is touched. What they do is in
:mod:`nni_cream.data`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Final

DATA_SETS: Final = ("mnist5k", "digits", "elpv", "cifar10", "cifar100", "imagenet", "folder")


@dataclass(frozen=True)
class Augmentation:
    """How training images are varied: arguments of :func:`timm.data.create_transform`, by timm's own names.

    ``None`` means the data set's own default, so that digits, say, are not mirrored unless that is asked for.

    Attributes:
        scale: Smallest and largest share of the image's area that a random crop keeps, within (0, 1].
        ratio: Smallest and largest ratio of width to height of that crop.
        hflip: Probability of mirroring left to right.
        vflip: Probability of mirroring top to bottom.
        color_jitter: Strength with which brightness, contrast and saturation vary; 0 switches it off. Of four numbers
            each is the strength of one, the last of hue, which is a share of the circle of colours, up to 0.5.
        auto_augment: timm's policy string, such as ``rand-m9-mstd0.5``; timm then leaves out colour jitter, except
            beside a policy with ``3a`` in its name.
        interpolation: How images are resized: ``nearest``, ``bilinear``, ``bicubic``, ``box``, ``hamming``,
            ``lanczos``, or ``random`` (bilinear or bicubic). Evaluation resizes in the same way, and bilinearly where
            this is ``random``.
        re_prob: Probability of erasing a random rectangle.
        re_mode: What the rectangle is filled with: ``const`` (the mean), ``rand`` (one colour), ``pixel`` (noise).
        crop_padding: Pixels that are added on every side before a square of the full resolution is cut out, as is
            usual for CIFAR; in place of the crop by ``scale`` and ``ratio``.
        cutout: Side, in pixels, of a square set to the mean around a random point, which may lie at the edge
            (DeVries and Taylor, 2017).
    """

    scale: tuple[float, float] | None = None
    ratio: tuple[float, float] | None = None
    hflip: float | None = None
    vflip: float | None = None
    color_jitter: float | tuple[float, float, float, float] | None = None
    auto_augment: str | None = None
    interpolation: str | None = None
    re_prob: float | None = None
    re_mode: str | None = None
    crop_padding: int | None = None
    cutout: int | None = None

    def given(self) -> dict[str, Any]:
        """The fields that are set, as keyword arguments."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class Fractions:
    """How a data set is divided, each class in the same way.

    Attributes:
        test: Share of all images that is the test part; not read where a data set has a test part of its own.
        validation: Share of the images outside the test part that ranks the finished candidates; not read where a
            folder has both ``val/`` and ``test/``.
        architecture: Share of the images outside the test part that scores architectures during the search. What is
            left trains the weights.
    """

    test: float = 0.2
    validation: float = 0.1
    architecture: float = 0.1
