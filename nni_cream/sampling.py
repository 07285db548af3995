"""Drawing paths from a prior, inside a hard interval of multiply-accumulates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nni_cream.errors import UserError

Path = tuple[int, ...]
"""A path as the index of the chosen candidate at every choice, in the order of the space's labels."""

Prior = Sequence[Sequence[float]]
"""For every choice, the probability of each candidate."""


class PathSampler:
    """Draws paths from a product prior, conditioned on their cost lying in ``[low, high]``.

    The draw is exact: among the paths inside the interval, each comes with the prior's proportions. Sums of costs,
    rounded down to a grid, are followed backwards from the last choice (dynamic programming), which says for every
    partial path how probable it is to end inside; only the grid's rounding at the two ends is left to rejection.

    Args:
        costs: for every choice, the MACs of each candidate.
        fixed: MACs that every path has besides.
        low: least MACs of a path.
        high: most MACs of a path.

    Raises:
        UserError: if no path lies in the interval.
    """

    # A grid this fine rejects few draws even when the interval is a thousandth of the whole range.
    _cells = 1 << 15
    # With an interval so narrow that no draw in this many hits it, the interval is empty for every practical purpose.
    _patience = 100_000

    def __init__(self, costs: Sequence[Sequence[int]], fixed: int, low: float, high: float) -> None:
        self._costs = [np.asarray(options, dtype=np.int64) for options in costs]
        self._fixed = fixed
        self.low, self.high = low, high
        cheapest = fixed + int(sum(options.min() for options in self._costs))
        dearest = fixed + int(sum(options.max() for options in self._costs))
        self._empty = (
            f"No path costs {low / 1e6:.4g} M to {high / 1e6:.4g} M multiply-accumulates: "
            f"the paths of this space cost {cheapest / 1e6:.4g} M to {dearest / 1e6:.4g} M."
        )
        if low > high or high < cheapest or low > dearest:
            raise UserError(self._empty)
        self._unit = max(1, -(-(dearest - cheapest) // self._cells))
        self._steps = [(options - options.min()) // self._unit for options in self._costs]
        # Rounding down loses less than one unit per choice.
        self._first = max(0, int((low - cheapest) // self._unit) - len(costs))
        self._last = min(self._cells, int((min(high, dearest) - cheapest) // self._unit))
        self._prior: Prior | None = None
        self._reach: list[NDArray[np.float64]] = []
        even = [[1.0 / len(options)] * len(options) for options in self._costs]
        self.draw(even, np.random.default_rng(0))  # an interval without a path is found now, not during training

    def cost(self, path: Path) -> int:
        """Return the MACs of ``path``."""
        return self._fixed + int(sum(options[i] for options, i in zip(self._costs, path, strict=True)))

    def contains(self, path: Path) -> bool:
        """Tell whether ``path`` lies in the interval."""
        return self.low <= self.cost(path) <= self.high

    def draw(self, prior: Prior, generator: np.random.Generator) -> Path:
        """Draw one path.

        Raises:
            UserError: if the prior gives no path inside the interval a positive probability.
        """
        if prior is not self._prior:
            self._prior, self._reach = prior, self._probability_to_arrive(prior)
        if not self._reach[0][0] > 0:
            raise UserError(self._empty)
        for _ in range(self._patience):
            position, path = 0, []
            for probabilities, steps, reach in zip(prior, self._steps, self._reach[1:], strict=True):
                weights = np.asarray(probabilities) * reach[position + steps]
                path.append(int(generator.choice(len(weights), p=weights / weights.sum())))
                position += int(steps[path[-1]])
            if self.contains(tuple(path)):
                return tuple(path)
        raise UserError(self._empty)

    def _probability_to_arrive(self, prior: Prior) -> list[NDArray[np.float64]]:
        """For every choice and grid position before it, the probability that the rest ends inside the interval."""
        size = 1 + sum(int(steps.max()) for steps in self._steps)
        arrive = np.zeros(size)
        arrive[self._first : self._last + 1] = 1.0
        table = [arrive]
        for probabilities, steps in zip(reversed(prior), reversed(self._steps), strict=True):
            before = np.zeros(size)
            for probability, step in zip(probabilities, steps, strict=True):
                before[: size - step] += probability * table[0][step:]
            table.insert(0, before)
        return table
