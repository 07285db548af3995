"""NNI experiments that tests start, read through NNI's REST interface, interrupt and stop."""

from __future__ import annotations

import atexit
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
import requests
import yaml

from tests.conftest import REPOSITORY
from tests.experiments.ports import free_port

NNICTL = (sys.executable, "-m", "nni.tools.nnictl.nnictl")
TINY = REPOSITORY / "tests/experiments/tiny.yml"
SECONDS = 240
T = TypeVar("T")
_ENDING: list[psutil.Process] = []


def tiny_experiment(folder: Path, *settings: str, **changes: Any) -> Path:
    """Write a tiny experiment whose runs are in ``folder``; ``settings`` are given to its trials with ``--set``."""
    config = yaml.safe_load(TINY.read_text()) | {"trialCodeDirectory": str(REPOSITORY)}
    config["trialCommand"] = config["trialCommand"].replace("python", sys.executable, 1)
    config["trialCommand"] += "".join(f" --set {setting}" for setting in settings)
    config |= {"experimentWorkingDirectory": str(folder / "runs"), **changes}
    file = folder / "experiment.yml"
    file.write_text(yaml.safe_dump(config))
    return file


@dataclass
class Running:
    """An experiment."""

    identity: str
    port: int

    def get(self, what: str) -> Any:
        return requests.get(f"http://127.0.0.1:{self.port}/api/v1/nni/{what}", timeout=20).json()

    def trials(self) -> list[dict[str, Any]]:
        return self.get("trial-jobs")

    def folder(self) -> Path:
        """The folder of the only trial."""
        (trial,) = self.trials()
        return Path(trial["logPath"].removeprefix("file://localhost:"))

    def reports(self, kind: str) -> list[tuple[str, int, Any]]:
        """What trials have reported: trial, place on the curve, value; as it arrived."""
        found = [report for report in self.get("metric-data") if report["type"] == kind]
        found.sort(key=lambda report: report["timestamp"])
        return [(r["trialJobId"], r["sequence"], json.loads(json.loads(r["data"]))) for r in found]

    def await_(self, condition: Callable[[], T], what: str, seconds: float = SECONDS) -> T:
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < deadline, f"waited in vain until {what}"
            time.sleep(0.3)
        return found

    def await_epoch(self, number: int) -> None:
        self.await_(lambda: len(self.reports("PERIODICAL")) >= number, f"epoch {number} was reported")

    def await_end(self) -> list[dict[str, Any]]:
        self.await_(lambda: self.get("check-status")["status"] == "DONE", "the experiment was done")
        return self.trials()

    def manager(self) -> psutil.Process:
        """The process of NNI's manager."""
        (found,) = (
            process
            for process in psutil.process_iter(["cmdline"])
            if "main.js" in " ".join(process.info["cmdline"] or ()) and self.identity in (process.info["cmdline"] or ())
        )
        return found


def nnictl(*arguments: str) -> str:
    """Run ``nnictl`` and return what it prints, without its colours."""
    # As in an activated environment, where NNI finds `python` for trials, and `tensorboard`.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    done = subprocess.run(
        [*NNICTL, *arguments],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    output = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
    assert done.returncode == 0, output + done.stderr
    return output


def create(config: Path) -> Running:
    port = free_port()
    found = re.search(r"Experiment ID: (\w+)", nnictl("create", "--config", str(config), "--port", str(port)))
    assert found is not None
    return Running(found.group(1), port)


@contextmanager
def running(config: Path) -> Iterator[Running]:
    """Start an experiment, and stop it in the end; nobody waits for its last seconds."""
    experiment = create(config)
    try:
        yield experiment
    except AssertionError:
        # pytest shows what a failed test has printed.
        below = Path(yaml.safe_load(config.read_text())["experimentWorkingDirectory"]) / experiment.identity
        logs = [*below.glob("log/*.log"), *below.glob("environments/*/trials/*/trial.*")]
        for log in sorted(logs):
            print(f"{log}:", *(line[:300] for line in log.read_text().splitlines()[-30:]), sep="\n")
        with suppress(requests.RequestException):
            print(experiment.trials())
        raise
    finally:
        # Not there where it was killed.
        with suppress(ValueError):
            manager = experiment.manager()
            manager.terminate()
            _ENDING.append(manager)


@atexit.register
def _await_managers() -> None:
    _, left = psutil.wait_procs(_ENDING, timeout=60)
    for manager in left:
        manager.kill()
