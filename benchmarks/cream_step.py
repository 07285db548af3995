"""What a step of a Cream search costs, against a straightforward implementation of the same mathematics.

    python benchmarks/cream_step.py

Both run in one process, on the same supernet with the same board, in turns; before each the weights, the optimizer and
all random states are put back. The straightforward one does what the published code does, with its errors corrected:
it asks the student for the images of one entry after the other, with a graph each; the meta step differentiates through
the student's step (a double backward); convolutions are torch's own, and nothing is laid out in a special way in
memory. First the two are compared, in double precision at a small setting: the weights after the step, and the matching
layer after a meta step, have to be the same. Every turn is on another path, and a ratio is the median of those of all
turns.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from common import (
    QUIET,
    add_seconds,
    judged,
    keep_compiled_convolutions,
    make_parser,
    save_result,
    seconds_of,
    table,
    turns,
    with_repetitions,
)
from nni.nas.evaluator.pytorch import DataLoader, Lightning, Trainer
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.space import RawFormatModelSpace
from profiling import Enough
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import TensorDataset

from nni_cream.strategies.cream import CreamStrategy
from nni_cream.strategies.cream_module import CreamLightningModule, Teaching
from nni_cream.training import ImageClassifier
from search_spaces.cream import CreamSpace

Batch = tuple[Tensor, Tensor]
# Where the two are compared: all settings are the same code, and in double precision the others take up to minutes.
COMPARED = {"batch": 16, "resolution": 32, "board": 5, "images": 4, "classes": 10}
# The published setting at a size for two cores, with the published batch, and experiments/recipes/cream_mnist5k.yml.
SETTINGS = {
    "batch 16, 64 px, board 10×4": {"batch": 16, "resolution": 64, "board": 10, "images": 4, "classes": 100},
    "batch 128, 64 px, board 10×4": {"batch": 128, "resolution": 64, "board": 10, "images": 4, "classes": 100},
    "batch 64, 32 px, board 5×8": {"batch": 64, "resolution": 32, "board": 5, "images": 8, "classes": 10},
}
DEPTHS = (1, 2, 2, 2, 1)
# Turns that are made however long they take.
FEWEST = 3
TARGETS = {
    "step, straightforward / ours": (">=", 2.0),
    "choosing a teacher / step": ("<=", 0.15),
    "meta step / step": ("<=", 1.6),
}


class Straightforward(CreamLightningModule):
    """The step written down as it is described; see the module."""

    def _choose_teacher(self) -> Teaching | None:
        logits = []
        for entry in self.board.entries:
            answers = self.training_module(entry.images).softmax(-1)
            difference = (answers - entry.features).flatten()
            logits.append(self.matching.linear(difference))
        best = int(torch.cat(logits).argmax())
        return Teaching(self.board.entries[best], logits[best].squeeze().sigmoid())

    def _ask_teacher(self, teaching: Teaching, student: Any, images: Tensor) -> Tensor:
        self._activate(teaching.entry.path)
        with torch.no_grad():
            answers: Tensor = self.training_module(images).softmax(-1)
        self._activate(student)
        return answers

    def _meta_step(self, path: Any, images: Tensor, targets: Tensor, batch_idx: int) -> None:
        size = self.settings.board_images
        teaching = self._choose_teacher()
        assert teaching is not None
        soft_targets = self._ask_teacher(teaching, path, images[:size])
        named = dict(self.training_module.named_parameters())
        before = {name: parameter.detach().clone().requires_grad_() for name, parameter in named.items()}
        logits = functional_call(self.training_module, before, (images[:size],))
        loss = teaching.weight * F.cross_entropy(logits, soft_targets)
        slopes = torch.autograd.grad(loss, list(before.values()), create_graph=True, allow_unused=True)
        optimizer = self._weight_optimizer()
        for parameter, slope in zip(named.values(), slopes, strict=True):
            parameter.grad = None if slope is None else slope.detach()
        optimizer.step()
        optimizer.zero_grad()

        # Where the optimizer has gone, momentum and decay included, as it depends on the gradient of the step.
        rate = optimizer.param_groups[0]["lr"]
        after = {}
        for (name, parameter), start, slope in zip(named.items(), before.values(), slopes, strict=True):
            moved = start if slope is None else start - rate * slope
            after[name] = moved + (parameter - moved).detach()
        logits = functional_call(self.training_module, after, (images[size : 2 * size],))
        held_out = F.cross_entropy(logits, targets[size : 2 * size], label_smoothing=self.settings.label_smoothing)
        parameters = list(self.matching.parameters())
        gradients = torch.autograd.grad(held_out, parameters)
        matcher = self.architecture_optimizers().optimizer
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        matcher.step()
        matcher.zero_grad()


class State:
    """Everything that a step changes."""

    def __init__(self, module: CreamLightningModule) -> None:
        self.module = module
        self.tensors = {name: value.detach().clone() for name, value in module.state_dict().items()}
        self.optimizers = [copy.deepcopy(optimizer.state_dict()) for optimizer in module.trainer.optimizers]
        self.generator = copy.deepcopy(module._generator)
        self.kept = {name: getattr(module, name) for name in ("_steps", "_typical_accuracy")}
        self.board = module.board.state_dict()

    def restore(self) -> None:
        """Put it back."""
        self.module.load_state_dict(self.tensors)
        for optimizer, state in zip(self.module.trainer.optimizers, self.optimizers, strict=True):
            optimizer.load_state_dict(copy.deepcopy(state))
        self.module._generator = copy.deepcopy(self.generator)
        for name, value in self.kept.items():
            setattr(self.module, name, value)
        self.module.board.load_state_dict(self.board)


class Measurement(pl.Callback):
    """Measures as soon as the board is full, and ends the search."""

    def __init__(self, repetitions: int, seconds: float, device: str) -> None:
        self.repetitions = repetitions
        self.seconds = seconds
        self.device = device
        self.result: dict[str, Any] = {}

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Batch, batch_idx: int) -> None:
        """Measure on this batch, once the board is full."""
        if len(module.board) < module.board.capacity or self.result:
            return
        self.state = State(module)
        if trainer.precision == "64-true":
            self.result["agreement"] = self._agreement(module, batch)
            raise Enough
        parts = ("step", "choosing", "step with a meta step")
        seconds: dict[str, dict[str, list[float]]] = {
            kind: {part: [] for part in parts} for kind in ("ours", "straightforward")
        }
        for turn in turns(self.repetitions, self.seconds, FEWEST):
            for kind, found in seconds.items():
                with self._as(module, kind):
                    # Convolutions of new shapes are compiled first, which a search does once.
                    self._time(module, batch, "step with a meta step", turn)
                    for part in parts:
                        found[part].append(self._time(module, batch, part, turn))
        self.result["seconds"] = seconds
        raise Enough

    @contextlib.contextmanager
    def _as(self, module: CreamLightningModule, kind: str) -> Iterator[None]:
        gates = [gate for gate in module.model.modules() if isinstance(gate, nn.Hardsigmoid)]
        kinds = {layer: type(layer) for layer in module.model.modules() if isinstance(layer, nn.Conv2d)}
        if kind == "straightforward":
            module.__class__ = Straightforward
            module.model.to(memory_format=torch.contiguous_format)
            for layer in kinds:
                layer.__class__ = nn.Conv2d
            for gate in gates:
                # torch's own has no second derivative.
                gate.forward = lambda x: F.relu6(x + 3) / 6  # type: ignore[method-assign]
        else:
            module.model.to(memory_format=torch.channels_last)
        try:
            yield
        finally:
            module.__class__ = CreamLightningModule
            for layer, kind in kinds.items():
                layer.__class__ = kind
            for gate in gates:
                vars(gate).pop("forward", None)

    def _time(self, module: CreamLightningModule, batch: Batch, part: str, turn: int) -> float:
        self.state.restore()
        module._generator = np.random.default_rng(turn)
        work: Callable[[], Any] = lambda: module.training_step(batch, 1)  # noqa: E731
        module._steps = 1  # no meta step
        if part == "choosing":
            module.resample()
            work = module._choose_teacher
        elif part == "step with a meta step":
            module._steps = module.settings.meta_interval
        return seconds_of(work, self.device)

    def _agreement(self, module: CreamLightningModule, batch: Batch) -> dict[str, float]:
        """Return how far the two are from each other, relative to what a step changes."""
        found = {}
        for name, steps in (("weights", 1), ("matching layer", module.settings.meta_interval)):
            ends = {}
            for kind in ("ours", "straightforward"):
                self.state.restore()
                with self._as(module, kind):
                    module._steps = steps
                    module.training_step(batch, 1)
                network = module.matching if name == "matching layer" else module.training_module
                ends[kind] = torch.cat([p.detach().flatten() for p in network.parameters()])
            prefix = "matching." if name == "matching layer" else "training_module."
            parameters = dict(module.named_parameters())
            start = torch.cat(
                [value.flatten() for key, value in self.state.tensors.items() if key in parameters and prefix in key]
            )
            moved = (ends["ours"] - start).norm()
            found[name] = ((ends["ours"] - ends["straightforward"]).norm() / moved).item()
        return found


def _spread(values: list[float]) -> dict[str, Any]:
    quartiles = statistics.quantiles(values, n=4)
    return with_repetitions(values, **{"quartile range": quartiles[2] - quartiles[0]})


def _median_ratio(numerators: list[float], denominators: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def measure(
    setting: dict[str, int], repetitions: int, precision: str, device: str, seconds: float = math.inf
) -> dict[str, Any]:
    """Search until the board is full, and measure."""
    pl.seed_everything(0, verbose=False)
    size, classes = setting["batch"], setting["classes"]
    # Few batches an epoch: the board opens after the first one.
    labels = torch.arange(size * 3) % classes
    images = torch.randn(len(labels), 3, setting["resolution"], setting["resolution"])
    data = TensorDataset(images, labels)
    space = CreamSpace(DEPTHS, classes)
    space.to(memory_format=torch.channels_last)
    measurement = Measurement(repetitions, seconds, device)
    module = ImageClassifier(classes, {"opt": "sgd", "lr": 0.01, "momentum": 0.9}, {"sched": "poly", "decay_rate": 1.0})
    trainer = Trainer(
        max_epochs=20,
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        precision=precision,
        callbacks=[measurement],
        **QUIET,
    )
    evaluator = Lightning(
        module,
        trainer,
        train_dataloaders=DataLoader(data, batch_size=size, drop_last=True),
        val_dataloaders=DataLoader(TensorDataset(images[:size], labels[:size]), batch_size=size),
    )
    strategy = CreamStrategy(
        board_size=setting["board"],
        board_images=setting["images"],
        admission_gap=0,
        warmup_epochs=1,
        recalibration_batches=1,
        matching_lr=0.1,
    )
    with contextlib.suppress(Enough):
        strategy(RawFormatModelSpace.from_model(space, evaluator), SequentialExecutionEngine())
    return measurement.result


def main() -> None:
    """Measure, save the result, and print it as a table."""
    parser = make_parser(__doc__)
    parser.add_argument("--repetitions", type=int, default=15, help="of each measurement (default: %(default)s)")
    add_seconds(parser)
    arguments = parser.parse_args()
    keep_compiled_convolutions()
    # NNI would call the end of each search an error.
    logging.disable(logging.ERROR)
    agreement = measure(COMPARED, 0, "64-true", arguments.device)["agreement"]
    results: dict[str, dict[str, Any]] = {}
    rows = {}
    for name, setting in SETTINGS.items():
        results[name] = {}
        given = (arguments.repetitions, "32-true", arguments.device, arguments.seconds)
        seconds = measure(setting, *given)["seconds"]
        ours, theirs = seconds["ours"], seconds["straightforward"]
        ratios = {
            "step, straightforward / ours": _median_ratio(theirs["step"], ours["step"]),
            "choosing a teacher / step": _median_ratio(ours["choosing"], ours["step"]),
            # A step with a meta step consists of the two, one after the other.
            "meta step / step": _median_ratio(ours["step with a meta step"], ours["step"]) - 1,
            "step with a meta step, straightforward / ours": _median_ratio(
                theirs["step with a meta step"], ours["step with a meta step"]
            ),
        }
        rows[name] = {what: judged(ratio, TARGETS.get(what)) for what, ratio in ratios.items()}
        results[name]["seconds"] = {
            kind: {part: _spread(times) for part, times in found.items()} for kind, found in seconds.items()
        }
    print(table(rows))
    about = {"threads": torch.get_num_threads(), "agreement in float64": {"setting": COMPARED, **agreement}}
    content = {**about, "results": results, "table": rows}
    file = save_result("cream_step", content, arguments.device)
    print(f"written to {file}")


if __name__ == "__main__":
    main()
