"""Compare Cream's ways to pick a teacher at equal time, on real images (``mnist5k``).

    python benchmarks/compare_teachers.py

Three settings of one strategy: ``matching`` (the matching layer picks the teacher), ``top1`` (the best path of the
board teaches), and ``none`` (plain uniform single-path training). First each setting searches once for as many epochs
as the recipe says, and the processor time that this takes tells for how many epochs each may search. Then every
setting searches with every seed, and every path that is found is retrained from scratch with that seed. Each search
and each training is one of the ordinary trials, on one thread. What has ended is not run again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from common import ROOT, mean_and_spread, run_trial, save_result, settings_arguments

from nni_cream.recipe import CreamRecipe
from nni_cream.recipe_files import load_recipe
from nni_cream.runs import read_json

TEACHERS = ("matching", "top1", "none")
RECIPE = ROOT / "experiments/recipes/cream_mnist5k.yml"
RETRAIN_RECIPE = ROOT / "experiments/recipes/retrain_mnist5k.yml"


def search(output: Path, teacher: str, seed: int, epochs: int, warmup_epochs: int) -> float:
    """Search once, and return its processor time in seconds."""
    settings = {
        "cream.teacher": teacher,
        "seed": seed,
        "epochs": epochs,
        "cream.warmup_epochs": warmup_epochs,
    }
    return run_trial("search_cream.py", output, "--recipe", str(RECIPE), *settings_arguments(settings))


def main() -> None:
    """Run what has not been run, write the result, and print it as a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=ROOT / "runs/compare_teachers", help="where the runs are kept")
    arguments = parser.parse_args()
    recipe = load_recipe(CreamRecipe, RECIPE, {})
    epochs, warmup = recipe.epochs, recipe.cream.warmup_epochs

    seconds = {
        teacher: search(arguments.output / f"calibration-{teacher}", teacher, recipe.seed, epochs, warmup)
        for teacher in TEACHERS
    }
    budget = seconds["matching"]
    settings: dict[str, dict[str, Any]] = {}
    for teacher in TEACHERS:
        more = budget / seconds[teacher]
        settings[teacher] = {
            "epochs": round(epochs * more),
            "warmup_epochs": round(warmup * more),
            "calibration_seconds": seconds[teacher],
            "runs": [],
        }
    for seed in range(arguments.seeds):
        for teacher, setting in settings.items():
            folder = arguments.output / f"{teacher}-{seed}"
            time = search(folder, teacher, seed, setting["epochs"], setting["warmup_epochs"])
            child = folder / "child.json"
            retrained = arguments.output / f"{teacher}-{seed}-retrained"
            overrides = ("--recipe", str(RETRAIN_RECIPE), "--child", str(child), "--set", f"seed={seed}")
            run_trial("retrain_child.py", retrained, *overrides)
            found = read_json(child, "child of a search")
            result = read_json(retrained / "result.json", "result of a training")
            setting["runs"].append(
                {
                    "seed": seed,
                    "search_seconds": time,
                    "path": found["path"],
                    "flops": found["flops"],
                    "shared_accuracy": found["accuracy"],
                    "validation_accuracy": result["val_accuracy"],
                    "test_accuracy": result["test_accuracy"],
                }
            )
            print(f"{teacher}, seed {seed}: test accuracy {result['test_accuracy']:.4f}", flush=True)
    for setting in settings.values():
        for key in ("search_seconds", "shared_accuracy", "validation_accuracy", "test_accuracy"):
            setting[key] = mean_and_spread([run[key] for run in setting["runs"]])

    save_result(
        "compare_teachers",
        {
            "what": "accuracy of retrained paths, one strategy with three ways to pick a teacher, equal processor time",
            "data": recipe.data.name,
            "seeds": arguments.seeds,
            "settings": settings,
        },
    )
    print(table(settings))


def table(settings: dict[str, dict[str, Any]]) -> str:
    """Write the result as a Markdown table."""
    rows = [
        "| `cream.teacher` | epochs | search, s | accuracy with shared weights | retrained: test accuracy | by seed |",
        "|---|---|---|---|---|---|",
    ]
    for teacher, setting in settings.items():
        time, shared, test = (setting[key] for key in ("search_seconds", "shared_accuracy", "test_accuracy"))
        single = ", ".join(f"{100 * run['test_accuracy']:.1f}" for run in setting["runs"])
        rows.append(
            f"| {teacher} | {setting['epochs']} | {time['mean']:.0f} ± {time['sd']:.0f} | "
            f"{100 * shared['mean']:.2f} ± {100 * shared['sd']:.2f} % | "
            f"{100 * test['mean']:.2f} ± {100 * test['sd']:.2f} % | {single} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    main()
