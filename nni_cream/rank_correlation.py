"""How well the shared weights of a search rank networks, which is what a search with shared weights rests on.

Random paths are judged twice: with the shared weights, as the search ranks its board in the end, and by themselves,
each trained from scratch. Kendall's τ tells how alike the two orders are. That is the experiment of Peng et al., "Cream
of the Crop", NeurIPS 2020, with 30 paths on a part of ImageNet.
"""

from __future__ import annotations

import itertools
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch

from nni_cream.architecture import CreamPath
from nni_cream.checkpoints import find_checkpoint
from nni_cream.child import Candidate, Child, fit_weights
from nni_cream.compare import PATIENCE, kept_table, random_samples
from nni_cream.data_checks import has_another_test_part, refuse_other_classes
from nni_cream.errors import UserError
from nni_cream.genotype import Genotype
from nni_cream.kendall import LEVEL, Estimate, estimate_difference, estimate_tau, kendall_tau
from nni_cream.loading import first_batches
from nni_cream.plots.rank_correlation import Panel, draw_rank_correlation
from nni_cream.plots.style import save_figure
from nni_cream.recipe import CreamRecipe, RetrainRecipe
from nni_cream.recipe_files import load_recipe, to_yaml
from nni_cream.runs import RunDirectory, describe_environment, write_json, write_text
from nni_cream.search import arrange_in_memory, load_splits, make_loader, make_training_loader
from nni_cream.seeds import Spread, summarize
from nni_cream.settings import ChildData
from nni_cream.side_by_side import Training
from nni_cream.supernet.batch_norm import count_right

# Of the files with the result.
NAME: Final = "rank_correlation"
# Where a search keeps the supernet in its checkpoints.
_SUPERNET: Final = "training_module._model."

Sample = Mapping[str, Any]


@dataclass(frozen=True)
class FinishedSearch:
    """What a Cream search has left in its run directory.

    Attributes:
        name: of the folder.
        directory: the folder.
        recipe: as run.
        child: what was found.
    """

    name: str
    directory: RunDirectory
    recipe: CreamRecipe
    child: Child

    @classmethod
    def open(cls, folder: Path) -> FinishedSearch:
        """Read the run directory of a search.

        Raises:
            UserError: if no Cream search has ended there.
        """
        if os.path.isfile(folder):
            raise UserError(f"{folder} is a file; give the folder of a search, perhaps the one that it is in.")
        directory = RunDirectory(folder)
        if not os.path.exists(directory.child):
            raise UserError(
                f"{folder} holds no search that has ended (it has no {directory.child.name}); give the folder of a "
                "Cream search, such as runs/cream_mnist5k."
            )
        child = Child.load(directory.child)
        if isinstance(child.architecture, Genotype):
            raise UserError(
                f"{folder} holds a DARTS search, which trains all operations together and ranks no paths; give the "
                "folder of a Cream search."
            )
        return cls(folder.resolve().name, directory, load_recipe(CreamRecipe, folder / "recipe.yml", {}), child)


@dataclass(frozen=True)
class Counts:
    """Right answers of every path, in the order of the paths, and of how many images.

    Numbers and not shares of them, so that what is equal is equal in floating point.
    """

    right: tuple[int, ...]
    images: int

    @property
    def accuracies(self) -> tuple[float, ...]:
        """The shares, in [0, 1]."""
        return tuple(right / self.images for right in self.right)


def draw_samples(searches: Sequence[FinishedSearch], number: int, seed: int) -> dict[CreamPath, dict[str, Any]]:
    """Draw paths inside the interval that all searches have in common, and of each its NNI sample.

    Args:
        searches: at least one.
        number: how many paths.
        seed: of the draws.

    Raises:
        UserError: if there are hardly so many, or if the searches are not of the same networks and data.
    """
    first, *others = searches
    samples = _samples(first, number, seed)
    if len(samples) < number:
        raise UserError(
            f"--paths is {number}, but among {PATIENCE} draws there are {len(samples)} different paths: ask for fewer."
        )
    for other in others:
        same_data = _images(other) == _images(first)
        if not same_data or _samples(other, number, seed) != samples:
            what = "paths" if same_data else "images"
            raise UserError(
                f"{other.directory.path} is a search of other {what} than {first.directory.path}, so that they cannot "
                "be compared; give searches with the same data, space, resolution and budget."
            )
    return samples


def _samples(search: FinishedSearch, number: int, seed: int) -> dict[CreamPath, dict[str, Any]]:
    latency = kept_table(search.recipe, search.directory)
    return random_samples(search.recipe, search.child.num_classes, number, seed, latency=latency)


def _images(search: FinishedSearch) -> tuple[Any, ...]:
    data = search.child.data
    return search.child.num_classes, *(data.get(key) for key in ("name", "folder", "resolution"))


def count_shared(search: FinishedSearch, samples: Sequence[Sample]) -> Counts:
    """Judge paths with the shared weights that a search has ended with, as it ranks its board.

    Each has batch norms of its own, recomputed over the training images that the search takes for that, and is measured
    on the images that its ranking is made on.

    Args:
        search: the search.
        samples: of the paths.

    Raises:
        UserError: if its checkpoint is missing or of another supernet, or its images are others now.
    """
    from search_spaces.cream import CreamSpace, plan_space

    recipe, folder = search.recipe, search.directory.path
    file = find_checkpoint(search.directory)
    if file is None:
        raise UserError(
            f"{folder} has no checkpoint, and so no shared weights; give a search with its folder 'checkpoints', or "
            "run it again."
        )
    plan = plan_space(recipe.flops.min, recipe.flops.max, recipe.data.resolution)
    data = recipe.data.at(plan.resolution)
    splits = load_splits(data, recipe.seed)
    if splits.num_classes != search.child.num_classes:
        raise UserError(
            f"{folder} is a search for {search.child.num_classes} classes, but {data.name} has {splits.num_classes} "
            "now; give its images as they were."
        )
    refuse_other_classes(search.child.data, splits, search.directory.child)
    if has_another_test_part(search.child.data, data, splits):
        raise UserError(
            f"{data.folder} has changed since the search in {folder}, so that its parts are others; give its images as "
            "they were."
        )
    space = CreamSpace(plan.depths, splits.num_classes, **recipe.space.model_dump())
    state = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
    supernet = {key.removeprefix(_SUPERNET): value for key, value in state.items() if key.startswith(_SUPERNET)}
    fit_weights(space, supernet, file, f"the supernet of {folder / 'recipe.yml'}")

    device = recipe.device.model_copy(update={"devices": 1})
    arrange_in_memory(space, device)
    on_gpu = device.accelerator != "cpu" and torch.cuda.is_available()
    where = torch.device("cuda" if on_gpu else "cpu")
    space.to(where)
    training = make_training_loader(splits.weights, data, recipe.seed, device)
    held_out = make_loader(splits.validation, data, device)
    counts = []
    for sample in samples:
        network = space.freeze(dict(sample))
        # The epoch after the last, as in the search.
        batches = first_batches(training, recipe.cream.recalibration_batches, recipe.epochs)
        calibration = (images.to(where) for images, _ in batches)
        counts.append(count_right(network, network, calibration, ((x.to(where), y.to(where)) for x, y in held_out)))
    return Counts(tuple(right for right, _ in counts), counts[0][1])


def complete_data(recipe: RetrainRecipe, search: FinishedSearch) -> RetrainRecipe:
    """Return a recipe of which the data is given in full, as the search has it where the recipe does not say."""
    data = recipe.data.completed(search.child.data)
    return recipe.model_copy(update={"data": ChildData.model_validate(data.model_dump())})


def plan_trainings(
    paths: Sequence[CreamPath], recipe: RetrainRecipe, seeds: Sequence[int], folder: Path
) -> dict[CreamPath, dict[int, Training]]:
    """Say how each path is trained by itself, once with every seed.

    A training lies in a folder that is named after its path, so that further paths, seeds and searches find what has
    been trained before.

    Args:
        paths: the paths.
        recipe: how, its data given in full; its seed and rank do not count.
        seeds: at least one.
        folder: of the result.

    Returns:
        Of every path the trainings by their seeds.

    Raises:
        UserError: if there is a training by another recipe in one of the folders.
    """
    plan: dict[CreamPath, dict[int, Training]] = {}
    for number, path in enumerate(paths, start=1):
        plan[path] = {}
        for seed in seeds:
            own = recipe.model_copy(update={"seed": seed, "rank": 1})
            below = folder / "paths" / _folder_name(path) / f"seed{seed}"
            RunDirectory(below).refuse_another(to_yaml(own))
            plan[path][seed] = Training(
                f"path {number} of {len(paths)}, seed {seed}", own, Candidate(None, str(path)), below
            )
    return plan


def _folder_name(path: CreamPath) -> str:
    return "-".join(".".join(map(str, stage)) for stage in path.stages)


def count_test_images(recipe: RetrainRecipe) -> int:
    """Return the size of the part that trained networks are tested on, which no seed changes."""
    return len(load_splits(recipe.data.completed({}), seed=0).test)


def put_together(
    searches: Sequence[FinishedSearch],
    shared: Sequence[Counts],
    plan: Mapping[CreamPath, Mapping[int, Training]],
    test_images: int,
    folder: Path,
) -> str:
    """Correlate, and write ``rank_correlation.json``, ``.md``, ``.svg`` and ``.png`` into ``folder``.

    What counts of a path by itself is its accuracy on the test part, the mean over the seeds. The shared weights are
    judged on other images: on the same ones, a network that happens to be right on them would be so twice.

    Args:
        searches: in the order of the table; differences are to the first.
        shared: of each search the right answers of every path.
        plan: the trainings, which have ended.
        test_images: how many images the trained networks were tested on.
        folder: where to.

    Returns:
        The Markdown in the file.
    """
    summaries = [
        summarize({seed: RunDirectory(training.folder) for seed, training in trainings.items()})
        for trainings in plan.values()
    ]
    by_seed = [
        [round(measured["test_accuracy"] * test_images) for measured in summary["seeds"].values()]
        for summary in summaries
    ]
    alone = Counts(tuple(sum(row) for row in by_seed), test_images * len(by_seed[0]))
    estimates = [estimate_tau(counts.right, alone.right) for counts in shared]
    differences = [estimate_difference(counts.right, shared[0].right, alone.right) for counts in shared[1:]]
    seeds = tau_between_seeds(by_seed)
    names = _names(searches)

    write_json(
        folder / f"{NAME}.json",
        {
            "searches": {
                name: {
                    "folder": str(search.directory.path.resolve()),
                    "tau": asdict(estimate),
                    "held_out_images": counts.images,
                }
                for name, search, estimate, counts in zip(names, searches, estimates, shared, strict=True)
            },
            "differences_to_the_first": {
                name: asdict(difference) for name, difference in zip(names[1:], differences, strict=True)
            },
            "tau_between_seeds": seeds,
            "test_images": test_images,
            "paths": [
                {
                    "path": path.to_json(),
                    **summary,
                    "shared_accuracy": {
                        name: counts.accuracies[place] for name, counts in zip(names, shared, strict=True)
                    },
                }
                for place, (path, summary) in enumerate(zip(plan, summaries, strict=True))
            ],
            **describe_environment(),
        },
    )
    panels = [
        Panel(name, counts.accuracies, counts.images, str(estimate))
        for name, counts, estimate in zip(names, shared, estimates, strict=True)
    ]
    save_figure(draw_rank_correlation(panels, alone.accuracies, test_images), folder, NAME)
    text = _table_of_searches(names, len(plan), estimates, differences, seeds)
    text += "\n" + _table_of_paths(names, list(plan), summaries, shared)
    # Last: whoever reads it finds the rest.
    write_text(folder / f"{NAME}.md", text)
    return text


def tau_between_seeds(right: Sequence[Sequence[int]]) -> float | None:
    """Return τ of the orders that two seeds give the paths, the mean over all pairs of seeds.

    Shared weights cannot be expected to agree with a training better than another training does.

    Args:
        right: of every path the right answers with each seed.

    Returns:
        None if there is one seed, or one gives no order.
    """
    taus = [kendall_tau(one, other) for one, other in itertools.combinations(zip(*right, strict=True), 2)]
    defined = [tau for tau in taus if tau is not None]
    return statistics.fmean(defined) if defined and len(defined) == len(taus) else None


def _names(searches: Sequence[FinishedSearch]) -> list[str]:
    """Name searches after their folders; where two have the same name, by the whole path."""
    names = [search.name for search in searches]
    return names if len(set(names)) == len(names) else [str(search.directory.path) for search in searches]


def _table_of_searches(
    names: Sequence[str],
    paths: int,
    estimates: Sequence[Estimate],
    differences: Sequence[Estimate],
    seeds: float | None,
) -> str:
    several = len(names) > 1
    header, more = f"| search | paths | Kendall's τ [{LEVEL} % interval] |", f" difference to {names[0]} |"
    lines = [header + more * several, "|---|---|---|" + "---|" * several]
    for name, estimate, difference in zip(names, estimates, ["", *differences], strict=True):
        lines.append(f"| {name} | {paths} | {estimate} |" + f" {difference} |" * several)
    if seeds is not None:
        lines.append(f"| one seed of the trainings against another | {paths} | {seeds:.2f} |" + " |" * several)
    return "\n".join(lines) + "\n"


def _table_of_paths(
    names: Sequence[str], paths: Sequence[CreamPath], summaries: Sequence[Mapping[str, Any]], shared: Sequence[Counts]
) -> str:
    lines = [
        "| path | MACs (M) | parameters (M) | trained: test accuracy |"
        + "".join(f" shared weights: {name} |" for name in names),
        "|---|---|---|---|" + "---|" * len(names),
    ]
    for place, (path, summary) in enumerate(zip(paths, summaries, strict=True)):
        cost = f"{summary['flops'] / 1e6:.2f} | {summary['params'] / 1e6:.3f}"
        measured = "".join(f" {counts.accuracies[place]:.4f} |" for counts in shared)
        lines.append(f"| `{path}` | {cost} | {Spread(**summary['test_accuracy'])} |{measured}")
    return "\n".join(lines) + "\n"
