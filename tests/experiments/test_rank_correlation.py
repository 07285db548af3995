"""The shipped experiment of the rank correlation, and the command that puts together what its trials have trained."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from scipy.stats import kendalltau

from tests.conftest import REPOSITORY
from tests.experiments.running import running
from tests.trials.processes import trial

pytestmark = pytest.mark.slow

EPOCHS = 2
PATHS = 3
SMALLER = ("--paths", str(PATHS), "--set", f"epochs={EPOCHS}", "--set", "schedule.warmup_epochs=0")
SMALLER += ("--set", "data.validation_fraction=0.7")


def content(folder: Path) -> dict[Path, tuple[int, str]]:
    """All files in a folder: when each was written, and what it holds."""
    return {
        file.relative_to(folder): (file.stat().st_mtime_ns, hashlib.sha256(file.read_bytes()).hexdigest())
        for file in folder.rglob("*")
        if file.is_file()
    }


def test_trials_train_what_the_command_then_puts_together(tmp_path: Path) -> None:
    for part in ("experiments", "trials", "nni_cream", "search_spaces"):
        (tmp_path / part).symlink_to(REPOSITORY / part)
    # Under the name of the search that the experiment is for.
    tiny = REPOSITORY / "tests/experiments/tiny_recipe.yml"
    searched = trial(tmp_path, "search_cream.py", "--recipe", tiny, "--name", "cream_mnist5k")
    assert searched.returncode == 0, searched.stderr

    config = yaml.safe_load((REPOSITORY / "experiments/rank_correlation.yml").read_text())
    # Two trials at a time, as the file says that it is done.
    command = f"{config['trialCommand']} --workers 2"
    config["trialCommand"] = " ".join([command, *SMALLER])
    config["searchSpace"]["path"]["_value"] = list(range(1, PATHS + 1))
    config |= {"maxTrialNumber": PATHS, "trialConcurrency": 2, "trialCodeDirectory": str(tmp_path)}
    config |= {"experimentWorkingDirectory": str(tmp_path / "runs/nni")}
    (tmp_path / "rank_correlation.yml").write_text(yaml.safe_dump(config))
    folder = tmp_path / "runs/rank_correlation"
    trained_by_trials: dict[str, dict[str, Any]] = {}
    with running(tmp_path / "rank_correlation.yml") as experiment:
        trials = experiment.await_end()
        assert [each["status"] for each in trials] == ["SUCCEEDED"] * PATHS
        first, second, _ = sorted(trials, key=lambda each: each["startTime"])
        assert second["startTime"] < first["endTime"]
        finals = {trial_id: value for trial_id, _, value in experiment.reports("FINAL")}
        for each in trials:
            identity = each["trialJobId"]
            curve = [(place, value) for own, place, value in experiment.reports("PERIODICAL") if own == identity]
            assert [place for place, _ in curve] == list(range(EPOCHS))
            assert [value["epoch"] for _, value in curve] == [1, 2]
            assert curve[-1][1]["default"] == finals[identity]["default"] == finals[identity]["val_accuracy"]
            # Not by the number that NNI shows for the trial: see docs/nni.md.
            trained_by_trials[finals[identity]["network"]] = finals[identity]
            # What the web UI opens, although the run is elsewhere.
            events = tmp_path / "runs/nni" / experiment.identity / "trials" / identity / "output/tensorboard"
            run = events.resolve().parent
            assert run.is_relative_to(folder / "paths")
            assert json.loads((run / "result.json").read_text())["network"] == finals[identity]["network"]
    given = [json.loads(chosen)["parameters"]["path"] for each in trials for chosen in each["hyperParameters"]]
    assert sorted(given) == [1, 2, 3]
    assert len(trained_by_trials) == PATHS
    assert [file.name for file in folder.iterdir()] == ["paths"]

    trained = content(folder)
    # As the experiment says, and as documented, but for the settings that make its trials smaller.
    _, script, *arguments = command.split()
    together = trial(tmp_path, Path(script).name, *arguments, *SMALLER)
    assert together.returncode == 0, together.stderr
    assert "trainings" not in together.stdout
    after = content(folder)
    assert {file: after[file] for file in trained} == trained
    assert {str(file) for file in after.keys() - trained.keys()} == {
        f"rank_correlation.{suffix}" for suffix in ("json", "md", "svg", "png")
    }

    stored = json.loads((folder / "rank_correlation.json").read_text())
    assert {row["network"] for row in stored["paths"]} == set(trained_by_trials)
    for row in stored["paths"]:
        assert row["test_accuracy"]["mean"] == trained_by_trials[row["network"]]["test_accuracy"]
    shared = [row["shared_accuracy"]["cream_mnist5k"] for row in stored["paths"]]
    alone = [row["test_accuracy"]["mean"] for row in stored["paths"]]
    tau = stored["searches"]["cream_mnist5k"]["tau"]
    assert tau["value"] == pytest.approx(kendalltau(shared, alone).statistic)
    assert together.stdout.endswith((folder / "rank_correlation.md").read_text())
    assert f"| cream_mnist5k | {PATHS} | {tau['value']:.2f} [" in together.stdout
