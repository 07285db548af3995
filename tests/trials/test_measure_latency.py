"""The command line that measures a latency table, and a search that keeps to one."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from nni_cream import timing
from nni_cream.architecture import CreamPath
from nni_cream.child import Child
from nni_cream.history import History
from nni_cream.latency import LatencyTable
from nni_cream.recipe import CreamRecipe
from nni_cream.recipe_files import load_recipe
from nni_cream.runs import RunDirectory
from nni_cream.timing import space_of
from tests.conftest import REPOSITORY
from tests.latency_tables import made_up
from tests.trials.commands import Began, Ended, call
from tests.trials.processes import forked, kill_in_epoch

TINY = REPOSITORY / "tests/experiments/tiny_recipe.yml"


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure so shortly that the times are of no use."""
    monkeypatch.setattr(timing, "ROUNDS", 1)
    monkeypatch.setattr(timing, "SECONDS", 1e-5)


def measure(folder: Path, *arguments: object) -> Ended:
    return call("measure_latency", "--recipe", TINY, "--children", 3, "--threads", 1, *arguments, folder=folder)


@pytest.mark.usefixtures("_quick")
def test_a_table_is_measured_and_a_search_takes_it(tmp_path: Path) -> None:
    ended = measure(tmp_path)
    assert ended.code == 0, ended.err
    table = LatencyTable.load(tmp_path / "latency.json")
    assert [file.name for file in tmp_path.iterdir()] == ["latency.json"]
    assert (table.resolution, table.num_classes, table.operations) == (32, 10, (0, 1, 2, 3, 4, 5))
    conditions = table.conditions
    assert (conditions.device, conditions.threads, conditions.batch_size, conditions.precision) == (
        ("cpu", 1, 1, "32-true")
    )
    assert len(table.calibration.networks) == len(table.validation.networks) == 3
    first, _, *rows, factor, _, _, paths, last = ended.out.splitlines()
    assert first == "Measuring blocks and 6 networks, with images of 32 pixels."
    assert len(rows) == 3
    assert factor.startswith(f"factor:    {table.calibration.scale:.3f} ")
    assert last == "table:     latency.json"

    # The range that it ends with is that of the search.
    recipe = load_recipe(CreamRecipe, TINY, {})
    space, _ = space_of(recipe, 10)
    budget = table.budget(space.depths, space.operations, space.skip, 0, 1)
    assert re.search(r"([\d.]+) ms to ([\d.]+) ms", paths).groups() == (  # type: ignore[union-attr]
        f"{budget.shortest:.3f}",
        f"{budget.longest:.3f}",
    )
    settings = ["latency.table=latency.json", f"latency.max={budget.longest}"]
    given = [word for setting in settings for word in ("--set", setting)]
    with pytest.raises(Began):
        call("search_cream", "--recipe", TINY, *given, folder=tmp_path)
    other = ["--name", "other", "--set", "data.resolution=40"]
    refused = call("search_cream", "--recipe", TINY, *given, *other, folder=tmp_path)
    assert "latency.json is for images of 32 pixels, but those of this search have 40" in refused.sentence()


@pytest.mark.usefixtures("_quick")
def test_every_option_is_taken(tmp_path: Path) -> None:
    options = ["--classes", 4, "--batch-size", 2, "--precision", "bf16-true", "--output", "tables/b.json"]
    # With the number of classes given, no data is looked at.
    settings = ["--set", "space.skip=true", "--set", "data={name: folder, folder: nowhere, resolution: 40}"]
    ended = measure(tmp_path, *options, *settings)
    assert ended.code == 0, ended.err
    table = LatencyTable.load(tmp_path / "tables/b.json")
    conditions = table.conditions
    assert (table.num_classes, table.resolution) == (4, 40)
    assert (conditions.batch_size, conditions.precision) == (2, "bf16-true")
    assert "with images of 40 pixels" in ended.out


@pytest.mark.slow
def test_a_search_keeps_to_its_milliseconds(tmp_path: Path) -> None:
    """A whole one, by a table in which nothing was measured."""
    table, recipe = made_up(), load_recipe(CreamRecipe, TINY, {})
    table.save(tmp_path / "l.json")
    space, _ = space_of(recipe, 10)
    every = table.budget(space.depths, space.operations, space.skip, 0, 1)
    third = (every.longest - every.shortest) / 3
    low, high = round(every.shortest + third, 3), round(every.longest - third, 3)
    settings = ["latency.table=l.json", f"latency.min={low}", f"latency.max={high}"]
    command = [sys.executable, str(REPOSITORY / "trials/search_cream.py"), "--recipe", str(TINY)]
    command += [word for setting in settings for word in ("--set", setting)]

    def run() -> str:
        done = forked(tmp_path, command)
        assert done.returncode == 0, done.stderr
        return done.stdout

    # Interrupted, it goes on with its copy of the table.
    kill_in_epoch(1, tmp_path, "search_cream.py", "--recipe", TINY, *command[4:])
    (tmp_path / "l.json").unlink()
    assert not (tmp_path / "runs/tiny/child.json").exists()
    said = run()
    directory = RunDirectory(tmp_path / "runs/tiny")
    child = Child.load(directory.child)
    found = [child, *(child.ranked(rank) for rank in range(2, 2 + len(child.runners_up)))]
    assert len(found) == 3
    for path in found:
        assert isinstance(path.architecture, CreamPath)
        assert path.latency == table.of(path.architecture)
        assert low <= path.latency <= high
    history = History.load(directory.history)
    for place in history.board[2]:
        assert place.latency == table.of(CreamPath.parse(place.path))
    assert f"latency:   {child.latency:.3f} ms predicted for a batch of 1 on Abacus 3000" in said
    assert LatencyTable.load(directory.latency) == table
    assert f"predicted to take between the {low:g} and {high:g} ms" in directory.report.read_text()
    assert json.loads(directory.child.read_text())["latency"] == child.latency
    assert "holds a search that has ended" in call("search_cream", "--recipe", TINY, *command[4:], folder=tmp_path).out
