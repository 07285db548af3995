"""The command line that tests a checkpoint, as a user starts it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import nni_cream  # noqa: F401 (registers the networks)
from nni_cream.data import load_data
from tests.trials.processes import trial


def shown(result: subprocess.CompletedProcess[str]) -> dict[str, str]:
    assert result.returncode == 0, result.stderr
    return dict(line.split(":", 1) for line in result.stdout.replace(" ", "").splitlines() if ":" in line)


def refusal(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    return line


def files(folder: Path) -> dict[Path, float]:
    return {path: path.stat().st_mtime for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def trained(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search, a training of its child, and before that one of the published network."""
    folder = tmp_path_factory.mktemp("trained")
    one_epoch = ["--set", "epochs=1", "--set", "schedule.warmup_epochs=0"]
    for name, *arguments in (
        ("retrain_child.py", *one_epoch, "--set", "data.name=digits"),
        ("search_cream.py", "--recipe", str(repository / "tests/experiments/tiny_recipe.yml")),
        ("retrain_child.py", *one_epoch, "--set", "data.augmentation.interpolation=bicubic"),
    ):
        result = trial(folder, name, *arguments)
        assert result.returncode == 0, result.stderr
    return folder


def result_of(run: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((run / "result.json").read_text())
    return result


@pytest.mark.slow
@pytest.mark.parametrize("name", ["retrain-tiny", "retrain-cream_14"])
def test_the_result_of_a_training_comes_back_exactly(trained: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from nni_cream.evaluate import evaluate
    from nni_cream.recipe import EvaluationRecipe

    monkeypatch.chdir(trained)
    stored = result_of(Path("runs") / name)
    result = evaluate(EvaluationRecipe(), Path("runs") / name / "model.safetensors")
    assert (result.top1, result.top5) == (stored["test_accuracy"], stored["test_top5"])
    assert (result.flops, result.params) == (stored["flops"], stored["params"])
    assert result.network == stored["network"]
    assert result.data.model_dump(mode="json") == stored["data"]


@pytest.mark.slow
def test_without_arguments_the_newest_training_is_tested(trained: Path) -> None:
    for time, name in enumerate(("retrain-tiny", "retrain-cream_14"), start=2_000_000_000):
        stored = result_of(trained / "runs" / name)
        os.utime(trained / "runs" / name / "model.safetensors", (time, time))
        before = files(trained)
        result = trial(trained, "test_child.py")
        assert files(trained) == before
        assert result.stdout.startswith(f"Testing runs/{name}/model.safetensors.\n")
        assert shown(result) == {
            "network": stored["network"].replace(" ", ""),
            "FLOPs": f"{stored['flops'] / 1e6:.2f}Mmultiply-accumulates",
            "params": f"{stored['params'] / 1e6:.3f}M",
            "images": "359of32×32pixels,thetestpartofdigits",
            "top-1": f"{stored['test_accuracy']:.4f}",
            "top-5": f"{stored['test_top5']:.4f}",
        }


@pytest.mark.slow
@pytest.mark.parametrize("file", ["child.json", "child.safetensors"])
def test_the_child_of_a_search_is_tested_with_inherited_weights(trained: Path, file: str) -> None:
    child = json.loads((trained / "runs/tiny/child.json").read_text())
    result = shown(trial(trained, "test_child.py", "--checkpoint", f"runs/tiny/{file}"))
    assert result["network"] == str(child["path"]).replace(" ", "")
    assert result["FLOPs"] == f"{child['flops'] / 1e6:.2f}Mmultiply-accumulates"


@pytest.mark.slow
def test_a_foreign_checkpoint_is_tested_with_either_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = timm.create_model("cream_14", num_classes=10).eval()
    always = {}
    for name, digit in (("state_dict", 3), ("state_dict_ema", 8)):
        with torch.no_grad():
            network.classifier.weight.zero_()
            network.classifier.bias.copy_(torch.eye(10)[digit])
        always[name] = {f"module.{key}": value.clone() for key, value in network.state_dict().items()}
    torch.save(always, tmp_path / "14.pth.tar")
    labels = load_data("digits", resolution=64).test.labels.tolist()
    arguments = ["--checkpoint", "14.pth.tar", "--model", "cream_14", "--set", "data.name=digits"]
    for extra, digit in (([], 8), (["--weights", "plain"], 3)):
        result = shown(trial(tmp_path, "test_child.py", *arguments, *extra))
        assert result["top-1"] == f"{labels.count(digit) / len(labels):.4f}"
        assert result["images"] == f"{len(labels)}of64×64pixels,thetestpartofdigits"
    assert "--setdata.name=" in refusal(trial(tmp_path, "test_child.py", *arguments[:4])).replace(" ", "")
    assert [path.name for path in tmp_path.iterdir()] == ["14.pth.tar"]


class TestRefusals:
    def test_where_nothing_was_trained(self, tmp_path: Path) -> None:
        result = trial(tmp_path, "test_child.py")
        assert "No training has ended yet" in refusal(result)
        assert (result.stdout, list(tmp_path.iterdir())) == ("", [])

    def test_of_settings_that_only_a_training_has(self, tmp_path: Path) -> None:
        result = trial(tmp_path, "test_child.py", "--set", "optimizer.lr=0.1")
        assert "'optimizer.lr' is not a setting" in refusal(result)

    def test_of_a_checkpoint_that_is_not_there(self, tmp_path: Path) -> None:
        result = trial(tmp_path, "test_child.py", "--checkpoint", "none.pth")
        assert refusal(result) == "error: There is no checkpoint none.pth."


def test_the_help_names_no_option_of_a_run(tmp_path: Path) -> None:
    text = trial(tmp_path, "test_child.py", "--help").stdout
    assert all(option in text for option in ("--checkpoint", "--model", "--weights", "--recipe", "--set"))
    assert "--name" not in text
    assert "--output" not in text
