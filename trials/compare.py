"""Train what a search found, random networks of its space, and standard ones by one recipe, and compare them.

    python trials/compare.py                                   # the child of the newest search
    python trials/compare.py --child runs/cream_mnist5k/child.json --seeds 0 1 2 --random 3

All are trained with every seed, for as many epochs, on the same images. It ends with a table, also in comparison.md
and, with what each training has measured, comparison.json. Given again, it goes on where it was interrupted.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from nni_cream.child import Child
from nni_cream.cli import make_parser, overrides_of, refuse_nni, refuse_twice, run
from nni_cream.errors import UserError
from nni_cream.genotype import Genotype
from nni_cream.imports import large_imports
from nni_cream.recipe import CreamRecipe, RetrainRecipe
from nni_cream.recipe_files import load_recipe
from nni_cream.runs import RunDirectory, newest_search
from nni_cream.settings import ChildData


def main() -> None:
    """Read the settings, train, and print the table."""
    parser = make_parser(__doc__, None)
    parser.add_argument("--child", type=Path, help="child.json of a search (default: the newest below runs/)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the trainings (default: 0 1 2)")
    parser.add_argument("--random", type=int, default=3, help="how many random networks (default: %(default)s)")
    parser.add_argument(
        "--networks", nargs="*", help="timm's names of others (default: the MobileNetV3 nearest in cost, and resnet18)"
    )
    arguments = parser.parse_args()
    refuse_nni("trials/compare.py")
    refuse_twice("--seeds", arguments.seeds)
    refuse_twice("--networks", arguments.networks or [])
    if arguments.random < 0:
        raise UserError(f"--random is {arguments.random}; give a number of networks, 0 for none.")
    file = arguments.child or newest_search()
    if file is None:
        raise UserError("No search has run yet (there is no child.json below runs/): run one, or give its --child.")
    child = Child.load(file)
    genotype = isinstance(child.architecture, Genotype)
    quick = "retrain_darts_mnist5k.yml" if genotype else "retrain_mnist5k.yml"
    overrides = overrides_of(arguments)
    if "seed" in overrides:
        raise UserError("--seeds and --set seed=… both give seeds; leave out the second.")
    overrides.setdefault("name", f"compare-{file.resolve().parent.name}")
    training = arguments.recipe or ROOT / "experiments/recipes" / quick
    recipes = [load_recipe(RetrainRecipe, training, {**overrides, "seed": seed}) for seed in arguments.seeds]
    recipe = recipes[0]
    if recipe.inherit_weights:
        raise UserError("inherit_weights is on, but only the child has weights to inherit; leave it off to compare.")
    child = child.ranked(recipe.rank)
    data = recipe.data.completed(child.data)
    recipe = recipe.model_copy(update={"data": ChildData.model_validate(data.model_dump())})
    search = None if genotype else load_recipe(CreamRecipe, file.with_name("recipe.yml"), {})
    folder = RunDirectory.for_run(recipe.name, arguments.output).path

    with large_imports():
        from nni_cream.compare import compare, kept_table, line_up, refuse_unfit, table

    latency = None if search is None else kept_table(search, RunDirectory(file.parent))
    contestants = line_up(child, search, data.resolution, arguments.random, arguments.networks, 0, latency)
    refuse_unfit(recipe, contestants, child.num_classes)
    rows = compare(recipe, contestants, arguments.seeds, folder)
    print(f"folder: {folder.resolve()}")
    print(table(rows), end="", flush=True)


if __name__ == "__main__":
    run(main)
