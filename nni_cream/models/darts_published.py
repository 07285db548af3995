"""The networks of the paper on DARTS, registered with timm: its own cells and those it compares them with.

Source: Liu et al., "DARTS: Differentiable Architecture Search", ICLR 2019, section 3 and appendix A, and its published
code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from nni_cream.genotype import PUBLISHED_GENOTYPES, Genotype

# The module, not what is in it: where that one is imported first, timm registers the networks here in the middle of it.
from nni_cream.models import darts


@dataclass(frozen=True)
class PublishedNetwork:
    """A network of the paper: its cells and its size."""

    genotype: Genotype
    stem: darts.Stem
    channels: int
    cells: int


_SIZES: Final[tuple[tuple[str, darts.Stem, int, int], ...]] = (
    ("cifar10", "cifar", 36, 20),
    ("imagenet", "imagenet", 48, 14),
)

PUBLISHED: Final[dict[str, PublishedNetwork]] = {
    f"{name}_{data}": PublishedNetwork(PUBLISHED_GENOTYPES[genotype], stem, channels, cells)
    for data, stem, channels, cells in _SIZES
    for name, genotype in (
        ("darts_v1", "darts_v1"),
        ("darts_v2", "darts_v2"),
        ("darts_nasnet", "nasnet"),
        ("darts_amoebanet", "amoebanet"),
    )
}

_CONFIGURATIONS: Final[dict[darts.Stem, dict[str, Any]]] = {
    "cifar": {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (8, 8),
        "crop_pct": 1.0,
        "mean": (0.49139968, 0.48215827, 0.44653124),
        "std": (0.24703233, 0.24348505, 0.26158768),
        "first_conv": "stem.0",
    },
    "imagenet": {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem0.0",
    },
}

default_cfgs = generate_default_cfgs(
    {
        f"{name}.untrained": {
            **_CONFIGURATIONS[network.stem],
            "interpolation": "bilinear",
            "classifier": "classifier",
            "origin_url": "https://github.com/quark0/darts",
            "paper_ids": "arXiv:1806.09055",
        }
        for name, network in PUBLISHED.items()
    }
)


def _published(variant: str, pretrained: bool, **kwargs: Any) -> darts.DartsNetwork:
    network = PUBLISHED[variant]
    levels = 3 if network.stem == "cifar" else 5
    arguments = {
        "genotype": network.genotype,
        "channels": network.channels,
        "cells": network.cells,
        "stem": network.stem,
    }
    model: darts.DartsNetwork = build_model_with_cfg(
        darts.DartsNetwork,
        variant,
        pretrained,
        pretrained_filter_fn=darts.checkpoint_filter_fn,
        feature_cfg={"feature_cls": "getter", "out_indices": tuple(range(levels))},
        **{**arguments, **kwargs},
    )
    return model


@register_model
def darts_v1_cifar10(pretrained: bool = False, **kwargs: Any) -> darts.DartsNetwork:
    """Build the CIFAR-10 network of the cells found with the first-order gradient (32 px, 3.17 M parameters)."""
    return _published("darts_v1_cifar10", pretrained, **kwargs)


@register_model
def darts_v2_cifar10(pretrained: bool = False, **kwargs: Any) -> darts.DartsNetwork:
    """Build the CIFAR-10 network of the cells found with the second-order gradient (32 px, 3.35 M parameters)."""
    return _published("darts_v2_cifar10", pretrained, **kwargs)


@register_model
def darts_nasnet_cifar10(pretrained: bool = False, **kwargs: Any) -> darts.DartsNetwork:
    """Build the CIFAR-10 network of NASNet-A's cells as DARTS trains them (32 px, 3.83 M parameters)."""
    return _published("darts_nasnet_cifar10", pretrained, **kwargs)


@register_model
def darts_amoebanet_cifar10(pretrained: bool = False, **kwargs: Any) -> darts.DartsNetwork:
    """Build the CIFAR-10 network of AmoebaNet-A's cells as DARTS trains them (32 px, 3.15 M parameters)."""
    return _published("darts_amoebanet_cifar10", pretrained, **kwargs)


@register_model
def darts_v1_imagenet(pretrained: bool = False, **kwargs: Any) -> darts.DartsNetwork:
    """Build the ImageNet network of the cells found with the first-order gradient (224 px, 4.51 M parameters)."""
    return _published("darts_v1_imagenet", pretrained, **kwargs)


@register_model
def darts_v2_imagenet(pretrained: bool = False, **kwargs: Any) -> darts.DartsNetwork:
    """Build the ImageNet network of the cells found with the second-order gradient (224 px, 4.72 M parameters)."""
    return _published("darts_v2_imagenet", pretrained, **kwargs)


@register_model
def darts_nasnet_imagenet(pretrained: bool = False, **kwargs: Any) -> darts.DartsNetwork:
    """Build the ImageNet network of NASNet-A's cells as DARTS trains them (224 px, 5.56 M parameters)."""
    return _published("darts_nasnet_imagenet", pretrained, **kwargs)


@register_model
def darts_amoebanet_imagenet(pretrained: bool = False, **kwargs: Any) -> darts.DartsNetwork:
    """Build the ImageNet network of AmoebaNet-A's cells as DARTS trains them (224 px, 4.63 M parameters)."""
    return _published("darts_amoebanet_imagenet", pretrained, **kwargs)
