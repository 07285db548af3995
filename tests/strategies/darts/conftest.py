"""Fixtures for the tests of searches with DARTS."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

from tests.strategies.darts.searches import Search


@pytest.fixture(autouse=True)
def _in_double_precision(double_precision: None) -> None:
    """As the reference, and as what is computed by hand."""


@functools.cache
def _search(*arguments: Any, **settings: Any) -> Search:
    return Search(*arguments, **settings).run()


@pytest.fixture
def run() -> Callable[..., Search]:
    """Run a search; those with the same settings only once in a process, whichever files ask for them."""
    return _search
