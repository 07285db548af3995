"""Fixtures for the tests of networks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def on_meta() -> Iterator[None]:
    """Networks without numbers, of which only shapes and counts matter."""
    with torch.device("meta"):
        yield
