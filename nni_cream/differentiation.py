"""Which derivatives a backward pass is asked for: autograd tells its own nodes, but none that are written in Python."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_without_weights: ContextVar[bool] = ContextVar("without_weights", default=False)


@contextmanager
def without_weights() -> Iterator[None]:
    """Let backward passes that run inside leave out the gradients of weights, which nobody asks for.

    A node written in Python computes the gradients of all its inputs otherwise, also where ``torch.autograd.grad``
    wants those of α alone. It may run once around the pass that gives a gradient, and once around that which
    differentiates it. Backward passes on other devices than the CPU run in threads of their own, and leave nothing out.
    """
    token = _without_weights.set(True)
    try:
        yield
    finally:
        _without_weights.reset(token)


def leaves_out_weights() -> bool:
    """Tell whether this runs inside of :func:`without_weights`."""
    return _without_weights.get()
