"""The rank correlation of a supernet, as a user measures it: interrupted, through NNI, and again."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import nni
import pytest
import torch
import yaml
from nni.runtime import trial_command_channel
from nni.runtime.trial_command_channel import ParameterRecord, set_default_trial_command_channel
from scipy.stats import kendalltau

from nni_cream.architecture import CreamPath
from nni_cream.checkpoints import PARTS
from nni_cream.child import Child
from nni_cream.compare import random_samples
from nni_cream.rank_correlation import plan_trainings
from nni_cream.recipe import CreamRecipe, RetrainRecipe
from nni_cream.recipe_files import load_recipe
from nni_cream.runs import RunDirectory
from search_spaces.cream import CreamSpace, plan_space
from tests.conftest import REPOSITORY
from tests.test_reporting import Manager
from tests.trials.commands import call, main_of

TIMEOUT = 300
SEARCHES = ("runs/first", "runs/second")
ARGUMENTS = ("--search", *SEARCHES, "--paths", "3", "--set", "epochs=3", "--set", "schedule.warmup_epochs=0")
ARGUMENTS += ("--set", "data.batch_size=64", "--set", "data.validation_fraction=0.5")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*logging interval"),
    # Lightning's use of torch.
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with two searches that have ended, whose supernets are as they began."""
    recipe = load_recipe(CreamRecipe, REPOSITORY / "tests/experiments/tiny_recipe.yml", {})
    plan = plan_space(recipe.flops.min, recipe.flops.max, recipe.data.resolution)
    path = CreamPath.of([[0], *([0] * depth for depth in plan.depths), [0]])
    child = Child(path, 10, 0.5, 1, 2, {"name": "digits", "resolution": 32}, {"name": "tiny", "seed": 0})
    for seed, name in enumerate(SEARCHES):
        torch.manual_seed(seed)
        space = CreamSpace(plan.depths, 10, aligned=True)
        directory = RunDirectory(tmp_path / name)
        child.save(directory.child, torch.nn.Linear(1, 1))
        (tmp_path / name / "recipe.yml").write_text((REPOSITORY / "tests/experiments/tiny_recipe.yml").read_text())
        directory.checkpoint.parent.mkdir()
        state = {f"training_module._model.{key}": value for key, value in space.state_dict().items()}
        loops = {"fit_loop": {"epoch_loop.batch_progress": {"total": {"processed": 1}}}}
        weights = {**state, "matching.layer.bias": torch.zeros(1)}
        torch.save({**dict.fromkeys(PARTS), "loops": loops, "state_dict": weights}, directory.checkpoint)
    return tmp_path


def run_here(folder: Path, *arguments: str) -> str:
    """Run the command in this process, without the reports of the trainings, and return what it prints."""
    out = io.StringIO()
    before = Path.cwd()
    os.chdir(folder)
    try:
        with (
            mock.patch.object(sys, "argv", ["rank_correlation.py", *arguments]),
            mock.patch("nni_cream.retrain.leave_report"),
            contextlib.redirect_stdout(out),
        ):
            main_of("rank_correlation")()
    finally:
        os.chdir(before)
    return out.getvalue()


class Tuner(Manager):
    """NNI's manager, from which a trial gets ``parameters``."""

    def __init__(self) -> None:
        super().__init__()
        self.parameters: dict[str, Any] = {}

    def receive_parameter(self) -> ParameterRecord:
        return ParameterRecord(parameter_id=0, parameters=self.parameters)


@pytest.fixture
def tuner(monkeypatch: pytest.MonkeyPatch) -> Tuner:
    """A trial of an experiment."""
    monkeypatch.setattr(trial_command_channel, "_channel", None)
    monkeypatch.setattr(nni.trial, "_params", None)
    monkeypatch.setattr(nni.trial, "_trial_id", "T1")
    monkeypatch.setenv("NNI_PLATFORM", "local")
    tuner = Tuner()
    set_default_trial_command_channel(tuner)
    return tuner


@pytest.mark.slow
def test_it_is_interrupted_and_goes_on(place: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "trials/rank_correlation.py"), *ARGUMENTS, "--workers", "2"]
    # A group of their own, so that Ctrl-C reaches all processes at once, as in a terminal.
    started = subprocess.Popen(
        command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    paths = place / "runs/rank_correlation/paths"
    deadline = time.monotonic() + TIMEOUT
    while not list(paths.glob("*/seed0/checkpoints/last.ckpt")) and started.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(started.pid, signal.SIGINT)
    out, err = started.communicate(timeout=TIMEOUT)
    assert started.returncode == -signal.SIGINT, err
    assert out.splitlines()[0] == "3 trainings, 0 of which have ended; 2 at a time"
    # One sentence for all three processes.
    assert err.count("Interrupted; the same command goes on from the last checkpoint.") == 1
    assert "Traceback" not in err
    assert not (place / "runs/rank_correlation/rank_correlation.json").exists()
    stopped = {
        file.parents[1]: torch.load(file, weights_only=True)["global_step"]
        for file in paths.glob("*/seed0/checkpoints/last.ckpt")
        if not (file.parents[1] / "result.json").exists()
    }
    assert stopped

    # To its end, two at a time: what had begun from where it was.
    ended = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert ended.returncode == 0, ended.stderr
    out = ended.stdout
    assert re.match(r"3 trainings, [0-2] of which have ended; [12] at a time\n", out)
    folder = place / "runs/rank_correlation"
    assert out.endswith((folder / "rank_correlation.md").read_text())
    stored = json.loads((folder / "rank_correlation.json").read_text())
    for name in ("first", "second"):
        shared = [row["shared_accuracy"][name] for row in stored["paths"]]
        alone = [row["test_accuracy"]["mean"] for row in stored["paths"]]
        expected = kendalltau(shared, alone).statistic
        assert stored["searches"][name]["tau"]["value"] == pytest.approx(expected, nan_ok=True)
    assert len({row["network"] for row in stored["paths"]}) == 3
    for run in stopped:
        steps = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"]
        assert steps > stopped[run]
        # Written when the training began, and not again.
        assert (run / "environment.json").stat().st_mtime < (run / "result.json").stat().st_mtime - 0.5

    # Once more, nothing is trained, also not for one of the searches.
    files = {file: file.stat().st_mtime_ns for file in paths.glob("*/seed0/*")}
    again = call("rank_correlation", *ARGUMENTS, "--search", SEARCHES[1], folder=place)
    assert again.code == 0, again.err
    assert again.out.endswith((folder / "rank_correlation.md").read_text())
    one = json.loads((folder / "rank_correlation.json").read_text())
    assert one["searches"] == {"second": stored["searches"]["second"]}
    for row, before in zip(one["paths"], stored["paths"], strict=True):
        assert row["path"] == before["path"]
        assert row["shared_accuracy"] == {"second": before["shared_accuracy"]["second"]}
    assert {file: file.stat().st_mtime_ns for file in files} == files

    # Another recipe needs another folder.
    sentence = call("rank_correlation", *ARGUMENTS, "--set", "epochs=4", folder=place).sentence()
    assert "holds a run of another recipe" in sentence


@pytest.mark.slow
def test_a_trial_of_nni_trains_the_path_that_the_command_then_finds(place: Path, tuner: Tuner) -> None:
    tuner.parameters |= {"path": 2, "seed": 5}
    run_here(place, *ARGUMENTS, "--set", "epochs=1")
    folder = place / "runs/rank_correlation"
    (run,) = folder.glob("paths/*/seed5")
    result = json.loads((run / "result.json").read_text())
    final = tuner.metrics[-1]
    assert (final["type"], final["value"]["network"]) == ("FINAL", result["network"])
    assert final["value"]["default"] == result["val_accuracy"]
    assert not (folder / "rank_correlation.json").exists()

    # In the folder in which it is looked for, by the recipe that is looked for.
    recipe = yaml.safe_load((run / "recipe.yml").read_text())
    assert (recipe["seed"], recipe["epochs"], recipe["data"]["name"]) == (5, 1, "digits")
    search = load_recipe(CreamRecipe, place / SEARCHES[0] / "recipe.yml", {})
    paths = list(random_samples(search, 10, 3, 0))
    assert result["network"] == str(paths[1])
    training = RetrainRecipe.model_validate(recipe).model_copy(update={"seed": 0})
    planned = plan_trainings(paths, training, [5], folder)[paths[1]][5]
    assert planned.folder == run
    assert planned.ended


@pytest.mark.parametrize("path", [None, 0, 4, "2", True])
def test_a_trial_needs_a_path(place: Path, tuner: Tuner, path: object) -> None:
    tuner.parameters |= {} if path is None else {"path": path}
    sentence = call("rank_correlation", *ARGUMENTS, folder=place).sentence()
    assert f"its 'path' is {path!r}: let the search space give a number from 1 to --paths, 3" in sentence
    assert not (place / "runs/rank_correlation").exists()


def test_a_trial_trains_once(place: Path, tuner: Tuner) -> None:
    tuner.parameters |= {"path": 1}
    sentence = call("rank_correlation", *ARGUMENTS, "--seeds", 0, 1, folder=place).sentence()
    assert sentence == "A trial of NNI trains once: leave out --seeds, and let the search space give a seed."
