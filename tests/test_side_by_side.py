"""Who trains what, and what happens when one fails; real trainings are in tests/trials/test_rank_correlation.py."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from nni_cream import side_by_side as module_under_test
from nni_cream.child import Candidate
from nni_cream.errors import TrainingError, UserError
from nni_cream.recipe import RetrainRecipe
from nni_cream.runs import RunDirectory
from nni_cream.side_by_side import Training, share_cores, train_all

RECIPE = RetrainRecipe.model_validate({"name": "a", "epochs": 2})


def trainings(folder: Path, number: int) -> list[Training]:
    return [
        Training(f"path {place}", RECIPE, Candidate(None, f"network{place}"), folder / str(place))
        for place in range(number)
    ]


def trained(folder: Path) -> list[str]:
    """What has been trained, by which process, in the order of the ends."""
    return (folder / "log").read_text().splitlines() if (folder / "log").exists() else []


@pytest.fixture(autouse=True)
def _stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings that take a moment; those of ``broken`` and ``diverging`` fail."""

    def retrain(recipe: RetrainRecipe, candidate: Candidate, directory: RunDirectory) -> float:
        with (tmp_path / "begun").open("a") as begun:
            begun.write(f"{candidate.name}\n")
        directory.begin("epochs: 2\n", 0)
        print("epoch 1")
        time.sleep(0.05)
        if candidate.name == "broken":
            raise UserError("The network 'broken' is not one.")
        if candidate.name == "diverging":
            raise TrainingError("In epoch 1 train_loss is nan.")
        with (tmp_path / "log").open("a") as log:
            log.write(f"{candidate.name} {os.getpid()} {torch.get_num_threads()}\n")
        (directory.path / "result.json").write_text("{}")
        directory._lock.release()
        return 0.75

    monkeypatch.setattr(module_under_test, "retrain", retrain)
    # Forked processes have the stand-in, too, and begin in no time; those that are spawned are real.
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(module_under_test.multiprocessing, "get_context", lambda _: fork)


def test_in_turn_what_has_ended_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = trainings(tmp_path, 3)
    plan[1].folder.mkdir()
    (plan[1].folder / "result.json").write_text("{}")
    train_all(plan)
    assert [line.split()[0] for line in trained(tmp_path)] == ["network0", "network2"]
    out = capsys.readouterr().out.splitlines()
    assert out == ["3 trainings, 1 of which have ended; 1 at a time", "path 0:", "epoch 1", "path 2:", "epoch 1"]
    train_all(plan)
    assert len(trained(tmp_path)) == 2


def test_several_processes_train_everything_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plan = trainings(tmp_path, 9)
    before = torch.get_num_threads()
    torch.set_num_threads(5)
    try:
        train_all(plan, workers=2)
    finally:
        torch.set_num_threads(before)
    rows = [line.split() for line in trained(tmp_path)]
    assert sorted(name for name, *_ in rows) == [f"network{place}" for place in range(9)]
    # Each has had a good part of them, and none was this one; five threads are two for each.
    shares = Counter(process for _, process, _ in rows)
    assert len(shares) == 2
    assert min(shares.values()) >= 3
    assert str(os.getpid()) not in shares
    assert {threads for *_, threads in rows} == {"2"}
    out = capfd.readouterr().out.splitlines()
    assert out[0] == "9 trainings, 0 of which have ended; 2 at a time"
    assert sorted(out[1:]) == [f"path {place}: test accuracy 0.7500" for place in range(9)]


@pytest.mark.parametrize(
    ("name", "kind", "sentence"),
    [("broken", UserError, "The network 'broken' is not one."), ("diverging", TrainingError, "train_loss is nan")],
)
def test_what_is_wrong_with_one_is_said_once_when_the_others_have_ended(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, kind: type[Exception], sentence: str
) -> None:
    plan = trainings(tmp_path, 4)
    plan.insert(0, Training("odd", RECIPE, Candidate(None, name), tmp_path / "odd"))
    with pytest.raises(kind, match=sentence):
        train_all(plan, workers=2)
    assert {line.split()[0] for line in trained(tmp_path)} >= {"network0", "network2"}
    assert "error" not in capfd.readouterr().err


def test_a_process_that_dies_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_under_test, "retrain", lambda *_: os._exit(3))
    with pytest.raises(TrainingError, match="A process ended before its trainings"):
        train_all(trainings(tmp_path, 2), workers=2)


def test_without_the_process_that_waits_no_further_training_begins(tmp_path: Path) -> None:
    plan = trainings(tmp_path, 60)
    process = multiprocessing.get_context("fork").Process(target=train_all, args=(plan, 2))
    process.start()
    deadline = time.monotonic() + 60
    while len(trained(tmp_path)) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.join()
    before = -1
    while before != (before := len(trained(tmp_path))):
        time.sleep(1)
    assert 3 <= before < 60


def _own(folder: Path, ready: Any, done: Any) -> None:
    directory = RunDirectory(folder)
    directory.begin("epochs: 2\n", 0)
    ready.set()
    done.wait(30)


@pytest.mark.parametrize("workers", [1, 2])
def test_what_others_are_at_is_left_to_them(tmp_path: Path, workers: int) -> None:
    plan = trainings(tmp_path, 3)
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=_own, args=(plan[1].folder, ready, done))
    other.start()
    try:
        assert ready.wait(30)
        with pytest.raises(TrainingError, match=r"processes are at 1 of the trainings, such as that in .*/1; when"):
            train_all(plan, workers)
    finally:
        done.set()
        other.join()
    assert sorted(line.split()[0] for line in trained(tmp_path)) == ["network0", "network2"]
    assert "network1" not in (tmp_path / "begun").read_text()
    # When they have not ended it, somebody has to.
    train_all(plan, workers)
    assert trained(tmp_path)[-1].startswith("network1 ")


def test_cores_are_shared_out() -> None:
    before = torch.get_num_threads()
    try:
        for threads, workers, expected in ((4, 2, 2), (5, 2, 2), (4, 1, 4), (2, 3, 1)):
            torch.set_num_threads(threads)
            share_cores(workers)
            assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)
