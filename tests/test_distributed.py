"""Two processes (torchrun, gloo) compute what one does with the same batches; distributed_worker.py says what."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils.data import BatchSampler

from nni_cream import distributed, launching
from nni_cream.errors import UserError
from nni_cream.shards import Shards, Shuffled
from nni_cream.supernet import synchronised
from tests.distributed_worker import SCENARIOS

TIMEOUT = 600
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
SEARCHES = [name for name in SCENARIOS if name.startswith(("darts", "cream"))]
CREAM = [name for name in SEARCHES if name.startswith("cream")]

Results = list[dict[str, Any]]


def environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    return {**kept, "OMP_NUM_THREADS": "1"}


def run(repository: Path, folder: Path, launcher: tuple[str, ...]) -> Results:
    folder.mkdir()
    command = [sys.executable, *launcher, "-m", "tests.distributed_worker", str(folder)]
    result = subprocess.run(
        command, cwd=repository, env=environment(), capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert result.returncode == 0, result.stderr[-5000:]
    return [torch.load(file, weights_only=False) for file in sorted(folder.glob("*.pt"))]


@pytest.fixture(scope="module")
def one(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    (found,) = run(repository, tmp_path_factory.mktemp("one") / "out", ())
    return found


@pytest.fixture(scope="module")
def two(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    found = run(repository, tmp_path_factory.mktemp("two") / "out", TORCHRUN)
    assert len(found) == 2
    return found


def assert_same(ours: Any, theirs: Any, tolerance: float, where: str = "") -> None:
    """Compare whatever is in two results, numbers to a relative tolerance (absolute below 1)."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, Tensor):
        assert ours.shape == theirs.shape, where
        difference = (ours.double() - theirs.double()).abs() / theirs.double().abs().clamp_min(1)
        assert ours.numel() == 0 or difference.max() <= tolerance, (where, difference.max())
    elif isinstance(ours, float):
        assert math.isclose(ours, theirs, rel_tol=tolerance, abs_tol=tolerance), (where, ours, theirs)
    elif isinstance(ours, dict):
        assert list(ours) == list(theirs), where
        for name, value in ours.items():
            assert_same(value, theirs[name], tolerance, f"{where}/{name}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for position, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_same(*pair, tolerance, f"{where}/{position}")
    else:
        assert ours == theirs, where


@pytest.mark.slow
class TestTwoProcesses:
    @pytest.mark.parametrize("name", SCENARIOS)
    def test_equal_one(self, name: str, one: dict[str, Any], two: Results) -> None:
        ours, theirs = two[0][name], one[name]
        if name in SEARCHES:
            # Shares of right answers are single-precision numbers there.
            assert_same(ours["reports"], theirs["reports"], 1e-7)
            ours, theirs = ({**found, "reports": None} for found in (ours, theirs))
        assert_same(ours, theirs, 1e-9)

    @pytest.mark.parametrize("name", SCENARIOS)
    def test_equal_each_other_to_the_last_bit(self, name: str, two: Results) -> None:
        first, second = (dict(found[name]) if isinstance(found[name], dict) else found[name] for found in two)
        if name in SEARCHES:
            assert second.pop("reports") == []
            assert first.pop("reports")
        assert_same(second, first, 0)

    @pytest.mark.parametrize("name", CREAM)
    def test_only_the_drawn_path_is_stepped(self, name: str, two: Results) -> None:
        for found in two:
            assert len({str(path) for path in found[name]["paths"]}) > 3
            for path, moved in zip(found[name]["paths"], found[name]["moved"], strict=True):
                choices = [
                    parameter.split(".")[2:4]
                    for parameter in moved
                    if ".first." in parameter or ".second." in parameter
                ]
                assert {tuple(choice) for choice in choices} == {(label, str(i)) for label, i in path.items()}

    def test_the_matching_layer_learns(self, two: Results) -> None:
        moved = [any(name.startswith("matching.") for name in names) for names in two[1]["cream"]["moved"]]
        assert sum(moved) >= 3

    def test_the_operators_pass_on_that_there_is_no_gradient(self, two: Results) -> None:
        assert two[1]["operators"]["unused"]

    def test_norms_are_alone_where_they_are_told_to(self, two: Results) -> None:
        assert two[1]["without synchronisation"] == [True, True]


class TestOneProcess:
    def test_the_operators_are_the_identity(self) -> None:
        tensors = (torch.ones(2), torch.zeros(3))
        assert distributed.replicate(*tensors) == tensors
        assert distributed.reduce(*tensors) == tensors

    def test_there_is_nobody_else(self) -> None:
        assert distributed.processes() == 1
        assert distributed.total(2, 3) == [2, 3]
        assert distributed.agreed("a") == "a"
        tensor = torch.ones(3)
        distributed.average_([tensor])
        assert torch.equal(distributed.gathered(tensor), torch.ones(3))
        assert torch.equal(distributed.mean(tensor), torch.ones(3))

    def test_norms_are_torchs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(synchronised, "_batch_norm", lambda *_: pytest.fail("not torch's"))
        with synchronised.synchronised():
            assert nn.BatchNorm1d(3)(torch.randn(4, 3)).mean().abs() < 1e-6
            assert synchronised.sharers() == 1

    def test_other_ways_to_start_processes_are_refused(self) -> None:
        launching.refuse_other_strategies(SimpleNamespace(world_size=1, strategy=SingleDeviceStrategy()))
        launching.refuse_other_strategies(SimpleNamespace(world_size=2, strategy=launching.SharedBatch()))
        with pytest.raises(
            UserError, match=r"needs strategy=nni_cream\.launching\.SharedBatch\(\) in its Trainer, not DDP"
        ):
            launching.refuse_other_strategies(SimpleNamespace(world_size=2, strategy=DDPStrategy()))


class TestShards:
    @pytest.mark.parametrize("processes", [1, 2, 3])
    @pytest.mark.parametrize("drop_last", [True, False])
    def test_together_they_are_the_batches_of_one(self, processes: int, drop_last: bool) -> None:
        batches = BatchSampler(Shuffled(22), 6, drop_last=drop_last)
        whole = list(batches)
        parts = [list(Shards(batches, rank, processes)) for rank in range(processes)]
        assert [list(itertools.chain(*pieces)) for pieces in zip(*parts, strict=True)] == whole
        assert {len(Shards(batches, 0, processes)), *map(len, parts)} == {len(whole)}
        for pieces in zip(*parts, strict=True):
            sizes = [len(piece) for piece in pieces]
            assert max(sizes) - min(sizes) <= 1

    def test_a_batch_too_small_to_share(self) -> None:
        with pytest.raises(UserError, match=r"A batch has 1 images, too few for 2 processes\."):
            list(Shards([[0, 1], [2]], 0, 2))
