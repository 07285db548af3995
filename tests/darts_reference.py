"""The search networks of the reference (``golden/darts/search_*.json``), relaxed, with its weights, α and images."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nni_cream.genotype import CELL_KINDS
from nni_cream.strategies.darts import DartsStrategy
from nni_cream.supernet.alphas import Alphas
from nni_cream.supernet.functional import pure_loss
from search_spaces.darts import DartsSpace
from tests.reference import golden, rule


class Together(nn.Module):
    """A space and its α as one module, so that both have names in it."""

    def __init__(self, space: nn.Module, alphas: nn.Module) -> None:
        super().__init__()
        self.space = space
        self.alphas = alphas

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.space(images)
        return logits


@dataclass
class GoldenSearch:
    """A relaxed space in the state that the reference starts from, in double precision and training mode.

    Attributes:
        data: the file.
        strategy: what relaxed the space.
        space: the space.
        alphas: its α.
        names: for every entry of the space's state dict, the reference's name.
        weights: the parameters w, in the order of ``space.named_parameters()``.
        images: of the parts ``train`` and ``valid``.
        targets: likewise.
    """

    data: dict[str, Any]
    strategy: DartsStrategy
    space: DartsSpace
    alphas: Alphas
    names: dict[str, str]
    weights: list[nn.Parameter]
    images: dict[str, Tensor]
    targets: dict[str, Tensor]

    @property
    def tables(self) -> list[nn.Parameter]:
        """The tables of α, in their own order."""
        return list(self.alphas.parameters())

    def loss(self, part: str) -> Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]:
        """Return the loss on a part as a function of (w, α)."""
        network = Together(self.space, self.alphas)
        names = (
            [f"space.{name}" for name, _ in self.space.named_parameters()],
            [f"alphas.{name}" for name, _ in self.alphas.named_parameters()],
        )
        return pure_loss(network, names, lambda logits: F.cross_entropy(logits, self.targets[part]), self.images[part])

    def momentum(self, name: str) -> Tensor:
        """Return the reference's momentum buffer of the parameter that ``space`` has under ``name``."""
        shape = tuple(self.space.get_parameter(name).shape)
        return 0.01 * normal(self.data["seed"] + "momentum/" + self.names[name], *shape)

    def sgd(self, *, momentum_buffers: bool) -> torch.optim.SGD:
        """Return the optimizer of the reference, with its momentum buffers or none yet."""
        given = self.data["hyperparameters"]
        optimizer = torch.optim.SGD(
            self.weights, given["eta"], momentum=given["momentum"], weight_decay=given["weight_decay"]
        )
        if momentum_buffers:
            for name, parameter in self.space.named_parameters():
                optimizer.state[parameter]["momentum_buffer"] = self.momentum(name)
        return optimizer

    def by_kind(self, tables: Sequence[Tensor]) -> dict[str, Tensor]:
        """Sort what there is one of for each table of α by the kind of cell."""
        return dict(zip(self.alphas, tables, strict=True))


def normal(key: str, *shape: int) -> Tensor:
    return torch.from_numpy(_random(key).standard_normal(shape))


def _random(key: str) -> np.random.RandomState:
    return np.random.RandomState(zlib.crc32(key.encode()) & 0x7FFFFFFF)


def space_of(network: Mapping[str, int]) -> DartsSpace:
    """Build the space that a file describes under ``network``."""
    return DartsSpace(
        network["num_classes"],
        channels=network["C"],
        cells=network["layers"],
        nodes=network["steps"],
        concat=network["multiplier"],
    )


def golden_search(file: str, **settings: Any) -> GoldenSearch:
    """Build the network of ``golden/darts/<file>``; ``settings`` are those of the strategy."""
    data: dict[str, Any] = golden(f"darts/{file}")
    seed, network = data["seed"], data["network"]
    space = space_of(network)
    strategy = DartsStrategy(**settings)
    strategy.mutate_model(space)
    space.double()
    strategy.alphas.double()
    state = space.state_dict()
    names = dict(zip(state, [name for name, _ in data["state_dict"]], strict=True))
    space.load_state_dict(
        {
            ours: torch.zeros_like(state[ours])
            if theirs.endswith("num_batches_tracked")
            else rule(theirs, tuple(state[ours].shape), seed)
            for ours, theirs in names.items()
        }
    )
    with torch.no_grad():
        for kind in CELL_KINDS:
            table = strategy.alphas[kind]
            table.copy_(0.5 * normal(f"{seed}alphas_{kind}", *table.shape))
    images = {part: normal(f"{seed}x_{part}", *data["input_shape"]) for part in ("train", "valid")}
    targets = {
        part: torch.from_numpy(_random(f"{seed}y_{part}").randint(0, network["num_classes"], data["input_shape"][0]))
        for part in ("train", "valid")
    }
    return GoldenSearch(
        data, strategy, space.train(), strategy.alphas, names, list(space.parameters()), images, targets
    )
