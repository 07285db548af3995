"""Run an NNI experiment from its YAML to its result, as ``make search`` does.

    python -m nni_cream.experiment experiments/cream.yml

``nnictl create`` starts an experiment and returns. This waits for it: it prints the address of the web UI and every
epoch of every trial, in the end the best result, and it exits with 1 if no trial succeeded, which NNI itself calls
``DONE``. The experiment is stopped in the end; ``nnictl view`` opens its pages again.
"""

from __future__ import annotations

import math
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests
from nni.experiment import Experiment

from nni_cream.cli import Parser, run
from nni_cream.errors import UserError
from nni_cream.recipe_files import read_yaml
from nni_cream.runs import REPORT, describe

_FIRST_PORT = 8080
_TRIED_PORTS = 200
_LAST_PORT = 65535
_POLL_SECONDS = 2.0
_ENDED_BY_ITSELF = {"SUCCEEDED", "FAILED"}
# NNI calls a trial canceled that an assessor has ended.
_ENDED = _ENDED_BY_ITSELF | {"USER_CANCELED", "SYS_CANCELED", "EARLY_STOPPED"}
_LOG_LINES = 20
_ANSWER_SECONDS = 20


def main() -> None:
    """Start the experiment, follow it, and print its result."""
    parser = Parser(description="Run an NNI experiment and wait for its result.")
    parser.add_argument("config", type=Path, help="experiment YAML, such as experiments/cream.yml")
    parser.add_argument("--port", type=int, help=f"of the web UI (default: the first free one from {_FIRST_PORT})")
    arguments = parser.parse_args()
    if not arguments.config.is_file():
        raise UserError(f"There is no experiment {arguments.config}; those shipped are in experiments/.")
    if arguments.port is not None and not 1 <= arguments.port < _LAST_PORT:
        raise UserError(f"--port is {arguments.port}, but should be from 1 to {_LAST_PORT - 1}.")
    _check_yaml(arguments.config)
    # Trials say `python`; without this they would not find the interpreter of an environment that is not activated.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    port = arguments.port or _free_port()
    with _started(arguments.config, port) as identity:
        experiment = _connected(port, identity)
        print(f"web UI:    http://127.0.0.1:{port}  (experiment {identity})", flush=True)
        succeeded = _follow(experiment, port)
    print(f"To look at the web UI again: nnictl view {identity}")
    if not succeeded:
        sys.exit(1)


def _check_yaml(config: Path) -> None:
    """Make sure that the file is a YAML mapping; NNI itself says what is wrong with its fields."""
    try:
        content = read_yaml(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"The experiment {config} is not valid YAML: {str(error).rstrip('.')}.") from None
    if not isinstance(content, dict):
        raise UserError(f"The experiment {config} should be a YAML mapping of NNI's fields, such as 'trialCommand: …'.")


@contextmanager
def _started(config: Path, port: int) -> Iterator[str]:
    """Start the experiment, give its id, and stop it in any case."""
    command = [sys.executable, "-m", "nni.tools.nnictl.nnictl", "create", "--config", str(config), "--port", str(port)]
    created = subprocess.run(command, capture_output=True, text=True, check=False)
    output = re.sub(r"\x1b\[[0-9;]*m", "", created.stdout)
    found = re.search(r"Experiment ID: (\S+)", output)
    if created.returncode != 0 or found is None:
        lines = [line for line in (output + created.stderr).splitlines() if "ERROR" in line or "Error" in line]
        raise UserError(f"nnictl cannot start {config}: {lines[-1].strip() if lines else output.strip()}")
    identity = found.group(1)
    try:
        yield identity
    finally:
        stop = [sys.executable, "-m", "nni.tools.nnictl.nnictl", "stop", identity]
        subprocess.run(stop, capture_output=True, check=False)


def _connected(port: int, identity: str) -> Experiment:
    """Connect to the experiment, of which nnictl says that it has started even where another one has its port."""
    experiment = Experiment.connect(port)
    if experiment.id != identity:
        raise UserError(
            f"Port {port} has gone to experiment {experiment.id}, which was started at the same moment; start this one "
            "again, or give it another --port."
        )
    return experiment


def _follow(experiment: Experiment, port: int) -> bool:
    """Print what trials report until the experiment has ended; tell whether one of them succeeded."""
    shown: set[tuple[str, int]] = set()
    while True:
        try:
            # The status comes first: when it says that all is done, no metric can be missing from what follows it.
            status = experiment.get_status()
            trials = experiment.list_trial_jobs()
            metrics = experiment.get_job_metrics()
        except requests.RequestException as error:
            print(f"error: NNI's manager does not answer any more: {error}", file=sys.stderr)
            return False
        for trial, reports in metrics.items():
            for report in reports:
                if report.type == "PERIODICAL" and (trial, report.sequence) not in shown:
                    shown.add((trial, report.sequence))
                    _print_epoch(trial, report.data)
        ended = status == "DONE" and all(trial.status in _ENDED for trial in trials)
        if ended or status in {"ERROR", "STOPPED"}:
            return _conclude(trials, metrics, lambda trial: _log_of(port, trial))
        time.sleep(_POLL_SECONDS)


def _print_epoch(trial: str, data: Any) -> None:
    text = describe({k: v for k, v in data.items() if k != "default"}) if isinstance(data, dict) else data
    print(f"trial {trial}: {text}", flush=True)


def _conclude(trials: list[Any], metrics: dict[str, list[Any]], log_of: Callable[[Any], list[str]]) -> bool:
    """Print the best trial's result, and of those that failed by themselves what ``log_of`` gives."""
    results = {}
    for trial in trials:
        finals = [report for report in metrics.get(trial.trialJobId, []) if report.type == "FINAL"]
        if trial.status == "SUCCEEDED" and finals and math.isfinite(_score(finals[-1].data)):
            results[trial.trialJobId] = finals[-1].data
        else:
            print(f"trial {trial.trialJobId} ended as {trial.status}; its folder is {trial.logPath}", file=sys.stderr)
            for line in log_of(trial) if trial.status in _ENDED_BY_ITSELF else ():
                print(f"    {line}", file=sys.stderr)
    if not results:
        print("error: no trial succeeded.", file=sys.stderr)
        return False

    best = max(results, key=lambda trial: _score(results[trial]))
    print(f"best of {len(results)} finished trials: {best}")
    _print_result(results[best])
    folder = next(trial.logPath for trial in trials if trial.trialJobId == best)
    print(f"folder:    {folder}", flush=True)
    # Not of a trial on another machine, whose folder is there.
    if (report := Path(folder) / REPORT).exists():
        print(f"report:    {report}", flush=True)
    return True


def _print_result(result: Any) -> None:
    """Print the metrics that a trial ended with."""
    metrics = result if isinstance(result, dict) else {}
    for name in ("path", "genotype", "network"):
        if name in metrics:
            print(f"{name + ':':<10} {metrics[name]}")
    for name, unit in (("flops", "multiply-accumulates"), ("params", "parameters")):
        if name in metrics:
            print(f"{name + ':':<10} {metrics[name]:,} {unit}")
    if "latency" in metrics:
        print(f"latency:   {metrics['latency']:.3f} ms predicted for a batch")
    if "test_accuracy" in metrics:
        print(f"accuracy:  {_score(result):.4f} on held-out images, {metrics['test_accuracy']:.4f} on test images")
    else:
        accuracy = metrics.get("accuracy", _score(result))
        print(f"accuracy:  {accuracy:.4f} with shared weights, on held-out images")
        # A search of DARTS steers by its supernet; of Cream both numbers are the best path's.
        if "genotype" in metrics and "accuracy" in metrics:
            print(f"supernet:  {_score(result):.4f} on held-out images")


def _score(result: Any) -> float:
    return float(result["default"] if isinstance(result, dict) else result)


def _log_of(port: int, trial: Any) -> list[str]:
    """Return the end of what a trial has said, also of one on another machine, from which NNI fetches it."""
    for name in ("stderr", "trial.log"):
        address = f"http://127.0.0.1:{port}/api/v1/nni/trial-file/{trial.trialJobId}/{name}"
        try:
            answer = requests.get(address, timeout=_ANSWER_SECONDS)
        except requests.RequestException:
            return []
        lines = answer.text.splitlines() if answer.ok else []
        if lines:
            return lines[-_LOG_LINES:]
    return []


def _free_port() -> int:
    """Return the first port from the usual one on which nobody listens; NNI takes the one after it as well."""
    ports = range(_FIRST_PORT, _FIRST_PORT + _TRIED_PORTS, 2)
    for port in ports:
        with socket.socket() as first, socket.socket() as second:
            try:
                first.bind(("127.0.0.1", port))
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port
    raise UserError(
        f"NNI needs two ports next to each other, and of every pair from {ports[0]} to {ports[-1] + 1} one is taken; "
        "give the first of two free ones with --port."
    )


if __name__ == "__main__":
    run(main, goes_on=False)
