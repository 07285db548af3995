from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import nni
import pytest
from nni.runtime import trial_command_channel
from nni.runtime.trial_command_channel import ParameterRecord, TrialCommandChannel, set_default_trial_command_channel

from nni_cream.cli import tuner_parameters
from nni_cream.reporting import Reporter


class Manager(TrialCommandChannel):
    """What a trial says to NNI's manager, written down."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, Any]] = []

    def receive_parameter(self) -> ParameterRecord:
        return ParameterRecord(parameter_id=5, parameters={"seed": 3})

    def send_metric(self, **metric: Any) -> None:  # type: ignore[override]
        self.metrics.append(metric)


@pytest.fixture(autouse=True)
def _nni_as_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial_command_channel, "_channel", None)
    monkeypatch.setattr(nni.trial, "_params", None)
    monkeypatch.setattr(nni.trial, "_intermediate_seq", 0)
    for name in list(os.environ):
        if name.startswith("NNI_"):
            monkeypatch.delenv(name)


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch) -> Manager:
    """A trial of an experiment: what is reported arrives at this manager."""
    monkeypatch.setenv("NNI_PLATFORM", "local")
    monkeypatch.setattr(nni.trial, "_trial_id", "T1")
    manager = Manager()
    set_default_trial_command_channel(manager)
    return manager


def metrics_of(epoch: int, **more: Any) -> dict[str, Any]:
    return {"default": 0.1 * epoch, "epoch": epoch, "loss": 1 / epoch, **more}


def lines(folder: Path) -> list[list[str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.reader(file))


class TestFile:
    def test_has_one_header_and_one_line_an_epoch_also_after_a_restart(self, tmp_path: Path) -> None:
        first = Reporter(tmp_path, quiet=True)
        first.intermediate(metrics_of(1))
        first.intermediate(metrics_of(2))
        Reporter(tmp_path, quiet=True).intermediate(metrics_of(3))
        header, *rows = lines(tmp_path)
        assert header == ["default", "epoch", "loss"]
        assert [[float(value) for value in row] for row in rows] == [list(metrics_of(n).values()) for n in (1, 2, 3)]

    def test_is_complete_after_every_epoch(self, tmp_path: Path) -> None:
        reporter = Reporter(tmp_path, quiet=True)
        for epoch in (1, 2):
            reporter.intermediate(metrics_of(epoch))
            assert len(lines(tmp_path)) == 1 + epoch
            assert (tmp_path / "metrics.csv").read_bytes().endswith(b"\n")

    def test_keeps_lists_as_json(self, tmp_path: Path) -> None:
        Reporter(tmp_path, quiet=True).intermediate(metrics_of(1, path=[[0], [1, 2]]))
        header, row = lines(tmp_path)
        assert json.loads(row[header.index("path")]) == [[0], [1, 2]]

    def test_does_not_hold_the_result(self, tmp_path: Path) -> None:
        Reporter(tmp_path, quiet=True).final({"default": 0.9})
        assert not (tmp_path / "metrics.csv").exists()


class TestManager:
    def test_gets_every_metric_with_the_id_of_the_trials_parameters(self, tmp_path: Path, manager: Manager) -> None:
        assert tuner_parameters() == {"seed": 3}
        reporter = Reporter(tmp_path, quiet=True)
        reporter.intermediate(metrics_of(1))
        reporter.final({"default": 0.9})
        common = {"parameter_id": 5, "trial_job_id": "T1", "sequence": 0}
        assert manager.metrics == [
            {"type": "PERIODICAL", "value": metrics_of(1), **common},
            {"type": "FINAL", "value": {"default": 0.9}, **common},
        ]

    def test_sees_a_continued_run_continue_its_curve(self, tmp_path: Path, manager: Manager) -> None:
        tuner_parameters()
        reporter = Reporter(tmp_path, quiet=True)
        for epoch in (7, 8):
            reporter.intermediate(metrics_of(epoch))
        assert [metric["sequence"] for metric in manager.metrics] == [6, 7]

    def test_gets_what_nni_is_told_once_the_reporter_is_installed(self, tmp_path: Path, manager: Manager) -> None:
        tuner_parameters()
        Reporter(tmp_path, quiet=True).install()
        assert nni.get_current_parameter() == {"seed": 3}
        nni.report_intermediate_result(metrics_of(4))
        nni.report_final_result({"default": 0.9})
        assert [(metric["type"], metric["sequence"]) for metric in manager.metrics] == [("PERIODICAL", 3), ("FINAL", 0)]
        assert [metric["parameter_id"] for metric in manager.metrics] == [5, 5]
        assert lines(tmp_path)[1][1] == "4"

    def test_of_somebody_else_gets_nothing_without_nni(self, tmp_path: Path) -> None:
        bystander = Manager()
        set_default_trial_command_channel(bystander)
        reporter = Reporter(tmp_path, quiet=True)
        reporter.install()
        nni.report_intermediate_result(metrics_of(1))
        nni.report_final_result({"default": 0.9})
        assert bystander.metrics == []
        assert len(lines(tmp_path)) == 2


class TestTerminal:
    def test_gets_one_line_an_epoch(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        reporter = Reporter(tmp_path, quiet=False)
        reporter.install()
        for epoch in (1, 2):
            nni.report_intermediate_result(metrics_of(epoch))
        assert capsys.readouterr().out == "epoch 1, loss 1.0000\nepoch 2, loss 0.5000\n"

    def test_stays_quiet_beside_a_progress_bar(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        Reporter(tmp_path, quiet=True).intermediate(metrics_of(1))
        assert capsys.readouterr() == ("", "")
