"""NNI's own tuners and assessors with what the trials report, in real experiments."""

from __future__ import annotations

import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
import yaml
from nni.experiment.config import ExperimentConfig
from nni.tools.package_utils.tuner_factory import create_builtin_class_instance

from nni_cream.architecture import CreamPath
from nni_cream.child import Child
from nni_cream.search import result_of
from tests.conftest import REPOSITORY
from tests.experiments.running import Running, running, tiny_experiment

pytestmark = pytest.mark.slow

# NNI 3.0's local service notes that it was the assessor only after it has set the status.
ENDED_EARLY = ("EARLY_STOPPED", "USER_CANCELED")


def lr_of(trial: dict[str, Any]) -> float:
    return float(json.loads(trial["hyperParameters"][0])["parameters"]["optimizer.lr"])


def in_turn(*rates: float) -> dict[str, Any]:
    """Trials with these learning rates, one after the other."""
    parameters = [{"optimizer.lr": rate} for rate in rates]
    return {
        "searchSpace": {"combine_params": {"_type": "choice", "_value": parameters}},
        "tuner": {"name": "BatchTuner"},
        "maxTrialNumber": len(rates),
    }


def finals(experiment: Running) -> dict[str, Any]:
    return {trial: value for trial, _, value in experiment.reports("FINAL")}


def test_medianstop_ends_what_falls_behind_and_what_diverges_fails(tmp_path: Path) -> None:
    good, bad, diverging = 0.05, 1e-9, 1e12
    assessor = {"name": "Medianstop", "classArgs": {"optimize_mode": "maximize", "start_step": 2}}
    config = tiny_experiment(
        tmp_path, "epochs=4", "data.batch_size=128", **in_turn(good, bad, diverging), assessor=assessor
    )
    with running(config) as experiment:
        trials = {lr_of(trial): trial for trial in experiment.await_end()}
        assert trials[good]["status"] == "SUCCEEDED"
        assert trials[bad]["status"] in ENDED_EARLY
        assert trials[diverging]["status"] == "FAILED"
        curve = [value for trial, _, value in experiment.reports("PERIODICAL") if trial == trials[bad]["trialJobId"]]
        assert 2 <= len(curve) < 4
        # A number that is none is not reported, neither on the way nor as a result.
        assert all(math.isfinite(value["default"]) for _, _, value in experiment.reports("PERIODICAL"))
        assert list(finals(experiment)) == [trials[good]["trialJobId"]]
        stderr = (Path(trials[diverging]["logPath"]) / "trial.stderr").read_text()
        (sentence,) = re.findall(r"^error: .*", stderr, re.MULTILINE)
        assert "at learning rate" in sentence
        assert "the training has diverged" in sentence


def test_curvefitting_ends_what_will_not_get_there(tmp_path: Path) -> None:
    good, bad = 0.05, 1e-9
    arguments = {"epoch_num": 8, "start_step": 6, "threshold": 0.95, "gap": 1}
    assessor = {"name": "Curvefitting", "classArgs": arguments}
    config = tiny_experiment(tmp_path, "epochs=8", "data.batch_size=128", **in_turn(good, bad), assessor=assessor)
    with running(config) as experiment:
        trials = {lr_of(trial): trial for trial in experiment.await_end()}
        assert trials[good]["status"] == "SUCCEEDED"
        assert trials[bad]["status"] in ENDED_EARLY
        curve = [value for trial, _, value in experiment.reports("PERIODICAL") if trial == trials[bad]["trialJobId"]]
        assert 6 <= len(curve) < 8


def reported(accuracy: float) -> dict[str, Any]:
    """A result as searches report it."""
    path = CreamPath.of([[0], [0], [3], [4], [2], [3], [0]])
    child = Child(path, 10, accuracy, flops=3_000_000, params=1_000_000, data={}, search={})
    return result_of(child)


@pytest.mark.parametrize("optimize_mode", ["maximize", "minimize"])
@pytest.mark.parametrize(("name", "key"), [("tune_cream", "optimizer.lr"), ("tune_darts", "darts.alpha_lr")])
def test_tpe_goes_where_results_are_better(name: str, key: str, optimize_mode: str) -> None:
    """The tuner of the shipped experiment, told as by NNI's dispatcher of searches that like a high learning rate."""
    config = ExperimentConfig.load(REPOSITORY / f"experiments/{name}.yml")
    arguments = config.tuner.class_args | {"seed": 0}
    if optimize_mode == "minimize":
        arguments["optimize_mode"] = "minimize"
    tuner = create_builtin_class_instance(config.tuner.name, arguments, "tuners")
    tuner.update_search_space(config.search_space)
    low, high = config.search_space[key]["_value"]

    def height(trial: int) -> float:
        """Where in its range TPE puts the learning rate; told of the result, which grows with it."""
        parameters = tuner.generate_parameters(trial)
        found = math.log(parameters[key] / low) / math.log(high / low)
        tuner.receive_trial_result(trial, parameters, reported(0.1 + 0.8 * found))
        return found

    heights = [height(trial) for trial in range(60)]
    # It draws the first 20 without looking at results.
    drawn, chosen = heights[:20], heights[40:]
    assert abs(statistics.mean(drawn) - 0.5) < 0.2
    if optimize_mode == "maximize":
        assert statistics.mean(chosen) > 0.75
    else:
        assert statistics.mean(chosen) < 0.25


def test_tpe_sets_what_the_search_uses(tmp_path: Path) -> None:
    """The shipped experiment, with fewer and smaller searches."""
    shipped = yaml.safe_load((REPOSITORY / "experiments/tune_cream.yml").read_text())
    # The cost of a path is counted in the same way, so the shipped interval holds.
    changes = {"searchSpace": shipped["searchSpace"], "tuner": shipped["tuner"]}
    config = tiny_experiment(tmp_path, **changes, maxTrialNumber=2)
    with running(config) as experiment:
        trials = experiment.await_end()
        assert [trial["status"] for trial in trials] == ["SUCCEEDED"] * 2
        results = finals(experiment)
        for trial in trials:
            parameters = json.loads(trial["hyperParameters"][0])["parameters"]
            result = results[trial["trialJobId"]]
            assert parameters["flops.min"] * 1e6 <= result["flops"] <= parameters["flops.max"] * 1e6
            recipe = yaml.safe_load((Path(trial["logPath"]) / "recipe.yml").read_text())
            assert recipe["optimizer"]["lr"] == parameters["optimizer.lr"]
            assert recipe["cream"]["prior"] == parameters["cream.prior"]
            assert 0 <= result["default"] <= 1
        counts = experiment.get("job-statistics")
        assert {item["trialJobStatus"]: item["trialJobNumber"] for item in counts} == {"SUCCEEDED": 2}


def test_the_best_paths_of_a_search_are_retrained_side_by_side(tmp_path: Path) -> None:
    """The shipped experiment, with less training, on the result of a search of the test's own."""
    for part in ("experiments", "trials", "nni_cream", "search_spaces"):
        (tmp_path / part).symlink_to(REPOSITORY / part)
    paths = [[[0], [choice], [3], [4], [2], [3], [0]] for choice in (0, 1)]
    runner_up = {"path": paths[1], "accuracy": 0.5, "flops": 1, "params": 1}
    content = {"format": "nni_cream.child/1", "path": paths[0], "num_classes": 10, "accuracy": 0.9, "flops": 1}
    content |= {"params": 1, "data": {"name": "digits", "resolution": 32}, "search": {}, "runners_up": [runner_up]}
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/child.json").write_text(json.dumps(content))

    config = yaml.safe_load((REPOSITORY / "experiments/retrain_best.yml").read_text())
    ranks = {"_type": "choice", "_value": [1, 2]}
    config["searchSpace"] |= {"rank": ranks, "seed": {"_type": "choice", "_value": [3]}}
    config["trialCommand"] += " --set epochs=2 --set schedule.warmup_epochs=0"
    config |= {"maxTrialNumber": 2, "trialCodeDirectory": str(tmp_path)}
    config |= {"experimentWorkingDirectory": str(tmp_path / "runs/nni")}
    (tmp_path / "retrain_best.yml").write_text(yaml.safe_dump(config))
    with running(tmp_path / "retrain_best.yml") as experiment:
        first, second = experiment.await_end()
        assert [first["status"], second["status"]] == ["SUCCEEDED"] * 2
        assert max(first["startTime"], second["startTime"]) < min(first["endTime"], second["endTime"])
        results = finals(experiment)
        recipes = [yaml.safe_load((Path(trial["logPath"]) / "recipe.yml").read_text()) for trial in (first, second)]
        assert sorted(recipe["rank"] for recipe in recipes) == [1, 2]
        for trial, recipe in zip((first, second), recipes, strict=True):
            result = results[trial["trialJobId"]]
            # Not what NNI shows as the trial's parameters: see docs/nni.md.
            assert CreamPath.parse(result["network"]).to_json() == paths[recipe["rank"] - 1]
            assert result["default"] == result["val_accuracy"]
            assert 0 < result["test_accuracy"] <= 1
            assert (recipe["seed"], recipe["device"]["threads"]) == (3, 1)
