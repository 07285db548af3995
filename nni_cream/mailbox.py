"""What could not be reported yet, kept in the run directory so that neither an outage nor a restart loses it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nni_cream.locking import ProcessLock
from nni_cream.runs import write_json


class Mailbox:
    """Sends messages in order; those that cannot be sent wait in a folder.

    Two processes may share a folder: a trial that NNI's manager has lost, and the one that it has started again.

    Args:
        folder: of the messages that wait; it is there only while there are some.
        send: sends a message; an ``OSError`` means that it has not arrived.
    """

    def __init__(self, folder: Path, send: Callable[[dict[str, Any]], None]) -> None:
        self.folder = folder
        self._send = send
        self._lock = ProcessLock(folder.with_name(f".{folder.name}.lock"))

    def post(self, message: dict[str, Any]) -> bool:
        """Send what waits, then ``message``; keep what does not arrive, and tell whether everything has."""
        if not self.waiting():
            try:
                self._send(message)
            except OSError:
                pass
            else:
                return True
        self._keep(message)
        return self.deliver()

    def deliver(self) -> bool:
        """Send what waits, the oldest first, and tell whether everything has arrived."""
        if not self.waiting():
            return True
        self._lock.acquire(wait=True)
        try:
            for file in self.waiting():
                try:
                    message = json.loads(file.read_text(encoding="utf-8"))
                except ValueError as error:
                    aside = file.with_suffix(".damaged")
                    file.replace(aside)
                    print(f"{file} is no message to NNI ({error}); it is kept as {aside}.", file=sys.stderr)
                    continue
                try:
                    self._send(message)
                except OSError:
                    return False
                file.unlink()
            if not any(self.folder.iterdir()):
                self.folder.rmdir()
            return True
        finally:
            self._lock.release()

    def waiting(self) -> list[Path]:
        """Return the files of the messages that wait, the oldest first."""
        return sorted(self.folder.glob("*.json"))

    def _keep(self, message: dict[str, Any]) -> None:
        self._lock.acquire(wait=True)
        try:
            last = max((int(file.stem) for file in self.waiting()), default=0)
            write_json(self.folder / f"{last + 1:09}.json", message)
        finally:
            self._lock.release()
