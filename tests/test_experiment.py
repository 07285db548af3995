"""The real ``nnictl create`` on a tiny recipe, read back through NNI's REST interface."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from nni_cream import experiment
from nni_cream.errors import UserError
from nni_cream.experiment import Experiment, _conclude, _connected, _free_port
from tests.experiments.gpus import devices_of, on_the_gpu_in_use

TIMEOUT = 300


@pytest.fixture
def tiny(repository: Path, tmp_path: Path) -> Path:
    """The tiny experiment, with its runs in a folder of the test's own."""
    config = yaml.safe_load((repository / "tests/experiments/tiny.yml").read_text())
    config |= {"trialCodeDirectory": str(repository), "experimentWorkingDirectory": str(tmp_path / "runs")}
    config["trialCommand"] = config["trialCommand"].replace("python", sys.executable, 1)
    file = tmp_path / "tiny.yml"
    file.write_text(yaml.safe_dump(config))
    return file


@pytest.mark.slow
def test_the_runner_prints_the_result_of_a_trial_on_the_gpu_that_nni_has_chosen(tiny: Path, tmp_path: Path) -> None:
    config, environment = on_the_gpu_in_use(yaml.safe_load(tiny.read_text()), tmp_path)
    tiny.write_text(yaml.safe_dump(config))
    result = run_experiment(tiny, **environment)
    assert result.returncode == 0, result.stderr
    for word in ("web UI:", "epoch 2,", "path:", "flops:", "params:", "accuracy:", "folder:", "report:"):
        assert word in result.stdout
    match = re.search(r"^folder: +(.+)$", result.stdout, re.MULTILINE)
    assert match is not None
    folder = Path(match.group(1))
    assert (folder / "child.json").is_file()
    assert devices_of(folder) == ("1", "1", "1")


@pytest.mark.slow
def test_the_runner_fails_when_no_trial_succeeds(tiny: Path) -> None:
    tiny.write_text(tiny.read_text().replace("optimizer.lr", "optimizer.learning_rate"))
    result = run_experiment(tiny)
    assert result.returncode == 1
    assert "no trial succeeded" in result.stderr
    # What the trial said is shown: the tuner's keys are checked like any other setting.
    assert "'optimizer.learning_rate' is not a setting; did you mean 'optimizer." in result.stderr


def trial(name: str, status: str) -> SimpleNamespace:
    return SimpleNamespace(trialJobId=name, status=status, logPath="/nowhere")


def final(value: object) -> SimpleNamespace:
    return SimpleNamespace(type="FINAL", data=value)


def test_the_best_finite_result_of_a_finished_trial_wins(capsys: pytest.CaptureFixture[str]) -> None:
    trials = [trial("a", "SUCCEEDED"), trial("b", "SUCCEEDED"), trial("c", "SUCCEEDED"), trial("d", "FAILED")]
    metrics = {
        "a": [final({"default": 0.5, "path": "[[0]]"})],
        "b": [final({"default": 0.75, "path": "[[1]]"})],
        "c": [final({"default": float("nan")})],
        "d": [final({"default": 0.9})],
    }
    assert _conclude(trials, metrics, lambda trial: [f"last words of {trial.trialJobId}"])
    said = capsys.readouterr()
    assert "best of 2 finished trials: b" in said.out
    assert [line.strip() for line in said.err.splitlines() if "words" in line] == ["last words of c", "last words of d"]
    # A trial that reports NaN is a success for NNI, and for nobody else.
    assert not _conclude(trials[2:], metrics, lambda _: [])


def test_only_a_trial_that_ended_by_itself_has_its_log_shown(capsys: pytest.CaptureFixture[str]) -> None:
    # An assessor has ended the canceled ones.
    ended = ["SUCCEEDED", "FAILED", "USER_CANCELED", "SYS_CANCELED", "EARLY_STOPPED", "RUNNING"]
    assert not _conclude([trial(status, status) for status in ended], {}, lambda trial: [f"words of {trial.status}"])
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if "ended as" in line] == [
        f"trial {status} ended as {status}; its folder is /nowhere" for status in ended
    ]
    assert [line for line in said if "words" in line] == ["    words of SUCCEEDED", "    words of FAILED"]


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (
            {"default": 0.5, "accuracy": 0.25, "flops": 1234567, "params": 1000, "genotype": "Genotype(…)"},
            [
                "genotype:  Genotype(…)",
                "flops:     1,234,567 multiply-accumulates",
                "params:    1,000 parameters",
                "accuracy:  0.2500 with shared weights, on held-out images",
                "supernet:  0.5000 on held-out images",
            ],
        ),
        (
            {"default": 0.5, "accuracy": 0.5, "flops": 1000, "params": 10, "path": "[[0]]"},
            [
                "path:      [[0]]",
                "flops:     1,000 multiply-accumulates",
                "params:    10 parameters",
                "accuracy:  0.5000 with shared weights, on held-out images",
            ],
        ),
        (0.5, ["accuracy:  0.5000 with shared weights, on held-out images"]),
        (
            {"default": 0.5, "flops": 1000, "params": 10, "latency": 1.23456, "path": "[[0]]"},
            [
                "path:      [[0]]",
                "flops:     1,000 multiply-accumulates",
                "params:    10 parameters",
                "latency:   1.235 ms predicted for a batch",
                "accuracy:  0.5000 with shared weights, on held-out images",
            ],
        ),
        (
            {"default": 0.75, "val_accuracy": 0.75, "test_accuracy": 0.5, "network": "cream_14"},
            ["network:   cream_14", "accuracy:  0.7500 on held-out images, 0.5000 on test images"],
        ),
    ],
    ids=["search of DARTS", "search of Cream", "a number alone", "search with a budget of time", "training"],
)
def test_a_result_is_printed(result: Any, expected: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert _conclude([trial("a", "SUCCEEDED")], {"a": [final(result)]}, lambda _: [])
    assert capsys.readouterr().out.splitlines()[1:-1] == expected


def test_an_experiment_that_has_lost_its_port_to_another_is_not_taken_for_that_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answering = SimpleNamespace(id="other")
    monkeypatch.setattr(Experiment, "connect", lambda port: answering)
    assert _connected(8080, "other") is answering
    with pytest.raises(UserError, match=r"Port 8080 has gone to experiment other, .* another --port"):
        _connected(8080, "own")


def test_ports_are_taken_in_pairs_and_the_range_that_was_tried_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        second = taken.getsockname()[1]
        monkeypatch.setattr(experiment, "_FIRST_PORT", second - 1)
        monkeypatch.setattr(experiment, "_TRIED_PORTS", 2)
        with pytest.raises(UserError, match=f"every pair from {second - 1} to {second} one is taken; .* with --port"):
            _free_port()
        monkeypatch.setattr(experiment, "_TRIED_PORTS", 202)
        assert _free_port() > second


def test_a_report_is_named_where_it_is_on_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ended = SimpleNamespace(trialJobId="a", status="SUCCEEDED", logPath=str(tmp_path))
    assert _conclude([ended], {"a": [final({"default": 0.5})]}, lambda _: [])
    assert capsys.readouterr().out.splitlines()[-1] == f"folder:    {tmp_path}"
    (tmp_path / "report.html").touch()
    assert _conclude([ended], {"a": [final({"default": 0.5})]}, lambda _: [])
    assert capsys.readouterr().out.splitlines()[-1] == f"report:    {tmp_path / 'report.html'}"


def test_the_runner_says_what_is_wrong_with_the_yaml(tiny: Path) -> None:
    tiny.write_text(tiny.read_text() + "noSuchField: 1\n")
    result = run_experiment(tiny)
    assert result.returncode == 2
    assert result.stderr.startswith("error: nnictl cannot start")
    assert "nosuchfield" in result.stderr  # NNI has lowered it
    assert "Traceback" not in result.stderr


def run_experiment(config: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nni_cream.experiment", str(config)]
    env = {**os.environ, "PYTHONWARNINGS": "", **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False, env=env)
