"""Ports for the servers that tests start."""

from __future__ import annotations

import random
import socket
from typing import Final

# Below those that the system gives to connections.
_CANDIDATES: Final = random.sample(range(18100, 28100, 4), 2500)


def free_port() -> int:
    """Return a port on which nobody listens, nor on the one after it, which NNI takes as well.

    No port is given twice: NNI's dispatchers and trials go on for some time after their manager, and would talk to the
    one that has its port next. At random, because a port is taken only seconds later, and another process that runs
    tests may be looking for one too.
    """
    while _CANDIDATES:
        port = _CANDIDATES.pop()
        if _is_free(port) and _is_free(port + 1):
            return port
    raise AssertionError("no port is free")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
