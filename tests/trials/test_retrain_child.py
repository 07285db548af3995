"""Trainings by the recipes that are shipped, with several seeds, and comparisons, as a user starts them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file

from nni_cream.architecture import CreamPath
from nni_cream.child import Child, build_network
from nni_cream.cost import measure_network
from nni_cream.seeds import Spread
from tests.trials.commands import call
from tests.trials.processes import trial

PATH = "[[0], [1], [3], [4, 0], [2], [3], [0]]"


def settings(**given: object) -> list[str]:
    return [part for key, value in given.items() for part in ("--set", f"{key.replace('__', '.')}={value}")]


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes that differ in brightness, arranged as ImageNet is."""
    folder = tmp_path_factory.mktemp("photographs")
    pixels = np.random.default_rng(0)
    for part, count in (("train", 20), ("val", 4)):
        for darkest, name in ((0, "n01440764"), (80, "n01443537"), (160, "n01484850")):
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                image = Image.fromarray(pixels.integers(darkest, darkest + 90, (50, 40, 3), dtype=np.uint8))
                image.save(folder / part / name / f"{name}_{number}.JPEG")
    return folder


@pytest.mark.slow
def test_the_recipe_of_the_paper_trains_a_path(repository: Path, tmp_path: Path, photographs: Path) -> None:
    """Optimizer, schedule, augmentation and averages as shipped; on fewer and smaller images."""
    smaller = settings(data__folder=photographs, data__resolution=32, data__batch_size=8, data__workers=0, epochs=4)
    recipe = repository / "experiments/recipes/retrain_cream_imagenet.yml"
    arguments = ["--recipe", recipe, "--architecture", PATH, "--name", "paper", *smaller]
    result = trial(tmp_path, "retrain_child.py", *arguments, *settings(data__validation_fraction=0.2))
    assert result.returncode == 0, result.stderr
    stored = read(tmp_path / "runs/paper/result.json")
    assert stored["network"] == PATH
    plain, average = (
        load_file(tmp_path / "runs/paper" / name) for name in ("model_plain.safetensors", "model.safetensors")
    )
    assert plain.keys() == average.keys()
    # 20 steps of which the average keeps 0.9999 each: it is where the first step was.
    assert any((plain[key] != average[key]).any() for key in plain)


@pytest.mark.slow
def test_a_folder_is_trained_on_with_several_seeds(repository: Path, tmp_path: Path, photographs: Path) -> None:
    recipe = repository / "experiments/recipes/retrain_folder.yml"
    smaller = settings(data__folder=photographs / "train", data__batch_size=8, epochs=3, mixing__off_epoch=2)
    smaller += settings(schedule__warmup_epochs=1, data__workers=0, data__validation_fraction=0.2)
    arguments = ["--recipe", recipe, "--architecture", PATH, "--name", "mine", *smaller]
    result = trial(tmp_path, "retrain_child.py", *arguments, "--seeds", 1, 0)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "runs/mine"
    stored = {seed: read(folder / f"seed{seed}/result.json") for seed in (1, 0)}
    spread = Spread.of([stored[seed]["test_accuracy"] for seed in (1, 0)])
    assert result.stdout.splitlines()[-1] == f"test accuracy: {spread} (2 seeds)"
    assert read(folder / "summary.json")["test_accuracy"] == vars(spread)
    assert [yaml.safe_load((folder / f"seed{seed}/recipe.yml").read_text())["seed"] for seed in (1, 0)] == [1, 0]

    # The same command trains nothing, and says the same.
    files = {file: file.stat().st_mtime_ns for file in folder.glob("seed*/*.safetensors")}
    again = trial(tmp_path, "retrain_child.py", *arguments, "--seeds", 1, 0)
    assert again.stdout.splitlines()[-1] == result.stdout.splitlines()[-1]
    assert again.stdout.count("holds a training that has ended") == 2
    assert {file: file.stat().st_mtime_ns for file in files} == files
    one = trial(tmp_path, "retrain_child.py", *arguments, "--seeds", 0)
    assert one.stdout.splitlines()[-1] == f"test accuracy: {stored[0]['test_accuracy']:.4f} (1 seed)"

    # Either weights are tested by the command for that.
    for choice, key in (("ema", "test_accuracy"), ("plain", "test_plain_accuracy")):
        checkpoint = ["--checkpoint", "runs/mine/seed1/model.safetensors", "--weights", choice]
        tested = trial(tmp_path, "test_child.py", *checkpoint)
        assert f"top-1:     {stored[1][key]:.4f}" in tested.stdout.splitlines(), tested.stderr


@pytest.mark.slow
def test_the_recipe_for_solar_cells_trains(repository: Path, tmp_path: Path) -> None:
    pytest.importorskip("elpv_dataset")
    recipe = repository / "experiments/recipes/retrain_elpv.yml"
    smaller = settings(epochs=1, schedule__warmup_epochs=0, data__resolution=16)
    result = trial(
        tmp_path,
        "retrain_child.py",
        "--recipe",
        recipe,
        "--architecture",
        PATH,
        "--name",
        "cells",
        *smaller,
    )
    assert result.returncode == 0, result.stderr
    assert read(tmp_path / "runs/cells/result.json")["data"]["name"] == "elpv"


@pytest.mark.slow
def test_a_child_is_compared(repository: Path, tmp_path: Path) -> None:
    """With a random path of the interval of its search, and with a standard network."""
    search = repository / "tests/experiments/tiny_recipe.yml"
    path = CreamPath.parse(PATH)
    cost = measure_network(build_network(PATH, 10, {}), 32)
    data = {"name": "digits", "resolution": 32}
    child = Child(path, 10, 0.5, cost.macs, cost.params, data, {"name": "tiny", "seed": 0})
    child.save(tmp_path / "runs/tiny/child.json", build_network(PATH, 10, {}))
    (tmp_path / "runs/tiny/recipe.yml").write_text(search.read_text())
    arguments = ["--seeds", 0, "--random", 1, "--networks", "cream_14"]
    arguments += settings(epochs=1, schedule__warmup_epochs=0, data__batch_size=64)
    result = trial(tmp_path, "compare.py", *arguments)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "runs/compare-tiny"
    assert result.stdout.endswith((folder / "comparison.md").read_text())
    rows = {row["group"]: row for row in read(folder / "comparison.json")["rows"]}
    assert list(rows) == ["found by the search", "random", "cream_14"]
    interval = yaml.safe_load(search.read_text())["flops"]
    assert interval["min"] <= rows["random"]["flops"] / 1e6 <= interval["max"]
    assert (rows["found by the search"]["flops"], rows["found by the search"]["params"]) == (cost.macs, cost.params)
    again = trial(tmp_path, "compare.py", *arguments)
    assert again.stdout.splitlines()[-5:] == result.stdout.splitlines()[-5:]
    assert again.stdout.count("holds a training that has ended") == 3


@pytest.mark.parametrize(("name", "arguments"), [("retrain_child", ("--seeds", 0, 1)), ("compare", ())])
def test_a_trial_of_nnis_reports_one_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, arguments: tuple[object, ...]
) -> None:
    monkeypatch.setenv("NNI_PLATFORM", "local")
    sentence = call(name, *arguments, folder=tmp_path).sentence()
    assert "trains several times, and a trial of NNI reports one training" in sentence
    assert not list(tmp_path.iterdir())


def test_a_folder_of_one_training_is_not_for_several_seeds(tmp_path: Path) -> None:
    (tmp_path / "runs/a").mkdir(parents=True)
    (tmp_path / "runs/a/recipe.yml").write_text("name: a\n")
    arguments = ("--architecture", "cream_14", "--name", "a", "--seeds", 0, 1)
    assert "holds a training of one seed" in call("retrain_child", *arguments, folder=tmp_path).sentence()
