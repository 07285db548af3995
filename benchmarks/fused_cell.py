"""Time the fused execution of DARTS cells against the textbook's, and a search's steps against each other and NNI's.

    python benchmarks/fused_cell.py            # what has targets
    python benchmarks/fused_cell.py --more     # also NNI's search and the textbook's cells with our convolutions

All that is compared takes turns in one process, in float32: pass by pass, and step by step. A ratio is the median of
those of all turns, so that a host that is slow for a while slows both sides of it. *Forward and backward* gives the
gradients in all weights and α. The reference of its target is the textbook execution with PyTorch's own convolutions,
contiguous in memory, as published; ``--more`` also times the package's textbook execution, channels last, whose
depthwise convolutions have derivatives of their own. *Steps* are timed inside a training by NNI's evaluator and
engine: of NNI's ``DARTS``, and of ``DartsStrategy``. NNI's searches the same space with PyTorch's own convolutions,
contiguous, as it does for who has not got this package; ``--more`` also times it with our convolutions. *Memory* is by
how much the peak of the resident memory of a new process rises in two steps; on a GPU, the peak of what torch has
allocated there.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import statistics
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import (
    QUIET,
    add_seconds,
    finish,
    judged,
    keep_compiled_convolutions,
    make_parser,
    mean_and_spread,
    save_result,
    seconds_of,
    table,
    turns,
    with_repetitions,
)
from exact_product import with_torch_derivatives
from nni.nas.evaluator.pytorch import DataLoader, Lightning, LightningModule, Trainer
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.space import RawFormatModelSpace
from nni.nas.strategy import DARTS
from pytorch_lightning.callbacks import Callback
from torch.utils.data import TensorDataset

from nni_cream.strategies.darts import DartsStrategy
from search_spaces.darts import DartsSpace

# Channels, cells, images in a batch.
SHAPES = ((8, 5, 32), (16, 8, 8))
CLASSES, RESOLUTION = 10, 32
# Passes that are timed, and steps, however long they take.
FEWEST = 2


def nnis() -> DARTS:
    """Return NNI's own strategy, of first order."""
    return DARTS(arc_learning_rate=3e-4, gradient_clip_val=5.0)


STEPS: dict[str, Callable[[], Any]] = {
    "NNI's DARTS": nnis,
    "NNI's DARTS, our convolutions": nnis,
    "first order": lambda: DartsStrategy(order="first"),
    "finite difference": lambda: DartsStrategy(hypergradient="finite_difference"),
    "exact": lambda: DartsStrategy(hypergradient="exact"),
}
# What has no target, and is only timed with --more.
MORE = ("textbook, own derivatives", "NNI's DARTS, our convolutions")
TARGETS: dict[str, tuple[str, float]] = {
    "forward and backward, textbook / fused": (">=", 3.0),
    "step, NNI's DARTS / first order": (">=", 2.5),
    "step, finite difference / first order": ("<=", 2.3),
    "step, exact / first order": ("<=", 2.8),
    "memory, finite difference / first order": ("<=", 1.1),
    "memory, exact / first order": ("<=", 2.5),
}


class Classifier(LightningModule):
    """Cross entropy, and the paper's optimizer of the weights."""

    def forward(self, images: torch.Tensor) -> Any:
        """Return logits."""
        return self.model(images)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Return the loss."""
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Do nothing."""

    def configure_optimizers(self) -> Any:
        """Return the optimizer."""
        return torch.optim.SGD(self.parameters(), 0.025, momentum=0.9, weight_decay=3e-4)


class Stopwatch(Callback):
    """Times steps, all but the first."""

    def __init__(self, device: str) -> None:
        self.seconds: list[float] = []
        self._device = device
        self._started = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        """Start."""
        finish(self._device)
        self._started = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop."""
        finish(self._device)
        if batch_idx:
            self.seconds.append(time.perf_counter() - self._started)


class Pause(Callback):
    """Lets others have their turn after every step, and keeps Python's collector out of steps: it goes through all."""

    def __init__(self, pause: Callable[[], None], rounds: Rounds) -> None:
        self._pause = pause
        self._rounds = rounds

    def on_train_batch_start(self, *_: Any) -> None:
        """Begin a turn."""
        gc.disable()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """End it."""
        gc.enable()
        trainer.should_stop = self._rounds.ends_after(batch_idx)
        self._pause()


class Rounds:
    """Lets all that take turns end after the same turn.

    Args:
        most: how many turns at most.
        seconds: how long they may take.
    """

    def __init__(self, most: int, seconds: float) -> None:
        self._turns = turns(most, seconds, FEWEST + 1)
        next(self._turns)
        self._last: list[bool] = []

    def ends_after(self, turn: int) -> bool:
        """Tell whether no turn follows; the first to ask decides for all."""
        if turn == len(self._last):
            self._last.append(next(self._turns, None) is None)
        return self._last[turn]


def take_turns(works: Mapping[str, Callable[[Callable[[], None]], Any]]) -> dict[str, Any]:
    """Return what all works return, each in a thread of its own, of which one at a time runs.

    Args:
        works: each is given a function that lets the next one run, and returns when it is its turn again.
    """
    order = deque(works)
    changed = threading.Condition()

    def wait(name: str) -> None:
        changed.wait_for(lambda: order[0] == name)

    def pause(name: str) -> None:
        with changed:
            order.rotate(-1)
            changed.notify_all()
            wait(name)

    def run(name: str) -> Any:
        with changed:
            wait(name)
        try:
            return works[name](partial(pause, name))
        finally:
            with changed:
                order.popleft()
                changed.notify_all()

    with ThreadPoolExecutor(len(works)) as pool:
        return dict(zip(works, pool.map(run, works), strict=True))


def search(
    kind: str,
    shape: tuple[int, int, int],
    memory_format: Any,
    steps: int,
    device: str,
    precision: Any = "32-true",
    callbacks: Sequence[Callback] = (),
) -> list[float]:
    """Search for a few steps and return how long all but the first took."""
    channels, cells, batch = shape
    torch.manual_seed(0)
    images = torch.randn(batch * steps, 3, RESOLUTION, RESOLUTION).to(memory_format=memory_format)
    data = DataLoader(TensorDataset(images, torch.randint(CLASSES, (len(images),))), batch_size=batch)
    watch = Stopwatch(device)
    trainer = Trainer(
        max_epochs=1,
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        precision=precision,
        **QUIET,
        limit_val_batches=1,
        callbacks=[watch, *callbacks],
    )
    evaluator = Lightning(Classifier(), trainer, train_dataloaders=data, val_dataloaders=data)
    space: Any = DartsSpace(CLASSES, channels=channels, cells=cells)
    if kind == "NNI's DARTS":
        with_torch_derivatives(space)
    space.to(memory_format=memory_format)
    STEPS[kind]()(RawFormatModelSpace.from_model(space, evaluator), SequentialExecutionEngine())
    return watch.seconds


def passes(shape: tuple[int, int, int], device: str, left_out: Sequence[str]) -> dict[str, Callable[[], Any]]:
    """Return forward and backward passes by name, without some."""
    channels, cells, batch = shape
    found: dict[str, Callable[[], Any]] = {}
    images = torch.randn(batch, 3, RESOLUTION, RESOLUTION).to(device)
    labels = torch.randint(CLASSES, (batch,)).to(device)
    for name, execution, torchs, memory_format in (
        ("textbook", "textbook", True, torch.contiguous_format),
        ("textbook, own derivatives", "textbook", False, torch.channels_last),
        ("fused", "fused", False, torch.channels_last),
    ):
        if name in left_out:
            continue
        torch.manual_seed(0)
        strategy = DartsStrategy(execution=execution)
        space: Any = strategy.mutate_model(DartsSpace(CLASSES, channels=channels, cells=cells))
        if torchs:
            with_torch_derivatives(space)
        space.to(device, memory_format=memory_format)
        strategy.alphas.to(device)
        variables = [*space.parameters(), *strategy.alphas.parameters()]
        given = images.to(memory_format=memory_format)

        def run(space: Any = space, given: Any = given, variables: Any = variables) -> torch.Tensor:
            loss = F.cross_entropy(space(given), labels)
            torch.autograd.grad(loss, variables)
            return loss.detach()

        found[name] = run
    losses = torch.stack([run() for run in found.values()])
    assert torch.allclose(losses, losses[:1], rtol=1e-4)
    return found


def peak_memory(kinds: Sequence[str], shape: tuple[int, int, int], device: str) -> dict[str, float]:
    """Return by how many MiB the peak of a new process's memory rises in a search of two steps of each kind."""
    # Forked from one that has imported everything and done nothing yet; on a CPU they run beside each other.
    beside = len(kinds) if device == "cpu" else 1
    with multiprocessing.get_context("forkserver").Pool(beside, maxtasksperchild=1) as pool:
        rises = pool.starmap(_rise, [(kind, shape, device) for kind in kinds], chunksize=1)
    return dict(zip(kinds, rises, strict=True))


def _rise(kind: str, shape: tuple[int, int, int], device: str) -> float:
    be_quiet()
    # Threads of several processes would wait for each other.
    torch.set_num_threads(1)
    before = _peak(device)
    search(kind, shape, torch.channels_last, 2, device)
    return _peak(device) - before


def _peak(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    # Not getrusage(), which a new process inherits from its parent.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def be_quiet() -> None:
    """Leave out what NNI and Lightning say of every small run."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def median_ratios(seconds: Mapping[str, Sequence[float]], what: str, reference: str) -> dict[str, float]:
    """Return by what the others exceed ``reference``: medians of the ratios of all turns."""
    return {
        f"{what}, {name} / {reference}": statistics.median(
            a / b for a, b in zip(times, seconds[reference], strict=True)
        )
        for name, times in seconds.items()
        if name != reference
    }


def measure(
    shape: tuple[int, int, int], repeats: int, steps: int, seconds: float, device: str, more: bool
) -> dict[str, Any]:
    """Measure everything at one shape."""
    left_out = () if more else MORE
    functions = passes(shape, device, left_out)
    timed: dict[str, list[float]] = {name: [] for name in functions}
    for _ in turns(repeats, seconds, FEWEST):
        for name, function in functions.items():
            timed[name].append(seconds_of(function, device))

    rounds = Rounds(steps, seconds)

    def searching(kind: str, pause: Callable[[], None]) -> list[float]:
        # NNI's own strategy as its users have it.
        memory_format = torch.contiguous_format if STEPS[kind] is nnis else torch.channels_last
        return search(kind, shape, memory_format, steps, device, callbacks=[Pause(pause, rounds)])

    searched = take_turns({kind: partial(searching, kind) for kind in STEPS if kind not in left_out})
    kinds = ("first order", "finite difference", "exact")
    memory = peak_memory(kinds, shape, device)
    ratios = {
        **median_ratios(timed, "forward and backward", "fused"),
        **median_ratios(searched, "step", "first order"),
        **{f"memory, {kind} / first order": memory[kind] / memory["first order"] for kind in kinds[1:]},
    }
    return {
        "shape": dict(zip(("channels", "cells", "batch"), shape, strict=True)),
        "seconds": {
            name: with_repetitions(seconds, **mean_and_spread(seconds))
            for name, seconds in {**timed, **{f"step, {kind}": times for kind, times in searched.items()}}.items()
        },
        "memory_mib": memory,
        "ratios": {name: judged(ratio, TARGETS.get(name)) for name, ratio in ratios.items()},
    }


def main() -> None:
    """Measure, write the result, and print it as a table."""
    parser = make_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=7, help="forward and backward passes of each kind")
    parser.add_argument("--steps", type=int, default=8, help="steps of a search, of which the first does not count")
    add_seconds(parser)
    parser.add_argument("--more", action="store_true", help=f"time more, without a target: {'; '.join(MORE)}")
    arguments = parser.parse_args()
    keep_compiled_convolutions()
    be_quiet()
    results = []
    for shape in SHAPES:
        given = (arguments.repeats, arguments.steps, arguments.seconds, arguments.device, arguments.more)
        results.append(measure(shape, *given))
    rows = {"{channels} channels, {cells} cells, batch {batch}".format(**r["shape"]): r["ratios"] for r in results}
    print(table(rows))
    file = save_result(
        "fused_cell_more" if arguments.more else "fused_cell",
        {
            "what": "fused execution of DARTS cells; medians of the ratios of all turns, and ratios of MiB",
            "resolution": RESOLUTION,
            "threads": torch.get_num_threads(),
            "results": results,
            "table": rows,
        },
        arguments.device,
    )
    print(f"written to {file}")


if __name__ == "__main__":
    main()
