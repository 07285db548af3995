"""A stand-in for recordings of CUDA graphs, which works on a CPU: it calls the function again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor


class StandIn:
    """Records as :func:`nni_cream.cuda_graphs.record` does: nothing runs, and a replay writes to the same results.

    Attributes:
        recordings: how many have been made.
        replays: how often one was replayed.
    """

    def __init__(self) -> None:
        self.recordings = 0
        self.replays = 0

    def __call__(self, function: Any, inputs: Sequence[Tensor], pool: Any) -> tuple[Callable[[], None], Any]:
        self.recordings += 1
        results: list[Any] = []

        def replay() -> None:
            self.replays += 1
            found = function(*inputs)
            if not results:
                results.extend(None if tensor is None else tensor.clone() for tensor in found)
            for place, tensor in zip(results, found, strict=True):
                if place is not None:
                    place.copy_(tensor)

        return replay, results
