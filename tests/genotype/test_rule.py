"""From α to a genotype, by the published rule: beside the reference and a brute-force search; and the entropy of α."""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from nni_cream.errors import UserError
from nni_cream.genotype import (
    CELL_KINDS,
    CellKind,
    Edge,
    derive_edges,
    derive_genotype,
    edges_of,
    entropy,
    mixing_weights,
)
from tests.genotype.examples import DERIVED, OPERATIONS, refusal
from tests.reference import golden


def test_edges_are_in_the_order_of_the_rows_of_alpha() -> None:
    assert edges_of(1) == [(2, 0), (2, 1)]
    assert edges_of(3) == [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2), (4, 0), (4, 1), (4, 2), (4, 3)]
    assert len(edges_of(4)) == len(DERIVED["cases"][0]["alphas_normal"]) == 14


def alphas_of(case: dict[str, Any]) -> dict[CellKind, NDArray[np.float32]]:
    return {kind: np.array(case[f"alphas_{kind}"], dtype=np.float32) for kind in CELL_KINDS}


@pytest.mark.parametrize("number", range(len(DERIVED["cases"])))
def test_genotype_is_that_of_the_reference(number: int) -> None:
    case = DERIVED["cases"][number]
    assert derive_genotype(alphas_of(case), OPERATIONS).to_json() == case["genotype"]
    lists: dict[CellKind, Any] = {kind: case[f"alphas_{kind}"] for kind in CELL_KINDS}
    assert derive_genotype(lists, OPERATIONS, concat=4).to_json() == case["genotype"]


def test_single_precision_decides_where_the_reference_says() -> None:
    differing = []
    for number, case in enumerate(DERIVED["cases"]):
        exact = {
            kind: derive_edges(torch.from_numpy(alphas).double().softmax(-1).numpy(), OPERATIONS)
            for kind, alphas in alphas_of(case).items()
        }
        assert {kind: [list(edge) for edge in edges] for kind, edges in exact.items()} == {
            kind: case["genotype_float64_softmax"][kind] for kind in CELL_KINDS
        }
        ours = derive_genotype(alphas_of(case), OPERATIONS)
        if exact != {kind: list(ours.edges(kind)) for kind in CELL_KINDS}:
            differing.append(number)
    assert differing == [number for number, case in enumerate(DERIVED["cases"]) if case["float64_differs"]]
    assert len(differing) == 3
    assert len(DERIVED["cases"]) == 20


@pytest.mark.parametrize("name", ["search_2_nodes", "search_4_nodes"])
def test_genotype_of_the_searches_of_the_reference(name: str) -> None:
    search = golden(f"darts/{name}.json")
    steps, multiplier = search["network"]["steps"], search["network"]["multiplier"]
    alphas: dict[CellKind, Any] = {}
    for kind in CELL_KINDS:
        seed = zlib.crc32(f"{search['seed']}alphas_{kind}".encode()) & 0x7FFFFFFF
        shape = (len(edges_of(steps)), len(OPERATIONS))
        alphas[kind] = 0.5 * np.random.RandomState(seed).standard_normal(shape)
    genotype = derive_genotype(alphas, OPERATIONS, concat=multiplier)
    assert genotype.to_json() == search["genotype"]
    smaller = derive_genotype(alphas, OPERATIONS, concat=steps - 1)
    assert smaller.normal_concat == smaller.reduce_concat == tuple(range(3, 2 + steps))
    assert (smaller.normal, smaller.reduce) == (genotype.normal, genotype.reduce)
    for concat in (0, steps + 1):
        assert "concatenates the states" in refusal(derive_genotype, alphas, OPERATIONS, concat=concat)


def oracle(
    weights: NDArray[np.float32], operations: Sequence[str], limit: int | None, ruled_out: frozenset[int] = frozenset()
) -> list[Edge]:
    """The rule by comparing all that a node could keep, without sorting and without any number of infinite size."""
    edges: list[Edge] = []
    skips: list[tuple[float, int]] = []
    node, first = 2, 0
    while first < len(weights):
        # The best that every edge can be: heavier is better, then the earlier operation; of edges, the lower-numbered.
        candidates = [
            max(
                (float(weights[first + state, column]), -state, -column)
                for column, operation in enumerate(operations)
                if operation != "none" and not (operation == "skip_connect" and first + state in ruled_out)
            )
            for state in range(node)
        ]
        best = max(itertools.permutations(candidates, 2))
        for weight, state, column in best:
            edges.append((operations[-column], -state))
            if operations[-column] == "skip_connect":
                skips.append((weight, first - state))
        node, first = node + 1, first + node
    if limit is None or len(skips) <= limit:
        return edges
    return oracle(weights, operations, limit, ruled_out | {min(skips)[1]})


SPACES = [
    ["none", "skip_connect", "conv"],
    ["skip_connect", "none", "pool", "conv"],
    ["conv", "skip_connect", "pool"],
    ["conv", "none", "skip_connect"],
    ["none", "conv", "pool"],
]


@pytest.mark.parametrize("limit", [None, 0, 1, 2])
@pytest.mark.parametrize("operations", SPACES, ids="-".join)
@pytest.mark.parametrize("nodes", [1, 2, 3])
def test_rule_is_that_of_a_brute_force_search_ties_included(
    nodes: int, operations: list[str], limit: int | None
) -> None:
    draw = np.random.RandomState(nodes)
    fewer = 0
    for levels in (2, 3, 4, 1000):
        for _ in range(25):
            weights = draw.randint(levels, size=(len(edges_of(nodes)), len(operations))).astype(np.float32) / levels
            before = weights.copy()
            edges = derive_edges(weights, operations, limit)
            assert edges == oracle(weights, operations, limit)
            assert (weights == before).all()
            count = sum(operation == "skip_connect" for operation, _ in edges)
            assert limit is None or count <= limit
            fewer += edges != derive_edges(weights, operations)
    # The limit has something to do, where it is below what is found without it.
    assert (fewer > 0) == (limit is not None and "skip_connect" in operations and limit < 2 * nodes)


def test_limit_rules_out_the_lightest_skip_connection_and_of_equals_the_first() -> None:
    operations = ["none", "skip_connect", "conv"]
    weights = np.array(
        [[0.0, 0.6, 0.1], [0.0, 0.5, 0.2], [0.9, 0.5, 0.3], [0.9, 0.1, 0.4], [0.9, 0.7, 0.0]], dtype=np.float32
    )
    skip, conv = "skip_connect", "conv"
    assert derive_edges(weights, operations) == [(skip, 0), (skip, 1), (skip, 2), (skip, 0)]
    assert derive_edges(weights, operations, 4) == [(skip, 0), (skip, 1), (skip, 2), (skip, 0)]
    # 0.5 twice: the edge to the first node goes first, and keeps its place with another operation.
    assert derive_edges(weights, operations, 3) == [(skip, 0), (conv, 1), (skip, 2), (skip, 0)]
    # Then that to the second node, which takes another edge.
    assert derive_edges(weights, operations, 2) == [(skip, 0), (conv, 1), (skip, 2), (conv, 1)]
    # Without its skip connection, edge 0 weighs less than edge 1.
    assert derive_edges(weights, operations, 1) == [(conv, 1), (conv, 0), (skip, 2), (conv, 1)]
    assert derive_edges(weights, operations, 0) == [(conv, 1), (conv, 0), (conv, 1), (conv, 0)]


def test_limit_is_for_the_normal_cell_alone() -> None:
    alphas = np.zeros((2, 3), dtype=np.float32)
    alphas[:, 1] = 1
    both: dict[CellKind, Any] = {"normal": alphas, "reduce": alphas}
    genotype = derive_genotype(both, ["none", "skip_connect", "conv"], normal_skip_limit=1)
    assert genotype.normal == (("skip_connect", 1), ("conv", 0))
    assert genotype.reduce == (("skip_connect", 0), ("skip_connect", 1))
    assert genotype.skip_connections("normal") == 1


def test_ties_go_to_the_lower_numbered_edge_and_the_first_operation() -> None:
    weights = np.full((9, 3), 1 / 3, dtype=np.float32)
    assert derive_edges(weights, ["none", "a", "b"]) == [("a", 0), ("a", 1)] * 3
    assert derive_edges(weights, ["a", "none", "b"]) == [("a", 0), ("a", 1)] * 3


def test_none_is_never_chosen_and_does_not_count() -> None:
    weights = np.array(
        [[0.9, 0.1, 0.0], [0.1, 0.3, 0.6], [1.0, 0.0, 0.0], [0.2, 0.5, 0.3], [0.3, 0.3, 0.4]], np.float32
    )
    assert derive_edges(weights, ["none", "a", "b"]) == [("b", 1), ("a", 0), ("a", 1), ("b", 2)]
    # The same numbers in a space whose first operation is another one.
    assert derive_edges(weights, ["c", "a", "b"]) == [("c", 0), ("b", 1), ("c", 0), ("a", 1)]


def test_space_without_a_choice_is_an_error() -> None:
    weights = np.full((2, 1), 1, dtype=np.float32)
    assert "an operation other than none" in refusal(derive_edges, weights, ["none"])
    assert derive_edges(weights, ["skip_connect"]) == [("skip_connect", 0), ("skip_connect", 1)]
    assert derive_edges(weights, ["skip_connect"], 2) == [("skip_connect", 0), ("skip_connect", 1)]
    for operations in (["skip_connect"], ["skip_connect", "none"], ["none", "skip_connect"]):
        halves = np.full((2, len(operations)), 1 / len(operations), dtype=np.float32)
        assert "has 2 of them; at most 1 cannot be" in refusal(derive_edges, halves, operations, 1)


@pytest.mark.parametrize("kind", CELL_KINDS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_alpha_that_is_not_finite_is_an_error(kind: CellKind, value: float) -> None:
    alphas: dict[CellKind, Any] = {kind: np.zeros((14, 8)) for kind in CELL_KINDS}
    derive_genotype(alphas, OPERATIONS)
    alphas[kind][6, 3] = value
    message = refusal(derive_genotype, alphas, OPERATIONS)
    assert message.startswith("α is not finite on the edge from state 1 to node 4")
    with pytest.raises(UserError, match="α is not finite"):
        derive_genotype(alphas, OPERATIONS, normal_skip_limit=0)


def test_alpha_of_minus_infinity_is_a_weight_of_nothing_unless_there_is_no_other() -> None:
    alphas: dict[CellKind, Any] = {kind: np.zeros((2, 2)) for kind in CELL_KINDS}
    alphas["normal"][:, 0] = -math.inf
    assert derive_genotype(alphas, ["a", "b"]).normal == (("b", 0), ("b", 1))
    alphas["normal"][1] = -math.inf
    assert "from state 1 to node 2" in refusal(derive_genotype, alphas, ["a", "b"])


def test_mixing_weights_are_a_softmax_in_single_precision() -> None:
    alphas = np.random.RandomState(0).standard_normal((14, 8)) * 3
    weights = mixing_weights(alphas)
    assert weights.dtype == np.float32
    exact = np.exp(alphas) / np.exp(alphas).sum(axis=1, keepdims=True)
    assert np.abs(weights - exact).max() < 2e-7
    # And not the exact ones, rounded: 1 + 1e-8 is 1 in single precision.
    assert mixing_weights([[1.0, 1.0 + 1e-8]]).tolist() == [[0.5, 0.5]]


def test_entropy_is_that_of_the_mean_edge() -> None:
    assert entropy(np.zeros((14, 8))) == pytest.approx(math.log(8), abs=1e-6)
    assert entropy(np.full((5, 3), -7.5)) == pytest.approx(math.log(3), abs=1e-6)
    # Weights 1/4 and 3/4 on one edge, 1/2 and 1/2 on the other.
    by_hand = (0.25 * math.log(4) + 0.75 * math.log(4 / 3) + math.log(2)) / 2
    assert by_hand == pytest.approx(0.6277, abs=1e-4)
    assert entropy([[0.0, math.log(3)], [2.0, 2.0]]) == pytest.approx(by_hand, abs=1e-6)


def test_entropy_of_a_decision_is_zero() -> None:
    assert entropy([[1e4, 0.0, 0.0], [0.0, -1e4, 1e4]]) == 0
    assert 0 < entropy([[10.0, 0.0, 0.0]]) < 1e-2
