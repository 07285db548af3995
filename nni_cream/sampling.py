"""Drawing paths from a prior, inside a hard interval of cost: multiply-accumulates, or predicted time."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from nni_cream.errors import UserError

Path = tuple[int, ...]
"""A path as the index of the chosen candidate at every choice, in the order of the space's labels."""

Prior = Sequence[Sequence[float]]
"""For every choice, the probability of each candidate."""


@dataclass(frozen=True)
class CostUnit:
    """How costs, which are whole numbers, are told to a person: ``cost / steps``, the sign, and of what."""

    steps: int
    sign: str
    what: str

    def told(self, cost: float) -> str:
        """Write ``cost`` with its sign, to its last digit: it may be copied as a bound."""
        return f"{cost / self.steps:.12g} {self.sign}"


MACS: Final = CostUnit(1_000_000, "M", "multiply-accumulates")


class PathSampler:
    """Draws paths from a product prior, conditioned on their cost lying in ``[low, high]``.

    The draw is exact: among the paths inside the interval, each comes with the prior's proportions. Sums of costs,
    rounded down to a grid, are followed backwards from the last choice (dynamic programming), which says for every
    partial path how probable it is to end inside; only the grid's rounding at the two ends, where it is coarser than
    the costs, is left to rejection.

    Args:
        costs: for every choice, the cost of each candidate.
        fixed: what every path costs besides.
        low: the least that a path may cost.
        high: the most.
        unit: what is counted.

    Raises:
        UserError: if no path lies in the interval; it says which costs are nearest.
    """

    # Enough for the exact costs of the default Cream space at 32 and 64 pixels; elsewhere few draws are rejected.
    _cells = 1 << 17
    # Met only by intervals a millionth of the whole range wide.
    _patience = 20_000

    def __init__(
        self, costs: Sequence[Sequence[int]], fixed: int, low: float, high: float, unit: CostUnit = MACS
    ) -> None:
        self._costs = [np.asarray(options, dtype=np.int64) for options in costs]
        self._fixed = fixed
        self.low, self.high = low, high
        self._cost_unit = unit
        self._interval = f"{unit.told(low)} to {unit.told(high)} {unit.what}"
        rises = [options - options.min() for options in self._costs]
        cheapest = fixed + int(sum(options.min() for options in self._costs))
        dearest = fixed + int(sum(options.max() for options in self._costs))
        exact = math.gcd(*(int(rise) for options in rises for rise in options)) or 1
        self._refuse_empty(rises, exact, cheapest, dearest)

        self._unit = max(exact, -(-(dearest - cheapest) // self._cells))
        self._steps = [options // self._unit for options in rises]
        # Rounding down loses less than one unit per choice, and nothing where the grid is as fine as the costs.
        margin = 0 if self._unit == exact else len(costs)
        self._first = max(0, math.ceil((low - cheapest) / self._unit) - margin)
        self._last = int((min(high, dearest) - cheapest) // self._unit)
        self._prior: Prior | None = None
        self._reach: list[NDArray[np.float64]] = []

    def _refuse_empty(self, rises: list[NDArray[np.int64]], unit: int, cheapest: int, dearest: int) -> None:
        """Make sure that there is a path inside the interval: bit i of an integer tells whether one costs i units."""
        reachable = 1
        for options in rises:
            reachable = functools.reduce(operator.or_, (reachable << int(rise) // unit for rise in set(options)))
        first = max(0, math.ceil((self.low - cheapest) / unit))
        beyond = max(first, math.floor((min(self.high, dearest) - cheapest) / unit) + 1)
        inside = (reachable >> first) & ((1 << (beyond - first)) - 1)
        if inside:
            return
        below, above = reachable & ((1 << first) - 1), reachable >> beyond
        nearest = [below.bit_length() - 1] if below else []
        nearest += [beyond + (above & -above).bit_length() - 1] if above else []
        text = " and ".join(self._cost_unit.told(cheapest + unit * position) for position in nearest)
        raise UserError(
            f"No path costs {self._interval}: the paths of this space cost {self._cost_unit.told(cheapest)} to "
            f"{self._cost_unit.told(dearest)}, and those nearest to the interval {text}."
        )

    def cost(self, path: Path) -> int:
        """Return what ``path`` costs."""
        return self._fixed + int(sum(options[i] for options, i in zip(self._costs, path, strict=True)))

    def contains(self, path: Path) -> bool:
        """Tell whether ``path`` lies in the interval."""
        return self.low <= self.cost(path) <= self.high

    def draw(self, prior: Prior, generator: np.random.Generator) -> Path:
        """Draw one path.

        Raises:
            UserError: if the prior gives no path inside the interval a positive probability, or hardly any.
        """
        if prior is not self._prior:
            self._prior, self._reach = prior, self._probability_to_arrive(prior)
        if self._reach[0][0] > 0:
            for _ in range(self._patience):
                position, path = 0, []
                for probabilities, steps, reach in zip(prior, self._steps, self._reach[1:], strict=True):
                    weights = np.asarray(probabilities) * reach[position + steps]
                    path.append(int(generator.choice(len(weights), p=weights / weights.sum())))
                    position += int(steps[path[-1]])
                if self.contains(tuple(path)):
                    return tuple(path)
        raise UserError(
            f"The prior gives hardly any path that costs {self._interval} a probability above 0: let it allow other "
            "candidates, or widen the interval."
        )

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
