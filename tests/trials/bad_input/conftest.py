"""Where commands run, and what a search and a training have left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nni_cream.child import Child, build_network, save_network
from tests.trials.bad_input.refusals import DIGITS, PATH


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("place")


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a search and a training leave behind."""
    folder = tmp_path_factory.mktemp("trained")
    network = build_network(str(PATH), 10, {})
    Child(PATH, 10, 0.5, 1, 2, DIGITS, {"name": "a", "seed": 0}).save(folder / "child.json", network)
    save_network(folder / "model.safetensors", network, architecture=str(PATH), num_classes=10, data=DIGITS, size={})
    cream_14 = build_network("cream_14", 10, {}).state_dict()
    torch.save({"state_dict": {f"module.{key}": value for key, value in cream_14.items()}}, folder / "14.pth.tar")
    return folder
