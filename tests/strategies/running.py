"""What the tests of both strategies share: a search through NNI's own engine, images that can be told apart, states."""

from __future__ import annotations

from typing import Any

import nni.nas.nn.pytorch as nas
import pytest
import torch
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.execution.event import ModelEventType
from nni.nas.space import RawFormatModelSpace
from torch import Tensor
from torch.utils.data import TensorDataset

# NNI says so of every evaluator, and Lightning of every small run.
SMALL_RUNS = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

State = dict[str, Tensor]


def search(strategy: Any, space: nas.ModelSpace, evaluator: Any) -> tuple[list[Any], list[Any]]:
    """Search, and return what was reported to NNI: while it ran, and in the end."""
    reports: list[Any] = []
    final: list[Any] = []
    engine = SequentialExecutionEngine()
    engine.register_model_event_callback(ModelEventType.IntermediateMetric, lambda event: reports.append(event.metric))
    engine.register_model_event_callback(ModelEventType.FinalMetric, lambda event: final.append(event.metric))
    strategy(RawFormatModelSpace.from_model(space, evaluator), engine)
    return reports, final


def labelled_images(number: int, *, seed: int, size: int, classes: int, brighter: float) -> TensorDataset:
    """Noise in double precision, in which one channel is brighter, that of the class."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(number, 3, size, size, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, classes, (number,), generator=generator)
    images[torch.arange(len(labels)), labels] += brighter
    return TensorDataset(images, labels)


def assert_same(ours: State, theirs: State, *, rtol: float = 1e-9, atol: float = 1e-9) -> None:
    """The same names in the same order, with the same values."""
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        torch.testing.assert_close(
            tensor, theirs[name], rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )
