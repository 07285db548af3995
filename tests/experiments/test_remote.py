"""The shipped ``experiments/remote.yml`` on an SSH server of the test's own, with a remote Python of its own."""

from __future__ import annotations

import csv
import json
import os
import pwd
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import tarfile
import time
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePath
from typing import Any

import matplotlib
import psutil
import pytest
import requests
import yaml

from nni_cream.architecture import CreamPath
from tests.experiments.ports import free_port

SSHD = Path("/usr/sbin/sshd")
NNICTL = [sys.executable, "-m", "nni.tools.nnictl.nnictl"]
TIMEOUT = 300
# What must never travel, wherever it lies; and what a trial cannot do without.
LEFT_BEHIND = {"runs", "data", ".git", ".venv", "tests", "docs", "benchmarks", "__pycache__"}
UPLOADED = {
    "trials/search_cream.py",
    "experiments/recipes/cream_mnist5k.yml",
    "search_spaces/cream.py",
    "nni_cream/__init__.py",
    "nni_cream/data.py",
}


@dataclass(frozen=True)
class Machine:
    """A "remote" machine: an SSH server on the loopback, whose sessions have another home directory."""

    port: int
    key: Path
    home: Path
    log: Path

    @property
    def entry(self) -> dict[str, Any]:
        """The machine as an item of NNI's ``machineList``, but for its Python."""
        return {"host": "127.0.0.1", "port": self.port, "user": _user(), "sshKeyFile": str(self.key)}


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """A running SSH server; nothing that a session has started survives it."""
    if not SSHD.exists():
        pytest.fail(f"There is no {SSHD} (Debian: apt-get install openssh-server).")
    folder = tmp_path / "ssh"
    machine = Machine(free_port(), folder / "id_rsa", tmp_path / "remote_home", folder / "sshd.log")
    folder.mkdir(mode=0o700)
    machine.home.mkdir()
    for name, kind in (("id_rsa", ["rsa", "-b", "3072", "-m", "PEM"]), ("host_key", ["ed25519"])):
        subprocess.run(["ssh-keygen", "-q", "-t", *kind, "-N", "", "-f", folder / name], check=True)
    config = folder / "sshd_config"
    # NNI has pip upgrade itself. Here pip finds what is installed and nothing newer, which would change what is tested.
    environment = {"HOME": machine.home, "OMP_NUM_THREADS": 1, "PIP_NO_INDEX": 1, "PIP_DRY_RUN": 1}
    # To read all fonts of this machine again would take it some seconds.
    environment |= {"MPLCONFIGDIR": matplotlib.get_configdir()}
    config.write_text(
        f"ListenAddress 127.0.0.1:{machine.port}\n"
        f"HostKey {folder / 'host_key'}\n"
        f"AuthorizedKeysFile {machine.key}.pub\n"
        f"AllowUsers {_user()}\n"
        "AuthenticationMethods publickey\n"
        "StrictModes no\n"
        "UsePAM no\n"
        "PidFile none\n"
        "Subsystem sftp internal-sftp\n"
        f"SetEnv {' '.join(f'{name}={value}' for name, value in environment.items())}\n"
    )
    with _privilege_separation_folder(), machine.log.open("wb") as log:
        server = subprocess.Popen([SSHD, "-D", "-e", "-f", config], stderr=log, env={})
        try:
            _wait_for_server(server, machine)
            yield machine
        finally:
            sessions = psutil.Process(server.pid).children(recursive=True) if server.poll() is None else []
            server.kill()
            server.wait()
            _kill([*sessions, *_processes_at_home(machine.home)])


@pytest.fixture
def remote_python(tmp_path: Path) -> Path:
    """The ``bin`` directory of a second environment: all that is installed in this one, but for this package.

    Its packages are links to those here, since 50,000 files take half a minute to make and remove. So nothing may write
    there: NNI starts pip, which ``machine`` keeps from finding anything newer and from installing it.
    """
    folder = tmp_path / "remote_venv"
    venv.create(folder, symlinks=True)
    here = Path(sysconfig.get_paths()["purelib"])
    there = folder / here.relative_to(sys.prefix)
    # By folder: the egg-info in the repository is a distribution too, and Python may find it first.
    installed = metadata.distributions(name="nni_cream", path=[str(here)])
    ours = {file.parts[0] for distribution in installed for file in distribution.files or []} - {"..", "__pycache__"}
    for entry in here.iterdir():
        if entry.name not in ours:
            (there / entry.name).symlink_to(entry)
    return folder / "bin"


@pytest.fixture
def tree(repository: Path, tmp_path: Path) -> Path:
    """A copy of this repository, with something in each of the places that are no part of the code."""
    copy = tmp_path / "tree"
    places = ("runs", "data", ".git", ".venv")
    ignored = shutil.ignore_patterns(*places, ".*_cache", "shared")

    def skip(parent: str, names: list[str]) -> set[str]:
        # Where pytest's --basetemp is in the repository, the copy would contain itself.
        return ignored(parent, names) | {name for name in names if Path(parent, name) in tmp_path.parents}

    shutil.copytree(repository, copy, ignore=skip)
    for place in places:
        (copy / place).mkdir()
        (copy / place / "marker").write_bytes(bytes(1024))
    for place in LEFT_BEHIND - {"__pycache__"}:
        assert any((copy / place).iterdir())
    return copy


@pytest.fixture
def settings(repository: Path) -> dict[str, Any]:
    """The tiny recipe as NNI's tuner sets it: ``tests`` does not travel, so the recipe cannot."""
    recipe = yaml.safe_load((repository / "tests/experiments/tiny_recipe.yml").read_text())
    return dict(_flattened(recipe | {"epochs": 5}))


@dataclass
class Experiment:
    """An experiment of the manager on this machine, with a home directory of its own."""

    identity: str
    port: int
    environment: dict[str, str]
    logs: list[Path]

    def get(self, what: str) -> Any:
        return requests.get(f"http://127.0.0.1:{self.port}/api/v1/nni/{what}", timeout=20).json()

    def reports(self, kind: str) -> list[tuple[int, dict[str, Any]]]:
        """What has been reported, by its place on the curve."""
        found = [report for report in self.get("metric-data") if report["type"] == kind]
        found.sort(key=lambda report: report["sequence"])
        return [(report["sequence"], json.loads(json.loads(report["data"]))) for report in found]

    def stop(self) -> None:
        subprocess.run([*NNICTL, "stop", self.identity], capture_output=True, check=True, env=self.environment)

    def resume(self) -> None:
        self.port = free_port()
        command = [*NNICTL, "resume", self.identity, "--port", str(self.port)]
        subprocess.run(command, capture_output=True, check=True, env=self.environment)

    def await_(self, condition: Callable[[], Any]) -> None:
        """Wait; where the manager gives up, or it takes too long, fail with the end of its log."""
        deadline = time.monotonic() + TIMEOUT
        status = ""
        with suppress(requests.ConnectionError):
            while (status := self.get("check-status")["status"]) not in {"ERROR", "STOPPED"}:
                if condition():
                    return
                if time.monotonic() > deadline:
                    break
                time.sleep(0.5)
        tails = [f"{log}:\n{log.read_text(errors='replace')[-3000:]}" for log in self.logs if log.exists()]
        pytest.fail("\n".join([f"NNI's manager is {status or 'gone'}.", *tails]))

    def await_end(self) -> None:
        self.await_(lambda: self.get("check-status")["status"] == "DONE")


@pytest.mark.slow
def test_the_shipped_remote_experiment_is_stopped_and_resumed_and_brings_the_architecture_back(
    machine: Machine, remote_python: Path, tree: Path, settings: dict[str, Any], repository: Path, tmp_path: Path
) -> None:
    file = tree / "experiments/remote.yml"
    config = yaml.safe_load(file.read_text())
    config["nniManagerIp"] = "127.0.0.1"
    (shipped,) = config["trainingService"]["machineList"]
    ours = machine.entry | {"pythonPath": str(remote_python)}
    assert shipped.keys() == ours.keys()
    config["trainingService"]["machineList"] = [ours]
    config["searchSpace"] |= {key: {"_type": "choice", "_value": [value]} for key, value in settings.items()}
    file.write_text(yaml.safe_dump(config))

    with _experiment(file, tmp_path / "local_home", machine.log) as experiment:
        experiment.await_(lambda: experiment.reports("PERIODICAL"))
        (interrupted,) = experiment.get("trial-jobs")
        worker = machine.home / "nni-experiments" / experiment.identity / "environments/remote-worker1"
        folder = worker / "trials" / interrupted["trialJobId"]
        experiment.stop()
        before = _epochs_in(folder)
        assert 1 <= len(before) < settings["epochs"]
        assert not _processes_at_home(machine.home)
        experiment.resume()
        experiment.await_end()
        (trial,) = experiment.get("trial-jobs")
        curve, finals = experiment.reports("PERIODICAL"), experiment.reports("FINAL")

    assert trial["trialJobId"] == interrupted["trialJobId"]
    assert trial["status"] == "SUCCEEDED", (folder / "trial.stderr").read_text()
    # It went on where it was, in the same folder, and its curve did.
    epochs = list(range(1, settings["epochs"] + 1))
    assert _epochs_in(folder) == epochs
    # What the second process has printed; it trains again at most the epoch that the first had not yet saved.
    trained = [
        int(epoch) for epoch in re.findall(r"^epoch (\d+),", (folder / "trial.stdout").read_text(), re.MULTILINE)
    ]
    assert trained in (epochs[len(before) :], epochs[len(before) - 1 :])
    # What ends while the manager is stopping has been taken by NNI, and does not reach the curve.
    shown = [point["epoch"] for _, point in curve]
    assert shown in (epochs, [epoch for epoch in epochs if epoch != before[-1]])
    assert [place + 1 for place, _ in curve] == shown
    assert all(0 <= point["default"] <= 1 for _, point in curve)
    ((_, final),) = finals
    # The metrics say all that the machine over there knows of the architecture.
    child = json.loads((folder / "child.json").read_text())
    assert CreamPath.parse(final["path"]).to_json() == child["path"]
    assert (final["default"], final["flops"], final["params"]) == (child["accuracy"], child["flops"], child["params"])
    assert settings["flops.min"] * 1e6 <= final["flops"] <= settings["flops.max"] * 1e6
    assert 100_000 < final["params"] < 10_000_000

    # The archive is what was sent; the folder beside it has what the trial added, such as __pycache__.
    with tarfile.open(worker / "upload/trial_code.tgz") as archive:
        sizes = {member.name: member.size for member in archive.getmembers()}
    parts = {part for name in sizes for part in PurePath(name).parts}
    assert parts & LEFT_BEHIND == set()
    assert [part for part in parts if part.endswith(".egg-info")] == []
    assert sizes.keys() >= UPLOADED
    assert all((worker / "upload/trial_code" / name).is_file() for name in sizes)
    stated = re.search(r"about (\d+) files and ([\d.]+) megabytes", (repository / "docs/nni.md").read_text())
    assert stated is not None
    assert len(sizes) == pytest.approx(int(stated[1]), rel=0.15)
    assert sum(sizes.values()) == pytest.approx(float(stated[2]) * 1e6, rel=0.15)

    # All this without the package: the remote Python has its dependencies only.
    command = [remote_python / "python", "-I", "-c", "import nni, torch; print('dependencies'); import nni_cream"]
    imported = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert imported.stdout == "dependencies\n", imported.stderr
    assert "No module named 'nni_cream'" in imported.stderr


@contextmanager
def _experiment(config: Path, home: Path, log: Path) -> Iterator[Experiment]:
    """Start an experiment, and stop it in any case; where waiting fails, ``log`` is shown too."""
    home.mkdir()
    environment = {**os.environ, "HOME": str(home)}
    port = free_port()
    create = [*NNICTL, "create", "--config", str(config), "--port", str(port)]
    try:
        created = subprocess.run(create, capture_output=True, text=True, check=False, env=environment)
        found = re.search(r"Experiment ID: (?:\x1b\[\d+m)?(\w+)", created.stdout)
        assert found is not None, created.stdout + created.stderr
        identity = found.group(1)
        logs = [config.parent.parent / "runs/nni" / identity / "log/nnimanager.log", log]
        experiment = Experiment(identity, port, environment, logs)
        try:
            yield experiment
        finally:
            experiment.stop()
    finally:
        _kill(_processes_at_home(home))


def _wait_for_server(server: subprocess.Popen[bytes], machine: Machine) -> None:
    for _ in range(100):
        if server.poll() is not None:
            break
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", machine.port)) == 0:
                return
        time.sleep(0.1)
    pytest.fail(f"sshd does not answer: {machine.log.read_text()}")


def _epochs_in(folder: Path) -> list[int]:
    with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
        return [int(row["epoch"]) for row in csv.DictReader(file)]


def _flattened(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@contextmanager
def _privilege_separation_folder() -> Iterator[None]:
    """Make the empty folder that sshd, as root, insists on; Debian's start script makes it too."""
    folder = Path("/run/sshd")
    made = os.geteuid() == 0 and not folder.exists()
    if made:
        folder.mkdir(mode=0o755)
    try:
        yield
    finally:
        if made:
            folder.rmdir()


def _processes_at_home(home: Path) -> list[psutil.Process]:
    """Find what was started with this home directory, also where it has outlived its parents."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("HOME") == str(home):
                found.append(process)
        except psutil.Error:
            continue
    return found


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=10)


def _user() -> str:
    return pwd.getpwuid(os.geteuid()).pw_name
