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

from nni_cream.cli import make_settings_parser, run, settings_of
from nni_cream.errors import UserError
from nni_cream.recipe import EvaluationRecipe, load_recipe
from nni_cream.runs import newest_training


def main() -> None:
    """Read the settings and test."""
    parser = make_settings_parser(__doc__, ROOT / "experiments/recipes/test_child.yml")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="model.safetensors of a training, child.json of a search, or a checkpoint of another program (default: "
        "the newest training below runs/)",
    )
    parser.add_argument("--model", help="timm's name of the network, for a checkpoint that does not say it")
    parser.add_argument(
        "--weights",
        choices=("ema", "plain"),
        default="ema",
        help="which weights to take from a checkpoint that has averaged (EMA) and plain ones (default: %(default)s)",
    )
    arguments = parser.parse_args()
    recipe = load_recipe(EvaluationRecipe, arguments.recipe, settings_of(arguments))
    file = arguments.checkpoint or newest_training()
    if file is None:
        raise UserError(
            "No training has ended yet (there is no model.safetensors below runs/): run trials/retrain_child.py first, "
            "or give a --checkpoint."
        )

    from nni_cream.evaluate import evaluate, print_evaluation

    print(f"Testing {file}.", flush=True)
    print_evaluation(evaluate(recipe, file, arguments.model, use_ema=arguments.weights == "ema"))


if __name__ == "__main__":
    run(main)
