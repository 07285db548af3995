"""The checkpoints of a run: how they are written, and from which one an interrupted run goes on."""

from __future__ import annotations

import os
import pickle
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.callbacks import Checkpoint

from nni_cream.errors import UserError
from nni_cream.runs import RunDirectory, write_atomically


class LastTwo(Checkpoint):
    """Writes a checkpoint after every epoch, and keeps it and the one before it.

    Each is written under a temporary name, flushed to disk, and only then given its name, so that neither is ever
    incomplete because of an interruption.

    Args:
        directory: of the run.
    """

    def __init__(self, directory: RunDirectory) -> None:
        self.newest = directory.checkpoint
        self.before = directory.previous_checkpoint

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        """Write it. Lightning calls checkpoints last, when the epoch has been reported."""
        if not trainer.is_global_zero:
            # Writes nothing, but takes part in what the first process waits for.
            trainer.save_checkpoint(self.newest)
            return

        def write(temporary: Path) -> None:
            trainer.save_checkpoint(temporary)
            if self.newest.exists():
                # Under both names for a moment, so that there is a newest one at any time.
                self.before.unlink(missing_ok=True)
                os.link(self.newest, self.before)

        write_atomically(self.newest, write)


def find_checkpoint(directory: RunDirectory) -> Path | None:
    """Return the newest checkpoint that can be read, or None where a run has not come so far as to write one.

    A damaged one is reported on stderr and put aside as ``last.damaged``. Reading executes no code.

    Raises:
        UserError: if there are checkpoints and none can be read.
    """
    existing = [file for file in (directory.checkpoint, directory.previous_checkpoint) if file.exists()]
    reasons = []
    for file in existing:
        try:
            torch.load(file, map_location="cpu", weights_only=True)
        # What torch raises depends on which byte is wrong.
        except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
            reasons.append(f"{file} cannot be read ({str(error).partition(chr(10))[0]})")
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
