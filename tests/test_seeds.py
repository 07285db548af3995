from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nni_cream import seeds as module_under_test
from nni_cream.child import Candidate
from nni_cream.recipe import RetrainRecipe
from nni_cream.retrain import retrain
from nni_cream.runs import RunDirectory
from nni_cream.seeds import Spread, retrain_seeds
from tests.test_retrain import GENOTYPE
from tests.trainers import LIGHTNINGS_WARNINGS

RECIPE: dict[str, Any] = {
    "name": "again",
    "epochs": 1,
    "data": {
        "name": "digits",
        "resolution": 8,
        "batch_size": 48,
        "architecture_fraction": 0.05,
        "validation_fraction": 0.9,
    },
    "optimizer": {"name": "momentum", "lr": 0.05},
    "drop_rate": 0.2,
    "mixing": {"cutmix": 1.0},
    "ema": {"decay": 0.5},
    "darts": {"channels": 4, "cells": 3},
    "device": {"accelerator": "cpu"},
}
CANDIDATE = Candidate(None, str(GENOTYPE))

pytestmark = LIGHTNINGS_WARNINGS


def recipe(seed: int) -> RetrainRecipe:
    return RetrainRecipe.model_validate({**RECIPE, "seed": seed})


def train(folder: Path, seeds: tuple[int, ...]) -> Spread | None:
    runs = [(recipe(seed), RunDirectory(folder / f"seed{seed}")) for seed in seeds]
    return retrain_seeds(runs, CANDIDATE, folder)


class TestSpread:
    def test_is_mean_and_standard_deviation_of_a_sample(self) -> None:
        values = [0.5, 0.7, 0.9, 0.7]
        spread = Spread.of(values)
        assert (spread.mean, spread.runs) == (pytest.approx(0.7), 4)
        assert spread.sd == pytest.approx(math.sqrt(0.08 / 3))
        assert str(spread) == "0.7000 ± 0.1633"

    def test_of_one_run_has_no_width(self) -> None:
        assert Spread.of([0.25]) == Spread(0.25, None, 1)
        assert str(Spread.of([0.25])) == "0.2500"


def test_each_seed_is_what_it_is_by_itself_and_ended_ones_are_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spread = train(tmp_path / "all", (3, 4))
    assert spread is not None
    assert capsys.readouterr().out.splitlines()[-1] == f"test accuracy: {spread} (2 seeds)"
    results = [json.loads((tmp_path / f"all/seed{seed}/result.json").read_text()) for seed in (3, 4)]
    accuracies = [result["test_accuracy"] for result in results]
    assert spread == Spread.of(accuracies)
    assert accuracies[0] != accuracies[1]

    retrain(recipe(4), CANDIDATE, RunDirectory(tmp_path / "alone"))
    for name in ("model.safetensors", "model_plain.safetensors"):
        alone, beside = (load_file(tmp_path / folder / name) for folder in ("alone", "all/seed4"))
        assert all(torch.equal(beside[key], tensor) for key, tensor in alone.items()), name

    summary = json.loads((tmp_path / "all/summary.json").read_text())
    assert summary["network"] == str(GENOTYPE)
    assert (summary["flops"], summary["params"]) == (results[0]["flops"], results[0]["params"])
    for name in ("test_accuracy", "test_plain_accuracy", "val_accuracy", "val_plain_accuracy"):
        values = [result[name] for result in results]
        assert summary[name] == vars(Spread.of(values)), name
        assert [summary["seeds"][seed][name] for seed in ("3", "4")] == values

    # One more: the others stay as they are.
    trained: list[int] = []
    make_trainer = module_under_test.retrain.__globals__["make_trainer"]

    def watched(recipe: RetrainRecipe, *arguments: Any, **rest: Any) -> Any:
        trained.append(recipe.seed)
        return make_trainer(recipe, *arguments, **rest)

    monkeypatch.setitem(module_under_test.retrain.__globals__, "make_trainer", watched)
    again = train(tmp_path / "all", (3, 4, 5))
    assert again is not None
    assert trained == [5]
    third = json.loads((tmp_path / "all/seed5/result.json").read_text())["test_accuracy"]
    assert again == Spread.of([*accuracies, third])


def test_a_seed_that_fails_leaves_those_before_it_and_no_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_one = module_under_test.retrain

    def fails(recipe: RetrainRecipe, *arguments: Any) -> float:
        if recipe.seed == 4:
            raise KeyboardInterrupt
        return train_one(recipe, *arguments)

    monkeypatch.setattr(module_under_test, "retrain", fails)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, (3, 4))
    assert (tmp_path / "seed3/result.json").exists()
    assert not (tmp_path / "summary.json").exists()
