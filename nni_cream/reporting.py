"""Where the metrics of a run go: to NNI when there is one, to ``metrics.csv``, and to a person."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import nni
from nni.runtime.trial_command_channel import (
    ParameterRecord,
    TrialCommandChannel,
    get_default_trial_command_channel,
    set_default_trial_command_channel,
)
from nni.typehint import TrialMetric

from nni_cream.compat import link_tensorboard, read_answers
from nni_cream.errors import TrainingError
from nni_cream.mailbox import Mailbox
from nni_cream.ranks import is_first
from nni_cream.runs import RunDirectory, describe, write_text

_POLL_SECONDS = 1.0


class Reporter(TrialCommandChannel):
    """Takes what a run reports and passes it on.

    It stands in NNI's place as the trial's command channel, so ``nni.report_intermediate_result`` anywhere in the
    process arrives here. What NNI's manager does not take, because it is away, waits in ``unreported/`` and is sent
    when it answers again, or when it has started the trial again. Of several processes the first reports.

    Args:
        directory: of the run; ``metrics.csv`` there gets one line an epoch.
        quiet: print nothing; a progress bar is doing that.
    """

    def __init__(self, directory: Path, *, quiet: bool) -> None:
        self._file = directory / "metrics.csv"
        self._quiet = quiet
        self._outer: TrialCommandChannel | None = None
        self._mailbox = Mailbox(directory / "unreported", self._send)
        self._away = False
        self._record = ParameterRecord(parameter_id=None, parameters={})
        if "NNI_PLATFORM" in os.environ and is_first():
            self._outer = get_default_trial_command_channel()
            read_answers(self._outer)
            link_tensorboard(directory)
            # NNI keeps the record that tuner_parameters() received, and the manager wants its id with every metric.
            self._record = nni.trial._params or self._record

    def install(self) -> None:
        """Become the channel that ``nni.report_…`` uses."""
        set_default_trial_command_channel(self)
        nni.get_next_parameter()

    def receive_parameter(self) -> ParameterRecord:
        """Return the parameters of this trial."""
        return self._record

    def send_metric(
        self,
        type: Literal["PERIODICAL", "FINAL"],
        parameter_id: int | None,
        trial_job_id: str,
        sequence: int,
        value: TrialMetric,
    ) -> None:
        """Take a metric from ``nni.report_…``."""
        if type == "PERIODICAL":
            self.intermediate(value)
        else:
            self.final(value)

    def intermediate(self, metrics: Any) -> None:
        """Report an epoch.

        The epoch is the metric's place on NNI's curve, so that a run which is continued continues the curve.

        Raises:
            TrainingError: if a metric is not a finite number.
        """
        refuse_non_finite(metrics, f"In epoch {metrics['epoch']} ")
        self._write_line(metrics)
        self._post("PERIODICAL", metrics["epoch"] - 1, metrics)
        if not self._quiet:
            print(describe({name: value for name, value in metrics.items() if name != "default"}), flush=True)

    def final(self, metrics: Any) -> None:
        """Report the result.

        Raises:
            TrainingError: if a metric is not a finite number.
        """
        refuse_non_finite(metrics, "In the end ")
        self._post("FINAL", 0, metrics)

    def deliver(self) -> None:
        """Send what could not be sent before, if NNI's manager answers."""
        if self._outer is not None:
            self._mailbox.deliver()

    def _post(self, kind: Literal["PERIODICAL", "FINAL"], sequence: int, metrics: Any) -> None:
        if self._outer is None:
            return
        arrived = self._mailbox.post({"type": kind, "sequence": sequence, "value": metrics})
        if not arrived and not self._away:
            print(
                f"NNI's manager does not answer; what is reported meanwhile waits in {self._mailbox.folder}.",
                file=sys.stderr,
                flush=True,
            )
        self._away = not arrived

    def _send(self, message: dict[str, Any]) -> None:
        assert self._outer is not None
        self._outer.send_metric(parameter_id=self._record["parameter_id"], trial_job_id=nni.get_trial_id(), **message)

    def _write_line(self, metrics: dict[str, Any]) -> None:
        """Add the epoch to the table; one that is run again after an interruption replaces its first try."""
        rows = [row for row in self._read_lines() if int(row["epoch"]) < metrics["epoch"]]
        rows.append({name: json.dumps(v) if isinstance(v, list | dict) else v for name, v in metrics.items()})
        columns = list(dict.fromkeys(name for row in rows for name in row))
        table = io.StringIO()
        writer = csv.DictWriter(table, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self._file, table.getvalue())

    def _read_lines(self) -> list[dict[str, Any]]:
        """Return the table so far; one that is damaged is put aside."""
        if not self._file.exists():
            return []
        try:
            with self._file.open(newline="", encoding="utf-8") as file:
                rows: list[dict[str, Any]] = list(csv.DictReader(file, strict=True))
            for row in rows:
                # A missing column is None, and surplus ones are found under the key None.
                if None in row or None in row.values():
                    raise ValueError(f"the line {list(row.values())} does not have as many values as there are columns")
                int(row["epoch"])
        except (csv.Error, ValueError, KeyError) as error:
            aside = self._file.with_suffix(".damaged")
            self._file.replace(aside)
            print(
                f"{self._file} is no table with a line for every epoch ({error}); it is kept as {aside}, and a new one "
                "begins.",
                file=sys.stderr,
            )
            return []
        return rows


def refuse_non_finite(metrics: Mapping[str, Any], when: str) -> None:
    """Make sure that every number among ``metrics`` is finite: NNI would count a trial that reports NaN as a success.

    Raises:
        TrainingError: if one is not.
    """
    for name, value in metrics.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise TrainingError(f"{when}{name} is {value}: the training has diverged; a lower optimizer.lr may help.")


def await_owner(directory: RunDirectory) -> None:
    """Under NNI, wait until no other process runs in ``directory``; elsewhere that is an error.

    When NNI's manager is killed, its trials go on. Resumed, it starts them again: this is then the second process of
    one trial, which reports for the first and, when that has ended, goes on from where it was.

    Raises:
        UserError: if another process runs there, and this is no trial of NNI.
    """
    if "NNI_PLATFORM" not in os.environ:
        directory.refuse_owned()
    owner = directory.owner()
    if owner is None:
        return
    print(f"Process {owner} still runs this trial, which NNI has started again; waiting for its end.", flush=True)
    reporter = Reporter(directory.path, quiet=True)
    try:
        while directory.owner() is not None:
            reporter.deliver()
            time.sleep(_POLL_SECONDS)
    except KeyboardInterrupt:
        # So NNI stops a trial. It knows this process only.
        if owner := directory.owner():
            os.kill(owner, signal.SIGINT)
        raise


def on_terminal() -> bool:
    """Tell whether somebody watches, so that a progress bar makes sense."""
    return sys.stdout.isatty() and sys.stderr.isatty()
