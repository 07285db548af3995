"""Products in TF32, which torch takes for float32 on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def without_tf32() -> Iterator[None]:
    """Compute in float32 what is float32.

    By default torch lets convolutions on a GPU round their inputs to 10 bits (TF32). A gradient of a gradient is then
    wrong by some thousandths, differently in every run.
    """
    convolutions: Any = torch.backends.cudnn
    products: Any = torch.backends.cuda.matmul
    before = convolutions.allow_tf32, products.allow_tf32
    convolutions.allow_tf32 = products.allow_tf32 = False
    try:
        yield
    finally:
        convolutions.allow_tf32, products.allow_tf32 = before
