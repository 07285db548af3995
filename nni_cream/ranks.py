"""Which of several processes of one run this is, known before torch is imported.

Lightning and torchrun tell it in environment variables. The first process speaks for all: it alone writes files,
reports to NNI and prints.
"""

from __future__ import annotations

import os


def rank() -> int:
    """Return the number of this process, from 0; a process by itself is the first of one."""
    return int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or 0)


def is_first() -> bool:
    """Tell whether this process speaks for all."""
    return rank() == 0
