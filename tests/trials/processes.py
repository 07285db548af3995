"""The commands in ``trials/`` in processes of their own, as a user starts them."""

from __future__ import annotations

import csv
import signal
import subprocess
import sys
from pathlib import Path

from tests.conftest import REPOSITORY

SECONDS = 300


def command(name: str, *arguments: object) -> list[str]:
    return [sys.executable, str(REPOSITORY / "trials" / name), *map(str, arguments)]


def trial(folder: Path, name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a trial in a folder to its end."""
    full = command(name, *arguments)
    return subprocess.run(full, cwd=folder, capture_output=True, text=True, timeout=SECONDS, check=False)


def kill_in_epoch(epoch: int, folder: Path, name: str, *arguments: object) -> None:
    """Start a trial, and kill it when it has told of an epoch."""
    full = command(name, *arguments)
    with subprocess.Popen(full, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(f"epoch {epoch}"):
                process.send_signal(signal.SIGKILL)
                break


def epochs(metrics: Path) -> list[int]:
    """Return the epochs that ``metrics.csv`` has, in its order."""
    with metrics.open(encoding="utf-8") as lines:
        return [int(row["epoch"]) for row in csv.DictReader(lines)]
