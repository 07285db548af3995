"""A DARTS search that was interrupted ends as one that was not."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from nni_cream.strategies import darts_module
from tests.strategies.darts.forcing import RISING, SetAlpha, few_batches, preferring
from tests.strategies.darts.searches import TRAIN_BATCHES, WHOLE, Search, assert_equal, cells
from tests.strategies.running import SMALL_RUNS

pytestmark = SMALL_RUNS


class TestResume:
    def checkpoint(self, folder: Path, *arguments: Any, **settings: Any) -> tuple[Path, Search]:
        saver = ModelCheckpoint(folder, save_last=True)
        callbacks = [*settings.pop("callbacks", ()), saver]
        search = Search(*arguments, callbacks=callbacks, trainer={"enable_checkpointing": True}, **settings).run()
        return folder / "last.ckpt", search

    @pytest.mark.parametrize("sanity", [0, 2])
    def test_an_interrupted_search_ends_as_an_uninterrupted_one(self, sanity: int, tmp_path: Path) -> None:
        settings: dict[str, Any] = {"warmup_epochs": 1, "eigenvalue": "track"}
        file, _ = self.checkpoint(tmp_path, epochs=2, **settings)
        resumed = Search(epochs=4, checkpoint=file, seed=5, trainer={"num_sanity_val_steps": sanity}, **settings).run()
        straight = Search(epochs=4, **settings).run()
        assert [step.epoch for step in resumed.steps] == [2] * TRAIN_BATCHES + [3] * TRAIN_BATCHES
        assert_equal(resumed.alphas, straight.alphas)
        assert_equal(resumed.module.model.state_dict(), straight.module.model.state_dict())
        assert resumed.reports == straight.reports[2:]
        assert resumed.final == straight.final
        assert len(resumed.final) == 1
        for ours, theirs in zip(resumed.module.epochs, straight.module.epochs, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours.alphas, theirs.alphas, strict=True))
            assert (ours.val_accuracy, ours.eigenvalue) == (theirs.val_accuracy, theirs.eigenvalue)

    def test_guards_remember_what_was_before(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        series = iter(RISING)
        monkeypatch.setattr(darts_module, "dominant_eigenvalue", lambda *_: next(series))
        settings: dict[str, Any] = {"order": "first", "eigenvalue": "rollback"}
        settings["training"] = few_batches(1)
        file, before = self.checkpoint(tmp_path, epochs=8, **settings)
        resumed = Search(epochs=14, checkpoint=file, **settings).run()
        assert [report["epoch"] for report in resumed.reports] == [9, 10, 11]
        assert_equal(resumed.alphas, before.alphas_after_epoch(6))

    def test_a_search_that_was_interrupted_after_its_last_epoch(self, tmp_path: Path) -> None:
        file, straight = self.checkpoint(tmp_path, epochs=2)
        resumed = Search(epochs=2, checkpoint=file).run()
        assert not resumed.steps
        assert not resumed.reports
        assert resumed.final == straight.final
        assert len(resumed.final) == 1
        assert_equal(resumed.alphas, straight.alphas)

    def test_a_search_that_was_ended_stays_so(self, tmp_path: Path) -> None:
        settings: dict[str, Any] = {"epochs": 5, "order": "first", "stop_above_skips": 1, "training": few_batches(1)}
        forced = SetAlpha({3: {"normal": preferring("skip_connect", 2)}})
        file, ended = self.checkpoint(tmp_path, cells, callbacks=[forced], **settings)
        assert len(ended.reports) == 3
        resumed = Search(cells, checkpoint=file, **settings).run()
        assert not resumed.steps
        assert resumed.module.ended_because == ended.module.ended_because is not None
        assert resumed.final == ended.final
        assert len(resumed.final) == 1
        assert_equal(resumed.alphas, ended.alphas)
        assert_equal(resumed.alphas, ended.alphas_after_epoch(2))

    def test_a_checkpoint_from_before_the_end_of_an_epoch(self, tmp_path: Path) -> None:
        # A user's own: of a time when the epoch's validation was over, but not the epoch.
        saver = ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=False)
        settings: dict[str, Any] = {"order": "first", "eigenvalue": "track"}
        Search(epochs=2, callbacks=[saver], trainer={"enable_checkpointing": True}, **settings).run()
        resumed = Search(epochs=3, checkpoint=tmp_path / "last.ckpt", **settings).run()
        straight = Search(epochs=3, **settings).run()
        assert_equal(resumed.alphas, straight.alphas)
        assert [report["epoch"] for report in resumed.reports] == [2, 3]
        assert resumed.reports[1] == straight.reports[2]
        assert resumed.final == straight.final

    def test_state_is_plain_data(self, run: Callable[..., Search]) -> None:
        module = run(**WHOLE["second order"]).module
        state: dict[str, Any] = {}
        module.on_save_checkpoint(state)
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        assert torch.load(file, weights_only=True)["darts"]["ended_because"] is None
