"""Trainings by the recipes that are shipped, with several seeds, and comparisons, as a user starts them."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from nni_cream.architecture import CreamPath
from nni_cream.child import Child, build_network
from nni_cream.compare import FOUND, RANDOM, Contestant
from nni_cream.cost import measure_network
from nni_cream.genotype import Genotype
from nni_cream.seeds import Spread
from tests.latency_tables import made_up
from tests.test_retrain import GENOTYPE
from tests.trials.commands import Began, call, content, main_of
from tests.trials.processes import trial

PATH = "[[0], [1], [3], [4, 0], [2], [3], [0]]"
OPERATIONS = ["none", "max_pool_3x3", "skip_connect", "sep_conv_3x3", "dil_conv_3x3"]


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


def compare_here(folder: Path, *arguments: object) -> str:
    """Compare in this process, without the reports of the trainings, and return what is printed."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["compare.py", *map(str, arguments)])
        patch.setattr("nni_cream.retrain.leave_report", lambda *_: None)
        patch.chdir(folder)
        with contextlib.redirect_stdout(out):
            main_of("compare")()
    return out.getvalue()


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
    arguments += settings(epochs=1, schedule__warmup_epochs=0, data__batch_size=64, data__validation_fraction=0.8)
    said = compare_here(tmp_path, *arguments)
    folder = tmp_path / "runs/compare-tiny"
    assert said.endswith((folder / "comparison.md").read_text())
    rows = {row["group"]: row for row in read(folder / "comparison.json")["rows"]}
    assert list(rows) == ["found by the search", "random", "cream_14"]
    interval = yaml.safe_load(search.read_text())["flops"]
    assert interval["min"] <= rows["random"]["flops"] / 1e6 <= interval["max"]
    assert (rows["found by the search"]["flops"], rows["found by the search"]["params"]) == (cost.macs, cost.params)
    again = compare_here(tmp_path, *arguments)
    assert again.splitlines()[-5:] == said.splitlines()[-5:]
    assert again.count("holds a training that has ended") == 3


@pytest.mark.slow
def test_a_genotype_is_compared_with_the_standard_networks(tmp_path: Path) -> None:
    """Unless others are named, and with random cells of the same kind."""
    size = {"channels": 2, "cells": 3, "nodes": 2, "operations": OPERATIONS}
    data = {"name": "digits", "resolution": 16}
    # Dearer than it is, so that which network is nearest is not what its classifier costs.
    child = Child(GENOTYPE, 10, 0.5, 10**9, 2, data, {"name": "cells", "seed": 0}, space=size)
    child.save(tmp_path / "runs/cells/child.json", build_network(str(GENOTYPE), 10, {"kind": "search", **size}))
    less = settings(epochs=1, schedule__warmup_epochs=0, data__resolution=16, data__batch_size=48)
    less += settings(darts__channels=4, darts__cells=3, data__validation_fraction=0.9, data__architecture_fraction=0.05)
    compare_here(tmp_path, "--seeds", 0, "--random", 1, *less)
    stored = read(tmp_path / "runs/compare-cells/comparison.json")
    assert [row["group"] for row in stored["rows"]] == [FOUND, RANDOM, "mobilenetv3_large_100", "resnet18"]
    assert [row["networks"] for row in stored["rows"]] == [1] * 4
    networks = {name: summary["network"] for name, summary in stored["networks"].items()}
    random = Genotype.parse(networks["random1"])
    assert networks == {
        "found": str(GENOTYPE),
        "random1": str(random),
        "mobilenetv3_large_100": "mobilenetv3_large_100",
        "resnet18": "resnet18",
    }
    assert random != GENOTYPE
    assert {operation for operation, _ in (*random.normal, *random.reduce)} <= set(OPERATIONS[1:])
    assert stored["rows"][3]["flops"] == measure_network(timm.create_model("resnet18", num_classes=10), 16).macs


def test_random_networks_keep_to_the_time_of_the_search(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, interval = made_up(), {"table": str(tmp_path / "gone.json"), "min": 1.45, "max": 1.55}
    search = yaml.safe_load((repository / "tests/experiments/tiny_recipe.yml").read_text())
    table.save(tmp_path / "runs/tiny/latency.json")
    (tmp_path / "runs/tiny/recipe.yml").write_text(yaml.safe_dump({**search, "latency": interval}))
    data = {"name": "digits", "resolution": 32}
    child = Child(CreamPath.parse(PATH), 10, 0.5, 1, 2, data, {"name": "tiny", "seed": 0}, latency=1.5)
    child.save(tmp_path / "runs/tiny/child.json", nn.Linear(1, 1))
    found: list[Contestant] = []

    def begin(_: object, contestants: list[Contestant], *__: object) -> None:
        found.extend(contestants)
        raise Began

    monkeypatch.setattr("nni_cream.compare.compare", begin)
    with pytest.raises(Began):
        call("compare", "--random", 8, folder=tmp_path)
    times = [table.of(CreamPath.parse(one.network)) for one in found if one.group == RANDOM]
    assert len(times) == 8
    assert all(1.45 <= time <= 1.55 for time in times)


OTHER = "[[0], [0], [3], [4, 0], [2], [3], [0]]"
DIGITS = settings(data__name="digits", data__resolution=32)


@pytest.mark.parametrize("seeds", [(), ("--seeds", 0, 1)], ids=["one", "seeds"])
def test_the_training_of_another_network_does_not_go_on(tmp_path: Path, seeds: tuple[object, ...]) -> None:
    """Nor with any seed, where that of a later one is in the way."""
    arguments = ("--name", "a", *DIGITS)
    begun = ("--output", tmp_path / "runs/a/seed1", "--set", "seed=1") if seeds else ()
    with pytest.raises(Began):
        call("retrain_child", "--architecture", PATH, *begun, *arguments, folder=tmp_path)
    before = content(tmp_path)
    sentence = call("retrain_child", "--architecture", OTHER, *seeds, *arguments, folder=tmp_path).sentence()
    folder = f"runs/a{'/seed1' if seeds else ''}"
    assert sentence == (
        f"{folder} holds a training of {PATH} on digits at 32 pixels, not of {OTHER} on digits at 32 pixels; choose "
        "another folder with --name."
    )
    assert content(tmp_path) == before
    with pytest.raises(Began):
        call("retrain_child", "--architecture", PATH, *seeds, *arguments, folder=tmp_path)


@pytest.fixture
def searched(repository: Path, tmp_path: Path) -> Path:
    """What a search leaves that a comparison reads."""
    data = {"name": "digits", "resolution": 32}
    child = Child(CreamPath.parse(PATH), 10, 0.5, 1, 2, data, {"name": "tiny", "seed": 0})
    child.save(tmp_path / "runs/tiny/child.json", nn.Linear(1, 1))
    (tmp_path / "runs/tiny/recipe.yml").write_text((repository / "tests/experiments/tiny_recipe.yml").read_text())
    return tmp_path


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        ("resnet19", "resnet19 cannot take part: timm has no network 'resnet19'; did you mean 'resnet18'?"),
        ("vit_tiny_patch16_224", "vit_tiny_patch16_224 cannot take part: The network cannot take images of 32 pixels"),
    ],
)
def test_networks_that_cannot_be_compared_are_refused_before_others_are_trained(
    searched: Path, network: str, expected: str
) -> None:
    before = content(searched)
    arguments = ("--random", 1, "--seeds", 0, "--networks", "cream_14", network)
    assert call("compare", *arguments, folder=searched).sentence().startswith(expected)
    assert content(searched) == before


@pytest.mark.parametrize("other", [{"epochs": 7}, {"data__batch_size": 9}, {"optimizer__lr": 0.01}], ids=str)
def test_trainings_by_two_recipes_are_not_compared(searched: Path, other: dict[str, object]) -> None:
    arguments = ("--random", 1, "--seeds", 0, "--networks")
    with pytest.raises(Began):
        call("compare", *arguments, folder=searched)
    # As if it had ended, and the next one were to be trained.
    result = {"network": PATH, "folder": "a", "test_accuracy": 0.5, "val_accuracy": 0.5, "flops": 1, "params": 2}
    (searched / "runs/compare-tiny/found/seed0/result.json").write_text(json.dumps(result))
    before = content(searched)
    sentence = call("compare", *arguments, *settings(**other), folder=searched).sentence()
    assert sentence.startswith("runs/compare-tiny/found/seed0 holds a run of another recipe")
    assert content(searched) == before
    with pytest.raises(Began):
        call("compare", *arguments, folder=searched)


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
