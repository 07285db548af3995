"""Checkpoints of other programs, tested; files laid out as the published ones."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from nni_cream.cost import measure_network
from nni_cream.errors import UserError
from nni_cream.evaluate import load_checkpoint
from nni_cream.models.darts_published import PUBLISHED
from tests.evaluate.measuring import FOREIGN, as_timm_would, measured, refusal, with_opinions

RESIZINGS = ("bilinear", "bicubic")


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
