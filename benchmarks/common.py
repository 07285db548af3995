"""What the benchmarks share: trials that run once, numbers with spread, and what was measured where."""

from __future__ import annotations

import argparse
import gc
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from nni_cream.runs import describe_environment, processor_name, read_json, write_json

RESULTS = ROOT / "benchmarks/results"
# A trainer of Lightning's that does nothing but train.
QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


def run_trial(script: str, output: Path, *arguments: str) -> float:
    """Run a trial in ``output``, unless it has ended there before, and return its processor time in seconds.

    It has one thread, so that processor time is what it costs, whatever else the machine is doing.
    """
    note = output / "processor_time.json"
    if note.exists():
        return float(read_json(note, "note of processor time")["seconds"])
    if output.exists():
        # Going on where it was interrupted would leave out the time that it took until then.
        shutil.rmtree(output)
    command = [sys.executable, str(ROOT / "trials" / script), "--output", str(output), *arguments]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=one_thread, stdout=subprocess.DEVNULL)
    # Of this child alone: other trials may run beside it.
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    seconds = used.ru_utime + used.ru_stime
    write_json(note, {"seconds": seconds})
    return seconds


def keep_compiled_convolutions() -> None:
    """Let oneDNN keep the compiled convolutions of everything that takes turns; to be called before the first one.

    It keeps 1,024. Implementations that are compared have more together, though not each by itself, so that one of them
    would throw out those of another, and they would be compiled again in every turn.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")


def settings_arguments(settings: dict[str, Any]) -> list[str]:
    """Return the command-line arguments that change ``settings`` of a recipe."""
    return [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of what every benchmark of speed can be told: where it runs.

    Args:
        description: the docstring of the script, whose first line is shown.
    """
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where it runs (default: %(default)s)")
    return parser


def seconds_of(work: Callable[[], Any], device: str) -> float:
    """Return how long ``work`` takes, on a GPU until that has done all of it.

    Without Python's collector of garbage, as in ``timeit``: it goes through the networks of all sizes that a benchmark
    holds, which takes a second, in whichever step its turn comes.
    """
    finish(device)
    collects = gc.isenabled()
    gc.disable()
    try:
        started = time.perf_counter()
        work()
        finish(device)
        return time.perf_counter() - started
    finally:
        if collects:
            gc.enable()


def turns(most: int, seconds: float, least: int) -> Iterator[int]:
    """Count the turns of a measurement: as many as fit into so many seconds, but not fewer than ``least``.

    Args:
        most: how many at most.
        seconds: a turn that would not end by then, going by those before it, does not begin.
        least: how many in any case.
    """
    started = time.monotonic()
    for turn in range(most):
        if turn >= least and (time.monotonic() - started) * (turn + 1) / turn > seconds:
            return
        yield turn


def add_seconds(parser: argparse.ArgumentParser) -> None:
    """Let a benchmark be told how long its turns may take."""
    text = "how long the turns of each measurement may take, if that allows for the fewest (default: no limit)"
    parser.add_argument("--seconds", type=float, default=math.inf, help=text)


def finish(device: str) -> None:
    """Wait until a GPU has nothing left to do."""
    if device == "cuda":
        torch.cuda.synchronize()


def with_repetitions(values: Sequence[float], **about: float) -> dict[str, Any]:
    """Return values with their number, their median, and what else is to be said of them."""
    return {"repetitions": len(values), "median": statistics.median(values), **about, "all": values}


def mean_and_spread(values: Sequence[float]) -> dict[str, float]:
    """Return mean and standard deviation (n − 1)."""
    return {"mean": statistics.mean(values), "sd": statistics.stdev(values) if len(values) > 1 else 0.0}


def judged(ratio: float, target: tuple[str, float] | None) -> dict[str, Any]:
    """Return a ratio with its target, ``(">=" or "<=", bound)``, and whether that is met."""
    if target is None:
        return {"ratio": ratio}
    sign, bound = target
    met = ratio >= bound if sign == ">=" else ratio <= bound
    return {"ratio": ratio, "target": f"{sign} {bound:g}", "verdict": "met" if met else "missed"}


def table(rows: Mapping[str, Mapping[str, dict[str, Any]]]) -> str:
    """Write ratios, by setting and by what they are of, as a table."""
    lines = ["| setting | what | ratio | target | |", "|---|---|---|---|---|"]
    for setting, ratios in rows.items():
        for what, found in ratios.items():
            judgement = f"{found.get('target', '')} | {found.get('verdict', '')}"
            lines.append(f"| {setting} | {what} | {found['ratio']:.2f} | {judgement}")
    return "\n".join(lines)


def save_result(name: str, content: dict[str, Any], device: str = "cpu") -> Path:
    """Write ``content`` into ``benchmarks/results``, with the machine, the versions and the commit."""
    file = result_file(name, device)
    card = {"card": torch.cuda.get_device_name()} if device == "cuda" else {}
    about = {"device": device, **card, "processor": processor_name(), "commit": commit()}
    write_json(file, {**content, **about, **describe_environment()})
    return file


def result_file(name: str, device: str) -> Path:
    """Return where a result is kept; that of a GPU does not replace that of a CPU."""
    return RESULTS / f"{name}{'' if device == 'cpu' else '_' + device}.json"


def commit() -> str:
    """Return the commit that was measured; unknown where there is no repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
