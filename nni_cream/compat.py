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
NNI's unread answers  NNI 3.0's trials look at no answer of the manager, so that  NNI's ``HttpChannel.send`` raises
                      a metric sent while it shuts down is lost, and they wait    for a refusal
                      for one without end.
NNI's strategies      NNI 3.0 imports ``nni.nas.strategy`` in the middle of       NNI imports both in either order
                      ``nni.nas.oneshot.pytorch.strategy``: where the latter is
                      first, DARTS, ENAS and others fail as soon as they run.
NNI's TensorBoard     The button of NNI 3.0's web UI starts TensorBoard on a      the button opens
                      folder that local trials are not told of.                   ``$NNI_OUTPUT_DIR/tensorboard``
====================  ==========================================================  =================================
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from types import ModuleType

    from nni.runtime.trial_command_channel import TrialCommandChannel
    from torch.library import Library

# A Library undoes its declarations when it is collected, so it has to live as long as the process.
_torchvision_library: Library | None = None

_ANSWER_SECONDS = 20

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
    wrapt.register_post_import_hook(_after_oneshot, "nni.nas.oneshot.pytorch")


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


def read_answers(channel: TrialCommandChannel) -> None:
    """Let ``channel`` raise an ``OSError`` when the manager has not taken what was sent."""
    import requests
    from nni.runtime.command_channel.http import HttpChannel

    http = getattr(channel, "_channel", None)
    if not isinstance(http, HttpChannel):
        return

    def send(command: Any) -> None:
        requests.put(http._url, json=command, timeout=_ANSWER_SECONDS).raise_for_status()

    http.send = send


def link_tensorboard(directory: Path) -> None:
    """Let the TensorBoard button of NNI's web UI find the events of the local trial whose run is in ``directory``."""
    trial = Path(os.environ.get("NNI_OUTPUT_DIR", ""))
    is_local = os.environ.get("NNI_PLATFORM") == "local"
    if not is_local or trial.parts[-4:-3] + trial.parts[-2:-1] != ("environments", "trials"):
        return
    expected = trial.parents[3] / "trials" / trial.name / "output" / "tensorboard"
    # The button has made an empty folder if it was pressed before.
    if expected.is_dir() and not expected.is_symlink() and not any(expected.iterdir()):
        expected.rmdir()
    if not expected.exists():
        # Not every run is in the folder of its trial, and what one had there may have been removed.
        events = (directory / "tensorboard").absolute()
        events.mkdir(parents=True, exist_ok=True)
        expected.parent.mkdir(parents=True, exist_ok=True)
        expected.unlink(missing_ok=True)
        expected.symlink_to(events)


def _after_torch(_torch: ModuleType) -> None:
    declare_torchvision_operators()


def _after_oneshot(_oneshot: ModuleType) -> None:
    # Its submodule, which imports that one too early, comes after it.
    import nni.nas.strategy  # noqa: F401
