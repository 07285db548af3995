from __future__ import annotations

import os
from pathlib import Path

import pytest

# Two threads that wait for each other on a busy machine make small convolutions up to a hundred times slower. Set
# before torch is imported, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _outside_nni(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests started from an NNI trial would report to its manager."""
    for name in [name for name in os.environ if name.startswith("NNI_")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY
