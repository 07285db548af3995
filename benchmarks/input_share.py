"""Which share of a training's time goes by in waiting for the next batch of images.

    python benchmarks/input_share.py

Lightning's own profiler measures it inside real searches on ``mnist5k``: the shipped recipes, whose images Pillow
crops in the main process, and DARTS with the paper's way to vary CIFAR-10 (padding and cropping, mirroring), once with
images that stay on the device as one tensor (``data.resident``) and once with images that are loaded.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import ROOT, judged, make_parser, save_result, table
from fused_cell import be_quiet
from pytorch_lightning.profilers import SimpleProfiler

from nni_cream import search, search_darts
from nni_cream.recipe import CreamRecipe, DartsRecipe, load_recipe
from nni_cream.runs import RunDirectory

LONGEST = 0.05
MOVING: dict[str, Any] = {"data.augmentation": {"crop_padding": 2, "hflip": 0.5, "color_jitter": 0.0}}
SEARCHES: dict[str, tuple[Any, Any, str, dict[str, Any]]] = {
    "cream_mnist5k": (search, CreamRecipe, "cream_mnist5k", {"cream.warmup_epochs": 1}),
    "darts_mnist5k": (search_darts, DartsRecipe, "darts_mnist5k", {}),
    "darts_mnist5k, moved": (search_darts, DartsRecipe, "darts_mnist5k", MOVING),
    "darts_mnist5k, moved, not resident": (
        search_darts,
        DartsRecipe,
        "darts_mnist5k",
        {**MOVING, "data.resident": False},
    ),
}
# Two epochs of about ten steps.
SHORT = {"epochs": 2, "data.architecture_fraction": 0.2, "data.validation_fraction": 0.6}


def share(module: Any, kind: Any, name: str, changes: dict[str, Any], device: str) -> dict[str, float]:
    """Search for two epochs; return the seconds of all steps, and of all waiting for their batches."""
    accelerator = {"device.accelerator": "gpu" if device == "cuda" else "cpu"}
    recipe = load_recipe(kind, ROOT / f"experiments/recipes/{name}.yml", {**SHORT, **accelerator, **changes})
    profiler = SimpleProfiler()
    make_trainer = module.make_trainer
    module.make_trainer = functools.partial(make_trainer, profiler=profiler)
    try:
        with tempfile.TemporaryDirectory() as folder:
            run = module.search_cream if kind is CreamRecipe else module.search_darts
            run(recipe, RunDirectory(Path(folder) / "run"))
    finally:
        module.make_trainer = make_trainer
    found = profiler.recorded_durations
    waiting = sum(found["[_TrainingEpochLoop].train_dataloader_next"])
    return {"waiting": waiting, "steps": sum(found["run_training_batch"])}


def main() -> None:
    """Measure, save the result, and print it as a table."""
    device = make_parser(__doc__).parse_args().device
    be_quiet()
    seconds = {name: share(*arguments, device) for name, arguments in SEARCHES.items()}
    shares = {name: found["waiting"] / sum(found.values()) for name, found in seconds.items()}
    target = ("<=", LONGEST)
    rows = {"waiting for images / training": {name: judged(value, target) for name, value in shares.items()}}
    print(table(rows))
    content = {"threads": torch.get_num_threads(), "seconds": seconds, "table": rows}
    print(f"written to {save_result('input_share', content, device)}")


if __name__ == "__main__":
    main()
