from __future__ import annotations

import os
import random
import re
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from nni_cream.checkpoints import LastTwo, find_checkpoint
from nni_cream.errors import TrainingError, UserError
from nni_cream.runs import RunDirectory


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.layer(batch).square().mean()
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def train(folder: Path, epochs: int) -> None:
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[LastTwo(RunDirectory(folder))],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), DataLoader(torch.ones(4, 2), 2), ckpt_path=find_checkpoint(RunDirectory(folder)))


def epochs_in(folder: Path) -> dict[str, int]:
    files = (folder / "checkpoints").iterdir()
    return {file.name: torch.load(file, weights_only=True)["epoch"] for file in files}


class TestWriting:
    def test_keeps_the_last_two(self, tmp_path: Path) -> None:
        train(tmp_path, 1)
        assert epochs_in(tmp_path) == {"last.ckpt": 0}
        train(tmp_path, 4)
        assert epochs_in(tmp_path) == {"last.ckpt": 3, "previous.ckpt": 2}

    @pytest.mark.parametrize("moment", ["save", "link", "replace"])
    def test_that_is_interrupted_leaves_what_there_was(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
    ) -> None:
        train(tmp_path, 2)

        def stop(*_: Any, **__: Any) -> None:
            raise OSError("No space left on device")

        with monkeypatch.context() as patch:
            if moment == "save":
                save = pl.Trainer.save_checkpoint

                def half(self: Any, path: Path, **options: Any) -> None:
                    save(self, path, **options)
                    path.write_bytes(path.read_bytes()[:100])
                    stop()

                patch.setattr(pl.Trainer, "save_checkpoint", half)
            elif moment == "link":
                patch.setattr(os, "link", stop)
            else:
                patch.setattr(Path, "replace", stop)
            with pytest.raises(OSError, match="No space left"):
                train(tmp_path, 3)
        found = epochs_in(tmp_path)  # each of them can be read, and there is nothing else
        assert found["last.ckpt"] == 1
        assert set(found) <= {"last.ckpt", "previous.ckpt"}
        train(tmp_path, 3)
        assert epochs_in(tmp_path) == {"last.ckpt": 2, "previous.ckpt": 1}

    def test_of_what_is_no_number_is_refused_and_leaves_what_there_was(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        train(tmp_path, 2)

        def spoil(self: Module) -> None:
            with torch.no_grad():
                self.layer.bias.fill_(torch.nan)

        monkeypatch.setattr(Module, "on_train_epoch_end", spoil)
        with pytest.raises(TrainingError, match="A weight is nan: the training has diverged"):
            train(tmp_path, 3)
        assert epochs_in(tmp_path) == {"last.ckpt": 1, "previous.ckpt": 0}


def without(content: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key != name}


OTHERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a list": lambda content: [content["state_dict"]],
    "of another program": lambda content: {"epoch": 3, "state_dict": content["state_dict"]},
    "without random numbers": lambda content: without(content, "random_numbers"),
    "without a number of steps": lambda content: {**content, "loops": {}},
}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


class TestFinding:
    @pytest.fixture
    def run(self, tmp_path: Path) -> RunDirectory:
        train(tmp_path, 3)
        return RunDirectory(tmp_path)

    def test_takes_the_newest(self, run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
        assert find_checkpoint(run) == run.checkpoint
        assert capsys.readouterr().err == ""

    def test_of_a_new_run_is_none(self, tmp_path: Path) -> None:
        assert find_checkpoint(RunDirectory(tmp_path)) is None

    def damaged(self, file: Path, how: str) -> None:
        content = bytearray(file.read_bytes())
        if how == "truncated":
            content = content[: len(content) // 2]
        elif how == "empty":
            content = bytearray()
        elif how == "text":
            content = bytearray(b"not a checkpoint")
        elif how == "one bit of a weight":
            weight = torch.load(file, weights_only=True)["state_dict"]["layer.weight"]
            content[content.index(weight.numpy().tobytes())] ^= 1
        elif how in OTHERS:
            torch.save(OTHERS[how](torch.load(file, weights_only=True)), file)
            return
        elif how == "of an old torch":
            torch.save({"state_dict": {}}, file, _use_new_zipfile_serialization=False)
            return
        else:
            content[200:400] = bytes(200)
        file.write_bytes(content)

    @pytest.mark.parametrize(
        "how",
        ["truncated", "empty", "text", "overwritten", "one bit of a weight", "of an old torch", *OTHERS],
    )
    def test_takes_the_one_before_a_damaged_one_and_says_so(
        self, run: RunDirectory, capsys: pytest.CaptureFixture[str], how: str
    ) -> None:
        self.damaged(run.checkpoint, how)
        assert find_checkpoint(run) == run.previous_checkpoint
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"{run.checkpoint} cannot be read (")
        assert line.endswith(f"; going on from {run.previous_checkpoint}, which is older.")
        # It goes on with the epoch after that, and leaves two good ones.
        (run.checkpoint.with_suffix(".damaged")).unlink()
        train(run.path, 3)
        assert epochs_in(run.path) == {"last.ckpt": 2, "previous.ckpt": 1}

    @pytest.mark.parametrize(
        ("how", "reason"),
        [
            ("one bit of a weight", r"the checksum of .*/data/\d+ in it is wrong"),
            ("a list", "it holds a list, not a checkpoint of a run"),
            ("of another program", "a checkpoint of a run has global_step as well"),
            ("without random numbers", "a checkpoint of a run has random_numbers as well"),
            ("without a number of steps", "it does not say after how many steps it was written"),
        ],
    )
    def test_says_what_is_wrong(
        self, run: RunDirectory, capsys: pytest.CaptureFixture[str], how: str, reason: str
    ) -> None:
        self.damaged(run.checkpoint, how)
        find_checkpoint(run)
        assert re.search(rf"\({reason}\)", capsys.readouterr().err)

    def test_takes_no_other_content_than_was_written(self, run: RunDirectory) -> None:
        good, numbers = run.checkpoint.read_bytes(), random.Random(0)
        for _ in range(200):
            content = bytearray(good)
            content[numbers.randrange(len(good))] ^= 1 << numbers.randrange(8)
            run.checkpoint.write_bytes(content)
            if find_checkpoint(run) == run.checkpoint:
                # What is not read of a file, such as times.
                assert same(torch.load(run.checkpoint, weights_only=True), torch.load(BytesIO(good), weights_only=True))
            run.checkpoint.with_suffix(".damaged").unlink(missing_ok=True)

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            (
                lambda state: {**state, "layer.weight": torch.ones(3, 2)},
                "it has layer.weight as [3, 2], this run as [1, 2]",
            ),
            (lambda state: {"layer.weight": state["layer.weight"]}, "it has layer.bias not at all, this run as [1]"),
            (lambda state: {**state, "more": torch.ones(4)}, "it has more as [4], this run not at all"),
        ],
    )
    def test_of_another_network_is_refused_before_anything_is_trained(
        self, run: RunDirectory, change: Callable[[Any], Any], expected: str
    ) -> None:
        content = torch.load(run.checkpoint, weights_only=True)
        torch.save({**content, "state_dict": change(content["state_dict"])}, run.checkpoint)
        before = {file: file.read_bytes() for file in run.checkpoint.parent.iterdir()}
        with pytest.raises(UserError) as caught:
            train(run.path, 4)
        assert str(caught.value) == (
            f"{run.checkpoint} is a checkpoint of another network: {expected}. Put back the run's own, or remove "
            f"{run.checkpoint.parent} to begin the run anew."
        )
        assert {file: file.read_bytes() for file in run.checkpoint.parent.iterdir()} == before

    def test_of_nothing_but_damaged_ones_is_an_error(self, run: RunDirectory) -> None:
        for file in (run.checkpoint, run.previous_checkpoint):
            self.damaged(file, "truncated")
        with pytest.raises(UserError) as caught:
            find_checkpoint(run)
        sentence = str(caught.value)
        for part in (run.checkpoint, run.previous_checkpoint, f"remove {run.checkpoint.parent} to begin the run anew"):
            assert str(part) in sentence
        assert "\n" not in sentence

    def test_executes_nothing(self, run: RunDirectory, tmp_path: Path) -> None:
        class Evil:
            def __reduce__(self) -> Any:
                return (Path.touch, (tmp_path / "executed",))

        torch.save({"state_dict": Evil()}, run.checkpoint)
        assert find_checkpoint(run) == run.previous_checkpoint
        assert not (tmp_path / "executed").exists()
