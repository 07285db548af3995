"""Products in TF32, which torch takes for float32 on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def without_tf32() -> Iterator[None]:
    """Compute in float32 what is float32; afterwards everything is set as before.

    By default torch lets convolutions on a GPU round their inputs to 10 bits (TF32). A gradient of a gradient has no
    digits to spare, nor has a recording that is to agree with the step that it is of.
    """
    cudnn: Any = torch.backends.cudnn
    products: Any = torch.backends.cuda.matmul
    try:
        convolve, multiply = cudnn.allow_tf32, torch.get_float32_matmul_precision()
    except RuntimeError:
        # Somebody has used the names that there are since torch 2.9, with which these cannot be mixed.
        places = (cudnn.conv, cudnn.rnn, products)
        before = [place.fp32_precision for place in places]
        _set_each(places, ["ieee"] * len(places))
        try:
            yield
        finally:
            _set_each(places, before)
        return
    _set(False, "highest")
    try:
        yield
    finally:
        _set(convolve, multiply)


def _set(convolve: bool, multiply: str) -> None:
    torch.backends.cudnn.allow_tf32 = convolve
    # What is set to what it is would no longer follow what is said of all.
    if multiply != torch.get_float32_matmul_precision():
        torch.set_float32_matmul_precision(multiply)


def _set_each(places: Any, precisions: Any) -> None:
    for place, precision in zip(places, precisions, strict=True):
        place.fp32_precision = precision
