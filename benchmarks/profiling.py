"""Short runs of the real commands, taken apart by Lightning's own profiler."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import ROOT
from pytorch_lightning.profilers import SimpleProfiler

from nni_cream import retrain, search, search_darts
from nni_cream.child import Candidate
from nni_cream.recipe import CreamRecipe, DartsRecipe, RetrainRecipe, load_recipe
from nni_cream.runs import RunDirectory

# Two epochs of about ten steps.
SHORT: dict[str, Any] = {"epochs": 2, "data.architecture_fraction": 0.2, "data.validation_fraction": 0.6}
SHORT_TRAINING: dict[str, Any] = {"epochs": 2, "schedule.warmup_epochs": 0, "data.validation_fraction": 0.8}
NETWORK = "cream_14"
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "cream": (search, CreamRecipe, SHORT),
    "darts": (search_darts, DartsRecipe, SHORT),
    "retrain": (retrain, RetrainRecipe, SHORT_TRAINING),
}


def profile(name: str, changes: Mapping[str, Any], device: str) -> dict[str, list[float]]:
    """Run the shipped recipe ``name`` for two epochs.

    Args:
        name: of the recipe; its first word says what it is for.
        changes: of its settings.
        device: ``cpu`` or ``cuda``.

    Returns:
        Seconds, by what Lightning calls that which took them.
    """
    module, kind, short = KINDS[name.partition("_")[0]]
    accelerator = {"device.accelerator": "gpu" if device == "cuda" else "cpu"}
    recipe = load_recipe(kind, ROOT / f"experiments/recipes/{name}.yml", {**short, **accelerator, **changes})
    profiler = SimpleProfiler()
    make_trainer = module.make_trainer
    module.make_trainer = functools.partial(make_trainer, profiler=profiler)
    try:
        with tempfile.TemporaryDirectory() as folder:
            directory = RunDirectory(Path(folder) / "run")
            if kind is CreamRecipe:
                search.search_cream(recipe, directory)
            elif kind is DartsRecipe:
                search_darts.search_darts(recipe, directory)
            else:
                retrain.retrain(recipe, Candidate(None, NETWORK), directory)
    finally:
        module.make_trainer = make_trainer
    return dict(profiler.recorded_durations)
