"""A training that several tests look at."""

from __future__ import annotations

import pytest

from nni_cream.settings import Schedule
from tests.training.fitting import Run, fit


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return fit(tmp_path_factory.mktemp("run"), Schedule(name="linear"))
