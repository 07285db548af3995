"""What is looked at of a data set before a run begins: that every image can be read, and which images there are."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from nni_cream._data_sources import Images
from nni_cream.data import DataSplits
from nni_cream.errors import UserError

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
            they share, or pixels. Not of what is in files: one may be mended.
    """

    number: int
    sha256: str


def fingerprint(splits: DataSplits) -> Fingerprint:
    """Return what two runs share if their images, and the division of these, are the same."""
    digest = hashlib.sha256(repr(splits.class_names).encode())
    number = 0
    for name in PARTS:
        part = getattr(splits, name)
        number += len(part)
        digest.update(f"{name} {len(part)}".encode())
        digest.update(np.ascontiguousarray(part.labels, dtype="<i8").tobytes())
        if isinstance(part.images.store, np.ndarray):
            digest.update(np.ascontiguousarray(part.images.store[part.indices]).tobytes())
        else:
            shared = os.path.commonpath(part.images.store)
            names = (os.path.relpath(part.images.store[index], shared) for index in part.indices)
            digest.update("\0".join(names).encode(errors="surrogateescape"))
    return Fingerprint(number, digest.hexdigest())


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
