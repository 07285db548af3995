from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from nni_cream import compat

ROOT = Path(__file__).resolve().parents[1]

# What of torchvision the project uses, and what its ``import`` asks for.
USE_TORCHVISION = """
import torch, torchvision
from torchvision.transforms.v2 import functional
assert hasattr(torch.ops.torchvision, "nms")
assert functional.resize(torch.zeros(3, 8, 8), [4, 4]).shape == (3, 4, 4)
print("works")
"""


def run(script: str, *, autoload: bool) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": str(int(autoload)), "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environment)


class TestTorchvision:
    @pytest.mark.parametrize("first", ["import nni_cream", "import torch, nni_cream"])
    def test_works_once_the_package_is_imported(self, first: str) -> None:
        # Without torch's help, as where the package is not installed.
        done = run(f"{first}\n{USE_TORCHVISION}", autoload=False)
        assert (done.stdout, done.stderr) == ("works\n", "")

    def test_works_without_an_import_where_the_package_is_installed(self) -> None:
        assert any(entry.name == "nni_cream" for entry in metadata.entry_points(group="torch.backends"))
        done = run(USE_TORCHVISION, autoload=True)
        assert (done.stdout, done.stderr) == ("works\n", "")


@pytest.mark.slow
def test_nnis_own_strategies_are_there_whatever_is_imported_first() -> None:
    script = """
import nni_cream
import nni.nas.oneshot.pytorch.strategy
from nni.nas.strategy import DARTS, ENAS
print(DARTS.__module__, ENAS.__module__)
"""
    done = run(script, autoload=False)
    assert done.stdout == "nni.nas.oneshot.pytorch.strategy nni.nas.oneshot.pytorch.strategy\n", done.stderr


class FakeLibrary:
    made: list[FakeLibrary]

    def __init__(self, name: str, kind: str) -> None:
        self.name, self.kind = name, kind
        self.schemas: list[str] = []
        self.made.append(self)

    def define(self, schema: str) -> None:
        self.schemas.append(schema)


class TestDeclaring:
    @pytest.fixture(autouse=True)
    def _nothing_declared(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(compat, "_torchvision_library", None)
        monkeypatch.setattr(FakeLibrary, "made", [], raising=False)
        monkeypatch.setattr(torch.library, "Library", FakeLibrary)

    def loads(self, monkeypatch: pytest.MonkeyPatch, *, fails: bool) -> list[str]:
        asked: list[str] = []

        def load(path: str) -> None:
            asked.append(path)
            if fails:
                raise OSError("libcudart.so: cannot open shared object file")

        monkeypatch.setattr(torch.ops, "load_library", load)
        return asked

    def test_happens_once_where_the_library_does_not_load(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loads(monkeypatch, fails=True)
        compat.declare_torchvision_operators()
        compat.declare_torchvision_operators()
        (library,) = FakeLibrary.made
        assert (library.name, library.kind) == ("torchvision", "DEF")
        assert [schema.partition("(")[0] for schema in library.schemas] == ["nms", "qnms"]

    def test_does_not_happen_where_the_library_loads(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = self.loads(monkeypatch, fails=False)
        compat.declare_torchvision_operators()
        assert [Path(path).name[:2] for path in asked] == ["_C"]
        assert FakeLibrary.made == []
        assert compat._torchvision_library is None

    def test_does_not_happen_without_torchvision(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = self.loads(monkeypatch, fails=True)
        monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
        compat.declare_torchvision_operators()
        assert asked == []
        assert FakeLibrary.made == []


class TestNniWarnings:
    # The import, if it is the first, gives the warning before the test looks.
    @pytest.mark.filterwarnings("ignore:.* is found to be not a nn.Module")
    def test_silences_the_false_one_and_no_other(self) -> None:
        from nni.nas.nn.pytorch import layers

        false = "<class 'x'> is found to be not a nn.Module, which is unexpected."

        def warn(message: str, category: type[Warning], module: str) -> None:
            warnings.warn_explicit(message, category, "file.py", 1, module=module)

        with warnings.catch_warnings():
            warnings.resetwarnings()
            warnings.simplefilter("error")
            # NNI does give it, so the filter is still needed.
            with pytest.raises(RuntimeWarning, match=r"is found to be not a nn\.Module"):
                generate(layers)

            compat.install()
            generate(layers)
            warn(false, RuntimeWarning, "nni.nas.nn.pytorch.layers")
            for message, category, module in (
                (false, RuntimeWarning, "somewhere.else"),
                (false, UserWarning, "nni.nas.nn.pytorch.layers"),
                ("overflow encountered", RuntimeWarning, "nni.nas.nn.pytorch.layers"),
                ("overflow encountered", RuntimeWarning, "numpy"),
            ):
                with pytest.raises(category):
                    warn(message, category, module)


def generate(layers: Any) -> str:
    """Let NNI wrap the classes in ``torch.nn`` again, as it does when it is imported."""
    code: str = layers.generate_stub_file()
    return code
