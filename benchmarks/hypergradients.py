"""How far the published finite difference is from the derivative that it stands for, on real images (``mnist5k``).

    python benchmarks/hypergradients.py

In double precision, for several batch sizes and stages of training: the error of the implicit term as published
(radius 0.01) and at smaller radii, relative to the exact one; the same with softplus and average pooling in place of
ReLU and max pooling; and which of them tells what the validation loss after a step of the weights really does when α
moves as far as one step of its optimizer moves it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import mean_and_spread, save_result
from torch import Tensor, nn

from nni_cream.data import load_data
from nni_cream.hypergradient import Hypergradient, exact, finite_difference, first_order, sgd_step
from nni_cream.models.operations import AveragePool
from nni_cream.strategies.darts import DartsStrategy
from nni_cream.supernet.functional import pure_loss
from search_spaces.darts import DartsSpace

RADII = (1e-2, 1e-4, 1e-8)
RESOLUTION = 16
SPACE = {"channels": 4, "cells": 5}
# The paper's: learning rate, momentum, weight decay of the weights, learning rate of α.
LR, MOMENTUM, WEIGHT_DECAY, ALPHA_LR = 0.025, 0.9, 3e-4, 3e-4


class Network(nn.Module):
    """A relaxed space, and the α that it asks for."""

    def __init__(self, space: nn.Module, alphas: nn.Module) -> None:
        super().__init__()
        self.space = space
        self.alphas = alphas

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        logits: Tensor = self.space(images)
        return logits


class Search:
    """A search in double precision, with the two optimizers of the paper."""

    def __init__(self, *, smooth: bool) -> None:
        torch.manual_seed(0)
        # The textbook execution calls the modules that make_smooth replaces.
        strategy = DartsStrategy(execution="textbook")
        self.network = Network(strategy.mutate_model(DartsSpace(10, **SPACE)), strategy.alphas).double()
        if smooth:
            make_smooth(self.network)
        self.weights = list(self.network.space.parameters())
        self.alphas = list(strategy.alphas.parameters())
        self.names = [
            [f"{part}.{name}" for name, _ in getattr(self.network, part).named_parameters()]
            for part in ("space", "alphas")
        ]
        self.optimizer = torch.optim.SGD(self.weights, LR, MOMENTUM, weight_decay=WEIGHT_DECAY)
        self.alpha_optimizer = torch.optim.Adam(self.alphas, ALPHA_LR, (0.5, 0.999), weight_decay=1e-3)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Callable[..., Tensor]:
        """Return the loss on ``batch`` as a function of (weights, alphas)."""
        images, labels = batch
        return pure_loss(self.network, self.names, lambda logits: F.cross_entropy(logits, labels), images)

    def train(self, batches: Any, steps: int) -> None:
        """Search for so many steps of first order."""
        for _ in range(steps):
            training, validation = next(batches), next(batches)
            result = first_order(self.loss(training), self.loss(validation), self.weights, self.alphas, ())
            for alpha, gradient in zip(self.alphas, result.gradients, strict=True):
                alpha.grad = gradient
            self.alpha_optimizer.step()
            self.optimizer.zero_grad()
            self.loss(training)(self.weights, [alpha.detach() for alpha in self.alphas]).backward()
            nn.utils.clip_grad_norm_(self.weights, 5.0)
            self.optimizer.step()

    def unrolled_loss(self, training: Any, validation: Any, alphas: Sequence[Tensor]) -> float:
        """Return the validation loss after the step of the weights at ``alphas``, by doing the step."""
        weights = [weight.detach().requires_grad_() for weight in self.weights]
        slopes = torch.autograd.grad(self.loss(training)(weights, alphas), weights)
        moved = []
        for weight, slope, how in zip(weights, slopes, sgd_step(self.optimizer, self.weights), strict=True):
            drift = 0 if how.buffer is None else how.drift * how.buffer
            moved.append((weight - how.scale * slope - how.decay * weight - drift).detach())
        with torch.no_grad():
            return self.loss(validation)(moved, alphas).item()


def make_smooth(network: nn.Module) -> None:
    """Replace what has kinks: ReLU by softplus, max pooling by average pooling."""
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.Softplus())
            elif isinstance(child, nn.MaxPool2d):
                setattr(module, name, AveragePool(3, child.stride, 1, count_include_pad=False))


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """Return the tensors as one vector."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def compare(search: Search, batches: Any) -> tuple[dict[str, Any], Hypergradient, Any]:
    """Measure the finite difference against the exact derivative on the next two batches."""
    training, validation = next(batches), next(batches)
    arguments = (
        search.loss(training),
        search.loss(validation),
        search.weights,
        search.alphas,
        sgd_step(search.optimizer, search.weights),
    )
    truth = exact(*arguments)
    implicit = flat(truth.implicit)
    found: dict[str, Any] = {"implicit_share": (implicit.norm() / flat(truth.gradients).norm()).item(), "radii": {}}
    for radius in RADII:
        estimate = flat(finite_difference(*arguments, radius=radius).implicit)
        found["radii"][f"{radius:g}"] = {
            "relative_error": ((estimate - implicit).norm() / implicit.norm()).item(),
            "cosine": F.cosine_similarity(estimate, implicit, dim=0).item(),
        }
    return found, truth, (training, validation)


def predict(search: Search, pair: Any, directions: int) -> dict[str, Any]:
    """Compare what each hypergradient says of a small move of α with what the unrolled loss then does.

    The direct part is the same in the second-order kinds, so it is taken off: what is compared is the implicit part.
    """
    training, validation = pair
    step = sgd_step(search.optimizer, search.weights)
    arguments = (search.loss(training), search.loss(validation), search.weights, search.alphas, step)
    truth, estimate = exact(*arguments), finite_difference(*arguments)
    direct = flat(truth.gradients) - flat(truth.implicit)
    size = len(direct)
    generator = torch.Generator().manual_seed(0)
    # As far as one step of Adam moves α, and so little that hardly a kink is crossed.
    moves = {"one step of α": ALPHA_LR * size**0.5, "1e-6": 1e-6}
    found: dict[str, Any] = {}
    for name, length in moves.items():
        measured, predicted = [], {"exact": [], "finite_difference": []}
        for _ in range(directions):
            direction = F.normalize(torch.randn(size, dtype=torch.float64, generator=generator), dim=0)
            pieces = direction.split([alpha.numel() for alpha in search.alphas])
            ends = [
                search.unrolled_loss(
                    training,
                    validation,
                    [
                        (a + sign * length * piece.view_as(a)).detach()
                        for a, piece in zip(search.alphas, pieces, strict=True)
                    ],
                )
                for sign in (1, -1)
            ]
            measured.append((ends[0] - ends[1]) / (2 * length) - (direct @ direction).item())
            predicted["exact"].append((flat(truth.implicit) @ direction).item())
            predicted["finite_difference"].append((flat(estimate.implicit) @ direction).item())
        real = np.array(measured)
        found[name] = {
            kind: {
                "relative_error": float(np.linalg.norm(np.array(values) - real) / np.linalg.norm(real)),
                "cosine": float(np.array(values) @ real / np.linalg.norm(values) / np.linalg.norm(real)),
            }
            for kind, values in predicted.items()
        }
    return found


def endless(data: Any, size: int) -> Any:
    """Yield batches of images and labels, in double precision."""
    generator = torch.Generator().manual_seed(0)
    while True:
        for chosen in torch.randperm(len(data), generator=generator).split(size):
            if len(chosen) == size:
                images, labels = zip(*(data[int(i)] for i in chosen), strict=True)
                yield torch.stack(images).double(), torch.tensor(labels)


def main() -> None:
    """Measure, write the result, and print it as tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 30], help="steps before the measurement")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32, 64], help="batch sizes")
    parser.add_argument("--repeats", type=int, default=2, help="pairs of batches that are measured")
    parser.add_argument("--directions", type=int, default=6, help="moves of α that are tried")
    arguments = parser.parse_args()
    images = load_data("mnist5k", resolution=RESOLUTION).weights
    rows, predictions = [], []
    for smooth in (False, True):
        search, done = Search(smooth=smooth), 0
        for stage in arguments.stages:
            search.train(endless(images, 32), stage - done)
            done = stage
            for size in arguments.batches if not smooth else [32]:
                batches = endless(images, size)
                found = [compare(search, batches) for _ in range(arguments.repeats)]
                row = {"smooth": smooth, "steps": stage, "batch": size, **summary([item[0] for item in found])}
                rows.append(row)
                print(line(row), flush=True)
                if size == 32:
                    real = predict(search, found[0][2], arguments.directions)
                    predictions.append({"smooth": smooth, "steps": stage, "batch": size, **real})
                    print(predictions[-1], flush=True)
    what = "implicit term of the hypergradient: finite difference against exact, float64"
    file = save_result("hypergradients", {"what": what, "space": SPACE, "rows": rows, "predictions": predictions})
    print(f"written to {file}")


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return means and spreads over the pairs of batches."""
    result: dict[str, Any] = {"implicit_share": mean_and_spread([item["implicit_share"] for item in found])}
    for radius in found[0]["radii"]:
        result[radius] = {
            key: mean_and_spread([item["radii"][radius][key] for item in found]) for key in ("relative_error", "cosine")
        }
    return result


def line(row: dict[str, Any]) -> str:
    """Write one measurement as a row of a Markdown table."""
    cells = [
        "softplus, average" if row["smooth"] else "ReLU, max",
        str(row["steps"]),
        str(row["batch"]),
        f"{100 * row['implicit_share']['mean']:.0f} %",
    ]
    for radius in map("{:g}".format, RADII):
        error, cosine = row[radius]["relative_error"], row[radius]["cosine"]
        cells.append(f"{error['mean']:.2g} ± {error['sd']:.1g} (cosine {cosine['mean']:.2f})")
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
