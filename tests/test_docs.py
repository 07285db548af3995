"""The programs in the documentation run, with less training."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

PROGRAMS = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs/nni.md").read_text(encoding="utf-8"), re.DOTALL)
LESS = {
    '"mnist5k"': '"digits"',
    "max_epochs=30": "max_epochs=2",
    "warmup_epochs=10": "warmup_epochs=1",
    '{"epochs": 30}': '{"epochs": 2, "data.name": "digits", "cream.warmup_epochs": 1}',
}


def run(program: str, check: str, folder: Path) -> None:
    """Run a program, and then ``check`` in the same process."""
    for given, less in LESS.items():
        program = program.replace(given, less)
    # As in a copy of the project.
    (folder / "experiments").symlink_to(REPOSITORY / "experiments")
    file = folder / "program.py"
    file.write_text(program + check, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HOME": str(folder)}
    done = subprocess.run(
        [sys.executable, str(file)], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_search_in_python(tmp_path: Path) -> None:
    check = """
from nni_cream.architecture import CreamPath
assert len(set(paths)) == 3
assert all(isinstance(path, CreamPath) for path in paths)
assert all(2.5e6 <= path.cost.macs <= 4e6 for path in strategy.oneshot_module.ranking)
"""
    run(PROGRAMS[0], check, tmp_path)
    # Lines of code, imports apart.
    assert 8 <= len([line for line in PROGRAMS[0].splitlines() if line and "import" not in line]) <= 10


@pytest.mark.slow
def test_a_search_with_a_recipe(tmp_path: Path) -> None:
    run(PROGRAMS[1], "assert 2.5e6 <= child.flops <= 4e6", tmp_path)
    assert (tmp_path / "runs/notebook/child.json").is_file()


def test_there_are_no_other_programs() -> None:
    assert len(PROGRAMS) == 2
