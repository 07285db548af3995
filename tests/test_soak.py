"""A long search takes no more memory, open files and threads than a short one."""

from __future__ import annotations

import os
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
from nni_cream.recipe import Data, Device
from nni_cream.runs import RunDirectory
from nni_cream.search import make_loader, make_training_loader
from nni_cream.strategies import CreamStrategy
from nni_cream.training import ImageClassifier
from tests.distributed_worker import SCHEDULE, SGD, PathSpace

STEPS = 2000
WARM_UP = 600
EVERY = 20
DATA = Data(name="digits", resolution=16, batch_size=16, architecture_fraction=0.05, validation_fraction=0.05)
BATCH_BYTES = 16 * 3 * 16 * 16 * 4


class Samples(pl.Callback):
    """What the process holds, every so many steps: bytes of memory, open files, threads."""

    def __init__(self) -> None:
        self.process = psutil.Process()
        self.taken: list[tuple[int, int, int, int]] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        step = trainer.fit_loop.total_batch_idx
        if step >= WARM_UP and step % EVERY == 0:
            memory, files = self.process.memory_info().rss, len(os.listdir("/proc/self/fd"))
            self.taken.append((step, memory, files, self.process.num_threads()))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*LeafSpec")
def test_a_long_search_does_not_grow(tmp_path: Path) -> None:
    splits = load_data("digits", resolution=16, augmentation=Augmentation(hflip=0.5, re_prob=0.2))
    training = make_training_loader(splits.weights, DATA, 1, Device(accelerator="cpu"))
    samples = Samples()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=-(-STEPS // len(training)),
        callbacks=[samples, LastTwo(RunDirectory(tmp_path), minutes=0.05)],
        logger=TensorBoardLogger(tmp_path),
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
    strategy = CreamStrategy(board_images=4, warmup_epochs=1, board_size=3, meta_interval=5, recalibration_batches=2)
    strategy(RawFormatModelSpace.from_model(PathSpace(10), evaluator), SequentialExecutionEngine())

    step, memory, files, threads = np.array(samples.taken).T
    assert step[-1] >= STEPS - EVERY
    assert trainer.global_step >= STEPS
    growth = np.polyfit(step, memory, 1)[0]
    # Holding on to the images of one step in ten would be more.
    assert growth < BATCH_BYTES / 10, f"{growth:.0f} bytes a step: {memory.tolist()}"
    assert files.max() <= files[0] + 1  # a checkpoint may be being written
    assert threads.max() <= threads[0]
