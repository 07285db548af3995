from __future__ import annotations

import itertools
import random
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from nni.nas.nn.pytorch import InputChoice, LayerChoice
from nni.nas.oneshot.pytorch.supermodule.differentiable import DifferentiableMixedInput, DifferentiableMixedLayer
from nni.nas.oneshot.pytorch.supermodule.sampling import PathSamplingInput, PathSamplingLayer
from nni.nas.strategy import DARTS, RandomOneShot
from torch import Tensor, nn

from nni_cream.errors import UserError
from nni_cream.genotype import Genotype, edge_label, edges_of, inputs_label
from nni_cream.models.darts_operations import OPERATIONS, PAPER_OPERATIONS, FactorizedReduce, ReLUConvBN
from nni_cream.strategies.darts import DartsStrategy
from nni_cream.supernet.fused_cell import FusedCell
from nni_cream.supernet.mixed_cell import DiscreteCell, MixedCell
from search_spaces.darts import DartsCell, DartsSpace
from tests.darts_reference import space_of
from tests.reference import golden, run_through

FILES: dict[str, Any] = {name: golden(f"darts/{name}") for name in ("search_2_nodes.json", "search_4_nodes.json")}
SMALL = ("skip_connect", "sep_conv_3x3", "max_pool_3x3")


def build(**settings: Any) -> DartsSpace:
    torch.manual_seed(0)
    return DartsSpace(**{"num_classes": 5, "channels": 2, "cells": 3, "nodes": 2, "operations": SMALL} | settings)


def draw(seed: int, nodes: int, operations: Sequence[str], concat: int | None = None) -> Genotype:
    """A random genotype, its edges in any order."""
    generator = random.Random(seed)
    last = tuple(range(2 + nodes - (concat or nodes), 2 + nodes))

    def cell() -> tuple[tuple[str, int], ...]:
        return tuple(
            (generator.choice(list(operations)), state)
            for node in range(2, 2 + nodes)
            for state in generator.sample(range(node), 2)
        )

    return Genotype(cell(), last, cell(), last)


class TestPublishedNetworks:
    @pytest.mark.parametrize("name", FILES)
    def test_state(self, name: str) -> None:
        data = FILES[name]
        space = space_of(data["network"])
        # Another name for an edge, but the same order and the same ends.
        shapes = [(key.split(".")[-1], list(tensor.shape)) for key, tensor in space.state_dict().items()]
        assert shapes == [(key.split(".")[-1], shape) for key, shape in data["state_dict"]]
        assert sum(p.numel() for p in space.parameters()) == data["parameters"]

    def test_published_size(self) -> None:
        # The published search prints "param size = 1.930618MB".
        with torch.device("meta"):
            space = DartsSpace(10)
        assert sum(p.numel() for p in space.parameters()) == 1_930_618


class TestForward:
    @pytest.mark.parametrize(
        ("cells", "nodes", "concat", "channels"),
        [(3, 1, None, 2), (4, 2, 1, 4), (5, 3, 2, 2), (6, 4, None, 2), (8, 2, 2, 2)],
    )
    def test_shapes(self, cells: int, nodes: int, concat: int | None, channels: int) -> None:
        space = build(cells=cells, nodes=nodes, concat=concat, channels=channels)
        shapes: list[tuple[int, ...]] = []
        for cell in space.cells:
            cell.register_forward_hook(lambda _module, _inputs, output: shapes.append(tuple(output.shape)))
        sample = space.sample(draw(1, nodes, SMALL))
        run_through(space, sample)
        logits = space(torch.randn(2, 3, 16, 16))
        assert logits.shape == (2, 5)
        reductions = (cells // 3, 2 * cells // 3)
        expected, width, size = [], channels, 16
        for position in range(cells):
            if position in reductions:
                width, size = 2 * width, size // 2
            expected.append((2, (concat or nodes) * width, size, size))
        assert shapes == expected
        assert [cell.kind for cell in space.cells] == [
            "reduce" if position in reductions else "normal" for position in range(cells)
        ]
        # The cell after a reduction brings the output before it to half the size.
        assert [type(cell.preprocess0) for cell in space.cells] == [
            FactorizedReduce if position - 1 in reductions else ReLUConvBN for position in range(cells)
        ]

    def test_small_and_rectangular_images(self) -> None:
        space = build().eval()
        run_through(space, space.sample(draw(1, 2, SMALL)))
        assert space(torch.randn(1, 3, 4, 12)).shape == (1, 5)

    def test_every_operation(self) -> None:
        space = build(operations=OPERATIONS, nodes=1)
        for first in range(0, len(OPERATIONS), 2):
            pair = tuple((name, state) for state, name in enumerate(OPERATIONS[first : first + 2]))
            genotype = Genotype(pair, (2,), pair, (2,))
            assert space.freeze(space.sample(genotype))(torch.randn(2, 3, 8, 8)).isfinite().all()


class TestChoices:
    @pytest.mark.parametrize("nodes", [1, 2, 4])
    def test_labels(self, nodes: int) -> None:
        space = build(nodes=nodes, cells=5)
        mutables = space.simplify()
        expected = [
            label
            for kind in ("normal", "reduce")
            for label in (
                *(edge_label(kind, node, state) for node, state in edges_of(nodes)),  # type: ignore[arg-type]
                *(inputs_label(kind, node) for node in range(2, 2 + nodes)),  # type: ignore[arg-type]
            )
        ]
        assert sorted(mutables) == sorted(expected)
        for label, mutable in mutables.items():
            if label.endswith("inputs"):
                node = int(label.split("node")[1].split("_")[0])
                assert (list(mutable.values), mutable.n_chosen) == (list(range(node)), 2)
            else:
                assert list(mutable.values) == list(SMALL)

    def test_strides(self) -> None:
        space = build(operations=("skip_connect",), cells=3, nodes=2)
        for cell in space.cells:
            halves = [isinstance(edge["skip_connect"], FactorizedReduce) for edge in cell.edges]
            assert halves == [cell.kind == "reduce" and state < 2 for _, state in edges_of(2)]

    def test_operations_in_their_order(self) -> None:
        order = ("dil_conv_5x5", "none", "skip_connect")
        space = build(operations=order)
        assert space.operations == order
        assert all(tuple(edge.names) == order for cell in space.cells for edge in cell.edges)
        assert DartsSpace(3, channels=2, cells=3, nodes=1).operations == PAPER_OPERATIONS

    def test_search_batch_norms(self) -> None:
        space = build(operations=OPERATIONS)
        inside = [m for cell in space.cells for m in cell.modules() if isinstance(m, nn.BatchNorm2d)]
        assert not any(norm.affine for norm in inside)
        assert space.stem[1].affine
        pools = [edge["max_pool_3x3"] for cell in space.cells for edge in cell.edges]
        assert all(isinstance(pool[1], nn.BatchNorm2d) for pool in pools)


class TestGenotypes:
    @pytest.mark.parametrize("seed", range(4))
    def test_round_trip(self, seed: int) -> None:
        nodes = 1 + seed
        for operations, concat in itertools.product((SMALL, ("none", *SMALL)), range(1, nodes + 1)):
            space = build(nodes=nodes, concat=concat, operations=operations)
            genotype = draw(seed, nodes, operations, concat)
            sample = space.sample(genotype)
            assert space.genotype(sample) == genotype
            assert set(sample) == set(space.simplify())
            assert space.contains(sample)

    def test_genotype_of_another_space(self) -> None:
        space = build()
        with pytest.raises(UserError, match="names 'dil_conv_3x3', but the space offers skip_connect, sep_conv_3x3, m"):
            space.sample(draw(0, 2, ("dil_conv_3x3",)))

    @pytest.mark.parametrize(("cells", "concat"), [(3, None), (4, 1), (6, 2)])
    def test_frozen_network(self, cells: int, concat: int | None) -> None:
        operations = ("none", *SMALL, "dil_conv_5x5")
        space = build(cells=cells, nodes=3, concat=concat, operations=operations).double()
        genotype = draw(3, 3, operations, concat)
        frozen = space.freeze(space.sample(genotype))
        assert all(type(cell) is DiscreteCell for cell in frozen.cells)
        assert not any(isinstance(module, LayerChoice | InputChoice) for module in frozen.modules())
        images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
        torch.testing.assert_close(frozen(images), self.evaluate(space, genotype, images))
        # The cells' weights are those of the space, not copies; what is not chosen is gone.
        parameters = {id(p) for p in space.parameters()}
        assert all(id(p) in parameters for cell in frozen.cells for p in cell.parameters())
        chosen = sum(
            p.numel()
            for cell in space.cells
            for part in (
                cell.preprocess0,
                cell.preprocess1,
                *(self.module(cell, node, edge) for node, edge in self.kept(genotype, cell.kind)),
            )
            for p in part.parameters()
        )
        outside = sum(p.numel() for part in (space.stem, space.classifier) for p in part.parameters())
        assert sum(p.numel() for p in frozen.parameters()) == chosen + outside

    def kept(self, genotype: Genotype, kind: str) -> list[tuple[int, tuple[str, int]]]:
        edges = genotype.normal if kind == "normal" else genotype.reduce
        return [(2 + position // 2, edge) for position, edge in enumerate(edges)]

    def module(self, cell: Any, node: int, edge: tuple[str, int]) -> nn.Module:
        name, state = edge
        found: nn.Module = cell.edges[edges_of(3).index((node, state))][name]
        return found

    def evaluate(self, space: Any, genotype: Genotype, images: Tensor) -> Tensor:
        outputs = [space.stem(images)] * 2
        for cell in space.cells:
            states = [cell.preprocess0(outputs[-2]), cell.preprocess1(outputs[-1])]
            for node in (2, 3, 4):
                edges = [edge for to, edge in self.kept(genotype, cell.kind) if to == node]
                states.append(sum(self.module(cell, node, edge)(states[edge[1]]) for edge in edges))
            outputs.append(torch.cat([states[k] for k in genotype.normal_concat], 1))
        logits: Tensor = outputs[-1].mean((2, 3)) @ space.classifier.weight.T + space.classifier.bias
        return logits

    def test_dry_run_is_the_frozen_network(self) -> None:
        space = build(nodes=3).double()
        sample = space.sample(draw(5, 3, SMALL))
        frozen = space.freeze(sample)
        run_through(space, sample)
        images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
        torch.testing.assert_close(space(images), frozen(images))

    @pytest.mark.parametrize("wrong", ["missing", "unknown operation", "three inputs"])
    def test_freeze_checks_the_sample(self, wrong: str) -> None:
        space = build()
        sample = space.sample(draw(1, 2, SMALL))
        if wrong == "missing":
            del sample["reduce_node3_edge2"]
        elif wrong == "unknown operation":
            sample["reduce_node3_edge2"] = "conv_9x9"
        else:
            sample["reduce_node3_inputs"] = [0, 1, 2]
        with pytest.raises(ValueError, match=r"reduce_node3_|conv_9x9 not found"):
            space.freeze(sample)


class TestStrategies:
    def test_ours_relaxes_whole_cells(self) -> None:
        space = build(nodes=3, cells=4)
        strategy = DartsStrategy()
        assert strategy.mutate_model(space) is space
        assert all(type(cell) is FusedCell for cell in space.cells)
        assert [tuple(strategy.alphas[name].shape) for name in ("normal", "reduce")] == [(9, 3), (9, 3)]
        assert len(strategy.alphas) == 2

    def test_as_in_the_textbook(self) -> None:
        space = DartsStrategy(execution="textbook").mutate_model(build(nodes=3, cells=4))
        assert all(type(cell) is MixedCell for cell in space.cells)

    def test_parts_stay_the_same_ones(self) -> None:
        space = build()
        before = [(id(p), p.shape) for p in space.parameters()]
        DartsStrategy().mutate_model(space)
        assert [(id(p), p.shape) for p in space.parameters()] == before

    @pytest.mark.parametrize(
        ("strategy", "layer", "inputs"),
        [
            (DARTS, DifferentiableMixedLayer, DifferentiableMixedInput),
            (RandomOneShot, PathSamplingLayer, PathSamplingInput),
        ],
    )
    def test_others_of_nni_see_the_choices(self, strategy: Any, layer: type, inputs: type) -> None:
        space = build()
        strategy().mutate_model(space)
        assert all(type(cell) is DartsCell for cell in space.cells)
        assert all(type(edge) is layer for cell in space.cells for edge in cell.edges)
        assert all(type(choice) is inputs for cell in space.cells for choice in cell.inputs)
        memo: dict[str, Any] = {}
        for module in space.modules():
            if isinstance(module, (layer, inputs)):
                memo |= module.resample(memo)  # type: ignore[attr-defined]
        logits = space(torch.randn(2, 3, 8, 8))
        assert logits.shape == (2, 5)
        assert logits.isfinite().all()
        if strategy is RandomOneShot:
            assert set(memo) == set(build().simplify())
            torch.testing.assert_close(space.freeze(memo).eval()(torch.ones(1, 3, 8, 8)).shape, (1, 5))

    @pytest.mark.slow
    def test_ours_do_not_keep_others_from_importing(self) -> None:
        # In a process of its own, where NNI has not been imported in another order yet.
        code = "import nni_cream.strategies; from nni.nas.strategy import DARTS; print(DARTS.__module__)"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert result.stdout.strip() == "nni.nas.oneshot.pytorch.strategy"

    def test_a_random_sample_is_a_genotype(self) -> None:
        space = build(nodes=4)
        for seed in range(3):
            sample: dict[str, Any] = {}
            network = space.random(sample, np.random.RandomState(seed))
            genotype = space.genotype(sample)
            assert genotype.nodes("normal") == genotype.nodes("reduce") == 4
            assert [cell.states for cell in network.cells] == [
                tuple(state for _, state in genotype.edges(cell.kind)) for cell in space.cells
            ]


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"channels": 3}, "A DARTS space has an even number of channels, at least 2, not 3."),
            ({"channels": 0}, "A DARTS space has an even number of channels, at least 2, not 0."),
            ({"channels": -2}, "A DARTS space has an even number of channels, at least 2, not -2."),
            ({"cells": 2}, "A DARTS space needs at least 3 cells, two of them reductions, not 2."),
            ({"nodes": 0}, "A DARTS cell needs at least 1 node, not 0."),
            ({"concat": 0}, "The output of a DARTS cell is made of 1 to 2 of its nodes, not of 0."),
            ({"concat": 3}, "The output of a DARTS cell is made of 1 to 2 of its nodes, not of 3."),
            (
                {"operations": ("none", "skip_connect", "none")},
                "The operations of a DARTS space are none, skip_connect, none; name each once.",
            ),
            ({"operations": ("none",)}, "A DARTS space needs at least one operation other than none."),
            ({"operations": ()}, "A DARTS space needs at least one operation other than none."),
            (
                {"operations": ("skip_connect", "conv_9x9")},
                "There is no operation 'conv_9x9' in DARTS; there are none, ",
            ),
        ],
        ids=str,
    )
    def test_message(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError) as error:
            build(**settings)
        assert str(error.value).startswith(message)

    def test_smallest(self) -> None:
        space = build(channels=2, cells=3, nodes=1, concat=1, operations=("skip_connect",))
        assert space(torch.randn(2, 3, 4, 4)).shape == (2, 5)
