"""Networks that were found, through the door of timm's: ``nni_cream.create_child("child.json", pretrained=True)``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from timm.models import build_model_with_cfg, get_pretrained_cfg
from torch import nn

from nni_cream.child import (
    NETWORK_FORMAT,
    Child,
    Description,
    build_network,
    create_timm_model,
    is_timm_name,
    network_builder,
    read_network,
    read_notes,
    refuse_misfit,
    weights_beside,
)
from nni_cream.data import preparation
from nni_cream.errors import UserError
from nni_cream.models.darts import checkpoint_filter_fn
from nni_cream.settings import EvaluationData

# Arguments of a DARTS network that make it another one than its file has the weights of.
_OF_ANOTHER_NETWORK: Final = ("channels", "cells", "stem", "searched")
# What timm's registry says of its own weights.
_OF_OTHER_WEIGHTS: Final = (
    "url",
    "hf_hub_id",
    "hf_hub_filename",
    "source",
    "tag",
    "test_input_size",
    "test_crop_pct",
    "test_pool_size",
)


def create_child(
    file: str | os.PathLike[str],
    pretrained: bool = False,
    *,
    num_classes: int | None = None,
    in_chans: int | None = None,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    global_pool: str | None = None,
    features_only: bool = False,
    out_indices: int | Sequence[int] | None = None,
    **arguments: Any,
) -> nn.Module:
    """Build the network that a file of ours holds, as ``timm.create_model`` builds others.

    [N, in_chans, R, R] to logits [N, num_classes]. Its ``pretrained_cfg`` has the data set's image size, mean, standard
    deviation and crop, so that timm's ``resolve_model_data_config`` prepares images as they were tested.

    Args:
        file: ``child.json`` of a search, ``child.safetensors`` beside it, or ``model.safetensors`` of a training.
        pretrained: load the weights: those of the file, or of the one beside a ``child.json``.
        num_classes: number of classes; None for those of the file, 0 for pooled features in place of logits. Of other
            classes than the file's, the classifier is new.
        in_chans: channels of the images; None for 3. The weights of others are timm's sums or repetitions of those.
        drop_rate: of the features before the classifier, in training.
        drop_path_rate: of the paths, in training.
        global_pool: timm's name of the pooling before the classifier; None for the mean, empty for none.
        features_only: build a network that returns the last features of several resolutions, as timm's do.
        out_indices: which of them, the largest first; a number for so many of the last, None for all.
        arguments: further ones of timm's ``MobileNetV3``, or of :class:`nni_cream.models.darts.DartsNetwork`, such as
            ``auxiliary``. A search of DARTS leaves a small network; the one that is trained afterwards is that of
            ``searched=False, channels=36, cells=20``.

    Raises:
        UserError: if the file holds no network of ours, the weights are missing or of another network, or there is no
            such argument.
    """
    path = Path(file)
    described, weights_file = _description(path)
    if pretrained:
        _check_weights(described, weights_file, path, arguments)
    options = {"in_chans": in_chans, "num_classes": num_classes, "global_pool": global_pool, "out_indices": out_indices}
    requested = {name: value for name, value in options.items() if value is not None} | arguments
    # Not every network of timm's can drop something, or give features.
    rates = {"drop_rate": drop_rate, "drop_path_rate": drop_path_rate, "features_only": features_only}
    requested |= {name: value for name, value in rates.items() if value}
    if is_timm_name(described.architecture):
        cfg = _configuration(described, weights_file, _reduction_of_timm(described.architecture))
        overlay = {**dict.fromkeys(_OF_OTHER_WEIGHTS), **cfg}
        network: nn.Module = create_timm_model(
            described.architecture, pretrained=pretrained, pretrained_cfg_overlay=overlay, **requested
        )
        return network
    try:
        return _build(described, weights_file, pretrained, requested)
    except (RuntimeError, TypeError) as error:
        raise UserError(
            f"The network of {path} cannot be built so: {(str(error).splitlines() or [''])[0].rstrip('.:')}."
        ) from error


def _description(file: Path) -> tuple[Description, Path]:
    """Return what ``file`` says of a network, and the file of its weights, which may be missing."""
    if file.suffix == ".json":
        return Child.load(file).description(), file.with_suffix(".safetensors")
    if not file.is_file():
        raise UserError(f"There is no {file}; give the child.json of a search, or the model.safetensors of a training.")
    notes = read_notes(file)
    if notes.get("format") != NETWORK_FORMAT:
        raise UserError(
            f"{file} does not say which network it is of; give the child.json of a search, or the model.safetensors of "
            "a training."
        )
    return Description.of_notes(notes, file), file


def _check_weights(described: Description, weights_file: Path, file: Path, arguments: dict[str, Any]) -> None:
    # timm's own loading passes over entries that are missing as soon as the classes are others.
    if other := [name for name in _OF_ANOTHER_NETWORK if name in arguments]:
        raise UserError(
            f"The weights of {file} are those of the network in it, and {', '.join(other)} would make it another one: "
            "leave that out, or make pretrained false."
        )
    if arguments.get("auxiliary") and not described.size.get("auxiliary"):
        raise UserError(
            f"The network of {file} has no auxiliary head, and so no weights of one: leave auxiliary out, or make "
            "pretrained false."
        )
    if file.suffix == ".json":
        weights_beside(file)
    weights, _ = read_network(weights_file)
    if is_timm_name(described.architecture):
        expected = build_network(described.architecture, described.num_classes, {})
    else:
        with torch.device("meta"):
            expected = build_network(described.architecture, described.num_classes, described.size)
    refuse_misfit(expected.state_dict(), weights, weights_file, f"the network of {file}")


def _configuration(described: Description, weights_file: Path, reduction: int | None) -> dict[str, Any]:
    """Return what a ``pretrained_cfg`` says of the data and the weights."""
    data = EvaluationData().completed(described.data)
    size = None if reduction is None else -(-data.resolution // reduction)
    return {
        **preparation(data.name, data.resolution, data.augmentation.interpolation),
        "num_classes": described.num_classes,
        "pool_size": None if size is None else (size, size),
        "file": str(weights_file) if weights_file.exists() else None,
    }


def _reduction_of_timm(name: str) -> int | None:
    try:
        cfg = get_pretrained_cfg(name)
    except RuntimeError:
        # There is no such network, which building it says in a sentence.
        return None
    return None if cfg is None or cfg.pool_size is None else cfg.input_size[-1] // cfg.pool_size[-1]


def _build(described: Description, weights_file: Path, pretrained: bool, requested: dict[str, Any]) -> nn.Module:
    builder = network_builder(described.architecture, described.size)
    if described.architecture.startswith("["):
        kind, first_conv, reduction, levels = "cream", "conv_stem", 32, 5
    else:
        # As of the published networks, the head that helps in training is there if it is asked for.
        requested = {"auxiliary": False, **requested}
        of_imagenet = {**builder.keywords, **requested}.get("stem") == "imagenet"
        kind, first_conv, reduction, levels = ("darts", "stem0.0", 32, 5) if of_imagenet else ("darts", "stem.0", 4, 3)
    cfg = {
        **_configuration(described, weights_file, reduction),
        "architecture": f"{kind}_child",
        "first_conv": first_conv,
        "classifier": "classifier",
    }
    network: nn.Module = build_model_with_cfg(
        builder,
        f"{kind}_child",
        pretrained,
        pretrained_cfg=cfg,
        pretrained_filter_fn=checkpoint_filter_fn if kind == "darts" else None,
        feature_cfg={"feature_cls": "getter", "out_indices": tuple(range(levels))},
        **requested,
    )
    return network
