"""Where kernels of our own can compute what torch computes slowly."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd import forward_ad

# Kernels count in integers of 32 bits.
LARGEST: Final = 2**31 - 1
_WHOLE: Final = (torch.float32, torch.float64)


def kernels_for(first: Tensor, *others: Tensor) -> Any:
    """Return :mod:`nni_cream.supernet.triton_kernels` where it can compute with tensors; None elsewhere.

    Not where the result has to be differentiable, in either mode: whoever uses a kernel sees to derivatives.
    """
    if not first.is_cuda or first.dtype not in (*_WHOLE, torch.bfloat16, torch.float16):
        return None
    for tensor in (first, *others):
        if tensor.device != first.device or tensor.dtype != first.dtype:
            return None
        if max(tensor.numel(), tensor.shape[0] * tensor.stride(0)) > LARGEST:
            return None
        if tensor.requires_grad and torch.is_grad_enabled():
            return None
        if forward_ad.unpack_dual(tensor).tangent is not None:
            return None
    return _kernels()


def are_there_kernels_for(features: Tensor) -> bool:
    """Tell whether there are kernels for the derivatives of what is computed of ``features``, in whole precision."""
    return features.is_cuda and features.dtype in _WHOLE and _kernels() is not None


@functools.cache
def _kernels() -> Any:
    # It comes with torch for CUDA on Linux, and with no other.
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        module = importlib.import_module("nni_cream.supernet.triton_kernels")
        module.run_all()
    except Exception as error:
        # Whatever it is, a search can do without: a missing C compiler, a card that Triton does not know, a full disk.
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        print(f"Cells of DARTS run as in the textbook, which is slower: Triton failed with {reason}.", file=sys.stderr)
        return None
    return module
