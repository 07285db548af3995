"""A data set that several files of tests look at."""

from __future__ import annotations

import pytest

from nni_cream.data import DataSplits, load_data


@pytest.fixture(scope="session")
def digits() -> DataSplits:
    return load_data("digits", resolution=8)
