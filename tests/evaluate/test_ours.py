"""Checkpoints that this package has written, tested."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from torch import nn

from nni_cream.child import Child, save_network
from nni_cream.cost import measure_network
from nni_cream.data import load_data
from nni_cream.data_checks import noted
from nni_cream.evaluate import print_evaluation
from nni_cream.models.cream import build_child
from nni_cream.settings import Data
from tests.evaluate.measuring import DIGITS, PATH, as_in_training, digits, measured, refusal


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


def test_the_notes_are_json(ours: Path) -> None:
    from safetensors import safe_open

    with safe_open(ours, "pt") as file:
        assert json.loads(file.metadata()["data"]) == DIGITS


class TestFolderOfImages:
    """What has become of the folder since the network was trained."""

    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        for name in ("cat", "dog"):
            self.add_images(tmp_path / "photos" / name, range(10))
        data = Data(name="folder", folder=tmp_path / "photos", resolution=32, batch_size=4)
        notes = noted(data, load_data("folder", folder=data.folder, resolution=32))
        file = tmp_path / "model.safetensors"
        network = build_child(PATH, num_classes=2)
        save_network(file, network, architecture=str(PATH), num_classes=2, data=notes, size={})
        return file

    def add_images(self, folder: Path, numbers: range) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for number in numbers:
            Image.new("RGB", (9, 9), number).save(folder / f"{number}.png")

    def test_nothing(self, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        measured(file)
        assert "warning: " not in capsys.readouterr().err

    def test_further_images(self, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.add_images(file.parent / "photos" / "cat", range(10, 20))
        measured(file)
        (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: "))
        assert line.startswith(f"warning: {file.parent / 'photos'} has changed since this network was found, so that")

    def test_other_classes(self, file: Path) -> None:
        (file.parent / "photos" / "cat").rename(file.parent / "photos" / "whale")
        assert "class 0 was 'cat' and would be 'dog'" in refusal(file, settings={})
