from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import nni
import pytest
from nni.runtime import trial_command_channel
from nni.runtime.trial_command_channel import ParameterRecord, TrialCommandChannel, set_default_trial_command_channel
from nni.runtime.trial_command_channel.v3 import TrialCommandChannelV3

from nni_cream.cli import tuner_parameters
from nni_cream.errors import TrainingError, UserError
from nni_cream.mailbox import Mailbox
from nni_cream.reporting import Reporter, await_owner
from nni_cream.runs import RunDirectory


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

    @pytest.mark.parametrize(
        "damaged",
        [b"default,epoch,loss\n0.1,1\n", b"default,epoch\n0.1,1,2\n", b"a,b\n1,2\n", b"epoch\nx\n", b"\xff\xfe\n\x80"],
        ids=["short line", "long line", "no epochs", "no number", "no text"],
    )
    def test_that_is_damaged_is_kept_and_said_and_begun_anew(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], damaged: bytes
    ) -> None:
        (tmp_path / "metrics.csv").write_bytes(damaged)
        reporter = Reporter(tmp_path, quiet=True)
        reporter.intermediate(metrics_of(2))
        reporter.intermediate(metrics_of(3))
        assert [row[1] for row in lines(tmp_path)] == ["epoch", "2", "3"]
        assert (tmp_path / "metrics.damaged").read_bytes() == damaged
        (said,) = capsys.readouterr().err.splitlines()
        assert said.startswith(f"{tmp_path / 'metrics.csv'} is no table with a line for every epoch (")
        assert said.endswith(f"it is kept as {tmp_path / 'metrics.damaged'}, and a new one begins.")

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


class Answers:
    """The other end of NNI's HTTP channel: takes what is put, and answers with ``status``."""

    def __init__(self) -> None:
        self.status = 200
        self.taken: list[dict[str, Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                content = self.rfile.read(int(self.headers["Content-Length"]))
                if outer.status == 200:
                    outer.taken.append(nni.load(json.loads(content)["metric"]))
                self.send_response(outer.status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


class TestOutage:
    @pytest.fixture
    def answers(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Answers]:
        """NNI's own HTTP channel, and what answers it."""
        answers = Answers()
        monkeypatch.setenv("NNI_PLATFORM", "local")
        set_default_trial_command_channel(TrialCommandChannelV3(f"http://127.0.0.1:{answers.server.server_port}/env/x"))
        monkeypatch.setattr(nni.trial, "_params", {"parameter_id": 5, "parameters": {}})
        yield answers
        answers.close()

    # 410: a manager that shuts down, whose answer NNI does not look at; 0: nobody is there.
    @pytest.mark.parametrize("outage", [410, 500, 0])
    def test_loses_no_report(
        self, tmp_path: Path, answers: Answers, outage: int, capsys: pytest.CaptureFixture[str]
    ) -> None:
        reporter = Reporter(tmp_path, quiet=True)
        reporter.intermediate(metrics_of(1))
        if outage:
            answers.status = outage
        else:
            answers.close()
        for epoch in (2, 3):
            reporter.intermediate(metrics_of(epoch))
        waiting = capsys.readouterr().err.splitlines()
        assert waiting == [f"NNI's manager does not answer; what is reported meanwhile waits in {tmp_path}/unreported."]
        assert [int(line[1]) for line in lines(tmp_path)[1:]] == [1, 2, 3]
        assert len(list((tmp_path / "unreported").iterdir())) == 2
        if outage:
            answers.status = 200
            reporter.final({"default": 0.9})
            reports = [(report["type"], report["sequence"], report["parameter_id"]) for report in answers.taken]
            assert reports == [("PERIODICAL", 0, 5), ("PERIODICAL", 1, 5), ("PERIODICAL", 2, 5), ("FINAL", 0, 5)]
            assert [nni.load(report["value"]) for report in answers.taken][1] == metrics_of(2)
            assert not (tmp_path / "unreported").exists()

    def test_is_made_up_for_by_the_next_process(self, tmp_path: Path, answers: Answers) -> None:
        answers.status = 500
        Reporter(tmp_path, quiet=True).intermediate(metrics_of(1))
        answers.status = 200
        Reporter(tmp_path, quiet=True).deliver()
        assert [nni.load(report["value"]) for report in answers.taken] == [metrics_of(1)]


class TestTensorBoard:
    def trial(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
        """A local trial's folder, and the one that NNI's button opens."""
        folder = tmp_path / "environments/local-env/trials/T1"
        monkeypatch.setenv("NNI_OUTPUT_DIR", str(folder))
        return folder, tmp_path / "trials/T1/output/tensorboard"

    @pytest.mark.parametrize("pressed", [False, True])
    def test_finds_the_events_where_nni_looks(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, manager: Manager, pressed: bool
    ) -> None:
        folder, expected = self.trial(tmp_path, monkeypatch)
        if pressed:
            expected.mkdir(parents=True)
        for _ in range(2):  # the second time as a trial that is started again
            Reporter(folder, quiet=True)
            assert expected.resolve() == (folder / "tensorboard").resolve()
        (folder / "tensorboard/events").write_text("curve")
        assert (expected / "events").read_text() == "curve"

    def test_finds_the_events_of_a_run_that_is_not_in_the_folder_of_its_trial(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, manager: Manager
    ) -> None:
        folder, expected = self.trial(tmp_path, monkeypatch)
        # As trials/rank_correlation.py, below the current directory.
        monkeypatch.chdir(tmp_path)
        for _ in range(2):  # the second time after somebody has removed the run
            Reporter(Path("runs/elsewhere"), quiet=True)
            (tmp_path / "runs/elsewhere/tensorboard/events").write_text("curve")
            assert (expected / "events").read_text() == "curve"
            shutil.rmtree(tmp_path / "runs")
        assert not folder.exists()

    def test_folders_of_others_are_left_alone(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, manager: Manager
    ) -> None:
        folder, expected = self.trial(tmp_path, monkeypatch)
        expected.mkdir(parents=True)
        (expected / "mine").touch()
        Reporter(folder, quiet=True)
        Reporter(tmp_path / "elsewhere", quiet=True)
        assert not expected.is_symlink()
        assert list(expected.iterdir()) == [expected / "mine"]
        assert not (tmp_path / "elsewhere").exists()


class TestNumbers:
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_that_are_none_are_no_success(self, tmp_path: Path, manager: Manager, value: float) -> None:
        reporter = Reporter(tmp_path, quiet=True)
        with pytest.raises(TrainingError, match=f"In epoch 1 loss is {value}: the training has diverged"):
            reporter.intermediate(metrics_of(1) | {"loss": value})
        with pytest.raises(TrainingError, match=f"In the end default is {value}"):
            reporter.final({"default": value})
        assert manager.metrics == []
        assert not (tmp_path / "metrics.csv").exists()


class TestSecondProcess:
    """Of one run directory; see also tests/experiments/test_interruptions.py."""

    @pytest.fixture
    def owner(self, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
        program = "import sys, time; from pathlib import Path; from nni_cream.runs import RunDirectory"
        program += "; run = RunDirectory(Path(sys.argv[1])); run.begin('name: a\\n', 0); print(1, flush=True)"
        command = [sys.executable, "-c", program + "; time.sleep(60)", str(tmp_path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()
        process.communicate()

    def test_is_refused_with_the_id_of_the_first(self, tmp_path: Path, owner: subprocess.Popen[str]) -> None:
        sentence = (
            f"{tmp_path} is in use by process {owner.pid}; wait for its end, or choose another folder with --name."
        )
        with pytest.raises(UserError) as caught:
            await_owner(RunDirectory(tmp_path))
        assert str(caught.value) == sentence
        with pytest.raises(UserError) as caught:
            RunDirectory(tmp_path).begin("name: a\n", 0)
        assert str(caught.value) == sentence

    def test_waits_under_nni_and_reports_for_the_first(
        self, tmp_path: Path, owner: subprocess.Popen[str], manager: Manager
    ) -> None:
        Mailbox(tmp_path / "unreported", lambda _: (_ for _ in ()).throw(OSError())).post(
            {"type": "PERIODICAL", "sequence": 0, "value": metrics_of(1)}
        )
        threading.Timer(1.5, owner.kill).start()
        await_owner(RunDirectory(tmp_path))
        assert owner.wait() == -signal.SIGKILL
        assert [metric["value"] for metric in manager.metrics] == [metrics_of(1)]

    def test_that_is_stopped_by_nni_stops_the_first(
        self, tmp_path: Path, owner: subprocess.Popen[str], manager: Manager
    ) -> None:
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            await_owner(RunDirectory(tmp_path))
        assert owner.wait(timeout=20) != 0


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
