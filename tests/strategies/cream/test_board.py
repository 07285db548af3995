"""What comes onto the board of a Cream search, and with which scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from nni.nas.evaluator.pytorch import DataLoader
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tests.six_paths import SixPaths
from tests.strategies.cream.by_hand import answers, path_of, percent_correct, sample_of, share_of_held_out
from tests.strategies.cream.searches import BATCH, COSTS, HELD_OUT_BATCHES, KEPT, SAMPLES, Search, Step, batches, images
from tests.strategies.running import SMALL_RUNS, search

pytestmark = SMALL_RUNS


class TestBoard:
    def test_scores_are_measured_on_all_held_out_images(self, run: Callable[..., Search]) -> None:
        search = run(teacher="matching")
        state = search.strategy.supernet.state_dict()
        for entry in search.module.board.entries:
            assert entry.score == share_of_held_out(state, sample_of(entry.path))

    def test_the_history_has_the_board_after_every_epoch(self, run: Callable[..., Search]) -> None:
        search = run(teacher="matching")
        history = search.module.history.epochs
        assert list(history) == [1, 2, 3]
        assert history[1] == ()  # of the warm-up
        last = [(entry.path, entry.score, entry.macs) for entry in search.module.board.entries]
        assert [(place.path, place.score, place.macs) for place in history[3]] == last
        assert len(last) == 4
        for epoch, report in zip((2, 3), search.reports[1:], strict=True):
            assert history[epoch][0].score == pytest.approx(100 * report["val_accuracy"], abs=1e-9)

    def test_entries_keep_what_the_path_answered_in_training(self, run: Callable[..., Search]) -> None:
        search = run(teacher="matching")
        found = 0
        for step, following in zip(search.steps, search.steps[1:], strict=False):
            known = {entry.path for entry in step.board}
            for entry in following.board:
                if entry.path not in known:
                    found += 1
                    assert entry.path == path_of(step.drawn)
                    images, _ = step.batch
                    assert torch.equal(entry.images, images[:KEPT])
                    expected = answers(step.space, step.drawn, images)[:KEPT]
                    torch.testing.assert_close(entry.features.double(), expected, rtol=0, atol=1e-6)
        assert found >= 3

    def test_reports_to_nni(self, run: Callable[..., Search]) -> None:
        search = run(teacher="matching")
        assert [report["epoch"] for report in search.reports] == [1, 2, 3]
        assert search.reports[-1]["default"] == pytest.approx(search.module.board.entries[0].score / 100)
        losses = [[step.loss for step in search.steps if step.epoch == epoch] for epoch in range(3)]
        assert [report["train_loss"] for report in search.reports] == pytest.approx(
            [sum(epoch) / len(epoch) for epoch in losses], rel=1e-6
        )
        best = search.module.ranking[0]
        assert search.final == [
            {"default": best.accuracy, "flops": best.cost.macs, "params": best.cost.params, "path": best.sample}
        ]


class TestAdmission:
    """All that is decided after every step, once more by hand."""

    # What can become of a path while the board has room, and while it is full.
    OUTCOMES = frozenset({"known", "room, though poor", "poor", "admitted", "refused"})

    def by_hand(self, search: Search, gap: float) -> Iterator[tuple[Step, str, list[tuple[Any, ...]]]]:
        """For every step with an open board: what became of its path, and path, score, and cost of all entries."""
        size = search.strategy.settings.board_size
        typical, measured = 0.0, 0
        for step in search.steps:
            if step.epoch < search.strategy.settings.warmup_epochs:
                continue
            board: list[tuple[Any, ...]] = [(entry.path, entry.score, entry.macs) for entry in step.board]
            path, macs = path_of(step.drawn), COSTS[str(step.drawn)]
            accuracy = percent_correct(step.space, step.drawn, step.batch)
            better, typical = accuracy > typical, 0.9 * typical + 0.1 * accuracy
            full = len(board) == size
            if path in [known for known, _, _ in board]:
                yield step, "known", board
            elif full and not better:
                yield step, "poor", board
            else:
                held_out = HELD_OUT_BATCHES[measured % len(HELD_OUT_BATCHES)]
                measured += 1
                score = percent_correct(step.space_after, step.drawn, held_out)
                _, worst, cost_of_worst = board[-1] if full else (None, -1000.0, 0)
                if score > worst + gap or (score > worst and macs < cost_of_worst):
                    outcome = "room" if not full else "admitted"
                    board = [*board[: size - 1], (path, score, macs)]
                    yield step, outcome if better or full else "room, though poor", board
                else:
                    yield step, "refused", board

    @pytest.mark.parametrize(("size", "gap", "seed"), [(3, 0.0, 9), (3, 5.0, 9), (5, 5.0, 4)])
    def test_as_by_hand(self, size: int, gap: float, seed: int, data: TensorDataset) -> None:
        search = Search(data, teacher="none", board_size=size, admission_gap=gap, epochs=8, seed=seed).run()
        outcomes: set[str] = set()
        for step, outcome, board in self.by_hand(search, gap):
            outcomes.add(outcome)
            assert {(e.path, e.score, e.macs) for e in step.board_after} == set(board), outcome
        assert outcomes >= self.OUTCOMES
        for step, following in zip(search.steps, search.steps[1:], strict=False):
            for entry in following.board if following.epoch != step.epoch else ():
                assert entry.score == share_of_held_out(step.space_after, sample_of(entry.path))


def test_paths_are_scored_without_dropout(data: TensorDataset) -> None:
    """By the scale on which entries are measured again, and drawing no random number."""

    class Dropping(SixPaths):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(self.drop(self.second(self.first(self.stem(images))).mean((2, 3))))

    judged: list[bool] = []

    def note(module: nn.Module, *_: Any) -> None:
        judged.append(not torch.is_grad_enabled())
        assert module.training != judged[-1]

    class Begin(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.model.drop.register_forward_hook(note)

    torch.manual_seed(1)
    whole = Search(data, callbacks=(Begin(),))
    search(whole.strategy, Dropping(), whole.evaluator)
    assert judged.count(True) > judged.count(False) == len(whole.steps)


def test_a_single_image_left_over_scores_no_path() -> None:
    """Feature maps of one pixel: with its own statistics a single image would be an error."""
    data, held_out = images(6 * BATCH, 0, size=1), images(9, 1, size=1)
    search = Search(data, held_out=DataLoader(held_out, batch_size=4), board_size=6).run()
    state = search.strategy.supernet.state_dict()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        answers(state, SAMPLES[0], held_out.tensors[0][8:])
    entries = search.module.board.entries
    assert len(entries) >= 4
    for entry in entries:
        shares = [percent_correct(state, sample_of(entry.path), batch) for batch in batches(held_out, 4)[:2]]
        assert entry.score == pytest.approx(sum(shares) / 2)
    # The ranking normalises with running statistics, and can take all images.
    assert all(9 * path.accuracy == pytest.approx(round(9 * path.accuracy)) for path in search.module.ranking)
    assert not all(8 * path.accuracy == pytest.approx(round(8 * path.accuracy)) for path in search.module.ranking)
