"""The checkpoints of a run: how they are written, and from which one an interrupted run goes on."""

from __future__ import annotations

import os
import sys
import time
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import torch
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import Tensor

from nni_cream import interruption, randomness
from nni_cream.distributed import total
from nni_cream.errors import UserError
from nni_cream.runs import RunDirectory, write_atomically
from nni_cream.soundness import refuse_broken

# What a run goes on with.
PARTS: Final = ("epoch", "global_step", "loops", "lr_schedulers", "optimizer_states", "random_numbers", "state_dict")


class LastTwo(Checkpoint):
    """Writes a checkpoint after every epoch and every so many minutes, and keeps it and the one before it.

    Each is written under a temporary name, flushed to disk, and only then given its name, so that neither is ever
    incomplete because of an interruption. A run that goes on from it is the run that was not interrupted, to the last
    bit, if its loaders are :class:`nni_cream.loading.TrainingBatches`: beside what Lightning keeps, it has the random
    numbers of the process.

    Ctrl-C or SIGTERM while it trains: the step is finished, a checkpoint written, and the training ended, by
    ``SIGTERMException``, which is Lightning's way.

    Args:
        directory: of the run.
        minutes: between two checkpoints, at least.
    """

    def __init__(self, directory: RunDirectory, minutes: float = 10.0) -> None:
        self.newest = directory.checkpoint
        self.before = directory.previous_checkpoint
        self.seconds = 60 * minutes
        self._written = time.monotonic()
        self._random: dict[str, Any] | None = None
        self._end_deferral: Callable[[], None] = _nothing
        self._unflushed = False

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        """Make sure that the checkpoint to go on from is of this network.

        Raises:
            UserError: if it is not.
        """
        # Lightning's own complaint would be a list of all parameters. It does not tell yet which file it goes on from.
        file = next((file for file in (self.newest, self.before) if file.exists()), None)
        if stage == "fit" and file is not None:
            _refuse_another_network(file, module.state_dict())

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Go on with the random numbers of the checkpoint, now that nothing else draws any before the first step."""
        if self._random is not None:
            randomness.set_state(self._random)
            self._random = None
        # Lightning has not where the module had asked for the number of steps, which takes loaders without a state.
        trainer.fit_loop._load_combined_loader_states()
        self._written = time.monotonic()
        # In the place of Lightning's own handler, which ends a training without a checkpoint.
        self._end_deferral = interruption.defer()

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        """Let TensorBoard write down what Lightning has logged after it wrote the checkpoint."""
        self._flush(trainer)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Write a checkpoint if it is time, or if the training is to end."""
        if trainer.is_last_batch:
            # Lightning would go on with the next epoch, without the validation of this one; see on_validation_start.
            return
        ending, due = self._asked()
        if ending or due:
            self._write(trainer)
        if ending:
            # Lightning ends after it has logged this step.
            trainer._signal_connector.received_sigterm = True

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        """Write a checkpoint if it is time, or if the training is to end."""
        self._in_validation(trainer)

    def on_validation_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Write a checkpoint if the training is to end."""
        self._in_validation(trainer)

    def _in_validation(self, trainer: Any) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        ending, due = self._asked()
        if ending or due:
            self._write(trainer)
        if ending:
            raise SIGTERMException

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        """Write a checkpoint. Lightning calls checkpoints last, when the epoch has been reported."""
        self._write(trainer)
        if self._asked()[0]:
            trainer._signal_connector.received_sigterm = True

    def on_train_end(self, trainer: Any, module: Any) -> None:
        """From here on, there is nothing to be written before an end."""
        self._flush(trainer)
        self._end_deferral()

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        """As :meth:`on_train_end`."""
        self._end_deferral()

    def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        """Keep what Lightning does not know of."""
        checkpoint["random_numbers"] = randomness.get_state()
        if trainer.validating:
            # As if the first batch were being measured: Lightning then begins the validation, and leaves out no batch.
            counts = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
            progress = {"total": counts, "current": dict(counts), "is_last_batch": False}
            checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"] = progress

    def on_load_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        """Restore it, when the training begins."""
        self._random = checkpoint["random_numbers"]

    def _asked(self) -> tuple[bool, bool]:
        """Tell whether the training is to end, and whether it is time for a checkpoint, in all processes alike."""
        ending = interruption.received() is not None
        due = time.monotonic() - self._written >= self.seconds
        ending_anywhere, due_anywhere = total(int(ending), int(due))
        if ending_anywhere:
            interruption.end_with_others()
        return ending_anywhere > 0, due_anywhere > 0

    def _flush(self, trainer: Any) -> None:
        if self._unflushed:
            self._unflushed = False
            for logger in trainer.loggers:
                logger.save()

    def _write(self, trainer: Any) -> None:
        # What has been logged until now will not be logged again; Lightning logs the rest of this step in a moment.
        self._unflushed = True
        self._flush(trainer)
        self._unflushed = True
        refuse_broken(trainer.lightning_module, trainer.optimizers)
        if trainer.is_global_zero:
            write_atomically(self.newest, lambda temporary: self._save(trainer, temporary))
        else:
            # Writes nothing, but takes part in what the first process waits for.
            trainer.save_checkpoint(self.newest, weights_only=False)
        self._written = time.monotonic()

    def _save(self, trainer: Any, temporary: Path) -> None:
        trainer.save_checkpoint(temporary, weights_only=False)
        if self.newest.exists():
            # Under both names for a moment, so that there is a newest one at any time.
            self.before.unlink(missing_ok=True)
            os.link(self.newest, self.before)


def _nothing() -> None:
    pass


def steps_before(checkpoint: Path) -> int:
    """Return how many steps had been logged when ``checkpoint``, which :func:`find_checkpoint` found, was written."""
    return _steps(torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True))


def _steps(content: Mapping[str, Any]) -> int:
    return int(content["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"])


def find_checkpoint(directory: RunDirectory) -> Path | None:
    """Return the newest checkpoint of a run that is whole, or None where a run has not come so far as to write one.

    A damaged one, or a file that is none, is reported on stderr and put aside as ``last.damaged``. Reading executes no
    code.

    Raises:
        UserError: if there are checkpoints and none is whole.
    """
    existing = [file for file in (directory.checkpoint, directory.previous_checkpoint) if file.exists()]
    reasons = []
    for file in existing:
        if (fault := _fault(file)) is not None:
            reasons.append(f"{file} cannot be read ({fault})")
            continue
        for reason in reasons:
            # Else it would be the one before the next, in the place of this good one.
            # Of several processes, the first that comes here does it.
            with suppress(FileNotFoundError):
                directory.checkpoint.replace(directory.checkpoint.with_suffix(".damaged"))
            print(f"{reason}; going on from {file}, which is older.", file=sys.stderr)
        return file
    if reasons:
        raise UserError(
            f"{' and '.join(reasons)}: remove {directory.checkpoint.parent} to begin the run anew, or choose another "
            "folder with --name."
        )
    return None


def _fault(file: Path) -> str | None:
    """Say what is wrong with a checkpoint, if anything is."""
    try:
        # torch reads over wrong bytes in a tensor.
        with zipfile.ZipFile(file) as archive:
            if (damaged := archive.testzip()) is not None:
                return f"the checksum of {damaged} in it is wrong"
        content = torch.load(file, map_location="cpu", weights_only=True)
    # What is raised depends on which byte is wrong, and may be anything.
    except Exception as error:
        return str(error).partition("\n")[0] or type(error).__name__
    if not isinstance(content, dict):
        return f"it holds a {type(content).__name__}, not a checkpoint of a run"
    missing = [part for part in PARTS if part not in content]
    if missing:
        return f"a checkpoint of a run has {missing[0]} as well"
    try:
        _steps(content)
    except (KeyError, TypeError, ValueError):
        return "it does not say after how many steps it was written"
    return None


def _refuse_another_network(file: Path, expected: Mapping[str, Any]) -> None:
    stored = torch.load(file, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    here, there = (
        {name: list(value.shape) for name, value in state.items() if isinstance(value, Tensor)}
        for state in (expected, stored)
    )
    for name in (*here, *there):
        if here.get(name) != there.get(name):
            found, wanted = (f"as {shapes[name]}" if name in shapes else "not at all" for shapes in (there, here))
            raise UserError(
                f"{file} is a checkpoint of another network: it has {name} {found}, this run {wanted}. Put back the "
                f"run's own, or remove {file.parent} to begin the run anew."
            )
