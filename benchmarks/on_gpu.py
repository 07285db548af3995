"""Measure everything on a GPU: steps, what they make of the card, and real searches.

    python benchmarks/on_gpu.py

needs a CUDA device, this repository and the installed package (NNI's Python part suffices), and no network. It runs

- ``steps``: those of the paper's setting (16 channels, 8 cells, batch 64, 32×32), NNI's DARTS and ours of every order,
  with fused cells and as in the textbook, recorded as CUDA graphs and not, as seconds a step, images a second, and
  hours of 50 epochs on half of CIFAR-10;
- ``inside``: one second-order step under torch's profiler: the share of the time in which a kernel runs, and the
  arithmetic and memory traffic of its operators against the card's own ceilings, measured here (a large matrix
  product, a large copy). Traffic is what every operator reads and writes, as if nothing stayed in a cache;
- ``searches``: both shipped ones on ``mnist5k``, whose images are in a Python package;
- ``benchmarks``: those of ``run_all.py``.

``--parts steps inside`` and ``--kinds`` run some of them, and keep what earlier runs have measured of the others.
``--device cpu --quick`` runs all but the last at a toy size, to see that they do run, and keeps nothing; else
``benchmarks/results/on_gpu*.json`` is written, anew after every measurement.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import ROOT, finish, judged, make_parser, result_file, save_result, seconds_of, table
from fused_cell import RESOLUTION, STEPS, be_quiet, search
from pytorch_lightning.callbacks import Callback
from scaling import darts_step
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from nni_cream.cuda_graphs import WARM_UP
from nni_cream.runs import read_json
from nni_cream.strategies.darts import DartsStrategy

# Channels, cells, batch.
PAPER, TOY = (16, 8, 64), (4, 3, 4)
# Half of the training images of CIFAR-10, for so many epochs.
IMAGES, EPOCHS = 25_000, 50
GOAL_HOURS = 1.0
PARTS = ("steps", "inside", "searches", "benchmarks")
RECORDED, TIMED = WARM_UP + 2, 4
CONTIGUOUS, LAST = torch.contiguous_format, torch.channels_last


class Kind(NamedTuple):
    """A kind of step: its strategy, how images and weights lie in memory, precision, and steps before it is timed."""

    strategy: Callable[[], Any]
    memory_format: Any = LAST
    precision: str = "32-true"
    before: int = RECORDED


FINITE: Any = "finite_difference"
KINDS: dict[str, Kind] = {
    "exact": Kind(DartsStrategy),
    "NNI's DARTS": Kind(STEPS["NNI's DARTS"], CONTIGUOUS, before=1),
    "first order": Kind(lambda: DartsStrategy(order="first")),
    "finite difference": Kind(lambda: DartsStrategy(hypergradient=FINITE)),
    "exact, textbook": Kind(lambda: DartsStrategy(execution="textbook")),
    "exact, contiguous": Kind(DartsStrategy, CONTIGUOUS),
    "exact, no CUDA graphs": Kind(lambda: DartsStrategy(cuda_graphs=False), before=1),
    "exact, bf16-mixed": Kind(DartsStrategy, precision="bf16-mixed"),
}


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


class Profiled(Callback):
    """Profiles the last step of a search."""

    def __init__(self, device: str, step: int) -> None:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
        self.profile = profile(activities=activities)
        self._device, self._step = device, step

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        """Begin with that step."""
        if batch_idx == self._step:
            self.profile.start()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """End with it."""
        if batch_idx == self._step:
            finish(self._device)
            self.profile.stop()


def time_kind(name: str, shape: tuple[int, int, int], device: str, *callbacks: Callback) -> list[float]:
    """Return how long steps of a kind take that begin when all has been compiled, chosen and recorded."""
    kind = KINDS[name]
    STEPS[name] = kind.strategy
    found = search(name, shape, kind.memory_format, kind.before + TIMED, device, kind.precision, callbacks)
    return found[kind.before - 1 :]


def steps(names: Sequence[str], shape: tuple[int, int, int], device: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Give the time of a step of some kinds, and what follows from it."""
    batch = shape[2]
    for name in names:
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        times = time_kind(name, shape, device)
        step = statistics.median(times)
        hours = step * EPOCHS * (IMAGES // batch) / 3600
        row = {"seconds": step, "images_per_second": batch / step, "hours_of_50_epochs": hours, "all": times}
        if device == "cuda":
            row["peak_mib"] = torch.cuda.max_memory_reserved() / 2**20
        print(f"{name}: {1000 * step:.1f} ms a step, {hours:.2f} hours", flush=True)
        yield name, row


def inside(shape: tuple[int, int, int], device: str, limits: dict[str, float]) -> dict[str, Any]:
    """Return what a second-order step makes of the device."""
    channels, cells, batch = shape
    # Counted where Python runs, and profiled as it is replayed.
    work = darts_step("exact", device, batch, channels, cells, RESOLUTION)
    with FlopCounterMode(display=False) as counted:
        work()
    with Traffic() as traffic:
        work()
    profiled = Profiled(device, RECORDED + TIMED - 1)
    step = statistics.median(time_kind("exact", shape, device, profiled)[:-1])
    own = DeviceType.CUDA if device == "cuda" else DeviceType.CPU
    events = [event for event in profiled.profile.key_averages() if event.device_type == own]
    attribute = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    busy = sum(getattr(event, attribute) for event in events) / 1e6
    slowest = sorted(events, key=lambda event: -getattr(event, attribute))[:25]
    flops, moved = counted.get_total_flops() / step, traffic.bytes / step
    return {
        "seconds": step,
        "seconds_in_kernels": busy,
        "kernels": sum(event.count for event in events),
        "share_of_time_in_kernels": min(1.0, busy / step),
        "flops": counted.get_total_flops(),
        "flops_per_second": flops,
        "share_of_float32_ceiling": flops / limits["float32_flops_per_second"],
        "bytes": traffic.bytes,
        "bytes_per_second": moved,
        "share_of_bandwidth_ceiling": moved / limits["bytes_per_second"],
        "slowest": {event.key: [getattr(event, attribute) / 1e6, event.count] for event in slowest},
    }


def judged_hours(timed: dict[str, Any]) -> dict[str, Any]:
    """Return how long 50 epochs take with steps of every kind, and whether that is within the goal."""
    return {name: judged(row["hours_of_50_epochs"], ("<=", GOAL_HOURS)) for name, row in timed.items()}


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
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="of the measurement (default: all)")
    parser.add_argument("--kinds", nargs="+", metavar="KIND", choices=KINDS, default=tuple(KINDS), help="of steps")
    arguments = parser.parse_args()
    device, quick, parts = arguments.device, arguments.quick, arguments.parts
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: torch sees no CUDA device here; --device cpu --quick shows that the script runs.")
    be_quiet()
    shape = TOY if quick else PAPER
    file = result_file("on_gpu", device)
    result: dict[str, Any] = {} if quick or not file.exists() else read_json(file, "result of a benchmark")

    def keep(**measured: Any) -> None:
        result.update(measured)
        if not quick:
            save_result("on_gpu", result, device)

    keep(shape=shape, ceilings=ceilings(device, quick))
    if "steps" in parts:
        timed: dict[str, Any] = {}
        for name, row in steps(arguments.kinds, shape, device):
            timed[name] = row
            rows = {"hours of 50 epochs": judged_hours(timed)}
            if "NNI's DARTS" in timed:
                theirs = timed["NNI's DARTS"]["seconds"]
                rows["step"] = {f"{n} / NNI's DARTS": judged(r["seconds"] / theirs, None) for n, r in timed.items()}
            keep(steps=timed, table=rows)
        print(table(rows), flush=True)
    if "inside" in parts:
        within = inside(shape, device, result["ceilings"])
        for name in ("share_of_time_in_kernels", "share_of_float32_ceiling", "share_of_bandwidth_ceiling"):
            print(f"{name.replace('_', ' ')}: {within[name]:.3f}", flush=True)
        keep(inside_a_step=within)
    if "searches" in parts:
        searches: dict[str, Any] = {}
        for script, recipe in (("search_darts.py", "darts_mnist5k.yml"), ("search_cream.py", "cream_mnist5k.yml")):
            searches[recipe] = real_search(script, recipe, device, quick)
            print(f"{recipe}: {searches[recipe]['seconds']:.0f} s", *searches[recipe]["end"], sep="\n  ", flush=True)
            keep(searches=searches)
    if not quick:
        print(f"written to {file}", flush=True)
        if "benchmarks" in parts:
            command = [sys.executable, str(Path(__file__).with_name("run_all.py")), "--device", device]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
