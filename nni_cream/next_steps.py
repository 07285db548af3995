"""How to go on after a run: the exact commands."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from nni_cream.imports import import_options
from nni_cream.recipe import CreamRecipe, Recipe, RetrainRecipe
from nni_cream.recipe_files import read_yaml
from nni_cream.runs import RunDirectory

# Of the name of a run, what its successors repeat: they add to it, and names have an end.
_NAME_CHARACTERS: Final = 150
_SEEDS: Final = 2**32


@dataclass(frozen=True)
class Command:
    """A command, as words, for the folder of the project; and what it is good for."""

    what: str
    words: tuple[str, ...]

    @property
    def text(self) -> str:
        """The command as a line for a shell."""
        return shlex.join(self.words)


def after_search(recipe: Recipe, directory: RunDirectory, runners_up: int = 0) -> list[Command]:
    """Return what can be done once a search has ended.

    Args:
        recipe: of the search.
        directory: of the search.
        runners_up: how many paths it has found besides the best.
    """
    child = str(directory.child.resolve())
    retrain = (*_trial("retrain_child.py"), "--child", child)
    # After the folder, as by itself: two searches by one recipe are not the same. But a folder may have any name.
    name = "retrain-" + re.sub(r"[^A-Za-z0-9._-]", "-", directory.path.resolve().name)[:_NAME_CHARACTERS]
    what = "Train the network from scratch, and test it on images that the search has not seen"
    commands = [Command(what, (*retrain, "--name", name))]
    if runners_up:
        commands.append(
            Command(
                f"The same with the second best path; the ranks go to {1 + runners_up}",
                (*retrain, "--set", "rank=2", "--name", f"{name}-2"),
            )
        )
    trial = "search_cream.py" if isinstance(recipe, CreamRecipe) else "search_darts.py"
    return [
        *commands,
        Command(
            "Test the network as it is, with the weights of the supernet",
            (*_trial("test_child.py"), "--checkpoint", child),
        ),
        Command(
            "Search again with another seed, which shows how much of the result is chance",
            (*_trial(trial), *_recipe_of(directory), *_folder_of(recipe), *_another_seed(recipe)),
        ),
        _tensorboard(directory),
    ]


def after_training(
    recipe: RetrainRecipe, directory: RunDirectory, network: str, data: Mapping[str, Any]
) -> list[Command]:
    """Return what can be done once a training has ended.

    Args:
        recipe: of the training.
        directory: of the training.
        network: what was trained, as text.
        data: the data settings as used (``name``, ``folder``, ``resolution``), some of which may be of a search.
    """
    model = str((directory.path / "model.safetensors").resolve())
    commands = [Command("Test the trained network again", (*_trial("test_child.py"), "--checkpoint", model))]
    # Both are about the file of a search, and this command is without one.
    if recipe.rank == 1 and not recipe.inherit_weights:
        words = [*_trial("retrain_child.py"), *_recipe_of(directory), "--architecture", network]
        for key in ("name", "folder", "resolution"):
            if data[key] is not None:
                value = os.path.abspath(data[key]) if key == "folder" else data[key]
                words += ["--set", f"data.{key}={_as_yaml(value)}"]
        commands.append(
            Command(
                "Train it again with another seed, which shows how much of the result is chance",
                (*words, *_another_seed(recipe)),
            )
        )
    return [*commands, _tensorboard(directory)]


def _trial(name: str) -> tuple[str, ...]:
    return "python", f"trials/{name}", *import_options()


def _recipe_of(directory: RunDirectory) -> tuple[str, str]:
    return "--recipe", str((directory.path / "recipe.yml").resolve())


def _folder_of(recipe: Recipe) -> tuple[str, ...]:
    # The command is for another working directory than the one that the recipe may have been written for.
    folder = recipe.data.folder
    if folder is None or folder.is_absolute():
        return ()
    return "--set", f"data.folder={_as_yaml(os.path.abspath(folder))}"


def _another_seed(recipe: Recipe) -> tuple[str, ...]:
    seed = (recipe.seed + 1) % _SEEDS
    return "--set", f"seed={seed}", "--name", f"{recipe.name[:_NAME_CHARACTERS]}-seed{seed}"


def _tensorboard(directory: RunDirectory) -> Command:
    events = str((directory.path / "tensorboard").resolve())
    return Command("All curves, those of every step too, and the pictures", ("tensorboard", "--logdir", events))


def _as_yaml(value: Any) -> str:
    """Write a value so that ``--set``, which reads YAML, takes it for what it is."""
    try:
        if read_yaml(str(value)) == value:
            return str(value)
    except ValueError:
        pass
    return json.dumps(value, ensure_ascii=False)
