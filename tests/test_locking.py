from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nni_cream.locking import ProcessLock

HOLD = """
import sys, time
from pathlib import Path
from typing import Any
from nni_cream.locking import ProcessLock
lock = ProcessLock(Path(sys.argv[1]))
held = lock.acquire()
# Here another program may stand.
print("held" if held else "refused", flush=True)
time.sleep(60)
"""
# A child that is forked, as a data loader forks its workers, and outlives the owner.
FORK = HOLD.replace("# Here another program may stand.", "import os; os.fork() or time.sleep(60)")

Other = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def other() -> Iterator[Other]:
    """Start another process that takes the lock; gives the process, once it has."""
    started: list[subprocess.Popen[str]] = []

    def start(file: Path, program: str = HOLD) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", program, str(file)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_what_another_process_holds_cannot_be_had(tmp_path: Path, other: Other) -> None:
    lock = ProcessLock(tmp_path / "lock")
    process = other(tmp_path / "lock")
    assert lock.owner() == process.pid
    assert not lock.acquire()
    assert lock.owner() == process.pid  # asking and trying have not disturbed it


@pytest.mark.parametrize("program", [HOLD, FORK], ids=["alone", "with a child that lives on"])
def test_it_ends_with_its_owner_however_that_ends(tmp_path: Path, other: Other, program: str) -> None:
    process = other(tmp_path / "lock", program)
    process.kill()
    process.wait()
    lock = ProcessLock(tmp_path / "lock")
    assert lock.owner() is None
    assert lock.acquire()
    assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"


def test_waiting_takes_it_when_its_owner_has_gone(tmp_path: Path, other: Other) -> None:
    process = other(tmp_path / "lock")
    subprocess.Popen(["sh", "-c", f"sleep 0.7; kill -9 {process.pid}"])
    started = time.monotonic()
    assert ProcessLock(tmp_path / "lock").acquire(wait=True)
    assert time.monotonic() - started > 0.3


def test_it_can_be_given_back(tmp_path: Path, other: Other) -> None:
    lock = ProcessLock(tmp_path / "lock")
    assert lock.acquire()
    assert lock.acquire()
    assert lock.owner() is None  # no other process
    lock.release()
    process = other(tmp_path / "lock")
    assert lock.owner() == process.pid


def test_asking_needs_no_right_to_write(tmp_path: Path, other: Other, monkeypatch: pytest.MonkeyPatch) -> None:
    process = other(tmp_path / "lock")
    opened = Path.open

    def read_only(path: Path, mode: str = "r", **rest: Any) -> Any:
        if mode != "r":
            raise OSError(errno.EROFS, "Read-only file system")
        return opened(path, mode, **rest)

    monkeypatch.setattr(Path, "open", read_only)
    assert ProcessLock(tmp_path / "lock").owner() == process.pid


def test_asking_who_holds_it_writes_nothing(tmp_path: Path) -> None:
    assert ProcessLock(tmp_path / "run" / "lock").owner() is None
    assert not list(tmp_path.iterdir())
