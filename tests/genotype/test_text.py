"""Genotypes as text, as JSON and as values: what is read, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from nni_cream.genotype import PUBLISHED_GENOTYPES, Genotype
from tests.genotype.examples import ONE_NODE, ONE_NODE_TEXT, refusal
from tests.reference import golden


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
