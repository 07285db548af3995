"""Kendall's τ: how alike the orders are that two measurements give the same items, and how sure that is.

This is τ-b, which takes ties into account (Kendall, "The treatment of ties in ranking problems", Biometrika 1945). Over
all pairs of items,

    τ = (concordant - discordant) / √(pairs not tied in x · pairs not tied in y),

1 for the same order, -1 for the reverse, 0 for no relation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

RESAMPLES: Final = 10_000
# Percent of the resamples that lie between the ends of an interval.
LEVEL: Final = 95


@dataclass(frozen=True)
class Estimate:
    """A value, and the ends of its bootstrap interval; None where there is no order to speak of."""

    value: float | None
    interval: tuple[float, float] | None

    def __str__(self) -> str:
        if self.value is None or self.interval is None:
            return "undefined"
        return "{:.2f} [{:.2f}, {:.2f}]".format(self.value, *self.interval)


def kendall_tau(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Return τ-b of two measurements of the same items; None if all values of one of them are the same."""
    return _defined(_taus(x, y, np.ones((1, len(x)), dtype=np.int64))[0])


def estimate_tau(x: Sequence[float], y: Sequence[float], *, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """Return τ-b and its percentile bootstrap interval over the items.

    Args:
        x: a value for every item.
        y: another value for every item.
        resamples: how many times as many items are drawn with replacement. Those in which all values of ``x`` or of
            ``y`` are the same have no τ and are left out.
        seed: of the draws.
    """
    return Estimate(kendall_tau(x, y), _interval(_taus(x, y, _draws(len(x), resamples, seed))))


def estimate_difference(
    x: Sequence[float], other: Sequence[float], y: Sequence[float], *, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """Return by how much τ-b of ``x`` and ``y`` exceeds that of ``other`` and ``y``, with its bootstrap interval.

    Both are resampled together: what the same items have in common is not counted as uncertainty.

    Args:
        x: a value for every item.
        other: what is compared with ``x``.
        y: what both are correlated with.
        resamples: as of :func:`estimate_tau`.
        seed: of the draws.
    """
    ours, theirs = kendall_tau(x, y), kendall_tau(other, y)
    counts = _draws(len(y), resamples, seed)
    if ours is None or theirs is None:
        return Estimate(None, None)
    return Estimate(ours - theirs, _interval(_taus(x, y, counts) - _taus(other, y, counts)))


def _draws(items: int, resamples: int, seed: int) -> NDArray[np.int64]:
    """Return how often each item is in each resample, [resamples, items]."""
    counts: NDArray[np.int64] = np.random.default_rng(seed).multinomial(items, [1 / items] * items, size=resamples)
    return counts


def _taus(x: Sequence[float], y: Sequence[float], counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return τ-b of every resample; an item that is in it twice is tied with itself. NaN where it is undefined."""
    in_x, in_y = (np.sign(np.subtract.outer(values, values)).astype(np.int64) for values in (x, y))

    def over_pairs(table: NDArray[np.int64]) -> NDArray[np.int64]:
        # Of every pair twice, which does not change the ratio.
        total: NDArray[np.int64] = ((counts @ table) * counts).sum(1)
        return total

    untied = over_pairs(np.abs(in_x)).astype(np.float64) * over_pairs(np.abs(in_y))
    with np.errstate(invalid="ignore"):
        taus: NDArray[np.float64] = over_pairs(in_x * in_y) / np.sqrt(untied)
    return taus


def _interval(values: NDArray[np.float64]) -> tuple[float, float] | None:
    defined = values[np.isfinite(values)]
    if not len(defined):
        return None
    low, high = np.percentile(defined, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return float(low), float(high)


def _defined(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
