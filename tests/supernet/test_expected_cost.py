from __future__ import annotations

import itertools
from typing import Any

import nni.nas.nn.pytorch as nas
import pytest
import torch
from nni.nas.nn.pytorch import InputChoice, LayerChoice
from torch import Tensor, nn

from nni_cream.cost import measure_network, measure_space
from nni_cream.genotype import CELL_KINDS, cell_sample, edges_of
from nni_cream.strategies.darts import DartsStrategy
from nni_cream.supernet.alphas import Alphas
from nni_cream.supernet.expected_cost import ExpectedCost
from search_spaces.darts import DartsSpace

OPERATIONS = ("none", "skip_connect", "sep_conv_3x3", "dil_conv_5x5")
RESOLUTION = 16


def build(space: Any) -> tuple[Any, Alphas, ExpectedCost]:
    table = measure_space(space, (3, RESOLUTION, RESOLUTION))
    strategy = DartsStrategy()
    strategy.mutate_model(space)
    return space, strategy.alphas.double(), ExpectedCost(table, space, strategy.alphas)


def darts(nodes: int, operations: tuple[str, ...] = OPERATIONS) -> tuple[DartsSpace, Alphas, ExpectedCost]:
    torch.manual_seed(0)
    return build(DartsSpace(3, channels=2, cells=3, nodes=nodes, operations=operations))


def one_hot(alphas: Alphas, chosen: dict[str, list[int]]) -> list[Tensor]:
    tables = []
    for name in alphas:
        table = torch.full_like(alphas[name], -1000.0)
        table[torch.arange(len(table)), torch.tensor(chosen[name])] = 1000
        tables.append(table)
    return tables


def child_macs(space: DartsSpace, kept: dict[str, list[tuple[str, int]]]) -> int:
    sample: dict[str, Any] = {}
    for kind in CELL_KINDS:
        sample |= cell_sample(kind, kept[kind], space.operations)
    return measure_network(space.freeze(sample), RESOLUTION).macs


class TestDartsSpace:
    @pytest.mark.parametrize("seed", range(4))
    def test_one_hot_where_all_edges_are_kept(self, seed: int) -> None:
        space, alphas, cost = darts(nodes=1)
        generator = torch.Generator().manual_seed(seed)
        chosen = {kind: torch.randint(4, (2,), generator=generator).tolist() for kind in CELL_KINDS}
        kept = {kind: [(OPERATIONS[k], state) for state, k in enumerate(chosen[kind])] for kind in CELL_KINDS}
        assert cost(one_hot(alphas, chosen)).item() == pytest.approx(child_macs(space, kept), rel=1e-6)

    def test_one_hot_is_the_mean_over_the_edges_that_may_be_kept(self) -> None:
        space, alphas, cost = darts(nodes=2)
        generator = torch.Generator().manual_seed(0)
        chosen = {kind: torch.randint(4, (5,), generator=generator).tolist() for kind in CELL_KINDS}
        rows = {edge: row for row, edge in enumerate(edges_of(2))}

        def edges(kind: str, states: tuple[int, ...]) -> list[tuple[str, int]]:
            pairs = [(2, 0), (2, 1), *((3, state) for state in states)]
            return [(OPERATIONS[chosen[kind][rows[pair]]], pair[1]) for pair in pairs]

        possible = list(itertools.combinations(range(3), 2))
        children = [
            child_macs(space, {"normal": edges("normal", a), "reduce": edges("reduce", b)})
            for a, b in itertools.product(possible, possible)
        ]
        assert len(set(children)) > 1
        assert cost(one_hot(alphas, chosen)).item() == pytest.approx(sum(children) / 9, rel=1e-6)

    def test_is_the_mean_over_drawn_operations(self) -> None:
        operations = ("skip_connect", "sep_conv_3x3")
        space, alphas, cost = darts(nodes=1, operations=operations)
        tables = [torch.randn(2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) for k in range(2)]
        probabilities = dict(zip(alphas, [table.softmax(-1) for table in tables], strict=True))
        expected = 0.0
        for drawn in itertools.product(range(2), repeat=4):
            pairs = {"normal": drawn[:2], "reduce": drawn[2:]}
            probability = 1.0
            for kind in CELL_KINDS:
                for row, k in enumerate(pairs[kind]):
                    probability *= probabilities[kind][row, k].item()
            kept = {kind: [(operations[k], state) for state, k in enumerate(pairs[kind])] for kind in CELL_KINDS}
            expected += probability * child_macs(space, kept)
        assert cost(tables).item() == pytest.approx(expected, rel=1e-6)

    def test_share_of_an_edge(self) -> None:
        _, alphas, cost = darts(nodes=3)
        names = list(alphas)
        assert names == ["normal", "reduce"]
        space = DartsSpace(3, channels=2, cells=3, nodes=3, operations=OPERATIONS)
        table = measure_space(space, (3, RESOLUTION, RESOLUTION))
        nothing = {name: [0] * 9 for name in names}
        least = cost(one_hot(alphas, nothing)).item()
        assert least == pytest.approx(table.fixed.macs, rel=1e-6)
        for kind, (row, (node, state)) in itertools.product(names, enumerate(edges_of(3))):
            chosen = {name: list(rows) for name, rows in nothing.items()}
            chosen[kind][row] = 2
            more = cost(one_hot(alphas, chosen)).item() - least
            macs = table.choices[f"{kind}_node{node}_edge{state}"][2].macs
            assert more == pytest.approx(macs * 2 / node, rel=1e-4)
            assert macs > 0

    def test_gradient(self) -> None:
        _, alphas, cost = darts(nodes=2)
        tables = [torch.randn_like(alphas[name]).requires_grad_() for name in alphas]
        assert torch.autograd.gradcheck(
            lambda *tables: cost(list(tables)) / 1e5, tuple(tables), eps=1e-6, atol=1e-6, rtol=1e-6
        )
        gradients = torch.autograd.grad(cost(tables), tables)
        assert all(gradient.abs().max() > 1 for gradient in gradients)

    def test_does_not_keep_what_it_is_given(self) -> None:
        _, alphas, cost = darts(nodes=1)
        assert list(cost.parameters()) == []
        assert list(cost.state_dict()) == []
        assert cost(list(alphas.parameters())).shape == ()


class Space(nas.ModelSpace):
    """Layers that choose alike at two sizes, a choice by itself, and one of inputs, which costs nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.skip = InputChoice(2, n_chosen=1, reduction="sum", label="a_skip")
        self.first = self.layer("shared")
        self.pool = nn.AvgPool2d(2)
        self.second = self.layer("shared")
        self.third = LayerChoice({"wide": nn.Conv2d(4, 4, 5), "narrow": nn.Conv2d(4, 4, 1)}, label="own")

    def layer(self, label: str) -> LayerChoice:
        return LayerChoice([nn.Conv2d(4, 4, 3, padding=1), nn.Identity(), nn.Conv2d(4, 4, 1)], label=label)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        x = self.skip([x, x * 2])
        features: Tensor = self.third(self.second(self.pool(self.first(x))))
        return features


class TestOtherSpaces:
    def test_one_hot(self) -> None:
        space, alphas, cost = build(Space())
        assert list(alphas) == ["a_skip", "shared", "own"]
        for shared, own in itertools.product(range(3), range(2)):
            tables = [torch.zeros(2), torch.full((3,), -1000.0), torch.full((2,), -1000.0)]
            tables[1][shared] = tables[2][own] = 1000
            child = space.freeze({"a_skip": [0], "shared": shared, "own": ("wide", "narrow")[own]})
            assert cost(tables).item() == measure_network(child, RESOLUTION).macs

    def test_no_gradient_in_choices_of_inputs(self) -> None:
        _, alphas, cost = build(Space())
        tables = list(alphas.parameters())
        slopes = torch.autograd.grad(cost(tables), tables, allow_unused=True)
        assert [slope is None for slope in slopes] == [True, False, False]
