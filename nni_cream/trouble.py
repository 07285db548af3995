"""What a machine runs out of, in a sentence: memory, shared memory, disk, processes."""

from __future__ import annotations

import errno
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from nni_cream.errors import TrainingError

# What the machine does not let us do, whatever the command says. Other errors of this kind are faults of ours.
_OF_THE_MACHINE: Final = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR}
    | {errno.EMFILE, errno.ENFILE, errno.ENAMETOOLONG, errno.ESTALE, errno.ENODEV, errno.EISDIR, errno.EAGAIN}
)
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@contextmanager
def named_batch(batch_size: int, devices: int = 1) -> Iterator[None]:
    """Let the error of a step for which there is too little memory say which ``data.batch_size`` to try.

    Args:
        batch_size: the one that there is.
        devices: how many share a batch.

    Raises:
        TrainingError: if there is too little memory.
    """
    try:
        yield
    except Exception as raised:
        error = next((cause for cause in _causes(raised) if _lacks_memory(cause)), None)
        if error is None:
            raise
        half = batch_size // 2 // devices * devices
        # It is another recipe, and so another run.
        advice = f"try --set data.batch_size={half} --name …" if half >= 2 else "a smaller network is needed"
        raise TrainingError(
            f"There is not enough memory for a step with data.batch_size {batch_size} ({_first_line(error)}); {advice}."
        ) from raised


def sentence_of(error: BaseException, goes_on: bool = True) -> str | None:
    """Return what has happened to the machine, and what to do; None if ``error`` has no cause of that kind.

    Args:
        error: what a command has ended with.
        goes_on: whether the same command goes on where it was.
    """
    return next((sentence for cause in _causes(error) if (sentence := _sentence(cause, goes_on)) is not None), None)


def is_broken_pipe(error: BaseException) -> bool:
    """Tell whether ``error`` comes from a pipe that nobody reads."""
    return any(isinstance(cause, BrokenPipeError) for cause in _causes(error))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield ``error``, and what it was raised from or while handling: Lightning's tidying up can fail as well."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _sentence(error: BaseException, goes_on: bool) -> str | None:
    text = _first_line(error)
    again = "the same command goes on from the last checkpoint" if goes_on else "run the command again"
    new, name = ("begin a new run ", " --name …") if goes_on else ("", "")
    if _lacks_memory(error):
        return f"There is not enough memory: {text}."
    if isinstance(error, RuntimeError | OSError) and _lacks_shared_memory(error):
        return (
            f"The processes of the data loader have too little shared memory, /dev/shm ({text}); make it larger "
            f"(docker run --shm-size=8g), and {again}, or {new}with --set data.workers=0{name}."
        )
    if _lacks_a_worker(error):
        return (
            f"A process of the data loader has ended ({text}), perhaps for want of memory; {again}, or {new}with "
            f"fewer of them: --set data.workers=…{name}."
        )
    if isinstance(error, OSError) and error.errno in _OF_THE_MACHINE:
        # Of a copy, the second name is where it goes.
        place = error.filename2 or error.filename or "A file of the run directory"
        if isinstance(place, bytes):
            place = place.decode(errors="replace")
        remedy = f"make room, and {again}" if error.errno in _FULL else f"once that is repaired, {again}"
        verb = "written" if error.errno in _FULL else "used"
        return f"{place} cannot be {verb}: {error.strerror}; {remedy}."
    return None


def _lacks_memory(error: BaseException) -> bool:
    # torch.OutOfMemoryError of a GPU is a RuntimeError too; of the CPU there is no class.
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and (
            type(error).__name__ == "OutOfMemoryError"
            or re.search(r"DefaultCPUAllocator|not enough memory|[Cc]annot allocate memory|bad_alloc", str(error))
            is not None
        )
    )


def _lacks_shared_memory(error: BaseException) -> bool:
    if re.search(r"shared memory|file </torch_|shm_open|Bus error|/dev/shm|torch_shm_manager", str(error)):
        return True
    # Semaphores lie there as well, and the error of one says nothing.
    return isinstance(error, OSError) and _comes_from(error, "multiprocessing.synchronize")


def _lacks_a_worker(error: BaseException) -> bool:
    if isinstance(error, RuntimeError):
        return re.match(r"DataLoader worker \(pid\(?s?", _first_line(error)) is not None
    # One that has ended while it handed over a batch.
    return isinstance(error, OSError | EOFError) and _comes_from(error, "multiprocessing.resource_sharer")


def _comes_from(error: BaseException, module: str) -> bool:
    return any(frame.f_globals.get("__name__") == module for frame, _ in traceback.walk_tb(error.__traceback__))


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__
