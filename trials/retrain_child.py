"""Train the network that a search found, and report its accuracy on the test part.

    python trials/retrain_child.py                       # the child of the newest search
    python trials/retrain_child.py --child runs/cream_mnist5k/child.json
    python trials/retrain_child.py --architecture "[[0], [0], [3], [4, 0, 3], [2], [3], [0]]" --name by-hand
    python trials/retrain_child.py --seeds 0 1 2         # mean and spread, in seed0/, seed1/, seed2/ and summary.json

Where no search has run yet, the published 14 M network is trained instead. Unless a recipe is given, the settings
are those for small images: experiments/recipes/retrain_mnist5k.yml for a path of Cream, retrain_darts_mnist5k.yml for
a genotype of DARTS.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

# NNI copies this tree to machines on which only its dependencies are installed.
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from nni_cream.architecture import CreamPath
from nni_cream.child import Candidate
from nni_cream.cli import make_parser, open_run, overrides_of, refuse_nni, refuse_twice, run
from nni_cream.errors import UserError
from nni_cream.genotype import Genotype
from nni_cream.imports import large_imports
from nni_cream.recipe import RetrainRecipe
from nni_cream.recipe_files import load_recipe
from nni_cream.runs import RunDirectory, newest_search


def chosen(file: Path | None, architecture: str | None) -> Candidate:
    """Choose what is trained, and say so."""
    if architecture is not None:
        architecture = architecture.strip()
        if architecture.startswith("["):
            CreamPath.parse(architecture)
        elif architecture.startswith("Genotype("):
            Genotype.parse(architecture)
        print(f"Training {architecture}.", flush=True)
        return Candidate(None, architecture)
    file = file or newest_search()
    if file is None:
        print("No search has run yet (there is no child.json below runs/): training the published cream_14 instead.")
    # Unlike the path's own, this is no error where the folder must not be looked into.
    elif not os.path.exists(file):
        raise UserError(f"There is no child {file} to be read; a search writes child.json into its run directory.")
    else:
        print(f"Training the child of {file}.", flush=True)
    return Candidate(file)


def default_name(candidate: Candidate) -> str:
    """Name the run after what is trained."""
    if candidate.file is not None:
        return f"retrain-{candidate.file.resolve().parent.name}"
    described = candidate.name.startswith(("[", "Genotype("))
    return "retrain-architecture" if described else f"retrain-{candidate.name}"


def main() -> None:
    """Read the settings and train."""
    parser = make_parser(__doc__, None)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--child", type=Path, help="child.json of a search (default: the newest below runs/)")
    source.add_argument(
        "--architecture",
        help="a path or a genotype as a search reports it, also from another machine, or timm's name of a network",
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="train once with each, and tell mean and spread")
    arguments = parser.parse_args()
    if arguments.seeds is not None:
        refuse_nni("--seeds")
        refuse_twice("--seeds", arguments.seeds)
    candidate = chosen(arguments.child, arguments.architecture)
    child = candidate.load()
    genotype = isinstance(child.architecture, Genotype) if child else candidate.name.startswith("Genotype(")
    quick = "retrain_darts_mnist5k.yml" if genotype else "retrain_mnist5k.yml"
    overrides = overrides_of(arguments)
    overrides.setdefault("name", default_name(candidate))
    file = arguments.recipe or ROOT / "experiments/recipes" / quick
    if arguments.seeds is not None:
        train_seeds(arguments.seeds, file, overrides, candidate, arguments.output)
        return
    recipe = load_recipe(RetrainRecipe, file, overrides)
    directory = open_run(recipe, arguments.output)

    with large_imports():
        from nni_cream.retrain import retrain

    retrain(recipe, candidate, directory)


def train_seeds(
    seeds: list[int], file: Path, overrides: dict[str, Any], candidate: Candidate, output: Path | None
) -> None:
    """Train with each of ``seeds``, in folders of their own.

    Raises:
        UserError: as :func:`nni_cream.cli.open_run` and :func:`nni_cream.retrain.refuse_another_training`, for every
            seed before the first is trained with.
    """
    if "seed" in overrides:
        raise UserError("--seeds and --set seed=… both give seeds; leave one out.")
    recipes = [load_recipe(RetrainRecipe, file, {**overrides, "seed": seed}) for seed in seeds]
    folder = RunDirectory.for_run(recipes[0].name, output).path
    if (folder / "recipe.yml").exists():
        raise UserError(f"{folder} holds a training of one seed; choose another folder with --name.")
    runs = [(recipe, open_run(recipe, folder / f"seed{recipe.seed}")) for recipe in recipes]

    with large_imports():
        from nni_cream.retrain import refuse_another_training
        from nni_cream.seeds import retrain_seeds

    for recipe, directory in runs:
        refuse_another_training(recipe, candidate, directory)
    retrain_seeds(runs, candidate, folder)


if __name__ == "__main__":
    run(main)
