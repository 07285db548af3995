"""Folders as people write them."""

from __future__ import annotations

from pathlib import Path

from nni_cream.errors import UserError


def resolved(folder: Path) -> Path:
    """Return the absolute path of ``folder``, whether or not it exists, with ``~`` and symbolic links followed.

    Raises:
        UserError: if no file system has such a name.
    """
    try:
        return folder.expanduser().resolve()
    # A home of nobody, links in a circle; a zero byte or characters that are none, which no path has.
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(f"The folder {str(folder)!r} cannot be: {str(error).rstrip('.')}.") from None
