"""Processes that are forked from one that has imported everything, which takes longer than a whole small search."""

from __future__ import annotations

import multiprocessing

FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(
    [
        "tests.resuming",
        "tests.planned",
        "search_spaces.cream",
        "search_spaces.darts",
        "sklearn.datasets",
        "torch.utils.tensorboard",
        "nni_cream.evaluate",
    ]
)
