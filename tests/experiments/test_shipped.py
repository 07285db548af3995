"""Every experiment that is shipped: NNI understands it, and its trial can be built with what its tuner chooses."""

from __future__ import annotations

import dataclasses
import functools
import json
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import nni
import pytest
import yaml
from nni.experiment.config import ExperimentConfig
from nni.nas.strategy.base import Strategy
from nni.runtime import trial_command_channel
from nni.runtime.trial_command_channel import TrialCommandChannel, set_default_trial_command_channel
from nni.tools.package_utils.tuner_factory import create_builtin_class_instance
from nni.typehint import ParameterRecord

from nni_cream import evaluate, rank_correlation, retrain, search, search_darts, timing
from nni_cream.data import DataSplits, load_data
from nni_cream.recipe import CreamRecipe, DartsRecipe, RetrainRecipe
from nni_cream.recipe_files import dotted_keys
from tests.conftest import REPOSITORY

EXPERIMENTS = sorted((REPOSITORY / "experiments").glob("*.yml"))
RECIPES: dict[str, Any] = {
    "search_cream.py": CreamRecipe,
    "search_darts.py": DartsRecipe,
    "retrain_child.py": RetrainRecipe,
    "rank_correlation.py": RetrainRecipe,
}
# What a trial takes besides settings of its recipe.
MORE = {"rank_correlation.py": {"path"}}
CLASSES = {"cifar10": 10, "imagenet": 1000}
# All of them: one that is imported later would take over what stands in the place of the function, and keep it.
USERS_OF_IMAGES = (search, search_darts, retrain, rank_correlation, evaluate, timing)


class Built(Exception):
    """Everything has been built, and would be trained now."""


class Manager(TrialCommandChannel):
    """NNI's manager, from which a trial gets its parameters."""

    def __init__(self, parameters: dict[str, Any]) -> None:
        self.parameters = parameters

    def receive_parameter(self) -> ParameterRecord:
        return ParameterRecord(parameter_id=0, parameters=self.parameters)


def chosen(config: ExperimentConfig, number: int) -> dict[str, Any]:
    """What the tuner of the experiment chooses for its first trials."""
    tuner = create_builtin_class_instance(config.tuner.name, config.tuner.class_args, "tuners")
    tuner.update_search_space(config.search_space)
    for trial in range(number):
        parameters = tuner.generate_parameters(trial)
    return dict(parameters)


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda file: file.stem)
class TestExperiment:
    def test_says_how_it_is_run(self, file: Path) -> None:
        assert file.read_text().startswith(f"# nnictl create --config experiments/{file.name}\n#\n# ")

    def test_is_valid_for_nni(self, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # NNI asks for the private key of a remote machine, which the user has and this machine may not.
        (tmp_path / ".ssh").mkdir()
        (tmp_path / ".ssh/id_rsa").touch()
        monkeypatch.setenv("HOME", str(tmp_path))
        config = ExperimentConfig.load(file)
        config.validate()
        assert Path(config.canonical_copy().trial_code_directory) == REPOSITORY
        # NNI would wait for a GPU in vain where there is none, or, on a remote machine, give up altogether.
        assert not config.trial_gpu_number

    def test_takes_nnis_settings_of_gpus(self, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / ".ssh").mkdir()
        (tmp_path / ".ssh/id_rsa").touch()
        monkeypatch.setenv("HOME", str(tmp_path))
        config = ExperimentConfig.load(file)
        config.trial_gpu_number = 1
        machines = getattr(config.training_service, "machine_list", [config.training_service])
        for machine in machines:
            machine.use_active_gpu, machine.gpu_indices = True, [1]
        config.validate()

    def test_searches_settings_of_its_recipe_and_steers_by_the_accuracy(self, file: Path) -> None:
        config = ExperimentConfig.load(file)
        _, script, *_ = shlex.split(config.trial_command)
        name = Path(script).name
        assert set(config.search_space) <= {*dotted_keys(RECIPES[name]), *MORE.get(name, ())}
        for algorithm in (config.tuner, config.assessor):
            if algorithm is not None and algorithm.name in ("TPE", "Medianstop"):
                assert algorithm.class_args["optimize_mode"] == "maximize"

    @pytest.mark.slow
    def test_its_trial_can_be_built(self, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        config = ExperimentConfig.load(file)
        parameters = chosen(config, min(2, config.max_trial_number))
        manager = Manager(json.loads(nni.dump(parameters)))
        monkeypatch.setattr(trial_command_channel, "_channel", None)
        monkeypatch.setenv("NNI_PLATFORM", "local")
        monkeypatch.setenv("NNI_OUTPUT_DIR", str(tmp_path / "trial"))
        set_default_trial_command_channel(manager)

        def images(data: Any, seed: int) -> DataSplits:
            # CIFAR-10 and ImageNet are not on this machine.
            name = data.name if data.name not in CLASSES else "digits"
            splits = load_data(name, resolution=data.resolution, seed=seed)
            names = map(str, range(CLASSES.get(data.name, splits.num_classes)))
            return dataclasses.replace(splits, class_names=tuple(names))

        for module in USERS_OF_IMAGES:
            monkeypatch.setattr(module, "load_splits", images)

        def stop(*_: Any, **__: Any) -> None:
            raise Built

        monkeypatch.setattr(Strategy, "run", stop)
        monkeypatch.setattr("pytorch_lightning.Trainer.fit", stop)
        # As in the folder of the code, but with a search of the test's own.
        (tmp_path / "experiments").symlink_to(REPOSITORY / "experiments")
        search_result(tmp_path / "runs/cream_mnist5k")
        monkeypatch.chdir(tmp_path)
        _, script, *arguments = shlex.split(config.trial_command)
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        monkeypatch.setattr(sys, "path", [*sys.path])
        with pytest.raises(Built):
            runpy.run_path(str(REPOSITORY / script), run_name="__main__")
        # Where a trial does not leave its run in its own folder, another command looks for it elsewhere.
        (run,) = {*tmp_path.glob("**/recipe.yml")} - {tmp_path / "runs/cream_mnist5k/recipe.yml"}
        assert run.is_relative_to(tmp_path / ("runs/rank_correlation" if "path" in parameters else "trial"))
        recipe = yaml.safe_load(run.read_text())
        for key in parameters.keys() - MORE.get(Path(script).name, set()):
            assert functools.reduce(dict.__getitem__, key.split("."), recipe) == parameters[key]


def test_the_best_paths_are_retrained_with_several_seeds_side_by_side() -> None:
    config = ExperimentConfig.load(REPOSITORY / "experiments/retrain_best.yml")
    tuner = create_builtin_class_instance(config.tuner.name, config.tuner.class_args, "tuners")
    tuner.update_search_space(config.search_space)
    trials = [tuner.generate_parameters(trial) for trial in range(config.max_trial_number)]
    pairs = {(trial["rank"], trial["seed"]) for trial in trials}
    assert pairs == {(rank, seed) for rank in (1, 2, 3) for seed in (0, 1)}
    assert len(trials) == len(pairs)
    with pytest.raises(nni.NoMoreTrialError):
        tuner.generate_parameters(config.max_trial_number)
    assert config.trial_concurrency == 2


def search_result(folder: Path) -> None:
    """Write what a Cream search leaves: its recipe, and a path and two runners-up."""
    paths = [[[0], [choice], [3], [4, 0, 3], [2], [3], [0]] for choice in (0, 1, 2)]
    others = [{"path": path, "accuracy": 0.5, "flops": 1, "params": 1} for path in paths[1:]]
    content = {"format": "nni_cream.child/1", "path": paths[0], "num_classes": 10, "accuracy": 0.9, "flops": 1}
    content |= {"params": 1, "data": {"name": "mnist5k", "resolution": 32}, "search": {}, "runners_up": others}
    folder.mkdir(parents=True)
    (folder / "child.json").write_text(json.dumps(content))
    (folder / "recipe.yml").write_text((REPOSITORY / "experiments/recipes/cream_mnist5k.yml").read_text())
