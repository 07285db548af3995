"""Compare Cream's ways to pick a teacher at equal time, on real images (``mnist5k``).

    python benchmarks/compare_teachers.py

Three settings of one strategy: ``matching`` (the matching layer picks the teacher), ``top1`` (the best path of the
board teaches), and ``none`` (plain uniform single-path training). First each setting searches once for as many epochs
as the recipe says, and the processor time that this takes tells for how many epochs each may search. Then every
setting searches with every seed, and every path that is found is retrained from scratch with that seed. Each search
and each training is one of the ordinary trials, on one thread, so that processor time is what a search costs whatever
else the machine is doing. What
has ended is not run again.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from nni_cream.recipe import CreamRecipe, load_recipe
from nni_cream.runs import describe_environment, read_json, write_json

TEACHERS = ("matching", "top1", "none")
RECIPE = ROOT / "experiments/recipes/cream_mnist5k.yml"
RETRAIN_RECIPE = ROOT / "experiments/recipes/retrain_mnist5k.yml"
RESULT = ROOT / "benchmarks/results/compare_teachers.json"


def run_trial(script: str, output: Path, *arguments: str) -> float:
    """Run a trial in ``output``, unless it has ended there before, and return its processor time in seconds."""
    note = output / "processor_time.json"
    if note.exists():
        return float(read_json(note, "note of processor time")["seconds"])
    if output.exists():
        # Going on where it was interrupted would leave out the time that it took until then.
        shutil.rmtree(output)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, str(ROOT / "trials" / script), "--output", str(output), *arguments]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, cwd=ROOT, env=one_thread, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)
    write_json(note, {"seconds": seconds})
    return seconds


def search(output: Path, teacher: str, seed: int, epochs: int, warmup_epochs: int) -> float:
    """Search once, and return its processor time in seconds."""
    settings = {
        "cream.teacher": teacher,
        "seed": seed,
        "epochs": epochs,
        "cream.warmup_epochs": warmup_epochs,
    }
    overrides = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return run_trial("search_cream.py", output, "--recipe", str(RECIPE), *overrides)


def mean_and_spread(values: list[float]) -> dict[str, float]:
    """Return mean and standard deviation (n − 1)."""
    return {"mean": statistics.mean(values), "sd": statistics.stdev(values) if len(values) > 1 else 0.0}


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

    write_json(
        RESULT,
        {
            "what": "accuracy of retrained paths, one strategy with three ways to pick a teacher, equal processor time",
            "data": recipe.data.name,
            "seeds": arguments.seeds,
            "settings": settings,
            "processor": processor(),
            "commit": commit(),
            **describe_environment(),
        },
    )
    print(table(settings))


def commit() -> str:
    """Return the commit that was measured."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def processor() -> str:
    """Return the processor's name."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


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
