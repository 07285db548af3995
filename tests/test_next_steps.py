"""The commands are the real ones: each is given to the program that it names."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from nni_cream import imports
from nni_cream.architecture import CreamPath
from nni_cream.child import Child, build_network, save_network
from nni_cream.genotype import Genotype
from nni_cream.next_steps import Command, after_search, after_training
from nni_cream.recipe import CreamRecipe, DartsRecipe, RetrainRecipe
from nni_cream.recipe_files import parse_override, to_yaml
from nni_cream.runs import RunDirectory
from tests.trials.commands import Began, call

PATH = CreamPath.parse("[[0], [0], [3], [4, 0, 3], [2], [3], [0]]")
EDGES = (("skip_connect", 0), ("sep_conv_3x3", 1))
GENOTYPE = Genotype(EDGES, (2,), EDGES, (2,))
DATA: dict[str, Any] = {"name": "digits", "folder": None, "resolution": 32}
CREAM = CreamRecipe.model_validate(
    {
        "name": "c" * 200,
        "epochs": 2,
        "data": {"name": "digits"},
        "flops": {"min": 2, "max": 3},
        "cream": {"warmup_epochs": 1},
    }
)
DARTS = DartsRecipe.model_validate(
    {
        "name": "cells",
        "epochs": 2,
        "seed": 2**32 - 1,
        "data": {"name": "digits", "resolution": 8},
        "space": {"channels": 2, "cells": 3, "nodes": 1},
        "optimizer": {"name": "momentum"},
    }
)
TRAINING = RetrainRecipe.model_validate({"name": "again", "epochs": 2})


def directory_of(folder: Path, recipe: CreamRecipe | DartsRecipe | RetrainRecipe) -> RunDirectory:
    # A name that a shell would take apart.
    directory = RunDirectory(folder / "a run's $folder")
    directory.path.mkdir()
    (directory.path / "recipe.yml").write_text(to_yaml(recipe))
    return directory


def begins(command: Command, folder: Path) -> None:
    """Run a command up to where it would train or test."""
    python, script, *arguments = shlex.split(command.text)
    assert python == "python"
    try:
        ended = call(Path(script).stem, *arguments, folder=folder)
    except Began:
        return
    pytest.fail(f"{command.text} was refused: {ended.err}")


@pytest.mark.parametrize("kind", ["cream", "darts"])
def test_after_a_search(tmp_path: Path, kind: str) -> None:
    recipe: CreamRecipe | DartsRecipe = CREAM if kind == "cream" else DARTS
    directory = directory_of(tmp_path, recipe)
    other = {"path": PATH.to_json(), "accuracy": 0.4, "flops": 1, "params": 1}
    architecture: CreamPath | Genotype = PATH if kind == "cream" else GENOTYPE
    space = {} if kind == "cream" else {"channels": 2, "cells": 3, "nodes": 1}
    child = Child(architecture, 10, 0.5, 1, 2, {**DATA}, {"name": "a", "seed": 0}, [other] if not space else [], space)
    child.save(directory.child, build_network(str(architecture), 10, {"kind": "search", **space}))
    commands = after_search(recipe, directory, runners_up=len(child.runners_up))
    scripts = [command.words[1] for command in commands[:-1]]
    trial = f"trials/search_{kind}.py"
    expected = ["trials/retrain_child.py", "trials/retrain_child.py", "trials/test_child.py", trial]
    assert scripts == (expected if kind == "cream" else expected[1:])
    for command in commands[:-1]:
        begins(command, tmp_path)
    assert commands[-1].words == ("tensorboard", "--logdir", str(directory.path / "tensorboard"))
    # Each with a name of its own, so that none is refused because of another.
    names = [command.words[command.words.index("--name") + 1] for command in commands if "--name" in command.words]
    assert len(set(names)) == len(names) == (3 if kind == "cream" else 2)
    assert names[0] == "retrain-a-run-s--folder"
    assert names[-1] == ("c" * 150 + "-seed1" if kind == "cream" else "cells-seed0")


@pytest.mark.parametrize("network", [str(PATH), str(GENOTYPE), "cream_14"], ids=["path", "genotype", "timm"])
def test_after_a_training(tmp_path: Path, network: str) -> None:
    directory = directory_of(tmp_path, TRAINING)
    size = {"kind": "trained", **TRAINING.darts.model_dump()} if network.startswith("Genotype") else {}
    save_network(
        directory.path / "model.safetensors",
        build_network(network, 10, size) if not size else torch.nn.Linear(1, 1),
        architecture=network,
        num_classes=10,
        data=DATA,
        size=size,
    )
    test, again, tensorboard = after_training(TRAINING, directory, network, DATA)
    begins(again, tmp_path)
    if not size:
        begins(test, tmp_path)
    assert test.words[-1] == str(directory.path / "model.safetensors")
    assert tensorboard.words[0] == "tensorboard"


@pytest.mark.parametrize("folder", ["/data/photos", "/data/<b> & 'more' \"of\": them #1", "007", "true"])
def test_a_folder_reaches_the_command_as_it_is(tmp_path: Path, folder: str) -> None:
    directory = directory_of(tmp_path, TRAINING)
    data = {"name": "folder", "folder": folder, "resolution": 32}
    _, again, _ = after_training(TRAINING, directory, "cream_14", data)
    words = shlex.split(again.text)
    settings = [words[place + 1] for place, word in enumerate(words) if word == "--set"]
    assert dict(map(parse_override, settings)) == {
        "data.name": "folder",
        "data.folder": os.path.abspath(folder),
        "data.resolution": 32,
        "seed": 1,
    }


def test_a_folder_is_found_from_another_working_directory(tmp_path: Path) -> None:
    recipe = CREAM.model_copy(update={"data": CREAM.data.model_copy(update={"name": "folder", "folder": Path("a #1")})})
    *_, again, _ = after_search(recipe, directory_of(tmp_path, recipe))
    assert parse_override(again.words[again.words.index("--set") + 1]) == ("data.folder", os.path.abspath("a #1"))
    *_, again, _ = after_search(CREAM, RunDirectory(tmp_path))
    assert not any("data.folder" in word for word in again.words)


@pytest.mark.parametrize("changes", [{"rank": 2}, {"inherit_weights": True}], ids=str)
def test_a_training_that_needs_the_search_is_not_repeated_without_it(tmp_path: Path, changes: dict[str, Any]) -> None:
    recipe = TRAINING.model_copy(update=changes)
    commands = after_training(recipe, directory_of(tmp_path, recipe), str(PATH), DATA)
    assert [command.words[1] for command in commands] == ["trials/test_child.py", "--logdir"]


def test_files_that_were_imported_are_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imports, "_IMPORTED", [tmp_path / "of mine.py"])
    commands = after_search(CREAM, directory_of(tmp_path, CREAM), runners_up=1)
    commands += after_training(TRAINING, RunDirectory(tmp_path), str(PATH), DATA)
    trials = [command.words for command in commands if command.words[0] == "python"]
    assert [words[1] for words in trials] == [
        f"trials/{name}.py"
        for name in ("retrain_child", "retrain_child", "test_child", "search_cream", "test_child", "retrain_child")
    ]
    assert all(words[2:4] == ("--import", str(tmp_path / "of mine.py")) for words in trials)
