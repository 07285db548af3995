"""The commands in ``trials/``, run in the process of the test: hundreds of them start in the time of one process."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unittest import mock

import pytorch_lightning as pl
from lightning_fabric.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from nni_cream.cli import run
from tests.conftest import REPOSITORY


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    def sentence(self) -> str:
        """Return the one sentence of a refusal."""
        assert self.code == 2, self
        assert "Traceback" not in self.err
        *before, last = self.err.rstrip("\n").split("\n")
        assert last.startswith("error: "), self
        assert not any("error" in line.lower() for line in before), self
        text = last.removeprefix("error: ")
        assert len(text) > 20, self
        assert text[-1] in ".?", self
        assert text[-2] not in ".?", self
        return text


@cache
def main_of(name: str) -> Callable[[], None]:
    if name == "experiment":
        from nni_cream import experiment

        return experiment.main
    spec = importlib.util.spec_from_file_location(f"trial_{name}", REPOSITORY / "trials" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    main: Callable[[], None] = module.main
    return main


class Began(BaseException):
    """A training has been started that should have been refused."""


def _begin(*_: object, **__: object) -> None:
    raise Began


def call(name: str, *arguments: object, folder: Path) -> Ended:
    """Run a command in ``folder`` up to where it would train.

    Raises:
        Began: if it begins to train or to test, or starts further processes.
    """
    out, err = io.StringIO(), io.StringIO()
    before = Path.cwd()
    os.chdir(folder)
    code: object = 0
    try:
        with (
            mock.patch.object(sys, "argv", [f"{name}.py", *map(str, arguments)]),
            mock.patch.object(threading, "excepthook", threading.excepthook),
            mock.patch.object(pl.Trainer, "fit", _begin),
            mock.patch.object(pl.Trainer, "test", _begin),
            mock.patch.object(_SubprocessScriptLauncher, "_call_children_scripts", _begin),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            try:
                run(main_of(name))
            except SystemExit as ended:
                code = ended.code
    finally:
        os.chdir(before)
    assert isinstance(code, int)
    return Ended(code, out.getvalue(), err.getvalue())


def content(folder: Path) -> dict[Path, bytes | None]:
    """Return all that is in a folder."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}
