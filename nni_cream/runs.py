"""Run directories: where everything that a run makes is kept, and how it is written so that nothing gets lost."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import uuid
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from nni_cream.errors import UserError
from nni_cream.locking import ProcessLock
from nni_cream.ranks import is_first

RUNS: Final = Path("runs")
REPORT: Final = "report.html"
TEMPORARY: Final = re.compile(r"\..+\.[0-9a-f]{32}")
PACKAGES: Final = ("nni", "torch", "torchvision", "timm", "pytorch-lightning", "torchmetrics", "numpy", "pydantic")


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a temporary file, flush it to disk, and only then give it its name.

    Whoever reads ``path`` sees the old content or the new, never a part.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile's: its files, and so what they become, nobody but their owner may read.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        _flush_folder(path.parent)
    except OSError as error:
        # A write that fails, unlike an opening, does not say of which file, and the temporary one nobody knows.
        named = str(error.filename2 or error.filename or temporary)
        if error.errno is not None and named.endswith(temporary.name):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        # Where the folder cannot be written any more, that is what is to be heard of.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    """Make a new name in ``folder`` outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically; bytes of a path that are no text become escapes."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")

    write_atomically(path, write)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically; it comes back as it was, paths that are no text too."""
    write_text(path, to_json(value, indent=2) + "\n")


def to_json(value: Any, indent: int | None = None) -> str:
    """Write JSON that UTF-8 can encode: as it reads best, or where a path in it is no text, in ASCII with escapes."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent)
    return text


def read_json(path: Path, what: str) -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        what: what it should be, for the error.

    Raises:
        UserError: if it is not there or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"There is no {what} {path}.") from None
    # A number of thousands of digits is a plain ValueError, thousands of brackets a RecursionError.
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a {what}: {error}.") from None


class RunDirectory:
    """The folder of one run.

    Under NNI it is ``$NNI_OUTPUT_DIR``, else ``runs/<name>`` below the current directory. It holds ``recipe.yml`` (as
    run), ``environment.json`` (versions, machine, seed, and of a training, of what it is), ``metrics.csv``,
    ``tensorboard/``, ``checkpoints/``, and what the run produces. One process at a time runs in it, from :meth:`begin`
    to its end.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = ProcessLock(path / ".lock")
        self._training: str | None = None

    @classmethod
    def for_run(cls, name: str, output: Path | None = None) -> RunDirectory:
        """Choose the folder: ``output`` if given, else as described above."""
        under_nni = os.environ.get("NNI_OUTPUT_DIR")
        return cls(output or (Path(under_nni) if under_nni else RUNS / name))

    @property
    def has_begun(self) -> bool:
        """Whether a run has been recorded here."""
        return (self.path / "recipe.yml").exists()

    @property
    def checkpoint(self) -> Path:
        """The newest checkpoint, whether or not it exists yet."""
        return self.path / "checkpoints" / "last.ckpt"

    @property
    def previous_checkpoint(self) -> Path:
        """The checkpoint before the newest, whether or not it exists."""
        return self.path / "checkpoints" / "previous.ckpt"

    @property
    def child(self) -> Path:
        """The result of a search, whether or not it exists yet."""
        return self.path / "child.json"

    @property
    def history(self) -> Path:
        """What a search has measured after every epoch, whether or not it exists yet."""
        return self.path / "history.json"

    @property
    def latency(self) -> Path:
        """The latency table by which a search keeps its budget, whether or not there is one."""
        return self.path / "latency.json"

    @property
    def report(self) -> Path:
        """The report for a person, whether or not it exists yet."""
        return self.path / REPORT

    def owner(self) -> int | None:
        """Return the id of another process that runs here, 0 if it is not known, or None if there is none."""
        return self._lock.owner()

    def refuse_owned(self) -> None:
        """Make sure that no other process runs here; write nothing.

        Raises:
            UserError: if one does.
        """
        if (owner := self.owner()) is not None:
            raise UserError(
                f"{self.path} is in use by process {owner}; wait for its end, or choose another folder with --name."
            )

    def refuse_another(self, recipe: str) -> None:
        """Make sure that the folder is new or holds a run of this very recipe; write nothing.

        Raises:
            UserError: if it holds a run of another recipe, or cannot be read.
        """
        file = self.path / "recipe.yml"
        try:
            nearest = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
            if not nearest.is_dir():
                raise UserError(f"{nearest} is not a folder, so that {self.path} cannot be a run directory.")
            if file.exists() and file.read_bytes() != recipe.encode():
                raise UserError(
                    f"{self.path} holds a run of another recipe (see {file}); choose another folder with --name, or "
                    "remove it."
                )
        except OSError as error:
            raise UserError(f"The run directory {self.path} cannot be read: {error.strerror}.") from None

    def keep_to(self, training: str) -> None:
        """Make sure that the folder is new or holds this very training, which the recipe leaves open; write nothing.

        :meth:`begin` notes it. A run that began before such a note was left is taken to be of it.

        Args:
            training: what is trained, as a person is told.

        Raises:
            UserError: if it holds another training, or cannot be read.
        """
        before = self._noted().get("training")
        if before is not None and before != training:
            raise another_training(self, before, training)
        self._training = training

    def begin(self, recipe: str, seed: int, images: Mapping[str, Any] | None = None) -> None:
        """Make this process the owner of the folder and record what is about to run, unless that has been recorded.

        Of the several processes of a run the first does so for all.

        Args:
            recipe: as YAML.
            seed: of the run.
            images: the fields of its :class:`nni_cream.data_checks.Fingerprint`; None to leave them open.

        Raises:
            UserError: as :meth:`refuse_another`, :meth:`keep_to` and :meth:`refuse_owned`, if the folder cannot be
                written, and if the run began with other images.
        """
        if not is_first():
            return
        self.refuse_another(recipe)
        self._refuse_other_images(images)
        if self._training is not None:
            self.keep_to(self._training)
        file = self.path / "recipe.yml"
        try:
            if not self._lock.acquire():
                self.refuse_owned()
            self._remove_parts()
            if not file.exists():
                noted = {"training": self._training, "images": None if images is None else dict(images)}
                noted = {key: value for key, value in noted.items() if value is not None}
                write_json(self.path / "environment.json", {"seed": seed, **noted, **describe_environment()})
                # Last, because a folder with a recipe counts as begun.
                write_text(file, recipe)
        except OSError as error:
            raise UserError(f"The run directory {self.path} cannot be written: {error.strerror}.") from None

    def _noted(self) -> dict[str, Any]:
        """Return what has been noted of the run that has begun here; nothing where none has."""
        file = self.path / "environment.json"
        if not self.has_begun or not file.exists():
            return {}
        try:
            noted = read_json(file, "description of a run's environment")
        except UserError as error:
            raise UserError(f"{error} Remove it, and the same command goes on.") from None
        return noted if isinstance(noted, dict) else {}

    def _refuse_other_images(self, images: Mapping[str, Any] | None) -> None:
        if images is None:
            return
        before = self._noted().get("images")
        if isinstance(before, dict) and before != images:
            raise UserError(
                f"{self.path} holds a run that began with other images, or divided otherwise ({before.get('number')} "
                f"then, {images['number']} now): it would be tested on images that it has learnt from. Give them as "
                "they were, or begin a new run with --name."
            )

    def _remove_parts(self) -> None:
        """Remove what a process that was killed in the middle of writing a checkpoint has left of it."""
        for part in self.checkpoint.parent.glob(".*"):
            if TEMPORARY.fullmatch(part.name):
                part.unlink(missing_ok=True)


def another_training(directory: RunDirectory, before: str, now: str) -> UserError:
    """Return what says that ``directory`` holds a training of something else."""
    return UserError(f"{directory.path} holds a training of {before}, not of {now}; choose another folder with --name.")


def describe_environment() -> dict[str, Any]:
    """Return the versions of what computes, and the machine."""
    versions: dict[str, str] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "versions": versions,
        "machine": {
            "system": platform.platform(),
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
        },
    }


def processor_name() -> str:
    """Return what the processor calls itself, or if it does not, its architecture."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    named = (line.partition(": ")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def newest_search(root: Path = RUNS) -> Path | None:
    """Find the ``child.json`` that was written last below ``root``."""
    return _newest("child.json", root)


def newest_training(root: Path = RUNS) -> Path | None:
    """Find the ``model.safetensors`` that was written last below ``root``."""
    return _newest("model.safetensors", root)


def _newest(name: str, root: Path) -> Path | None:
    found = sorted(root.glob(f"**/{name}"), key=lambda path: (path.stat().st_mtime, str(path)))
    return found[-1] if found else None


def describe(metrics: Mapping[str, Any]) -> str:
    """Write metrics on one line for a person: ``epoch 3, val_accuracy 0.9412, …``."""
    parts = []
    for name, value in metrics.items():
        parts.append(f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}")
    return ", ".join(parts)
