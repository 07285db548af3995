"""What several tests need: reference numbers, the rule that their weights follow, and ways to run one path."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.layers.activations import HardSigmoid
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> Any:
    return json.loads((GOLDEN / name).read_text())


def rule(name: str, shape: tuple[int, ...], seed: str = "") -> Tensor:
    """The value of the state-dict entry ``name`` in every network of the reference ("rule" in ``c_forward.json``).

    The networks of DARTS have a ``seed`` besides, which stands before the name ("rule" in ``darts/evaluation.json``).
    """
    z = np.random.RandomState(zlib.crc32((seed + name).encode()) & 0x7FFFFFFF).standard_normal(shape)
    if len(shape) == 4:
        z = z * np.sqrt(2 / (shape[1] * shape[2] * shape[3]))
    elif len(shape) == 2:
        z = z / np.sqrt(shape[1])
    elif name.endswith("running_mean"):
        z = 0.1 * z
    elif name.endswith("running_var"):
        z = 1 + 0.2 * np.abs(z)
    elif name.endswith(".weight"):
        z = 1 + 0.1 * z
    else:
        z = 0.1 * z
    return torch.from_numpy(np.asarray(z))


def apply_rule(network: nn.Module, sample: Mapping[str, Any] | None = None, seed: str = "") -> None:
    """Give ``network`` the reference's weights; of a Cream space, if ``sample`` is given, only what it chooses."""
    state = {}
    for name, tensor in network.state_dict().items():
        parts = name.split(".")
        if sample and parts[0] == "blocks" and str(sample[f"stage{parts[1]}_block{parts[2]}"]) != parts[3]:
            state[name] = tensor
        elif name.endswith("num_batches_tracked"):
            state[name] = torch.zeros_like(tensor)
        else:
            state[name] = rule(name, tuple(tensor.shape), seed)
    network.load_state_dict(state)


def use_exact_gates(network: nn.Module) -> None:
    """Replace torch's hard-sigmoid, whose backward is off by 3e-8 even in double precision."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Hardsigmoid) or type(child).__name__.startswith("HardSigmoid"):
                setattr(module, name, HardSigmoid())


def run_through(space: nn.Module, sample: Mapping[str, Any]) -> None:
    """Let a model space that is no supernet run the network of ``sample``: NNI's dry run takes these choices."""
    for module in space.modules():
        if hasattr(module, "_dry_run_choice"):
            module._dry_run_choice = sample[module.label]  # type: ignore[assignment,index]


def standard_normal(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape))
