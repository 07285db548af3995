"""The networks of the paper on DARTS, as timm makes and loads them."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import group_parameters
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import nni_cream  # noqa: F401 (registers the networks)
from nni_cream.cost import measure_network
from nni_cream.models.darts import DartsNetwork, checkpoint_filter_fn
from nni_cream.models.darts_published import PUBLISHED
from tests.reference import apply_rule, golden

COUNTS: dict[str, Any] = golden("darts/published_networks.json")["counts"]
# Our name, the reference's genotype and network, and the size of an image.
NETWORKS = [
    pytest.param(f"{prefix}_{data}", COUNTS[genotype][network], size, id=f"{genotype}-{network}")
    for prefix, genotype in (
        ("darts_v1", "DARTS_V1"),
        ("darts_v2", "DARTS_V2"),
        ("darts_nasnet", "NASNet"),
        ("darts_amoebanet", "AmoebaNet"),
    )
    for data, network, size in (("cifar10", "NetworkCIFAR", 32), ("imagenet", "NetworkImageNet", 224))
]
NAMES = [str(parameter.values[0]) for parameter in NETWORKS]


@cache
def published(name: str) -> DartsNetwork:
    """A registered network with an auxiliary head, for tests that leave it as it is."""
    with torch.device("meta"):
        network: DartsNetwork = timm.create_model(name, auxiliary=True)
    return network


@pytest.mark.parametrize(("name", "row", "size"), NETWORKS)
@pytest.mark.usefixtures("on_meta")
class TestPublished:
    def test_size(self, name: str, row: dict[str, int], size: int) -> None:
        for network, suffix in ((timm.create_model(name), "noaux"), (published(name), "aux")):
            assert len(network.state_dict()) == row[f"state_dict_entries_{suffix}"]
            assert sum(p.numel() for p in network.parameters()) == row[f"params_{suffix}"]

    def test_cost_leaves_out_the_auxiliary_head(self, name: str, row: dict[str, int], size: int) -> None:
        network = published(name)
        cost = measure_network(network, size)
        assert network.auxiliary_head is not None
        assert cost.params == row["params_noaux"]
        assert cost.macs == row["macs_eval_auxmodel"] == row["macs_eval"]

    def test_cost_in_training(self, name: str, row: dict[str, int], size: int) -> None:
        with FlopCounterMode(display=False) as counter:
            published(name).train()(torch.empty(2, 3, size, size))
        # For two images, because a batch norm refuses one pixel of one image, and two operations a MAC.
        assert counter.get_total_flops() == 4 * row["macs_train_with_aux"]


def test_the_registered_networks_are_the_published_ones() -> None:
    assert set(timm.list_models("darts_*")) == set(NAMES) == set(PUBLISHED)


@pytest.mark.slow
def test_importing_the_package_registers_them() -> None:
    script = "import nni_cream, timm; print(*timm.list_models('darts_*'))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("on_meta")
class TestTimmConventions:
    @staticmethod
    def width(name: str) -> int:
        """Channels of the last cell: those of its nodes, four times C, times the nodes that are concatenated."""
        nodes = {"darts_v1": 4, "darts_v2": 4, "darts_nasnet": 5, "darts_amoebanet": 3}[name.rsplit("_", 1)[0]]
        return nodes * 4 * (36 if "cifar10" in name else 48)

    def test_default_configuration(self, name: str) -> None:
        configuration = published(name).default_cfg
        if "cifar10" in name:
            expected = {
                "num_classes": 10,
                "input_size": (3, 32, 32),
                "pool_size": (8, 8),
                "crop_pct": 1.0,
                "mean": (0.49139968, 0.48215827, 0.44653124),
                "std": (0.24703233, 0.24348505, 0.26158768),
            }
        else:
            expected = {
                "num_classes": 1000,
                "input_size": (3, 224, 224),
                "pool_size": (7, 7),
                "crop_pct": 0.875,
                "mean": (0.485, 0.456, 0.406),
                "std": (0.229, 0.224, 0.225),
            }
        expected["interpolation"] = "bilinear"
        assert {key: configuration[key] for key in expected} == expected

    def test_named_layers_exist(self, name: str) -> None:
        network = published(name)
        layers = dict(network.named_modules())
        assert layers[network.default_cfg["first_conv"]].in_channels == 3
        assert layers[network.default_cfg["classifier"]].out_features == (10 if "cifar10" in name else 1000)
        assert network.get_classifier() is layers["classifier"]

    def test_head(self, name: str) -> None:
        network = timm.create_model(name, num_classes=7)
        assert network.num_classes == 7
        assert (network.num_features, network.head_hidden_size) == (self.width(name), self.width(name))
        features = torch.empty(2, self.width(name), 7, 7)
        assert network.forward_head(features, pre_logits=True).shape == (2, self.width(name))
        assert network.forward_head(features).shape == (2, 7)

    def test_without_classifier_and_pooling(self, name: str) -> None:
        features = torch.empty(2, self.width(name), 7, 7)
        assert timm.create_model(name, num_classes=0).forward_head(features).shape == (2, self.width(name))
        assert timm.create_model(name, num_classes=0, global_pool="").forward_head(features).shape == features.shape

    def test_reset_classifier(self, name: str) -> None:
        network = timm.create_model(name, auxiliary=True)
        features = torch.empty(2, self.width(name), 7, 7)
        network.reset_classifier(5)
        assert network.num_classes == 5
        assert network.forward_head(features).shape == (2, 5)
        assert network.auxiliary_head.classifier.out_features == 5
        network.reset_classifier(5, "catavgmax")
        assert network.head_hidden_size == 2 * self.width(name)
        assert network.forward_head(features).shape == (2, 5)
        network.reset_classifier(0, "")
        assert network.forward_head(features).shape == features.shape

    def test_features_only_of_grey_images(self, name: str) -> None:
        network = timm.create_model(name, features_only=True, in_chans=1, cells=5)
        nodes = self.width(name) // 4
        channels, reduction, size = [nodes, 2 * nodes, 4 * nodes], [1, 2, 4], 32
        if "imagenet" in name:
            channels, reduction, size = [24, 48, *channels], [2, 4, 8, 16, 32], 224
        assert network.feature_info.channels() == channels
        assert network.feature_info.reduction() == reduction
        shapes = [tuple(feature.shape[1:]) for feature in network(torch.empty(2, 1, size, size))]
        assert shapes == [(c, size // r, size // r) for c, r in zip(channels, reduction, strict=True)]
        assert shapes[-1][1:] == network.default_cfg["pool_size"]

    def test_weights_are_grouped_by_depth(self, name: str) -> None:
        network = published(name)
        groups = group_parameters(network, network.group_matcher(coarse=False))
        cells = len(network.cells)
        assert len(groups) == cells + 2
        assert all(member.startswith("stem") for member in groups[0])
        for index in range(cells):
            assert all(member.startswith(f"cells.{index}.") for member in groups[index + 1])
        assert {member.split(".")[0] for member in groups[cells + 1]} == {"auxiliary_head", "classifier"}


def test_device_and_type() -> None:
    network = timm.create_model("darts_v1_imagenet", device="meta", dtype=torch.bfloat16, channels=4, cells=3)
    assert {(p.device.type, p.dtype) for p in network.parameters()} == {("meta", torch.bfloat16)}
    network.reset_classifier(3)
    assert (network.classifier.weight.device.type, network.classifier.weight.dtype) == ("meta", torch.bfloat16)


def test_no_pretrained_weights_are_promised() -> None:
    assert not timm.list_models("darts_*", pretrained=True)


class TestPublishedFiles:
    """As the published code wrote them: with the auxiliary head, and before batch norms counted their batches."""

    SMALL: dict[str, Any] = {"channels": 4, "cells": 3}  # noqa: RUF012

    def file(self) -> dict[str, Tensor]:
        network = timm.create_model("darts_v2_cifar10", auxiliary=True, **self.SMALL)
        apply_rule(network)
        return {name: tensor for name, tensor in network.state_dict().items() if not name.endswith("tracked")}

    @pytest.mark.parametrize("auxiliary", [False, True])
    def test_they_load(self, auxiliary: bool) -> None:
        file = self.file()
        network = timm.create_model("darts_v2_cifar10", auxiliary=auxiliary, **self.SMALL)
        filtered = checkpoint_filter_fn(file, network)
        left_out = set(file) - set(filtered)
        assert left_out == (set() if auxiliary else {name for name in file if name.startswith("auxiliary_head.")})
        network.load_state_dict(filtered)
        state = network.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in filtered.items())

    def test_what_else_does_not_fit_stays_an_error(self) -> None:
        file = self.file()
        network = timm.create_model("darts_v2_cifar10", **self.SMALL)
        with pytest.raises(RuntimeError, match="Unexpected key"):
            network.load_state_dict(checkpoint_filter_fn({**file, "stem.9.weight": torch.zeros(1)}, network))

    @pytest.mark.parametrize("auxiliary", [False, True])
    @pytest.mark.parametrize("classes", [10, 7])
    def test_timm_loads_them(self, tmp_path: Path, auxiliary: bool, classes: int) -> None:
        file = self.file()
        torch.save({"state_dict": file}, tmp_path / "model.pt")
        network = timm.create_model(
            "darts_v2_cifar10",
            pretrained=True,
            pretrained_cfg_overlay={"file": str(tmp_path / "model.pt")},
            num_classes=classes,
            auxiliary=auxiliary,
            **self.SMALL,
        )
        state = network.state_dict()
        same = {name for name, tensor in file.items() if name in state and torch.equal(state[name], tensor)}
        fresh = {name for name in state if not name.endswith("tracked")} - same
        classifiers = {"classifier", "auxiliary_head.classifier"} if auxiliary else {"classifier"}
        expected = {f"{layer}.{part}" for layer in classifiers for part in ("weight", "bias")}
        assert fresh == (set() if classes == 10 else expected)
