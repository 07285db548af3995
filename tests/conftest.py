from __future__ import annotations

import os
from pathlib import Path

import pytest

# Two threads that wait for each other on a busy machine make small convolutions up to a hundred times slower. Set
# before torch is imported, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _outside_nni(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests started from an NNI trial would report to its manager."""
    for name in [name for name in os.environ if name.startswith("NNI_")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--screenshots", type=Path, help="folder to write the pictures of the documentation into")


@pytest.fixture(scope="session")
def screenshots(request: pytest.FixtureRequest) -> Path | None:
    folder: Path | None = request.config.getoption("--screenshots")
    return folder


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Several processes (-n) share the tests file by file; all that start an experiment of NNI's run in one of them."""
    for item in items:
        module = str(item.path.relative_to(REPOSITORY))
        starts_experiments = module.startswith("tests/experiments/") or module == "tests/test_experiment.py"
        item.add_marker(pytest.mark.xdist_group("experiments" if starts_experiments else module))
