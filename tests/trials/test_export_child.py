"""The command line that writes a network for other programs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import nni_cream  # noqa: F401 (registers the networks)
from nni_cream.child import save_network
from tests.trials.commands import call, content

DATA = {"name": "digits", "resolution": 32}


@pytest.fixture
def trainings(tmp_path: Path) -> Path:
    """A folder with two trainings, of which ``new`` has ended last."""
    for time, name in ((1_900_000_000, "old"), (2_000_000_000, "new")):
        network = timm.create_model("cream_14", num_classes=10)
        file = tmp_path / "runs" / name / "model.safetensors"
        save_network(file, network, architecture="cream_14", num_classes=10, data=DATA, size={})
        os.utime(file, (time, time))
    return tmp_path


def test_without_arguments_the_newest_training_is_written_as_onnx(trainings: Path) -> None:
    ended = call("export_child", folder=trainings)
    assert ended.code == 0, ended.err
    assert ended.out.startswith("Exporting runs/new/model.safetensors.\n")
    shown = dict(line.split(":", 1) for line in ended.out.splitlines() if ":" in line)
    assert shown["network"].strip() == "cream_14"
    assert shown["takes"].strip() == "images [batch, 3, 32, 32]"
    assert Path(shown["file"].strip()) == trainings / "runs/new/model.onnx"
    assert {file.name for file in (trainings / "runs/new").iterdir()} == {"model.onnx", "model.safetensors"}
    assert not (trainings / "runs/old/model.onnx").exists()


@pytest.mark.parametrize("weights", ["ema", "plain"])
def test_all_options(tmp_path: Path, weights: str) -> None:
    network = timm.create_model("cream_14", num_classes=10).eval()
    saved = {}
    for key in ("state_dict", "state_dict_ema"):
        with torch.no_grad():
            network.classifier.weight.zero_()
            network.classifier.bias.fill_(len(saved) + 1)
        saved[key] = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    torch.save(saved, tmp_path / "14.pth.tar")
    arguments = ["--checkpoint", "14.pth.tar", "--model", "cream_14", "--weights", weights, "--resolution", "40"]
    ended = call("export_child", *arguments, "--format", "torchscript", "--output", "x/a.bin", folder=tmp_path)
    assert ended.code == 0, ended.err
    logits = torch.jit.load(str(tmp_path / "x/a.bin"))(torch.zeros(1, 3, 40, 40))
    assert logits.unique().item() == {"plain": 1, "ema": 2}[weights]
    ended = call("export_child", *arguments, "--opset", "19", folder=tmp_path)
    assert "opset 19" in ended.out, ended.err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--checkpoint", "none.pth"], "There is no checkpoint none.pth."),
        (["--format", "caffe"], "There is no format 'caffe'"),
        (["--resolution", "large"], "argument --resolution: invalid int value: 'large'"),
        (["--opset", "2"], "opset 2"),
        (["--output", "runs/new/model.safetensors"], "would be overwritten"),
        (["--output", "runs"], "--output runs is a folder; give a file in it."),
        (["--output", "runs/new/model.safetensors/x.onnx"], "model.safetensors is no folder that you may write to."),
        (["--output", "/proc/x/y.onnx"], "--output /proc/x/y.onnx cannot be written: /proc is no folder"),
        (["--resolution", "100000"], "The resolution is 100000 pixels, but should be from 1 to 8192."),
        (["--checkpoint", "runs/new"], "--checkpoint runs/new is a folder; give runs/new/model.safetensors."),
        (["--checkpoint", "runs"], "--checkpoint runs is a folder; give a file, such as the model.safetensors of a"),
        (["--weights", "none"], "argument --weights: invalid choice: 'none'"),
        (["--model", "cream_43"], "holds the network cream_14, not cream_43"),
    ],
    ids=str,
)
def test_refusals_are_sentences_and_leave_nothing(trainings: Path, arguments: list[str], expected: str) -> None:
    before = content(trainings)
    ended = call("export_child", *arguments, folder=trainings)
    assert expected in ended.sentence()
    assert content(trainings) == before


def test_where_nothing_was_trained(tmp_path: Path) -> None:
    assert "No training has ended yet" in call("export_child", folder=tmp_path).sentence()


@pytest.mark.slow
def test_as_a_user_starts_it(repository: Path, trainings: Path) -> None:
    command = [sys.executable, str(repository / "trials/export_child.py")]
    done = subprocess.run(command, cwd=trainings, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    done = subprocess.run([*command, "--opset", "2"], cwd=trainings, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
