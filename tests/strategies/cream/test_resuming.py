"""A Cream search that was interrupted ends as one that was not."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import TensorDataset

from tests.strategies.cream.searches import Search
from tests.strategies.running import SMALL_RUNS

pytestmark = SMALL_RUNS


class TestResume:
    def run_to_the_end(self, data: TensorDataset, checkpoint: Path | None, **trainer: Any) -> Search:
        return Search(data, epochs=4, meta_interval=3, checkpoint=checkpoint, trainer=trainer).run()

    def checkpoint(self, data: TensorDataset, folder: Path) -> Path:
        saver = ModelCheckpoint(folder, save_last=True)
        Search(data, epochs=2, meta_interval=3, callbacks=(saver,), trainer={"enable_checkpointing": True}).run()
        return folder / "last.ckpt"

    def assert_same_end(self, resumed: Search, straight: Search) -> None:
        assert [step.epoch for step in resumed.steps] == [2] * 6 + [3] * 6
        for ours, theirs in zip(resumed.steps, straight.steps[12:], strict=True):
            assert ours.drawn == theirs.drawn
            assert [entry.rank for entry in ours.board] == [entry.rank for entry in theirs.board]
            assert ours.loss == theirs.loss
        for name, tensor in straight.module.state_dict().items():
            assert torch.equal(resumed.module.state_dict()[name], tensor), name
        assert resumed.module.ranking == straight.module.ranking
        assert resumed.module.history.epochs == straight.module.history.epochs
        assert list(resumed.module.history.epochs) == [1, 2, 3, 4]

    def test_an_interrupted_search_ends_as_an_uninterrupted_one(self, data: TensorDataset, tmp_path: Path) -> None:
        checkpoint = self.checkpoint(data, tmp_path)
        self.assert_same_end(self.run_to_the_end(data, checkpoint), self.run_to_the_end(data, None))

    def test_lightnings_sanity_check_leaves_the_board_alone(self, data: TensorDataset, tmp_path: Path) -> None:
        # Lightning validates on two batches before it trains, unless told not to; on resuming there is a board by then.
        checkpoint = self.checkpoint(data, tmp_path)
        resumed = self.run_to_the_end(data, checkpoint, num_sanity_val_steps=2)
        self.assert_same_end(resumed, self.run_to_the_end(data, None))

    def test_a_search_that_was_interrupted_before_its_ranking(self, data: TensorDataset, tmp_path: Path) -> None:
        saver = ModelCheckpoint(tmp_path, save_last=True)
        straight = Search(data, callbacks=(saver,), trainer={"enable_checkpointing": True}).run()
        resumed = Search(data, checkpoint=tmp_path / "last.ckpt").run()
        assert not resumed.steps
        assert len(straight.module.ranking) >= 3
        assert resumed.module.ranking == straight.module.ranking
        assert resumed.final == straight.final
        assert len(resumed.final) == 1

    def test_state_is_plain_data(self, run: Callable[..., Search], data: TensorDataset) -> None:
        module = run(teacher="matching").module
        state: dict[str, Any] = {}
        module.on_save_checkpoint(state)
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        restored = torch.load(file, weights_only=True)
        other = Search(data, seed=9).run().module
        other.on_load_checkpoint(restored)
        assert [entry.rank for entry in other.board.entries] == [entry.rank for entry in module.board.entries]
        assert other._generator.random() == module._generator.random()
