"""How the cost of a step grows with batch, channels, cells, and entries of the board, and whether it grows too fast.

    python benchmarks/scaling.py

Each quantity is varied by itself, in one process, the sizes taking turns. The mathematics says how fast a cost may
grow: in proportion to the batch, the cells and the entries of the board; with the channels as their square (pointwise
convolutions), at most. What is judged is the steepest line between two neighbouring sizes in a picture whose axes are
both logarithmic, where a power is a straight line: its slope may exceed the power by no more than ``TOLERANCE``. Writes
``benchmarks/results/scaling.json`` and ``docs/images/scaling.svg``.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import (
    ROOT,
    add_seconds,
    judged,
    keep_compiled_convolutions,
    make_parser,
    mean_and_spread,
    save_result,
    seconds_of,
    table,
    turns,
    with_repetitions,
)
from matplotlib.figure import Figure
from torch import nn

from nni_cream import hypergradient
from nni_cream.runs import write_atomically
from nni_cream.strategies.darts import DartsStrategy
from nni_cream.supernet.batch_norm import batch_statistics
from nni_cream.supernet.functional import pure_loss
from search_spaces.cream import CreamSpace
from search_spaces.darts import DartsSpace

# What is varied: sizes, and the power with which the cost may grow.
SIZES: dict[str, tuple[tuple[int, ...], int]] = {
    "batch": ((8, 16, 32, 64), 1),
    "channels": ((4, 8, 16, 32), 2),
    "cells": ((3, 6, 12), 1),
    "board entries": ((2, 4, 8, 16), 1),
}
# Where nothing else is said.
BATCH, CHANNELS, CELLS, RESOLUTION, CLASSES = 8, 8, 3, 16, 10
KINDS = ("first order", "finite difference", "exact")
ENTRY_IMAGES = 4
# For caches that a size has outgrown, and for noise.
TOLERANCE = 0.25
# Turns that count however long they take.
FEWEST = 2

Work = Callable[[], Any]


class Network(nn.Module):
    """A relaxed space, and the α that it asks for."""

    def __init__(self, space: nn.Module, alphas: nn.Module) -> None:
        super().__init__()
        self.space = space
        self.alphas = alphas

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        logits: torch.Tensor = self.space(images)
        return logits


def darts_step(
    kind: str,
    device: str,
    batch: int = BATCH,
    channels: int = CHANNELS,
    cells: int = CELLS,
    resolution: int = RESOLUTION,
) -> Work:
    """Return what computes a hypergradient of a kind, and then the gradient in the weights."""
    torch.manual_seed(0)
    strategy = DartsStrategy()
    space: Any = strategy.mutate_model(DartsSpace(CLASSES, channels=channels, cells=cells))
    network = Network(space.to(memory_format=torch.channels_last), strategy.alphas).to(device)
    weights, alphas = list(space.parameters()), list(strategy.alphas.parameters())
    names = [[f"{part}.{n}" for n, _ in getattr(network, part).named_parameters()] for part in ("space", "alphas")]
    step = hypergradient.sgd_step(torch.optim.SGD(weights, 0.025, momentum=0.9, weight_decay=3e-4), weights)
    images = torch.randn(2 * batch, 3, resolution, resolution).to(device, memory_format=torch.channels_last)
    labels = torch.randint(CLASSES, (2 * batch,)).to(device)
    training, validation = (
        pure_loss(network, names, lambda logits, own=own: F.cross_entropy(logits, own), part)
        for part, own in zip(images.chunk(2), labels.chunk(2), strict=True)
    )
    function = getattr(hypergradient, kind.replace(" ", "_"))

    def work() -> None:
        function(training, validation, weights, alphas, step)
        torch.autograd.grad(training(weights, [alpha.detach() for alpha in alphas]), weights)

    return work


def choice(entries: int, device: str) -> Work:
    """Return what asks a student for the images of so many entries of the board, as choosing a teacher does."""
    torch.manual_seed(0)
    space: Any = CreamSpace((1, 1, 1, 1, 1), CLASSES)
    network = space.random(random_state=np.random.RandomState(0)).to(device, memory_format=torch.channels_last)
    images = torch.randn(entries * ENTRY_IMAGES, 3, RESOLUTION, RESOLUTION)
    images = images.to(device, memory_format=torch.channels_last)

    def work() -> None:
        with torch.no_grad(), batch_statistics(network, groups=entries):
            network(images)

    return work


def series(device: str) -> dict[tuple[str, str], dict[int, Work]]:
    """Return what is timed: by the name of a step and of what is varied, and by its size."""
    found: dict[tuple[str, str], dict[int, Work]] = {}
    for varied in ("batch", "channels", "cells"):
        for kind in KINDS:
            found[kind, varied] = {size: darts_step(kind, device, **{varied: size}) for size in SIZES[varied][0]}
    found["choosing a teacher", "board entries"] = {size: choice(size, device) for size in SIZES["board entries"][0]}
    return found


def timed(works: Mapping[int, Work], repeats: int, limit: float, device: str) -> dict[int, list[float]]:
    """Return the seconds of every size, which take turns, after one turn that does not count.

    Args:
        works: by size.
        repeats: how many turns count at most.
        limit: how many seconds they may take.
        device: where they run.
    """
    seconds: dict[int, list[float]] = {size: [] for size in works}
    for turn in turns(repeats + 1, limit, FEWEST + 1):
        for size, work in works.items():
            taken = seconds_of(work, device)
            if turn:
                seconds[size].append(taken)
    return seconds


def steepest(medians: Mapping[int, float]) -> float:
    """Return the largest power with which a cost grows from one size to the next."""
    pairs = itertools.pairwise(medians.items())
    return max(math.log(b / a) / math.log(larger / smaller) for (smaller, a), (larger, b) in pairs)


def draw(medians: Mapping[tuple[str, str], Mapping[int, float]]) -> None:
    """Draw the seconds of a step over what is varied, with the power that the mathematics allows."""
    figure = Figure(figsize=(11, 3), layout="constrained")
    for axes, (varied, (sizes, power)) in zip(figure.subplots(1, len(SIZES)), SIZES.items(), strict=True):
        own = {step: found for (step, what), found in medians.items() if what == varied}
        for step, found in own.items():
            axes.plot(list(found), list(found.values()), "o-", label=step)
        highest = max(found[sizes[-1]] for found in own.values())
        allowed = [highest * 1.5 * (size / sizes[-1]) ** power for size in sizes]
        axes.plot(sizes, allowed, "k:", label="∝ n" if power == 1 else "∝ n²")
        axes.set(xscale="log", yscale="log", xlabel=varied)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.legend(fontsize="x-small")
    figure.axes[0].set_ylabel("seconds")
    write_atomically(ROOT / "docs/images/scaling.svg", lambda path: figure.savefig(path, format="svg"))


def main() -> None:
    """Measure, save the result, draw it, and print it as a table."""
    parser = make_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="of each measurement (default: %(default)s)")
    add_seconds(parser)
    arguments = parser.parse_args()
    keep_compiled_convolutions()
    device = arguments.device
    given = (arguments.repeats, arguments.seconds, device)
    seconds = {names: timed(works, *given) for names, works in series(device).items()}
    medians = {
        names: {size: statistics.median(values) for size, values in found.items()} for names, found in seconds.items()
    }
    rows: dict[str, dict[str, Any]] = {}
    for (step, varied), found in medians.items():
        allowed = SIZES[varied][1] + TOLERANCE
        rows.setdefault(f"power in {varied}", {})[step] = judged(steepest(found), ("<=", allowed))
    print(table(rows))
    if device == "cpu":
        draw(medians)
    every = {
        f"{step}, {varied}": {
            size: with_repetitions(values, **mean_and_spread(values)) for size, values in found.items()
        }
        for (step, varied), found in seconds.items()
    }
    content = {"threads": torch.get_num_threads(), "seconds": every, "table": rows}
    print(f"written to {save_result('scaling', content, device)}")


if __name__ == "__main__":
    main()
