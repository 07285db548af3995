"""A stand-in for the driver's library, of which NNI's own scheduler asks what GPUs there are: on any machine."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

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


def on_the_gpu_in_use(config: dict[str, Any], folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return an experiment whose trials get GPU 1, and the environment in which NNI finds it; both need ``folder``."""
    (folder / "driver").mkdir()
    (folder / "driver/pynvml.py").write_text(DRIVER)
    (folder / "noting.py").write_text(NOTING)
    _, *command = shlex.split(config["trialCommand"])
    changes = {
        "trialCommand": shlex.join(
            [sys.executable, str(folder / "noting.py"), *command, "--set", "device.accelerator=cpu"]
        ),
        "trialGpuNumber": 1,
        # Without gpuIndices NNI would choose 0 or 2, which are idle; without useActiveGpu it would wait for 1.
        "trainingService": {"platform": "local", "useActiveGpu": True, "gpuIndices": [1]},
    }
    return config | changes, {"PYTHONPATH": str(folder / "driver")}


def devices_of(trial: Path) -> tuple[str, str, str]:
    """Return what NNI has chosen, what the trial's code has left of that, and what its run directory says."""
    chosen, left = json.loads((trial / "devices.json").read_text())
    return chosen, left, json.loads((trial / "environment.json").read_text())["machine"]["cuda_visible_devices"]
