from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nni_cream import timing
from nni_cream.architecture import CreamPath
from nni_cream.child import build_network
from nni_cream.cost import measure_network, measure_space
from nni_cream.errors import UserError
from nni_cream.latency import LatencyTable
from nni_cream.recipe import CreamRecipe
from nni_cream.timing import measure_latency, median_milliseconds, print_latency, random_networks, space_of
from search_spaces.cream import CreamSpace

CLASSES = 7
OPTIONS: dict[str, Any] = {"dil_conv": True, "resunit": ("basic",), "skip": True}


@cache
def space(**options: Any) -> CreamSpace:
    with torch.device("meta"):
        return CreamSpace((1, 2, 3, 1, 2), CLASSES, **options)


class Watched:
    """Stands in the place of the clock: what is run takes as many ticks as it has multiply-accumulates for an image."""

    def __init__(self) -> None:
        self.works: list[Any] = []
        self.threads = 0

    def __call__(self, works: Sequence[Callable[[], object]], threads: int) -> list[float]:
        self.works, self.threads = list(works), threads
        return [self.macs(work) / 10_000 for work in works]

    @staticmethod
    def macs(work: Any) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            work()
        return counter.get_total_flops() // 2 // len(work.args[0])


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    watched = Watched()
    monkeypatch.setattr(timing, "median_milliseconds", watched)
    monkeypatch.setattr(timing, "_refuse_slow", lambda *_: None)
    return watched


class TestParts:
    """If time were multiply-accumulates, whole networks would take exactly the sum of their parts."""

    @pytest.mark.parametrize(("options", "resolution"), [({}, 32), (OPTIONS, 40)], ids=str)
    def test_add_up_to_whole_networks(self, watched: Watched, options: dict[str, Any], resolution: int) -> None:
        table = measure_latency(space(**options), resolution, networks=3)
        assert table.calibration.scale == 1
        assert (table.validation.mean_error, table.validation.kendall) == (0, pytest.approx(1))
        networks = [*table.calibration.networks, *table.validation.networks]
        assert len({network.path for network in networks}) == 6
        for network in networks:
            built = build_network(network.path, CLASSES, {})
            cost = measure_network(built, resolution).macs / 10_000
            assert cost == network.predicted == network.measured == table.of(CreamPath.parse(network.path))

    def test_are_those_of_the_choices_of_the_supernet(self, watched: Watched) -> None:
        """Every candidate, at the place where the space has it, in its order."""
        supernet = space(**OPTIONS)
        table = measure_latency(supernet, 32, networks=3)
        macs = measure_space(supernet, (3, 32, 32))
        budget = table.budget(supernet.depths, supernet.operations, supernet.skip, 0, 1)
        assert budget.choices == {
            label: tuple(cost.macs / 10_000 for cost in options) for label, options in macs.choices.items()
        }
        assert budget.fixed == macs.fixed.macs / 10_000
        assert table.operations == (0, 1, 2, 3, 4, 5, 6, 7, 9)

    def test_that_are_alike_are_measured_once(self, watched: Watched) -> None:
        measure_latency(space(), 32, networks=3)
        # Ten places with six operations, four parts around them, and two times three networks.
        assert len(watched.works) == 10 * 6 + 4 + 6


class TestConditions:
    @pytest.mark.parametrize(("precision", "dtype"), [("32-true", torch.float32), ("bf16-true", torch.bfloat16)])
    def test_are_those_that_were_asked_for(self, watched: Watched, precision: Any, dtype: torch.dtype) -> None:
        table = measure_latency(space(), 32, batch_size=3, threads=2, precision=precision, networks=3)
        conditions = table.conditions
        assert (conditions.device, conditions.batch_size, conditions.threads) == ("cpu", 3, 2)
        assert (conditions.precision, conditions.torch) == (precision, torch.__version__)
        assert conditions.name in Path("/proc/cpuinfo").read_text()
        assert watched.threads == 2
        for work in watched.works:
            (features,) = work.args
            assert (len(features), features.dtype) == (3, dtype)
            assert features.is_contiguous(memory_format=torch.channels_last)
            module = getattr(work.func, "__self__", work.func)
            assert not any(part.training for part in module.modules())
            weights = [tensor for tensor in module.parameters() if tensor.dim() == 4]
            assert {tensor.dtype for tensor in module.parameters()} == {dtype}
            assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in weights)

    def test_of_a_gpu_that_is_not_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(UserError, match=r"^--device is cuda, but torch finds no GPU on this machine: take cpu\.$"):
            measure_latency(space(), 32, device="cuda")

    def test_under_which_a_block_takes_too_long(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(timing, "MOST_MILLISECONDS", 0.001)
        monkeypatch.setattr(timing, "median_milliseconds", lambda *_: pytest.fail("it was measured at length"))
        with pytest.raises(
            UserError, match=r"^A single block takes .* ms for a batch, and a table goes to 0: make --ba"
        ):
            measure_latency(space(), 32, networks=3)


class TestRandomNetworks:
    def test_are_different_ones_of_the_space_and_follow_from_the_seed(self) -> None:
        found = random_networks(space(**OPTIONS), 80, 0)
        assert len(set(found)) == 80
        assert random_networks(space(**OPTIONS), 80, 0) == found
        assert random_networks(space(**OPTIONS), 80, 1) != found
        blocks = [[len(path.stages[stage]) for path in found] for stage in range(7)]
        assert [max(numbers) for numbers in blocks] == [1, 1, 2, 3, 1, 2, 1]
        assert [min(numbers) for numbers in blocks][2] == 1
        assert {choice for path in found for stage in path.stages for choice in stage} == {0, 1, 2, 3, 4, 5, 6, 7, 9}


class TestClock:
    @pytest.fixture(autouse=True)
    def _quick(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(timing, "ROUNDS", 5)
        monkeypatch.setattr(timing, "SECONDS", 0.01)

    def test_tells_milliseconds(self) -> None:
        quick, slow = median_milliseconds([partial(time.sleep, 0.001), partial(time.sleep, 0.004)], threads=1)
        # A busy machine wakes later, never earlier.
        assert quick >= 1
        assert slow >= 4
        assert quick < slow

    def test_is_not_moved_by_what_disturbs_two_rounds_of_five(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Scripted:
            """A timer of torch's; it takes 0.5 ms for a run before the rounds."""

            def __init__(self, work: str, globals: dict[str, Any], num_threads: int) -> None:
                self.rounds = iter(globals["work"])

            def blocked_autorange(self, min_run_time: float) -> SimpleNamespace:
                return SimpleNamespace(median=0.0005)

            def timeit(self, number: int) -> SimpleNamespace:
                assert number == 20
                return SimpleNamespace(mean=next(self.rounds))

        monkeypatch.setattr(timing, "Timer", Scripted)
        works: Any = [[0.001, 0.001, 0.5, 0.002, 0.7], [0.003, 0.004, 9.0, 8.0, 0.003]]
        assert median_milliseconds(works, threads=1) == [2.0, 4.0]

    def test_goes_through_all_in_every_round(self) -> None:
        order: list[int] = []
        states: set[tuple[bool, int]] = set()

        def note(number: int) -> None:
            order.append(number)
            states.add((torch.is_inference_mode_enabled(), torch.get_num_threads()))
            time.sleep(0.001)

        before = torch.get_num_threads()
        assert len(median_milliseconds([partial(note, number) for number in range(3)], threads=3)) == 3
        # Once to find out how often each is run in a round, and then the rounds.
        assert [number for number, _ in groupby(order)] == [0, 1, 2] * 6
        assert states == {(True, 3)}
        assert torch.get_num_threads() == before

    def test_is_that_of_a_network(self) -> None:
        network = nn.Conv2d(3, 3, 3).eval()
        (found,) = median_milliseconds([partial(network, torch.ones(1, 3, 8, 8))], threads=1)
        assert 0 < found < 1000


class TestSpaceOfARecipe:
    RECIPE = CreamRecipe.model_validate(
        {
            "name": "a",
            "epochs": 30,
            "data": {"name": "digits", "resolution": None},
            "flops": {"min": 0, "max": 30},
            "space": {"skip": True, "resunit": ["basic"]},
        }
    )

    def test_has_its_depths_resolution_and_operations(self) -> None:
        found, resolution = space_of(self.RECIPE, 5)
        assert (found.depths, resolution, found.num_classes) == ((1, 1, 1, 1, 1), 128, 5)
        assert (found.skip, found.operations) == (True, (0, 1, 2, 3, 4, 5, 9))
        assert {parameter.device.type for parameter in found.parameters()} == {"meta"}

    def test_has_the_classes_of_the_data(self) -> None:
        assert space_of(self.RECIPE)[0].num_classes == 10


def test_what_a_person_is_told(watched: Watched, capsys: pytest.CaptureFixture[str]) -> None:
    supernet = space()
    table: LatencyTable = measure_latency(supernet, 32, networks=3, threads=1)
    print_latency(table, supernet, Path("latency.json"))
    head, *rows, factor, error, relation, paths, file = capsys.readouterr().out.splitlines()
    assert head.split() == ["network", "predicted", "measured", "error"]
    assert len(rows) == 3
    for row, network in zip(rows, table.validation.networks, strict=True):
        assert row.startswith(network.path)
        assert row.endswith(f"{network.predicted:.3f} ms {network.measured:.3f} ms   +0.0 %")
    assert factor == "factor:    1.000 times the sum of the parts, fitted to 3 other networks"
    assert error == "error:     0.0 % on average, +0.0 % with its sign"
    assert relation == "relation:  Pearson 1.000, Kendall 1.000"
    macs = measure_space(supernet, (3, 32, 32))
    shown = f"paths:     {macs.cheapest / 1e4:.3f} ms to {macs.dearest / 1e4:.3f} ms, for a batch of 1 on "
    assert paths.startswith(shown)
    assert paths.endswith(f", 1 thread, 32-true, torch {torch.__version__}")
    assert file == "table:     latency.json"
