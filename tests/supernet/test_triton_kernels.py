from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nni_cream.supernet import kernels
from nni_cream.supernet.kernels import are_there_kernels_for, kernels_for

# Where `make` puts Triton. Beside torch for CPUs it has a folder of its own, since torch's compiler imports one that it
# finds, in every process.
TRITON = Path(sys.prefix) / "triton"


@pytest.mark.slow
def test_kernels(repository: Path) -> None:
    has_triton = importlib.util.find_spec("triton") is not None
    assert has_triton or TRITON.exists(), f"`make {Path(sys.prefix).name}/installed-dev` puts Triton into {TRITON}"
    # torch's own fits torch.
    folders = [str(repository)] if has_triton else [str(TRITON), str(repository)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/supernet/kernels_on_device.py"]
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "skipped" not in done.stdout
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 40


def test_a_cpu_has_none() -> None:
    features = torch.ones(2, 3)
    assert kernels_for(features) is None
    assert not are_there_kernels_for(features)


class Broken:
    @staticmethod
    def run_all() -> None:
        raise RuntimeError("Failed to find C compiler.\nand more")


class Working:
    @staticmethod
    def run_all() -> None:
        pass


class OnAGPU:
    """What is asked of a tensor."""

    tangent: Any = None
    is_cuda, dtype, requires_grad, device, shape = True, torch.float32, False, "cuda:0", (2, 3)

    def numel(self) -> int:
        return 6

    def stride(self, dimension: int) -> int:
        return 3


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], Any]]:
    """Asks for kernels where importing them gives or raises something."""
    features: Any = OnAGPU()

    def ask(found: Any) -> Any:
        def import_module(name: str) -> Any:
            if isinstance(found, Exception):
                raise found
            return found

        monkeypatch.setattr(kernels.importlib, "import_module", import_module)
        monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: name if found else None)
        monkeypatch.setattr(kernels.forward_ad, "unpack_dual", lambda tensor: tensor)
        kernels._kernels.cache_clear()
        given = kernels_for(features)
        assert are_there_kernels_for(features) == (given is not None)
        return given

    yield ask
    kernels._kernels.cache_clear()


def test_without_triton_there_are_none(asked: Callable[[Any], Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert asked(None) is None
    assert capsys.readouterr().err == ""


def test_a_triton_that_cannot_compile_is_told_once(
    asked: Callable[[Any], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert asked(Broken) is None
    assert kernels._kernels() is None
    assert capsys.readouterr().err.splitlines() == [
        "Cells of DARTS run as in the textbook, which is slower: Triton failed with Failed to find C compiler."
    ]


def test_a_triton_that_cannot_be_imported_is_told_too(
    asked: Callable[[Any], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert asked(OSError("libtriton.so: cannot open")) is None
    assert "Triton failed with libtriton.so: cannot open." in capsys.readouterr().err


def test_they_are_for_what_is_not_differentiated(asked: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked(Working) is Working
    monkeypatch.setattr(OnAGPU, "requires_grad", True)
    features: Any = OnAGPU()
    assert kernels_for(features) is None
    with torch.no_grad():
        assert kernels_for(features) is Working
    assert are_there_kernels_for(features)


@pytest.mark.parametrize(
    ("what", "value"),
    [
        ("is_cuda", False),
        ("dtype", torch.int64),
        ("numel", lambda _: 2**31),
        ("stride", lambda *_: 2**30),
        ("tangent", torch.ones(2, 3)),
    ],
    ids=["not on a GPU", "whole numbers", "too many", "too far apart", "forward mode"],
)
def test_they_are_not_for_everything(
    what: str, value: Any, asked: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert asked(Working) is Working
    monkeypatch.setattr(OnAGPU, what, value)
    features: Any = OnAGPU()
    assert kernels_for(features) is None


def test_fused_cells_are_of_whole_precision(asked: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked(Working) is Working
    monkeypatch.setattr(OnAGPU, "dtype", torch.bfloat16)
    features: Any = OnAGPU()
    assert kernels_for(features) is Working
    assert not are_there_kernels_for(features)


@pytest.mark.parametrize(("what", "value"), [("device", "cuda:1"), ("dtype", torch.float64)], ids=["device", "type"])
def test_tensors_are_of_one_kind(what: str, value: Any, asked: Callable[[Any], Any]) -> None:
    assert asked(Working) is Working
    first: Any = OnAGPU()
    other: Any = OnAGPU()
    assert kernels_for(first, other) is Working
    setattr(other, what, value)
    assert kernels_for(first, other) is None
