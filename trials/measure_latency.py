"""Measure what the blocks of a Cream network take on this machine: the table of a budget of time.

    python trials/measure_latency.py                   # for the recipe of `make search`, into latency.json
    python trials/measure_latency.py --recipe experiments/recipes/cream_imagenet.yml --device cuda --output h100.json

It has to run where the networks will. Nothing else should be busy there meanwhile. It ends with what random networks
took as a whole, beside what the table predicts.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from nni_cream.cli import make_settings_parser, refuse_unwritable, run, settings_of
from nni_cream.errors import UserError
from nni_cream.imports import large_imports
from nni_cream.recipe import CreamRecipe
from nni_cream.recipe_files import load_recipe


def main() -> None:
    """Read the settings, measure, and say how good the predictions are."""
    parser = make_settings_parser(__doc__, ROOT / "experiments/recipes/cream_mnist5k.yml")
    parser.add_argument("--output", type=Path, default=Path("latency.json"), help="the table (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=1, help="images at a time (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="that torch computes with on the CPU (default: its own choice)")
    parser.add_argument(
        "--precision",
        choices=("32-true", "16-true", "bf16-true"),
        default="32-true",
        help="of weights and images (default: %(default)s)",
    )
    parser.add_argument(
        "--children",
        type=int,
        default=10,
        help="random networks that set the factor, and as many more that test it (default: %(default)s)",
    )
    parser.add_argument(
        "--classes", type=int, help="number of classes (default: that of the recipe's data, which is loaded for it)"
    )
    arguments = parser.parse_args()
    limits = {
        "batch-size": (1, 10_000),
        "threads": (1, os.cpu_count() or 1),
        "children": (3, 1000),
        "classes": (1, 10**6),
    }
    for option, (least, most) in limits.items():
        value = getattr(arguments, option.replace("-", "_"))
        if value is not None and not least <= value <= most:
            raise UserError(f"--{option} is {value}, but should be from {least} to {most:,}.")
    recipe = load_recipe(CreamRecipe, arguments.recipe, settings_of(arguments))
    refuse_unwritable(arguments.output)

    with large_imports():
        from nni_cream.timing import measure_latency, print_latency, space_of

    space, resolution = space_of(recipe, arguments.classes)
    print(f"Measuring blocks and {2 * arguments.children} networks, with images of {resolution} pixels.", flush=True)
    table = measure_latency(
        space,
        resolution,
        batch_size=arguments.batch_size,
        device=arguments.device,
        threads=arguments.threads,
        precision=arguments.precision,
        networks=arguments.children,
    )
    table.save(arguments.output)
    print_latency(table, space, arguments.output)


if __name__ == "__main__":
    run(main, goes_on=False)
