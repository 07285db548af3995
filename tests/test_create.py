from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config
from timm.models.mobilenetv3 import MobileNetV3
from torch import Tensor, nn

import nni_cream
from nni_cream import create_child
from nni_cream.architecture import CreamPath
from nni_cream.child import Child, build_network, save_network
from nni_cream.data import Augmentation, load_data
from nni_cream.errors import UserError
from nni_cream.genotype import Genotype
from nni_cream.models.darts import DartsNetwork, DartsOutput

# With operations of every kind.
PATH = CreamPath.parse("[0] [0] [1,6] [2] [8] [3,9] [0]")
EDGES = (("sep_conv_3x3", 1), ("skip_connect", 0), ("max_pool_3x3", 0), ("dil_conv_3x3", 2))
GENOTYPE = Genotype(normal=EDGES, normal_concat=(2, 3), reduce=EDGES[::-1][2:] + EDGES[2:], reduce_concat=(2, 3))
SPACE = {"channels": 4, "cells": 3, "nodes": 2, "concat": 2, "operations": [*dict(EDGES), "none"]}
TRAINED = {"channels": 6, "cells": 4, "stem": "cifar", "auxiliary": True}
CLASSES = 7
DATA = {"name": "digits", "resolution": 32}


@dataclass(frozen=True)
class Saved:
    """A file, and the network in it."""

    file: Path
    network: Any


def searched(architecture: CreamPath | Genotype, space: dict[str, Any], folder: Path) -> Saved:
    network = with_statistics(build_network(str(architecture), CLASSES, {"kind": "search", **space}))
    child = Child(architecture, CLASSES, 0.5, 1, 2, DATA, {"name": "a", "seed": 0}, space=space)
    child.save(folder / "child.json", network)
    return Saved(folder / "child.json", network)


def trained(architecture: str, size: dict[str, Any], folder: Path) -> Saved:
    network = with_statistics(build_network(architecture, CLASSES, size))
    file = folder / "model.safetensors"
    save_network(file, network, architecture=architecture, num_classes=CLASSES, data=DATA, size=size)
    return Saved(file, network)


def with_statistics(network: nn.Module) -> nn.Module:
    """Let batch norms have seen images, so that their statistics are other than those of a new network."""
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None
    with torch.no_grad():
        network.train()(torch.randn(8, 3, 32, 32))
    return network.eval()


KINDS: dict[str, Callable[[Path], Saved]] = {
    "search of Cream": partial(searched, PATH, {}),
    "search of DARTS": partial(searched, GENOTYPE, SPACE),
    "training of Cream": partial(trained, str(PATH), {}),
    "training of DARTS": partial(trained, str(GENOTYPE), {"kind": "trained", **TRAINED}),
    "training of a published network": partial(trained, "cream_14", {}),
    "training of one of timm's": partial(trained, "mobilenetv3_small_050", {}),
}
OURS = [kind for kind in KINDS if "timm" not in kind]


@pytest.fixture
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Saved:
    torch.manual_seed(0)
    return KINDS[request.param](tmp_path)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


every = pytest.mark.parametrize("saved", KINDS, indirect=True)
of_ours = pytest.mark.parametrize("saved", OURS, indirect=True)
of_cream = pytest.mark.parametrize("saved", ["search of Cream"], indirect=True)
of_darts = pytest.mark.parametrize("saved", ["search of DARTS"], indirect=True)
of_darts_training = pytest.mark.parametrize("saved", ["training of DARTS"], indirect=True)


@every
class TestWeights:
    def test_are_those_of_the_file_if_asked_for(self, saved: Saved, images: Tensor) -> None:
        network = create_child(saved.file, pretrained=True).eval()
        assert torch.equal(network(images), saved.network(images))
        assert network(images).shape == (3, CLASSES)
        assert not torch.allclose(create_child(str(saved.file)).eval()(images), saved.network(images))

    def test_of_other_classes_are_all_but_the_classifiers(self, saved: Saved, images: Tensor) -> None:
        network: Any = create_child(saved.file, pretrained=True, num_classes=3).eval()
        assert network(images).shape == (3, 3)
        old = saved.network.state_dict()
        fresh = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, old[name])} - {
            f"classifier.{part}" for part in ("weight", "bias")
        }
        assert not fresh
        assert torch.equal(network.forward_features(images), saved.network.forward_features(images))
        # What it was trained for stays known.
        assert network.pretrained_cfg["num_classes"] == CLASSES

    def test_without_classifier_and_for_grey_images(self, saved: Saved, images: Tensor) -> None:
        network: Any = create_child(saved.file, pretrained=True, num_classes=0, in_chans=1).eval()
        grey = images[:, :1]
        # Grey is the same in all three channels.
        features = saved.network.forward_head(
            saved.network.forward_features(grey.expand(-1, 3, -1, -1)), pre_logits=True
        )
        # timm adds up the weights of the three.
        torch.testing.assert_close(network(grey), features, rtol=0, atol=1e-4 * features.abs().max().item())


@of_ours
def test_weights_are_in_features_too(saved: Saved, images: Tensor) -> None:
    network: Any = create_child(saved.file, pretrained=True, features_only=True).eval()
    expected = saved.network.forward_intermediates(images, intermediates_only=True)
    features = network(images)
    assert all(torch.equal(a, b) for a, b in zip(features, expected, strict=True))
    told = zip(network.feature_info.channels(), network.feature_info.reduction(), strict=True)
    assert [tuple(f.shape[1:]) for f in features] == [(c, 32 // r, 32 // r) for c, r in told]
    some: Any = create_child(saved.file, pretrained=True, features_only=True, out_indices=(0, 2)).eval()
    assert all(torch.equal(a, features[i]) for a, i in zip(some(images), (0, 2), strict=True))


@every
class TestConfiguration:
    def test_prepares_images_as_they_were_tested(self, saved: Saved) -> None:
        network = create_child(saved.file)
        test = load_data("digits", resolution=32).test
        transform = create_transform(**resolve_data_config({}, model=network))
        for position in range(3):
            expected, _ = test[position]
            assert torch.equal(transform(test.images.rgb(int(test.indices[position]))), expected)

    def test_names_what_there_is(self, saved: Saved) -> None:
        network: Any = create_child(saved.file)
        assert network.default_cfg is network.pretrained_cfg
        cfg = network.pretrained_cfg
        assert cfg["input_size"] == (3, 32, 32)
        assert Path(cfg["file"]) == saved.file.with_suffix(".safetensors")
        assert not {"url", "hf_hub_id"} & set(cfg)
        layers = dict(network.named_modules())
        assert layers[cfg["first_conv"]].in_channels == 3
        assert layers[cfg["classifier"]] is network.get_classifier()
        assert network.get_classifier().out_features == cfg["num_classes"] == CLASSES
        features = network.eval().forward_features(torch.zeros(1, 3, 32, 32))
        assert features.shape[2:] == cfg["pool_size"]

    def test_lets_the_classifier_be_replaced(self, saved: Saved, images: Tensor) -> None:
        network: Any = create_child(saved.file).eval()
        network.reset_classifier(5)
        assert network(images).shape == (3, 5)
        network.reset_classifier(0, "")
        assert network(images).shape == (3, network.head_hidden_size, *network.pretrained_cfg["pool_size"])


def test_images_of_files_lose_the_margin_that_they_lost_in_the_test(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for number in range(4):
                pixels = np.random.RandomState(number).randint(0, 256, (90, 130, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    data = {
        "name": "folder",
        "folder": str(tmp_path / "images"),
        "resolution": 72,
        "augmentation": {"interpolation": "bicubic"},
    }
    Child(PATH, 2, 0.5, 1, 2, data, {"name": "a"}).save(tmp_path / "child.json", build_network(str(PATH), 2, {}))
    splits = load_data(
        "folder", folder=tmp_path / "images", resolution=72, augmentation=Augmentation(interpolation="bicubic")
    )
    config = resolve_data_config({}, model=create_child(tmp_path / "child.json"))
    assert (config["crop_pct"], config["interpolation"]) == (0.875, "bicubic")
    image = splits.test.images.rgb(int(splits.test.indices[0]))
    assert torch.equal(create_transform(**config)(image), splits.test[0][0])


class TestArguments:
    @of_ours
    def test_are_those_of_the_networks_class(self, saved: Saved) -> None:
        network: Any = create_child(saved.file, drop_rate=0.25, drop_path_rate=0.5, global_pool="max")
        assert network.global_pool.pool_type == "max"
        dropout = network.head_drop.p if isinstance(network, DartsNetwork) else network.drop_rate
        assert dropout == 0.25
        rates = {module.drop_prob for module in network.modules() if hasattr(module, "drop_prob")}
        assert rates == {0.5} if isinstance(network, DartsNetwork) else 0 < max(rates) < 0.5

    @of_cream
    def test_of_a_type_reach_further_operations(self, saved: Saved) -> None:
        network: Any = create_child(saved.file, dtype=torch.bfloat16)
        assert isinstance(network, MobileNetV3)
        assert {p.dtype for p in network.parameters()} == {torch.bfloat16}

    @of_darts
    def test_make_the_network_that_is_trained_of_the_one_that_was_searched(self, saved: Saved) -> None:
        network: Any = create_child(saved.file, searched=False, channels=8, cells=5, stem="imagenet", auxiliary=True)
        expected = DartsNetwork(GENOTYPE, channels=8, cells=5, stem="imagenet", auxiliary=True, num_classes=CLASSES)
        shapes = {name: tensor.shape for name, tensor in expected.state_dict().items()}
        assert {name: tensor.shape for name, tensor in network.state_dict().items()} == shapes
        assert dict(network.named_modules())[network.pretrained_cfg["first_conv"]].in_channels == 3
        features = network.eval().forward_features(torch.zeros(1, 3, 32, 32))
        assert features.shape[2:] == network.pretrained_cfg["pool_size"] == (1, 1)

    @of_darts_training
    def test_bring_the_auxiliary_head(self, saved: Saved, images: Tensor) -> None:
        plain: Any = create_child(saved.file, pretrained=True).train()
        assert isinstance(plain(images), Tensor)
        network: Any = create_child(saved.file, pretrained=True, auxiliary=True)
        for name, tensor in saved.network.state_dict().items():
            assert torch.equal(network.state_dict()[name], tensor), name
        assert isinstance(network.train()(images), DartsOutput)
        other: Any = create_child(saved.file, pretrained=True, auxiliary=True, num_classes=2)
        assert other.train()(images).auxiliary.shape == (3, 2)
        assert torch.equal(other.auxiliary_head.features[2].weight, network.auxiliary_head.features[2].weight)


def refusal(file: Path, **arguments: Any) -> str:
    with pytest.raises(UserError) as caught:
        create_child(file, **arguments)
    message = str(caught.value)
    assert str(file.parent) in message
    assert "\n" not in message
    assert message[-1] in ".?"
    assert message[-2] not in ".?"
    return message


class TestRefusals:
    @of_cream
    def test_of_weights_that_are_not_there(self, saved: Saved) -> None:
        saved.file.with_suffix(".safetensors").unlink()
        assert "There are no weights" in refusal(saved.file, pretrained=True)
        network: Any = create_child(saved.file)
        assert "file" not in network.pretrained_cfg

    @every
    @pytest.mark.parametrize("classes", [None, 3])
    def test_of_weights_of_another_network(self, saved: Saved, classes: int | None) -> None:
        file = saved.file.with_suffix(".safetensors")
        weights = saved.network.state_dict()
        del weights[next(iter(weights))]
        from safetensors import safe_open

        with safe_open(file, "pt") as content:
            notes = content.metadata()
        save_file(weights, file, metadata=notes)
        assert "1 entries are only in one of them" in refusal(saved.file, pretrained=True, num_classes=classes)

    @of_cream
    @pytest.mark.parametrize("size", [0, 100, -4])
    def test_of_damaged_weights(self, saved: Saved, size: int) -> None:
        file = saved.file.with_suffix(".safetensors")
        file.write_bytes(file.read_bytes()[:size])
        assert "is not a safetensors file" in refusal(saved.file, pretrained=True)
        assert "is not a safetensors file" in refusal(file)

    def test_of_other_files(self, tmp_path: Path) -> None:
        assert "give the child.json of a search" in refusal(tmp_path / "model.safetensors")
        assert "There is no child" in refusal(tmp_path / "child.json")
        save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
        assert "does not say which network it is of" in refusal(tmp_path / "a.safetensors")
        torch.save({}, tmp_path / "a.pth")
        assert "is not a safetensors file" in refusal(tmp_path / "a.pth")

    @of_cream
    def test_of_data_settings_that_are_none(self, saved: Saved) -> None:
        content = json.loads(saved.file.read_text())
        saved.file.write_text(json.dumps({**content, "data": {"name": "digit"}}))
        with pytest.raises(UserError, match="there is no data set 'digit'"):
            create_child(saved.file)

    @every
    def test_of_arguments_that_there_are_not(self, saved: Saved) -> None:
        with pytest.raises(UserError, match="colour"):
            create_child(saved.file, colour="blue")

    @of_darts
    @pytest.mark.parametrize("change", [{"channels": 8}, {"searched": False}, {"cells": 4}, {"stem": "imagenet"}])
    def test_of_the_weights_in_a_network_that_is_another_one(self, saved: Saved, change: dict[str, Any]) -> None:
        message = refusal(saved.file, pretrained=True, num_classes=3, **change)
        assert f"and {next(iter(change))} would make it another one" in message

    @of_darts
    def test_of_an_auxiliary_head_that_has_no_weights(self, saved: Saved) -> None:
        assert "has no auxiliary head" in refusal(saved.file, pretrained=True, auxiliary=True)


def test_the_package_stays_cheap_to_import() -> None:
    program = "import sys, nni_cream; print({'torch', 'timm', 'pydantic'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
    assert "create_child" in nni_cream.__all__
    with pytest.raises(AttributeError, match="has no attribute 'create_childs'"):
        nni_cream.create_childs  # noqa: B018
