"""Where kernels of our own can compute what torch computes slowly."""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Any, Final

import torch
from torch import Tensor

# Kernels count in integers of 32 bits.
_LARGEST: Final = 2**31
_WHOLE: Final = (torch.float32, torch.float64)


def kernels_for(*tensors: Tensor) -> Any:
    """Return :mod:`nni_cream.supernet.triton_kernels` where it can compute with ``tensors``; None elsewhere.

    Not where the result has to be differentiable, which is for those to see to that use a kernel.
    """
    if not tensors[0].is_cuda or tensors[0].dtype not in (*_WHOLE, torch.bfloat16, torch.float16):
        return None
    if any(tensor.numel() >= _LARGEST or (tensor.requires_grad and torch.is_grad_enabled()) for tensor in tensors):
        return None
    return _kernels()


def are_there_kernels_for(features: Tensor) -> bool:
    """Tell whether there are kernels for the derivatives of what is computed of ``features``, in whole precision."""
    return features.is_cuda and features.dtype in _WHOLE and _kernels() is not None


@functools.cache
def _kernels() -> Any:
    try:
        # Triton comes with torch for CUDA on Linux, and with no other.
        module = importlib.import_module("nni_cream.supernet.triton_kernels")
    except ImportError:
        return None
    try:
        module.run_one()
    except Exception as error:
        # Whatever it is, a search can do without: a missing C compiler, a card that Triton does not know, a full disk.
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        print(f"Cells of DARTS run as in the textbook, which is slower: Triton failed with {reason}.", file=sys.stderr)
        return None
    return module
