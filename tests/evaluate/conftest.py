"""Networks, and checkpoints of them: ours, and as another program writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from nni_cream.child import save_network
from nni_cream.models.cream import build_child
from tests.evaluate.measuring import DIGITS, PATH, with_opinions


@pytest.fixture(scope="session")
def network() -> Any:
    return with_opinions(build_child(PATH, num_classes=10), 0)


@pytest.fixture(scope="session")
def foreign() -> Any:
    """Cream's 14 M network twice: plain and averaged weights."""
    torch.manual_seed(0)  # else, once in a while, two of their accuracies are equal by chance
    return [with_opinions(timm.create_model("cream_14", num_classes=10), seed) for seed in (1, 2)]


@pytest.fixture
def ours(tmp_path: Path, network: nn.Module) -> Path:
    file = tmp_path / "model.safetensors"
    save_network(file, network, architecture=str(PATH), num_classes=10, data=DIGITS, size={})
    return file


@pytest.fixture
def theirs(tmp_path: Path, foreign: list[nn.Module]) -> Path:
    plain, averaged = ({f"module.{key}": value for key, value in n.state_dict().items()} for n in foreign)
    file = tmp_path / "14.pth.tar"
    torch.save({"epoch": 3, "arch": "x", "state_dict": plain, "state_dict_ema": averaged}, file)
    return file
