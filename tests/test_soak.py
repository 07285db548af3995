"""A long search takes no more memory, open files and threads than a short one."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import pytorch_lightning as pl
import torch
from nni.nas.evaluator.pytorch import Lightning, Trainer
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.space import RawFormatModelSpace
from pytorch_lightning.loggers import TensorBoardLogger

from nni_cream.checkpoints import LastTwo
from nni_cream.data import Augmentation, load_data
from nni_cream.runs import RunDirectory
from nni_cream.search import make_loader, make_training_loader
from nni_cream.settings import Data, Device
from nni_cream.strategies import CreamStrategy
from nni_cream.training import ImageClassifier
from tests.distributed_worker import SCHEDULE, SGD, PathSpace

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]

STEPS = 2000
WARM_UP = 600
EVERY = 20
DATA = Data(name="digits", resolution=16, batch_size=16, architecture_fraction=0.05, validation_fraction=0.05)
BATCH_BYTES = 16 * 3 * 16 * 16 * 4
RETURN_FREE_PAGES = ctypes.CDLL(None).malloc_trim  # of glibc


class Samples(pl.Callback):
    """What the process holds, every so many steps: bytes of memory, open files, threads."""

    def __init__(self, warm_up: int) -> None:
        self.warm_up = warm_up
        self.process = psutil.Process()
        self.taken: list[tuple[int, int, int, int]] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        step = trainer.fit_loop.total_batch_idx
        if step >= self.warm_up and step % EVERY == 0:
            # Else what is held goes unseen where it fills what earlier tests of this process have left free.
            RETURN_FREE_PAGES(0)
            memory, files = self.process.memory_info().rss, len(os.listdir("/proc/self/fd"))
            self.taken.append((step, memory, files, self.process.num_threads()))


def grown(taken: list[tuple[int, int, int, int]]) -> list[str]:
    """Say of what a process holds more and more."""
    step, memory, files, threads = np.array(taken).T
    growth = np.polyfit(step, memory, 1)[0]
    found = []
    # Holding on to the images of one step in ten would be more.
    if growth >= BATCH_BYTES / 10:
        found.append(f"memory: {growth:.0f} bytes a step, {memory.tolist()}")
    if files.max() > files[0] + 1:  # a checkpoint may be being written
        found.append(f"files: {files.tolist()}")
    if threads.max() > threads[0]:
        found.append(f"threads: {threads.tolist()}")
    return found


def search(folder: Path, steps: int, warm_up: int, *callbacks: pl.Callback) -> list[tuple[int, int, int, int]]:
    """Search, and return the samples."""
    splits = load_data("digits", resolution=16, augmentation=Augmentation(hflip=0.5, re_prob=0.2))
    training = make_training_loader(splits.weights, DATA, 1, Device(accelerator="cpu"))
    samples = Samples(warm_up)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=-(-steps // len(training)),
        callbacks=[*callbacks, samples, LastTwo(RunDirectory(folder), minutes=0.05)],
        logger=TensorBoardLogger(folder),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    evaluator = Lightning(
        ImageClassifier(10, SGD, SCHEDULE),
        trainer,
        train_dataloaders=training,
        val_dataloaders=make_loader(splits.architecture, DATA, Device(accelerator="cpu")),
    )
    torch.manual_seed(0)
    gc.collect()  # what earlier tests have left, which would go in the middle and hide what comes
    strategy = CreamStrategy(board_images=4, warmup_epochs=1, board_size=3, meta_interval=5, recalibration_batches=2)
    strategy(RawFormatModelSpace.from_model(PathSpace(10), evaluator), SequentialExecutionEngine())
    assert samples.taken[-1][0] >= steps - EVERY
    assert trainer.global_step >= steps
    return samples.taken


@pytest.mark.slow
def test_a_long_search_does_not_grow(tmp_path: Path) -> None:
    assert grown(search(tmp_path, STEPS, WARM_UP)) == []


class Leak(pl.Callback):
    """Holds on to eight copies of every batch, and now and then to an open file and to a thread."""

    def __init__(self, files: ExitStack, end: threading.Event) -> None:
        self.files = files
        self.end = end
        self.images: list[Any] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.images += [batch[0].clone() for _ in range(8)]
        if batch_idx % 40 == 0:
            self.files.enter_context(Path(__file__).open())  # noqa: SIM115
            threading.Thread(target=self.end.wait).start()


@pytest.fixture
def heap_with_holes() -> Iterator[None]:
    """300 MB that the process has had from the system and uses no more, as after many other tests."""
    pieces = [torch.ones(2500) for _ in range(30_000)]
    kept = pieces[::50]
    del pieces
    yield
    del kept


@pytest.mark.slow
@pytest.mark.usefixtures("heap_with_holes")
def test_one_that_leaks_is_found_to_grow(tmp_path: Path) -> None:
    end = threading.Event()
    with ExitStack() as files:
        files.callback(end.set)
        found = grown(search(tmp_path, 240, 80, Leak(files, end)))
    assert [sentence.partition(":")[0] for sentence in found] == ["memory", "files", "threads"]
