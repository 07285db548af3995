"""Workarounds for faults of the software below us; each stands here once, with its reason.

====================  ==========================================================  =================================
what                  why                                                         no longer needed when
====================  ==========================================================  =================================
torchvision operators torchvision's wheel is linked against CUDA. Beside a CPU    a torchvision wheel for CPU-only
                      build of torch its library does not load, and               torch is on PyPI
                      ``import torchvision`` (so timm, torchmetrics and Lightning
                      as well) dies at ``operator torchvision::nms does not
                      exist``.
NNI's false warnings  NNI 3.0 wraps every class in ``torch.nn`` and warns of the  NNI knows torch 2's ``torch.nn``
                      two newer ones that are not modules, at every start.
====================  ==========================================================  =================================
"""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import wrapt

if TYPE_CHECKING:
    from types import ModuleType

    from torch.library import Library

# A Library undoes its declarations when it is collected, so it has to live as long as the process.
_torchvision_library: Library | None = None

_DETECTION_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def install() -> None:
    """Put the workarounds in place; nothing heavy is imported until torch is.

    Called when ``nni_cream`` is imported. Where the package is *installed*, torch calls
    :func:`declare_torchvision_operators` by itself in every process (entry point ``torch.backends``), also in NNI's
    own children, which import Lightning before they know of us.
    """
    warnings.filterwarnings(
        "ignore",
        message=r".* is found to be not a nn\.Module",
        category=RuntimeWarning,
        module=r"nni\.nas\.nn\.pytorch\.layers",
    )
    wrapt.register_post_import_hook(_after_torch, "torch")


def declare_torchvision_operators() -> None:
    """Declare the two operators that ``import torchvision`` insists on, unless its compiled library loads.

    Everything in torchvision but its detection operators (non-maximum suppression, region pooling) then works.
    """
    global _torchvision_library
    import torch

    found = importlib.util.find_spec("torchvision")
    if _torchvision_library is not None or found is None or not found.submodule_search_locations:
        return
    for library in Path(found.submodule_search_locations[0]).glob("_C*.so"):
        try:
            torch.ops.load_library(str(library))
        except OSError:
            continue
        return
    _torchvision_library = torch.library.Library("torchvision", "DEF")
    for schema in _DETECTION_OPERATORS:
        _torchvision_library.define(schema)


def _after_torch(_torch: ModuleType) -> None:
    declare_torchvision_operators()
