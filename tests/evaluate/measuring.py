"""Networks that tell images apart, and their accuracies: counted by plain loops, and as the package measures them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from nni_cream.architecture import CreamPath
from nni_cream.data import DataSplits, load_data
from nni_cream.errors import UserError
from nni_cream.evaluate import Evaluation, evaluate
from nni_cream.recipe import EvaluationRecipe
from nni_cream.settings import Data

PATH = CreamPath.parse("[0] [0] [1] [2] [3] [0] [0]")
DIGITS = Data(name="digits", resolution=32, batch_size=50).model_dump(mode="json")
FOREIGN: dict[str, dict[str, Any]] = {"data": {"name": "digits", "resolution": 32}}


def with_opinions(network: nn.Module, seed: int) -> Any:
    """Let a new network tell images apart, and its classes come in no obvious order."""
    torch.manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        network.train()(load_batch(digits(32)))
        for name in ("weight", "bias"):
            parameter = network.get_parameter(f"classifier.{name}")
            parameter.copy_(torch.randn_like(parameter))
    return network.eval()


def digits(resolution: int) -> DataSplits:
    return load_data("digits", resolution=resolution)


def load_batch(splits: DataSplits) -> Tensor:
    return torch.stack([splits.architecture[i][0] for i in range(64)])


@torch.no_grad()
def accuracies(network: nn.Module, images: list[Tensor], labels: list[int]) -> tuple[float, float]:
    first, five = 0, 0
    for image, label in zip(images, labels, strict=True):
        order = network(image[None])[0].argsort(descending=True).tolist()
        first += order[0] == label
        five += label in order[:5]
    return first / len(labels), five / len(labels)


def as_in_training(network: nn.Module, resolution: int = 32) -> tuple[float, float]:
    test = digits(resolution).test
    return accuracies(network, [test[i][0] for i in range(len(test))], test.labels.tolist())


@functools.cache
def as_timm_would(network: nn.Module, resolution: int, resampling: Any = Image.Resampling.BICUBIC) -> Any:
    """Both accuracies, with the margin, the resizing and the colours of ``cream_14``'s configuration, written out."""
    test = digits(resolution).test
    larger = int(resolution / 0.875)
    margin = round((larger - resolution) / 2)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    images = []
    for index in test.indices.tolist():
        resized = test.images.rgb(index).resize((larger, larger), resampling)
        pixels = torch.tensor(np.array(resized))[margin : margin + resolution, margin : margin + resolution]
        images.append(((pixels / 255 - mean) / std).permute(2, 0, 1))
    return accuracies(network, images, test.labels.tolist())


def measured(file: Path, settings: dict[str, Any] | None = None, *args: Any, **kwargs: Any) -> Evaluation:
    return evaluate(EvaluationRecipe.model_validate(settings or {}), file, *args, **kwargs)


def refusal(file: Path, model: str | None = None, settings: dict[str, Any] | None = None, **kwargs: Any) -> str:
    with pytest.raises(UserError) as caught:
        measured(file, FOREIGN if settings is None else settings, model, **kwargs)
    message = str(caught.value)
    assert str(file) in message
    assert "\n" not in message
    assert message[-1] in ".?"
    assert message[-2] not in ".?"
    return message
