"""Short runs of the real commands, taken apart by Lightning's own profiler."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from common import ROOT
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.profilers import SimpleProfiler

from nni_cream import retrain, search, search_darts
from nni_cream.child import Candidate
from nni_cream.recipe import CreamRecipe, DartsRecipe, RetrainRecipe
from nni_cream.recipe_files import load_recipe
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


class Enough(Exception):
    """All steps that were asked for have been made."""


class StopAfter(Callback):
    """Ends a run after some steps, without what comes after a training."""

    def __init__(self, steps: int) -> None:
        self._left = steps

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        """Count."""
        self._left -= 1
        if not self._left:
            raise Enough


def profile(name: str, changes: Mapping[str, Any], device: str, steps: int) -> dict[str, list[float]]:
    """Run some steps of the shipped recipe ``name``, of two epochs at most.

    Args:
        name: of the recipe; its first word says what it is for.
        changes: of its settings.
        device: ``cpu`` or ``cuda``.
        steps: how many.

    Returns:
        Seconds, by what Lightning calls that which took them.
    """
    module, kind, short = KINDS[name.partition("_")[0]]
    accelerator = {"device.accelerator": "gpu" if device == "cuda" else "cpu"}
    recipe = load_recipe(kind, ROOT / f"experiments/recipes/{name}.yml", {**short, **accelerator, **changes})
    profiler = SimpleProfiler()
    make_trainer = module.make_trainer

    def watched(*arguments: Any, **keywords: Any) -> Any:
        trainer = make_trainer(*arguments, profiler=profiler, **keywords)
        # NNI would call the end an error.
        logging.disable(logging.ERROR)
        trainer.callbacks.append(StopAfter(steps))
        return trainer

    module.make_trainer = watched
    try:
        with suppress(Enough), tempfile.TemporaryDirectory() as folder:
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
