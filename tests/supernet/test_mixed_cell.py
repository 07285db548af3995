from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nni_cream.genotype import CELL_KINDS, Genotype, derive_genotype, edge_label, edges_of, inputs_label
from nni_cream.strategies.darts import DartsStrategy
from nni_cream.supernet.mixed_cell import DiscreteCell, MixedCell
from search_spaces.darts import DartsSpace
from tests.darts_reference import GoldenSearch, golden_search

OPERATIONS = ("none", "skip_connect", "max_pool_3x3", "dil_conv_3x3")


def relaxed(nodes: int = 3, concat: int | None = None, **settings: Any) -> tuple[DartsSpace, DartsStrategy]:
    torch.manual_seed(0)
    space = DartsSpace(3, channels=2, cells=4, nodes=nodes, concat=concat, operations=OPERATIONS)
    strategy = DartsStrategy(**settings)
    strategy.mutate_model(space)
    with torch.no_grad():
        for table in strategy.alphas.double().parameters():
            table.normal_()
    return space.double(), strategy


def inputs(cell: MixedCell, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    channels = [
        block.conv_1.in_channels if hasattr(block, "conv_1") else block.op[1].in_channels
        for block in (cell.preprocess0, cell.preprocess1)
    ]
    sizes = (2 * size if hasattr(cell.preprocess0, "conv_1") else size, size)
    first, second = (
        torch.randn(3, c, s, s, dtype=torch.float64, generator=generator) for c, s in zip(channels, sizes, strict=True)
    )
    return first, second


class TestPublishedNumbers:
    @pytest.fixture(params=["search_2_nodes.json", pytest.param("search_4_nodes.json", marks=pytest.mark.slow)])
    def search(self, request: pytest.FixtureRequest) -> GoldenSearch:
        return golden_search(request.param)

    def test_training(self, search: GoldenSearch) -> None:
        logits = search.space(search.images["train"])
        expected = torch.tensor(search.data["train_logits"], dtype=torch.float64)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
        loss = torch.nn.functional.cross_entropy(logits, search.targets["train"])
        assert loss.item() == pytest.approx(search.data["train_loss"], abs=1e-12)
        mean = torch.tensor(search.data["stem.1.running_mean_after_one_training_forward"], dtype=torch.float64)
        torch.testing.assert_close(search.space.stem[1].running_mean, mean, rtol=0, atol=1e-12)

    def test_evaluation(self, search: GoldenSearch) -> None:
        with torch.no_grad():
            logits = search.space.eval()(search.images["train"])
        expected = torch.tensor(search.data["eval_logits"], dtype=torch.float64)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)

    def test_genotype(self, search: GoldenSearch) -> None:
        sample: dict[str, Any] = {}
        for cell in search.space.cells:
            sample |= cell.export(sample)
        assert search.space.genotype(sample) == Genotype.of(search.data["genotype"])


class TestForward:
    @pytest.mark.parametrize("nodes", [1, 2, 3])
    @pytest.mark.parametrize("position", [0, 1, 2, 3])
    def test_formula(self, nodes: int, position: int) -> None:
        for concat in range(1, nodes + 1):
            space, strategy = relaxed(nodes, concat)
            cell = space.cells[position]
            s0, s1 = inputs(cell)
            alpha = strategy.alphas[cell.kind].detach()
            states = {0: cell.preprocess0(s0), 1: cell.preprocess1(s1)}
            for node in range(2, 2 + nodes):
                states[node] = 0
                for state in range(node):
                    row = sum(range(2, node)) + state
                    for k, name in enumerate(OPERATIONS):
                        share = alpha[row, k].exp() / alpha[row].exp().sum()
                        states[node] = states[node] + share * cell.edges[row][name](states[state])
            expected = torch.cat([states[node] for node in range(2 + nodes - concat, 2 + nodes)], dim=1)
            torch.testing.assert_close(cell(s0, s1), expected)
            assert expected.shape[1] == concat * states[1].shape[1]

    def test_cells_of_a_kind_share_alpha(self) -> None:
        space, strategy = relaxed()
        assert [cell.kind for cell in space.cells] == ["normal", "reduce", "reduce", "normal"]
        assert {name: tuple(strategy.alphas[name].shape) for name in strategy.alphas} == {
            "normal": (9, 4),
            "reduce": (9, 4),
        }
        for cell in space.cells:
            output = cell(*inputs(cell)).sum()
            slopes = torch.autograd.grad(output, list(strategy.alphas.parameters()), allow_unused=True)
            used = {name for name, slope in zip(strategy.alphas, slopes, strict=True) if slope is not None}
            assert used == {cell.kind}


class TestFreeze:
    SAMPLE_OPERATIONS = ("skip_connect", "dil_conv_3x3", "max_pool_3x3", "dil_conv_3x3", "none", "skip_connect")

    def sample(self) -> dict[str, Any]:
        edges = tuple(zip(self.SAMPLE_OPERATIONS, (1, 0, 0, 2, 3, 1), strict=True))
        return Genotype(edges, (2, 3, 4), edges[::-1][-2:] + edges[2:], (2, 3, 4)).to_sample(OPERATIONS)

    @pytest.mark.parametrize("position", [0, 1, 2, 3])
    def test_keeps_what_was_chosen_and_no_more(self, position: int) -> None:
        space, _ = relaxed()
        cell, sample = space.cells[position], self.sample()
        rows = {edge: row for row, edge in enumerate(edges_of(3))}
        frozen = cell.freeze(sample)
        assert type(frozen) is DiscreteCell
        s0, s1 = inputs(cell)
        states = [cell.preprocess0(s0), cell.preprocess1(s1)]
        chosen = []
        for node in (2, 3, 4):
            total = 0
            for state in sample[inputs_label(cell.kind, node)]:
                name = sample[edge_label(cell.kind, node, state)]
                chosen.append(cell.edges[rows[node, state]][name])
                total = total + chosen[-1](states[state])
            states.append(total)
        torch.testing.assert_close(frozen(s0, s1), torch.cat(states[2:], 1))
        assert [id(module) for module in frozen.edges] == [id(module) for module in chosen]
        expected = {id(p) for module in (cell.preprocess0, cell.preprocess1, *chosen) for p in module.parameters()}
        assert {id(p) for p in frozen.parameters()} == expected
        assert len(expected) < len(list(cell.parameters()))

    def test_concat(self) -> None:
        space, _ = relaxed(concat=1)
        cell = space.cells[0]
        whole, _ = relaxed()
        whole.cells[0].load_state_dict(cell.state_dict())
        last = cell.freeze(self.sample())(*inputs(cell))
        torch.testing.assert_close(last, whole.cells[0].freeze(self.sample())(*inputs(cell))[:, -2:])

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"normal_node2_edge0": "sep_conv_9x9"}, "sep_conv_9x9 not found"),
            ({"normal_node3_inputs": [0]}, "normal_node3_inputs"),
            ({"normal_node4_inputs": [0, 4]}, "normal_node4_inputs"),
        ],
    )
    def test_invalid_sample(self, wrong: dict[str, Any], message: str) -> None:
        space, _ = relaxed()
        with pytest.raises(ValueError, match=message):
            space.cells[0].freeze(self.sample() | wrong)

    def test_sample_that_says_too_little(self) -> None:
        space, _ = relaxed()
        sample = self.sample()
        del sample["normal_node3_edge1"]
        with pytest.raises(ValueError, match="normal_node3_edge1"):
            space.cells[0].freeze(sample)

    def test_frozen_relaxation_is_the_frozen_space(self) -> None:
        torch.manual_seed(0)
        plain = DartsSpace(3, channels=2, cells=4, nodes=3, operations=OPERATIONS).double()
        space, _ = relaxed()
        # Under other names, but in the same order.
        state = dict(zip(space.state_dict(), plain.state_dict().values(), strict=True))
        space.load_state_dict(state)
        images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
        sample = self.sample()
        torch.testing.assert_close(space.freeze(sample)(images), plain.freeze(sample)(images))


class TestExport:
    def test_published_rule(self) -> None:
        space, strategy = relaxed()
        sample: dict[str, Any] = {}
        for cell in space.cells:
            sample |= cell.export(sample)
        alphas = {kind: strategy.alphas[kind].detach().float().numpy() for kind in CELL_KINDS}
        genotype = derive_genotype(alphas, OPERATIONS)
        assert space.genotype(sample) == genotype
        assert sample == genotype.to_sample(OPERATIONS)
        assert set(sample) == set(space.simplify())

    def test_each_kind_once(self) -> None:
        space, _ = relaxed()
        first, _, _, last = space.cells
        sample = first.export({})
        assert last.export({}) == sample
        assert last.export(sample) == {}
        assert all(label.startswith("normal_") for label in sample)
        assert space.cells[1].export(sample)

    def test_skip_limit_is_for_the_normal_cell(self) -> None:
        space, strategy = relaxed(skip_limit=1)
        column = OPERATIONS.index("skip_connect")
        with torch.no_grad():
            for table in strategy.alphas.parameters():
                table[:, column] += 10
        sample: dict[str, Any] = {}
        for cell in space.cells:
            sample |= cell.export(sample)
        genotype = space.genotype(sample)
        assert genotype.skip_connections("normal") == 1
        assert genotype.skip_connections("reduce") == 6
        # What guards against a collapse counts without the limit.
        assert [cell.skip_connections() for cell in space.cells] == [6, 6, 6, 6]

    def test_skip_connections_are_those_of_the_rule(self) -> None:
        space, strategy = relaxed()
        alphas = {kind: strategy.alphas[kind].detach().float().numpy() for kind in CELL_KINDS}
        genotype = derive_genotype(alphas, OPERATIONS)
        counts = {kind: genotype.skip_connections(kind) for kind in CELL_KINDS}
        assert [cell.skip_connections() for cell in space.cells] == [counts[cell.kind] for cell in space.cells]
        assert 0 < sum(counts.values()) < 12

    def test_probabilities(self) -> None:
        space, strategy = relaxed()
        known = {"reduce_node3_edge1": {}}
        probabilities = space.cells[1].export_probs(known)
        weights = strategy.alphas.mixing_weights("reduce")
        expected = {
            f"reduce_node{node}_edge{state}": dict(zip(OPERATIONS, row.tolist(), strict=True))
            for (node, state), row in zip(
                [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2), (4, 0), (4, 1), (4, 2), (4, 3)], weights, strict=True
            )
        }
        del expected["reduce_node3_edge1"]
        assert probabilities == expected
        assert sum(probabilities["reduce_node2_edge0"].values()) == pytest.approx(1)

    def test_choices_stay_those_of_the_space(self) -> None:
        space, _ = relaxed()
        plain = DartsSpace(3, channels=2, cells=4, nodes=3, operations=OPERATIONS)
        assert {label: str(m) for label, m in space.simplify().items()} == {
            label: str(m) for label, m in plain.simplify().items()
        }

    def test_nothing_is_drawn(self) -> None:
        space, _ = relaxed()
        state = torch.get_rng_state()
        assert space.cells[0].resample({}) == {}
        assert torch.equal(torch.get_rng_state(), state)
