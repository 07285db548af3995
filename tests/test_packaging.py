"""What a user installs is complete."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import PackageNotFoundError, metadata, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from nni_cream.data_names import DATA_SETS

# What torch's wheel from PyPI brings, in versions that it pins, and its CPU build does not.
OF_CUDA = re.compile(r"(nvidia|cuda)-(?!ml-py)|triton$")


@pytest.mark.slow
def test_what_pip_installs_works_from_any_folder(repository: Path, tmp_path: Path) -> None:
    """With the dependencies that this environment has of ``make``, which takes minutes to install them."""
    venv.create(tmp_path / "venv")
    python = tmp_path / "venv/bin/python"
    ours, theirs = (sysconfig.get_path("purelib", vars=of) for of in ({"base": str(tmp_path / "venv")}, None))
    # Their own .pth files are not read then, nor what they say of the repository.
    Path(ours, "dependencies.pth").write_text(f"{theirs}\n")
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", repository]
    subprocess.run(install, check=True, capture_output=True, text=True, timeout=300)
    # -I keeps the current folder and PYTHONPATH out, so only what was installed can be found.
    program = (
        "import nni_cream, search_spaces.cream, timm, nni.nas.strategy as s;"
        "timm.create_model('cream_14'); s.CreamStrategy; print(nni_cream.__file__)"
    )
    result = subprocess.run([python, "-I", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(str(tmp_path / "venv"))
    # Every module, and with them what they import; that of kernels is for where torch brings Triton.
    program = (
        "import importlib, importlib.util, pkgutil, nni_cream, search_spaces\n"
        "for package in (nni_cream, search_spaces):\n"
        "    for module in pkgutil.walk_packages(package.__path__, f'{package.__name__}.'):\n"
        "        if module.name.endswith('.triton_kernels') and importlib.util.find_spec('triton') is None:\n"
        "            continue\n"
        "        importlib.import_module(module.name)\n"
        "        print(module.name)\n"
    )
    result = subprocess.run([python, "-I", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert {"nni_cream.experiment", "nni_cream.strategies.darts", "search_spaces.cream"} < set(result.stdout.split())

    listed = [python, "-m", "pip", "list", "--format", "json"]
    found = json.loads(subprocess.run(listed, check=True, capture_output=True, text=True).stdout)
    brought = {canonicalize_name(item["name"]): item["version"].partition("+")[0] for item in found}
    pinned = pins(repository)
    more = {name for name in brought if name not in pinned and not OF_CUDA.match(name)}
    assert more == {"nni-cream", "pip"}
    assert {name: version for name, version in brought.items() if name in pinned} == pinned

    for arguments in (["-m", "pip", "check"], ["-m", "nni.tools.nnictl.nnictl", "--version"]):
        subprocess.run([python, *arguments], cwd=tmp_path, check=True, capture_output=True)


def pins(repository: Path) -> dict[str, str]:
    """Return the versions in constraints.txt."""
    lines = (repository / "constraints.txt").read_text().splitlines()
    found = {}
    for line in lines:
        if not line.startswith("#"):
            name, _, version = line.partition("==")
            assert version, line
            found[canonicalize_name(name)] = version
    return found


def test_constraints_name_every_installed_dependency(repository: Path) -> None:
    pinned = pins(repository)
    waiting = ["nni_cream[dev,elpv,export]"]
    seen: set[str] = set()
    while waiting:
        wanted = Requirement(waiting.pop())
        for extra in wanted.extras or {""}:
            for text in requires(wanted.name) or []:
                needed = Requirement(text)
                if needed.marker is not None and not needed.marker.evaluate({"extra": extra}):
                    continue
                name = canonicalize_name(needed.name)
                if OF_CUDA.match(name) and wanted.name == "torch":
                    continue
                assert name in pinned, f"{wanted.name} needs {needed.name}, which constraints.txt does not name"
                key = f"{name}[{','.join(sorted(needed.extras))}]" if needed.extras else name
                if key not in seen:
                    seen.add(key)
                    waiting.append(key)
    assert "torch" in seen


def rows(repository: Path, title: str) -> dict[str, str]:
    """Return the names and licences in a table of docs/licences.md."""
    text = (repository / "docs" / "licences.md").read_text(encoding="utf-8")
    section = text.partition(f"## {title}\n")[2].partition("\n## ")[0]
    found = {}
    for line in section.splitlines():
        if line.startswith("| ") and not line.startswith(("| package", "| data set", "| what")):
            names, licence, purpose = (cell.strip() for cell in line.strip("|").split("|"))
            assert licence, line
            assert purpose, line
            for name in names.split(", "):
                found[name.strip("`")] = licence
    return found


# What metadata without an expression say in words, and what an expression for it has in it.
WORDS_FOR = {
    "MIT": "MIT",
    "BSD": "BSD",
    "Apache": "Apache-2.0",
    "Mozilla": "MPL-2.0",
    "MPL": "MPL-2.0",
    "Python Software Foundation": "PSF",
    "PSF": "PSF",
}


def described(name: str) -> str:
    """Return what the metadata of an installed package say of its licence in words."""
    said = metadata(name)
    classifiers = [text for text in said.get_all("Classifier") or [] if text.startswith("License ::")]
    # Some give the whole text, which names others too.
    return " ".join([*(said.get("License") or "").splitlines()[:1], *classifiers])


def test_the_licences_of_all_packages_and_data_are_listed(repository: Path) -> None:
    packages = {canonicalize_name(name): licence for name, licence in rows(repository, "Packages").items()}
    assert set(packages) == set(pins(repository))
    assert tuple(rows(repository, "Data")) == DATA_SETS
    checked = 0
    for name, licence in packages.items():
        try:
            stated = metadata(name)["License-Expression"]
        except PackageNotFoundError:
            continue
        if stated is not None:
            assert licence == stated, name
            checked += 1
        elif (said := [key for word, key in WORDS_FOR.items() if word in described(name)]) != []:
            assert any(key in licence for key in said), (name, licence, said)
            checked += 1
    assert checked > 90
