"""Train the network that a search found, and report its accuracy on the test part.

    python trials/retrain_child.py                       # the child of the newest search
    python trials/retrain_child.py --child runs/cream_mnist5k/child.json

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

from nni_cream.child import Candidate
from nni_cream.cli import make_parser, overrides_of, run
from nni_cream.errors import UserError
from nni_cream.genotype import Genotype
from nni_cream.recipe import RetrainRecipe, load_recipe, to_yaml
from nni_cream.runs import RunDirectory, newest_search


def main() -> None:
    """Read the settings and train."""
    parser = make_parser(__doc__, None)
    parser.add_argument("--child", type=Path, help="child.json of a search (default: the newest below runs/)")
    arguments = parser.parse_args()
    file = arguments.child or newest_search()
    if file is None:
        print("No search has run yet (there is no child.json below runs/): training the published cream_14 instead.")
    elif not file.exists():
        raise UserError(f"There is no child {file}; a search writes child.json into its run directory.")
    else:
        print(f"Training the child of {file}.")
    candidate = Candidate(file)
    child = candidate.load()
    quick = "retrain_darts_mnist5k.yml" if child and isinstance(child.architecture, Genotype) else "retrain_mnist5k.yml"
    overrides = overrides_of(arguments)
    overrides.setdefault("name", f"retrain-{file.resolve().parent.name}" if file else "retrain-cream_14")
    recipe = load_recipe(RetrainRecipe, arguments.recipe or ROOT / "experiments/recipes" / quick, overrides)
    directory = RunDirectory.for_run(recipe.name, arguments.output)
    directory.refuse_another(to_yaml(recipe))

    from nni_cream.retrain import retrain

    retrain(recipe, candidate, directory)


if __name__ == "__main__":
    run(main)
