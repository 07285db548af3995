"""Which share of a training's time goes by in waiting for the next batch of images.

    python benchmarks/input_share.py

Lightning's own profiler measures it inside real searches on ``mnist5k``: the shipped recipes, whose images Pillow
crops in the main process; that of Cream once more with a process for the images (``data.workers: 1``); and DARTS with
the paper's way to vary CIFAR-10 (padding and cropping, mirroring), once with images that stay on the device as one
tensor (``data.resident``) and once with images that are loaded. The first batch of a search waits for what is done
once, such as starting a process or putting all images on the device; it is told by itself.
"""

from __future__ import annotations

from typing import Any

import torch
from common import judged, make_parser, save_result, table
from fused_cell import be_quiet
from profiling import profile

LONGEST = 0.05
MOVING: dict[str, Any] = {"data.augmentation": {"crop_padding": 2, "hflip": 0.5, "color_jitter": 0.0}}
# By name: the recipe, what is changed of it, and how many steps are made. Those of Cream are two epochs; in the second
# there is a board.
SEARCHES: dict[str, tuple[str, dict[str, Any], int]] = {
    "cream_mnist5k": ("cream_mnist5k", {"cream.warmup_epochs": 1}, 24),
    "cream_mnist5k, a worker": ("cream_mnist5k", {"cream.warmup_epochs": 1, "data.workers": 1}, 24),
    "darts_mnist5k": ("darts_mnist5k", {}, 6),
    "darts_mnist5k, moved": ("darts_mnist5k", MOVING, 6),
    "darts_mnist5k, moved, not resident": ("darts_mnist5k", {**MOVING, "data.resident": False}, 6),
}


def share(name: str, changes: dict[str, Any], steps: int, device: str) -> dict[str, float]:
    """Search; return the seconds of all steps but the first, and of all waiting for their batches."""
    found = profile(name, changes, device, steps)
    first, *waiting = found["[_TrainingEpochLoop].train_dataloader_next"]
    return {"waiting": sum(waiting), "steps": sum(found["run_training_batch"][1:]), "waiting for the first": first}


def main() -> None:
    """Measure, save the result, and print it as a table."""
    device = make_parser(__doc__).parse_args().device
    be_quiet()
    seconds = {name: share(*arguments, device) for name, arguments in SEARCHES.items()}
    shares = {name: found["waiting"] / (found["waiting"] + found["steps"]) for name, found in seconds.items()}
    target = ("<=", LONGEST)
    rows = {"waiting for images / training": {name: judged(value, target) for name, value in shares.items()}}
    print(table(rows))
    content = {"threads": torch.get_num_threads(), "seconds": seconds, "table": rows}
    print(f"written to {save_result('input_share', content, device)}")


if __name__ == "__main__":
    main()
