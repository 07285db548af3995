"""Trainers of Lightning's that tests make."""

from __future__ import annotations

from typing import Any

import pytest

# On a CPU, and nothing is printed or written.
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}

# What Lightning says of every small training.
LIGHTNINGS_WARNINGS = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*logging interval"),
    # Its own use of torch.
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]
