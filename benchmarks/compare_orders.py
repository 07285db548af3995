"""Compare DARTS of first order, with the published finite difference, and exact, at equal steps on real images.

    python benchmarks/compare_orders.py

Every kind of hypergradient searches ``mnist5k`` with every seed, for the same number of steps; every genotype is
retrained from scratch with that seed. Each search and each training is one of the ordinary trials, on one thread, and
two run at a time. What has ended is not run again.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import ROOT, mean_and_spread, run_trial, save_result, settings_arguments

from nni_cream.genotype import Genotype
from nni_cream.recipe import DartsRecipe
from nni_cream.recipe_files import load_recipe
from nni_cream.runs import read_json

KINDS: dict[str, dict[str, Any]] = {
    "first order": {"darts.order": "first"},
    "finite difference": {"darts.order": "second", "darts.hypergradient": "finite_difference"},
    "exact": {"darts.order": "second", "darts.hypergradient": "exact"},
}
RECIPE = ROOT / "experiments/recipes/darts_mnist5k.yml"
RETRAIN_RECIPE = ROOT / "experiments/recipes/retrain_darts_mnist5k.yml"
MEASURED = ("search_seconds", "supernet_accuracy", "test_accuracy", "skip_connections", "params")


def run(kind: str, seed: int, folder: Path) -> dict[str, Any]:
    """Search and retrain once, and return what came out."""
    name = f"{kind.replace(' ', '-')}-{seed}"
    searched, trained = folder / name, folder / f"{name}-retrained"
    settings = settings_arguments({**KINDS[kind], "seed": seed})
    seconds = run_trial("search_darts.py", searched, "--recipe", str(RECIPE), *settings)
    child = ("--child", str(searched / "child.json"))
    run_trial("retrain_child.py", trained, "--recipe", str(RETRAIN_RECIPE), *child, *settings_arguments({"seed": seed}))
    found = read_json(searched / "child.json", "child of a search")
    result = read_json(trained / "result.json", "result of a training")
    genotype = Genotype.of(found["genotype"])
    print(f"{kind}, seed {seed}: test accuracy {result['test_accuracy']:.4f}", flush=True)
    return {
        "seed": seed,
        "search_seconds": seconds,
        "genotype": str(genotype),
        "skip_connections": genotype.skip_connections("normal"),
        "supernet_accuracy": found["search"]["supernet_accuracy"],
        "params": result["params"],
        "test_accuracy": result["test_accuracy"],
    }


def main() -> None:
    """Run what has not been run, write the result, and print it as a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=ROOT / "runs/compare_orders", help="where the runs are kept")
    arguments = parser.parse_args()
    recipe = load_recipe(DartsRecipe, RECIPE, {})
    with ThreadPoolExecutor(max_workers=2) as pool:
        started = {
            kind: [pool.submit(run, kind, seed, arguments.output) for seed in range(arguments.seeds)] for kind in KINDS
        }
        runs = {kind: [future.result() for future in futures] for kind, futures in started.items()}
    settings: dict[str, dict[str, Any]] = {
        kind: {**{key: mean_and_spread([run[key] for run in found]) for key in MEASURED}, "runs": found}
        for kind, found in runs.items()
    }
    save_result(
        "compare_orders",
        {
            "what": "retrained genotypes of three kinds of hypergradient, at equal steps",
            "data": recipe.data.name,
            "seeds": arguments.seeds,
            "settings": settings,
        },
    )
    print(table(settings))


def table(settings: dict[str, dict[str, Any]]) -> str:
    """Write the result as a Markdown table."""
    rows = [
        "| hypergradient | search, s | supernet: validation | retrained: test | by seed | skips | parameters |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind, setting in settings.items():
        time, supernet, test, skips, params = (setting[key] for key in MEASURED)
        single = ", ".join(f"{100 * run['test_accuracy']:.1f}" for run in setting["runs"])
        rows.append(
            f"| {kind} | {time['mean']:.0f} ± {time['sd']:.0f} | {100 * supernet['mean']:.2f} ± "
            f"{100 * supernet['sd']:.2f} % | {100 * test['mean']:.2f} ± {100 * test['sd']:.2f} % | {single} | "
            f"{skips['mean']:.1f} | {params['mean'] / 1e3:.0f} ± {params['sd'] / 1e3:.0f} K |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    main()
