"""Train the network that a search found, and report its accuracy on the test part.

    python trials/retrain_child.py                       # the child of the newest search
    python trials/retrain_child.py --child runs/cream_mnist5k/child.json
    python trials/retrain_child.py --architecture "[[0], [0], [3], [4, 0, 3], [2], [3], [0]]" --name by-hand

Where no search has run yet, the published 14 M network is trained instead. Unless a recipe is given, the settings
are those for small images: experiments/recipes/retrain_mnist5k.yml for a path of Cream, retrain_darts_mnist5k.yml for
a genotype of DARTS.
"""

from __future__ import annotations

import sys
from pathlib import Path

# NNI copies this tree to machines on which only its dependencies are installed.
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from nni_cream.architecture import CreamPath
from nni_cream.child import Candidate
from nni_cream.cli import make_parser, open_run, overrides_of, run
from nni_cream.errors import UserError
from nni_cream.genotype import Genotype
from nni_cream.recipe import RetrainRecipe, load_recipe
from nni_cream.runs import newest_search


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
    elif not file.exists():
        raise UserError(f"There is no child {file}; a search writes child.json into its run directory.")
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
    arguments = parser.parse_args()
    candidate = chosen(arguments.child, arguments.architecture)
    child = candidate.load()
    genotype = isinstance(child.architecture, Genotype) if child else candidate.name.startswith("Genotype(")
    quick = "retrain_darts_mnist5k.yml" if genotype else "retrain_mnist5k.yml"
    overrides = overrides_of(arguments)
    overrides.setdefault("name", default_name(candidate))
    recipe = load_recipe(RetrainRecipe, arguments.recipe or ROOT / "experiments/recipes" / quick, overrides)
    directory = open_run(recipe, arguments.output)

    from nni_cream.retrain import retrain

    retrain(recipe, candidate, directory)


if __name__ == "__main__":
    run(main)
