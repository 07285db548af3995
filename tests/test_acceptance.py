"""What the README promises first: a search through NNI, then a child that recognises digits."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml


@pytest.mark.slow
def test_search_and_retraining_on_real_images_reach_98_percent(repository: Path, tmp_path: Path) -> None:
    # In a copy, so that the newest search is this one, and the user's runs are left alone.
    for part in ("experiments", "trials", "nni_cream", "search_spaces"):
        shutil.copytree(repository / part, tmp_path / part)
    (tmp_path / "runs").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    del environment["OMP_NUM_THREADS"]  # as a user has it

    started = time.monotonic()
    command = [sys.executable, "-m", "nni_cream.experiment", "experiments/cream.yml"]
    search = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert search.returncode == 0, search.stderr
    assert time.monotonic() - started < 600

    recipe = yaml.safe_load((tmp_path / "experiments/recipes/cream_mnist5k.yml").read_text())
    words = dict(line.split(":", 1) for line in search.stdout.splitlines() if line.startswith(("flops:", "folder:")))
    flops = int(words["flops"].split()[0].replace(",", ""))
    assert recipe["flops"]["min"] * 1e6 <= flops <= recipe["flops"]["max"] * 1e6

    command = [sys.executable, "trials/retrain_child.py"]
    training = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert training.returncode == 0, training.stderr
    assert training.stdout.splitlines()[0].endswith(f"/{Path(words['folder'].strip()).name}/child.json.")
    last = training.stdout.splitlines()[-1]
    assert last.startswith("test accuracy: 0.")
    assert float(last.removeprefix("test accuracy: ")) > 0.98
