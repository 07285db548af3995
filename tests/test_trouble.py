from __future__ import annotations

import errno
from multiprocessing import resource_sharer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nni_cream import cli
from nni_cream.errors import TrainingError
from nni_cream.strategies.cream_module import CreamLightningModule
from nni_cream.strategies.darts_module import DartsLightningModule
from nni_cream.training import ImageClassifier
from nni_cream.trouble import named_batch, sentence_of
from tests import resuming
from tests.trainers import LIGHTNINGS_WARNINGS

pytestmark = LIGHTNINGS_WARNINGS

KILLED = "DataLoader worker (pid 12) is killed by signal: Killed. "
BUS = (
    "DataLoader worker (pid 12) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
    "shared memory. Please try to raise your shared memory limit."
)


def test_a_worker_that_ends_while_it_hands_over_a_batch() -> None:
    with pytest.raises(OSError, match="No such file") as caught:
        resource_sharer.DupFd.detach(SimpleNamespace(_id=("nowhere", 1)))  # type: ignore[arg-type]
    assert str(sentence_of(caught.value)).startswith("A process of the data loader has ended (")
    assert sentence_of(ConnectionResetError("by somebody else")) is None


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "a/b"),
            "a/b cannot be written: No space left on device; make",
        ),
        (
            OSError(errno.ENOSPC, "No space", "from", None, "to"),
            "to cannot be written: No space; make room, and the same",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "A file of the run directory cannot be written: No space"),
        (OSError(errno.EROFS, "Read-only file system", b"a"), "a cannot be used: Read-only file system; once that is"),
        (PermissionError(errno.EACCES, "Permission denied", "a"), "a cannot be used: Permission denied; once that is"),
        (RuntimeError(KILLED), f"A process of the data loader has ended ({KILLED.strip('. ')}), perhaps for want of"),
        (
            RuntimeError("DataLoader worker (pid(s) 1, 2) exited unexpectedly"),
            "A process of the data loader has ended (",
        ),
        (RuntimeError(BUS), "The processes of the data loader have too little shared memory, /dev/shm (DataLoader"),
        (
            RuntimeError("unable to write to file </torch_1_2>: No space left on device (28)"),
            "The processes of the data",
        ),
        (OSError(errno.ENOSPC, "unable to open shared memory object"), "The processes of the data loader have too"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
            "There is not enough memory: CUDA out of",
        ),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory\nmore"),
            "There is not enough memory: [",
        ),
        (MemoryError(), "There is not enough memory: MemoryError."),
    ],
    ids=str,
)
def test_trouble_of_the_machine_is_a_sentence(error: Exception, expected: str) -> None:
    sentence = sentence_of(error)
    assert sentence is not None
    assert sentence.startswith(expected)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    assert not sentence.endswith("..")


@pytest.mark.parametrize(
    ("error", "end"),
    [
        (OSError(errno.ENOSPC, "No space left", "a"), "cannot be written: No space left; make room, and run the com"),
        (OSError(errno.EROFS, "Read-only", "a"), "cannot be used: Read-only; once that is repaired, run the command"),
        (RuntimeError(KILLED), "perhaps for want of memory; run the command again, or with fewer of them: --set data"),
        (RuntimeError(BUS), "(docker run --shm-size=8g), and run the command again, or with --set data.workers=0."),
    ],
    ids=str,
)
def test_a_command_that_begins_anew_is_not_said_to_go_on(error: Exception, end: str) -> None:
    sentence = str(sentence_of(error, goes_on=False))
    assert end in sentence
    assert "goes on" not in sentence
    assert "--name" not in sentence
    assert "goes on from the last checkpoint" in str(sentence_of(error))


@pytest.mark.parametrize(
    "error",
    [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), FileNotFoundError(errno.ENOENT, "x"), KeyError()],
)
def test_faults_of_ours_are_none(error: Exception) -> None:
    error.__context__ = ValueError("before")
    assert sentence_of(error) is None
    with pytest.raises(type(error)), named_batch(8):
        raise error


@pytest.mark.parametrize(
    ("batch_size", "devices", "advice"),
    [
        (64, 1, "; try --set data.batch_size=32 --name …."),
        (6, 1, "; try --set data.batch_size=3 --name …."),
        (12, 4, "; try --set data.batch_size=4 --name …."),
        (3, 1, "; a smaller network is needed."),
        (4, 4, "; a smaller network is needed."),
    ],
)
def test_a_step_without_memory_says_which_batch_to_try(batch_size: int, devices: int, advice: str) -> None:
    with pytest.raises(TrainingError) as caught, named_batch(batch_size, devices):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore.")
    assert str(caught.value) == (
        f"There is not enough memory for a step with data.batch_size {batch_size} (CUDA out of memory. Tried to "
        f"allocate 2 GiB){advice}"
    )


def test_what_tidying_up_raises_does_not_hide_the_cause() -> None:
    error = KeyError("tidying up")
    error.__context__ = MemoryError("too much")
    assert sentence_of(error) == "There is not enough memory: too much."
    with pytest.raises(TrainingError, match=r"with data.batch_size 8 \(too much\); try"), named_batch(8):
        raise error


@pytest.mark.parametrize(
    ("kind", "module"),
    [("cream", CreamLightningModule), ("darts", DartsLightningModule), ("retrain", ImageClassifier)],
)
def test_a_search_or_training_without_memory_says_which_batch_to_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str, module: type
) -> None:
    def step(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(module, "training_step", step)
    with pytest.raises(SystemExit) as caught:
        cli.run(lambda: resuming.run(kind, tmp_path, {}))
    assert caught.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: There is not enough memory for a step with data.batch_size 16 (CUDA out of memory); try --set "
        "data.batch_size=8 --name …."
    )


def test_memory_that_is_truly_lacking() -> None:
    with pytest.raises(TrainingError, match="DefaultCPUAllocator"), named_batch(64):
        torch.empty(2**55)
