"""What is looked at of a data set before a run begins: that every image can be read, and which images there are."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from nni_cream._data_sources import Images
from nni_cream.data import DataSplits
from nni_cream.errors import UserError
from nni_cream.ranks import is_first
from nni_cream.settings import Data

PARTS: Final = ("weights", "architecture", "validation", "test")
# So many files take minutes; to look at all of ImageNet's would take hours.
MOST_TRAINING_FILES: Final = 50_000
_NAMED: Final = 3


@dataclass(frozen=True)
class Fingerprint:
    """Which images a run has, and in which part.

    Attributes:
        number: of images.
        sha256: of class names, labels, division, and of what the images are: the names of files below the folder that
            they share, or pixels. Not of what is in files: one may be repaired.
    """

    number: int
    sha256: str


def fingerprint(splits: DataSplits) -> Fingerprint:
    """Return what two runs share if their images, and the division of these, are the same."""
    return _fingerprint(splits, PARTS)


def _fingerprint(splits: DataSplits, names: Sequence[str]) -> Fingerprint:
    digest = hashlib.sha256(repr(splits.class_names).encode())
    number = 0
    for name in names:
        part = getattr(splits, name)
        number += len(part)
        digest.update(f"{name} {len(part)}".encode())
        digest.update(np.ascontiguousarray(part.labels, dtype="<i8").tobytes())
        if isinstance(part.images.store, np.ndarray):
            digest.update(np.ascontiguousarray(part.images.store[part.indices]).tobytes())
        else:
            shared = os.path.commonpath(part.images.store)
            files = (os.path.relpath(part.images.store[index], shared) for index in part.indices)
            digest.update("\0".join(files).encode(errors="surrogateescape"))
    return Fingerprint(number, digest.hexdigest())


def noted(data: Data, splits: DataSplits) -> dict[str, Any]:
    """Return the data settings of a run as files of networks keep them.

    With the whole path of a folder; and, as images in a folder can change, with ``images``: the names of the classes,
    and a fingerprint of the test part, which is the same for every seed.
    """
    settings = data.model_dump(mode="json")
    if data.folder is None:
        return settings
    return {**settings, "folder": os.path.abspath(data.folder), "images": _noted_images(splits)}


def _noted_images(splits: DataSplits) -> dict[str, Any]:
    return {"class_names": _as_text(splits.class_names), "test": asdict(_fingerprint(splits, ("test",)))}


def class_names(notes: Mapping[str, Any]) -> list[str] | None:
    """Return what the logits of a network stand for, as :func:`noted` has it; None if that is not known."""
    names = _images_of(notes).get("class_names")
    return list(names) if isinstance(names, list) else None


def refuse_other_classes(notes: Mapping[str, Any], splits: DataSplits, file: Path) -> None:
    """Make sure that labels mean what they meant for a network.

    Args:
        notes: the data settings that ``file`` holds, as of :func:`noted`; without ``images`` nothing is known.
        splits: the images now.
        file: named in the message.

    Raises:
        UserError: if the classes have other names, or another order.
    """
    before, now = class_names(notes), _as_text(splits.class_names)
    if before is not None and before != now:
        position = next((i for i, (a, b) in enumerate(zip(before, now, strict=False)) if a != b), 0)
        raise UserError(
            f"{file} tells the classes {_some(before)} apart, but the folder has {_some(now)}: class {position} was "
            f"{before[position]!r} and would be {now[position]!r}; give each class its name as it was."
        )


def names_another_folder(notes: Mapping[str, Any], data: Data) -> bool:
    """Tell whether ``notes`` (see :func:`noted`) are of another folder than ``data``, be it moved or of other images.

    Of data without a folder, and of files without notes, that is not known, and so not told.
    """
    before = notes.get("folder")
    return data.folder is not None and before is not None and before != os.path.abspath(data.folder)


def has_the_same_test_part(notes: Mapping[str, Any], splits: DataSplits) -> bool:
    """Tell whether ``notes`` (see :func:`noted`) are known to be of these classes and this test part, in any folder."""
    return _images_of(notes) == _noted_images(splits)


def has_another_test_part(notes: Mapping[str, Any], data: Data, splits: DataSplits) -> bool:
    """Tell whether the test part of the folder that ``notes`` (see :func:`noted`) name is another one by now.

    Then images of it may have trained what is to be tested.
    """
    before = _images_of(notes).get("test")
    same_folder = data.folder is not None and os.path.abspath(data.folder) == notes.get("folder")
    return same_folder and before is not None and before != asdict(_fingerprint(splits, ("test",)))


def warn_of_another_test_part(notes: Mapping[str, Any], data: Data, splits: DataSplits) -> None:
    """Say on stderr if the accuracy on the test part may be too good, as :func:`has_another_test_part` has it."""
    if is_first() and has_another_test_part(notes, data, splits):
        print(
            f"warning: {data.folder} has changed since this network was found, so that its test part is another one: "
            "images of it may have been searched or trained with; a folder 'test' beside 'train' stays what it is.",
            file=sys.stderr,
        )


def _as_text(names: Sequence[str]) -> list[str]:
    # Names of folders are bytes, which need not be text in any encoding; files of networks hold text.
    return [os.fsencode(name).decode(errors="backslashreplace") for name in names]


def _images_of(notes: Mapping[str, Any]) -> Mapping[str, Any]:
    images = notes.get("images")
    return images if isinstance(images, Mapping) else {}


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def refuse_unreadable(splits: DataSplits) -> None:
    """Read every file of a data set once, several at a time.

    Beyond 50,000 files of ``weights`` those are left to the first epoch.

    Raises:
        UserError: if some cannot be read; it names the first few.
    """
    looked_at = [part for name in PARTS if (part := getattr(splits, name)) is not splits.weights]
    if len(splits.weights) <= MOST_TRAINING_FILES:
        looked_at.append(splits.weights)
    files = [
        (part.images, int(index))
        for part in looked_at
        if isinstance(part.images.store, tuple)
        for index in part.indices
    ]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        # By their names, so that it does not depend on the division which one is named.
        faults = sorted(fault for fault in threads.map(lambda file: _fault(*file), files) if fault is not None)
    if not faults:
        return
    (_, sentence), *others = faults
    if others:
        named = ", ".join(path for path, _ in others[:_NAMED])
        more = f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
        sentence = f"{sentence.rstrip('.')}; nor can {named}{more}."
    raise UserError(sentence)


def _fault(images: Images, index: int) -> tuple[str, str] | None:
    store: Any = images.store
    try:
        images.rgb(index)
    except UserError as error:
        return store[index], str(error)
    return None
