from __future__ import annotations

import io
import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from nni_cream.board import BoardEntry, BoardHistory, Place, PrioritizedBoard
from nni_cream.sampling import Path
from tests.conftest import REPOSITORY
from tests.reference import golden

REFERENCE: dict[str, Any] = golden("cream/e_board.json")
# Ours is not asked before so many epochs have passed, in the recipe with the paper's settings.
WARMUP_EPOCHS: int = yaml.safe_load((REPOSITORY / "experiments/recipes/cream_imagenet.yml").read_text())["cream"][
    "warmup_epochs"
]


def entry(path: Path, score: float, macs: int = 100, number: int = 0) -> BoardEntry:
    return BoardEntry(path, score, macs, torch.full((4, 3, 2, 2), float(number)), torch.full((4, 5), 0.2))


def board_of(*entries: BoardEntry, capacity: int = 3, gap: float = 5.0) -> PrioritizedBoard:
    board = PrioritizedBoard(capacity, gap)
    for item in entries:
        board.add(item)
    return board


def paths(board: PrioritizedBoard) -> list[Path]:
    return [item.path for item in board.entries]


class Replay:
    """The calls of the reference, made to a board of ours."""

    def __init__(self, capacity: int) -> None:
        self.reference = REFERENCE[f"pool_size_{capacity}"]
        self.board = PrioritizedBoard(capacity, self.reference["acc_gap"])
        self.admitted: list[bool] = []
        self.boards: list[tuple[BoardEntry, ...]] = []
        self.asked: list[bool] = []
        for call in REFERENCE["calls"]:
            path = tuple(itertools.chain.from_iterable(call["cand"]))
            score, macs = float(np.float32(call["prec1"])), round(1000 * call["flops"])
            self.asked.append(call["epoch"] >= WARMUP_EPOCHS)
            self.admitted.append(self.asked[-1] and self.board.admits(score, macs))
            if self.admitted[-1]:
                self.board.add(entry(path, score, macs, call["id"]))
            self.boards.append(self.board.entries)


@pytest.fixture(scope="module", params=[10, 5])
def replay(request: pytest.FixtureRequest) -> Replay:
    return Replay(request.param)


class TestReplay:
    def test_the_reference_opens_its_board_after_the_warm_up(self, replay: Replay) -> None:
        first = replay.asked.index(True)
        assert 0 < first < 10
        assert all(replay.asked[first:])
        updates = [row["isUpdate"] for row in replay.reference["log"]]
        assert not any(updates[:first])
        assert updates[first]

    def test_admission(self, replay: Replay) -> None:
        assert replay.admitted == [row["isUpdate"] for row in replay.reference["log"]]
        # Both outcomes occur while the board is full.
        assert set(replay.admitted[30:]) == {True, False}

    def test_order_after_every_call(self, replay: Replay) -> None:
        for entries, row in zip(replay.boards, replay.reference["log"], strict=True):
            assert [int(item.images[0, 0, 0, 0]) for item in entries] == row["board"]
            assert [item.score for item in entries] == row["prec"]
            assert [item.macs / 1000 for item in entries] == row["flops"]

    def test_entries_keep_the_path_of_their_call(self, replay: Replay) -> None:
        calls = REFERENCE["calls"]
        for item in replay.board.entries:
            call = calls[int(item.images[0, 0, 0, 0])]
            assert item.path == tuple(itertools.chain.from_iterable(call["cand"]))

    def test_frequencies(self, replay: Replay) -> None:
        sizes = [1, *[6] * sum(REFERENCE["sta_num"]), 1]
        shares = replay.board.frequencies(sizes)
        assert len(shares) == len(sizes)
        assert shares[0] == shares[-1] == [1.0]
        for share in shares[1:-1]:
            assert share == pytest.approx(replay.reference["frequencies"], abs=1e-12)

    def test_state_dict(self, replay: Replay) -> None:
        file = io.BytesIO()
        torch.save(replay.board.state_dict(), file)
        file.seek(0)
        restored = PrioritizedBoard(replay.board.capacity)
        restored.load_state_dict(torch.load(file, weights_only=True))
        assert len(restored) == replay.board.capacity
        for ours, theirs in zip(restored.entries, replay.board.entries, strict=True):
            assert ours.rank == theirs.rank
            assert isinstance(ours.path, tuple)
            assert torch.equal(ours.images, theirs.images)
            assert torch.equal(ours.features, theirs.features)


class TestAdmission:
    FULL = (entry((1,), 50.0, 100), entry((2,), 40.0, 100), entry((3,), 30.0, 100))

    def test_anything_while_there_is_room(self) -> None:
        assert board_of(capacity=1).admits(0.0, 10**9)
        assert board_of(*self.FULL[:2]).admits(0.0, 10**9)

    @pytest.mark.parametrize(
        ("score", "macs", "admitted"),
        [
            (35.1, 1000, True),  # beats the worst by more than the gap
            (35.0, 100, False),  # by the gap, but not more
            (35.0, 99, True),  # by less, but it is cheaper
            (30.1, 99, True),
            (30.0, 1, False),  # cheaper, but does not beat the worst
            (30.1, 100, False),
            (29.9, 1, False),
        ],
    )
    def test_full_board(self, score: float, macs: int, admitted: bool) -> None:
        assert board_of(*self.FULL).admits(score, macs) is admitted

    def test_where_the_budget_is_time_the_cheaper_path_is_the_one_that_takes_less(self) -> None:
        """Entries and newcomer are cheap in MACs and dear in time, or the other way round."""
        full = [replace(item, macs=1, latency=2.0) for item in self.FULL]
        board = board_of(*full)
        assert board.admits(35.0, 1.9999)
        assert not board.admits(35.0, 2.0)
        assert not board.admits(35.0, 2.5)
        assert board.admits(35.1, 2.5)

    def test_gap_is_a_setting(self) -> None:
        assert board_of(*self.FULL, gap=0.0).admits(30.1, 1000)
        assert not board_of(*self.FULL, gap=50.0).admits(79.0, 1000)


class TestOrder:
    def test_worst_leaves(self) -> None:
        board = board_of(*TestAdmission.FULL, entry((4,), 45.0))
        assert paths(board) == [(1,), (4,), (2,)]
        assert len(board) == 3
        assert (4,) in board
        assert (3,) not in board

    def test_of_equal_scores_the_dearer_is_first_then_the_larger_path(self) -> None:
        items = [entry((1, 0), 20.0, 5), entry((0, 2), 20.0, 7), entry((0, 1), 20.0, 7), entry((5, 5), 19.0, 9)]
        expected = [(0, 2), (0, 1), (1, 0), (5, 5)]
        for order in itertools.permutations(items):
            assert paths(board_of(*order, capacity=4)) == expected

    def test_where_the_budget_is_time_the_dearer_is_the_one_that_takes_longer(self) -> None:
        first, second = entry((1,), 20.0, 9), entry((2,), 20.0, 5)
        assert paths(board_of(first, second)) == [(1,), (2,)]
        timed = replace(first, latency=1.25), replace(second, latency=1.5)
        assert [item.cost for item in timed] == [1.25, 1.5]
        assert paths(board_of(*timed)) == [(2,), (1,)]

    def test_entries_are_never_compared_by_their_tensors(self) -> None:
        # The published board compared tensors when all else was equal, which is an error in torch.
        board = board_of(entry((1,), 20.0, number=1), entry((1,), 20.0, number=2), entry((2,), 20.0))
        assert paths(board) == [(2,), (1,)]

    @pytest.mark.parametrize("score", [10.0, 60.0])
    def test_a_path_is_there_once_with_its_latest_measurement(self, score: float) -> None:
        board = board_of(*TestAdmission.FULL, entry((2,), score, number=7))
        assert sorted(paths(board)) == [(1,), (2,), (3,)]
        again = next(item for item in board.entries if item.path == (2,))
        assert again.score == score
        assert again.images.unique().item() == 7

    def test_rescoring_reorders(self) -> None:
        board = board_of(*TestAdmission.FULL)
        board.rescore({(3,): 60.0, (1,): 20.0, (9,): 99.0})
        assert [(item.path, item.score) for item in board.entries] == [((3,), 60.0), ((2,), 40.0), ((1,), 20.0)]
        assert board.entries[0].macs == 100


class TestFrequencies:
    def test_even_on_an_empty_board(self) -> None:
        assert PrioritizedBoard().frequencies([1, 2, 4]) == [[1.0], [0.5, 0.5], [0.25] * 4]

    def test_choices_of_one_size_count_together(self) -> None:
        board = board_of(entry((0, 2, 0, 1), 1.0), entry((1, 2, 0, 0), 2.0))
        # Sizes 3: the choices 0 and 1 of both paths, 0 2 1 2; sizes 2: the last, 1 0.
        assert board.frequencies([3, 3, 1, 2]) == [
            [0.25, 0.25, 0.5],
            [0.25, 0.25, 0.5],
            [1.0],
            [0.5, 0.5],
        ]


class TestHistory:
    def test_remembers_path_score_and_cost_of_every_epoch(self) -> None:
        history, board = BoardHistory(), board_of(entry((0, 1), 40.0, 7))
        history.remember(2, board)
        board.add(entry((1, 1), 60.5, 9))
        history.remember(3, board)
        board.rescore({(0, 1): 70.0})
        history.remember(4, board)
        first, second = Place((0, 1), 40.0, 7), Place((1, 1), 60.5, 9)
        assert history.epochs == {2: (first,), 3: (second, first), 4: (Place((0, 1), 70.0, 7), second)}

    def test_an_epoch_that_is_run_again_takes_the_place_of_its_first_try(self) -> None:
        history = BoardHistory()
        for epoch in (1, 2, 3):
            history.remember(epoch, board_of(entry((0,), float(epoch))))
        history.remember(2, board_of(entry((5,), 9.0)))
        assert [(epoch, places[0].path) for epoch, places in history.epochs.items()] == [(1, (0,)), (2, (5,))]

    def test_a_checkpoint_gives_it_back_and_executes_nothing(self) -> None:
        history = BoardHistory()
        history.remember(1, board_of())
        timed = replace(entry((1, 2), 0.1), latency=1.2345)
        history.remember(2, board_of(entry((0, 2), 100 / 3), timed))
        assert [place.latency for place in history.epochs[2]] == [None, 1.2345]
        file = io.BytesIO()
        torch.save(history.state_dict(), file)
        file.seek(0)
        restored = BoardHistory()
        restored.load_state_dict(torch.load(file, weights_only=True))
        assert restored.epochs == history.epochs
