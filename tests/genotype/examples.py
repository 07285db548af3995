"""What the tests of genotypes share: a genotype of one node in all its forms, and how an error reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from nni_cream.errors import UserError
from nni_cream.genotype import Genotype
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
