"""A run that is killed and started again is the run that was never killed, to the last bit."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.resuming import RECIPES, complete, differences, kill_at, left_behind

# A checkpoint every other step or so.
OFTEN = {"checkpoint_minutes": 0.001}
STEPS = {"cream": 27, "darts": 30, "retrain": 51}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What each kind of run leaves that is not killed, and writes no checkpoint but after its epochs."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    return {kind: left_behind(complete(kind, folder / kind)) for kind in ("cream", "darts", "retrain")}


def is_in_the_middle(folder: Path) -> bool:
    """Tell whether a run goes on in the middle of an epoch."""
    file = folder / "checkpoints/last.ckpt"
    if not file.exists():
        return False
    epochs = torch.load(file, weights_only=True)["loops"]["fit_loop"]["epoch_progress"]["current"]
    return epochs["processed"] < epochs["started"]


@pytest.mark.parametrize(
    ("kind", "workers", "kills"),
    [("cream", 0, 3), ("cream", 2, 1), ("darts", 0, 2), ("darts", 1, 1), ("retrain", 0, 3)],
)
def test_killed_runs_end_as_those_that_are_not(
    tmp_path: Path, uninterrupted: dict[str, dict[str, Any]], kind: str, workers: int, kills: int
) -> None:
    """Each process is killed at a random moment (signal 9), in a step, a validation or an end of an epoch."""
    moments = random.Random(f"{kind} {workers}")
    expected = dict(uninterrupted[kind])
    changes = dict(OFTEN)
    if workers:
        changes["data"] = {**RECIPES[kind]["data"], "workers": workers}
    in_the_middle = 0
    for _ in range(kills):
        kill_at(kind, tmp_path, moments.randint(2, STEPS[kind] // (kills + 1)), moments.uniform(0, 0.1), **changes)
        in_the_middle += is_in_the_middle(tmp_path)
    assert in_the_middle > 0
    found = left_behind(complete(kind, tmp_path, **changes))
    for left in (found, expected):
        for name in ("child.json", "result.json"):
            if name in left:
                left[name] = {key: value for key, value in left[name].items() if key != "data"}
    assert differences(found, expected) == []
