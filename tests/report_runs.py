"""Run directories as searches and trainings leave them, made up in no time."""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from nni_cream.architecture import CreamPath
from nni_cream.child import Child
from nni_cream.genotype import Genotype, derive_edges, edges_of, mixing_weights
from nni_cream.history import History, Seen
from nni_cream.recipe import CreamRecipe, DartsRecipe, Recipe, RetrainRecipe
from nni_cream.recipe_files import to_yaml
from nni_cream.runs import RunDirectory, write_json
from tests.latency_tables import made_up

PATH = CreamPath.parse("[[0], [0], [3], [4, 0, 3], [2], [3], [0]]")
# What could break a page, or a command.
ODD_FOLDER = "/data/<b>photos</b> & 'more' \"of\" them"


def write_metrics(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with (folder / "metrics.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def begin(recipe: Recipe, folder: Path) -> RunDirectory:
    """As a run does: the recipe as run, and the environment."""
    directory = RunDirectory(folder)
    directory.begin(to_yaml(recipe), recipe.seed)
    return directory


def cream_run(
    folder: Path, *, paths: int = 5, epochs: int = 30, timed: bool = False, **changes: Any
) -> tuple[CreamRecipe, RunDirectory]:
    """A search like that of ``make search``, whose board fills after 10 epochs and then changes.

    Where it is ``timed``, a path is predicted to take the longer the fewer MACs it has.
    """
    if timed:
        changes.setdefault("latency", {"table": "latency.json", "min": 1, "max": 2.5})
    recipe = CreamRecipe.model_validate(
        {
            "name": "cream_mnist5k",
            "epochs": epochs,
            "data": {"name": "folder", "folder": ODD_FOLDER, "resolution": 32},
            "flops": {"min": 2.5, "max": 4.0},
            "space": {"aligned": True},
            "optimizer": {"lr": 0.03},
            "cream": {"board_size": paths, "board_images": 8, "warmup_epochs": epochs // 3},
            **changes,
        }
    )
    directory = begin(recipe, folder)
    draw = random.Random(0)

    def path() -> str:
        return str([[0], *([draw.randrange(6) for _ in range(depth)] for depth in (1, 1, 3, 1, 1)), [0]])

    board: dict[str, Seen] = {}
    history: dict[int, list[Seen]] = {}
    for epoch in range(1, epochs + 1):
        if epoch > epochs // 3:
            for _ in range(4 if epoch <= epochs // 3 + 3 else draw.random() < 0.3):
                new = Seen(path(), min(97, draw.uniform(50, 62) + epoch), draw.randrange(2_500_000, 4_000_000))
                board[new.path] = new
            board = {
                seen.path: Seen(seen.path, min(97.5, seen.score + draw.uniform(-1, 2)), seen.macs)
                for seen in board.values()
            }
            board = {seen.path: seen for seen in sorted(board.values(), key=lambda seen: -seen.score)[:paths]}
        history[epoch] = list(board.values())
    best_path = history[epochs][0].path
    history = {
        epoch: [Seen(str(PATH), seen.score, 3_235_136) if seen.path == best_path else seen for seen in places]
        for epoch, places in history.items()
    }
    if timed:
        made_up().save(directory.latency)
        history = {
            epoch: [replace(seen, latency=5 - seen.macs / 1e6) for seen in places] for epoch, places in history.items()
        }
    ranked = [
        (CreamPath.parse(seen.path), round(500 * (0.92 - 0.008 * place)) / 500, seen.macs)
        for place, seen in enumerate(history[epochs])
    ]
    (best, accuracy, macs), *others = ranked
    child = Child(
        architecture=best,
        num_classes=10,
        accuracy=accuracy,
        flops=macs,
        params=1_339_338,
        data=recipe.data.model_dump(mode="json"),
        search={"name": recipe.name, "seed": recipe.seed, "epochs": epochs},
        runners_up=[
            {"path": other.to_json(), "accuracy": share, "flops": cost, "params": 1_200_000 + 1000 * rank}
            | ({"latency": 5 - cost / 1e6} if timed else {})
            for rank, (other, share, cost) in enumerate(others)
        ],
        latency=5 - macs / 1e6 if timed else None,
    )
    History(500, board=history).save(directory.history)
    child.save(directory.child, nn.Linear(1, 1))
    write_metrics(
        folder,
        [
            {
                "default": 0.5,
                "epoch": epoch,
                "val_accuracy": 0.96 - 0.7 * math.exp(-epoch / 7) + 0.01 * math.sin(3 * epoch),
                "mean_val_accuracy": 0.94 - 0.7 * math.exp(-epoch / 7),
                "train_loss": 0.7 + 2.3 * math.exp(-epoch / 7),
                "train_accuracy": 0.91 - 0.7 * math.exp(-epoch / 7),
                "board_size": len(history[epoch]),
            }
            for epoch in range(1, epochs + 1)
        ],
    )
    return recipe, directory


def darts_run(
    folder: Path, *, nodes: int = 4, epochs: int = 20, ended: str | None = None, **changes: Any
) -> tuple[DartsRecipe, RunDirectory]:
    """A search whose α go from the same for all to a decision."""
    recipe = DartsRecipe.model_validate(
        {
            "name": "darts_mnist5k",
            "epochs": epochs + (5 if ended else 0),
            "data": {"resolution": 16, "architecture_fraction": 0.45},
            "space": {"channels": 4, "cells": 4, "nodes": nodes},
            "optimizer": {"name": "momentum", "filter_bias_and_bn": False},
            "darts": {"alpha_lr": 0.03},
            **changes,
        }
    )
    directory = begin(recipe, folder)
    operations = recipe.space.operations
    draw = np.random.default_rng(0)
    tables = {}
    for kind in ("normal", "reduce"):
        goal = draw.normal(size=(len(edges_of(nodes)), len(operations))).astype(np.float32)
        tables[kind] = [goal * np.float32(epoch / epochs) for epoch in range(1, epochs + 1)]
    cells = {kind: tuple(derive_edges(mixing_weights(after[-1]), operations)) for kind, after in tables.items()}
    concat = tuple(range(2, 2 + nodes))
    child = Child(
        architecture=Genotype(cells["normal"], concat, cells["reduce"], concat),
        num_classes=10,
        accuracy=0.1234,
        flops=1_234_567,
        params=23_456,
        data=recipe.data.model_dump(mode="json"),
        search={
            "name": recipe.name,
            "seed": recipe.seed,
            "epochs": recipe.epochs,
            "supernet_accuracy": 0.9375,
            "ended_because": ended,
        },
        space=recipe.space.model_dump(mode="json"),
    )
    History(500, alphas={kind: [table.tolist() for table in after] for kind, after in tables.items()}).save(
        directory.history
    )
    child.save(directory.child, nn.Linear(1, 1))
    write_metrics(
        folder,
        [
            {
                "epoch": epoch,
                "val_accuracy": 0.94 - 0.6 * math.exp(-epoch / 4),
                "train_loss": 2.2 * math.exp(-epoch / 5),
                "train_accuracy": 0.93 - 0.6 * math.exp(-epoch / 4),
                "alpha_loss": 2.3 * math.exp(-epoch / 5),
                "entropy": 2.08 - 0.02 * epoch,
                "entropy_normal": 2.08 - 0.021 * epoch,
                "skip_connections_normal": epoch % 3,
                "entropy_reduce": 2.08 - 0.019 * epoch,
                "skip_connections_reduce": 1,
            }
            for epoch in range(1, epochs + 1)
        ],
    )
    return recipe, directory


def training_run(folder: Path, network: str = str(PATH), **changes: Any) -> tuple[RetrainRecipe, RunDirectory]:
    """A training that has ended."""
    recipe = RetrainRecipe.model_validate(
        {"name": "retrain-cream", "epochs": 25, "optimizer": {"lr": 0.05}, "schedule": {"name": "cosine"}, **changes}
    )
    directory = begin(recipe, folder)
    write_json(
        folder / "result.json",
        {
            "network": network,
            "test_accuracy": 0.991,
            "test_top5": 0.9995,
            "val_accuracy": 0.9876,
            "flops": 3_235_136,
            "params": 1_339_338,
            "data": {"name": "folder", "folder": ODD_FOLDER, "resolution": 32},
            "folder": str(folder),
        },
    )
    write_metrics(
        folder,
        [
            {
                "epoch": epoch,
                "train_loss": 0.6 + 1.7 * math.exp(-epoch / 4),
                "val_accuracy": 0.99 - 0.5 * math.exp(-epoch / 4),
                "val_top5": 0.999 - 0.1 * math.exp(-epoch / 4),
                "val_loss": 0.1 + 1.7 * math.exp(-epoch / 4),
            }
            for epoch in range(1, 26)
        ],
    )
    return recipe, directory
