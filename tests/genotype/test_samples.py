"""Genotypes as samples of NNI's, and back."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import pytest

from nni_cream.genotype import (
    CELL_KINDS,
    PUBLISHED_GENOTYPES,
    Genotype,
    cell_sample,
    edge_label,
    edges_of,
    inputs_label,
)
from tests.genotype.examples import ONE_NODE, ONE_NODE_SAMPLE, OPERATIONS, WITHOUT_NONE, refusal


def test_labels_are_those_of_the_space() -> None:
    assert edge_label("normal", 3, 1) == "normal_node3_edge1"
    assert inputs_label("reduce", 5) == "reduce_node5_inputs"


def random_genotype(choose: random.Random, nodes: int, operations: Sequence[str]) -> Genotype:
    cells = [
        tuple(
            (choose.choice(operations), state)
            for node in range(2, 2 + nodes)
            for state in choose.sample(range(node), 2)
        )
        for _ in CELL_KINDS
    ]
    concat = tuple(range(2, 2 + nodes))
    return Genotype(cells[0], concat, cells[1], concat)


def test_sample_names_every_edge_and_the_two_of_every_node() -> None:
    assert ONE_NODE.to_sample(OPERATIONS) == ONE_NODE_SAMPLE
    assert cell_sample("reduce", ONE_NODE.reduce, OPERATIONS) == {
        label: value for label, value in ONE_NODE_SAMPLE.items() if label.startswith("reduce")
    }
    sample = PUBLISHED_GENOTYPES["darts_v2"].to_sample(OPERATIONS)
    assert len(sample) == 2 * (14 + 4)
    assert {label for label in sample if label.endswith("inputs")} == {
        inputs_label(kind, node) for kind in CELL_KINDS for node in range(2, 6)
    }
    assert {label for label in sample if "edge" in label} == {
        edge_label(kind, node, state) for kind in CELL_KINDS for node, state in edges_of(4)
    }
    # The third node of the normal cell: ('sep_conv_3x3', 1), ('skip_connect', 0).
    assert sample["normal_node4_inputs"] == [1, 0]
    assert sample["normal_node4_edge1"] == "sep_conv_3x3"
    assert sample["normal_node4_edge0"] == "skip_connect"
    assert (sample["normal_node4_edge2"], sample["normal_node4_edge3"]) == ("none", "none")


@pytest.mark.parametrize("name", ["darts_v1", "darts_v2"])
def test_published_genotypes_survive_as_samples(name: str) -> None:
    genotype = PUBLISHED_GENOTYPES[name]
    sample = genotype.to_sample(OPERATIONS)
    assert Genotype.from_sample(sample) == genotype
    assert Genotype.from_sample(json.loads(json.dumps(sample))) == genotype
    assert Genotype.from_sample(dict(reversed(sample.items()))) == genotype


@pytest.mark.parametrize("operations", [OPERATIONS, WITHOUT_NONE, ["skip_connect", "none"], ["conv"]])
@pytest.mark.parametrize("nodes", [1, 2, 5])
def test_random_genotypes_survive_as_samples_in_the_order_of_their_edges(operations: list[str], nodes: int) -> None:
    choose = random.Random(nodes)
    orders = set()
    for _ in range(20):
        genotype = random_genotype(choose, nodes, operations)
        sample = genotype.to_sample(operations)
        assert Genotype.from_sample(sample) == genotype
        assert {value for label, value in sample.items() if "edge" in label} <= set(operations)
        orders.add(tuple(sample["normal_node2_inputs"]))
    assert orders == {(0, 1), (1, 0)}


def test_edges_that_no_node_keeps_get_none_or_else_the_first_operation() -> None:
    genotype = PUBLISHED_GENOTYPES["darts_v2"]
    left_out = [
        edge_label(kind, node, state)
        for kind in CELL_KINDS
        for node, state in edges_of(4)
        if state not in [kept for _, kept in genotype.edges_to(kind, node)]
    ]
    assert len(left_out) == 12
    for operations, filler in ((OPERATIONS, "none"), (OPERATIONS[::-1], "none"), (WITHOUT_NONE, "max_pool_3x3")):
        sample = genotype.to_sample(operations)
        assert {sample[label] for label in left_out} == {filler}
        assert Genotype.from_sample(sample) == genotype


def test_what_a_sample_says_of_other_edges_does_not_matter() -> None:
    genotype = PUBLISHED_GENOTYPES["darts_v2"]
    sample = genotype.to_sample(OPERATIONS)
    assert sample["reduce_node4_edge1"] == "none"
    assert Genotype.from_sample({**sample, "reduce_node4_edge1": "sep_conv_5x5", "dropout": 0.5}) == genotype
    del sample["reduce_node4_edge1"]
    assert Genotype.from_sample(sample) == genotype


def test_sample_says_nothing_of_the_concatenation() -> None:
    genotype = PUBLISHED_GENOTYPES["darts_v1"]
    sample = genotype.to_sample(OPERATIONS)
    for concat, states in ((None, (2, 3, 4, 5)), (4, (2, 3, 4, 5)), (3, (3, 4, 5)), (1, (5,))):
        read = Genotype.from_sample(sample, concat)
        assert (read.normal_concat, read.reduce_concat) == (states, states)
        assert (read.normal, read.reduce) == (genotype.normal, genotype.reduce)
    for concat in (0, 5, -1):
        assert "The normal cell of the genotype concatenates the states" in refusal(
            Genotype.from_sample, sample, concat
        )


def test_cells_of_a_sample_may_differ_in_size() -> None:
    one, four = ONE_NODE.to_sample(OPERATIONS), PUBLISHED_GENOTYPES["darts_v1"].to_sample(OPERATIONS)
    mixed = {label: value for label, value in one.items() if label.startswith("normal")}
    mixed |= {label: value for label, value in four.items() if label.startswith("reduce")}
    genotype = Genotype.from_sample(mixed)
    assert (genotype.normal, genotype.reduce) == (ONE_NODE.normal, PUBLISHED_GENOTYPES["darts_v1"].reduce)
    assert (genotype.normal_concat, genotype.reduce_concat) == ((2,), (2, 3, 4, 5))


def test_nasnet_is_no_sample_of_a_darts_space() -> None:
    operations = [*OPERATIONS, "sep_conv_7x7", "conv_7x1_1x7"]
    assert "Node 3 of the normal cell takes both its edges from state 0" in refusal(
        PUBLISHED_GENOTYPES["nasnet"].to_sample, operations
    )
    assert "Node 5 of the normal cell takes both its edges from state 1" in refusal(
        PUBLISHED_GENOTYPES["amoebanet"].to_sample, operations
    )


def test_operation_that_the_space_does_not_offer_is_named() -> None:
    message = refusal(
        PUBLISHED_GENOTYPES["darts_v2"].to_sample, ["none", "sep_conv_3x3", "skip_connect", "max_pool_3x3"]
    )
    assert "'dil_conv_3x3'" in message
    assert "none, sep_conv_3x3, skip_connect, max_pool_3x3" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normal_node2_inputs": ...}, "The sample holds 'normal_node2_edge0', but its normal cell ends before"),
        ({"normal_node2_edge1": ...}, "'normal_node2_inputs' = [1, 0], but 'normal_node2_edge1' is missing"),
        ({"reduce_node2_inputs": [0]}, "'reduce_node2_inputs' = [0], but two different states from 0 to 1"),
        ({"reduce_node2_inputs": [0, 1, 0]}, "'reduce_node2_inputs' = [0, 1, 0], but two different states"),
        ({"reduce_node2_inputs": []}, "'reduce_node2_inputs' = [], but two different states"),
        ({"reduce_node2_inputs": [1, 1]}, "'reduce_node2_inputs' = [1, 1], but two different states"),
        ({"reduce_node2_inputs": [0, 2]}, "'reduce_node2_inputs' = [0, 2], but two different states from 0 to 1"),
        ({"reduce_node2_inputs": [-1, 0]}, "'reduce_node2_inputs' = [-1, 0], but two different states"),
        ({"reduce_node2_inputs": [False, True]}, "'reduce_node2_inputs' = [False, True], but two different states"),
        ({"reduce_node2_inputs": [0.0, 1.0]}, "'reduce_node2_inputs' = [0.0, 1.0], but two different states"),
        ({"reduce_node2_inputs": ["0", "1"]}, "'reduce_node2_inputs' = ['0', '1'], but two different states"),
        ({"reduce_node2_inputs": [[0], [1]]}, "'reduce_node2_inputs' = [[0], [1]], but two different states"),
        ({"reduce_node2_inputs": "01"}, "'reduce_node2_inputs' = '01', but two different states"),
        ({"reduce_node2_inputs": 1}, "'reduce_node2_inputs' = 1, but two different states"),
        ({"reduce_node2_inputs": None}, "'reduce_node2_inputs' = None, but two different states"),
        ({"reduce_node2_inputs": [10**40, 0]}, f"'reduce_node2_inputs' = [{10**40}, 0], but two different states"),
        ({"normal_node2_edge0": 3}, "The sample chooses 'normal_node2_edge0' = 3, which is no name of an operation"),
        ({"normal_node2_edge0": None}, "The sample chooses 'normal_node2_edge0' = None, which is no name"),
        ({"normal_node2_edge0": ["none"]}, "The sample chooses 'normal_node2_edge0' = ['none'], which is no name"),
        ({"normal_node2_edge0": "not a name"}, "The normal cell of the genotype names the operation 'not a name'"),
        (
            {"normal_node4_inputs": [0, 1]},
            "'normal_node4_inputs', but its normal cell ends before 'normal_node3_inputs'",
        ),
        ({"reduce_node3_edge0": "none"}, "'reduce_node3_edge0', but its reduce cell ends before 'reduce_node3_inputs'"),
        ({"reduce_node2_edge2": "none"}, "'reduce_node2_edge2', but its reduce cell ends before 'reduce_node3_inputs'"),
    ],
)
def test_bad_sample_is_one_sentence_that_names_the_choice(changes: dict[str, Any], message: str) -> None:
    sample = {label: value for label, value in {**ONE_NODE_SAMPLE, **changes}.items() if value is not ...}
    assert message in refusal(Genotype.from_sample, sample)


def test_sample_of_another_space_is_an_error() -> None:
    for sample in ({}, {"stage0_block0": 0}):
        assert "The normal cell of the genotype has 0 edges" in refusal(Genotype.from_sample, sample)


def test_a_node_with_one_edge_does_not_take_the_next_nodes() -> None:
    # Three and one make two nodes' edges, but not these nodes'.
    sample = PUBLISHED_GENOTYPES["darts_v2"].to_sample(OPERATIONS)
    sample |= {"normal_node3_inputs": [0, 1, 2], "normal_node4_inputs": [0]}
    assert "'normal_node3_inputs' = [0, 1, 2], but two" in refusal(Genotype.from_sample, sample)
