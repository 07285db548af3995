"""The commands in ``trials/`` in processes of their own, as a user starts them."""

from __future__ import annotations

import csv
import ctypes
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.conftest import REPOSITORY
from tests.forking import FORKING

SECONDS = 300


def command(name: str, *arguments: object) -> list[str]:
    return [sys.executable, str(REPOSITORY / "trials" / name), *map(str, arguments)]


def trial(folder: Path, name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a trial in a folder to its end.

    Its process has everything imported already; tests/trials/bad_input has tests that start each command by itself.
    """
    return forked(folder, command(name, *arguments))


def forked(
    folder: Path, full: list[str], *, mounts: str = "", afterwards: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run a command of Python's, an interpreter and a script with its arguments, in a folder to its end, likewise.

    With ``mounts``, shell commands that are run before, what is mounted is there for this process alone; it is gone
    with it, and can be looked at by the shell commands ``afterwards``.
    """
    with tempfile.TemporaryDirectory() as place:
        process, out, err = _start(folder, full, Path(place), mounts, afterwards)
        process.join(SECONDS)
        if process.is_alive():
            process.kill()
            raise subprocess.TimeoutExpired(full, SECONDS)
        code = process.exitcode
        assert code is not None
        return subprocess.CompletedProcess(full, code, out.read_text("utf-8"), err.read_text("utf-8"))


def _start(
    folder: Path, full: list[str], place: Path, mounts: str = "", afterwards: str = ""
) -> tuple[Any, Path, Path]:
    """Return a process that has been started, and the files in ``place`` that it prints to."""
    out, err = place / "out", place / "err"
    out.touch()
    process = FORKING.Process(target=_run, args=(full[1:], folder, dict(os.environ), out, err, mounts, afterwards))
    process.start()
    return process, out, err


def _run(
    words: list[str],
    folder: Path,
    environment: dict[str, str],
    out: Path,
    err: Path,
    mounts: str,
    afterwards: str,
) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    # Its own processes are started as in a new one, and not by the server that has forked it.
    multiprocessing.set_start_method(None, force=True)
    if mounts:
        _take_mounts_of_its_own()
        subprocess.run(["sh", "-ec", mounts], check=True)
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
    finally:
        if afterwards:
            subprocess.run(["sh", "-ec", afterwards], check=True)


def _take_mounts_of_its_own() -> None:
    """As ``unshare -m`` does; or, without the right to that, ``unshare -Urm``."""
    new_mounts, new_user, recursive, private = 0x00020000, 0x10000000, 0x4000, 0x40000
    libc = ctypes.CDLL(None, use_errno=True)
    maps = {"setgroups": "deny", "uid_map": f"0 {os.getuid()} 1", "gid_map": f"0 {os.getgid()} 1"}
    if libc.unshare(new_mounts):
        if libc.unshare(new_mounts | new_user):
            raise OSError(ctypes.get_errno(), "no mounts of its own")
        for name, text in maps.items():
            Path("/proc/self", name).write_text(text)
    if libc.mount(b"none", b"/", None, recursive | private, None):
        raise OSError(ctypes.get_errno(), "its mounts are seen by others")


def kill_in_epoch(epoch: int, folder: Path, name: str, *arguments: object) -> None:
    """Start a trial, and kill it when it has told of an epoch."""
    deadline = time.monotonic() + SECONDS
    with tempfile.TemporaryDirectory() as place:
        process, out, _ = _start(folder, command(name, *arguments), Path(place))
        while process.is_alive() and f"\nepoch {epoch}," not in f"\n{out.read_text('utf-8')}":
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.kill()
        process.join()


def epochs(metrics: Path) -> list[int]:
    """Return the epochs that ``metrics.csv`` has, in its order."""
    with metrics.open(encoding="utf-8") as lines:
        return [int(row["epoch"]) for row in csv.DictReader(lines)]
