"""Measure everything on a GPU: steps, what they make of the card, and real searches.

    python benchmarks/on_gpu.py

needs a CUDA device, this repository and the installed package (NNI's Python part suffices), and no network. It runs

- the steps of the paper's setting (16 channels, 8 cells, batch 64, 32×32): NNI's DARTS, and ours of every order, in
  float32 and under bfloat16, as seconds a step, images a second, and hours of 50 epochs on half of CIFAR-10;
- one second-order step under torch's profiler: the share of the time in which a kernel runs, and the arithmetic and
  memory traffic of its operators against the card's own ceilings, measured here (a large matrix product, a large
  copy). Traffic is what every operator reads and writes, as if nothing stayed in a cache;
- both shipped searches on ``mnist5k``, whose images are in a Python package;
- the benchmarks of ``run_all.py``.

``--device cpu --quick`` runs the first three at a toy size, to see that they do run, and
keeps nothing; else ``benchmarks/results/on_gpu*.json`` is written.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import ROOT, judged, make_parser, save_result, seconds_of, table
from fused_cell import RESOLUTION, STEPS, be_quiet, search
from scaling import darts_step
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

# Channels, cells, batch.
PAPER, TOY = (16, 8, 64), (4, 3, 4)
# Half of the training images of CIFAR-10, for so many epochs.
IMAGES, EPOCHS = 25_000, 50
PRECISIONS = ("32-true", "bf16-mixed")
GOAL_HOURS = 1.0


class Traffic(TorchDispatchMode):
    """Adds up the bytes that operators read and write, those left out that only look at memory in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return result


def ceilings(device: str, quick: bool) -> dict[str, float]:
    """Return what the device reaches at its best: FLOP/s in float32, TF32 and bfloat16, and bytes/s of a copy."""
    size, length = (512, 2**20) if quick else (8192, 2**28)
    found: dict[str, float] = {}
    for name, dtype, tf32 in (
        ("float32", torch.float32, False),
        ("tf32", torch.float32, True),
        ("bfloat16", torch.bfloat16, False),
    ):
        a = torch.randn(size, size, device=device, dtype=dtype)
        torch.backends.cuda.matmul.allow_tf32 = tf32
        found[f"{name}_flops_per_second"] = 2 * size**3 / best(lambda a=a: a @ a, device)
    torch.backends.cuda.matmul.allow_tf32 = False
    source = torch.randn(length, device=device)
    target = torch.empty_like(source)
    found["bytes_per_second"] = 2 * 4 * length / best(lambda: target.copy_(source), device)
    return found


def best(work: Callable[[], Any], device: str) -> float:
    """Return the seconds of the fastest of a few calls."""
    return min(seconds_of(work, device) for _ in range(6))


def steps(shape: tuple[int, int, int], device: str, rounds: int) -> dict[str, Any]:
    """Return the time of a step of every kind, and what follows from it."""
    seconds: dict[str, list[float]] = {}
    for _ in range(rounds):
        for precision in PRECISIONS:
            for kind in STEPS:
                memory_format = torch.contiguous_format if kind == "NNI's DARTS" else torch.channels_last
                found = search(kind, shape, memory_format, 8, device, precision)
                seconds.setdefault(f"{kind}, {precision}", []).extend(found)
    batch = shape[2]
    rows = {}
    for name, times in seconds.items():
        step = statistics.median(times)
        hours = step * EPOCHS * (IMAGES // batch) / 3600
        rows[name] = {"seconds": step, "images_per_second": batch / step, "hours_of_50_epochs": hours, "all": times}
    return rows


def inside(shape: tuple[int, int, int], device: str, limits: dict[str, float]) -> dict[str, Any]:
    """Return what a second-order step makes of the device."""
    channels, cells, batch = shape
    work = darts_step("exact", device, batch, channels, cells, RESOLUTION)
    for _ in range(3):
        work()
    step = statistics.median(seconds_of(work, device) for _ in range(5))
    with FlopCounterMode(display=False) as counted:
        work()
    with Traffic() as traffic:
        work()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as profiled:
        work()
    events = profiled.key_averages()
    attribute = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    busy = sum(getattr(event, attribute) for event in events) / 1e6
    slowest = sorted(events, key=lambda event: -getattr(event, attribute))[:15]
    flops, moved = counted.get_total_flops() / step, traffic.bytes / step
    return {
        "seconds": step,
        "share_of_time_in_kernels": min(1.0, busy / step),
        "flops_per_second": flops,
        "share_of_float32_ceiling": flops / limits["float32_flops_per_second"],
        "bytes_per_second": moved,
        "share_of_bandwidth_ceiling": moved / limits["bytes_per_second"],
        "slowest": {event.key: getattr(event, attribute) / 1e6 for event in slowest},
    }


def real_search(script: str, recipe: str, device: str, quick: bool) -> dict[str, Any]:
    """Run a shipped search, and return what it found and how long it took."""
    accelerator = "gpu" if device == "cuda" else "cpu"
    settings = [f"device.accelerator={accelerator}"]
    if quick:
        settings += ["epochs=1", "data.architecture_fraction=0.05", "data.validation_fraction=0.9"]
        settings += ["cream.warmup_epochs=0"] if "cream" in recipe else ["darts.order=first", "darts.warmup_epochs=0"]
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            str(ROOT / "trials" / script),
            "--recipe",
            str(ROOT / "experiments/recipes" / recipe),
        ]
        command += ["--output", folder, *(part for setting in settings for part in ("--set", setting))]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "seconds": time.perf_counter() - started,
        "exit": done.returncode,
        "end": (done.stdout if done.returncode == 0 else done.stderr).splitlines()[-6:],
    }


def main() -> None:
    """Measure, save the result, and print it."""
    parser = make_parser(__doc__)
    parser.set_defaults(device="cuda")
    parser.add_argument("--quick", action="store_true", help="at a toy size")
    arguments = parser.parse_args()
    device, quick = arguments.device, arguments.quick
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: torch sees no CUDA device here; --device cpu --quick shows that the script runs.")
    be_quiet()
    shape = TOY if quick else PAPER
    limits = ceilings(device, quick)
    timed = steps(shape, device, 1 if quick else 2)
    within = inside(shape, device, limits)
    hours = {name: judged(row["hours_of_50_epochs"], ("<=", GOAL_HOURS)) for name, row in timed.items()}
    ours, theirs = timed["exact, 32-true"]["seconds"], timed["NNI's DARTS, 32-true"]["seconds"]
    rows = {"hours of 50 epochs": hours, "step": {"exact / NNI's DARTS": judged(ours / theirs, None)}}
    print(table(rows))
    for name in ("share_of_time_in_kernels", "share_of_float32_ceiling", "share_of_bandwidth_ceiling"):
        print(f"{name.replace('_', ' ')}: {within[name]:.3f}")
    result = {"shape": shape, "ceilings": limits, "steps": timed, "inside_a_step": within, "table": rows}
    if not quick:
        # Saved now, and again with what may be cut off.
        save_result("on_gpu", result, device)
    searches: dict[str, Any] = {}
    for script, recipe in (("search_darts.py", "darts_mnist5k.yml"), ("search_cream.py", "cream_mnist5k.yml")):
        searches[recipe] = real_search(script, recipe, device, quick)
        print(f"{recipe}: {searches[recipe]['seconds']:.0f} s", *searches[recipe]["end"], sep="\n  ")
    if not quick:
        file = save_result("on_gpu", {**result, "searches": searches}, device)
        print(f"written to {file}", flush=True)
        command = [sys.executable, str(Path(__file__).with_name("run_all.py")), "--device", device]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
