"""What each of several processes loads: its part of every batch, so that together they see the batches of one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch.utils.data import Sampler

from nni_cream.distributed import agreed
from nni_cream.errors import UserError


class Shuffled(Sampler[int]):
    """The positions of a data set in an order that is drawn anew every time, the same in every process.

    With the same seed it is the order of torch's own ``RandomSampler``.

    Args:
        size: of the data set.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[int]:
        seed = int(torch.empty((), dtype=torch.int64).random_().item())
        # Transforms draw from the same generator, for other images in every process.
        generator = torch.Generator().manual_seed(agreed(seed))
        yield from torch.randperm(self.size, generator=generator).tolist()

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

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            if len(batch) < self.processes:
                raise UserError(f"A batch has {len(batch)} images, too few for {self.processes} processes.")
            first, last = (len(batch) * (self.rank + i) // self.processes for i in (0, 1))
            yield list(batch[first:last])

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]
