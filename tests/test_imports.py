from __future__ import annotations

import gc
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nni_cream import imports
from nni_cream.cli import Parser, add_import
from nni_cream.errors import UserError
from nni_cream.imports import import_file, import_options, large_imports
from tests.trials.commands import call


@pytest.fixture(autouse=True)
def _nothing_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(imports, "_IMPORTED", [])
    monkeypatch.chdir(tmp_path)
    yield
    for name in ("of_mine", "also_mine"):
        sys.modules.pop(name, None)


def file_with(text: str, name: str = "of_mine.py") -> Path:
    file = Path.cwd() / name
    file.write_text(text, encoding="utf-8")
    return file


def test_a_file_is_run_once_as_a_module_of_its_name() -> None:
    file = file_with("import sys\nsys.of_mine = [*getattr(sys, 'of_mine', []), __name__]\n")
    try:
        assert import_file("of_mine.py") == import_file(str(file)) == file
        assert sys.of_mine == ["of_mine"]  # type: ignore[attr-defined]
    finally:
        del sys.of_mine  # type: ignore[attr-defined]
    assert sys.modules["of_mine"].__file__ == str(file)


def test_a_command_repeats_what_it_has_imported() -> None:
    assert import_options() == ()
    first, second = file_with("A = 1"), file_with("B = 2", "also_mine.py")
    parser = Parser()
    add_import(parser)
    arguments = parser.parse_args(["--import", "of_mine.py", "--import", "also_mine.py"])
    assert arguments.imported == [first, second]
    assert import_options() == ("--import", str(first), "--import", str(second))


def test_a_file_on_the_path_is_not_another_module(monkeypatch: pytest.MonkeyPatch) -> None:
    file = file_with("A = 1")
    monkeypatch.syspath_prepend(str(file.parent))
    import_file("of_mine.py")
    assert sys.modules["of_mine"].A == 1


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("absent.py", None, "--import names absent.py, which is no Python file; give the .py file with"),
        ("notes.txt", "", "--import names notes.txt, which is no Python file;"),
        ("of-mine.py", "", "--import names of-mine.py, but a module cannot be called 'of-mine'; rename the file."),
        ("__main__.py", "", "but a module cannot be called '__main__'; rename the file."),
        ("torch.py", "", "--import names torch.py, but there is another module 'torch'; rename the file."),
        ("colorsys.py", "", "there is another module 'colorsys'"),
        (
            "of_mine.py",
            "A = 1\nB = A / 0\n",
            "of_mine.py cannot be imported, because of line 2: ZeroDivisionError: div",
        ),
        ("of_mine.py", "A = 1\n\nB = (\n", "of_mine.py cannot be imported, because of line 3: SyntaxError: "),
        (
            "of_mine.py",
            "from nni_cream.errors import UserError\nraise UserError('Not so.')",
            "of_mine.py cannot be imported, because of line 2: Not so.",
        ),
    ],
)
def test_what_cannot_be_imported_is_one_sentence(name: str, text: str | None, message: str) -> None:
    if text is not None:
        file_with(text, name)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        import_file(name)
    assert "\n" not in str(error.value)
    assert import_options() == ()
    assert "of_mine" not in sys.modules


@pytest.mark.parametrize(
    "command", ["search_cream", "search_darts", "retrain_child", "test_child", "export_child", "compare"]
)
def test_every_command_that_builds_networks_takes_it(command: str, tmp_path: Path) -> None:
    file_with("raise ValueError('so far')")
    ended = call(command, "--import", "of_mine.py", folder=tmp_path)
    assert ended.sentence() == "of_mine.py cannot be imported, because of line 1: ValueError: so far."
    assert [file.name for file in tmp_path.iterdir() if file.name != "__pycache__"] == ["of_mine.py"]


class TestLargeImports:
    @pytest.mark.parametrize("fails", [False, True])
    def test_collect_no_garbage_until_they_end(self, fails: bool, repository: Path) -> None:
        program = f"""
import contextlib, gc
from nni_cream.imports import large_imports
collections = []
with contextlib.suppress(ZeroDivisionError), large_imports():
    gc.callbacks.append(lambda phase, about: collections.append(about["generation"]))
    import torch
    assert not collections and not gc.isenabled()
    1 / {0 if fails else 1}
assert gc.isenabled() and gc.get_freeze_count() > 100_000
loop = []
loop.append(loop)
del loop
assert gc.collect() and collections
"""
        subprocess.run([sys.executable, "-c", program], check=True, cwd=repository)

    def test_leave_a_process_alone_that_has_torch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "torch", sys)
        frozen = gc.get_freeze_count()
        with large_imports():
            assert gc.isenabled()
        assert gc.isenabled()
        assert gc.get_freeze_count() == frozen

    def test_leave_off_what_was_off(self, repository: Path) -> None:
        program = """
import gc
from nni_cream.imports import large_imports
gc.disable()
with large_imports():
    pass
assert not gc.isenabled() and not gc.get_freeze_count()
"""
        subprocess.run([sys.executable, "-c", program], check=True, cwd=repository)
