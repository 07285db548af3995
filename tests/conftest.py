from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Two threads that wait for each other on a busy machine make small convolutions up to a hundred times slower. Set
# before torch is imported, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell that starts the tests in the background lets them ignore Ctrl-C, which some of them send to themselves.
signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _outside_nni(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests started from an NNI trial would report to its manager."""
    for name in [name for name in os.environ if name.startswith("NNI_")]:
        monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _signals_as_before() -> Iterator[None]:
    """Commands that tests run in this process change what signals do."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--screenshots", type=Path, help="folder to write the pictures of the documentation into")


@pytest.fixture(scope="session")
def screenshots(request: pytest.FixtureRequest) -> Path | None:
    folder: Path | None = request.config.getoption("--screenshots")
    return folder


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Share the tests out file by file (-n); those that start experiments of NNI's, which take ports, stay together."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            starts_experiments = file.startswith("tests/experiments/") or file == "tests/test_experiment.py"
            return "experiments" if starts_experiments else file

    return Scheduling(config, log)
