from __future__ import annotations

import itertools
from collections import OrderedDict
from typing import Any

import nni
import nni.nas.nn.pytorch as nas
import pytest
import torch
from nni.nas.oneshot.pytorch.supermodule.base import BaseSuperNetModule
from torch import Tensor, nn

from nni_cream.errors import UserError
from nni_cream.strategies.cream import CreamStrategy
from nni_cream.supernet.paths import PathSpace, activate


class Space(nas.ModelSpace):
    """Three choices: layers by number, layers by name, and two of four inputs; "layer" is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nas.LayerChoice([nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(3, 4)], label="layer")
        self.second = nas.LayerChoice(OrderedDict(linear=nn.Linear(4, 4), tanh=nn.Tanh()), label="named")
        self.third = nas.LayerChoice([nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)], label="layer")
        self.join = nas.InputChoice(4, n_chosen=2, reduction="concat", label="inputs")

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        b = self.second(a)
        c = self.third(b)
        return self.join([a, b, c, a * b])


def every_path(paths: PathSpace) -> list[tuple[int, ...]]:
    return list(itertools.product(*map(range, paths.sizes)))


@pytest.fixture
def space() -> Space:
    torch.manual_seed(0)
    return Space()


def test_labels_and_sizes(space: Space) -> None:
    paths = PathSpace(space)
    assert dict(zip(paths.labels, paths.sizes, strict=True)) == {"layer": 3, "named": 2, "inputs": 6}


def test_paths_and_samples_are_one_to_one(space: Space) -> None:
    paths = PathSpace(space)
    samples = [paths.to_sample(path) for path in every_path(paths)]
    assert [paths.to_path(sample) for sample in samples] == every_path(paths)
    assert len({str(sample) for sample in samples}) == 3 * 2 * 6
    for sample in samples:
        space.validate(sample)  # raises if it is no sample of the space
    assert {tuple(sample["inputs"]) for sample in samples} == set(itertools.combinations(range(4), 2))
    assert {sample["named"] for sample in samples} == {"linear", "tanh"}


def test_wrong_number_of_choices_is_an_error(space: Space) -> None:
    with pytest.raises(ValueError, match="shorter"):
        PathSpace(space).to_sample((0, 0))


def test_a_supernet_runs_exactly_the_active_path(space: Space) -> None:
    paths = PathSpace(space)
    x = torch.randn(5, 3)
    with torch.no_grad():
        expected = {path: space.freeze(paths.to_sample(path))(x) for path in every_path(paths)}
        supernet = CreamStrategy().mutate_model(space)
        modules = [module for module in supernet.modules() if isinstance(module, BaseSuperNetModule)]
        assert len(modules) == 4
        for path in reversed(every_path(paths)):
            activate(modules, paths.to_sample(path))
            assert torch.equal(supernet(x), expected[path])
    assert len({tuple(output.flatten().tolist()) for output in expected.values()}) == len(expected)


def test_only_the_active_path_gets_gradients(space: Space) -> None:
    paths = PathSpace(space)
    supernet = CreamStrategy().mutate_model(space)
    sample = {"layer": 2, "named": "tanh", "inputs": [1, 2]}
    activate([m for m in supernet.modules() if isinstance(m, BaseSuperNetModule)], sample)
    supernet(torch.randn(5, 3)).sum().backward()
    moved = {name.rsplit(".", 1)[0] for name, p in supernet.named_parameters() if p.grad is not None}
    assert moved == {"first.2", "third.2"}
    assert paths.to_path(sample) == tuple({"layer": 2, "named": 1, "inputs": 3}[label] for label in paths.labels)


def test_activating_does_not_change_the_sample(space: Space) -> None:
    paths = PathSpace(space)
    supernet = CreamStrategy().mutate_model(space)
    sample = paths.to_sample((0, 0, 0))
    before = dict(sample)
    activate([m for m in supernet.modules() if isinstance(m, BaseSuperNetModule)], sample)
    assert sample == before


class AnyInputs(nas.ModelSpace):
    def __init__(self) -> None:
        super().__init__()
        self.join = nas.InputChoice(3, n_chosen=None, label="any_inputs")

    def forward(self, x: Tensor) -> Tensor:
        return self.join([x, 2 * x, 3 * x])


class Width(nas.ModelSpace):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nas.MutableConv2d(3, nni.choice("width", [4, 8]), 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Depth(nas.ModelSpace):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nas.Repeat(lambda index: nn.Conv2d(3, 3, 1), nni.choice("depth", [1, 3]))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Rate(nas.ModelSpace):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nas.MutableDropout(nni.uniform("rate", 0.1, 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize(
    ("space", "label"), [(AnyInputs, "any_inputs"), (Width, "width"), (Depth, "depth"), (Rate, "rate")]
)
def test_other_mutables_are_refused_by_name_with_the_reason(space: Any, label: str) -> None:
    with pytest.raises(
        UserError, match=rf"The choice '{label}'.* takes LayerChoice, and InputChoice with n_chosen given"
    ):
        PathSpace(space())
