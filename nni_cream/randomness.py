"""The random numbers of a process: of PyTorch, Python and NumPy, which layers and image transforms draw from."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning_fabric.utilities.seed import _collect_rng_states, _set_rng_states


def get_state() -> dict[str, Any]:
    """Return where all streams stand, CUDA's among them, in a form that a checkpoint can hold."""
    states = _collect_rng_states()
    name, keys, *rest = states["numpy"]
    # A checkpoint is read without executing code, and numpy's arrays would need some.
    return {**states, "numpy": [name, keys.tolist(), *rest]}


def set_state(state: dict[str, Any]) -> None:
    """Put all streams where :func:`get_state` found them; CUDA's only where there are as many devices as then."""
    on_gpus = state["torch.cuda"]
    if len(on_gpus) != torch.cuda.device_count():
        state = {name: stream for name, stream in state.items() if name != "torch.cuda"}
    _set_rng_states({**state, "numpy": tuple(state["numpy"])})


def seed_streams(seed: int) -> None:
    """Begin the three streams on the CPU anew, with ``seed`` in [0, 2**63)."""
    # torch.manual_seed would reach the GPUs as well. PyTorch and NumPy have the same generator, so that equal seeds, of
    # which they use 32 bits, would give the same numbers.
    torch.default_generator.manual_seed(seed & 0xFFFFFFFF)
    np.random.seed(seed >> 31)
    random.seed(seed)


@contextmanager
def streams_kept() -> Iterator[None]:
    """Leave the three streams on the CPU as they were, whatever is drawn inside."""
    of_torch, of_python, of_numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(of_torch)
        random.setstate(of_python)
        np.random.set_state(of_numpy)
