"""The accuracy of a checkpoint on the test part of the data.

A safetensors file of ours says which network and data it is of, and its images are prepared as they were in training.
A foreign checkpoint says neither: the caller names the network, and images are prepared as timm does for that network
(size, interpolation, crop, mean and standard deviation are those of its ``default_cfg``).
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform
from timm.models import load_state_dict
from torch import nn

from nni_cream.child import (
    AVERAGED,
    NETWORK_FORMAT,
    Description,
    build_network,
    create_timm_model,
    fit_weights,
    plain_beside,
    read_network,
    weights_beside,
)
from nni_cream.cost import measure_network
from nni_cream.data import LabelledImages
from nni_cream.data_checks import refuse_other_classes, warn_of_another_test_part
from nni_cream.errors import UserError
from nni_cream.models.darts import DartsNetwork, checkpoint_filter_fn
from nni_cream.recipe import EvaluationRecipe
from nni_cream.search import arrange_in_memory, load_splits, make_loader, on_device
from nni_cream.settings import Data, EvaluationData, Optimizer, Schedule
from nni_cream.training import ImageClassifier


@dataclass(frozen=True)
class Checkpoint:
    """A network with its weights.

    Attributes:
        name: the text of its path, or timm's name of it.
        network: the network.
        num_classes: number of classes that it tells apart.
        data: the data settings stored with it; None in a foreign checkpoint.
    """

    name: str
    network: Any
    num_classes: int
    data: Mapping[str, Any] | None


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        network: the text of its path, or timm's name of it.
        flops: multiply-accumulates for one image.
        params: number of parameters.
        data: where the images are from, and their size.
        images: number of images.
        top1: share of the images for which the right class is the likeliest.
        top5: share of the images for which it is among the five likeliest.
    """

    network: str
    flops: int
    params: int
    data: Data
    images: int
    top1: float
    top5: float


def evaluate(recipe: EvaluationRecipe, file: Path, model: str | None = None, *, use_ema: bool = True) -> Evaluation:
    """Test the network in ``file``; nothing is written.

    Args:
        recipe: data, where it is other than stored in the file, and device.
        file: a checkpoint, or the ``child.json`` beside one.
        model: timm's name of the network, which a foreign checkpoint needs.
        use_ema: take the averaged weights of a checkpoint that has both.

    Raises:
        UserError: as :func:`load_checkpoint`, and if the data is not what the network is for, or its classes have other
            names now, or the loss is not finite.
    """
    checkpoint = load_checkpoint(file, model, use_ema=use_ema)
    network = checkpoint.network
    if checkpoint.data is None:
        data = _foreign_data(recipe.data, checkpoint, file)
    else:
        data = recipe.data.completed(checkpoint.data)
    # The test part is the same whatever the seed.
    splits = load_splits(data, seed=0)
    if splits.num_classes != checkpoint.num_classes:
        raise UserError(
            f"{file} tells {checkpoint.num_classes} classes apart, but the data set {data.name!r} has "
            f"{splits.num_classes}: give the data that it was trained for (--set data.name=…, --set data.folder=…), or "
            "train it for this one with trials/retrain_child.py."
        )
    if checkpoint.data is not None:
        refuse_other_classes(checkpoint.data, splits, file)
        warn_of_another_test_part(checkpoint.data, data, splits)
    images = splits.test
    if checkpoint.data is None:
        images = _prepared_by_timm(images, network, data)
    cost = measure_network(network, data.resolution)
    arrange_in_memory(network, recipe.device)

    # Nothing is trained, but the module asks how.
    module = ImageClassifier(splits.num_classes, Optimizer().timm_arguments(), Schedule().timm_arguments())
    module.set_model(network)
    trainer = on_device(recipe.device, logger=False, enable_checkpointing=False)
    (tested,) = trainer.test(module, make_loader(images, data, recipe.device), verbose=False)
    # The class of a logit that is not a number is arbitrary, and would be right for some images.
    if not math.isfinite(tested["test_loss"]):
        raise UserError(
            f"{file} has no accuracy: the loss of its network {checkpoint.name} on the test part is "
            f"{tested['test_loss']}, so that its weights, or what it computes with them, are not all finite; give the "
            "checkpoint of a training that has not diverged."
        )
    return Evaluation(
        network=checkpoint.name,
        flops=cost.macs,
        params=cost.params,
        data=data,
        images=len(images),
        top1=tested["test_accuracy"],
        top5=tested["test_top5"],
    )


def print_evaluation(evaluation: Evaluation) -> None:
    """Tell a person how good the network is."""
    size = evaluation.data.resolution
    print(f"network:   {evaluation.network}")
    print(f"FLOPs:     {evaluation.flops / 1e6:.2f} M multiply-accumulates")
    print(f"params:    {evaluation.params / 1e6:.3f} M")
    print(f"images:    {evaluation.images:,} of {size} × {size} pixels, the test part of {evaluation.data.name}")
    print(f"top-1:     {evaluation.top1:.4f}")
    print(f"top-5:     {evaluation.top5:.4f}", flush=True)


def load_checkpoint(file: Path, model: str | None = None, *, use_ema: bool = True) -> Checkpoint:
    """Read a checkpoint, ours or foreign, without executing anything in it.

    Args:
        file: the checkpoint, or the ``child.json`` beside one.
        model: timm's name of the network, which a foreign checkpoint needs.
        use_ema: take the averaged weights of a checkpoint that has both.

    Raises:
        UserError: if the file cannot be read, or is not of that network, or nobody says of which network it is.
    """
    if not file.is_file():
        raise UserError(f"There is no checkpoint {file}.")
    if file.suffix == ".json":
        file = weights_beside(file)
    if file.suffix == ".safetensors":
        weights, notes = read_network(file)
        if notes.get("weights") == AVERAGED and not use_ema:
            file = plain_beside(file)
            if not file.is_file():
                raise UserError(f"There are no plain weights {file} beside the averaged ones; copy both files.")
            weights, notes = read_network(file)
        if notes.get("format") == NETWORK_FORMAT:
            return _ours(file, weights, notes, model)
    if model is None:
        raise UserError(f"{file} does not say which network it is of; give timm's name of it, as in --model cream_287.")
    return _foreign(file, model, use_ema)


def _ours(file: Path, weights: Mapping[str, Any], notes: Mapping[str, str], model: str | None) -> Checkpoint:
    described = Description.of_notes(notes, file)
    name = described.architecture
    try:
        network = build_network(name, described.num_classes, described.size)
    except UserError as error:
        raise UserError(f"The notes in {file} are damaged: {str(error).rstrip('.?')}; copy it once more.") from None
    if model not in (None, name):
        raise UserError(f"{file} holds the network {name}, not {model}; leave out --model.")
    fit_weights(network, weights, file, name)
    return Checkpoint(name, network, described.num_classes, described.data)


def _foreign(file: Path, model: str, use_ema: bool) -> Checkpoint:
    classifier = create_timm_model(model).default_cfg["classifier"]
    # timm names two where a network has a second one for distillation.
    key = f"{classifier if isinstance(classifier, str) else classifier[0]}.weight"
    try:
        # The published code of Cream saves its settings too, in a class of which nothing is executed here.
        with torch.serialization.safe_globals([(OrderedDict, "yacs.config.CfgNode")]):
            weights = load_state_dict(str(file), use_ema=use_ema)
    # A damaged pickle can raise anything.
    except Exception as error:
        raise UserError(f"{file} cannot be read as a checkpoint: {_why_unreadable(error)}.") from None
    if not getattr(weights.get(key), "shape", ()):
        found = ", ".join(map(repr, list(weights)[:3])) or "nothing"
        raise UserError(
            f"{file} does not fit {model}: it should have {key!r}, which tells the number of classes, but begins with "
            f"{found}; name the network that it is of with --model."
        )
    num_classes = len(weights[key])
    network = create_timm_model(model, num_classes=num_classes)
    if isinstance(network, DartsNetwork):
        weights = checkpoint_filter_fn(weights, network)
    fit_weights(network, weights, file, model)
    return Checkpoint(model, network, num_classes, None)


def _why_unreadable(error: Exception) -> str:
    refused = re.search(r"Unsupported global: GLOBAL (\S+)", str(error.__cause__))
    if refused:
        return (
            f"besides tensors it holds {refused[1]}, and reading that could execute code; where you trust it, save its "
            "state_dict alone"
        )
    return "it is damaged, or holds something else than a state_dict; give the file as its authors publish it"


def _foreign_data(given: EvaluationData, checkpoint: Checkpoint, file: Path) -> Data:
    if given.name is None:
        raise UserError(f"{file} does not say which data it is for; give it, as in --set data.name=imagenet.")
    cfg = checkpoint.network.default_cfg
    size = cfg["input_size"][-1]
    data = given.completed({"resolution": size})
    if cfg.get("fixed_input_size") and data.resolution != size:
        raise UserError(f"{checkpoint.name} takes images of {size} pixels only; data.resolution is {data.resolution}.")
    return data


def _prepared_by_timm(images: LabelledImages, network: nn.Module, data: Data) -> LabelledImages:
    size = (3, data.resolution, data.resolution)
    config = resolve_data_config(
        {"input_size": size, "interpolation": data.augmentation.interpolation}, pretrained_cfg=network.default_cfg
    )
    return LabelledImages(images.images, images.indices, create_transform(**config))
