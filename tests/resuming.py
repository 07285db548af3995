"""Searches and trainings in processes of their own, which tests kill and start again."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

import nni_cream.retrain as retrain_module
import nni_cream.search_darts as search_darts_module
from nni_cream import _data_sources, cli, search
from nni_cream._data_sources import Images
from nni_cream.checkpoints import LastTwo
from nni_cream.child import Candidate
from nni_cream.recipe import CreamRecipe, DartsRecipe, RetrainRecipe
from nni_cream.retrain import retrain
from nni_cream.runs import RunDirectory
from nni_cream.search import search_cream
from nni_cream.search_darts import search_darts
from nni_cream.strategies import cream_module
from tests.forking import FORKING

SECONDS = 240
# Of all digits; a fifth of them are for tests.
IMAGES = 400
DATA: dict[str, Any] = {
    "name": "digits",
    "batch_size": 16,
    "augmentation": {"scale": [0.6, 1.0], "hflip": 0.5, "color_jitter": 0.3, "re_prob": 0.3},
}
DEVICE: dict[str, Any] = {"accelerator": "cpu", "threads": 1}
CREAM: dict[str, Any] = {
    "name": "cream",
    "seed": 3,
    "epochs": 3,
    "data": {**DATA, "resolution": 32, "validation_fraction": 0.48, "architecture_fraction": 0.05},
    "flops": {"min": 2.0, "max": 3.0},
    "space": {"aligned": True},
    "optimizer": {"lr": 0.03},
    "cream": {"board_size": 3, "board_images": 4, "warmup_epochs": 1, "meta_interval": 5, "recalibration_batches": 2},
    "device": DEVICE,
}
GENOTYPE = (
    "Genotype(normal=[('sep_conv_3x3', 1), ('skip_connect', 0), ('max_pool_3x3', 0), ('dil_conv_3x3', 2)], "
    "normal_concat=[2, 3], reduce=[('sep_conv_3x3', 1), ('skip_connect', 0), ('max_pool_3x3', 0), "
    "('dil_conv_3x3', 2)], reduce_concat=[2, 3])"
)
DARTS: dict[str, Any] = {
    "name": "darts",
    "seed": 4,
    "epochs": 3,
    # Fewer batches for α than for the weights, so that they begin anew within an epoch.
    "data": {**DATA, "resolution": 8, "validation_fraction": 0.42, "architecture_fraction": 0.08},
    "space": {"channels": 2, "cells": 3, "nodes": 2, "operations": ["none", "skip_connect", "sep_conv_3x3"]},
    "optimizer": {"name": "momentum", "lr": 0.1, "filter_bias_and_bn": False},
    "schedule": {"name": "cosine"},
    "darts": {"alpha_lr": 0.1, "eigenvalue": "track"},
    "device": DEVICE,
}
RETRAIN: dict[str, Any] = {
    "name": "retrain",
    "seed": 5,
    "epochs": 3,
    "data": {
        **DATA,
        "resolution": 8,
        "validation_fraction": 0.13,
        "architecture_fraction": 0.05,
        # RandAugment draws from the streams of Python and of NumPy.
        "augmentation": {"scale": [0.6, 1.0], "hflip": 0.5, "auto_augment": "rand-m7-mstd0.5", "re_prob": 0.3},
    },
    "optimizer": {"name": "momentum", "lr": 0.05},
    "schedule": {"name": "cosine", "interval": "epoch"},
    "gradient_clip": 5.0,
    "drop_path_rate": 0.25,
    "drop_rate": 0.2,
    "mixing": {"mixup": 0.2, "cutmix": 1.0, "off_epoch": 2},
    "ema": {"decay": 0.95},
    "darts": {"channels": 4, "cells": 4, "stem": "cifar"},
    "device": DEVICE,
}
RECIPES = {"cream": CREAM, "darts": DARTS, "retrain": RETRAIN}


def run(kind: str, folder: Path, changes: dict[str, Any]) -> None:
    """Search or train in this process, as the trials do."""
    content = {**RECIPES[kind], **changes}
    directory = RunDirectory(folder)
    if kind == "cream":
        search_cream(CreamRecipe.model_validate(content), directory)
    elif kind == "darts":
        search_darts(DartsRecipe.model_validate(content), directory)
    else:
        retrain(RetrainRecipe.model_validate(content), Candidate(None, GENOTYPE), directory)


def leave_out_what_takes_longest() -> None:
    """Let this process look at fewer images, and do nothing beside searching and training."""
    for module in (search, search_darts_module, retrain_module):
        module.leave_report = lambda *_: None
    whole = _data_sources._FROM_PACKAGES["digits"]()
    assert whole.pool is not None
    few = replace(whole, pool=Images(whole.pool.store[:IMAGES], whole.pool.labels[:IMAGES]))
    _data_sources._FROM_PACKAGES = {"digits": lambda: few}


def _child(
    kind: str,
    folder: Path,
    changes: dict[str, Any],
    environment: dict[str, str],
    killed_at: str,
    killed_ranking: int,
    steps: Connection,
) -> None:
    warnings.simplefilter("ignore")
    # Its own processes are started as in a new one, and not by another server that would import everything first.
    multiprocessing.set_start_method(None, force=True)
    os.environ.update(environment)
    folder.mkdir(parents=True, exist_ok=True)
    for stream in (1, 2):
        os.dup2(os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    begin, measured = LastTwo.on_train_batch_start, LastTwo.on_validation_batch_end

    def tell(self: Any, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        steps.send(trainer.fit_loop.total_batch_idx)
        begin(self, trainer, module, batch, batch_idx)

    def tell_too(self: Any, trainer: Any, *arguments: Any) -> None:
        if trainer.state.fn == "fit":
            steps.send("validation")
        measured(self, trainer, *arguments)

    name = Path.replace

    def name_or_die(self: Path, target: Path) -> Path:
        if Path(target).name == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return name(self, target)

    judge, ranked = cream_module.count_right, itertools.count(1)

    def judge_or_die(network: Any, classify: Any, calibration: Any, held_out: Iterable[Any]) -> tuple[int, int]:
        mortal = next(ranked) == killed_ranking
        return judge(network, classify, calibration, _first_and_die(held_out) if mortal else held_out)

    cream_module.count_right = judge_or_die
    Path.replace = name_or_die  # type: ignore[method-assign,assignment]
    leave_out_what_takes_longest()
    LastTwo.on_train_batch_start = tell  # type: ignore[method-assign]
    LastTwo.on_validation_batch_end = tell_too  # type: ignore[method-assign]
    cli.run(lambda: run(kind, folder, changes))


def _first_and_die(batches: Iterable[Any]) -> Iterator[Any]:
    """Give one batch, and be killed when the next is asked for."""
    yield next(iter(batches))
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class Started:
    """A process that searches or trains in ``folder``."""

    process: Any
    steps: Connection
    folder: Path

    def _told(self) -> int | str:
        assert self.steps.poll(SECONDS), self.output()
        told: int | str = self.steps.recv()
        return told

    def await_step(self, number: int) -> int:
        """Return when so many steps have begun in this process, and say which of the whole run is the last of them."""
        step = -1
        while number:
            told = self._told()
            if isinstance(told, int):
                step, number = told, number - 1
        return step

    def await_validation(self) -> None:
        """Return when the first batch has been measured in the middle of the training."""
        while self._told() != "validation":
            pass

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def end(self, seconds: float = SECONDS) -> int:
        """Wait for the end, and return the exit code, which is negative for a signal."""
        ending = time.monotonic() + seconds
        while self.process.is_alive() and time.monotonic() < ending:
            # Nobody else empties the pipe.
            try:
                while self.steps.poll(0.05):
                    self.steps.recv()
            except EOFError:
                self.process.join(max(0, ending - time.monotonic()))
        self.process.join(0)
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError(f"no end within {seconds} seconds: {self.output()}")
        code: int = self.process.exitcode
        return code

    def output(self) -> str:
        return (self.folder / "output.txt").read_text() if (self.folder / "output.txt").exists() else ""


def start_two(kind: str, folder: Path, **changes: Any) -> tuple[Started, Started]:
    """Start two processes that share every batch."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    changes["device"] = {**RECIPES[kind]["device"], "devices": 2}
    first, second = (
        start(kind, folder, {"LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}, **changes)
        for rank in ("0", "1")
    )
    return first, second


def start(
    kind: str,
    folder: Path,
    environment: dict[str, str] | None = None,
    killed_at: str = "",
    killed_ranking: int = 0,
    **changes: Any,
) -> Started:
    """Start a process that runs what ``kind`` says, with ``changes`` to its recipe.

    It is killed when it has written the file called ``killed_at``, just before that gets its name; or while it ranks
    the ``killed_ranking``-th path of its board, from 1.
    """
    ours, theirs = FORKING.Pipe(duplex=False)
    arguments = (kind, folder, changes, environment or {}, killed_at, killed_ranking, theirs)
    process = FORKING.Process(target=_child, args=arguments)
    process.start()
    theirs.close()
    return Started(process, ours, folder)


def complete(kind: str, folder: Path, **changes: Any) -> Path:
    """Run to the end."""
    started = start(kind, folder, **changes)
    assert started.end() == 0, started.output()
    return folder


def kill_at(kind: str, folder: Path, step: int, delay: float, **changes: Any) -> None:
    """Run, and kill it ``delay`` seconds after the beginning of the step of that number in the whole run."""
    started = start(kind, folder, **changes)
    while started.await_step(1) < step:
        pass
    time.sleep(delay)
    started.signal(signal.SIGKILL)
    assert started.end() == -signal.SIGKILL, started.output()


def kill_in_the_writing_of(name: str, kind: str, folder: Path, **changes: Any) -> None:
    """Run, and let it be killed when the file called ``name`` is there under a temporary name alone."""
    started = start(kind, folder, killed_at=name, **changes)
    assert started.end() == -signal.SIGKILL, started.output()
    assert not (folder / name).exists()


def kill_in_the_ranking(path: int, folder: Path) -> None:
    """Search, and let it be killed in the end, when the path of that number on the board has been measured in part."""
    started = start("cream", folder, killed_ranking=path)
    assert started.end() == -signal.SIGKILL, started.output()


def differences(ours: Any, theirs: Any, where: str = "") -> list[str]:
    """Say where two values differ by a bit."""
    if type(ours) is not type(theirs):
        return [f"{where}: {type(ours).__name__}, {type(theirs).__name__}"]
    if isinstance(ours, Tensor):
        same = ours.dtype == theirs.dtype and ours.shape == theirs.shape and torch.equal(ours, theirs)
        return [] if same else [f"{where}: {ours}, {theirs}"[:200]]
    if isinstance(ours, dict):
        if list(ours) != list(theirs):
            return [f"{where}: {sorted({*ours} ^ {*theirs})}"]
        return [found for key in ours for found in differences(ours[key], theirs[key], f"{where}/{key}")]
    if isinstance(ours, list | tuple):
        if len(ours) != len(theirs):
            return [f"{where}: {len(ours)} and {len(theirs)} of them"]
        pairs = enumerate(zip(ours, theirs, strict=True))
        return [found for i, pair in pairs for found in differences(*pair, f"{where}/{i}")]
    return [] if ours == theirs else [f"{where}: {ours}, {theirs}"[:200]]


def left_behind(folder: Path) -> dict[str, Any]:
    """Read all that a run has left, but for names of folders."""
    found: dict[str, Any] = {"checkpoint": torch.load(folder / "checkpoints/last.ckpt", weights_only=True)}
    found["metrics"] = (folder / "metrics.csv").read_text()
    events = EventAccumulator(str(folder / "tensorboard"), {"scalars": 0}).Reload()
    found["curves"] = {
        # A validation that is repeated is logged twice under one number of steps.
        tag: {event.step: event.value for event in events.Scalars(tag)}
        for tag in sorted(events.Tags()["scalars"])
    }
    for name in ("child.json", "result.json", "history.json"):
        if (folder / name).exists():
            found[name] = {k: v for k, v in json.loads((folder / name).read_text()).items() if k != "folder"}
    for name in ("child.safetensors", "model.safetensors", "model_plain.safetensors"):
        if (folder / name).exists():
            found[name] = load_file(folder / name)
    return found
