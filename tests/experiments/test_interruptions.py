"""What NNI's users do to experiments, and what happens to them: stop, resume, and a manager that is killed."""

from __future__ import annotations

import csv
import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.experiments.ports import free_port
from tests.experiments.running import Running, nnictl, running, tiny_experiment

pytestmark = pytest.mark.slow


def resume(experiment: Running) -> None:
    experiment.port = free_port()
    nnictl("resume", experiment.identity, "--port", str(experiment.port))


def kill_manager(experiment: Running) -> list[psutil.Process]:
    """Kill NNI's manager, and give its dispatcher, which ends by itself after some time of looking for it."""
    manager = experiment.manager()
    dispatchers = [child for child in manager.children(recursive=True) if "--exp_params" in child.cmdline()]
    assert dispatchers
    manager.kill()
    return dispatchers


def is_at_work(process: psutil.Process) -> bool:
    """Whether it has not ended; nobody may have taken notice of its end, since its parent was killed."""
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def epochs_in(folder: Path) -> list[int]:
    with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
        return [int(row["epoch"]) for row in csv.DictReader(file)]


def trained_epochs(folder: Path) -> list[int]:
    """The epochs in the order in which processes have trained them, one that was trained twice appearing twice."""
    return [int(epoch) for epoch in re.findall(r"PRINT epoch (\d+),", (folder / "trial.log").read_text())]


def assert_ended_well(experiment: Running, folder: Path, epochs: int) -> None:
    """The only trial has succeeded in ``folder``; its curve has each epoch in its place, with the table's values."""
    (trial,) = experiment.await_end()
    assert trial["status"] == "SUCCEEDED", (folder / "trial.stderr").read_text()
    assert experiment.folder() == folder
    curve: dict[int, dict[str, Any]] = {}
    for _, place, value in experiment.reports("PERIODICAL"):
        assert value["epoch"] == place + 1
        curve[place] = value
    assert sorted(curve) == list(range(epochs))
    with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
        table = [float(row["val_accuracy"]) for row in csv.DictReader(file)]
    assert [curve[place]["default"] for place in range(epochs)] == table
    child = json.loads((folder / "child.json").read_text())
    assert experiment.reports("FINAL")[-1][2]["default"] == child["accuracy"]
    assert not (folder / "unreported").exists()


def assert_trained_once(folder: Path, before: list[int], epochs: int) -> None:
    """The second process has trained what the first left, and at most the epoch that the first had not yet saved."""
    trained = trained_epochs(folder)
    once = list(range(1, epochs + 1))
    assert trained in (once, sorted([*once, before[-1]]))


def test_a_stopped_experiment_is_resumed_where_it_was(tmp_path: Path) -> None:
    epochs = 6
    with running(tiny_experiment(tmp_path, f"epochs={epochs}")) as experiment:
        experiment.await_epoch(2)
        folder = experiment.folder()
        nnictl("stop", experiment.identity)
        before = epochs_in(folder)
        assert 2 <= len(before) < epochs
        resume(experiment)
        assert_ended_well(experiment, folder, epochs)
    assert epochs_in(folder) == list(range(1, epochs + 1))
    assert_trained_once(folder, before, epochs)
    assert yaml.safe_load((folder / "recipe.yml").read_text())["optimizer"]["lr"] == 0.05  # the tuner's, as before


def test_a_trial_outlives_the_manager_and_its_whole_curve_and_result_arrive(tmp_path: Path) -> None:
    epochs = 5
    # Its trial trains no epoch before it may. To stop it (SIGSTOP) would not do: it is in the process group of the
    # manager and of its dispatcher, and where these share a session with init, the kernel kills what is stopped there
    # (SIGHUP) when the dispatcher ends and leaves the group an orphan.
    config = tiny_experiment(tmp_path, f"epochs={epochs}")
    steps = tmp_path / "steps"
    steps.mkdir()
    script = "trials/search_cream.py"
    config.write_text(config.read_text().replace(script, f"-m tests.experiments.stepwise {steps} {script}"))
    with running(config) as experiment:
        experiment.await_epoch(1)
        folder = experiment.folder()
        first = psutil.Process(int((folder / ".lock").read_text()))
        dispatchers = kill_manager(experiment)
        (steps / "1").touch()
        experiment.await_((folder / "unreported").is_dir, "the trial had a report that nobody took")
        # Users are told to wait for 30 seconds: until then the old dispatcher would answer in the place of the new one.
        experiment.await_(lambda: not any(map(is_at_work, dispatchers)), "the old dispatcher had given up")
        assert is_at_work(first)
        resume(experiment)
        said = f"Process {first.pid} still runs this trial"
        experiment.await_(lambda: said in (folder / "trial.log").read_text(), "the second process had seen the first")
        # It reports for the first, and lets it work to its end.
        experiment.await_epoch(2)
        assert epochs_in(folder) == [1, 2]
        assert is_at_work(first)
        for epoch in range(2, epochs + 1):
            (steps / str(epoch)).touch()
        assert_ended_well(experiment, folder, epochs)
    assert trained_epochs(folder) == list(range(1, epochs + 1))
