from __future__ import annotations

import os

# Two threads that wait for each other on a busy machine make small convolutions up to a hundred times slower. Set
# before torch is imported, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
