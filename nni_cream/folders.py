"""Folders as people write them."""

from __future__ import annotations

import os
from pathlib import Path

from nni_cream.errors import UserError


def resolved(folder: Path) -> Path:
    """Return the absolute path of ``folder``, whether or not it exists, with ``~`` and symbolic links followed.

    Raises:
        UserError: if no file system has such a name.
    """
    try:
        # What Linux is given are bytes without a zero; resolve() would pass others on as its own ValueError.
        if b"\0" not in os.fsencode(folder):
            return folder.expanduser().resolve()
        reason = "it holds a zero byte"
    # A home of nobody, characters that are none, links in a circle.
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error)
    raise UserError(f"The folder {str(folder)!r} cannot be: {reason.rstrip('.')}.")
