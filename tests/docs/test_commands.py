"""No command of README and the documentation is refused, and runs that they name are made by one of them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nni_cream import compare, evaluate, export, rank_correlation, retrain, search, search_darts, seeds, timing
from nni_cream.architecture import CreamPath
from nni_cream.child import Child
from nni_cream.runs import RunDirectory
from tests.conftest import REPOSITORY
from tests.docs.reading import blocks, code_in, page
from tests.docs.test_links import PAGES
from tests.trials.commands import Began, call, main_of

# Followed to its end by a test of its own, which has the file that it imports.
FOLLOWED = "docs/adding.md"
# Where a command begins to work.
WORK = {
    "search_cream": (search, "search_cream"),
    "search_darts": (search_darts, "search_darts"),
    "retrain_child": (retrain, "retrain"),
    "compare": (compare, "line_up"),
    "rank_correlation": (rank_correlation.FinishedSearch, "open"),
    "measure_latency": (timing, "space_of"),
    "export_child": (export, "export_checkpoint"),
    "test_child": (evaluate, "evaluate"),
    "make_subimagenet": (None, "make_subimagenet"),
}
SEARCHES = {
    "cream_mnist5k": "cream_mnist5k.yml",
    "cream_elpv": "cream_elpv.yml",
    "mine": "cream_mnist5k.yml",
    "solar": "cream_elpv.yml",
}


@dataclass(frozen=True)
class Command:
    """A line of a page."""

    page: str
    script: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}: {self.script} {shlex.join(self.words)}"


def commands() -> Iterator[Command]:
    for name in PAGES:
        if name == FOLLOWED:
            continue
        text = page(name)
        shells = [block.text.replace("\\\n", " ") for block in blocks(text) if block.language == "sh"]
        # In a sentence, what is left out is an ellipsis.
        for line in [*"\n".join(shells).splitlines(), *(code for code in code_in(text) if "…" not in code)]:
            found = re.search(r"python trials/(\w+)\.py\b(.*)", line)
            if found:
                yield Command(name, found[1], tuple(shlex.split(found[2], comments=True)))


COMMANDS = list(dict.fromkeys(commands()))


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project, where nothing has run."""
    folder = tmp_path_factory.mktemp("empty")
    (folder / "experiments").symlink_to(REPOSITORY / "experiments")
    return folder


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One where a training has ended, and the searches that pages name."""
    folder = tmp_path_factory.mktemp("used")
    (folder / "experiments").symlink_to(REPOSITORY / "experiments")
    path = CreamPath.parse("[[0], [0], [3], [4], [2], [3], [0]]")
    for name, recipe in SEARCHES.items():
        child = Child(path, 10, 0.5, 1, 2, {"name": "mnist5k", "resolution": 32}, {"name": name, "seed": 0})
        child.save(folder / "runs" / name / "child.json", nn.Linear(1, 1))
        text = (REPOSITORY / "experiments/recipes" / recipe).read_text(encoding="utf-8")
        (folder / "runs" / name / "recipe.yml").write_text(text, encoding="utf-8")
    (folder / "runs/training").mkdir()
    (folder / "runs/training/model.safetensors").touch()
    return folder


def begin(command: Command, folder: Path, patch: pytest.MonkeyPatch) -> set[str]:
    """Give a command its words, and return the name of the run that it is about to begin, if it makes one."""
    made: set[str] = set()

    def work(*arguments: Any, **_: Any) -> None:
        made.update(argument.path.name for argument in arguments if isinstance(argument, RunDirectory))
        raise Began

    place, name = WORK[command.script]
    if place is None:
        patch.setitem(main_of(command.script).__globals__, name, work)
    else:
        patch.setattr(place, name, work)
    patch.setattr(seeds, "retrain", work)
    threads = torch.get_num_threads()
    try:
        ended = call(command.script, *command.words, folder=folder)
    except Began:
        return made
    finally:
        torch.set_num_threads(threads)
    pytest.fail(f"{command}: {ended.err or ended.out}")


def test_there_are_commands_of_all_kinds() -> None:
    assert {command.script for command in COMMANDS} == set(WORK)
    assert len(COMMANDS) > 25


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_is_not_refused(command: Command, empty: Path, used: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(command, empty if command.script.startswith("search") else used, monkeypatch)


def test_runs_that_are_named_are_made_by_a_command(empty: Path, used: Path) -> None:
    made: set[str] = set()
    for command in COMMANDS:
        with pytest.MonkeyPatch.context() as patch:
            made |= begin(command, empty if command.script.startswith("search") else used, patch)
    named = {Path(word).parts[1] for command in COMMANDS for word in command.words if word.startswith("runs/")}
    assert named - made == set()
