"""What the settings that do not change the mathematics do for the time of a step.

    python benchmarks/settings.py

Steps of the shipped recipes for ``mnist5k`` (two searches and a training), inside Lightning, all defaults against one
setting changed, in turns: ten steps, of which the first three do not count. The same seed makes the same ones.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from common import judged, make_parser, save_result, table
from fused_cell import be_quiet
from profiling import profile

STEPS, FIRST = 10, 3
ROUNDS = 3
RECIPES: dict[str, dict[str, Any]] = {
    "cream_mnist5k": {"cream.warmup_epochs": 0},
    "darts_mnist5k": {},
    "retrain_mnist5k": {"data.batch_size": 64},
}
CHANGES: dict[str, dict[str, Any]] = {
    "contiguous_format": {"device.memory_format": "contiguous_format"},
    "bf16-mixed": {"device.precision": "bf16-mixed"},
    "foreach": {"optimizer.execution": "foreach"},
    "fused": {"optimizer.execution": "fused"},
}
OF_TRAININGS: dict[str, dict[str, Any]] = {"compile": {"device.compile": "default"}}
ON_A_GPU: dict[str, dict[str, Any]] = {
    "16-mixed": {"device.precision": "16-mixed"},
    "CUDA graphs": {"device.compile": "reduce-overhead"},
}


def steps(name: str, changes: dict[str, Any], device: str) -> float:
    """Return how many seconds a few steps take together, but for the first."""
    return sum(profile(name, {**RECIPES[name], **changes}, device, STEPS)["run_training_batch"][FIRST:])


def changes_of(name: str, device: str) -> dict[str, dict[str, Any]]:
    """Return the settings that can be changed in a recipe, on a device."""
    training = name.startswith("retrain")
    on_gpu = {what: change for what, change in ON_A_GPU.items() if training or "device.compile" not in change}
    return CHANGES | (OF_TRAININGS if training else {}) | (on_gpu if device == "cuda" else {})


def main() -> None:
    """Measure, save the result, and print it as a table."""
    device = make_parser(__doc__).parse_args().device
    be_quiet()
    seconds: dict[str, dict[str, list[float]]] = {}
    for name in RECIPES:
        runs = {"defaults": {}, **changes_of(name, device)}
        seconds[name] = {what: [] for what in runs}
        for _ in range(ROUNDS):
            for what, changes in runs.items():
                seconds[name][what].append(steps(name, changes, device))
    rows = {
        name: {
            f"step, {what} / defaults": judged(statistics.median(found) / statistics.median(measured["defaults"]), None)
            for what, found in measured.items()
            if what != "defaults"
        }
        for name, measured in seconds.items()
    }
    print(table(rows))
    content = {"threads": torch.get_num_threads(), "rounds": ROUNDS, "seconds": seconds, "table": rows}
    print(f"written to {save_result('settings', content, device)}")


if __name__ == "__main__":
    main()
