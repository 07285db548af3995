from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from nni_cream.errors import UserError
from nni_cream.genotype import (
    CELL_KINDS,
    PUBLISHED_GENOTYPES,
    CellKind,
    Edge,
    Genotype,
    cell_sample,
    derive_edges,
    derive_genotype,
    edge_label,
    edges_of,
    entropy,
    inputs_label,
    mixing_weights,
)
from tests.reference import golden

DERIVED: dict[str, Any] = golden("darts/genotypes.json")
OPERATIONS: list[str] = DERIVED["primitives"]
WITHOUT_NONE = OPERATIONS[1:]

ONE_NODE = Genotype(
    normal=(("sep_conv_3x3", 1), ("skip_connect", 0)),
    normal_concat=(2,),
    reduce=(("max_pool_3x3", 0), ("avg_pool_3x3", 1)),
    reduce_concat=(2,),
)
ONE_NODE_TEXT = (
    "Genotype(normal=[('sep_conv_3x3', 1), ('skip_connect', 0)], normal_concat=[2], "
    "reduce=[('max_pool_3x3', 0), ('avg_pool_3x3', 1)], reduce_concat=[2])"
)
ONE_NODE_SAMPLE = {
    "normal_node2_edge0": "skip_connect",
    "normal_node2_edge1": "sep_conv_3x3",
    "normal_node2_inputs": [1, 0],
    "reduce_node2_edge0": "max_pool_3x3",
    "reduce_node2_edge1": "avg_pool_3x3",
    "reduce_node2_inputs": [0, 1],
}


def refusal(call: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """The error that a call ends with, which is one sentence."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert len(message) < 700
    return message


def test_labels_are_those_of_the_space() -> None:
    assert edge_label("normal", 3, 1) == "normal_node3_edge1"
    assert inputs_label("reduce", 5) == "reduce_node5_inputs"


def test_edges_are_in_the_order_of_the_rows_of_alpha() -> None:
    assert edges_of(1) == [(2, 0), (2, 1)]
    assert edges_of(3) == [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2), (4, 0), (4, 1), (4, 2), (4, 3)]
    assert len(edges_of(4)) == len(DERIVED["cases"][0]["alphas_normal"]) == 14


# Text and JSON


@pytest.mark.parametrize("genotype", [ONE_NODE, *PUBLISHED_GENOTYPES.values()])
def test_text_and_json_read_back(genotype: Genotype) -> None:
    assert Genotype.parse(str(genotype)) == genotype
    assert Genotype.of(genotype.to_json()) == genotype
    assert Genotype.of(json.loads(json.dumps(genotype.to_json()))) == genotype


def test_text_is_the_published_form() -> None:
    assert str(ONE_NODE) == ONE_NODE_TEXT
    assert Genotype.parse(f"  {ONE_NODE_TEXT}\n") == ONE_NODE
    assert Genotype.parse(ONE_NODE_TEXT.replace(", ", ",\n    ")) == ONE_NODE


def test_json_holds_lists_in_the_order_of_the_fields() -> None:
    assert list(ONE_NODE.to_json().items()) == [
        ("normal", [["sep_conv_3x3", 1], ["skip_connect", 0]]),
        ("normal_concat", [2]),
        ("reduce", [["max_pool_3x3", 0], ["avg_pool_3x3", 1]]),
        ("reduce_concat", [2]),
    ]


def test_fields_may_be_in_any_order_and_tuples_as_well_as_lists() -> None:
    reordered = (
        "Genotype(reduce_concat=(2,), reduce=(('max_pool_3x3', 0), ['avg_pool_3x3', 1]), normal_concat=[2], "
        "normal=[('sep_conv_3x3', 1), ('skip_connect', 0)])"
    )
    assert Genotype.parse(reordered) == ONE_NODE


def test_published_text_names_nodes_by_a_range() -> None:
    # A line of the published cnn/genotypes.py, without the name that it is given there.
    text = (
        "Genotype(normal=[('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('skip_connect', 0), ('sep_conv_3x3', 1), "
        "('skip_connect', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('skip_connect', 2)], "
        "normal_concat=range(2, 6), reduce=[('max_pool_3x3', 0), ('max_pool_3x3', 1), ('skip_connect', 2), "
        "('max_pool_3x3', 0), ('max_pool_3x3', 0), ('skip_connect', 2), ('skip_connect', 2), ('avg_pool_3x3', 0)], "
        "reduce_concat=range(3, 5))"
    )
    genotype = Genotype.parse(text)
    assert genotype.normal_concat == (2, 3, 4, 5)
    assert genotype.reduce_concat == (3, 4)
    assert dataclasses.replace(genotype, reduce_concat=(2, 3, 4, 5)) == PUBLISHED_GENOTYPES["darts_v1"]


def test_published_genotypes_are_those_of_the_reference() -> None:
    reference = {name.lower(): value for name, value in golden("darts/published_networks.json")["genotypes"].items()}
    assert {name: genotype.to_json() for name, genotype in PUBLISHED_GENOTYPES.items()} == reference
    assert len(reference) == 4


def test_parts_of_a_genotype() -> None:
    nasnet = PUBLISHED_GENOTYPES["nasnet"]
    assert (nasnet.nodes("normal"), nasnet.nodes("reduce"), ONE_NODE.nodes("normal")) == (5, 5, 1)
    assert nasnet.concat("normal") == (2, 3, 4, 5, 6)
    assert nasnet.concat("reduce") == (4, 5, 6)
    assert nasnet.edges("reduce") == nasnet.reduce
    assert nasnet.edges_to("normal", 2) == (("sep_conv_5x5", 1), ("sep_conv_3x3", 0))
    assert nasnet.edges_to("reduce", 5) == (("skip_connect", 3), ("avg_pool_3x3", 2))
    assert (nasnet.skip_connections("normal"), nasnet.skip_connections("reduce")) == (2, 1)
    darts = PUBLISHED_GENOTYPES["darts_v1"]
    assert (darts.skip_connections("normal"), darts.skip_connections("reduce")) == (3, 3)


def test_genotypes_are_values() -> None:
    again = Genotype.parse(ONE_NODE_TEXT)
    assert len({again, ONE_NODE, PUBLISHED_GENOTYPES["nasnet"]}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        again.normal = ()  # type: ignore[misc]
    # Neither the order of a node's edges nor that of the concatenation is lost.
    assert dataclasses.replace(again, normal=again.normal[::-1]) != again


def with_field(name: str, text: str) -> str:
    """The text of the one-node genotype with another value of one field."""
    fields = {
        "normal": "[('sep_conv_3x3', 1), ('skip_connect', 0)]",
        "normal_concat": "[2]",
        "reduce": "[('max_pool_3x3', 0), ('avg_pool_3x3', 1)]",
        "reduce_concat": "[2]",
    }
    return f"Genotype({', '.join(f'{key}={value}' for key, value in {**fields, name: text}.items())})"


NO_GENOTYPE = [
    "",
    "   ",
    "\0",
    "\ud800",
    "DARTS_V2",
    "None",
    "[]",
    "{'normal': []}",
    "Genotype",
    f"DARTS = {ONE_NODE_TEXT}",
    f"{ONE_NODE_TEXT}; 1",
    f"{ONE_NODE_TEXT} # and a comment\n+",
    ONE_NODE_TEXT.removesuffix(")"),
    ONE_NODE_TEXT.replace("Genotype", "genotype"),
    ONE_NODE_TEXT.replace("Genotype", "genotypes.Genotype"),
    ONE_NODE_TEXT.replace("Genotype(", "Genotype([], "),
    ONE_NODE_TEXT.replace("Genotype(", "Genotype(*[1], "),
    ONE_NODE_TEXT.replace("Genotype(", "Genotype(**{}, "),
    ONE_NODE_TEXT.replace("normal_concat", "normal=[('none', 0), ('none', 1)], normal_concat"),
    with_field("normal", "[('sep_conv_3x3', zero), ('skip_connect', 0)]"),
    with_field("normal", "[(sep_conv_3x3, 1), ('skip_connect', 0)]"),
    with_field("normal", "[('sep_conv_3x3', 1)] + [('skip_connect', 0)]"),
    with_field("normal", "2 * [('sep_conv_3x3', 1)]"),
    with_field("normal", "[(f'{1}', 1), ('skip_connect', 0)]"),
    with_field("normal", "[('sep_conv_3x3', i) for i in (0, 1)]"),
    with_field("normal", "{[]: 0}"),
    with_field("normal_concat", "range(6)"),
    with_field("normal_concat", "range(2, 6, 1)"),
    with_field("normal_concat", "range(*[2, 6])"),
    with_field("normal_concat", "range(2, stop=6)"),
    with_field("normal_concat", "range(2, 3, step=1)"),
    with_field("normal_concat", "range(-1, 6)"),
    with_field("normal_concat", "range(2, 6.0)"),
    with_field("normal_concat", "range(False, True)"),
    with_field("normal_concat", "range(2, 10**9)"),
    with_field("normal_concat", "range(2, 1000000000)"),
    with_field("normal_concat", "list(range(2, 6))"),
    with_field("normal_concat", "[2"),
    # More digits than Python converts.
    with_field("normal_concat", f"[{'9' * 5000}]"),
]


@pytest.mark.parametrize("text", NO_GENOTYPE)
def test_text_that_is_no_genotype_is_shown_with_an_example(text: str) -> None:
    message = refusal(Genotype.parse, text)
    shown = text if len(text) <= 300 else f"{text[:300]}…"
    assert message.startswith(f"{shown!r} is not a genotype; write it as in Genotype(normal=[")
    example = message.split("write it as in ")[1].removesuffix(".")
    assert str(Genotype.parse(example)) == example


@pytest.mark.parametrize("text", ["(", "[", "-", "{'a':", "lambda:", "not ", "+1", ".a", "()"])
@pytest.mark.parametrize("depth", [150, 5_000, 100_000])
def test_deep_nesting_is_an_ordinary_error(text: str, depth: int) -> None:
    for around in ("{}", "{}1", "f{}"):
        nested = around.format(text * depth)
        assert "is not a genotype" in refusal(Genotype.parse, nested)
        assert "is not a genotype" in refusal(Genotype.parse, with_field("normal", nested))


def test_text_that_is_code_is_not_executed(tmp_path: Path) -> None:
    file = tmp_path / "executed"
    code = f"__import__('pathlib').Path({str(file)!r}).touch()"
    # As code, it would make the file.
    eval(code)
    file.unlink()
    for text in (
        code,
        f"Genotype({code})",
        f"Genotype(normal={code})",
        f"Genotype(**{code})",
        with_field("normal", f"[('sep_conv_3x3', {code}), ('skip_connect', 0)]"),
        with_field("normal", f"[(f'{{{code}}}', 1), ('skip_connect', 0)]"),
        with_field("normal_concat", f"range(2, {code})"),
        with_field("normal_concat", f"({code}).__class__"),
        f"(lambda: {code})()",
        f"[{code} for _ in '1']",
        f"{ONE_NODE_TEXT} if {code} else 0",
    ):
        assert "is not a genotype" in refusal(Genotype.parse, text)
        assert not file.exists()


WRONG_TYPES: list[tuple[str, Any, str]] = [
    ("normal", "sep_conv_3x3", "The field 'normal' of a genotype is a list of pairs"),
    ("normal", None, "The field 'normal' of a genotype is a list of pairs"),
    ("normal", 3, "The field 'normal' of a genotype is a list of pairs"),
    ("normal", b"ab", "The field 'normal' of a genotype is a list of pairs"),
    ("normal", {"sep_conv_3x3": 0}, "The field 'normal' of a genotype is a list of pairs"),
    ("normal", {("sep_conv_3x3", 0), ("skip_connect", 1)}, "The field 'normal' of a genotype is a list of pairs"),
    ("normal", ["a0", "b1"], "The field 'normal' of a genotype is a list of pairs"),
    ("normal", ["sep_conv_3x3", 0], "The field 'normal' of a genotype is a list of pairs"),
    ("normal", [[["sep_conv_3x3", 0], ["skip_connect", 1]]], "The field 'normal' of a genotype is a list of pairs"),
    ("reduce", [("a", 0, 1), ("b", 1)], "The field 'reduce' of a genotype is a list of pairs"),
    ("reduce", [("a",), ("b", 1)], "The field 'reduce' of a genotype is a list of pairs"),
    ("reduce", [(), ("b", 1)], "The field 'reduce' of a genotype is a list of pairs"),
    ("reduce", [(0, "a"), (1, "b")], "The field 'reduce' of a genotype is a list of pairs"),
    ("reduce", [("a", "0"), ("b", 1)], "The field 'reduce' of a genotype is a list of pairs"),
    ("reduce", [("a", 0.0), ("b", 1)], "The field 'reduce' of a genotype is a list of pairs"),
    ("reduce", [("a", None), ("b", 1)], "The field 'reduce' of a genotype is a list of pairs"),
    ("reduce", [("a", False), ("b", True)], "The field 'reduce' of a genotype is a list of pairs"),
    ("reduce", [(b"a", 0), ("b", 1)], "The field 'reduce' of a genotype is a list of pairs"),
    ("reduce", [(None, 0), ("b", 1)], "The field 'reduce' of a genotype is a list of pairs"),
    ("normal_concat", 2, "The field 'normal_concat' of a genotype is a list of numbers"),
    ("normal_concat", None, "The field 'normal_concat' of a genotype is a list of numbers"),
    ("normal_concat", "2", "The field 'normal_concat' of a genotype is a list of numbers"),
    ("normal_concat", b"\x02", "The field 'normal_concat' of a genotype is a list of numbers"),
    ("normal_concat", {2: 2}, "The field 'normal_concat' of a genotype is a list of numbers"),
    ("normal_concat", ["2"], "The field 'normal_concat' of a genotype is a list of numbers"),
    ("reduce_concat", [2.0], "The field 'reduce_concat' of a genotype is a list of numbers"),
    ("reduce_concat", [math.nan], "The field 'reduce_concat' of a genotype is a list of numbers"),
    ("reduce_concat", [True], "The field 'reduce_concat' of a genotype is a list of numbers"),
    ("reduce_concat", [[2]], "The field 'reduce_concat' of a genotype is a list of numbers"),
    # Too large for Python to write.
    ("reduce_concat", [1 << 20_000], "The field 'reduce_concat' of a genotype is a list of numbers"),
    ("reduce", [("a", 0), ("b", -(1 << 20_000))], "The field 'reduce' of a genotype is a list of pairs"),
]
WRONG_VALUES: list[tuple[str, Any, str]] = [
    ("normal", [], "The normal cell of the genotype has 0 edges"),
    ("normal", [("a", 0)], "The normal cell of the genotype has 1 edges"),
    ("reduce", [("a", 0), ("b", 1), ("c", 2)], "The reduce cell of the genotype has 3 edges"),
    ("normal", [("a", 0), ("b", 2)], "The normal cell of the genotype has an edge from state 2 to node 2"),
    ("reduce", [("a", -1), ("b", 0)], "The reduce cell of the genotype has an edge from state -1 to node 2"),
    (
        "reduce",
        [("a", 0), ("b", 0), ("c", 2), ("d", 3)],
        "The reduce cell of the genotype has an edge from state 3 to node 3",
    ),
    ("normal", [("a", 99_999), ("b", 0)], "The normal cell of the genotype has an edge from state 99999 to node 2"),
    ("normal", [("", 0), ("b", 1)], "The normal cell of the genotype names the operation ''"),
    ("normal", [("sep conv", 0), ("b", 1)], "The normal cell of the genotype names the operation 'sep conv'"),
    ("normal", [("a", 0), ("3x3_conv", 1)], "The normal cell of the genotype names the operation '3x3_conv'"),
    ("reduce", [("a\nb", 0), ("b", 1)], r"The reduce cell of the genotype names the operation 'a\nb'"),
    ("reduce", [("\ud800", 0), ("b", 1)], r"The reduce cell of the genotype names the operation '\ud800'"),
    ("reduce", [("$x$", 0), ("b", 1)], "The reduce cell of the genotype names the operation '$x$'"),
    ("normal_concat", [], "The normal cell of the genotype concatenates the states [], but its nodes are [2]"),
    ("normal_concat", [1], "The normal cell of the genotype concatenates the states [1], but its nodes are [2]"),
    ("normal_concat", [3], "The normal cell of the genotype concatenates the states [3], but its nodes are [2]"),
    ("normal_concat", [-2], "The normal cell of the genotype concatenates the states [-2], but its nodes are [2]"),
    ("reduce_concat", [2, 2], "The reduce cell of the genotype concatenates the states [2, 2], but its nodes are [2]"),
    ("reduce_concat", [2, 3], "The reduce cell of the genotype concatenates the states [2, 3], but its nodes are [2]"),
]


@pytest.mark.parametrize(("field", "value", "message"), [*WRONG_TYPES, *WRONG_VALUES])
def test_bad_field_is_one_sentence_that_names_it(field: str, value: Any, message: str) -> None:
    assert message in refusal(Genotype.of, {**ONE_NODE.to_json(), field: value})


@pytest.mark.parametrize(
    ("field", "text", "message"),
    [
        *((field, repr(value), message) for field, value, message in WRONG_VALUES),
        ("normal", "'a'", "The field 'normal' of a genotype is a list of pairs"),
        ("normal", "range(2, 6)", "The field 'normal' of a genotype is a list of pairs"),
        ("normal", "{('a', 0), ('b', 1)}", "The field 'normal' of a genotype is a list of pairs"),
        ("normal", "[('a', 1j), ('b', 1)]", "The field 'normal' of a genotype is a list of pairs"),
        ("normal", "[('a', ...), ('b', 1)]", "The field 'normal' of a genotype is a list of pairs"),
        ("normal", f"[('a', 0x{'f' * 9000}), ('b', 1)]", "The field 'normal' of a genotype is a list of pairs"),
        ("normal_concat", f"[0x{'f' * 9000}]", "The field 'normal_concat' of a genotype is a list of numbers"),
        ("normal_concat", "range(2, 2)", "The normal cell of the genotype concatenates the states []"),
        ("normal_concat", "range(2, 4)", "The normal cell of the genotype concatenates the states [2, 3]"),
    ],
)
def test_bad_field_in_text_is_one_sentence_that_names_it(field: str, text: str, message: str) -> None:
    assert message in refusal(Genotype.parse, with_field(field, text))


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (None, "NoneType"),
        ([], "list"),
        ([["normal", []]], "list"),
        (ONE_NODE_TEXT, "str"),
        (3, "int"),
        (ONE_NODE, "Genotype"),
        ({}, "normal, normal_concat, reduce, reduce_concat"),
        ({"normal": []}, "normal_concat, reduce, reduce_concat"),
        ({**ONE_NODE.to_json(), "name": "x"}, "name"),
        ({**ONE_NODE.to_json(), 1: 2, None: 3}, "1, None"),
        ({key: value for key, value in ONE_NODE.to_json().items() if key != "reduce"}, "reduce"),
        ({key.upper(): value for key, value in ONE_NODE.to_json().items()}, "NORMAL, NORMAL_CONCAT"),
    ],
)
def test_what_has_not_the_four_fields_is_one_sentence(value: Any, named: str) -> None:
    message = refusal(Genotype.of, value)
    assert message.startswith("A genotype has the fields normal, normal_concat, reduce, reduce_concat")
    assert named in message.removeprefix("A genotype has the fields normal, normal_concat, reduce, reduce_concat")


def test_text_without_a_field_or_with_one_more_names_it() -> None:
    assert "missing or too many: reduce_concat." in refusal(
        Genotype.parse, ONE_NODE_TEXT.replace(", reduce_concat=[2]", "")
    )
    assert "missing or too many: name." in refusal(
        Genotype.parse, ONE_NODE_TEXT.replace("(normal", "(name='x', normal")
    )


# Samples


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


# The published rule


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


# Weights and entropy


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
