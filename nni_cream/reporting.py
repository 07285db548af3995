"""Where the metrics of a run go: to NNI when there is one, to ``metrics.csv``, and to a person."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
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

from nni_cream.runs import describe, write_text


class Reporter(TrialCommandChannel):
    """Takes what a run reports and passes it on.

    It stands in NNI's place as the trial's command channel, so ``nni.report_intermediate_result`` anywhere in the
    process arrives here.

    Args:
        directory: of the run; ``metrics.csv`` there gets one line an epoch.
        quiet: print nothing; a progress bar is doing that.
    """

    def __init__(self, directory: Path, *, quiet: bool) -> None:
        self._file = directory / "metrics.csv"
        self._quiet = quiet
        self._outer: TrialCommandChannel | None = None
        self._record = ParameterRecord(parameter_id=None, parameters={})
        if "NNI_PLATFORM" in os.environ:
            self._outer = get_default_trial_command_channel()
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
        """
        self._write_line(metrics)
        self._send("PERIODICAL", metrics["epoch"] - 1, metrics)
        if not self._quiet:
            print(describe({name: value for name, value in metrics.items() if name != "default"}), flush=True)

    def final(self, metrics: Any) -> None:
        """Report the result."""
        self._send("FINAL", 0, metrics)

    def _send(self, kind: Literal["PERIODICAL", "FINAL"], sequence: int, metrics: Any) -> None:
        if self._outer is not None:
            self._outer.send_metric(
                type=kind,
                parameter_id=self._record["parameter_id"],
                trial_job_id=nni.get_trial_id(),
                sequence=sequence,
                value=metrics,
            )

    def _write_line(self, metrics: dict[str, Any]) -> None:
        """Add the epoch to the table; one that is run again after an interruption replaces its first try."""
        rows: list[dict[str, Any]] = []
        if self._file.exists():
            with self._file.open(newline="", encoding="utf-8") as file:
                rows = [row for row in csv.DictReader(file) if int(row["epoch"]) < metrics["epoch"]]
        rows.append({name: json.dumps(v) if isinstance(v, list | dict) else v for name, v in metrics.items()})
        columns = list(dict.fromkeys(name for row in rows for name in row))
        table = io.StringIO()
        writer = csv.DictWriter(table, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self._file, table.getvalue())


def on_terminal() -> bool:
    """Tell whether somebody watches, so that a progress bar makes sense."""
    return sys.stdout.isatty() and sys.stderr.isatty()
