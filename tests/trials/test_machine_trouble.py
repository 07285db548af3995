"""Trouble with the machine, as it is: a full disk, a killed process, too little memory. No test here is skipped.

Where a file system cannot be mounted, even in a namespace of the user's own, limits of the process stand in for it.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.conftest import REPOSITORY
from tests.trials.processes import forked

pytestmark = pytest.mark.slow

TIMEOUT = 300
GENOTYPE = (
    "Genotype(normal=[('skip_connect', 0), ('sep_conv_3x3', 1)], normal_concat=[2], reduce=[('max_pool_3x3', 0), "
    "('skip_connect', 1)], reduce_concat=[2])"
)
SETTINGS = ("data.name=digits", "data.resolution=8", "data.batch_size=128", "epochs=4", "schedule.warmup_epochs=0")
SETTINGS += ("darts.channels=8", "darts.cells=3", "device.accelerator=cpu")
COMMAND = [f"--architecture={GENOTYPE}", *(word for setting in SETTINGS for word in ("--set", setting))]
ONE_WORKER = ("--set", "data.workers=1")
# Its checkpoints are of 78 kB, and three of them are there at a time.
DISK = "240k"

# A training to which something happens: the command itself, after some lines of this test's.
HAPPENING = """
import os, resource, runpy, subprocess, sys
sys.path.insert(0, {repository!r})
import nni_cream
from nni_cream.checkpoints import LastTwo
from nni_cream._data_sources import Images
ended = LastTwo.on_train_epoch_end
{happening}
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start(folder: Path, *extra: str, happening: str = "", **mounts: str) -> subprocess.CompletedProcess[str]:
    """Run a training in ``folder`` in which a lot happens, with the ``mounts`` of :func:`forked`."""
    program = folder / "program.py"
    program.write_text(HAPPENING.format(repository=str(REPOSITORY), happening=happening), encoding="utf-8")
    command = [sys.executable, str(program), str(REPOSITORY / "trials/retrain_child.py"), *COMMAND, *extra]
    return forked(folder, command, **mounts)


@cache
def may_mount() -> bool:
    """Tell whether the machine lets a process mount something for itself."""
    unshare = shutil.which("unshare")
    ways = ([unshare, how, "sh", "-c", "mount -t tmpfs tmpfs /mnt"] for how in ("-m", "-Urm"))
    return unshare is not None and any(subprocess.run(way, check=False).returncode == 0 for way in ways)


def trouble(done: subprocess.CompletedProcess[str], code: int = 1) -> str:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    *before, last = done.stderr.splitlines()
    assert last.startswith("error: ")
    assert not [line for line in before if line.startswith("error: ")]
    return last.removeprefix("error: ")


def epochs_in(folder: Path) -> dict[str, int]:
    return {file.name: torch.load(file, weights_only=True)["epoch"] + 1 for file in (folder / "checkpoints").iterdir()}


def finished(folder: Path, *extra: str) -> None:
    """See that the same command goes on from the last checkpoint, to the end."""
    done = start(folder, "--output", "run", *extra)
    assert done.returncode == 0, done.stderr
    assert "epoch 1," not in done.stdout
    assert "test accuracy: " in done.stdout


class TestFullDisk:
    def test_while_checkpoints_are_written(self, tmp_path: Path) -> None:
        if may_mount():
            mounts = f"mkdir disk; mount -t tmpfs -o size={DISK} tmpfs disk"
            # What is on the small disk is gone with the process.
            done = start(tmp_path, "--output", "disk/run", mounts=mounts, afterwards="cp -r disk/run run")
            epochs = {"last.ckpt": 2, "previous.ckpt": 1}
        else:
            done = start(tmp_path, "--output", "run", happening=LIMITED)
            epochs = {"last.ckpt": 1}
        sentence = trouble(done)
        assert re.match(
            r"(disk/)?run/checkpoints/last.ckpt cannot be written: .*; make room, and the same comm", sentence
        )
        found = epochs_in(tmp_path / "run")
        assert found["last.ckpt"] in (2, epochs["last.ckpt"])
        assert set(found) <= {"last.ckpt", "previous.ckpt"}
        finished(tmp_path)

    def test_by_a_limit_on_files_which_needs_no_right(self, tmp_path: Path) -> None:
        sentence = trouble(start(tmp_path, "--output", "run", happening=LIMITED))
        assert sentence.startswith("run/checkpoints/last.ckpt cannot be written: File too large; make room")
        assert epochs_in(tmp_path / "run") == {"last.ckpt": 1}
        finished(tmp_path)

    @pytest.mark.parametrize("size", ["8k", "12k", "16k"])
    def test_from_the_start(self, tmp_path: Path, size: str) -> None:
        """The run's description does not fit, or TensorBoard's file, or the table."""
        if may_mount():
            mounts = f"mkdir disk; mount -t tmpfs -o size={size} tmpfs disk"
            done = start(tmp_path, "--output", "disk/run", mounts=mounts)
        else:
            limit = f"resource.setrlimit(resource.RLIMIT_FSIZE, ({int(size[:-1]) * 40},) * 2)"
            done = start(tmp_path, "--output", "run", happening=limit)
        assert "cannot be written: " in trouble(done, done.returncode)
        assert done.returncode in (1, 2)


LIMITED = """
def then(self, trainer, module):
    ended(self, trainer, module)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
LastTwo.on_train_epoch_end = then
"""


@pytest.mark.parametrize("begun", [False, True])
def test_a_folder_that_cannot_be_written(tmp_path: Path, begun: bool) -> None:
    folder = tmp_path / "closed"
    folder.mkdir()
    if begun:
        assert trouble(start(tmp_path, "--output", "closed", happening=LIMITED))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o555)
    try:
        # The superuser is hindered by no mode, unless this right is taken away.
        unprivileged = (
            "exec setpriv --bounding-set=-dac_override --inh-caps=-dac_override " if os.geteuid() == 0 else ""
        )
        program = tmp_path / "program.py"
        command = [sys.executable, str(program), str(REPOSITORY / "trials/retrain_child.py"), *COMMAND]
        program.write_text(HAPPENING.format(repository=str(REPOSITORY), happening=""), encoding="utf-8")
        done = subprocess.run(
            ["sh", "-c", f"{unprivileged}{shlex.join([*command, '--output', 'closed'])}"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
    finally:
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755)
    assert trouble(done, 2) == "The run directory closed cannot be written: Permission denied."
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


class TestWorkers:
    def test_one_that_is_killed(self, tmp_path: Path) -> None:
        killed = """
from torch.utils.data import get_worker_info
read = Images.grey
def deadly(self, index):
    if get_worker_info() is not None and os.path.exists("run/checkpoints/last.ckpt"):
        os.kill(os.getpid(), 9)
    return read(self, index)
Images.grey = deadly
"""
        # Each epoch has its own workers, so that the next one's see the checkpoint.
        sentence = trouble(start(tmp_path, "--output", "run", *ONE_WORKER, happening=killed))
        assert sentence.startswith("A process of the data loader has ended (DataLoader worker (pid")
        assert "data.workers=" in sentence
        assert epochs_in(tmp_path / "run") == {"last.ckpt": 1}
        finished(tmp_path, *ONE_WORKER)

    @pytest.mark.parametrize("size", ["4k", "40k"])
    def test_no_shared_memory(self, tmp_path: Path, size: str) -> None:
        """Not enough for a semaphore, or for a batch, after the first epoch."""
        if may_mount():
            # The one that there is stays beneath.
            happening = f"""
def then(self, trainer, module):
    ended(self, trainer, module)
    subprocess.run("mount -t tmpfs -o size={size} tmpfs /dev/shm", shell=True, check=True)
LastTwo.on_train_epoch_end = then
"""
            done = start(tmp_path, "--output", "run", *ONE_WORKER, happening=happening, mounts=":")
        else:
            limited = """
read = Images.grey
def narrow(self, index):
    if os.path.exists("run/checkpoints/last.ckpt"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    return read(self, index)
Images.grey = narrow
"""
            done = start(tmp_path, "--output", "run", *ONE_WORKER, happening=limited)
        sentence = trouble(done)
        assert sentence.startswith("The processes of the data loader have too little shared memory, /dev/shm (")
        assert "--set data.workers=0" in sentence
        assert epochs_in(tmp_path / "run") == {"last.ckpt": 1}


def test_too_little_memory_for_a_step(tmp_path: Path) -> None:
    narrow = """
def then(self, trainer, module):
    ended(self, trainer, module)
    pages = int(open("/proc/self/statm").read().split()[0])
    limit = pages * resource.getpagesize() + 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    import torch
    step = type(module).training_step
    type(module).training_step = lambda self, *rest: torch.empty(2**27) and step(self, *rest)
LastTwo.on_train_epoch_end = then
"""
    sentence = trouble(start(tmp_path, "--output", "run", happening=narrow))
    assert sentence.startswith("There is not enough memory for a step with data.batch_size 128 (")
    assert sentence.endswith("; try --set data.batch_size=64 --name ….")
    assert epochs_in(tmp_path / "run") == {"last.ckpt": 1}
    finished(tmp_path)
