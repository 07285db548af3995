from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from nni_cream.cuda_graphs import WARM_UP, Recorded, Recorder, record
from tests.stand_in_graphs import StandIn

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]


class Sum:
    """Adds all that it is given to a total, and returns the sum of the latest, the total, and nothing."""

    def __init__(self, device: str) -> None:
        self.total = torch.zeros((), device=device)
        self.calls = 0

    def __call__(self, *given: Tensor) -> tuple[Tensor | None, ...]:
        self.calls += 1
        latest = torch.stack([tensor.sum() for tensor in given]).sum()
        self.total.add_(latest)
        return latest, self.total * 1, None


def recorded(device: str) -> tuple[Sum, Recorded, StandIn | None]:
    stand_in = None if device == "cuda" else StandIn()
    function = Sum(device)
    return function, Recorded(function, lambda: [function.total, None], Recorder(stand_in or record)), stand_in


def numbers(found: Sequence[Any]) -> list[float | None]:
    return [None if tensor is None else tensor.item() for tensor in found]


@pytest.mark.parametrize("device", DEVICES)
class TestRecorded:
    def test_every_call_counts_once(self, device: str) -> None:
        function, call, stand_in = recorded(device)
        total = 0.0
        for number in range(1, 8):
            total += 3 * number + 1
            given = torch.full((3,), float(number), device=device), torch.ones((), device=device)
            assert numbers(call(*given)) == [3 * number + 1, total, None]
        if stand_in is None:
            # Python runs for a recording, and for the call that it is compared with.
            assert function.calls == WARM_UP + 2
        else:
            assert (stand_in.recordings, stand_in.replays) == (1, 7 - WARM_UP)

    def test_another_shape_is_called_as_it_is(self, device: str) -> None:
        function, call, stand_in = recorded(device)
        total = 0.0
        for length in (3, 3, 3, 3, 2, 3, 1, 3):
            total += length
            assert numbers(call(torch.ones(length, device=device))) == [length, total, None]
        if stand_in is None:
            assert function.calls == WARM_UP + 2 + 2
        else:
            assert (stand_in.recordings, stand_in.replays) == (1, 3)

    def test_a_smaller_batch_is_not_what_is_recorded(self, device: str) -> None:
        function, call, stand_in = recorded(device)
        total = 0.0
        for length in (*[3] * WARM_UP, 2, 3, 3, 3, 2, 3):
            total += length
            assert numbers(call(torch.ones(length, device=device))) == [length, total, None]
        if stand_in is None:
            assert function.calls == WARM_UP + 2 + 2 + 1
        else:
            assert (stand_in.recordings, stand_in.replays) == (1, 3)

    def test_state_that_has_moved_is_recorded_anew(self, device: str) -> None:
        function, call, stand_in = recorded(device)
        for _ in range(WARM_UP + 2):
            call(torch.ones(3, device=device))
        before = function.total
        function.total = torch.full((), 100.0, device=device)
        assert numbers(call(torch.ones(3, device=device))) == [3, 103, None]
        assert numbers(call(torch.ones(3, device=device))) == [3, 106, None]
        assert before.item() == 3 * (WARM_UP + 2)
        if stand_in is not None:
            assert stand_in.recordings == 2

    def test_random_numbers_are_drawn_anew(self, device: str, capsys: pytest.CaptureFixture[str]) -> None:
        stand_in = StandIn()
        call = Recorded(lambda x: (torch.rand_like(x),), list, Recorder(stand_in))
        drawn = [call(torch.zeros(1, device=device))[0] for _ in range(WARM_UP + 3)]
        assert len({tensor.item() for tensor in drawn if tensor is not None}) == WARM_UP + 3
        assert stand_in.recordings == 0
        said = capsys.readouterr().err.splitlines()
        assert said == [
            "Steps are not recorded as CUDA graphs: the network draws random numbers, which would be the same ones in "
            "every step."
        ]


@pytest.mark.parametrize("wrong", ["result", "state"])
def test_a_recording_that_computes_something_else_is_not_used(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    function = Sum("cpu")

    def record(_: Any, inputs: Sequence[Tensor], pool: Any) -> Any:
        results = torch.zeros(()), torch.zeros(()), None

        def replay() -> None:
            latest, total, _ = function(*inputs)
            assert latest is not None
            assert total is not None
            results[0].copy_(latest * 1.01 if wrong == "result" else latest)
            results[1].copy_(total)
            if wrong == "state":
                function.total.mul_(1.01)

        return replay, results

    call = Recorded(function, lambda: [function.total], Recorder(record))
    for number in range(1, WARM_UP + 4):
        assert numbers(call(torch.ones(3))) == [3, 3 * number, None]
    assert function.total.item() == 3 * (WARM_UP + 3)
    assert capsys.readouterr().err.splitlines() == [
        "Steps are not recorded as CUDA graphs: a recording computes something else than the step itself."
    ]


def test_what_cannot_be_recorded_runs_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    tried = []

    def refuses(function: Any, inputs: Any, pool: Any) -> Any:
        tried.append(function)
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    recorder = Recorder(refuses)
    first, second = Sum("cpu"), Sum("cpu")
    calls = [Recorded(function, lambda: [], recorder) for function in (first, second)]
    for number in range(1, WARM_UP + 4):
        for call in calls:
            assert numbers(call(torch.ones(3))) == [3, 3 * number, None]
    assert tried == [first]
    assert capsys.readouterr().err.splitlines() == [
        "Steps are not recorded as CUDA graphs: operation not permitted when stream is capturing."
    ]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_waiting_for_the_device_cannot_be_recorded() -> None:
    recorder = Recorder()
    call = Recorded(lambda x: (x * x.sum().item(),), list, recorder)
    for _ in range(WARM_UP + 2):
        assert numbers(call(torch.full((1,), 3.0, device="cuda"))) == [9]
    assert recorder.refused is not None
    assert torch.ones(2, device="cuda").sum().item() == 2
