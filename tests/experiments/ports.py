"""Ports for the servers that tests start."""

from __future__ import annotations

import os
import random
import socket
from typing import Final

# Processes of pytest-xdist, gw0 and so on, have ports of their own.
_PROCESS: Final = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 10
# Below those that the system gives to connections.
_OWN: Final = range(18100 + 4 * _PROCESS, 28100, 40)
_CANDIDATES: Final = random.sample(_OWN, len(_OWN))


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
