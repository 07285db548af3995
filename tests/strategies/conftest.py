"""Fixtures for the tests of both strategies."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nni.nas.nn.pytorch as nas
import pytest
import torch
from nni.nas.experiment import NasExperiment


@pytest.fixture
def double_precision() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def nas_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run ``NasExperiment(space, evaluator, strategy).run()``, and give the experiment."""
    import nni.nas.experiment.experiment as experiments

    # NNI keeps a list of experiments in the home directory, and knows that directory since it was imported.
    monkeypatch.setattr(experiments, "Experiments", functools.partial(experiments.Experiments, str(tmp_path)))

    def run(space: nas.ModelSpace, evaluator: Any, strategy: Any) -> Any:
        experiment = NasExperiment(space, evaluator, strategy)
        experiment.config.experiment_working_directory = str(tmp_path)
        try:
            experiment.run()
        finally:
            experiment.stop()
        return experiment

    return run
