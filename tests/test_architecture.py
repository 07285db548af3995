from __future__ import annotations

import json
import re

import pytest

from nni_cream.architecture import CreamPath, block_label
from nni_cream.errors import UserError

STAGES = ((0,), (3,), (3, 1), (3, 1), (3, 3, 3), (3, 3), (0,))


@pytest.mark.parametrize(
    "text",
    [
        "[[0], [3], [3, 1], [3, 1], [3, 3, 3], [3, 3], [0]]",
        "[[0],[3],[3,1],[3,1],[3,3,3],[3,3],[0]]",
        "[0] [3] [3,1] [3,1] [3,3,3] [3,3] [0]",
        "[0], [3], [3, 1], [3, 1], [3, 3, 3], [3, 3], [0]",
        "  [0] [3] [3, 1] [3, 1] [3, 3, 3] [3, 3] [0]\n",
        "[0]  [3] [3, 1]\n[3, 1] [3, 3, 3] [3, 3] [0]",
        "[ [0], [3], [3, 1], [3, 1], [3, 3, 3], [3, 3], [0] ]",
        json.dumps(STAGES, indent=2),
    ],
)
def test_every_text_form_is_the_same_path(text: str) -> None:
    assert CreamPath.parse(text).stages == STAGES


def test_text_is_the_published_form_and_reads_back() -> None:
    path = CreamPath(STAGES)
    assert str(path) == "[[0], [3], [3, 1], [3, 1], [3, 3, 3], [3, 3], [0]]"
    assert CreamPath.parse(str(path)) == path


def test_lists_are_those_of_json() -> None:
    lists = [[0], [3], [3, 1]]
    assert CreamPath.of(lists).to_json() == lists
    assert CreamPath.of(lists) == CreamPath(((0,), (3,), (3, 1)))


def test_sample_names_every_block_in_order() -> None:
    sample = CreamPath(((0,), (3, 1), (5,))).to_sample()
    assert list(sample.items()) == [
        ("stage0_block0", 0),
        ("stage1_block0", 3),
        ("stage1_block1", 1),
        ("stage2_block0", 5),
    ]


def test_sample_reads_back_in_any_order() -> None:
    path = CreamPath(STAGES)
    shuffled = dict(reversed(path.to_sample().items()))
    assert CreamPath.from_sample(shuffled) == path
    assert len(shuffled) == 12  # the sample is not consumed by reading it


def test_more_than_ten_blocks_a_stage_stay_in_order() -> None:
    path = CreamPath((tuple(range(12)),))
    assert CreamPath.from_sample(path.to_sample()) == path


def test_paths_are_ordered_and_hashable_like_tuples() -> None:
    smaller, larger = CreamPath(((0,), (1, 5))), CreamPath(((0,), (2,)))
    assert smaller < larger
    assert sorted([larger, smaller]) == [smaller, larger]
    assert len({smaller, CreamPath.of([[0], [1, 5]])}) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "A Cream path needs at least one stage"),
        ("[]", "Stage 0 of the Cream path has no block"),
        ("[0] [] [0]", "Stage 1 of the Cream path has no block"),
        ("[0] [-1] [0]", "Stage 1 of the Cream path holds -1"),
        ("[0] [1.5] [0]", "Stage 1 of the Cream path holds 1.5"),
        ("[0] [True] [0]", "Stage 1 of the Cream path holds True"),
        ("[0] ['3'] [0]", "Stage 1 of the Cream path holds '3'"),
        ("[0] [[3]] [0]", "Stage 1 of the Cream path holds [3]"),
        ("0 3 1", "'0 3 1' is not a Cream path"),
        ("[0] [3 1] [0]", "is not a Cream path"),
        ("0, 3, 1", "'0, 3, 1' is not a Cream path"),
        ("[[0], [3]", "'[[0], [3]' is not a Cream path"),
        ("[0] [x]", "'[0] [x]' is not a Cream path"),
        ("[0] [__import__('os').getcwd()]", "is not a Cream path"),
        ("{'stage0': [0]}", "is not a Cream path"),
    ],
)
def test_bad_text_is_one_sentence(text: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as error:
        CreamPath.parse(text)
    assert "\n" not in str(error.value)


def test_no_stages_is_an_error() -> None:
    with pytest.raises(UserError, match="needs at least one stage"):
        CreamPath(())


@pytest.mark.parametrize(
    "sample",
    [
        {},
        {"stage1_block0": 0},
        {"stage0_block0": 0, "stage0_block2": 1},
        {"stage0_block0": 0, "stage2_block0": 1},
        {"stage0_block0": 0, "dropout": 0.5},
    ],
)
def test_sample_with_a_gap_is_an_error(sample: dict[str, object]) -> None:
    odd = sorted(set(sample) - {block_label(0, 0)}) or "it is empty"
    with pytest.raises(UserError, match=re.escape(str(odd))):
        CreamPath.from_sample(sample)
