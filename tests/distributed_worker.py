"""What one or several processes compute together, for test_distributed.py: the same file run by python and by torchrun.

    python -m tests.distributed_worker FOLDER [SCENARIO …]
    torchrun --standalone --nproc-per-node 2 -m tests.distributed_worker FOLDER [SCENARIO …]

Every process writes FOLDER/<rank>.pt.
"""

from __future__ import annotations

import copy
import math
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from nni.nas.evaluator.pytorch import DataLoader, Lightning, Trainer
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.execution.event import ModelEventType
from nni.nas.oneshot.pytorch.supermodule.sampling import PathSamplingLayer
from nni.nas.space import RawFormatModelSpace
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.utils.data import BatchSampler, TensorDataset

import nni_cream  # noqa: F401
from nni_cream import distributed
from nni_cream.launching import SharedBatch
from nni_cream.mixing import Mixing
from nni_cream.ranks import rank
from nni_cream.shards import Shards, Shuffled
from nni_cream.strategies import CreamStrategy, DartsStrategy
from nni_cream.supernet.synchronised import alone, synchronised
from nni_cream.training import ImageClassifier
from search_spaces.darts import DartsSpace
from tests.six_paths import CLASSES, SixPaths
from tests.trainers import QUIET

WORLD = int(os.environ.get("WORLD_SIZE", "1"))
BATCH = 12
SGD = {"opt": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}
SCHEDULE = {"sched": "poly", "decay_rate": 1.0}


def own(tensor: Tensor) -> Tensor:
    """This process' part of a batch, uneven where the batch is."""
    first, last = (len(tensor) * (rank() + i) // WORLD for i in (0, 1))
    return tensor[first:last]


# The operators and the norms.


def operators() -> Any:
    """Value and derivatives, up to the third, of a loss with a statistic inside."""
    generator = torch.Generator().manual_seed(0)
    images = own(torch.randn(7, 4, generator=generator))
    weight = torch.randn(4, generator=generator).requires_grad_()
    unused = torch.randn(2, generator=generator).requires_grad_()
    inside, _ = distributed.replicate(weight, unused)
    answers = (images @ inside).tanh()
    (middle,) = distributed.replicate(*distributed.reduce(answers.sum()))
    (loss,) = distributed.reduce(((answers - middle / 7) ** 3).sum())
    first, nothing = torch.autograd.grad(loss, [weight, unused], create_graph=True, allow_unused=True)
    (second,) = torch.autograd.grad(first @ torch.arange(4.0), weight, create_graph=True)
    (third,) = torch.autograd.grad(second @ torch.arange(1.0, 5.0), weight)
    return {"loss": loss, "first": first, "second": second, "third": third, "unused": nothing is None}


def norm(make: Callable[[], Any], *shape: int) -> Any:
    """Outputs, derivatives and buffers of a batch norm, for a batch that does not divide evenly."""
    generator = torch.Generator().manual_seed(1)
    images = own(5 + torch.randn(5, 3, *shape, generator=generator)).requires_grad_()
    factors = own(torch.randn(5, 3, *shape, generator=generator))
    module = make()
    weights = list(module.parameters())
    with synchronised():
        names = [name for name, _ in module.named_parameters()]
        inside = dict(zip(names, distributed.replicate(*weights), strict=True))
        answers = torch.func.functional_call(module, inside, (images,))
        (loss,) = distributed.reduce((factors * answers).square().sum())
        first = torch.autograd.grad(loss, [images, *weights], create_graph=True)
        (slope,) = distributed.reduce((factors * first[0]).square().sum())
        second = torch.autograd.grad(slope, [images, *weights], allow_unused=True, materialize_grads=True)
        module(2 * images)
    module.eval()
    with synchronised():
        later = module(images)
    # Of the images each process has its own.
    split = [distributed_parts(tensor) for tensor in (answers, first[0], second[0], later)]
    return {"split": split, "same": [loss, *first[1:], *second[1:]], "buffers": module.state_dict()}


def distributed_parts(tensor: Tensor) -> Tensor:
    """All processes' parts, however large, in order."""
    if WORLD == 1:
        return tensor.detach()
    parts: list[Any] = [None] * WORLD
    dist.all_gather_object(parts, tensor.detach())
    return torch.cat(parts)


def without_synchronisation() -> Any:
    """Within ``alone``, and outside of any context, a norm sees the process' own images."""
    images = torch.randn(4, 3, generator=torch.Generator().manual_seed(2)) + rank()
    results = [nn.BatchNorm1d(3)(images)]
    with synchronised(), alone():
        results.append(nn.BatchNorm1d(3)(images))
    return [torch.allclose(result, results[0]) and result.mean().abs().item() < 1e-9 for result in results]


# Searches and a training.


def labelled_images(number: int, seed: int, size: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(number, 3, size, size, generator=generator)
    labels = torch.randint(0, CLASSES, (number,), generator=generator)
    images[torch.arange(number), labels] += 0.5
    return TensorDataset(images, labels)


def training_loader(data: TensorDataset) -> Any:
    whole = BatchSampler(Shuffled(len(data)), BATCH, drop_last=True)
    return DataLoader(data, batch_sampler=Shards(whole, rank(), WORLD))


def measuring_loader(data: TensorDataset) -> Any:
    batches = [part.tolist() for part in np.array_split(np.arange(len(data)), 2)]
    return DataLoader(data, batch_sampler=Shards(batches, rank(), WORLD))


class Watcher(pl.Callback):
    """Notes the loss of every step, and which path it has trained."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.paths: list[Any] = []
        self.moved: list[list[str]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.before = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        # A step that is left out has none.
        self.losses.append(float(outputs["loss"]) if outputs else math.nan)
        self.paths.append({m.label: m._sampled for m in pl_module.modules() if isinstance(m, PathSamplingLayer)})
        self.moved.append([n for n, p in pl_module.named_parameters() if not torch.equal(p, self.before[n])])


def trainer(epochs: int, watcher: Watcher) -> Any:
    return Trainer(
        **QUIET,
        devices=WORLD,
        strategy=SharedBatch() if WORLD > 1 else "auto",
        use_distributed_sampler=False,
        max_epochs=epochs,
        callbacks=[watcher],
        num_sanity_val_steps=0,
    )


def run(strategy: Any, space: Any, epochs: int, size: int) -> tuple[Any, dict[str, Any]]:
    watcher, reports = Watcher(), []
    evaluator = Lightning(
        ImageClassifier(CLASSES, SGD, SCHEDULE),
        trainer(epochs, watcher),
        train_dataloaders=training_loader(labelled_images(4 * BATCH, 3, size)),
        val_dataloaders=(training_loader if isinstance(strategy, DartsStrategy) else measuring_loader)(
            labelled_images(2 * BATCH + 3, 4, size)
        ),
    )
    engine = SequentialExecutionEngine()
    for kind in (ModelEventType.IntermediateMetric, ModelEventType.FinalMetric):
        engine.register_model_event_callback(kind, lambda event: reports.append(event.metric))
    strategy(RawFormatModelSpace.from_model(space, evaluator), engine)
    module = strategy.oneshot_module
    steps = {"losses": watcher.losses, "paths": watcher.paths, "moved": watcher.moved}
    return module, {**steps, "state": module.state_dict(), "sample": module.export(), "reports": reports}


def darts(execution: Any, **settings: Any) -> Any:
    torch.manual_seed(5)
    operations = ("none", "skip_connect", "max_pool_3x3", "avg_pool_3x3", "sep_conv_3x3", "dil_conv_3x3")
    space = DartsSpace(CLASSES, channels=2, cells=3, nodes=2, operations=operations)
    strategy = DartsStrategy(
        **settings,
        execution=execution,
        alpha_lr=0.05,
        reporting_dataloader=measuring_loader(labelled_images(11, 6, 8)),
    )
    module, found = run(strategy, space, epochs=2, size=8)
    found["epochs"] = [(epoch.alphas, epoch.val_accuracy, epoch.eigenvalue) for epoch in module.epochs]
    return found


class PathSpace(SixPaths):
    """With batch norms as timm has them."""

    @staticmethod
    def candidate(channels: int, kernel: int) -> nn.Module:
        convolution = nn.Conv2d(4, channels, kernel, padding=kernel // 2, bias=False)
        return nn.Sequential(convolution, BatchNormAct2d(channels))


def cream(**settings: Any) -> Any:
    torch.manual_seed(7)
    defaults: dict[str, Any] = {"warmup_epochs": 1, "board_size": 3, "meta_interval": 2, "matching_lr": 0.1}
    strategy = CreamStrategy(
        **{**defaults, **settings},
        recalibration_batches=3,
        ranking_dataloader=measuring_loader(labelled_images(13, 8, 6)),
    )
    module, found = run(strategy, PathSpace(), epochs=4, size=6)
    found["board"] = [vars(entry) for entry in module.board.entries]
    found["ranking"] = [vars(ranked) for ranked in module.ranking]
    found["calibrated"] = module.calibrated_network(module.ranking[0].sample).state_dict()
    return found


def training(stream: int = 9, **arguments: Any) -> Any:
    torch.manual_seed(9)
    np.random.seed(stream)
    module, watcher = ImageClassifier(CLASSES, SGD, SCHEDULE, label_smoothing=0.1, **arguments), Watcher()
    module.set_model(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)))
    lightning = trainer(2, watcher)
    held_out = measuring_loader(labelled_images(13, 10, 6))
    lightning.fit(module, training_loader(labelled_images(4 * BATCH, 11, 6)), held_out)
    # Before the test, for which Lightning gives all processes the weights of the first.
    trained = {"train_loss": module.train_loss.compute(), "state": copy.deepcopy(module.state_dict())}
    return {**trained, "tested": lightning.test(module, held_out, verbose=False)}


SCENARIOS: dict[str, Callable[[], Any]] = {
    "operators": operators,
    "norm 1d": lambda: norm(lambda: nn.BatchNorm1d(3)),
    "norm 2d": lambda: norm(lambda: nn.BatchNorm2d(3), 2, 3),
    "norm without parameters": lambda: norm(lambda: nn.BatchNorm2d(3, affine=False), 2, 3),
    "cumulative norm": lambda: norm(lambda: nn.BatchNorm2d(3, momentum=None), 2, 3),
    "norm with activation": lambda: norm(lambda: BatchNormAct2d(3, act_layer=nn.Softplus), 2, 3),
    "without synchronisation": without_synchronisation,
    "darts first": lambda: darts("fused", order="first"),
    "darts finite difference": lambda: darts("fused", hypergradient="finite_difference"),
    "darts exact": lambda: darts("fused", eigenvalue="track", gradient_clip=0.1),
    "darts exact, textbook": lambda: darts("textbook"),
    "cream": lambda: cream(board_images=4),
    "cream, large slices": lambda: cream(board_images=6),
    "cream top1": lambda: cream(board_images=8, teacher="top1", prior="board"),
    "training": training,
    # The further processes' own streams of numbers do not count.
    "training, mixed and averaged": lambda: training(
        stream=9 + rank(),
        mixing=Mixing(CLASSES, mixup=0.5, cutmix=1.0, label_smoothing=0.1, off_epoch=1),
        ema={"decay": 0.8, "use_warmup": True},
    ),
}


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_default_dtype(torch.float64)
    # As after Lightning's seed_everything, by which Lightning would seed several processes once more.
    os.environ["PL_GLOBAL_SEED"] = "0"
    if WORLD > 1:
        dist.init_process_group("gloo")
    results = {}
    for name in sys.argv[2:] or SCENARIOS:
        # The last name before a traceback is where it happened.
        print(name, file=sys.stderr, flush=True)
        results[name] = SCENARIOS[name]()
    torch.save(results, Path(sys.argv[1]) / f"{rank()}.pt")
    if WORLD > 1:
        # As the commands do: gloo's threads would now and then abort a process that ends with its group.
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
