"""Whether the gradient of a loss is going to be differentiated itself, which calls for other operations in between."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_twice: ContextVar[bool] = ContextVar("twice", default=False)


@contextmanager
def differentiated_twice() -> Iterator[None]:
    """Let losses that are computed inside have gradients that are themselves cheap to differentiate.

    Gradients can be differentiated outside too, but then parts of a fused cell are computed again. Forward mode passes
    a fused cell only inside.
    """
    token = _twice.set(True)
    try:
        yield
    finally:
        _twice.reset(token)


def is_differentiated_twice() -> bool:
    """Tell whether this runs inside of :func:`differentiated_twice`."""
    return _twice.get()
