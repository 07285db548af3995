from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from nni_cream.architecture import CreamPath
from nni_cream.child import Child, save_network
from nni_cream.cost import measure_network
from nni_cream.data import DataSplits, load_data
from nni_cream.errors import UserError
from nni_cream.evaluate import Evaluation, evaluate, load_checkpoint, print_evaluation
from nni_cream.genotype import Genotype
from nni_cream.models.cream import build_child
from nni_cream.models.darts import PUBLISHED, build_darts
from nni_cream.recipe import Data, EvaluationRecipe
from search_spaces.darts import DartsSpace

PATH = CreamPath.parse("[0] [0] [1] [2] [3] [0] [0]")
DIGITS = Data(name="digits", resolution=32, batch_size=50).model_dump(mode="json")
RESIZINGS = ("bilinear", "bicubic")
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


@pytest.fixture(scope="module")
def network() -> Any:
    return with_opinions(build_child(PATH, num_classes=10), 0)


@pytest.fixture(scope="module")
def foreign() -> Any:
    """Cream's 14 M network twice: plain and averaged weights."""
    torch.manual_seed(0)  # else, once in a while, two of their accuracies are equal by chance
    return [with_opinions(timm.create_model("cream_14", num_classes=10), seed) for seed in (1, 2)]


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


@pytest.fixture
def ours(tmp_path: Path, network: nn.Module) -> Path:
    file = tmp_path / "model.safetensors"
    save_network(file, network, architecture=str(PATH), num_classes=10, data=DIGITS, size={})
    return file


@pytest.fixture
def theirs(tmp_path: Path, foreign: list[nn.Module]) -> Path:
    plain, averaged = ({f"module.{key}": value for key, value in n.state_dict().items()} for n in foreign)
    file = tmp_path / "14.pth.tar"
    torch.save({"epoch": 3, "arch": "x", "state_dict": plain, "state_dict_ema": averaged}, file)
    return file


class TestOurCheckpoint:
    def test_has_the_accuracy_that_a_plain_loop_counts(self, ours: Path, network: nn.Module) -> None:
        result = measured(ours)
        assert (result.top1, result.top5) == pytest.approx(as_in_training(network), abs=1e-6)
        assert 0 < result.top1 < result.top5 < 1
        cost = measure_network(network, 32)
        assert (result.network, result.flops, result.params) == (str(PATH), cost.macs, cost.params)
        assert (result.images, result.data.name, result.data.batch_size) == (len(digits(32).test), "digits", 50)

    def test_is_read_in_any_layout_of_the_memory(self, ours: Path) -> None:
        assert measured(ours, {"device": {"memory_format": "contiguous_format"}}) == measured(ours)

    @pytest.mark.parametrize("batch_size", [2, 7, 358, 1000])
    def test_is_tested_in_batches_of_any_size(self, ours: Path, batch_size: int) -> None:
        expected = measured(ours)
        result = measured(ours, {"data": {"batch_size": batch_size}})
        assert (result.images, result.data.batch_size) == (359, batch_size)
        assert (result.top1, result.top5) == pytest.approx((expected.top1, expected.top5), abs=1e-6)

    def test_may_be_of_one_of_timms_networks(self, tmp_path: Path, foreign: list[nn.Module]) -> None:
        file = tmp_path / "model.safetensors"
        save_network(file, foreign[0], architecture="cream_14", num_classes=10, data=DIGITS, size={})
        result = measured(file, {}, "cream_14")
        assert result.network == "cream_14"
        # Prepared as in training, whatever timm does for that network.
        assert (result.top1, result.top5) == pytest.approx(as_in_training(foreign[0]), abs=1e-6)

    def test_may_be_named_by_the_child_beside_it(self, tmp_path: Path, network: nn.Module) -> None:
        child = Child(PATH, 10, 0.5, 1, 2, DIGITS, {"name": "a", "seed": 0})
        child.save(tmp_path / "child.json", network)
        result = measured(tmp_path / "child.json")
        assert result == measured(tmp_path / "child.safetensors")
        assert result.top1 == pytest.approx(as_in_training(network)[0], abs=1e-6)

    def test_may_be_tested_on_other_data(self, ours: Path, network: nn.Module) -> None:
        result = measured(ours, {"data": {"resolution": 40}})
        assert (result.top1, result.top5) == pytest.approx(as_in_training(network, 40), abs=1e-6)
        assert result.flops == measure_network(network, 40).macs
        mnist = measured(ours, {"data": {"name": "mnist5k"}})
        assert (mnist.images, mnist.data.name, mnist.data.resolution) == (1000, "mnist5k", 32)

    def test_leaves_nothing_behind(self, ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        before = ours.read_bytes()
        measured(ours)
        assert list(tmp_path.iterdir()) == [ours]
        assert ours.read_bytes() == before

    def test_is_shown_to_a_person(self, ours: Path, capsys: pytest.CaptureFixture[str]) -> None:
        result = replace(measured(ours), flops=3_701_696, params=1_244_890, top1=0.98765, top5=1.0, images=1000)
        capsys.readouterr()
        print_evaluation(result)
        assert capsys.readouterr().out.splitlines() == [
            "network:   [[0], [0], [1], [2], [3], [0], [0]]",
            "FLOPs:     3.70 M multiply-accumulates",
            "params:    1.245 M",
            "images:    1,000 of 32 × 32 pixels, the test part of digits",
            "top-1:     0.9877",
            "top-5:     1.0000",
        ]


class TestGenotype:
    """Networks of DARTS: as the search leaves them, as a training does, and as published."""

    EDGES = (("sep_conv_3x3", 1), ("skip_connect", 0), ("max_pool_3x3", 0), ("dil_conv_3x3", 2))
    GENOTYPE = Genotype(normal=EDGES, normal_concat=(2, 3), reduce=EDGES, reduce_concat=(2, 3))
    SPACE: ClassVar[dict[str, Any]] = {"channels": 2, "cells": 3, "nodes": 2}
    TRAINED: ClassVar[dict[str, Any]] = {"channels": 4, "cells": 3, "stem": "cifar", "auxiliary": True}

    def test_as_it_was_searched(self, tmp_path: Path) -> None:
        space = DartsSpace(10, **self.SPACE)
        network = with_opinions(space.freeze(space.sample(self.GENOTYPE)), 3)
        child = Child(self.GENOTYPE, 10, 0.5, 1, 2, DIGITS, {"name": "a", "seed": 0}, space=self.SPACE)
        child.save(tmp_path / "child.json", network)
        result = measured(tmp_path / "child.json")
        assert (result.top1, result.top5) == pytest.approx(as_in_training(network), abs=1e-6)
        assert 0 < result.top1 < result.top5 < 1
        cost = measure_network(network, 32)
        assert (result.network, result.flops, result.params) == (str(self.GENOTYPE), cost.macs, cost.params)

    def test_as_it_was_trained_with_an_auxiliary_head(self, tmp_path: Path) -> None:
        network = with_opinions(build_darts(self.GENOTYPE, num_classes=10, **self.TRAINED), 4)
        size = {"kind": "trained", **self.TRAINED}
        file = tmp_path / "model.safetensors"
        save_network(file, network, architecture=str(self.GENOTYPE), num_classes=10, data=DIGITS, size=size)
        loaded = load_checkpoint(file).network
        assert {name for name in loaded.state_dict() if name.startswith("auxiliary_head.")}
        for name, tensor in network.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
        result = measured(file)
        assert (result.top1, result.top5) == pytest.approx(as_in_training(network), abs=1e-6)
        assert 0 < result.top1 < result.top5 < 1
        assert result.flops == measure_network(network, 32).macs
        # The head has no part in it: images that it could not take are tested as well.
        assert measured(file, {"data": {"resolution": 8}}).flops == measure_network(network, 8).macs

    @pytest.mark.parametrize(
        ("size", "expected"),
        [
            ("{}", "The size of the network, {}, is not one of a genotype"),
            ("3", "not iterable"),
            ("{", "JSONDecodeError"),
            ('{"kind": "trained", "channels": 4, "cells": 2, "stem": "cifar"}', "has at least 3 cells"),
            ('{"kind": "search", "channels": 4, "cells": 4, "colour": 1}', "is not one of a genotype"),
            (None, "The size of the network, {}, is not one of a genotype"),
        ],
        ids=str,
    )
    def test_of_a_damaged_size_is_refused(self, tmp_path: Path, size: str | None, expected: str) -> None:
        notes = {"format": "nni_cream.network/1", "architecture": str(self.GENOTYPE), "num_classes": "10", "data": "{}"}
        file = tmp_path / "model.safetensors"
        save_file({"a": torch.ones(1)}, file, metadata=notes if size is None else {**notes, "size": size})
        message = refusal(file)
        assert message.startswith(f"The notes in {file} are damaged: ")
        assert expected in message

    def test_of_another_size_than_the_notes_say_is_refused(self, tmp_path: Path) -> None:
        network = build_darts(self.GENOTYPE, num_classes=10, **self.TRAINED)
        size = {"kind": "trained", **self.TRAINED, "channels": 6}
        file = tmp_path / "model.safetensors"
        save_network(file, network, architecture=str(self.GENOTYPE), num_classes=10, data=DIGITS, size=size)
        assert "does not fit Genotype(" in refusal(file)

    @pytest.mark.parametrize("auxiliary", [True, False])
    def test_published_files_are_read_with_and_without_the_auxiliary_head(
        self, tmp_path: Path, auxiliary: bool
    ) -> None:
        torch.manual_seed(0)
        network = timm.create_model("darts_v2_cifar10", num_classes=10, auxiliary=auxiliary)
        weights = network.state_dict()
        assert any(name.startswith("auxiliary_head.") for name in weights) == auxiliary
        torch.save(weights, tmp_path / "published.pt")
        loaded = load_checkpoint(tmp_path / "published.pt", "darts_v2_cifar10")
        assert (loaded.num_classes, loaded.data) == (10, None)
        state = loaded.network.state_dict()
        assert set(state) == {name for name in weights if not name.startswith("auxiliary_head.")}
        assert all(torch.equal(tensor, weights[name]) for name, tensor in state.items())

    def test_a_published_file_that_lacks_something_else_is_refused(self, tmp_path: Path) -> None:
        weights = timm.create_model("darts_v2_cifar10", num_classes=10, auxiliary=True).state_dict()
        del weights["stem.0.weight"]
        torch.save(weights, tmp_path / "a.pt")
        assert "1 entries are only in one of them" in refusal(tmp_path / "a.pt", "darts_v2_cifar10")

    def test_a_published_file_has_the_accuracy_of_its_network(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # The cells are the published ones; the network of them is smaller, because it is slow.
        small = replace(PUBLISHED["darts_v2_cifar10"], channels=2, cells=3)
        monkeypatch.setitem(PUBLISHED, "darts_v2_cifar10", small)
        network = with_opinions(timm.create_model("darts_v2_cifar10", num_classes=10), 5)
        head = timm.create_model("darts_v2_cifar10", num_classes=10, auxiliary=True).state_dict()
        extra = {name: tensor for name, tensor in head.items() if name.startswith("auxiliary_head.")}
        torch.save({**network.state_dict(), **extra}, tmp_path / "published.pt")
        settings = {"data": {"name": "digits", "augmentation": {"interpolation": "bilinear"}}}
        result = measured(tmp_path / "published.pt", settings, "darts_v2_cifar10")
        cfg = network.default_cfg
        test = digits(32).test
        mean, std = torch.tensor(cfg["mean"]), torch.tensor(cfg["std"])
        images = []
        for index in test.indices.tolist():
            pixels = torch.tensor(np.array(test.images.rgb(index).resize((32, 32), Image.Resampling.BILINEAR)))
            images.append(((pixels / 255 - mean) / std).permute(2, 0, 1))
        expected = accuracies(network, images, test.labels.tolist())
        assert (result.top1, result.top5) == pytest.approx(expected, abs=1e-6)
        assert 0 < result.top1 < result.top5 < 1
        assert (result.data.resolution, result.params) == (32, sum(p.numel() for p in network.parameters()))


class TestForeignCheckpoint:
    @pytest.mark.parametrize("use_ema", [True, False])
    def test_has_the_accuracy_of_the_weights_that_are_asked_for(
        self, theirs: Path, foreign: list[nn.Module], use_ema: bool
    ) -> None:
        expected = [as_timm_would(network, 32) for network in foreign]
        assert len({share for pair in expected for share in pair}) == 4
        result = measured(theirs, FOREIGN, "cream_14", use_ema=use_ema)
        assert (result.top1, result.top5) == pytest.approx(expected[use_ema], abs=1e-6)
        cost = measure_network(foreign[0], 32)
        assert (result.network, result.flops, result.params) == ("cream_14", cost.macs, cost.params)

    def test_with_one_kind_of_weights_is_taken_as_it_is(self, tmp_path: Path, foreign: list[nn.Module]) -> None:
        weights = foreign[0].state_dict()
        torch.save(weights, tmp_path / "bare.pth")
        torch.save({"state_dict": weights}, tmp_path / "plain.pth")
        save_file(weights, tmp_path / "foreign.safetensors", metadata={"format": "pt"})
        for file in tmp_path.iterdir():
            loaded = load_checkpoint(file, "cream_14")
            assert (loaded.name, loaded.num_classes, loaded.data) == ("cream_14", 10, None)
            assert all(torch.equal(value, weights[key]) for key, value in loaded.network.state_dict().items())

    def test_is_tested_on_images_of_its_networks_size(self, theirs: Path, foreign: list[nn.Module]) -> None:
        result = measured(theirs, {"data": {"name": "digits"}}, "cream_14")
        assert result.data.resolution == 64
        assert result.flops == measure_network(foreign[0], 64).macs
        assert (result.top1, result.top5) == pytest.approx(as_timm_would(foreign[1], 64), abs=1e-6)

    @pytest.mark.parametrize("interpolation", RESIZINGS)
    def test_is_tested_on_images_resized_as_asked_for(
        self, theirs: Path, foreign: list[nn.Module], interpolation: str
    ) -> None:
        expected = {name: as_timm_would(foreign[1], 32, Image.Resampling[name.upper()]) for name in RESIZINGS}
        assert len(set(expected.values())) == 2
        result = measured(
            theirs, {"data": {**FOREIGN["data"], "augmentation": {"interpolation": interpolation}}}, "cream_14"
        )
        assert (result.top1, result.top5) == pytest.approx(expected[interpolation], abs=1e-6)

    def test_of_a_network_with_two_classifiers_and_one_size(self, tmp_path: Path) -> None:
        model = "deit_tiny_distilled_patch16_224"
        file = tmp_path / "a.pth"
        torch.save(timm.create_model(model, num_classes=10).state_dict(), file)
        assert load_checkpoint(file, model).num_classes == 10
        with pytest.raises(UserError) as caught:
            measured(file, FOREIGN, model)
        assert str(caught.value) == f"{model} takes images of 224 pixels only; data.resolution is 32."


class CfgNode(dict[str, Any]):
    """The settings of the published code of Cream, as far as a file shows: of the package yacs."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.__dict__["__immutable__"] = True


CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"


class TestPublishedLayouts:
    """Files as the published programs write them, made of networks of ours."""

    @staticmethod
    def loads(file: Path, model: str, expected: Mapping[str, Tensor], **arguments: Any) -> None:
        loaded = load_checkpoint(file, model, **arguments)
        state = loaded.network.state_dict()
        assert {name for name in state if not name.endswith("num_batches_tracked")} <= set(expected)
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items() if name in state)
        assert loaded.num_classes == 10

    @pytest.mark.parametrize("arguments", ["namespace", "yacs"])
    @pytest.mark.parametrize("zipped", [True, False])
    def test_of_cream(
        self,
        tmp_path: Path,
        foreign: list[nn.Module],
        arguments: str,
        zipped: bool,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        plain, averaged = (network.state_dict() for network in foreign)
        optimizer = torch.optim.SGD(foreign[0].parameters(), lr=0.1, momentum=0.9)
        for name in ("yacs", "yacs.config"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setattr(sys.modules["yacs.config"], "CfgNode", CfgNode, raising=False)
        settings: Any = Namespace(lr=0.1, model="Childnet_Testing")
        if arguments == "yacs":
            settings = CfgNode({"MODEL": "Childnet_Testing", "NET": CfgNode({"EMA": CfgNode({"USE": True})})})
        content = {
            "epoch": 499,
            "arch": "Childnet_Testing",
            "state_dict": plain,
            "optimizer": optimizer.state_dict(),
            "args": settings,
            "version": 2,
            "state_dict_ema": averaged,
            "metric": 77.6,
        }
        torch.save(content, tmp_path / "14.pth.tar", _use_new_zipfile_serialization=zipped)
        for name in ("yacs", "yacs.config"):
            monkeypatch.delitem(sys.modules, name)
        self.loads(tmp_path / "14.pth.tar", "cream_14", averaged)
        self.loads(tmp_path / "14.pth.tar", "cream_14", plain, use_ema=False)

    @pytest.mark.parametrize("wrapped", [False, True])
    def test_of_darts(self, tmp_path: Path, wrapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        # As PyTorch 0.3 wrote them: no zip file, and batch norms did not count their batches.
        small = replace(PUBLISHED["darts_v2_cifar10"], channels=4, cells=3)
        monkeypatch.setitem(PUBLISHED, "darts_v2_cifar10", small)
        network = with_opinions(timm.create_model("darts_v2_cifar10", num_classes=10, auxiliary=True), 6)
        weights = {name: tensor for name, tensor in network.state_dict().items() if not name.endswith("tracked")}
        assert len(weights) < len(network.state_dict())
        content: dict[str, Any] = weights
        if wrapped:
            # Of ImageNet, by its training on several devices.
            content = {
                "epoch": 250,
                "state_dict": {f"module.{name}": tensor for name, tensor in weights.items()},
                "best_acc_top1": 73.3,
                "optimizer": {"state": {}, "param_groups": []},
            }
        file = tmp_path / "published.pt"
        torch.save(content, file, _use_new_zipfile_serialization=False)
        self.loads(file, "darts_v2_cifar10", weights)
        settings = {"data": {"name": "digits", "resolution": 32}}
        assert 0 < measured(file, settings, "darts_v2_cifar10").top1 < 1

    def test_that_lack_a_statistic_are_refused(self, tmp_path: Path, foreign: list[nn.Module]) -> None:
        weights = {key: value for key, value in foreign[0].state_dict().items() if key != "bn1.running_mean"}
        torch.save(weights, tmp_path / "a.pth")
        assert "1 entries are only in one of them, such as 'bn1.running_mean'" in refusal(
            tmp_path / "a.pth", "cream_14"
        )


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (str(self.marker), "w")


def refusal(file: Path, model: str | None = None, settings: dict[str, Any] | None = None, **kwargs: Any) -> str:
    with pytest.raises(UserError) as caught:
        measured(file, FOREIGN if settings is None else settings, model, **kwargs)
    message = str(caught.value)
    assert str(file) in message
    assert "\n" not in message
    assert message[-1] in ".?"
    assert message[-2] not in ".?"
    return message


class TestRefusals:
    def test_of_what_is_not_there(self, tmp_path: Path) -> None:
        assert refusal(tmp_path / "a.pth", "cream_14") == f"There is no checkpoint {tmp_path / 'a.pth'}."
        assert refusal(tmp_path) == f"There is no checkpoint {tmp_path}."

    def test_of_a_child_without_weights(self, tmp_path: Path) -> None:
        (tmp_path / "child.json").write_text("{}")
        assert refusal(tmp_path / "child.json").startswith(f"There are no weights {tmp_path / 'child.safetensors'}")

    @pytest.mark.parametrize("size", [0, 5, 1000])
    def test_of_a_damaged_file_of_ours(self, ours: Path, size: int) -> None:
        ours.write_bytes(ours.read_bytes()[:size])
        assert "is not a safetensors file" in refusal(ours)

    @pytest.mark.parametrize(
        ("notes", "expected"),
        [
            ({"architecture": "[[0], [1]"}, "is not a Cream path"),
            ({"architecture": "[[0], [1]]"}, "has 2 stages"),
            (
                {"architecture": "cream_15"},
                "timm has no network 'cream_15'; did you mean 'cream_14'; copy it once more.",
            ),
            ({"architecture": "hf-hub:timm/resnet18.a1_in1k"}, "timm has no network 'hf-hub:"),
            ({"num_classes": "ten"}, "'ten'"),
            ({"data": "{"}, "JSONDecodeError"),
            ({"data": "3"}, "not iterable"),
            ({"data": None}, "'data'"),
        ],
        ids=str,
    )
    def test_of_damaged_notes(self, ours: Path, network: nn.Module, notes: dict[str, Any], expected: str) -> None:
        good = {"format": "nni_cream.network/1", "architecture": str(PATH), "num_classes": "10", "data": "{}"}
        changed = {key: value for key, value in {**good, **notes}.items() if value is not None}
        save_file(network.state_dict(), ours, metadata=changed)
        message = refusal(ours)
        assert message.startswith(f"The notes in {ours} are damaged: ")
        assert expected in message

    def test_of_weights_of_another_network_than_the_notes_say(self, ours: Path, network: nn.Module) -> None:
        save_network(ours, network, architecture="cream_14", num_classes=10, data=DIGITS, size={})
        assert "does not fit cream_14: " in refusal(ours)
        save_network(ours, network, architecture=str(PATH), num_classes=7, data=DIGITS, size={})
        assert "has shape [10], but the network needs [7]; give the file of" in refusal(ours)

    def test_of_a_model_that_ours_is_not(self, ours: Path) -> None:
        assert refusal(ours, "cream_14") == f"{ours} holds the network {PATH}, not cream_14; leave out --model."

    def test_of_a_foreign_file_without_model_or_data(self, theirs: Path) -> None:
        assert "does not say which network it is of; give timm's name of it, as in --model" in refusal(theirs)
        message = refusal(theirs, "cream_14", {"data": {"resolution": 32}})
        assert "does not say which data it is for; give it, as in --set data.name=" in message

    @pytest.mark.parametrize(
        ("model", "expected"),
        [
            ("cream_15", "timm has no network 'cream_15'; did you mean 'cream_14'?"),
            ("hf-hub:timm/cream_14", "timm has no network 'hf-hub:timm/cream_14'"),
            ("cream_14.imagenet", "timm cannot build 'cream_14.imagenet': Invalid pretrained tag"),
        ],
    )
    def test_of_a_model_that_timm_has_not(self, theirs: Path, model: str, expected: str) -> None:
        with pytest.raises(UserError) as caught:
            load_checkpoint(theirs, model)
        assert str(caught.value).startswith(expected)

    def test_of_a_foreign_file_of_another_network(self, theirs: Path) -> None:
        assert "does not fit cream_43: " in refusal(theirs, "cream_43")
        message = refusal(theirs, "resnet18")
        assert "it should have 'fc.weight', which tells the number of classes, but begins with 'conv_stem" in message

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            (lambda w: w.pop("conv_head.bias"), "1 entries are only in one of them, such as 'conv_head.bias' of the n"),
            (lambda w: w.update(extra=torch.ones(1)), "such as 'extra' of the file; give the file of this"),
            (
                lambda w: w.update({"conv_head.bias": torch.ones(3)}),
                "has shape [3], but the network needs [1280]; give the file",
            ),
            (
                lambda w: w.update({"conv_head.bias": "x"}),
                "'conv_head.bias' is a str, but the network needs [1280]; give the file",
            ),
            (lambda w: w.update({"classifier.weight": 3}), "it should have 'classifier.weight'"),
            (lambda w: w.clear(), "but begins with nothing; name the network that it is of with --model."),
        ],
    )
    def test_of_weights_that_do_not_fit(
        self, tmp_path: Path, foreign: list[nn.Module], change: Callable[[dict[str, Any]], Any], expected: str
    ) -> None:
        weights: dict[str, Any] = dict(foreign[0].state_dict())
        change(weights)
        torch.save(weights, tmp_path / "a.pth")
        message = refusal(tmp_path / "a.pth", "cream_14")
        assert message.startswith(f"{tmp_path / 'a.pth'} does not fit cream_14: ")
        assert expected in message

    def test_of_plain_weights_where_there_are_none(self, tmp_path: Path, foreign: list[nn.Module]) -> None:
        torch.save({"state_dict_ema": foreign[0].state_dict()}, tmp_path / "a.pth")
        assert "begins with 'state_dict_ema'; name" in refusal(tmp_path / "a.pth", "cream_14", use_ema=False)

    @pytest.mark.parametrize("content", [b"", b"x", b"no checkpoint", b"PK\x03\x04", bytes(range(256))])
    def test_of_other_files(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "a.pth").write_bytes(content)
        assert "cannot be read as a checkpoint: " in refusal(tmp_path / "a.pth", "cream_14")

    @pytest.mark.parametrize("size", [100, 5000, -100])
    def test_of_a_damaged_foreign_file(self, theirs: Path, size: int) -> None:
        theirs.write_bytes(theirs.read_bytes()[:size])
        assert "cannot be read as a checkpoint: " in refusal(theirs, "cream_14")

    @pytest.mark.parametrize("content", [[1], 3, {1: 2}, {"state_dict": None}], ids=str)
    def test_of_what_is_no_state_dict(self, tmp_path: Path, content: Any) -> None:
        torch.save(content, tmp_path / "a.pth")
        assert "cannot be read as a checkpoint: " in refusal(tmp_path / "a.pth", "cream_14")

    @pytest.mark.parametrize("zipped", [True, False])
    def test_of_code(self, tmp_path: Path, foreign: list[nn.Module], zipped: bool) -> None:
        marker = tmp_path / "executed"
        content = {"state_dict": foreign[0].state_dict(), "args": Malicious(marker)}
        torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
        message = refusal(tmp_path / "a.pth", "cream_14")
        assert "besides tensors it holds io.open, and reading that could execute code" in message
        assert not marker.exists()

    def test_of_a_whole_network(self, tmp_path: Path, foreign: list[nn.Module]) -> None:
        torch.save(foreign[0], tmp_path / "a.pth")
        assert "timm.models.mobilenetv3.MobileNetV3" in refusal(tmp_path / "a.pth", "cream_14")

    def test_of_data_with_other_classes(self, tmp_path: Path, ours: Path) -> None:
        images = tmp_path / "images"
        for name in ("cat", "dog"):
            (images / name).mkdir(parents=True)
            for number in range(8):
                Image.new("RGB", (40, 40)).save(images / name / f"{number}.png")
        settings = {"data": {"name": "folder", "folder": str(images)}}
        message = refusal(ours, None, settings)
        assert message.startswith(f"{ours} tells 10 classes apart, but the data set 'folder' has 2: give the data that")

    def test_of_stored_data_settings_that_make_no_sense(self, ours: Path, network: nn.Module) -> None:
        save_network(ours, network, architecture=str(PATH), num_classes=10, data={**DIGITS, "name": "digit"}, size={})
        with pytest.raises(UserError, match="there is no data set 'digit'; did you mean 'digits'"):
            measured(ours)


def test_the_notes_are_json(ours: Path) -> None:
    from safetensors import safe_open

    with safe_open(ours, "pt") as file:
        assert json.loads(file.metadata()["data"]) == DIGITS
