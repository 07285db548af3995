"""What a command imports: files of your own, such as one that registers operations, and all that comes with torch."""

from __future__ import annotations

import gc
import importlib.util
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from nni_cream.errors import UserError

_IMPORTED: Final[list[Path]] = []


@contextmanager
def large_imports() -> Iterator[None]:
    """Import torch inside, and what needs it, with Python's collector of garbage at rest.

    A million objects are made that stay as long as the process. To look for garbage among them again and again takes a
    quarter of all the time; and later it would be looked for among them too, so they are frozen.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def import_file(name: str) -> Path:
    """Run a Python file as a module of its own name, once in a process, and return its path.

    Raises:
        UserError: if there is no such file, its name cannot be that of a module or is that of another one, or it ends
            in an error.
    """
    file = Path(name).resolve()
    if file in _IMPORTED:
        return file
    if file.suffix != ".py" or not file.is_file():
        raise UserError(f"--import names {name}, which is no Python file; give the .py file with your operations.")
    if not file.stem.isidentifier() or file.stem.startswith("__"):
        raise UserError(f"--import names {name}, but a module cannot be called {file.stem!r}; rename the file.")
    known = importlib.util.find_spec(file.stem)
    if known is not None and (known.origin is None or Path(known.origin).resolve() != file):
        raise UserError(f"--import names {name}, but there is another module {file.stem!r}; rename the file.")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[file.stem]
        text = " ".join(str(error).split()).rstrip(".")
        reason = text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
        raise UserError(f"{name} cannot be imported, because of line {_line(error, file)}: {reason}.") from None
    _IMPORTED.append(file)
    return file


def _line(error: Exception, file: Path) -> int | None:
    if isinstance(error, SyntaxError):
        return error.lineno
    frames = traceback.extract_tb(error.__traceback__)
    return next((frame.lineno for frame in reversed(frames) if frame.filename == str(file)), None)


def import_options() -> tuple[str, ...]:
    """Return the words with which a command imports what this process has imported."""
    return tuple(word for file in _IMPORTED for word in ("--import", str(file)))
