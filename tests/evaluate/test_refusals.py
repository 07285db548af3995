"""Checkpoints that are not tested, and what is said of them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from nni_cream.child import save_network
from nni_cream.errors import UserError
from nni_cream.evaluate import load_checkpoint
from tests.evaluate.measuring import DIGITS, PATH, measured, refusal


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (str(self.marker), "w")


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

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_of_weights_that_are_not_finite(self, ours: Path, network: nn.Module, value: float) -> None:
        weights = copy.deepcopy(network)
        weights.get_parameter("classifier.weight").data.fill_(value)
        save_network(ours, weights, architecture=str(PATH), num_classes=10, data=DIGITS, size={})
        message = refusal(ours, None, {})
        assert message.startswith(f"{ours} has no accuracy: the loss of its network {PATH} on the test part is nan, ")

    def test_of_stored_data_settings_that_make_no_sense(self, ours: Path, network: nn.Module) -> None:
        save_network(ours, network, architecture=str(PATH), num_classes=10, data={**DIGITS, "name": "digit"}, size={})
        with pytest.raises(UserError, match="there is no data set 'digit'; did you mean 'digits'"):
            measured(ours)
