"""Measure how well the shared weights of searches rank networks: Kendall's τ against training each by itself.

    python trials/rank_correlation.py --search runs/cream_mnist5k
    python trials/rank_correlation.py --search runs/cream_mnist5k runs/uniform_mnist5k --paths 20 --workers 2

Random paths inside the FLOPs interval of the searches are judged with the shared weights of each search, and trained
from scratch, once for all searches. It ends with a table, also in rank_correlation.md, and with rank_correlation.json,
.svg and .png beside it. Given again, it goes on where it was interrupted.

As a trial of NNI (experiments/rank_correlation.yml) it trains one path, whose number the search space gives as `path`,
and leaves it where this command then finds it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from nni_cream.cli import make_settings_parser, open_run, overrides_of, refuse_twice, run
from nni_cream.errors import UserError
from nni_cream.imports import large_imports
from nni_cream.recipe import RetrainRecipe
from nni_cream.recipe_files import load_recipe
from nni_cream.runs import RUNS

LARGEST_SEED = 2**32 - 1


def refuse_number(option: str, value: int, least: int, most: int) -> None:
    """Make sure that the value of an option is in its range.

    Raises:
        UserError: if it is not.
    """
    if not least <= value <= most:
        raise UserError(f"{option} is {value}, but should be from {least} to {most}.")


def main() -> None:
    """Read the settings, train what has not been trained, and print the table."""
    parser = make_settings_parser(__doc__, ROOT / "experiments/recipes/retrain_mnist5k.yml")
    parser.add_argument("--search", type=Path, nargs="+", required=True, help="folders of Cream searches of one space")
    parser.add_argument("--paths", type=int, default=20, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="that the paths are drawn with (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", help="of the trainings, whose mean counts")
    parser.add_argument("--workers", type=int, default=1, help="trainings at a time (default: %(default)s)")
    parser.add_argument("--name", help="name of the folder below runs/ (default: rank_correlation)")
    parser.add_argument("--output", type=Path, help="folder of all that is made (default: runs/<name>)")
    arguments = parser.parse_args()
    # Of two paths there are two orders.
    refuse_number("--paths", arguments.paths, 3, 1000)
    refuse_number("--seed", arguments.seed, 0, LARGEST_SEED)
    refuse_number("--workers", arguments.workers, 1, 1024)
    refuse_twice("--search", [folder.resolve() for folder in arguments.search])
    refuse_twice("--seeds", arguments.seeds or [])

    overrides = overrides_of(arguments)
    under_nni = "NNI_PLATFORM" in os.environ
    number = overrides.pop("path", None) if under_nni else None
    if under_nni and not (type(number) is int and 1 <= number <= arguments.paths):
        raise UserError(
            f"A trial of NNI trains one path, but its 'path' is {number!r}: let the search space give a number from 1 "
            f"to --paths, {arguments.paths} (path: {{_type: choice, _value: [1, 2, …]}})."
        )
    if arguments.seeds is not None and under_nni:
        raise UserError("A trial of NNI trains once: leave out --seeds, and let the search space give a seed.")
    if arguments.seeds is not None and "seed" in overrides:
        raise UserError("--seeds and --set seed=… both give seeds; leave one out.")
    overrides.setdefault("name", "rank_correlation")
    recipes = [
        load_recipe(RetrainRecipe, arguments.recipe, {**overrides, **given})
        for given in ([{}] if arguments.seeds is None else [{"seed": seed} for seed in arguments.seeds])
    ]
    recipe = recipes[0]
    if recipe.inherit_weights:
        raise UserError("inherit_weights is on, but every path is trained from scratch here; leave it off.")
    if recipe.device.devices > 1:
        raise UserError(
            f"device.devices is {recipe.device.devices}, but each path is trained on one device here, and --workers "
            "says how many at a time; leave it at 1."
        )
    folder = arguments.output or RUNS / recipe.name

    with large_imports():
        from nni_cream.rank_correlation import (
            FinishedSearch,
            complete_data,
            count_shared,
            count_test_images,
            draw_samples,
            plan_trainings,
            put_together,
        )
        from nni_cream.retrain import retrain
        from nni_cream.side_by_side import share_cores, train_all

    searches = [FinishedSearch.open(search) for search in arguments.search]
    samples = draw_samples(searches, arguments.paths, arguments.seed)
    recipe = complete_data(recipe, searches[0])
    plan = plan_trainings(list(samples), recipe, [own.seed for own in recipes], folder)
    if number is not None:
        (training,) = list(plan.values())[number - 1].values()
        share_cores(arguments.workers)
        retrain(training.recipe, training.candidate, open_run(training.recipe, training.folder))
        return
    shared = [count_shared(search, list(samples.values())) for search in searches]
    test_images = count_test_images(recipe)
    train_all([training for trainings in plan.values() for training in trainings.values()], arguments.workers)
    text = put_together(searches, shared, plan, test_images, folder)
    print(f"folder: {folder.resolve()}")
    print(text, end="", flush=True)


if __name__ == "__main__":
    run(main)
