"""Ctrl-C and SIGTERM: a training ends after the step it is in, everything else at once.

NNI stops a local trial with SIGINT and kills it five seconds later; a batch system sends SIGTERM.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Final

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)

_received: int | None = None
_deferred = False


def received() -> int | None:
    """Return the signal that ends this process, if one does."""
    return _received


def end_with_others() -> None:
    """Take it that this process has received what another one of its run has: half a run is no success."""
    global _received
    _received = _received or signal.SIGTERM


def install() -> Callable[[], None]:
    """Let both signals end this process; return what undoes that. Other threads than the first change nothing.

    The first raises ``KeyboardInterrupt``, unless it is deferred; further ones change nothing.
    """
    global _received
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    _received = None
    before: dict[int, Any] = {number: signal.signal(number, _handle) for number in SIGNALS}

    def undo() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    return undo


def defer() -> Callable[[], None]:
    """As :func:`install`, but nothing is raised: who calls this asks :func:`received` from time to time."""
    global _deferred
    undo = install()
    _deferred = True

    def end() -> None:
        global _deferred
        _deferred = False
        undo()

    return end


def _handle(number: int, _frame: FrameType | None) -> None:
    global _received
    if _received is not None:
        return
    _received = number
    if not _deferred:
        raise KeyboardInterrupt
