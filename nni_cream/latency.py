"""Budgets of time: what the blocks of a Cream network take on a device, and what its paths are predicted to take.

A path is predicted to take the sum of its blocks and of the parts around them, times one factor for all networks: in a
network, parts take longer than by themselves. :mod:`nni_cream.timing` measures them. The table has what a first and
what a further block of each stage takes, so it is good for stages of any depth. Times are rounded to 0.1 µs, and added
as whole numbers of that: so sums are exact, and two paths of the same blocks take the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field, ValidationError, model_validator

from nni_cream.architecture import CreamPath, block_label
from nni_cream.description import describe_operation
from nni_cream.errors import UserError
from nni_cream.models.cream import FIRST_OWN_NUMBER, OPERATIONS, STAGES
from nni_cream.recipe_files import complaint
from nni_cream.runs import read_json, write_json
from nni_cream.sampling import CostUnit, PathSampler
from nni_cream.settings import PositiveFloat, PositiveInt, Resolution, Settings

FORMAT: Final = "nni_cream.latency/1"
MOST_MILLISECONDS: Final = 1000.0
TICKS: Final = 10_000
"""Of 0.1 µs, in a millisecond."""
BATCH_TIME: Final = CostUnit(TICKS, "ms", "a batch")

Precision = Literal["32-true", "16-true", "bf16-true"]
Milliseconds = Annotated[float, Field(ge=0, le=MOST_MILLISECONDS)]
Correlation = Annotated[float, Field(ge=-1, le=1)]


class Conditions(Settings):
    """What was measured on, and how.

    Attributes:
        device: where networks run.
        name: of the processor or the card.
        threads: that torch computes with on the CPU.
        batch_size: images that go through a network together.
        precision: of weights and images, in Lightning's words.
        torch: its version.
    """

    device: Literal["cpu", "cuda"]
    name: str
    threads: PositiveInt
    batch_size: PositiveInt
    precision: Precision
    torch: str

    def __str__(self) -> str:
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        where = f"{self.name}, {threads}" if self.device == "cpu" else self.name
        return f"a batch of {self.batch_size} on {where}, {self.precision}, torch {self.torch}"


class StageTimes(Settings):
    """What every operation takes in the first block of a stage, and in each further one."""

    first: tuple[Milliseconds, ...]
    further: tuple[Milliseconds, ...]

    def at(self, block: int) -> tuple[float, ...]:
        """Return those of a block of the stage, counted from 0."""
        return self.further if block else self.first


class Times(Settings):
    """What the parts of a network take for one batch, in the order in which it goes through them.

    Attributes:
        stem: the first convolution with its batch norm.
        first_stage: the block that every path begins with.
        stages: the choice stages.
        last_stage: the block that every path ends with.
        head: pooling, the last convolution, and the classifier.
    """

    stem: Milliseconds
    first_stage: Milliseconds
    stages: tuple[StageTimes, ...]
    last_stage: Milliseconds
    head: Milliseconds

    def along(self, path: CreamPath, operations: Sequence[int]) -> list[float]:
        """Return those of all parts of the network of ``path``; blocks have a time for each of ``operations``."""
        blocks = [
            stage.at(block)[operations.index(operation)]
            for stage, chosen in zip(self.stages, path.stages[1:-1], strict=True)
            for block, operation in enumerate(chosen)
        ]
        return [self.stem, self.first_stage, *blocks, self.last_stage, self.head]


class WholeNetwork(Settings):
    """A network that was measured as a whole: its path, what was predicted, and what it took."""

    path: str
    predicted: PositiveFloat
    measured: PositiveFloat


class Calibration(Settings):
    """How much longer whole networks take than their parts do by themselves.

    Attributes:
        networks: random ones, the prediction being the plain sum of their parts.
        scale: the factor with the least sum of squared errors, Σ predicted·measured / Σ predicted².
    """

    networks: tuple[WholeNetwork, ...]
    scale: Annotated[float, Field(gt=0, le=100)]

    @classmethod
    def of(cls, networks: Sequence[WholeNetwork]) -> Calibration:
        """Fit the factor."""
        products = sum(network.predicted * network.measured for network in networks)
        return cls(networks=tuple(networks), scale=products / sum(network.predicted**2 for network in networks))

    def predict(self, times: Iterable[float]) -> float:
        """Return what parts take in a network, from what they take by themselves."""
        return total(map(self.scaled, times))

    def scaled(self, time: float) -> float:
        """Return what a part takes in a network, from what it takes by itself."""
        return rounded(self.scale * time)


class Validation(Settings):
    """How far predictions are from what whole networks take.

    Attributes:
        networks: random ones, none of which the factor was fitted to.
        mean_error: mean of |predicted / measured − 1|.
        bias: mean of predicted / measured − 1.
        pearson: correlation of the two; None where all predictions, or all measurements, are the same.
        kendall: their rank correlation τ_b; None likewise.
    """

    networks: tuple[WholeNetwork, ...]
    mean_error: Annotated[float, Field(ge=0)]
    bias: float
    pearson: Correlation | None
    kendall: Correlation | None

    @property
    def correlations(self) -> dict[str, float]:
        """Those that there are, by their names."""
        named = {"Pearson": self.pearson, "Kendall": self.kendall}
        return {name: value for name, value in named.items() if value is not None}

    @classmethod
    def of(cls, networks: Sequence[WholeNetwork]) -> Validation:
        """Compare predictions with measurements."""
        import numpy as np
        from scipy.stats import kendalltau

        predicted, measured = (np.array([getattr(n, name) for n in networks]) for name in ("predicted", "measured"))
        errors = predicted / measured - 1
        related = np.ptp(predicted) > 0 and np.ptp(measured) > 0
        return cls(
            networks=tuple(networks),
            mean_error=float(np.abs(errors).mean()),
            bias=float(errors.mean()),
            # Rounding may leave a perfect one a little above 1.
            pearson=float(np.clip(np.corrcoef(predicted, measured)[0, 1], -1, 1)) if related else None,
            kendall=float(kendalltau(predicted, measured).statistic) if related else None,
        )


class LatencyTable(Settings):
    """What the blocks of a Cream network take on a device, in milliseconds for a batch.

    Attributes:
        resolution: of the images, in pixels.
        num_classes: of the classifier.
        operations: the numbers of the operations that were measured, in the order of ``milliseconds``.
        conditions: what was measured on, and how.
        milliseconds: what each part takes by itself.
        calibration: the factor by which whole networks take longer.
        validation: how far the predictions are from whole networks.
    """

    format: Literal["nni_cream.latency/1"] = FORMAT
    resolution: Resolution
    num_classes: PositiveInt
    operations: tuple[Annotated[int, Field(ge=0)], ...]
    conditions: Conditions
    milliseconds: Times
    calibration: Calibration
    validation: Validation

    @model_validator(mode="after")
    def _is_complete(self) -> LatencyTable:
        if len(set(self.operations)) != len(self.operations):
            raise ValueError(f"operations are {list(self.operations)}, but each should be there once")
        # Those of the user's own need not be registered where the table is read.
        unknown = [number for number in self.operations if len(OPERATIONS) <= number < FIRST_OWN_NUMBER]
        if unknown:
            raise ValueError(f"operations are {list(self.operations)}, but there is none of number {unknown[0]}")
        if len(self.milliseconds.stages) != len(STAGES):
            raise ValueError(f"there are {len(self.milliseconds.stages)} stages, but there should be {len(STAGES)}")
        for number, stage in enumerate(self.milliseconds.stages, start=1):
            for name, times in (("first", stage.first), ("further", stage.further)):
                if len(times) != len(self.operations):
                    raise ValueError(
                        f"stage {number} has {len(times)} times of its {name} block, but there are "
                        f"{len(self.operations)} operations"
                    )
        return self

    def save(self, file: Path) -> None:
        """Write it as JSON, atomically."""
        write_json(file, self.model_dump(mode="json"))

    @classmethod
    def load(cls, file: Path) -> LatencyTable:
        """Read what :meth:`save` wrote.

        Raises:
            UserError: if it is something else.
        """
        content = read_json(file, "latency table")
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise UserError(f"{file} is not a latency table; trials/measure_latency.py makes one.")
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise UserError(f"{file} is not a whole latency table: {complaint(error, cls)}") from None

    def refuse_another(self, file: Path, resolution: int, num_classes: int, operations: Sequence[int]) -> None:
        """Make sure that this is a table for networks of such a search, of stages of whatever depth.

        Args:
            file: where it comes from, for the error.
            resolution: of the images.
            num_classes: of the data.
            operations: that are on offer.

        Raises:
            UserError: if it is not.
        """
        missing = [describe_operation(number).words for number in operations if number not in self.operations]
        if self.resolution != resolution:
            difference = f"images of {self.resolution} pixels, but those of this search have {resolution}"
        elif self.num_classes != num_classes:
            difference = f"{self.num_classes} classes, but the data of this search has {num_classes}"
        elif missing:
            difference = f"other blocks, and has no times of what this search offers: {', '.join(missing)}"
        else:
            return
        raise UserError(
            f"The latency table {file} is for {difference}; measure again, with trials/measure_latency.py and the "
            "recipe of this search."
        )

    def of(self, path: CreamPath) -> float:
        """Return what the network of ``path`` is predicted to take, in milliseconds for a batch."""
        return self.calibration.predict(self.milliseconds.along(path, self.operations))

    def budget(
        self, depths: Sequence[int], operations: Sequence[int], skip: bool, low: float, high: float
    ) -> LatencyBudget:
        """Return the budget of a search.

        Args:
            depths: of the choice stages.
            operations: on offer in each of their blocks.
            skip: whether all but the first block of a stage can be left out, which is then the last candidate.
            low: the least that a path may take, in milliseconds for a batch.
            high: the most.
        """
        places = [self.operations.index(operation) for operation in operations]
        times, scaled = self.milliseconds, self.calibration.scaled
        # The first and the last stage are choices between one candidate each.
        choices: dict[str, tuple[float, ...]] = {block_label(0, 0): (scaled(times.first_stage),)}
        for number, (stage, depth) in enumerate(zip(times.stages, depths, strict=True), start=1):
            for block in range(depth):
                offered = tuple(scaled(stage.at(block)[place]) for place in places)
                choices[block_label(number, block)] = (*offered, 0.0) if skip and block else offered
        choices[block_label(len(STAGES) + 1, 0)] = (scaled(times.last_stage),)
        return LatencyBudget(choices, self.calibration.predict([times.stem, times.head]), low, high)


@dataclass(frozen=True)
class LatencyBudget:
    """A hard interval of predicted time, for paths that take the sum of what their candidates take.

    Attributes:
        choices: from the label of every choice to what each candidate takes, in milliseconds for a batch.
        fixed: what every path takes besides.
        low: the least that a path may take.
        high: the most.
    """

    choices: Mapping[str, tuple[float, ...]]
    fixed: float
    low: float
    high: float

    @property
    def shortest(self) -> float:
        """The least that a path takes."""
        return total([self.fixed, *map(min, self.choices.values())])

    @property
    def longest(self) -> float:
        """The most that a path takes."""
        return total([self.fixed, *map(max, self.choices.values())])

    def sampler(self, sizes: Mapping[str, int]) -> PathSampler:
        """Return what draws paths inside the interval; their costs are counted in units of 0.1 µs.

        Args:
            sizes: from the labels of a space, in the order of its paths, to the number of candidates.

        Raises:
            UserError: if it has other choices, or no path lies in the interval.
        """
        for label, size in sizes.items():
            known = len(self.choices.get(label, ()))
            if known != size:
                raise UserError(
                    f"The latency budget has {known} times for the choice {label!r}, which has {size} candidates."
                )
        costs = [[_ticks(time) for time in self.choices[label]] for label in sizes]
        # A product with a binary fraction may miss the whole number that is meant.
        low, high = (round(end * TICKS, 3) for end in (self.low, self.high))
        return PathSampler(costs, _ticks(self.fixed), low, high, BATCH_TIME)


def rounded(milliseconds: float) -> float:
    """Return a time as a table holds it: a whole number of 0.1 µs, at least one."""
    return max(1, _ticks(milliseconds)) / TICKS


def _ticks(milliseconds: float) -> int:
    return round(milliseconds * TICKS)


def total(times: Iterable[float]) -> float:
    """Return the sum of times, of which each is a whole number of 0.1 µs."""
    return sum(map(_ticks, times)) / TICKS
