"""A lock on a file that ends with the process that holds it, however that ends."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO


class ProcessLock:
    """A lock between processes: what another one holds cannot be had here.

    It is a POSIX record lock: the kernel releases it when its owner dies, and children that the owner forks, such as
    the workers of a data loader, do not inherit it.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._handle: IO[str] | None = None

    def acquire(self, *, wait: bool = False) -> bool:
        """Take the lock, and write this process' id into the file; tell whether that could be done."""
        if self._handle is not None:
            return True
        self.file.parent.mkdir(parents=True, exist_ok=True)
        handle = self.file.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except (BlockingIOError, PermissionError):
            handle.close()
            return False
        handle.truncate(0)
        handle.write(f"{os.getpid()}\n")
        handle.flush()
        self._handle = handle
        return True

    def release(self) -> None:
        """Give the lock back."""
        if self._handle is not None:
            self._handle.close()
            self._handle = None

    def owner(self) -> int | None:
        """Return the id of the other process that holds the lock, 0 if it is not known yet, or None; write nothing."""
        if self._handle is not None:
            return None
        try:
            # A shared lock, for which a file that cannot be written will do.
            with self.file.open(encoding="utf-8") as handle:
                fcntl.lockf(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return None
        except BlockingIOError:
            text = self.file.read_text(encoding="utf-8", errors="replace").strip()
            return int(text) if text.isdigit() else 0
        return None
