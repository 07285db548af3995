"""Loaders of batches that an interrupted training goes on with where it was."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning_fabric.utilities.data import _set_sampler_epoch
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from nni_cream.randomness import seed_streams, streams_kept
from nni_cream.resident import ResidentImages
from nni_cream.shards import Shards, Shuffled


def _leave_signals_to_the_main_process(_worker: int) -> None:
    # Ctrl-C in a terminal reaches workers too, and the main process may need another batch before it ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _as_it_is(batch: Any) -> Any:
    return batch


class Batches(DataLoader[Any]):
    """Batches of images and labels, loaded without a random number of the process' own streams.

    Args:
        images: where they are from.
        batches: the positions in each batch.
        workers: processes that load them, which live as long as the loader; 0 for this process itself.
    """

    def __init__(
        self, images: Dataset[Any], batches: Sampler[list[int]] | Sequence[Sequence[int]], workers: int = 0
    ) -> None:
        super().__init__(
            images,
            batch_sampler=batches,  # type: ignore[arg-type]
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=_leave_signals_to_the_main_process,
            collate_fn=_as_it_is if isinstance(images, ResidentImages) else None,
        )

    def __iter__(self) -> Any:
        # An iterator draws a seed for its workers.
        with torch.random.fork_rng(()):
            return super().__iter__()


class TrainingBatches(Batches):
    """Full batches of a data set in an order of :class:`Shuffled`; what is left over of an epoch is left out.

    What it has given out so far is its ``state_dict``, which Lightning keeps in checkpoints and restores.

    Args:
        images: where they are from.
        batch_size: of all processes together.
        workers: as of :class:`Batches`.
        seed: of the run.
        stream: as of :class:`Shuffled`.
        rank: which of several processes this is.
        processes: how many share every batch.
    """

    def __init__(
        self,
        images: Any,
        batch_size: int,
        workers: int = 0,
        *,
        seed: int = 0,
        stream: int = 0,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self.order = Shuffled(len(images), seed, stream)
        self.images_a_batch = batch_size
        self._given = 0
        whole = BatchSampler(self.order, batch_size, drop_last=True)
        super().__init__(images, whole if processes == 1 else Shards(whole, rank, processes), workers)

    def __iter__(self) -> Any:
        # Runs when the first batch is asked for; by then Lightning has told the epoch.
        self._given = self.order.first // self.images_a_batch
        for batch in super().__iter__():
            self._given += 1
            if self._given == len(self):
                self.order.lap += 1
                self._given = 0
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return how far it has come."""
        return {"epoch": self.order.epoch, "lap": self.order.lap, "batches": self._given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there: the batches before are not loaded."""
        self.order.resume(state["epoch"], state["lap"], state["batches"] * self.images_a_batch)


def first_batches(loader: Any, number: int, epoch: int) -> Iterator[Any]:
    """Give the first batches of ``loader`` in ``epoch``, the same ones whatever has been loaded before."""
    _set_sampler_epoch(loader, epoch)
    # Loaders that are not ours draw their order, and what varies images, from the random streams of the process.
    with streams_kept():
        seed_streams(epoch)
        yield from itertools.islice(loader, number)


def validation_loader(evaluator: Any) -> Any:
    """Return what a Lightning evaluator validates on, before its trainer has asked for it; None for nothing."""
    data = evaluator.datamodule
    if not data:
        return evaluator.val_dataloaders
    # As Lightning does, which does it once more when training begins.
    data.prepare_data()
    data.setup("fit")
    return data.val_dataloader()
