"""Images for a search: found by name, divided into four disjoint parts, transformed.

>>> splits = load_data("mnist5k", resolution=28)
>>> len(splits.weights), len(splits.architecture), len(splits.validation), len(splits.test)
(3200, 400, 400, 1000)

A search trains the shared weights on ``weights``, chooses on ``architecture`` and ranks on ``validation``. It never
touches ``test``, which depends on no seed: whoever retrains, with whatever seed, tests on images that no search with
the same data set has trained on, as long as its ``Fractions.test`` is no larger than the search's.
"""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data.constants import DEFAULT_CROP_PCT
from timm.data.transforms import MaybeToTensor, RandomResizedCropAndInterpolation, str_to_interp_mode
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.transforms.functional import pil_modes_mapping

from nni_cream._data_sources import OF_FILES, STATISTICS, Images, Source, load_source
from nni_cream.cutout import Cutout
from nni_cream.data_names import DATA_SETS, Augmentation, Fractions
from nni_cream.errors import UserError
from nni_cream.randomness import seed_streams, streams_kept
from nni_cream.shards import Draw

__all__ = ["DATA_SETS", "Augmentation", "DataSplits", "Fractions", "LabelledImages", "load_data", "preparation"]

Transform = Callable[[Image.Image], Tensor]

_logger = logging.getLogger(__name__)

_TEST_SEED: Final = 20201029  # the day "Cream of the Crop" appeared; any constant would do
_SMALLEST_RESOLUTION: Final = 8
_SMALL_RESOLUTION: Final = 64
_DEFAULT_AUGMENTATION: Final = Augmentation()
_DEFAULT_FRACTIONS: Final = Fractions()
_INTERPOLATIONS: Final = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random")
_RE_MODES: Final = ("const", "rand", "pixel")


class _Crop(RandomResizedCropAndInterpolation):
    """timm's random crop of Pillow's images, by Pillow itself: torchvision's checks take as long as a small image."""

    def __call__(self, image: Image.Image) -> Image.Image:
        top, left, height, width = self.get_params(image, self.scale, self.ratio)
        several = isinstance(self.interpolation, (tuple, list))
        interpolation = random.choice(self.interpolation) if several else self.interpolation
        cropped = image.crop((left, top, left + width, top + height))
        return cropped.resize(self.size[::-1], pil_modes_mapping[interpolation])


# What only moves pixels, and so does the same in every channel.
_MOVING: Final = (
    _Crop,
    transforms.CenterCrop,
    transforms.RandomCrop,
    transforms.RandomHorizontalFlip,
    transforms.RandomVerticalFlip,
    transforms.Resize,
)

_PROBABILITY: Final = (lambda value: 0 <= value <= 1, "is a probability, from 0 to 1")
# What timm would take silently, or refuse only in the middle of an epoch. It knows its policies (auto_augment) itself.
_ALLOWED: Final[Mapping[str, tuple[Callable[[Any], bool], str]]] = {
    "scale": (lambda value: 0 < value[0] <= value[1] <= 1, "is a smallest and a largest share of the area, up to 1"),
    "ratio": (lambda value: 0 < value[0] <= value[1], "is a smallest and a largest ratio above 0"),
    "hflip": _PROBABILITY,
    "vflip": _PROBABILITY,
    "color_jitter": (
        lambda value: min(value) >= 0 and value[3:] <= (0.5,) if isinstance(value, tuple) else value >= 0,
        "is a strength, not below 0, or one each of brightness, contrast, saturation and hue, the last up to 0.5",
    ),
    "interpolation": (lambda value: value in _INTERPOLATIONS, f"is one of {', '.join(_INTERPOLATIONS)}"),
    "re_prob": _PROBABILITY,
    "re_mode": (lambda value: value in _RE_MODES, f"is one of {', '.join(_RE_MODES)}"),
    "crop_padding": (lambda value: value > 0, "is a number of pixels above 0"),
    "cutout": (lambda value: value > 0, "is a number of pixels above 0"),
}


# A *spawned* worker of a DataLoader unpickles its data set before anything else. This class makes it import nni_cream
# first, and with that the workaround without which torchvision cannot be imported beside a CPU build of torch
# (see nni_cream.compat). A bare torchvision data set would import torchvision first, and the worker would die.
class LabelledImages(Dataset[tuple[Tensor, int]]):
    """A part of a data set: RGB images, transformed, and their labels, in a shuffled but fixed order.

    An item is ``(image, label)``: float32 [3, R, R], normalised by the data set's mean and standard deviation, and the
    position of its class in :attr:`DataSplits.class_names`.
    """

    def __init__(self, images: Images, indices: NDArray[np.int64], transform: Transform) -> None:
        """Take the images at ``indices``, in that order."""
        self.images = images
        self.indices = indices
        self.transform = transform
        self._varies, self._normalises = _divided_transform(transform)
        self._in_grey = images.are_grey and self._normalises is not None and _only_moves(self._varies)

    @property
    def labels(self) -> NDArray[np.int64]:
        """Label of every item, int64 [len(self)], without opening an image."""
        return self.images.labels[self.indices]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        """The image and label at ``position``.

        That of a :class:`nni_cream.shards.Draw` is varied as its seed says, wherever it is loaded; any other, with the
        random numbers of the process.

        Raises:
            UserError: The image's file cannot be read.
        """
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[tuple[Tensor, int]]:
        """The images and labels at ``positions``; loaders ask for a whole batch."""
        seeded = any(isinstance(position, Draw) for position in positions)
        with streams_kept() if seeded else nullcontext():
            varied = [self._varied(position) for position in positions]
        pixels = varied if self._normalises is None else _tensors(varied, self._normalises)
        return list(zip(pixels, self.images.labels[self.indices[list(positions)]].tolist(), strict=True))

    def _varied(self, position: int) -> Any:
        if isinstance(position, Draw):
            seed_streams(position.seed)
        index = int(self.indices[position])
        return self._varies(self.images.grey(index) if self._in_grey else self.images.rgb(index))


def _divided_transform(
    transform: Transform,
) -> tuple[Callable[[Image.Image], Any], Callable[[Tensor], Tensor] | None]:
    """Return what is done to each image, and how the tensors made of them are normalised, if nothing else follows."""
    steps: list[Any] = getattr(transform, "transforms", [])
    if [type(step) for step in steps[-2:]] != [MaybeToTensor, transforms.Normalize]:
        return transform, None
    return transforms.Compose(steps[:-2]), steps[-1]


def _only_moves(transform: Any) -> bool:
    return all(type(step) in _MOVING for step in transform.transforms)


def _tensors(images: Sequence[Image.Image], normalises: Callable[[Tensor], Tensor]) -> Sequence[Tensor]:
    """Return what ``MaybeToTensor`` and the norm make of images, in RGB; one by one, it takes longer than all else."""
    pixels = torch.frombuffer(bytearray().join(image.tobytes() for image in images), dtype=torch.uint8)
    first = images[0]
    pixels = pixels.view(len(images), first.height, first.width, len(first.getbands())).permute(0, 3, 1, 2)
    scaled = pixels.to(torch.get_default_dtype(), memory_format=torch.contiguous_format).div(255)
    return normalises(scaled.expand(-1, 3, -1, -1)).unbind()


@dataclass(frozen=True, eq=False)
class DataSplits:
    """The four disjoint parts of a data set.

    Attributes:
        name: The data set.
        class_names: Name of each class; a label is a position in it.
        mean: Mean of each channel, subtracted from images in [0, 1].
        std: Standard deviation of each channel, by which the result is divided.
        licence: What the package that holds the images says of their use, or ``None`` if it says nothing.
        weights: Trains the shared weights; augmented.
        architecture: Scores architectures during the search.
        validation: Ranks the candidates at the end of a search.
        test: For a finished, retrained network only.
    """

    name: str
    class_names: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    licence: str | None
    weights: LabelledImages
    architecture: LabelledImages
    validation: LabelledImages
    test: LabelledImages

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def retraining_parts(self) -> tuple[LabelledImages, LabelledImages]:
        """What a found network is retrained on: ``weights`` with ``architecture``, augmented; and ``validation``."""
        indices = np.concatenate([self.weights.indices, self.architecture.indices])
        return LabelledImages(self.weights.images, indices, self.weights.transform), self.validation


def load_data(
    name: str,
    *,
    resolution: int,
    folder: str | Path | None = None,
    seed: int = 0,
    augmentation: Augmentation = _DEFAULT_AUGMENTATION,
    download: bool = False,
    fractions: Fractions = _DEFAULT_FRACTIONS,
) -> DataSplits:
    """Find a data set and divide it: stratified (each class in the same way), seeded, disjoint.

    A class of n images gives each part its fraction of n, rounded, and at least one image. The official test part of
    ``cifar10``, ``cifar100``, ``imagenet`` and of a folder with ``train/`` and ``test/`` (or ``val/``) is the test
    part; elsewhere it is cut off by a constant seed. A folder with all three gives ``val/`` as validation part.

    Args:
        name: One of :data:`DATA_SETS`.
        resolution: Height and width of the images, in pixels, at least 8.
        folder: Where ``cifar10``, ``cifar100`` (default ``data``), ``imagenet`` and ``folder`` are; for no other.
        seed: Which images outside the test part go where, in [0, 2**32).
        augmentation: How the images of ``weights`` vary.
        download: Let torchvision fetch ``cifar10`` or ``cifar100`` into ``folder``; for no other.
        fractions: The size of the parts.

    Raises:
        UserError: The data set is unknown, missing, damaged or too small, or an argument is out of its range.
    """
    if resolution < _SMALLEST_RESOLUTION:
        raise UserError(f"resolution must be at least {_SMALLEST_RESOLUTION} pixels, got {resolution}.")
    if not 0 <= seed < 2**32:
        raise UserError(f"the seed must be at least 0 and below 2**32, got {seed}.")
    _check_fractions(fractions)
    _check_augmentation(augmentation)
    source = load_source(name, None if folder is None else Path(folder), download)
    if source.licence is not None:
        _logger.info("data set %r: %s", source.name, source.licence)
    training, evaluation = _transforms(source, augmentation, resolution)
    parts = _divided(source, fractions, seed)
    mean, std = STATISTICS[source.name]
    return DataSplits(
        name=source.name,
        class_names=source.class_names,
        mean=mean,
        std=std,
        licence=source.licence,
        weights=LabelledImages(*parts["weights"], training),
        architecture=LabelledImages(*parts["architecture"], evaluation),
        validation=LabelledImages(*parts["validation"], evaluation),
        test=LabelledImages(*parts["test"], evaluation),
    )


def _divided(source: Source, fractions: Fractions, seed: int) -> dict[str, tuple[Images, NDArray[np.int64]]]:
    """The images and indices of each part."""
    _check_counts(source)
    pool, rest = source.pool, np.arange(len(source.pool.labels))
    # First the test part, by a constant seed: no seed of a search or a retraining moves an image into or out of it.
    if source.test is None:
        test, rest = _cut(pool.labels, rest, [fractions.test], _TEST_SEED)
    else:
        test = _shuffled(source.test, _TEST_SEED)
    if source.validation is None:
        shares = [fractions.validation, fractions.architecture]
        validation, architecture, weights = _cut(pool.labels, rest, shares, seed)
    else:
        validation = _shuffled(source.validation, seed)
        architecture, weights = _cut(pool.labels, rest, [fractions.architecture], seed)
    return {
        "weights": (pool, weights),
        "architecture": (pool, architecture),
        "validation": (source.validation or pool, validation),
        "test": (source.test or pool, test),
    }


def _cut(
    labels: NDArray[np.int64], indices: NDArray[np.int64], shares: Sequence[float], seed: int
) -> list[NDArray[np.int64]]:
    """``indices`` divided into a part for each share and one of what is left, each class in the same way.

    scikit-learn's stratified split would not do: it may leave a part without an image of a small class.
    """
    # Not numpy's newer Generator: only RandomState's numbers are promised never to change (NEP 19), and the test part
    # has to outlive versions of numpy. What is drawn does not depend on the shares, so a smaller test part lies within
    # a larger one.
    random = np.random.RandomState(seed)
    parts: list[list[NDArray[np.int64]]] = [[] for _ in range(len(shares) + 1)]
    for label in np.unique(labels[indices]):
        members = random.permutation(indices[labels[indices] == label])
        total = len(members)
        for position, share in enumerate(shares):
            # At least one image for this part and for each part after it.
            size = min(max(1, round(share * total)), len(members) - (len(shares) - position))
            parts[position].append(members[:size])
            members = members[size:]
        parts[-1].append(members)
    # Shuffled, because a first batch of one class would mislead whoever looks only at the first batch.
    return [random.permutation(np.concatenate(part)) for part in parts]


def _shuffled(images: Images, seed: int) -> NDArray[np.int64]:
    return np.random.RandomState(seed).permutation(len(images.labels))


def _check_counts(source: Source) -> None:
    cut_off = [part for part in ("validation", "test") if getattr(source, part) is None]
    parts = ["weights", "architecture", *cut_off]
    counts = np.bincount(source.pool.labels, minlength=len(source.class_names))
    for name, count in zip(source.class_names, counts.tolist(), strict=True):
        if count < len(parts):
            raise UserError(
                f"class {name!r} has {count} image{'s' * (count != 1)} to divide and needs at least {len(parts)}, "
                f"one for each part: {', '.join(parts)}."
            )


def _check_fractions(fractions: Fractions) -> None:
    for name in ("test", "validation", "architecture"):
        value = getattr(fractions, name)
        if not 0 < value < 1:
            raise UserError(f"fractions.{name} must be above 0 and below 1, got {value}.")
    if fractions.validation + fractions.architecture >= 1:
        raise UserError(
            f"fractions.validation and fractions.architecture must add up to less than 1, so that images are left to "
            f"train the weights, got {fractions.validation} and {fractions.architecture}."
        )


def _transforms(source: Source, augmentation: Augmentation, resolution: int) -> tuple[Transform, Transform]:
    """The training and the evaluation transform."""
    arguments = source.augmentation.given() | augmentation.given()
    padding, cutout = arguments.pop("crop_padding", None), arguments.pop("cutout", None)
    for name, pixels in (("crop_padding", padding), ("cutout", cutout)):
        if pixels is not None and pixels >= resolution:
            raise UserError(
                f"augmentation.{name}={pixels} could leave nothing of an image of {resolution} pixels; it must be "
                "smaller than that."
            )
    prepared = preparation(source.name, resolution, arguments.get("interpolation"))
    common = {name: prepared[name] for name in ("input_size", "mean", "std")}
    try:
        training = create_transform(**common, is_training=True, **arguments)
    except (AssertionError, KeyError, ValueError) as error:
        # All other arguments are checked by now.
        raise UserError(f"timm knows no policy augmentation.auto_augment={augmentation.auto_augment!r}.") from error
    if padding is not None:
        # In place of timm's first step, the random crop that changes the size of things. Of an image that is not square
        # the middle is taken, as for evaluation: resized to a square, all things in it would have other proportions.
        resize = transforms.Resize(resolution, str_to_interp_mode(prepared["interpolation"]))
        crops = transforms.CenterCrop(resolution), transforms.RandomCrop(resolution, padding)
        training = transforms.Compose([resize, *crops, *training.transforms[1:]])
    # timm's way not to vary colours does nothing, slowly.
    steps = [_as_fast(step) for step in training.transforms if not _keeps_colours(step)]
    training = transforms.Compose(steps)
    if cutout is not None:
        training = transforms.Compose([*training.transforms, Cutout(cutout)])
    return training, create_transform(**prepared)


def _as_fast(step: Any) -> Any:
    if type(step) is not RandomResizedCropAndInterpolation:
        return step
    crop = _Crop(step.size, step.scale, step.ratio)
    crop.interpolation = step.interpolation
    return crop


def _keeps_colours(step: Any) -> bool:
    strengths = ("brightness", "contrast", "saturation", "hue")
    return isinstance(step, transforms.ColorJitter) and all(getattr(step, name) is None for name in strengths)


def preparation(name: str, resolution: int, interpolation: str | None = None) -> dict[str, Any]:
    """Return how images of a data set are prepared to be measured on: arguments of ``timm.data.create_transform``.

    Args:
        name: One of :data:`DATA_SETS`.
        resolution: Height and width, in pixels.
        interpolation: As in :class:`Augmentation`.
    """
    mean, std = STATISTICS[name]
    return {
        "input_size": (3, resolution, resolution),
        "interpolation": "bilinear" if interpolation in (None, "random") else interpolation,
        "mean": mean,
        "std": std,
        # A small image has no margin to give away.
        "crop_pct": DEFAULT_CROP_PCT if name in OF_FILES and resolution > _SMALL_RESOLUTION else 1.0,
    }


def _check_augmentation(augmentation: Augmentation) -> None:
    for name, value in augmentation.given().items():
        if name in _ALLOWED:
            allowed, sentence = _ALLOWED[name]
            if not allowed(value):
                raise UserError(f"augmentation.{name} {sentence}, got {value!r}.")
    if augmentation.crop_padding is not None and (augmentation.scale or augmentation.ratio):
        raise UserError(
            f"augmentation.crop_padding={augmentation.crop_padding} takes the place of the crop by augmentation.scale "
            "and augmentation.ratio; give one or the other."
        )
    if augmentation.re_mode is not None and not augmentation.re_prob:
        raise UserError(f"augmentation.re_mode={augmentation.re_mode} has no effect while augmentation.re_prob is 0.")
    policy, *sections = (augmentation.auto_augment or "").split("-")
    for section in sections:
        # timm passes over a section in which it finds no number.
        if not re.fullmatch(r"[a-z]+[0-9].*", section):
            raise UserError(
                f"augmentation.auto_augment={augmentation.auto_augment!r} has the section {section!r}; a section of "
                f"the policy {policy!r} is a word and a number, such as m9."
            )
    if augmentation.color_jitter and augmentation.auto_augment and "3a" not in augmentation.auto_augment:
        raise UserError(
            f"augmentation.color_jitter={augmentation.color_jitter} has no effect beside "
            f"augmentation.auto_augment={augmentation.auto_augment}, for which timm leaves colour jitter out."
        )
