"""Test a checkpoint: its accuracy on the test part of the data, its FLOPs and its parameters.

    python trials/test_child.py                       # the newest training below runs/
    python trials/test_child.py --checkpoint runs/cream_mnist5k/child.json
    python trials/test_child.py --checkpoint 287.pth.tar --model cream_287 \
        --set data.name=imagenet --set data.folder=/data/imagenet

It writes no file, and reports nothing to NNI: a tuner must not steer by the test part.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from nni_cream.cli import add_checkpoint_options, checkpoint_of, make_settings_parser, run, settings_of
from nni_cream.imports import large_imports
from nni_cream.recipe import EvaluationRecipe
from nni_cream.recipe_files import load_recipe


def main() -> None:
    """Read the settings and test."""
    parser = make_settings_parser(__doc__, ROOT / "experiments/recipes/test_child.yml")
    add_checkpoint_options(parser)
    arguments = parser.parse_args()
    recipe = load_recipe(EvaluationRecipe, arguments.recipe, settings_of(arguments))
    file = checkpoint_of(arguments)

    with large_imports():
        from nni_cream.evaluate import evaluate, print_evaluation

    print(f"Testing {file}.", flush=True)
    print_evaluation(evaluate(recipe, file, arguments.model, use_ema=arguments.weights == "ema"))


if __name__ == "__main__":
    run(main, goes_on=False)
