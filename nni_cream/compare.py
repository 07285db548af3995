"""Whether a search pays: what it found against random networks of the same space, and against standard ones.

All are trained by one recipe, with the same seeds, on the same images, for as many epochs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from nni_cream.architecture import CreamPath
from nni_cream.child import Candidate, Child, create_timm_model
from nni_cream.cost import measure_network, measure_space
from nni_cream.errors import UserError
from nni_cream.genotype import Genotype
from nni_cream.latency import LatencyTable
from nni_cream.ranks import is_first
from nni_cream.recipe import CreamRecipe, RetrainRecipe
from nni_cream.retrain import build_for_training, refuse_another_training, refuse_untrainable
from nni_cream.runs import RunDirectory, describe_environment, read_json, write_json, write_text
from nni_cream.sampling import PathSampler
from nni_cream.seeds import Spread, retrain_seeds
from nni_cream.settings import DartsSpaceSettings

FOUND: Final = "found by the search"
RANDOM: Final = "random"
REFERENCE: Final = "resnet18"
# Of very different cost, from small to large.
MOBILE: Final = (
    "mobilenetv3_small_050",
    "mobilenetv3_small_075",
    "mobilenetv3_small_100",
    "mobilenetv3_large_075",
    "mobilenetv3_large_100",
)

PATIENCE: Final = 1000


@dataclass(frozen=True)
class Contestant:
    """A network that takes part.

    Attributes:
        group: the row of the table that it belongs to.
        name: of its folder.
        network: the text of a path or a genotype, or timm's name.
    """

    group: str
    name: str
    network: str


@dataclass(frozen=True)
class Row:
    """What a group of networks has reached.

    Attributes:
        group: the name of the row.
        networks: how many there are in it.
        flops: multiply-accumulates for one image, the mean of the networks.
        params: number of parameters, likewise.
        test_accuracy: over all networks and seeds.
    """

    group: str
    networks: int
    flops: float
    params: float
    test_accuracy: Spread


def random_paths(
    search: CreamRecipe,
    num_classes: int,
    number: int,
    found: CreamPath,
    seed: int,
    latency: LatencyTable | None = None,
) -> list[CreamPath]:
    """Draw different paths inside the interval of a search's budget, as :func:`random_samples` does.

    Args:
        search: the recipe of the search.
        num_classes: number of classes of its data.
        number: how many.
        found: a path that must not be among them.
        seed: of the draws.
        latency: the table of a search whose budget was one of time.

    Raises:
        UserError: if there are hardly so many.
    """
    drawn = random_samples(search, num_classes, number, seed, found, latency)
    if len(drawn) < number:
        raise UserError(
            f"--random is {number}, but among {PATIENCE} draws there are {len(drawn)} different paths besides the one "
            "that was found: ask for fewer."
        )
    return list(drawn)


def kept_table(search: CreamRecipe, directory: RunDirectory) -> LatencyTable | None:
    """Return the latency table that a finished search has kept to; None of one whose budget was FLOPs.

    Raises:
        UserError: if it is not there any more, or is none.
    """
    return None if search.latency.table is None else LatencyTable.load(directory.latency)


def random_samples(
    search: CreamRecipe,
    num_classes: int,
    number: int,
    seed: int,
    found: CreamPath | None = None,
    latency: LatencyTable | None = None,
) -> dict[CreamPath, dict[str, Any]]:
    """Draw different paths inside the interval of a search's budget, from its space, each as likely as any other.

    Args:
        search: the recipe of the search.
        num_classes: number of classes of its data.
        number: how many.
        seed: of the draws; a larger number begins with the paths of a smaller one.
        found: a path that must not be among them.
        latency: the table of a search whose budget was one of time.

    Returns:
        Of each path its NNI sample; fewer than ``number`` if :data:`PATIENCE` draws do not give so many.
    """
    from search_spaces.cream import CreamSpace, plan_space

    plan = plan_space(search.flops.min, search.flops.max, search.data.resolution)
    with torch.device("meta"):
        space = CreamSpace(plan.depths, num_classes, **search.space.model_dump())
    table = measure_space(space, (3, plan.resolution, plan.resolution))
    costs = [[cost.macs for cost in options] for options in table.choices.values()]
    if latency is None:
        sampler = PathSampler(costs, table.fixed.macs, search.flops.min * 1e6, search.flops.max * 1e6)
    else:
        assert search.latency.max is not None
        low, high = search.latency.min, search.latency.max
        budget = latency.budget(plan.depths, space.operations, space.skip, low, high)
        sampler = budget.sampler({label: len(options) for label, options in table.choices.items()})
    prior = [[1 / len(options)] * len(options) for options in costs]
    generator = np.random.default_rng(seed)
    drawn: dict[CreamPath, dict[str, Any]] = {}
    for _ in range(PATIENCE):
        if len(drawn) == number:
            break
        # With skips several samples are one path; the first one stands for it.
        sample = dict(zip(table.choices, sampler.draw(prior, generator), strict=True))
        path = space.architecture(sample)
        if path != found:
            drawn.setdefault(path, sample)
    return drawn


def random_genotypes(child: Child, number: int, seed: int) -> list[Genotype]:
    """Draw genotypes from the space of a DARTS search: for every node two states and two operations, all as likely.

    The search has no budget, and so these have none; the table says what they cost.

    Args:
        child: what the search found.
        number: how many.
        seed: of the draws.
    """
    assert isinstance(child.architecture, Genotype)
    found = child.architecture
    offered = child.space.get("operations", DartsSpaceSettings().operations)
    operations = [operation for operation in offered if operation != "none"]
    generator = np.random.default_rng(seed)

    def cell(nodes: int) -> tuple[tuple[str, int], ...]:
        return tuple(
            (operations[generator.integers(len(operations))], int(state))
            for node in range(nodes)
            for state in generator.choice(2 + node, 2, replace=False)
        )

    return [
        Genotype(
            normal=cell(found.nodes("normal")),
            normal_concat=found.normal_concat,
            reduce=cell(found.nodes("reduce")),
            reduce_concat=found.reduce_concat,
        )
        for _ in range(number)
    ]


def nearest_network(flops: int, num_classes: int, resolution: int, names: Sequence[str] = MOBILE) -> str:
    """Return the network of timm's whose multiply-accumulates at ``resolution`` pixels are nearest to ``flops``.

    By their ratio, and with the classifier that it is trained with: at low resolutions a thousand classes would be a
    third of the cost.
    """

    def distance(name: str) -> float:
        with torch.device("meta"):
            network = create_timm_model(name, num_classes=num_classes)
        return abs(math.log(measure_network(network, resolution).macs / flops))

    return min(names, key=distance)


def line_up(
    child: Child,
    search: CreamRecipe | None,
    resolution: int,
    number: int,
    networks: Sequence[str] | None,
    seed: int,
    latency: LatencyTable | None = None,
) -> list[Contestant]:
    """Say who takes part.

    Args:
        child: what the search found.
        search: its recipe; None of a DARTS search.
        resolution: at which all are trained.
        number: how many random networks.
        networks: timm's names of the standard ones; None for the nearest MobileNetV3, and ResNet-18 for reference.
        seed: of the random networks.
        latency: as of :func:`random_paths`.

    Raises:
        UserError: as :func:`random_paths`.
    """
    others: Sequence[CreamPath | Genotype]
    if isinstance(child.architecture, Genotype):
        others = random_genotypes(child, number, seed)
    else:
        assert search is not None
        others = random_paths(search, child.num_classes, number, child.architecture, seed, latency)
    if networks is None:
        networks = [nearest_network(max(1, child.flops), child.num_classes, resolution), REFERENCE]
    return [
        Contestant(FOUND, "found", str(child.architecture)),
        *(Contestant(RANDOM, f"random{i}", str(other)) for i, other in enumerate(others, start=1)),
        *(Contestant(network, network, network) for network in networks),
    ]


def refuse_unfit(recipe: RetrainRecipe, contestants: Sequence[Contestant], num_classes: int) -> None:
    """Make sure that every contestant can be trained, before the first one is.

    Args:
        recipe: how, its data given in full.
        contestants: who.
        num_classes: number of classes of the data.

    Raises:
        UserError: as :func:`nni_cream.retrain.build_for_training` and :func:`nni_cream.retrain.refuse_untrainable`, and
            if one cannot take images of this resolution; it says which.
    """
    resolution = recipe.data.completed({}).resolution
    for contestant in contestants:
        try:
            with torch.device("meta"):
                network = build_for_training(recipe, contestant.network, num_classes)
            measure_network(network, resolution)
            refuse_untrainable(recipe, network, resolution)
        except UserError as error:
            raise UserError(f"{contestant.name} cannot take part: {error}") from None


def compare(recipe: RetrainRecipe, contestants: Sequence[Contestant], seeds: Sequence[int], folder: Path) -> list[Row]:
    """Train every contestant with every seed, and write ``comparison.json`` and ``comparison.md`` into ``folder``.

    What has been trained before is not trained again.

    Args:
        recipe: how, its data given in full; its seed and rank do not count.
        contestants: who.
        seeds: at least one.
        folder: of all runs, each in a folder of its own below.

    Returns:
        A row for every group, in their order; none in all processes of a run but the first.

    Raises:
        UserError: as :func:`nni_cream.retrain.retrain`, and if ``folder`` holds a comparison of other networks or by
            another recipe, before the first training begins.
    """
    recipes = [recipe.model_copy(update={"seed": seed, "rank": 1}) for seed in seeds]
    runs = {
        contestant: [(own, RunDirectory(folder / contestant.name / f"seed{own.seed}")) for own in recipes]
        for contestant in contestants
    }
    for contestant, trainings in runs.items():
        for own, directory in trainings:
            refuse_another_training(own, Candidate(None, contestant.network), directory)
    summaries: dict[str, Any] = {}
    for contestant, trainings in runs.items():
        below = folder / contestant.name
        retrain_seeds(trainings, Candidate(None, contestant.network), below)
        if is_first():
            summary = read_json(below / "summary.json", "summary of trainings")
            summaries[contestant.name] = {"group": contestant.group, **summary}
    if not is_first():
        return []
    groups = list(dict.fromkeys(contestant.group for contestant in contestants))
    rows = [_row(group, [s for s in summaries.values() if s["group"] == group]) for group in groups]
    write_json(
        folder / "comparison.json",
        {"rows": [asdict(row) for row in rows], "networks": summaries, **describe_environment()},
    )
    write_text(folder / "comparison.md", table(rows))
    return rows


def _row(group: str, summaries: Sequence[dict[str, Any]]) -> Row:
    accuracies = [measured["test_accuracy"] for summary in summaries for measured in summary["seeds"].values()]
    flops, params = (statistics.fmean(summary[key] for summary in summaries) for key in ("flops", "params"))
    return Row(group, len(summaries), flops, params, Spread.of(accuracies))


def table(rows: Sequence[Row]) -> str:
    """Write rows as a Markdown table; accuracies are means over all networks and seeds, and standard deviations."""
    lines = ["| network | trainings | MACs (M) | parameters (M) | test accuracy |", "|---|---|---|---|---|"]
    for row in rows:
        name = row.group if row.networks == 1 else f"{row.group}, {row.networks} networks"
        cost = f"{row.flops / 1e6:.2f} | {row.params / 1e6:.3f}"
        lines.append(f"| {name} | {row.test_accuracy.runs} | {cost} | {row.test_accuracy} |")
    return "\n".join(lines) + "\n"
