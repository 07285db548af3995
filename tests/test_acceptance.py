"""What the README promises first: searches through NNI, and children that recognise digits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml

from nni_cream.genotype import Genotype


@pytest.fixture
def copy_of_project(repository: Path, tmp_path: Path) -> Path:
    """A copy, so that the newest search is the test's own, and the user's runs are left alone."""
    for part in ("experiments", "trials", "nni_cream", "search_spaces"):
        shutil.copytree(repository / part, tmp_path / part)
    (tmp_path / "runs").mkdir()
    return tmp_path


def run(folder: Path, *command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    del environment["OMP_NUM_THREADS"]  # as a user has it
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def words_of(output: str, *keys: str) -> dict[str, str]:
    """Return what stands behind ``key:`` at the beginning of a line."""
    pairs = (line.split(":", 1) for line in output.splitlines() if line.startswith(keys))
    return {key: value.strip() for key, value in pairs}


def accuracy_of(training: str, folder: str) -> float:
    assert training.splitlines()[0].endswith(f"/{Path(folder).name}/child.json.")
    last = training.splitlines()[-1]
    assert last.startswith("test accuracy: 0.")
    return float(last.removeprefix("test accuracy: "))


@pytest.mark.slow
@pytest.mark.alone
def test_a_cream_search_and_retraining_on_real_images_reach_98_percent(copy_of_project: Path) -> None:
    started = time.monotonic()
    search = run(copy_of_project, "-m", "nni_cream.experiment", "experiments/cream.yml")
    assert time.monotonic() - started < 600

    recipe = yaml.safe_load((copy_of_project / "experiments/recipes/cream_mnist5k.yml").read_text())
    words = words_of(search, "flops:", "folder:", "report:")
    flops = int(words["flops"].split()[0].replace(",", ""))
    assert recipe["flops"]["min"] * 1e6 <= flops <= recipe["flops"]["max"] * 1e6

    assert Path(words["report"]).parent == Path(words["folder"])
    assert "<title>Cream search “cream_mnist5k”</title>" in Path(words["report"]).read_text(encoding="utf-8")

    training = run(copy_of_project, "trials/retrain_child.py")
    assert accuracy_of(training, words["folder"]) > 0.98


@pytest.mark.slow
@pytest.mark.alone
def test_a_darts_search_and_retraining_on_real_images_reach_98_percent(copy_of_project: Path) -> None:
    started = time.monotonic()
    search = run(copy_of_project, "-m", "nni_cream.experiment", "experiments/darts.yml")
    assert time.monotonic() - started < 600

    words = words_of(search, "genotype:", "folder:")
    genotype = Genotype.parse(words["genotype"])
    folder = Path(words["folder"])
    child = json.loads((folder / "child.json").read_text())
    assert Genotype.of(child["genotype"]) == genotype
    for kind in ("normal", "reduce"):
        picture = (folder / f"cell_{kind}.svg").read_text()
        for operation, number in Counter(operation for operation, _ in genotype.edges(kind)).items():
            assert picture.count(f">{operation}<") == number

    training = run(copy_of_project, "trials/retrain_child.py")
    assert accuracy_of(training, words["folder"]) > 0.98
