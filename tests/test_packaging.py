"""What a user installs is complete."""

from __future__ import annotations

import subprocess
import venv
from pathlib import Path

import pytest


@pytest.mark.slow
def test_pip_install_into_an_empty_environment_works_from_any_folder(repository: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    install = [python, "-m", "pip", "install", "--quiet", "--constraint", repository / "constraints.txt", repository]
    subprocess.run(install, check=True, capture_output=True, text=True, timeout=1200)
    # -I keeps the current folder and PYTHONPATH out, so only what was installed can be found.
    program = (
        "import nni_cream, search_spaces.cream, timm, nni.nas.strategy as s;"
        "timm.create_model('cream_14'); s.CreamStrategy; print(nni_cream.__file__)"
    )
    result = subprocess.run([python, "-I", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(str(tmp_path / "venv"))
    for arguments in (["-m", "pip", "check"], ["-m", "nni.tools.nnictl.nnictl", "--version"]):
        subprocess.run([python, *arguments], cwd=tmp_path, check=True, capture_output=True)


def test_constraints_name_every_installed_dependency(repository: Path) -> None:
    from importlib.metadata import requires

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (repository / "constraints.txt").read_text().splitlines()
    pinned = {canonicalize_name(line.partition("==")[0]): line for line in lines if not line.startswith("#")}
    assert all("==" in line for line in pinned.values())
    waiting = ["nni_cream[dev,elpv]"]
    seen: set[str] = set()
    while waiting:
        wanted = Requirement(waiting.pop())
        for extra in wanted.extras or {""}:
            for text in requires(wanted.name) or []:
                needed = Requirement(text)
                if needed.marker is not None and not needed.marker.evaluate({"extra": extra}):
                    continue
                name = canonicalize_name(needed.name)
                # torch's CUDA libraries come with the wheel from PyPI and not with the CPU build.
                if name.startswith("nvidia-") and wanted.name == "torch":
                    continue
                assert name in pinned, f"{wanted.name} needs {needed.name}, which constraints.txt does not name"
                key = f"{name}[{','.join(sorted(needed.extras))}]" if needed.extras else name
                if key not in seen:
                    seen.add(key)
                    waiting.append(key)
    assert "torch" in seen
