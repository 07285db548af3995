"""subImageNet: the small part of ImageNet that belongs to Peng et al., "Cream of the Crop" (NeurIPS 2020).

It is the first 100 classes of ImageNet by name, with 250 training and 50 validation images each, all of them from
ImageNet's ``train/``. The published generator copies the first 350 files of each class into one folder and leaves it
at that. Here the first 250 files of a class, by name, go to ``train/<class>/`` and the next 50 to ``val/<class>/``,
which is the layout that the data sets ``imagenet`` and ``folder`` read.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import os
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, Literal, NamedTuple

from nni_cream.errors import UserError
from nni_cream.folders import resolved

Mode = Literal["symlink", "copy", "hardlink"]

CLASSES: Final = 100
TRAIN_IMAGES: Final = 250
VAL_IMAGES: Final = 50
# Those of torchvision.datasets.folder, whose import takes seconds.
IMG_EXTENSIONS: Final = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


class _Image(NamedTuple):
    """A row of the listing: where an image goes, and the file that it comes from."""

    part: str
    class_name: str
    file: str
    source: Path


def make_subimagenet(
    source: Path,
    destination: Path,
    *,
    classes: int = CLASSES,
    train_images: int = TRAIN_IMAGES,
    val_images: int = VAL_IMAGES,
    mode: Mode = "symlink",
) -> Path:
    """Make subImageNet out of ImageNet, whole or not at all; ``source`` is only read.

    Args:
        source: ImageNet's folder, in which ``train/`` holds the class folders.
        destination: A folder that does not exist yet, or is empty.
        classes: Number of classes, the first by name.
        train_images: Training images of each class, its first files by name.
        val_images: Validation images of each class, the files after those.
        mode: Whether an image becomes an absolute symbolic link to its original, a copy, or a hard link.

    Returns:
        The absolute path of ``listing.csv`` in ``destination``: ``part,class,file,source`` of every image, ordered by
        part, class and file.

    Raises:
        UserError: An argument is not possible, ``source`` has too little, or a folder cannot be read or written.
    """
    for option, number in (("classes", classes), ("train-images", train_images), ("val-images", val_images)):
        if number < 1:
            raise UserError(f"--{option} must be at least 1, got {number}.")
    root, destination = resolved(source), resolved(destination)
    try:
        images = _choose(root, classes, train_images, val_images)
        _refuse_taken(destination, root / "train")
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}.") from error
    _build(destination, images, mode)
    return destination / "listing.csv"


def _choose(root: Path, classes: int, train_images: int, val_images: int) -> list[_Image]:
    """The images that are taken, in the order of the listing."""
    train = root / "train"
    if not root.is_dir():
        raise UserError(f"ImageNet's folder {root} {'is not a folder' if root.exists() else 'does not exist'}.")
    if not train.is_dir():
        raise UserError(f"{root} holds no train/, the folder of ImageNet's class folders.")
    with os.scandir(train) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    if len(names) < classes:
        raise UserError(f"{train} holds {_counted(len(names), 'class folder')}, and {classes} are needed.")
    files = {name: _image_files(train / name) for name in names[:classes]}
    needed = train_images + val_images
    for name, found in files.items():
        if len(found) < needed:
            raise UserError(
                f"class folder {train / name} holds {_counted(len(found), 'image')}, and {needed} are needed, "
                f"{train_images} to train and {val_images} to validate."
            )
    return [
        _Image(part, name, file, train / name / file)
        for part, cut in (("train", slice(train_images)), ("val", slice(train_images, needed)))
        for name, found in files.items()
        for file in found[cut]
    ]


def _image_files(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(
            entry.name
            for entry in entries
            if entry.name.lower().endswith(IMG_EXTENSIONS) and not entry.name.startswith(".") and entry.is_file()
        )


def _refuse_taken(destination: Path, train: Path) -> None:
    if destination.is_relative_to(train.resolve()):
        raise UserError(f"{destination} lies in {train}, where nothing is written; choose a folder elsewhere.")
    if destination.exists() and not (destination.is_dir() and next(destination.iterdir(), None) is None):
        raise UserError(f"{destination} already exists, and nothing is overwritten; choose a new folder.")
    # What is finished gets its name by a rename, which a mount point does not allow.
    if os.path.ismount(destination):
        raise UserError(f"{destination} is a mount point; choose a folder in it.")


def _build(destination: Path, images: Sequence[_Image], mode: Mode) -> None:
    """Make ``destination`` under another name, and rename it at the end."""
    # Not tempfile's: its folders, and so what they become, nobody but their owner may read.
    temporary = destination.with_name(f".{destination.name}.{uuid.uuid4().hex}")
    missing = [folder for folder in destination.parents if not folder.exists()]
    try:
        for image in images:
            target = temporary / image.part / image.class_name / image.file
            target.parent.mkdir(parents=True, exist_ok=True)
            _place(image.source, target, mode, destination)
        _write_listing(temporary / "listing.csv", images)
        # Fails if a file, or a folder that is not empty, has come to be there meanwhile.
        temporary.rename(destination)
    except OSError as error:
        raise UserError(f"{destination} cannot be made: {error.strerror}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for folder in missing:
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()


def _place(source: Path, target: Path, mode: Mode, destination: Path) -> None:
    try:
        _PLACE[mode](source, target)
    except OSError as error:
        if mode == "hardlink" and error.errno == errno.EXDEV:
            raise UserError(
                f"{source} and {destination} are on different file systems, between which there are no hard links; "
                "take --mode symlink or --mode copy."
            ) from error
        raise UserError(f"{destination} cannot be made: {error.strerror}, at {source}.") from error


def _write_listing(file: Path, images: Sequence[_Image]) -> None:
    # File names need not be UTF-8; their bytes are kept.
    with file.open("w", newline="", encoding="utf-8", errors="surrogateescape") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(("part", "class", "file", "source"))
        writer.writerows(images)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _symlink(source: Path, target: Path) -> None:
    target.symlink_to(source)


def _hardlink(source: Path, target: Path) -> None:
    # Of a symbolic link Linux would link the link itself, and a relative one would lead nowhere from its new place.
    target.hardlink_to(source.resolve())


_PLACE: Final[Mapping[Mode, Callable[[Path, Path], object]]] = {
    "symlink": _symlink,
    "copy": shutil.copyfile,
    "hardlink": _hardlink,
}
