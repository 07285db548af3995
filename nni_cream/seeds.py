"""The same training with several seeds, because one alone does not say how far its result is chance."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nni_cream.child import Candidate
from nni_cream.ranks import is_first
from nni_cream.recipe import RetrainRecipe
from nni_cream.retrain import read_result, retrain
from nni_cream.runs import RunDirectory, write_json


@dataclass(frozen=True)
class Spread:
    """What several runs have measured.

    Attributes:
        mean: of all runs.
        sd: standard deviation of one run, from as many degrees of freedom as there are runs but one; None of a single
            run.
        runs: how many there are.
    """

    mean: float
    sd: float | None
    runs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of at least one value."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))

    def __str__(self) -> str:
        return f"{self.mean:.4f}" if self.sd is None else f"{self.mean:.4f} ± {self.sd:.4f}"


Run = tuple[RetrainRecipe, RunDirectory]
"""A training of one seed, and its folder."""


def retrain_seeds(runs: Sequence[Run], candidate: Candidate, folder: Path) -> Spread | None:
    """Train once for every run, and write ``summary.json`` into ``folder``; a run that has ended is not run again.

    Besides the weights, the seed decides which images outside the test part are trained on, so the spread is of both.

    Returns:
        The accuracy on the test part; None in all processes of a run but the first.

    Raises:
        UserError: as :func:`nni_cream.retrain.retrain`.
    """
    for recipe, directory in runs:
        if is_first():
            print(f"seed {recipe.seed}:", flush=True)
        retrain(recipe, candidate, directory)
    if not is_first():
        return None
    summary = summarize({recipe.seed: directory for recipe, directory in runs})
    write_json(folder / "summary.json", summary)
    spread = Spread(**summary["test_accuracy"])
    print(f"network: {summary['network']}")
    print(f"folder: {folder.resolve()}")
    if "test_plain_accuracy" in summary:
        print(f"test accuracy of the plain weights: {Spread(**summary['test_plain_accuracy'])}")
    print(f"test accuracy: {spread} ({spread.runs} seed{'s' * (spread.runs != 1)})", flush=True)
    return spread


def summarize(directories: Mapping[int, RunDirectory]) -> dict[str, Any]:
    """Put the results of trainings of one network together.

    Args:
        directories: of trainings that have ended, by their seeds.

    Returns:
        Network, FLOPs and parameters; each accuracy as mean, standard deviation and number of runs; and under ``seeds``
        what each training has measured.
    """
    results = {seed: read_result(directory.path / "result.json") for seed, directory in directories.items()}
    first, *_ = results.values()
    accuracies = [key for key in first if key.endswith("_accuracy")]
    return {
        **{key: first[key] for key in ("network", "flops", "params")},
        **{key: vars(Spread.of([result[key] for result in results.values()])) for key in accuracies},
        "seeds": {str(seed): {key: result[key] for key in accuracies} for seed, result in results.items()},
    }
