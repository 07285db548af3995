"""Cream's prioritized board: the paths that have done best so far and teach the others.

Source: Peng et al., "Cream of the Crop", NeurIPS 2020, section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from nni_cream.sampling import Path


@dataclass(frozen=True)
class BoardEntry:
    """A path on the board.

    Attributes:
        path: the chosen candidate at every choice.
        score: accuracy in percent.
        macs: multiply-accumulates for one image.
        images: [n, 3, R, R], kept for the matching.
        features: [n, classes], what the path itself answered for them (softmax).
        latency: predicted time in milliseconds for a batch, where the budget is one of time.
    """

    path: Path
    score: float
    macs: int
    images: Tensor
    features: Tensor
    latency: float | None = None

    @property
    def cost(self) -> float:
        """What the budget counts."""
        return self.macs if self.latency is None else self.latency

    @property
    def rank(self) -> tuple[float, float, Path]:
        """What entries are ordered by; no two entries of a board have the same."""
        return (self.score, self.cost, self.path)


@dataclass(frozen=True)
class Place:
    """What is remembered of an entry: its path, its score in percent, and what it costs.

    The attributes are those of :class:`BoardEntry`.
    """

    path: Path
    score: float
    macs: int
    latency: float | None = None


class BoardHistory:
    """What was on the board after every epoch, so that a person can see how it came about.

    Attributes:
        epochs: from the number of an epoch, counted from 1, to the places after it, the best first.
    """

    def __init__(self) -> None:
        self.epochs: dict[int, tuple[Place, ...]] = {}

    def remember(self, epoch: int, board: PrioritizedBoard) -> None:
        """Remember the board after ``epoch``; one that is run again takes the place of its first try."""
        self.epochs = {number: places for number, places in self.epochs.items() if number < epoch}
        self.epochs[epoch] = tuple(Place(entry.path, entry.score, entry.macs, entry.latency) for entry in board.entries)

    def state_dict(self) -> dict[str, Any]:
        """Return plain values, for a checkpoint."""
        return {"epochs": {number: [vars(place) for place in places] for number, places in self.epochs.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self.epochs = {
            number: tuple(Place(**{**place, "path": tuple(place["path"])}) for place in places)
            for number, places in state["epochs"].items()
        }


class PrioritizedBoard:
    """At most ``capacity`` paths, the best first.

    Args:
        capacity: number of places.
        gap: points of accuracy by which a path that is not cheaper must beat the worst entry.
    """

    def __init__(self, capacity: int = 10, gap: float = 5.0) -> None:
        self.capacity = capacity
        self.gap = gap
        self.entries: tuple[BoardEntry, ...] = ()

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, path: object) -> bool:
        return any(entry.path == path for entry in self.entries)

    def admits(self, score: float, cost: float) -> bool:
        """Tell whether a path would be taken in; its cost is what the budget counts, as :attr:`BoardEntry.cost`.

        It is while there is room, when its score beats the worst entry's by more than the gap, or when it beats the
        worst entry and costs less.
        """
        if len(self.entries) < self.capacity:
            return True
        worst = self.entries[-1]
        return score > worst.score + self.gap or (score > worst.score and cost < worst.cost)

    def add(self, entry: BoardEntry) -> None:
        """Take ``entry`` in; it replaces the entry of the same path, else, if the board is full, the worst one."""
        others = [other for other in self.entries if other.path != entry.path]
        self._keep([*others[: self.capacity - 1], entry])

    def rescore(self, scores: dict[Path, float]) -> None:
        """Replace the scores of the paths that have been measured again."""
        self._keep([replace(entry, score=scores.get(entry.path, entry.score)) for entry in self.entries])

    def frequencies(self, sizes: Sequence[int]) -> list[list[float]]:
        """Return a prior from the board: how often each candidate is chosen on it.

        All choices with the same number of candidates are counted together, as published, except that choices with a
        single candidate do not count. An empty board gives an even prior.
        """
        counts = {size: [0] * size for size in sizes}
        for entry in self.entries:
            for size, index in zip(sizes, entry.path, strict=True):
                counts[size][index] += 1
        even = {size: [1.0 / size] * size for size in sizes}
        shares = {
            size: [count / sum(numbers) for count in numbers] if self.entries else even[size]
            for size, numbers in counts.items()
        }
        return [shares[size] for size in sizes]

    def state_dict(self) -> dict[str, Any]:
        """Return the entries, for a checkpoint."""
        return {"entries": [vars(entry) for entry in self.entries]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the entries."""
        self._keep([BoardEntry(**{**entry, "path": tuple(entry["path"])}) for entry in state["entries"]])

    def _keep(self, entries: list[BoardEntry]) -> None:
        self.entries = tuple(sorted(entries, key=lambda entry: entry.rank, reverse=True))
