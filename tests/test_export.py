from __future__ import annotations

import itertools
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor, nn

from nni_cream import export
from nni_cream.architecture import CreamPath
from nni_cream.child import Child, build_network, save_network
from nni_cream.data import preparation
from nni_cream.errors import UserError
from nni_cream.evaluate import load_checkpoint
from nni_cream.export import (
    FORMATS,
    NOTES_FILE,
    TOLERANCE,
    check_images,
    export_checkpoint,
    file_beside,
    largest_difference,
    print_exported,
)
from nni_cream.genotype import PUBLISHED_GENOTYPES, Genotype
from nni_cream.models import cream
from nni_cream.models.darts import Stem

PATH = CreamPath.parse("[0] [0] [1,6] [2] [8] [3,9] [0]")
EDGES = (("sep_conv_3x3", 1), ("skip_connect", 0), ("max_pool_3x3", 0), ("dil_conv_3x3", 2))
GENOTYPE = Genotype(normal=EDGES, normal_concat=(2, 3), reduce=EDGES[::-1][2:] + EDGES[2:], reduce_concat=(2, 3))
SPACE = {"channels": 4, "cells": 3, "nodes": 2, "concat": 2, "operations": [*dict(EDGES), "none"]}
TRAINED = {"kind": "trained", "channels": 4, "cells": 3, "stem": "cifar", "auxiliary": True}
DATA = {"name": "digits", "resolution": 16}

every_form = pytest.mark.parametrize("form", ["onnx", "export", "torchscript"])


def with_opinions(network: nn.Module, size: int) -> Any:
    """Let a new network tell images apart: its batch norms have seen some, and its logits are large."""
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None
            # Most activations let most through, as if trained: in random networks each layer makes rounding larger.
            if norm.affine:
                nn.init.ones_(norm.bias)
    with torch.no_grad():
        # Of photographs too: where a norm has seen hardly any variance, it makes the rounding of others large.
        network.train()(torch.cat([check_images(preparation("folder", size)), torch.randn(8, 3, size, size)]))
        for name in ("weight", "bias"):
            parameter = network.get_parameter(f"classifier.{name}")
            parameter.copy_(torch.randn_like(parameter))
    return network.eval()


@pytest.fixture
def child(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    network = with_opinions(build_network(str(PATH), 7, {}), 32)
    Child(PATH, 7, 0.5, 1, 2, DATA, {"name": "a", "seed": 0}).save(tmp_path / "child.json", network)
    return tmp_path / "child.json"


def reader(form: str, file: Path) -> tuple[Callable[[Tensor], Tensor], dict[str, str]]:
    """What a user of the file has of it: a function, and the notes."""
    if form == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        return (
            lambda batch: torch.from_numpy(session.run(None, {"images": batch.numpy()})[0]),
            session.get_modelmeta().custom_metadata_map,
        )
    notes = {NOTES_FILE: ""}
    if form == "export":
        program = torch.export.load(file, extra_files=notes).module()
    else:
        program = torch.jit.load(str(file), _extra_files=notes)
    return program, json.loads(notes[NOTES_FILE])


def same_for_batches(network: nn.Module, run: Callable[[Tensor], Tensor], size: int) -> None:
    for number in (1, 2, 5):
        batch = torch.randn(number, 3, size, size)
        with torch.no_grad():
            expected, found = network(batch), run(batch)
        scale = expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE * scale)
        # So that a constant would not do.
        assert number == 1 or expected.std(dim=0).max() > 10 * TOLERANCE * scale


@every_form
class TestFormats:
    def test_give_the_logits_of_the_network_for_batches_of_any_size(self, child: Path, form: str) -> None:
        exported = export_checkpoint(child, form=form)
        assert exported.file == child.with_suffix(FORMATS[form])
        assert 0 <= exported.difference <= TOLERANCE
        assert (exported.network, exported.num_classes, exported.resolution) == (str(PATH), 7, 16)
        run, notes = reader(form, exported.file)
        same_for_batches(load_checkpoint(child).network.eval(), run, 16)
        assert {name: notes[name] for name in ("format", "architecture", "num_classes", "data")} == {
            "format": "nni_cream.export/1",
            "architecture": str(PATH),
            "num_classes": "7",
            "data": '"digits"',
        }
        prepared = preparation("digits", 16)
        told = {name: json.loads(notes[name]) for name in ("input_size", "mean", "std", "interpolation", "crop_pct")}
        assert told == {name: list(value) if isinstance(value, tuple) else value for name, value in prepared.items()}
        # Nothing else is left, such as weights beside it.
        assert {file.name for file in child.parent.iterdir()} == {
            "child.json",
            "child.safetensors",
            f"child{FORMATS[form]}",
        }

    @pytest.mark.parametrize("size", [{"kind": "search", **SPACE}, TRAINED], ids=["search", "training"])
    def test_take_networks_of_darts(self, tmp_path: Path, form: str, size: dict[str, Any]) -> None:
        torch.manual_seed(0)
        network = with_opinions(build_network(str(GENOTYPE), 5, size), 32)
        file = tmp_path / "model.safetensors"
        save_network(file, network, architecture=str(GENOTYPE), num_classes=5, data=DATA, size=size)
        # A size that an auxiliary head could not take.
        exported = export_checkpoint(file, form=form, resolution=20, output=tmp_path / "sub" / "a.bin")
        run, notes = reader(form, tmp_path / "sub" / "a.bin")
        same_for_batches(network, run, 20)
        assert notes["architecture"] == str(GENOTYPE)
        assert (exported.resolution, notes["input_size"]) == (20, "[3, 20, 20]")
        assert b"auxiliary" not in exported.file.read_bytes()

    def test_take_foreign_checkpoints(self, tmp_path: Path, form: str) -> None:
        torch.manual_seed(0)
        plain, averaged = (with_opinions(timm.create_model("cream_14", num_classes=10), 32) for _ in range(2))
        torch.save({"state_dict": plain.state_dict(), "state_dict_ema": averaged.state_dict()}, tmp_path / "14.pth.tar")
        for use_ema, network in ((True, averaged), (False, plain)):
            exported = export_checkpoint(tmp_path / "14.pth.tar", "cream_14", use_ema=use_ema, form=form, resolution=32)
            assert exported.file == tmp_path / f"14{'' if use_ema else '_plain'}{FORMATS[form]}"
            run, notes = reader(form, exported.file)
            assert notes["weights"] == ("ema" if use_ema else "plain")
            same_for_batches(network, run, 32)
        assert (notes["architecture"], notes["mean"], notes["crop_pct"]) == (
            "cream_14",
            "[0.485, 0.456, 0.406]",
            "0.875",
        )
        assert (notes["interpolation"], "data" in notes) == ('"bicubic"', False)

    def test_that_give_other_logits_are_not_written(
        self, child: Path, form: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        exporter = export._EXPORTERS[form]
        off = 2 * TOLERANCE

        def exact_for_two_images_only(*arguments: Any) -> Any:
            content, run, opset = exporter(*arguments)

            def changed(batch: Tensor) -> Tensor:
                logits = run(batch)
                return logits + (off * logits.abs().max() if len(batch) == 1 else 0)

            return content, changed, opset

        monkeypatch.setitem(export._EXPORTERS, form, exact_for_two_images_only)  # type: ignore[arg-type]
        output = child.with_suffix(FORMATS[form])
        output.write_bytes(b"old nni_cream.export/1")
        with pytest.raises(
            UserError, match=rf"As {form}, the network of .* gives other logits: they are off by 2\.[01]e-04"
        ):
            export_checkpoint(child, form=form)
        assert output.read_bytes() == b"old nni_cream.export/1"
        assert len(list(child.parent.iterdir())) == 3


class TestOnnx:
    def test_has_names_and_a_batch_of_any_size(self, child: Path) -> None:
        import onnx

        exported = export_checkpoint(child)
        model = onnx.load(exported.file)
        onnx.checker.check_model(model, full_check=True)
        (image,), (logits,) = model.graph.input, model.graph.output
        shapes = [
            [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in (image, logits)
        ]
        assert (image.name, logits.name) == ("images", "logits")
        assert shapes == [["batch", 3, 16, 16], ["batch", 7]]
        assert exported.opset == next(entry.version for entry in model.opset_import if not entry.domain)

    @pytest.mark.parametrize("opset", [18, 21])
    def test_of_an_opset(self, child: Path, opset: int) -> None:
        assert export_checkpoint(child, opset=opset).opset == opset

    @pytest.mark.parametrize("opset", [3, 99])
    def test_of_an_opset_that_there_is_not(self, child: Path, opset: int) -> None:
        with pytest.raises(UserError, match=f"opset {opset}") as caught:
            export_checkpoint(child, opset=opset)
        assert "\n" not in str(caught.value)
        assert not child.with_suffix(".onnx").exists()

    @pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
    def test_without_its_packages(self, child: Path, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(UserError, match=rf"\(import of {package} halted.*; pip install onnx onnxruntime"):
            export_checkpoint(child)


class TestDifference:
    NETWORK = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))

    def off(self, change: Callable[[Tensor], Tensor]) -> tuple[float, float]:
        """The difference, and the largest logit."""
        images = torch.randn(8, 3, 2, 2, generator=torch.Generator().manual_seed(0))
        largest = self.NETWORK(images).abs().max().item()
        return largest_difference(self.NETWORK, lambda batch: change(self.NETWORK(batch)), images), largest

    def test_is_a_share_of_the_largest_logit(self) -> None:
        assert self.off(lambda logits: logits) == (0, self.off(lambda logits: logits)[1])
        difference, largest = self.off(lambda logits: logits + 0.25 * (len(logits) > 1))
        assert difference == pytest.approx(0.25 / largest, rel=1e-5)
        assert self.off(lambda logits: logits * 1.5)[0] == pytest.approx(0.5, rel=1e-5)

    def test_is_looked_for_in_every_image_and_class_and_in_a_single_image(self) -> None:
        for image in range(8):
            for number in range(3):
                change = torch.zeros(8, 3)
                change[image, number] = 1
                assert self.off(lambda logits, change=change: logits + change[: len(logits)])[0] > 0.1
        assert self.off(lambda logits: logits + (len(logits) == 1))[0] > 0.1

    def test_of_what_is_no_number_or_of_another_shape(self) -> None:
        assert not self.off(lambda logits: logits * float("nan"))[0] <= TOLERANCE
        assert not self.off(lambda logits: logits * float("nan") if len(logits) == 1 else logits)[0] <= TOLERANCE
        assert self.off(lambda logits: logits[:, :1])[0] == float("inf")

    def test_from_a_network_without_numbers_is_refused(self) -> None:
        network = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
        nn.init.constant_(network[1].weight, float("nan"))
        with pytest.raises(UserError, match="logits that are no numbers"):
            largest_difference(network, network, torch.ones(8, 3, 2, 2))


def test_the_images_are_photographs_as_the_network_takes_them_and_noise() -> None:
    prepared = preparation("folder", 96)
    images = check_images(prepared)
    assert images.shape == (8, 3, 96, 96)
    assert torch.equal(images, check_images(prepared))
    photograph = Image.fromarray(load_sample_image("china.jpg"))
    larger = int(96 / 0.875)
    resized = photograph.resize((int(larger * photograph.width / photograph.height), larger), Image.Resampling.BILINEAR)
    left, top = (round((length - 96) / 2) for length in resized.size)
    pixels = torch.tensor(np.array(resized))[top : top + 96, left : left + 96]
    expected = ((pixels / 255 - torch.tensor(prepared["mean"])) / torch.tensor(prepared["std"])).permute(2, 0, 1)
    torch.testing.assert_close(images[0], expected)
    # Mirrored, up to the pixel by which an odd margin cannot be halved.
    mirrored = images[1].flip(-1)
    assert min((mirrored[..., 1:-1] - images[0][..., 1 + s : 95 + s]).abs().mean() for s in (-1, 0, 1)) < 0.05
    assert images[4:].std().item() == pytest.approx(1, abs=0.02)


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            ({"form": "tflite"}, "There is no format 'tflite' to export to; there are onnx, export, torchscript."),
            ({"form": "export", "opset": 18}, "which the format 'export' does not have."),
            ({"resolution": 0}, "The resolution is 0 pixels, but should be from 1 to 8192."),
            ({"resolution": 100_000}, "The resolution is 100000 pixels, but should be from 1 to 8192."),
            ({"model": "cream_14"}, "holds the network"),
        ],
        ids=str,
    )
    def test_of_arguments(self, child: Path, arguments: dict[str, Any], expected: str) -> None:
        with pytest.raises(UserError) as caught:
            export_checkpoint(child, **arguments)
        assert expected in str(caught.value)
        assert len(list(child.parent.iterdir())) == 2

    def test_of_images_that_the_network_cannot_take(self, tmp_path: Path) -> None:
        size = {"kind": "search", **SPACE}
        network = build_network(str(GENOTYPE), 5, size)
        file = tmp_path / "model.safetensors"
        save_network(file, network, architecture=str(GENOTYPE), num_classes=5, data=DATA, size=size)
        with pytest.raises(UserError, match="an even height and width, not 15 × 15"):
            export_checkpoint(file, form="torchscript", resolution=30)
        assert list(tmp_path.iterdir()) == [file]

    def test_of_writing_over_what_is_exported(self, child: Path, tmp_path: Path) -> None:
        weights = child.with_suffix(".safetensors")
        for output in (child, weights, child.parent / "." / weights.name):
            with pytest.raises(UserError, match="would be overwritten"):
                export_checkpoint(child, form="torchscript", output=output)
        torch.save(timm.create_model("cream_14", num_classes=10).state_dict(), tmp_path / "a.pt")
        before = (tmp_path / "a.pt").read_bytes()
        with pytest.raises(UserError, match="give another --output"):
            export_checkpoint(tmp_path / "a.pt", "cream_14", form="torchscript")
        assert (tmp_path / "a.pt").read_bytes() == before

    @every_form
    def test_of_replacing_what_is_no_export(self, child: Path, form: str) -> None:
        output = child.with_suffix(FORMATS[form])
        torch.save({"state_dict": {"a": torch.ones(1)}}, output)
        before = output.read_bytes()
        with pytest.raises(UserError) as caught:
            export_checkpoint(child, form=form)
        sentence = f"{output} exists and is no export of a network, so that it is kept; say with --output where to."
        assert str(caught.value) == sentence
        assert output.read_bytes() == before
        # Who names it means it, and then it is an export.
        export_checkpoint(child, form=form, output=output)
        export_checkpoint(child, form=form)
        assert reader(form, output)[1]["weights"] == "plain"

    def test_of_a_checkpoint_that_is_none(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="There is no checkpoint"):
            export_checkpoint(tmp_path / "a.safetensors")


def test_plain_weights_are_exported_beside_the_averaged_ones(tmp_path: Path) -> None:
    torch.manual_seed(0)
    file = tmp_path / "model.safetensors"
    about: dict[str, Any] = {"architecture": str(PATH), "num_classes": 7, "data": DATA, "size": {}}
    for averaged in (False, True):
        network = with_opinions(build_network(str(PATH), 7, {}), 32)
        save_network(file if averaged else tmp_path / "model_plain.safetensors", network, averaged=averaged, **about)
    found = [export_checkpoint(file, form="torchscript", use_ema=use_ema).file for use_ema in (True, False)]
    assert found == [tmp_path / "model.pt", tmp_path / "model_plain.pt"]
    assert [reader("torchscript", one)[1]["weights"] for one in found] == ["ema", "plain"]
    # Where nothing was averaged there is only one set.
    save_network(file, network, **about)
    only = export_checkpoint(file, form="torchscript", use_ema=False).file
    assert (only.name, reader("torchscript", only)[1]["weights"]) == ("model.pt", "plain")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("child.json", "child"),
        ("net-v1.0.safetensors", "net-v1.0"),
        ("net-v1.1.safetensors", "net-v1.1"),
        ("287.pth.tar", "287"),
        ("A.PTH", "A"),
        ("epoch=3.ckpt", "epoch=3"),
        ("v1.0", "v1.0"),
        (".pt", ".pt"),
    ],
)
def test_an_export_has_the_name_of_the_checkpoint(tmp_path: Path, name: str, expected: str) -> None:
    assert file_beside(tmp_path / name, "onnx") == tmp_path / f"{expected}.onnx"
    assert file_beside(tmp_path / name, "torchscript") == tmp_path / f"{expected}.pt" or name == ".pt"


def test_versions_of_a_network_are_exported_beside_each_other(child: Path, tmp_path: Path) -> None:
    files = [shutil.copy(child.with_suffix(".safetensors"), tmp_path / f"net-v1.{n}.safetensors") for n in (0, 1)]
    outputs = [export_checkpoint(Path(file), form="torchscript").file.name for file in files]
    assert outputs == ["net-v1.0.pt", "net-v1.1.pt"]


def test_what_was_written_is_told(child: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exported = export_checkpoint(child, form="torchscript")
    capsys.readouterr()
    print_exported(exported)
    assert capsys.readouterr().out.splitlines() == [
        f"network:    {PATH}",
        "format:     torchscript",
        "takes:      images [batch, 3, 16, 16]",
        "gives:      logits [batch, 7]",
        f"difference: at most {exported.difference:.1e} of the largest logit, for 4 photographs and 4 random images",
        f"file:       {child.with_suffix('.pt')}",
    ]


# Of DARTS' networks, which take two minutes each, one is written as it is, and the cells of all of them in small
# networks; benchmarks/export_differences.py writes them all, at their own resolutions.
@pytest.mark.slow
@pytest.mark.parametrize("name", [*cream.PUBLISHED, "darts_v2_cifar10"])
def test_published_networks_can_be_written_as_onnx(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    own = {"cream_14": 64, "cream_43": 96, "darts_v2_cifar10": 32}.get(name)
    size = own or 64
    network = with_opinions(timm.create_model(name), size)
    torch.save(network.state_dict(), tmp_path / "published.pth")
    exported = export_checkpoint(tmp_path / "published.pth", name, resolution=None if own else size)
    assert exported.resolution == size
    assert exported.num_classes == (10 if name.endswith("cifar10") else 1000)
    assert exported.difference <= TOLERANCE
    run, notes = reader("onnx", exported.file)
    is_as_exact_as_with_large_logits(network, run, size)
    assert notes["architecture"] == name


@pytest.mark.slow
@pytest.mark.parametrize(("name", "stem"), zip(PUBLISHED_GENOTYPES, itertools.cycle(get_args(Stem))))
def test_published_cells_can_be_written_as_onnx(name: str, stem: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    genotype, size = str(PUBLISHED_GENOTYPES[name]), {"kind": "trained", "channels": 4, "cells": 3, "stem": stem}
    network = with_opinions(build_network(genotype, 5, size), 64)
    file = tmp_path / "model.safetensors"
    save_network(file, network, architecture=genotype, num_classes=5, data=DATA, size=size)
    run, notes = reader("onnx", export_checkpoint(file, resolution=64).file)
    is_as_exact_as_with_large_logits(network, run, 64)
    assert notes["architecture"] == genotype


def is_as_exact_as_with_large_logits(network: nn.Module, run: Callable[[Tensor], Tensor], size: int) -> None:
    same_for_batches(network, run, size)
    with torch.no_grad():
        # With the largest logit made 10, as large as those of trained networks.
        batch = torch.randn(2, 3, size, size)
        expected = network(batch)
        assert 10 * ((run(batch) - expected).abs().max() / expected.abs().max()) <= 1e-4


def test_what_the_logits_of_a_folders_network_stand_for(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = with_opinions(build_network(str(PATH), 2, {}), 32)
    images = {"class_names": ["cat", "dog"], "test": {"number": 4, "sha256": "0"}}
    data = {**DATA, "name": "folder", "folder": str(tmp_path), "images": images}
    file = tmp_path / "model.safetensors"
    save_network(file, network, architecture=str(PATH), num_classes=2, data=data, size={})
    _, notes = reader("torchscript", export_checkpoint(file, form="torchscript").file)
    assert json.loads(notes["class_names"]) == ["cat", "dog"]
