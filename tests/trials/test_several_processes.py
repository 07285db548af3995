"""The command lines with ``device.devices: 2`` on the CPU, started by Lightning and by torchrun."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from nni_cream.child import Child
from tests.trials.test_search_darts import TINY

pytestmark = pytest.mark.slow

TIMEOUT = 300
BY_LIGHTNING = (sys.executable,)
BY_TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def run(folder: Path, launcher: tuple[str, ...], *command: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    full = [*launcher, *command, "--set", "device.devices=2", "--set", "device.accelerator=cpu"]
    environment = {**kept, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        full, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )


def assert_epochs_once(result: subprocess.CompletedProcess[str], folder: Path, number: int) -> None:
    expected = list(range(1, number + 1))
    printed = [line for line in result.stdout.splitlines() if line.startswith("epoch ")]
    assert [int(line.split(",")[0].removeprefix("epoch ")) for line in printed] == expected
    with (folder / "metrics.csv").open(encoding="utf-8") as lines:
        assert [int(row["epoch"]) for row in csv.DictReader(lines)] == expected
    # Their names end with the process and a number: Lightning begins one for the training, the validation and the test.
    events = (folder / "tensorboard").glob("events.out.tfevents.*")
    assert len({file.name.split(".")[-2] for file in events}) == 1
    assert "It is recommended to use `self.log(" not in result.stderr


@pytest.fixture(scope="module")
def searched(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("searched")
    recipe = str(repository / "tests/experiments/tiny_recipe.yml")
    command = (str(repository / "trials/search_cream.py"), "--recipe", recipe)
    result = run(folder, BY_LIGHTNING, *command)
    assert result.returncode == 0, result.stderr
    assert_epochs_once(result, folder / "runs/tiny", 2)
    assert result.stdout.count("path:  ") == 1
    child = (folder / "runs/tiny/child.json").read_bytes()
    again = run(folder, BY_LIGHTNING, *command)
    assert (again.returncode, (folder / "runs/tiny/child.json").read_bytes()) == (0, child)
    assert again.stdout.count("has ended") == 1
    return folder


def test_cream_leaves_one_child(searched: Path) -> None:
    assert [file.parent.name for file in searched.glob("**/child.json")] == ["tiny"]
    child = json.loads((searched / "runs/tiny/child.json").read_text())
    assert 2_000_000 <= child["flops"] <= 3_000_000
    assert len(child["runners_up"]) == 2
    assert load_file(searched / "runs/tiny/child.safetensors")


def test_training_runs_likewise(repository: Path, searched: Path) -> None:
    command = (str(repository / "trials/retrain_child.py"), "--set", "epochs=1", "--set", "schedule.warmup_epochs=0")
    result = run(searched, BY_LIGHTNING, *command)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Training the child of") == result.stdout.count("test accuracy: ") == 1
    folder = searched / "runs/retrain-tiny"
    assert_epochs_once(result, folder, 1)
    assert 0 < json.loads((folder / "result.json").read_text())["test_accuracy"] < 1
    assert (folder / "model.safetensors").exists()


def test_seeds_run_likewise(repository: Path, searched: Path) -> None:
    settings = ("epochs=1", "schedule.warmup_epochs=0", "ema.decay=0.9", "mixing.mixup=0.2")
    command = [str(repository / "trials/retrain_child.py"), *(part for s in settings for part in ("--set", s))]
    result = run(searched, BY_LIGHTNING, *command, "--name", "seeds", "--seeds", "0", "1")
    assert result.returncode == 0, result.stderr
    summary = json.loads((searched / "runs/seeds/summary.json").read_text())
    results = [json.loads((searched / f"runs/seeds/seed{seed}/result.json").read_text()) for seed in (0, 1)]
    assert summary["test_accuracy"]["mean"] == pytest.approx(sum(r["test_accuracy"] for r in results) / 2)
    assert result.stdout.count("(2 seeds)") == 1


def test_darts_under_torchrun(repository: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(yaml.safe_dump(TINY), encoding="utf-8")
    command = (str(repository / "trials/search_darts.py"), "--recipe", str(recipe))
    result = run(tmp_path, BY_TORCHRUN, *command)
    assert result.returncode == 0, result.stderr
    assert_epochs_once(result, tmp_path / "runs/tiny", 2)
    child = Child.load(tmp_path / "runs/tiny/child.json")
    assert result.stdout.splitlines().count(f"genotype:  {child.architecture}") == 1
    assert [file.name for file in (tmp_path / "runs").iterdir()] == ["tiny"]


def test_a_training_that_diverges_ends_in_both(repository: Path, searched: Path) -> None:
    settings = ("name=diverges", "epochs=1", "schedule.warmup_epochs=0", "optimizer.lr=1e12")
    command = [str(repository / "trials/retrain_child.py"), *(part for s in settings for part in ("--set", s))]
    result = run(searched, BY_LIGHTNING, *command)
    assert result.returncode == 1
    assert result.stderr.count("the training has diverged") == 1
    assert not (searched / "runs/diverges/result.json").exists()


def test_a_batch_that_cannot_be_shared(repository: Path, tmp_path: Path) -> None:
    command = (str(repository / "trials/search_darts.py"), "--set", "data.batch_size=63")
    result = run(tmp_path, BY_LIGHTNING, *command)
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.endswith(
        "data.batch_size is 63, but the 2 of device.devices share every batch: make it a multiple of that."
    )
    assert not list(tmp_path.iterdir())
