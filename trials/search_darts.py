"""Search cells with DARTS.

    python trials/search_darts.py --recipe experiments/recipes/darts_mnist5k.yml

The same command is the trial of ``experiments/darts.yml``; without NNI it reports to the terminal. It ends with
``child.json``, ``child.safetensors`` and ``report.html`` in the run directory. Given again, it goes on where it
was interrupted.
"""

from __future__ import annotations

import sys
from pathlib import Path

# NNI copies this tree to machines on which only its dependencies are installed.
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from nni_cream.cli import make_parser, open_run, overrides_of, run
from nni_cream.imports import large_imports
from nni_cream.recipe import DartsRecipe
from nni_cream.recipe_files import load_recipe


def main() -> None:
    """Read the settings and run the search."""
    arguments = make_parser(__doc__, ROOT / "experiments/recipes/darts_mnist5k.yml").parse_args()
    recipe = load_recipe(DartsRecipe, arguments.recipe, overrides_of(arguments))
    directory = open_run(recipe, arguments.output)

    with large_imports():
        from nni_cream.search_darts import search_darts

    search_darts(recipe, directory)


if __name__ == "__main__":
    run(main)
