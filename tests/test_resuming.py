"""A run that is killed and started again is the run that was never killed, to the last bit."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.resuming import (
    RECIPES,
    complete,
    differences,
    kill_at,
    kill_in_the_ranking,
    kill_in_the_writing_of,
    left_behind,
    start,
    start_two,
)

# A checkpoint every other step or so.
OFTEN = {"checkpoint_minutes": 0.001}
STEPS = {"cream": 27, "darts": 30, "retrain": 51}

pytestmark = pytest.mark.slow


class Uninterrupted(dict[str, dict[str, Any]]):
    """What each kind of run leaves that is not killed, and writes no checkpoint but after its epochs."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def __missing__(self, kind: str) -> dict[str, Any]:
        self[kind] = left_behind(complete(kind, self.folder / kind))
        return self[kind]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Uninterrupted:
    return Uninterrupted(tmp_path_factory.mktemp("uninterrupted"))


def test_every_step_and_epoch_is_on_the_curves(uninterrupted: Uninterrupted) -> None:
    """What the runs that are interrupted are compared with."""
    for kind, steps in STEPS.items():
        curves = uninterrupted[kind]["curves"]
        # Lightning logs every tenth step.
        assert list(curves["train_loss"]) == list(range(9, steps, 10))
        # Of the trained network once more.
        ends = [steps // 3 * epoch - 1 for epoch in (1, 2, 3)] + [steps] * (kind == "retrain")
        assert list(curves["val_accuracy"]) == ends
    assert list(uninterrupted["cream"]["curves"]["teaching_weight_epoch"]) == [17, 26]
    # Of the averaged weights and of the plain ones, which are not the same.
    trained = uninterrupted["retrain"]
    assert list(trained["curves"]["val_plain_accuracy"]) == list(trained["curves"]["val_accuracy"])
    assert differences(trained["model_plain.safetensors"], trained["model.safetensors"])


def is_in_the_middle(folder: Path) -> bool:
    """Tell whether a run goes on in the middle of an epoch."""
    file = folder / "checkpoints/last.ckpt"
    if not file.exists():
        return False
    epochs = torch.load(file, weights_only=True)["loops"]["fit_loop"]["epoch_progress"]["current"]
    return epochs["processed"] < epochs["started"]


@pytest.mark.parametrize(
    ("kind", "workers", "kills", "file"),
    [
        ("cream", 0, 2, "history.json"),
        ("cream", 2, 1, ""),
        ("darts", 0, 2, "child.json"),
        ("darts", 1, 1, ""),
        ("retrain", 0, 3, "model.safetensors"),
        ("retrain", 1, 1, ""),
    ],
)
def test_killed_runs_end_as_those_that_are_not(
    tmp_path: Path, uninterrupted: Uninterrupted, kind: str, workers: int, kills: int, file: str
) -> None:
    """Each process is killed (signal 9): at a random moment of its part of the run, or in the writing of a file.

    A moment is in a step, a validation or an end of an epoch; when the first file is written, the ranking is over.
    """
    # Of a seed by which each kind has moments in the middle of an epoch and in the last one.
    moments = random.Random(f"{kind} {workers} 8830")
    expected = dict(uninterrupted[kind])
    changes = dict(OFTEN)
    if workers:
        changes["data"] = {**RECIPES[kind]["data"], "workers": workers}
    in_the_middle = 0
    for number in range(kills):
        # The last steps are over sooner than a process can be killed.
        first, last = (2 + (STEPS[kind] - 5) * i // kills for i in (number, number + 1))
        kill_at(kind, tmp_path, moments.randint(first, last), moments.uniform(0, 0.1), **changes)
        in_the_middle += is_in_the_middle(tmp_path)
    assert in_the_middle > 0
    if file:
        kill_in_the_writing_of(file, kind, tmp_path, **changes)
    found = left_behind(complete(kind, tmp_path, **changes))
    for left in (found, expected):
        for name in ("child.json", "result.json"):
            if name in left:
                left[name] = {key: value for key, value in left[name].items() if key != "data"}
    assert differences(found, expected) == []


def test_a_search_that_is_killed_in_its_ranking_ranks_anew(tmp_path: Path, uninterrupted: Uninterrupted) -> None:
    """Once where the ranking follows on the last epoch, and once where there is nothing left to train before it."""
    results = ("child.json", "child.safetensors", "history.json")
    expected = uninterrupted["cream"]
    assert len(expected["child.json"]["runners_up"]) == 2
    for path in (2, 3):
        kill_in_the_ranking(path, tmp_path)
        assert not [name for name in results if (tmp_path / name).exists()]
        assert stopped(tmp_path)["epoch_progress"]["current"]["processed"] == 3
    assert differences(left_behind(complete("cream", tmp_path)), expected) == []
    for name in results:
        assert (tmp_path / name).read_bytes() == (uninterrupted.folder / "cream" / name).read_bytes()


@pytest.mark.parametrize("kind", ["cream", "darts"])
def test_the_same_seed_does_the_same(tmp_path: Path, uninterrupted: Uninterrupted, kind: str) -> None:
    assert differences(left_behind(complete(kind, tmp_path / "again")), uninterrupted[kind]) == []


def test_a_second_process_is_refused_and_disturbs_nothing(tmp_path: Path, uninterrupted: Uninterrupted) -> None:
    first = start("retrain", tmp_path)
    first.await_step(4)
    second = start("retrain", tmp_path)
    # It must not end before.
    first.signal(signal.SIGSTOP)
    assert second.end() == 2
    first.signal(signal.SIGCONT)
    sentence = f"error: {tmp_path} is in use by process {first.process.pid}; wait for its end, or choose another folder"
    assert sentence in first.output()
    assert first.end() == 0, first.output()
    assert differences(left_behind(tmp_path), uninterrupted["retrain"]) == []


def stopped(folder: Path) -> dict[str, Any]:
    """Where a run goes on: the numbers of steps and batches that Lightning keeps."""
    loops: dict[str, Any] = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["loops"]["fit_loop"]
    return loops


@pytest.mark.parametrize(
    ("kind", "number", "times", "workers"),
    [
        ("cream", signal.SIGINT, 1, 0),
        ("darts", signal.SIGTERM, 1, 0),
        ("retrain", signal.SIGINT, 3, 1),
        ("retrain", signal.SIGTERM, 2, 0),
    ],
)
def test_a_signal_in_a_step_ends_it_with_a_checkpoint(
    tmp_path: Path, uninterrupted: Uninterrupted, kind: str, number: int, times: int, workers: int
) -> None:
    """Further ones change nothing. NNI kills a local trial five seconds after the first."""
    changes = {"data": {**RECIPES[kind]["data"], "workers": workers}} if workers else {}
    started = start(kind, tmp_path, **changes)
    # In the second epoch.
    last = started.await_step(STEPS[kind] // 3 + 3)
    for worker in psutil.Process(started.process.pid).children():
        # As Ctrl-C in a terminal, which reaches all.
        worker.send_signal(number)
    for _ in range(times):
        started.signal(number)
        time.sleep(0.01)
    assert started.end(5) == -number, started.output()
    assert started.output().splitlines()[-1] == "Interrupted; the same command goes on from the last checkpoint."
    assert "Traceback" not in started.output()
    progress = stopped(tmp_path)["epoch_loop.batch_progress"]["total"]
    # The step has been finished, or one more that had begun meanwhile.
    assert progress["processed"] - 1 in (last, last + 1)

    again = start(kind, tmp_path, **changes)
    assert again.await_step(1) == progress["processed"]
    assert again.end() == 0, again.output()
    expected = dict(uninterrupted[kind])
    found = left_behind(tmp_path)
    for left in (found, expected):
        for name in ("child.json", "result.json"):
            if name in left:
                left[name] = {key: value for key, value in left[name].items() if key != "data"}
    assert differences(found, expected) == []


@pytest.mark.parametrize(("kind", "number"), [("darts", signal.SIGINT), ("cream", signal.SIGTERM)])
def test_a_signal_in_a_validation_ends_it_with_a_checkpoint(
    tmp_path: Path, uninterrupted: Uninterrupted, kind: str, number: int
) -> None:
    """It is repeated as a whole, without a step of the training before it."""
    started = start(kind, tmp_path)
    started.await_validation()
    started.signal(number)
    assert started.end(5) == -number, started.output()
    loops = stopped(tmp_path)
    assert loops["epoch_progress"]["current"]["processed"] == 0
    steps = loops["epoch_loop.batch_progress"]["total"]["completed"]
    assert steps == STEPS[kind] // 3

    again = start(kind, tmp_path)
    again.await_validation()
    assert again.await_step(1) == steps
    assert again.end() == 0, again.output()
    assert differences(left_behind(tmp_path), uninterrupted[kind]) == []


def complete_two(kind: str, folder: Path, **changes: Any) -> dict[str, Any]:
    processes = start_two(kind, folder, **changes)
    codes = [process.end() for process in processes]
    assert codes == [0, 0], processes[0].output()
    return left_behind(folder)


def test_two_processes_that_are_killed_end_as_two_that_are_not(tmp_path: Path) -> None:
    shorter = {"epochs": 2}
    killed = start_two("cream", tmp_path / "killed", **shorter, **OFTEN)
    killed[1].await_step(14)
    for process in killed:
        process.signal(signal.SIGKILL)
    assert [process.end() for process in killed] == [-signal.SIGKILL] * 2
    assert is_in_the_middle(tmp_path / "killed")
    found = complete_two("cream", tmp_path / "killed", **shorter, **OFTEN)
    assert differences(found, complete_two("cream", tmp_path / "not", **shorter)) == []


@pytest.mark.parametrize("receiver", [0, 1])
def test_a_signal_to_one_of_two_processes_ends_both_with_a_checkpoint(tmp_path: Path, receiver: int) -> None:
    stopped_ones = start_two("retrain", tmp_path)
    stopped_ones[receiver].await_step(5)
    stopped_ones[receiver].signal(signal.SIGTERM)
    codes = [process.end(10) for process in stopped_ones]
    assert codes == [-signal.SIGTERM] * 2, stopped_ones[0].output()
    assert 5 <= stopped(tmp_path)["epoch_loop.batch_progress"]["total"]["processed"] <= 7
