"""Fixtures for the tests of searches with Cream."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
from torch.utils.data import TensorDataset

from tests.strategies.cream.searches import BATCH, Search, images


@pytest.fixture(autouse=True)
def _in_double_precision(double_precision: None) -> None:
    """As what is computed by hand."""


@functools.cache
def _training_data() -> TensorDataset:
    return images(6 * BATCH, seed=0)


@pytest.fixture
def data() -> TensorDataset:
    return _training_data()


@functools.cache
def _search(**settings: Any) -> Search:
    return Search(_training_data(), **settings).run()


@pytest.fixture
def run() -> Callable[..., Search]:
    """Run a search; those with the same settings only once in a process, whichever files ask for them."""
    return _search
