"""Functions of tensors whose kernels are launched together, as one CUDA graph.

The kernels of a small network take less time than launching them one by one. What launches the same kernels at every
call is therefore run a few times as it is, recorded once, and replayed from then on (``torch.cuda.CUDAGraph``): same
kernels in the same order on the same memory, so the same numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

Outputs = tuple[Tensor | None, ...]
Function = Callable[..., Outputs]
# Libraries choose their kernels and optimizers make their state in the first calls.
WARM_UP: Final = 3
# In how far a recording may differ from the step itself, relative to its numbers.
TOLERANCE: Final = 1e-3


def is_recording() -> bool:
    """Tell whether kernels are being recorded at the moment, in which case nothing may wait for the device."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def record(function: Function, inputs: Sequence[Tensor], pool: Any) -> tuple[Callable[[], Any], Outputs]:
    """Record one call, which does not run meanwhile.

    Args:
        function: what is called.
        inputs: its arguments; it will read them where they are now.
        pool: memory that it may take, shared with other recordings; see :class:`torch.cuda.graph`.

    Returns:
        What replays it, and the tensors that hold its results after that.
    """
    graph = torch.cuda.CUDAGraph()
    # Threads that load data may go on talking to the device.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        outputs = function(*inputs)
    return graph.replay, outputs


class Recorder:
    """What :class:`Recorded` functions share that are called in turns: memory, and whether they can be recorded.

    Attributes:
        record: as :func:`record`.
        refused: why functions run kernel by kernel; None where they need not.
    """

    def __init__(self, record: Callable[..., tuple[Callable[[], Any], Outputs]] = record) -> None:
        self.record = record
        self.refused: str | None = None
        self._pool: Any = None

    def pool(self) -> Any:
        """Return the memory that all recordings share: what one gives back another takes."""
        if self._pool is None and torch.cuda.is_available():
            self._pool = torch.cuda.graph_pool_handle()
        return self._pool

    def refuse(self, why: str) -> None:
        """Let all functions run kernel by kernel from now on, and say so once."""
        if self.refused is None:
            self.refused = why
            print(f"Steps are not recorded as CUDA graphs: {why}.", file=sys.stderr, flush=True)


class Recorded:
    """A function that launches the same kernels at every call, recorded after a few calls and then replayed.

    It may change tensors in place, but Python code in it runs no more once it is recorded. A recording is compared with
    a call of the function before it counts, and not used where they differ. What it returns is overwritten by the next
    call of a function with the same recorder. Called with other shapes it runs as it is; where tensors of its state
    have moved in memory it is recorded anew.

    Args:
        function: takes tensors, and gives tensors and None.
        state: gives the tensors that it reads and changes besides its arguments, in a fixed order.
        recorder: shared with the functions that are called in turns with this one.
    """

    def __init__(self, function: Function, state: Callable[[], Iterable[Tensor | None]], recorder: Recorder) -> None:
        self._function = function
        self._state = state
        self._recorder = recorder
        self._calls = 0
        self._form: list[Any] = []
        self._addresses: list[int] = []
        self._inputs: list[Tensor] = []
        self._outputs: Outputs = ()
        self._replay: Callable[[], Any] | None = None

    def __call__(self, *inputs: Tensor) -> Outputs:
        """Return what the function makes of ``inputs``."""
        if self._recorder.refused is not None:
            return self._function(*inputs)
        self._calls += 1
        form = [(tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in inputs]
        if self._calls <= WARM_UP:
            self._form = form
            return self._watched(*inputs)
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in self._state()]
        moved = self._replay is None or addresses != self._addresses
        if form != self._form:
            # What comes twice in a row is no smaller batch at the end of an epoch.
            self._form = form if moved else self._form
            return self._function(*inputs)
        if moved:
            self._addresses = addresses
            return self._record(*inputs)
        return self._replayed(*inputs)

    def _replayed(self, *inputs: Tensor) -> Outputs:
        assert self._replay is not None
        for place, given in zip(self._inputs, inputs, strict=True):
            place.copy_(given)
        self._replay()
        return self._outputs

    def _watched(self, *inputs: Tensor) -> Outputs:
        before = _random_states()
        outputs = self._function(*inputs)
        if any(not torch.equal(a, b) for a, b in zip(before, _random_states(), strict=True)):
            self._recorder.refuse("the network draws random numbers, which would be the same ones in every step")
        return outputs

    def _record(self, *inputs: Tensor) -> Outputs:
        # Before a new recording takes memory, the old one gives up its own.
        self._replay, self._outputs, self._inputs = None, (), []
        places = [tensor.clone() for tensor in inputs]
        before = self._copied()
        expected = self._function(*inputs)
        after = self._copied()
        self._restore(before)
        try:
            self._replay, self._outputs = self._recorder.record(self._function, places, self._recorder.pool())
            self._inputs = places
            found = self._replayed(*inputs)
            if _agree(found, expected) and _agree(self._copied(), after):
                return found
            self._recorder.refuse("a recording computes something else than the step itself")
        except RuntimeError as error:
            self._recorder.refuse(str(error).strip().partition("\n")[0].rstrip("."))
        self._restore(after)
        return expected

    def _copied(self) -> list[Tensor | None]:
        return [None if tensor is None else tensor.detach().clone() for tensor in self._state()]

    @torch.no_grad()
    def _restore(self, state: Sequence[Tensor | None]) -> None:
        for tensor, before in zip(self._state(), state, strict=True):
            if tensor is not None and before is not None:
                tensor.copy_(before)


def _agree(ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None]) -> bool:
    """Tell whether two runs of the same kernels agree, whose sums may come in another order."""
    given = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
    if any((a is None) != (b is None) for a, b in zip(ours, theirs, strict=True)):
        return False
    apart = torch.stack([(a.double() - b.double()).norm() for a, b in given])
    size = torch.stack([b.double().norm() for _, b in given])
    # One that is nearly 0 is no more than noise beside the others.
    return bool((apart <= TOLERANCE * (size + size.median())).all())


def _random_states() -> list[Tensor]:
    states = [torch.get_rng_state()]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states.append(torch.cuda.get_rng_state())
    return states
