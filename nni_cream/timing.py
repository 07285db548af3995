"""Measuring a latency table: what every block of a Cream network takes on this machine, and whole networks beside it.

Everything is measured in rounds, and each round goes through all blocks, parts and networks, so that what disturbs the
machine for a while disturbs all of them alike; the median over the rounds counts. torch's own timer
(``torch.utils.benchmark``) does the timing: it keeps to the number of threads, warms up, and waits for a GPU.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from nni_cream.architecture import CreamPath
from nni_cream.child import build_network
from nni_cream.errors import UserError
from nni_cream.latency import (
    MOST_MILLISECONDS,
    Calibration,
    Conditions,
    LatencyTable,
    Precision,
    StageTimes,
    Times,
    Validation,
    WholeNetwork,
    rounded,
    total,
)
from nni_cream.models.cream import STAGES, build_child, known_operations
from nni_cream.recipe import CreamRecipe
from nni_cream.runs import processor_name
from nni_cream.search import load_splits
from nni_cream.supernet.paths import PathSpace

if TYPE_CHECKING:
    from search_spaces.cream import CreamSpace

ROUNDS: Final = 15
SECONDS: Final = 0.02
"""That each measurement of a round lasts, at least one run."""

_DTYPES: Final[dict[Precision, torch.dtype]] = {
    "32-true": torch.float32,
    "16-true": torch.float16,
    "bf16-true": torch.bfloat16,
}
Work = Callable[[], object]


class Bench:
    """Makes what is measured: networks and parts of them in evaluation mode, in ``channels_last``, on random features.

    Args:
        batch_size: images that go through together.
        device: where.
        precision: of weights and features.
    """

    def __init__(self, batch_size: int, device: Literal["cpu", "cuda"], precision: Precision) -> None:
        self.batch_size = batch_size
        self.device = device
        self.dtype = _DTYPES[precision]
        self._features: dict[tuple[int, int], Tensor] = {}

    def ready(self, network: Any) -> Any:
        """Return ``network``, ready to run."""
        return network.eval().to(self.device, self.dtype).to(memory_format=torch.channels_last)

    def features(self, channels: int, size: int) -> Tensor:
        """Return what a network or a part of one is given, [batch_size, channels, size, size]."""
        if (channels, size) not in self._features:
            features = torch.randn(self.batch_size, channels, size, size, device=self.device)
            self._features[channels, size] = features.to(self.dtype, memory_format=torch.channels_last)
        return self._features[channels, size]

    def work(self, network: nn.Module, channels: int, size: int) -> Work:
        """Return a run of ``network``."""
        return partial(self.ready(network), self.features(channels, size))


def measure_latency(
    space: CreamSpace,
    resolution: int,
    *,
    batch_size: int = 1,
    device: Literal["cpu", "cuda"] = "cpu",
    threads: int | None = None,
    precision: Precision = "32-true",
    networks: int = 10,
    seed: int = 0,
) -> LatencyTable:
    """Measure every block that ``space`` offers, the parts around them, and random networks of it as a whole.

    Args:
        space: the space; its weights are not used, so that it may lie on the ``meta`` device.
        resolution: of the images, in pixels.
        batch_size: images that go through together.
        device: where networks run.
        threads: that torch computes with on the CPU; None for its own choice.
        precision: of weights and images.
        networks: to how many random networks the factor of the predictions is fitted, and how many others check them.
        seed: of which networks these are.

    Raises:
        UserError: if there is no such device, or a part takes longer than a table can hold.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, but torch finds no GPU on this machine: take cpu.")
    bench = Bench(batch_size, device, precision)
    threads = threads or torch.get_num_threads()
    parts = {**_frame(bench, space.num_classes, resolution), **_blocks(bench, space.operations, resolution)}
    _refuse_slow(list(parts.values()), threads)
    paths = random_networks(space, 2 * networks, seed)
    whole = [bench.work(build_network(str(path), space.num_classes, {}), 3, resolution) for path in paths]
    found = [rounded(time) for time in median_milliseconds([*parts.values(), *whole], threads)]

    time_of, of_networks = dict(zip(parts, found, strict=False)), found[len(parts) :]
    stages = tuple(
        StageTimes(
            first=tuple(time_of[stage, "first", number] for number in space.operations),
            further=tuple(time_of[stage, "further", number] for number in space.operations),
        )
        for stage in range(len(STAGES))
    )
    times = Times(stages=stages, **{name: time_of[(name,)] for name in ("stem", "first_stage", "last_stage", "head")})
    along = [times.along(path, space.operations) for path in paths]
    calibration = Calibration.of(_compared(paths, map(total, along), of_networks)[:networks])
    return LatencyTable(
        resolution=resolution,
        num_classes=space.num_classes,
        operations=space.operations,
        conditions=Conditions(
            device=device,
            name=processor_name() if device == "cpu" else torch.cuda.get_device_name(),
            threads=threads,
            batch_size=batch_size,
            precision=precision,
            torch=torch.__version__,
        ),
        milliseconds=times,
        calibration=calibration,
        validation=Validation.of(_compared(paths, map(calibration.predict, along), of_networks)[networks:]),
    )


def _compared(paths: Iterable[CreamPath], predicted: Iterable[float], measured: Iterable[float]) -> list[WholeNetwork]:
    return [
        WholeNetwork(path=str(path), predicted=prediction, measured=time)
        for path, prediction, time in zip(paths, predicted, measured, strict=True)
    ]


def _frame(bench: Bench, num_classes: int, resolution: int) -> dict[tuple[Any, ...], Work]:
    """Return runs of the parts that every path has, by the names of their times."""
    from search_spaces.cream import block_shapes

    network = bench.ready(build_child(CreamPath(((0,),) * (len(STAGES) + 2)), num_classes=num_classes))
    (first, _), (_, last) = (block_shapes(resolution)[stage] for stage in (0, -1))
    return {
        ("stem",): partial(nn.Sequential(network.conv_stem, network.bn1).eval(), bench.features(3, resolution)),
        ("first_stage",): partial(network.blocks[0], bench.features(network.conv_stem.out_channels, first.size)),
        ("last_stage",): partial(network.blocks[-1], bench.features(last.out_channels, last.size)),
        ("head",): partial(network.forward_head, bench.features(network.conv_head.in_channels, last.size)),
    }


def _blocks(bench: Bench, operations: Sequence[int], resolution: int) -> dict[tuple[Any, ...], Work]:
    """Return runs of the blocks, by stage (from 0), whether they are the first of it, and operation."""
    from search_spaces.cream import block_shapes

    return {
        (stage, name, number): bench.work(
            known_operations()[number].build(shape.in_channels, shape.out_channels, shape.stride),
            shape.in_channels,
            shape.size,
        )
        for stage, shapes in enumerate(block_shapes(resolution))
        for name, shape in zip(("first", "further"), shapes, strict=True)
        for number in operations
    }


def _refuse_slow(works: Sequence[Work], threads: int) -> None:
    """Make sure that a table can hold what parts take.

    Raises:
        UserError: if one takes longer.
    """
    with torch.inference_mode():
        longest = max(1000 * timer.timeit(1).mean for timer in _timers(works, threads))
    if longest > MOST_MILLISECONDS:
        raise UserError(
            f"A single block takes {longest:,.0f} ms for a batch, and a table goes to {MOST_MILLISECONDS:,.0f}: make "
            "--batch-size smaller."
        )


def random_networks(space: CreamSpace, number: int, seed: int) -> list[CreamPath]:
    """Draw different networks of a space, each candidate of a block as likely as any other.

    The smallest space has thousands of them, so that ``number`` should be well below that.
    """
    paths = PathSpace(space)
    generator = np.random.default_rng(seed)
    found: dict[CreamPath, None] = {}
    while len(found) < number:
        chosen = tuple(int(generator.integers(size)) for size in paths.sizes)
        found.setdefault(space.architecture(paths.to_sample(chosen)))
    return list(found)


def median_milliseconds(works: Sequence[Work], threads: int) -> list[float]:
    """Return how many milliseconds each of ``works`` takes, as the median of rounds that go through all of them.

    Args:
        works: what is run, without gradients.
        threads: that torch computes with on the CPU.
    """
    timers = _timers(works, threads)
    with torch.inference_mode():
        # The first run of each, which may choose algorithms and fill caches, is among these and does not count.
        lengths = [timer.blocked_autorange(min_run_time=SECONDS).median for timer in timers]
        runs = [max(1, round(SECONDS / length)) for length in lengths]
        rounds = [
            [timer.timeit(number).mean for timer, number in zip(timers, runs, strict=True)] for _ in range(ROUNDS)
        ]
    return [1000 * statistics.median(of_one) for of_one in zip(*rounds, strict=True)]


def _timers(works: Sequence[Work], threads: int) -> list[Timer]:
    return [Timer("work()", globals={"work": work}, num_threads=threads) for work in works]


def space_of(recipe: CreamRecipe, num_classes: int | None = None) -> tuple[CreamSpace, int]:
    """Return the space of a search, without weights, and the resolution of its images.

    Args:
        recipe: of the search.
        num_classes: of its data; None to look there.

    Raises:
        UserError: if the recipe leads to no space, or its data cannot be loaded.
    """
    from search_spaces.cream import CreamSpace, plan_space

    plan = plan_space(recipe.flops.min, recipe.flops.max, recipe.data.resolution)
    if num_classes is None:
        num_classes = load_splits(recipe.data.at(plan.resolution), recipe.seed).num_classes
    with torch.device("meta"):
        return CreamSpace(plan.depths, num_classes, **recipe.space.model_dump()), plan.resolution


def print_latency(table: LatencyTable, space: CreamSpace, file: Path) -> None:
    """Tell a person how good the predictions of ``table`` are, and what the paths of ``space`` take."""
    fitted, checked = table.calibration, table.validation
    width = max(len(network.path) for network in checked.networks)
    print(f"{'network':<{width}}  predicted   measured    error")
    for network in checked.networks:
        error = network.predicted / network.measured - 1
        print(f"{network.path:<{width}} {network.predicted:7.3f} ms {network.measured:7.3f} ms {100 * error:+6.1f} %")
    related = [f"{name} {value:.3f}" for name, value in checked.correlations.items()]
    print(f"factor:    {fitted.scale:.3f} times the sum of the parts, fitted to {len(fitted.networks)} other networks")
    print(f"error:     {100 * checked.mean_error:.1f} % on average, {100 * checked.bias:+.1f} % with its sign")
    print(f"relation:  {', '.join(related) or 'none'}")
    budget = table.budget(space.depths, space.operations, space.skip, 0, math.inf)
    print(f"paths:     {budget.shortest:.3f} ms to {budget.longest:.3f} ms, for {table.conditions}")
    print(f"table:     {file}", flush=True)
