"""Trainings that have nothing to do with each other, in one process after another or in several at a time.

Each is a run directory with a lock, so that nothing has to be agreed on: a process takes what nobody else is at, be
that another process of the same command, another command, or a trial of NNI's.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from nni_cream import cli, interruption
from nni_cream.child import Candidate
from nni_cream.errors import TrainingError, UserError
from nni_cream.recipe import RetrainRecipe
from nni_cream.retrain import retrain
from nni_cream.runs import RunDirectory


@dataclass(frozen=True)
class Training:
    """One training.

    Attributes:
        name: what a person is told of it.
        recipe: how.
        candidate: of what.
        folder: its run directory.
    """

    name: str
    recipe: RetrainRecipe
    candidate: Candidate
    folder: Path

    @property
    def ended(self) -> bool:
        """Whether it has a result."""
        return (self.folder / "result.json").exists()


def train_all(trainings: Sequence[Training], workers: int = 1) -> None:
    """Train what has not ended, each from its last checkpoint if it has one.

    Args:
        trainings: with folders that are new or of the same recipes.
        workers: how many at a time; with more than one, the threads of torch are divided among as many processes.

    Raises:
        UserError: as :func:`nni_cream.retrain.retrain`.
        TrainingError: as well, and if trainings are left that other processes are at.
    """
    missing = [training for training in trainings if not training.ended]
    if not missing:
        return
    workers = min(workers, len(missing))
    ended = len(trainings) - len(missing)
    print(f"{len(trainings)} trainings, {ended} of which have ended; {workers} at a time", flush=True)
    if workers == 1:
        _train_in_turn(missing, quiet=False)
    else:
        _train_in_processes(missing, workers)
    left = [training for training in missing if not training.ended]
    if left:
        raise TrainingError(
            f"Other processes are at {len(left)} of the trainings, such as that in {left[0].folder}; when they have "
            "ended, the same command puts the results together."
        )


def share_cores(workers: int) -> None:
    """Let torch compute with its part of the threads, where ``workers`` processes do so at a time."""
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))


def _train_in_turn(trainings: Sequence[Training], *, quiet: bool) -> None:
    parent = multiprocessing.parent_process()
    for training in trainings:
        if parent is not None and not parent.is_alive():
            return
        directory = RunDirectory(training.folder)
        if training.ended or directory.owner() is not None:
            continue
        if not quiet:
            print(f"{training.name}:", flush=True)
        try:
            with _silence() if quiet else contextlib.nullcontext():
                accuracy = retrain(training.recipe, training.candidate, directory)
        except UserError:
            if directory.owner() is None:
                raise
            # Another process began it a moment before.
            continue
        if quiet:
            # With its end in one piece: another process may print at the same time, unbuffered (PYTHONUNBUFFERED).
            print(f"{training.name}: test accuracy {accuracy:.4f}\n", end="", flush=True)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def _train_in_processes(trainings: Sequence[Training], workers: int) -> None:
    # Not forked: torch's threads do not survive that.
    context = multiprocessing.get_context("spawn")
    # Not queues, whose semaphores would be left over where this process is ended by a signal.
    pipes = [context.Pipe(duplex=False) for _ in range(workers)]
    processes = []
    for worker, (_, sender) in enumerate(pipes):
        own = trainings[worker::workers]
        # Then what the others have not come to yet, from their end.
        others = [training for training in reversed(trainings) if training not in own]
        processes.append(context.Process(target=_work, args=([*own, *others], workers, sender)))
    try:
        # While they import they would answer Ctrl-C with a traceback; what is ignored now they ignore until then.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            for process in processes:
                process.start()
        finally:
            signal.signal(signal.SIGINT, before)
        for process in processes:
            process.join()
    finally:
        # When this process is interrupted: they write a checkpoint, and end.
        alive = [process for process in processes if process.is_alive()]
        for process in alive:
            process.terminate()
        for process in alive:
            process.join()
    for receiver, _ in pipes:
        if receiver.poll():
            raise receiver.recv()
    if any(process.exitcode for process in processes):
        raise TrainingError(
            "A process ended before its trainings, for the reason above if it gave one; the same command goes on where "
            "they were."
        )


def _work(trainings: Sequence[Training], workers: int, failures: Connection) -> None:
    def train() -> None:
        try:
            _train_in_turn(trainings, quiet=True)
        except (UserError, TrainingError) as error:
            failures.send(error)
            sys.exit(1)
        finally:
            if interruption.received() is not None:
                # The process that waits for this one says so.
                sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115

    share_cores(workers)
    cli.run(train)
