"""Checkpoints of networks of DARTS, tested: as a search leaves them, as a training does, and as published."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from nni_cream.child import Child, save_network
from nni_cream.cost import measure_network
from nni_cream.evaluate import load_checkpoint
from nni_cream.genotype import Genotype
from nni_cream.models.darts import build_darts
from nni_cream.models.darts_published import PUBLISHED
from search_spaces.darts import DartsSpace
from tests.evaluate.measuring import DIGITS, accuracies, as_in_training, digits, measured, refusal, with_opinions


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
