"""GPUs under NNI's own scheduler, on any machine: a stand-in for the driver's library tells NNI what there is."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.experiments.running import running, tiny_experiment

pytestmark = pytest.mark.slow

# What NNI cannot do without of pynvml: three GPUs, somebody else at work on the one with the number 1.
DRIVER = """
from types import SimpleNamespace

def nvmlInit(): pass
def nvmlShutdown(): pass
def nvmlDeviceGetCount(): return 3
def nvmlDeviceGetHandleByIndex(index): return index
def nvmlDeviceGetUtilizationRates(device): return SimpleNamespace(gpu=0, memory=0)
def nvmlDeviceGetComputeRunningProcesses_v3(device):
    return [SimpleNamespace(pid=1, usedGpuMemory=1)] if device == 1 else []
def nvmlDeviceGetGraphicsRunningProcesses_v3(device): return []
def nvmlSystemGetProcessName(pid): return "somebody"
"""
# Runs a trial, and notes what NNI has started it with and what its own code has left of that.
NOTING = """
import atexit, json, os, runpy, sys
from pathlib import Path

def note():
    started = dict(item.split("=", 1) for item in Path("/proc/self/environ").read_text().split("\\0") if "=" in item)
    devices = [where.get("CUDA_VISIBLE_DEVICES") for where in (started, os.environ)]
    (Path(os.environ["NNI_OUTPUT_DIR"]) / "devices.json").write_text(json.dumps(devices))

atexit.register(note)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_trial_keeps_to_the_gpu_that_nni_has_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "driver").mkdir()
    (tmp_path / "driver/pynvml.py").write_text(DRIVER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "driver"))
    (tmp_path / "noting.py").write_text(NOTING)
    command = f"{sys.executable} {tmp_path / 'noting.py'} trials/search_cream.py"
    command += " --recipe tests/experiments/tiny_recipe.yml --set device.accelerator=cpu"
    # Without gpuIndices NNI would choose 0 or 2, which are idle; without useActiveGpu it would wait for 1.
    service: dict[str, Any] = {"platform": "local", "useActiveGpu": True, "gpuIndices": [1]}
    config = tiny_experiment(tmp_path, trialCommand=command, trialGpuNumber=1, trainingService=service)
    with running(config) as experiment:
        (trial,) = experiment.await_end()
        folder = experiment.folder()
        assert trial["status"] == "SUCCEEDED", (folder / "trial.stderr").read_text()
    given, left = json.loads((folder / "devices.json").read_text())
    noted = json.loads((folder / "environment.json").read_text())["machine"]["cuda_visible_devices"]
    assert (given, left, noted) == ("1", "1", "1")
