"""Which images the batches of a training hold: the order of every epoch, and of several processes, each one's part.

Both follow from the seed and the epoch, so that a training that was interrupted goes on with the batch that it would
have had, and several processes see the batches of one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

from nni_cream.errors import UserError


class Draw(int):
    """A position in a data set, and the seed, in [0, 2**63), of the random numbers that its image is varied with."""

    seed: int

    def __new__(cls, position: int, seed: int) -> Draw:  # noqa: D102
        draw = super().__new__(cls, position)
        draw.seed = seed
        return draw

    def __reduce__(self) -> tuple[Any, ...]:
        return Draw, (int(self), self.seed)


class Shuffled(Sampler[int]):
    """The positions of a data set, as :class:`Draw`, in an order that follows from the arguments, epoch and lap alone.

    Args:
        size: of the data set.
        seed: of the run.
        stream: tells apart what is drawn side by side with one seed.

    Attributes:
        epoch: set by Lightning.
        lap: how many times the data set has been gone through in this epoch.
        first: how many positions the next iteration leaves out.
    """

    def __init__(self, size: int, seed: int = 0, stream: int = 0) -> None:
        self.size = size
        self.seed = seed
        self.stream = stream
        self.epoch = self.lap = self.first = 0
        self._resumed = False

    def set_epoch(self, epoch: int) -> None:
        """Begin ``epoch``, in the middle if that is where :meth:`resume` is."""
        if not (self._resumed and epoch == self.epoch):
            self.epoch, self.lap, self.first = epoch, 0, 0
        self._resumed = False

    def resume(self, epoch: int, lap: int, first: int) -> None:
        """Go on in the middle of an epoch."""
        self.epoch, self.lap, self.first = epoch, lap, first
        self._resumed = True

    def __iter__(self) -> Iterator[Draw]:
        entropy = np.random.SeedSequence([self.seed, self.stream, self.epoch, self.lap])
        first, self.first = self.first, 0
        generator = torch.Generator().manual_seed(int(entropy.generate_state(1)[0]))
        order = torch.randperm(self.size, generator=generator)[first:]
        seeds = torch.randint(2**63 - 1, (self.size,), generator=generator)[first:]
        yield from map(Draw, order.tolist(), seeds.tolist())

    def __len__(self) -> int:
        return self.size


class Shards(Sampler[list[int]]):
    """One process' part of every batch: consecutive images, equally many in all processes, or one more.

    Args:
        batches: those of all processes together, the same in each.
        rank: which process this is, from 0.
        processes: how many there are.
    """

    def __init__(self, batches: Iterable[Sequence[int]], rank: int, processes: int) -> None:
        self.batches = batches
        self.rank = rank
        self.processes = processes

    @property
    def sampler(self) -> Any:
        """What puts the images of ``batches`` in order, if anything does; Lightning tells it the epoch."""
        return getattr(self.batches, "sampler", None)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            if len(batch) < self.processes:
                raise UserError(f"A batch has {len(batch)} images, too few for {self.processes} processes.")
            first, last = (len(batch) * (self.rank + i) // self.processes for i in (0, 1))
            yield list(batch[first:last])

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]
