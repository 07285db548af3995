from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

# Two threads that wait for each other on a busy machine make small convolutions up to a hundred times slower. Set
# before torch is imported, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell that starts the tests in the background lets them ignore Ctrl-C, which some of them send to themselves.
signal.signal(signal.SIGINT, signal.default_int_handler)

# What tests import stays; see nni_cream.imports.large_imports().
gc.disable()

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


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


# What is begun first, because it takes longest. Tests that start experiments of NNI's wait most of the time; they are
# two groups, so that never more than two experiments run at once.
FIRST: Final = (
    ("tests/experiments/test_interruptions.py", "tests/experiments/test_remote.py"),
    ("tests/experiments/", "tests/test_experiment.py"),
    ("tests/test_resuming.py",),
    ("tests/test_export.py",),
    ("tests/test_precision.py",),
    ("tests/test_packaging.py",),
    ("tests/trials/test_several_processes.py",),
    ("tests/trials/test_search_and_retrain.py",),
    ("tests/trials/test_machine_trouble.py",),
    ("tests/test_retrain.py",),
    ("tests/test_distributed.py",),
    ("tests/models/test_timm_conventions.py",),
    ("tests/test_docs.py",),
    ("tests/trials/bad_input/test_files.py",),
    ("tests/trials/test_rank_correlation.py",),
    ("tests/trials/test_export_child.py",),
    ("tests/trials/test_retrain_child.py",),
    ("tests/trials/test_measure_latency.py",),
)


def _group(nodeid: str) -> str:
    """Return the name of the tests that one process runs one after the other."""
    file = nodeid.partition("::")[0]
    return next((names[0] for names in FIRST if file.startswith(names)), file)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {names[0]: place for place, names in enumerate(FIRST)}
    items.sort(key=lambda item: order.get(_group(item.nodeid), len(order)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Share the tests out by groups (-n), in their order."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(nodeid)

    # Else the groups with the most tests would be first.
    config.option.loadscopereorder = False
    return Scheduling(config, log)
