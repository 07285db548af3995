"""The command line that searches with DARTS, and the training of what it finds."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from nni_cream.child import Child, build_network
from nni_cream.genotype import Genotype
from nni_cream.recipe import RetrainRecipe
from nni_cream.recipe_files import load_recipe
from tests.trials.processes import epochs, kill_in_epoch, trial

# 144 images for the weights, at 8 pixels.
TINY: dict[str, Any] = {
    "name": "tiny",
    "epochs": 2,
    "data": {
        "name": "digits",
        "resolution": 8,
        "batch_size": 48,
        "architecture_fraction": 0.5,
        "validation_fraction": 0.4,
    },
    "space": {"channels": 2, "cells": 3, "nodes": 2, "operations": ["none", "max_pool_3x3", "sep_conv_3x3"]},
    "optimizer": {"name": "momentum", "lr": 0.05},
    "darts": {"alpha_lr": 0.1},
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yml"
    file.write_text(yaml.safe_dump(TINY), encoding="utf-8")
    return file


def run(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return trial(folder, "search_darts.py", *arguments)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ("darts.arch_lr=1", "'darts.arch_lr' is not a setting; did you mean 'darts.alpha_lr'?"),
        ("darts.warmup_epochs=2", "darts.warmup_epochs is 2, but α learns after it and epochs is 2: make it smaller."),
        ("optimizer.name=adam", "but darts.order: second unrolls a step of sgd or momentum or nesterov."),
        ("space.channels=3", "'space.channels' is 3, but should be a multiple of 2."),
    ],
)
def test_a_wrong_setting_ends_in_one_sentence_and_writes_nothing(
    repository: Path,
    tmp_path: Path,
    recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    settings: str,
    expected: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["search_darts.py", "--recipe", str(recipe), "--set", settings])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(repository / "trials/search_darts.py"), run_name="__main__")
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert expected in line
    assert list(tmp_path.iterdir()) == [recipe]


def test_a_misspelt_key_as_a_user_meets_it(tmp_path: Path, recipe: Path) -> None:
    result = run(tmp_path, "--recipe", str(recipe), "--set", "darts.oder=first")
    assert (result.returncode, result.stdout) == (2, "")
    wrong = "'darts.oder' is not a setting; did you mean 'darts.order'?"
    assert result.stderr == f"error: {wrong}\n"
    assert list(tmp_path.iterdir()) == [recipe]


@pytest.mark.slow
def test_a_killed_search_goes_on_and_its_child_is_trained(repository: Path, tmp_path: Path, recipe: Path) -> None:
    arguments = ("--recipe", str(recipe), "--set", "epochs=5")
    kill_in_epoch(3, tmp_path, "search_darts.py", *arguments)
    folder = tmp_path / "runs/tiny"
    assert epochs(folder / "metrics.csv") == [1, 2, 3]
    assert not (folder / "child.json").exists()
    result = run(tmp_path, *arguments)
    assert result.returncode == 0, result.stderr
    assert "epoch 1," not in result.stdout
    assert epochs(folder / "metrics.csv") == [1, 2, 3, 4, 5]
    child = Child.load(folder / "child.json")
    assert isinstance(child.architecture, Genotype)
    assert f"genotype:  {child.architecture}\n" in result.stdout

    before = (folder / "child.json").read_bytes()
    again = run(tmp_path, *arguments)
    assert (again.returncode, (folder / "child.json").read_bytes()) == (0, before)
    assert "has ended" in again.stdout
    other = run(tmp_path, *arguments, "--set", "seed=7")
    assert other.returncode == 2
    assert "--name" in other.stderr

    # Without a recipe, the one for genotypes is taken.
    smaller = ("epochs=1", "schedule.warmup_epochs=0", "darts.channels=4")
    trained = trial(tmp_path, "retrain_child.py", *(part for setting in smaller for part in ("--set", setting)))
    assert trained.returncode == 0, trained.stderr
    assert "Training the child of runs/tiny/child.json." in trained.stdout.splitlines()
    stored = json.loads((tmp_path / "runs/retrain-tiny/result.json").read_text())
    assert stored["network"] == str(child.architecture)
    used = yaml.safe_load((tmp_path / "runs/retrain-tiny/recipe.yml").read_text())
    expected = load_recipe(
        RetrainRecipe,
        repository / "experiments/recipes/retrain_darts_mnist5k.yml",
        {"name": "retrain-tiny", "epochs": 1, "schedule.warmup_epochs": 0, "darts.channels": 4},
    )
    assert used == expected.model_dump(mode="json")
    assert (stored["data"]["name"], stored["data"]["resolution"]) == ("digits", expected.data.resolution)


GENOTYPE = Genotype(
    normal=(("skip_connect", 0), ("sep_conv_3x3", 1)),
    normal_concat=(2,),
    reduce=(("max_pool_3x3", 0), ("sep_conv_3x3", 1)),
    reduce_concat=(2,),
)


@pytest.mark.parametrize("kind", ["genotype", "path", "none"])
def test_retraining_takes_the_recipe_for_the_kind_of_child(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    from nni_cream.architecture import CreamPath

    if kind != "none":
        space = {"channels": 2, "cells": 3, "nodes": 1} if kind == "genotype" else {}
        architecture = GENOTYPE if kind == "genotype" else CreamPath.parse("[0] [0] [1] [2] [3] [0] [0]")
        size = {"kind": "search", **space} if space else {}
        child = Child(architecture, 10, 0.5, 1, 2, {"name": "digits"}, {"name": "a", "seed": 0}, space=space)
        child.save(tmp_path / "runs/found/child.json", build_network(str(architecture), 10, size))
    taken = []
    monkeypatch.setattr("nni_cream.retrain.retrain", lambda recipe, *_: taken.append(recipe))
    monkeypatch.setattr(sys, "argv", ["retrain_child.py"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(repository / "trials/retrain_child.py"), run_name="__main__")
    name = "retrain_darts_mnist5k.yml" if kind == "genotype" else "retrain_mnist5k.yml"
    run_name = "retrain-cream_14" if kind == "none" else "retrain-found"
    expected = load_recipe(RetrainRecipe, repository / "experiments/recipes" / name, {"name": run_name})
    assert taken == [expected]
    assert taken[0].epochs == (12 if kind == "genotype" else 25)
