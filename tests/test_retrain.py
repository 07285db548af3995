from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.layers.drop import DropPath
from torch import nn

from nni_cream import retrain as module_under_test
from nni_cream.architecture import CreamPath
from nni_cream.child import Candidate, Child, build_network
from nni_cream.cost import measure_network
from nni_cream.data import load_data
from nni_cream.data_checks import noted
from nni_cream.errors import UserError
from nni_cream.evaluate import evaluate, load_checkpoint
from nni_cream.genotype import Genotype
from nni_cream.recipe import EvaluationRecipe, RetrainRecipe
from nni_cream.recipe_files import load_recipe
from nni_cream.retrain import retrain
from nni_cream.runs import RunDirectory
from nni_cream.settings import Data
from nni_cream.supernet.depthwise import DepthwiseConv2d, PointwiseConv2d
from nni_cream.training import ImageClassifier
from tests.trainers import LIGHTNINGS_WARNINGS

EDGES = (("sep_conv_3x3", 1), ("skip_connect", 0), ("max_pool_3x3", 0), ("dil_conv_3x3", 2))
GENOTYPE = Genotype(normal=EDGES, normal_concat=(2, 3), reduce=EDGES, reduce_concat=(2, 3))
SPACE = {"channels": 2, "cells": 3, "nodes": 2}
# The head works at 32 pixels only, and is larger than all the rest.
DARTS = {"channels": 4, "cells": 4, "stem": "cifar", "auxiliary": True}
RECIPE: dict[str, Any] = {
    "name": "again",
    "epochs": 1,
    # 145 images to train on.
    "data": {"resolution": 32, "batch_size": 48, "architecture_fraction": 0.05, "validation_fraction": 0.9},
    "optimizer": {"name": "momentum", "lr": 0.05, "weight_decay": 3e-4},
    "schedule": {"name": "cosine", "interval": "epoch"},
    "gradient_clip": 5.0,
    "auxiliary_weight": 0.3,
    "drop_path_rate": 0.25,
    "label_smoothing": 0.05,
    "darts": DARTS,
    "device": {"accelerator": "cpu"},
}

pytestmark = LIGHTNINGS_WARNINGS


@pytest.fixture
def candidate(tmp_path: Path) -> Candidate:
    data = {"name": "digits", "folder": None, "resolution": 8}
    child = Child(GENOTYPE, 10, 0.5, 1, 2, data, {"name": "a", "seed": 0}, space=SPACE)
    network = build_network(str(GENOTYPE), 10, {"kind": "search", **SPACE})
    file = tmp_path / "search" / "child.json"
    child.save(file, network)
    return Candidate(file)


def run(folder: Path, candidate: Candidate, **changes: Any) -> float:
    return retrain(RetrainRecipe.model_validate({**RECIPE, **changes}), candidate, RunDirectory(folder))


class Stopped(Exception):
    """Nothing is trained where only the arrangement is looked at."""


@pytest.fixture
def arranged(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a training is about to be done with."""
    found: dict[str, Any] = {}
    make_trainer = module_under_test.make_trainer

    def watched(*args: Any, **kwargs: Any) -> Any:
        found["trainer"] = trainer = make_trainer(*args, **kwargs)

        def stop(module: Any, training: Any, *_: Any, **__: Any) -> None:
            found.update(module=module, training=training)
            raise Stopped

        trainer.fit = stop
        return trainer

    monkeypatch.setattr(module_under_test, "make_trainer", watched)
    return found


def test_a_genotype_is_trained_and_tested(tmp_path: Path, candidate: Candidate) -> None:
    accuracy = run(tmp_path / "run", candidate)
    stored = json.loads((tmp_path / "run/result.json").read_text())
    assert stored["network"] == str(GENOTYPE)
    assert stored["test_accuracy"] == accuracy
    network = build_network(str(GENOTYPE), 10, {"kind": "trained", **DARTS})
    cost = measure_network(network, 32)
    assert (stored["flops"], stored["params"]) == (cost.macs, cost.params)
    assert (stored["data"]["name"], stored["data"]["resolution"]) == ("digits", 32)

    # What was written is tested with the same result, by what it says of itself.
    file = tmp_path / "run" / "model.safetensors"
    loaded = load_checkpoint(file)
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    assert {name: tensor.shape for name, tensor in loaded.network.state_dict().items()} == shapes
    result = evaluate(EvaluationRecipe.model_validate({"device": {"accelerator": "cpu"}}), file)
    assert (result.top1, result.top5) == (stored["test_accuracy"], stored["test_top5"])
    report = (tmp_path / "run/report.html").read_text()
    assert f"{100 * accuracy:.2f}\u00a0% of the test images" in report

    # The same again trains nothing.
    before = file.stat().st_mtime_ns
    assert run(tmp_path / "run", candidate) == accuracy
    assert file.stat().st_mtime_ns == before


def test_a_folder_that_has_changed_since_the_search_is_told_of(
    tmp_path: Path, arranged: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    def add_images(numbers: range) -> None:
        for name in ("cat", "dog"):
            (tmp_path / "photos" / name).mkdir(parents=True, exist_ok=True)
            for number in numbers:
                Image.new("RGB", (9, 9), number).save(tmp_path / "photos" / name / f"{number}.png")

    add_images(range(10))
    data = Data(name="folder", folder=tmp_path / "photos", resolution=32)
    notes = noted(data, load_data("folder", folder=data.folder, resolution=32))
    path = CreamPath.parse("[0] [0] [1] [2] [3] [0] [0]")
    file = tmp_path / "child.json"
    child = Child(path, 2, 0.5, 1, 2, notes, {"name": "a", "seed": 0})
    child.save(file, build_network(str(path), 2, {}))
    changes = {"data": {"batch_size": 4}, "darts": {}, "auxiliary_weight": 0.0}
    for more, told in ((range(0), False), (range(10, 16), True)):
        add_images(more)
        with pytest.raises(Stopped):
            run(tmp_path / f"run{len(more)}", Candidate(file, ""), **changes)
        assert (f"warning: {tmp_path / 'photos'} has changed since" in capsys.readouterr().err) == told


@pytest.mark.parametrize("clip", [None, 5.0])
def test_settings_reach_trainer_module_and_network(
    tmp_path: Path, candidate: Candidate, arranged: dict[str, Any], clip: float | None
) -> None:
    with pytest.raises(Stopped):
        run(tmp_path / "run", candidate, gradient_clip=clip, drop_rate=0.125)
    assert arranged["trainer"].gradient_clip_val == clip
    assert arranged["trainer"].gradient_clip_algorithm in (None, "norm")
    assert arranged["trainer"].max_epochs == 1
    module = arranged["module"]
    assert isinstance(module, ImageClassifier)
    assert (module.auxiliary_weight, module.drop_path_rate) == (0.3, 0.25)
    assert module.criterion.label_smoothing == 0.05
    assert (module.mixing, module.ema) == (None, None)
    assert module.schedule_arguments["step_on_epochs"]
    assert module.model.head_drop.p == 0.125
    assert len(module.model.cells) == 4
    assert len(arranged["training"].dataset) == 145


def test_mixing_and_averaging_reach_the_module(
    tmp_path: Path, candidate: Candidate, arranged: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(module_under_test, "Mixing", lambda classes, **rest: given.update(classes=classes, **rest))
    mixing = {"mixup": 0.2, "cutmix": 0.7, "prob": 0.9, "switch_prob": 0.4, "off_epoch": 8}
    with pytest.raises(Stopped):
        run(tmp_path / "run", candidate, mixing=mixing, ema={"decay": 0.75, "warmup": False})
    assert given == {"classes": 10, **mixing, "label_smoothing": 0.05}
    ema = arranged["module"].ema
    assert (ema.decay, ema.use_warmup) == (0.75, False)
    assert ema.module is not arranged["module"].model


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Few images of two classes, arranged as ImageNet is."""
    pixels = np.random.default_rng(0)
    for part, count in (("train", 10), ("val", 2)):
        for name in ("n01440764", "n01443537"):
            (tmp_path / "imagenet" / part / name).mkdir(parents=True)
            for number in range(count):
                image = Image.fromarray(pixels.integers(0, 255, (40, 50, 3), dtype=np.uint8))
                image.save(tmp_path / "imagenet" / part / name / f"{name}_{number}.JPEG")
    return tmp_path / "imagenet"


@pytest.mark.parametrize("name", ["retrain_darts_cifar10", "retrain_darts_imagenet"])
def test_the_recipes_of_the_paper_train_a_genotype(
    repository: Path, tmp_path: Path, photographs: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Augmentation, auxiliary head, drop path, optimizer and schedule as shipped; a smaller network, on few images."""
    seen: list[tuple[float, bool, bool]] = []
    step = torch.optim.SGD.step
    networks: list[nn.Module] = []
    set_model = ImageClassifier.set_model

    def watched(self: torch.optim.SGD, closure: Any = None) -> Any:
        loss = step(self, closure)
        gradients = {key: value.grad for key, value in networks[-1].named_parameters()}
        assert all(gradient is not None for gradient in gradients.values())
        norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm().item()
        rates = {part.drop_prob for part in networks[-1].modules() if isinstance(part, DropPath)}
        learns = any(gradient.any() for key, gradient in gradients.items() if "auxiliary" in key)
        seen.append((self.param_groups[0]["lr"], norm <= 5 * 1.001 and learns, rates == {0.0}))
        return loss

    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    monkeypatch.setattr(
        ImageClassifier, "set_model", lambda self, network: (networks.append(network), set_model(self, network))[1]
    )
    data = {"name": "imagenet", "folder": photographs, "workers": 0, "batch_size": 8, "validation_fraction": 0.1}
    overrides = {"epochs": 2, "darts.channels": 16, "darts.cells": 3, "device.accelerator": "cpu"}
    overrides |= {f"data.{key}": value for key, value in data.items()} | {"data.download": False}
    recipe = load_recipe(RetrainRecipe, repository / f"experiments/recipes/{name}.yml", overrides)
    retrain(recipe, Candidate(None, str(GENOTYPE)), RunDirectory(tmp_path / "run"))
    stored = json.loads((tmp_path / "run/result.json").read_text())
    assert stored["network"] == str(GENOTYPE)
    assert 0 <= stored["test_accuracy"] <= 1
    # Two steps an epoch. Half of 0.2 is dropped in the second of two epochs, and nothing on ImageNet.
    rates = {"retrain_darts_cifar10": (0.025, 0.0125), "retrain_darts_imagenet": (0.1, 0.097)}[name]
    still = name == "retrain_darts_imagenet"
    assert [lr for lr, _, _ in seen] == pytest.approx([rates[0], rates[0], rates[1], rates[1]])
    assert [held for _, held, _ in seen] == [True] * 4
    assert [dropless for *_, dropless in seen] == [True, True, still, still]


def test_averaged_and_plain_weights_are_tested_and_kept(
    tmp_path: Path, candidate: Candidate, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(module_under_test.Reporter, "final", lambda _, metrics: told.append(metrics))
    # Weights of early steps have hardly been forgotten, so that the two are far apart.
    changes = {"epochs": 8, "ema": {"decay": 0.95}, "mixing": {"mixup": 0.2}, "drop_path_rate": 0.0}
    accuracy = run(tmp_path / "run", candidate, **changes)
    stored = json.loads((tmp_path / "run/result.json").read_text())
    assert stored["test_accuracy"] == accuracy
    assert stored["test_plain_accuracy"] != accuracy
    names = ("val_accuracy", "val_plain_accuracy", "test_accuracy", "test_plain_accuracy")
    assert {name: told[0][name] for name in names} == {name: stored[name] for name in names}
    assert told[0]["default"] == stored["val_accuracy"]
    plain, average = capsys.readouterr().out.splitlines()[-2:]
    assert plain == f"test accuracy of the plain weights: {stored['test_plain_accuracy']:.4f}"
    assert average == f"test accuracy: {accuracy:.4f}"

    recipe = EvaluationRecipe.model_validate({"device": {"accelerator": "cpu"}})
    file = tmp_path / "run/model.safetensors"
    assert evaluate(recipe, file).top1 == accuracy
    assert evaluate(recipe, file, use_ema=False).top1 == stored["test_plain_accuracy"]
    # Either file by itself is what it is.
    assert evaluate(recipe, file.with_name("model_plain.safetensors")).top1 == stored["test_plain_accuracy"]
    # Told again when NNI starts the trial again, and with both accuracies.
    assert run(tmp_path / "run", candidate, **changes) == accuracy
    assert told[1] == told[0]
    file.with_name("model_plain.safetensors").unlink()
    with pytest.raises(UserError, match=r"There are no plain weights .*model_plain\.safetensors beside the averaged"):
        evaluate(recipe, file, use_ema=False)
    assert evaluate(recipe, file).top1 == accuracy


def test_without_averaging_there_is_one_file_of_weights(tmp_path: Path, candidate: Candidate) -> None:
    run(tmp_path / "run", candidate)
    assert [file.name for file in (tmp_path / "run").glob("*.safetensors")] == ["model.safetensors"]
    stored = json.loads((tmp_path / "run/result.json").read_text())
    recipe = EvaluationRecipe.model_validate({"device": {"accelerator": "cpu"}})
    plain = evaluate(recipe, tmp_path / "run/model.safetensors", use_ema=False)
    assert plain.top1 == stored["test_accuracy"]
    assert not any("plain" in name for name in stored)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_network_is_compiled_as_asked(
    tmp_path: Path, candidate: Candidate, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(nn.Module, "compile", lambda _network, **arguments: asked.append(arguments))
    run(tmp_path, candidate, device={"accelerator": "cpu", "compile": mode}, drop_path_rate=0.0)
    assert asked == [{"mode": mode}]


def test_a_compiled_network_learns_the_same(
    tmp_path: Path, candidate: Candidate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_(network: nn.Module, **_: Any) -> None:
        # All of torch.compile but the code generator, which takes minutes on a CPU.
        network._compiled_call_impl = torch.compile(network._call_impl, backend="aot_eager")

    # Otherwise the convolutions of the two would be rounded differently.
    monkeypatch.setattr(module_under_test, "with_explicit_derivatives", lambda network: network)
    settings = {"drop_path_rate": 0.0, "darts": {**DARTS, "auxiliary": False}, "ema": {"decay": 0.5}}
    expected = run(tmp_path / "plain", candidate, **settings)
    monkeypatch.setattr(nn.Module, "compile", compile_)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert (
        run(tmp_path / "compiled", candidate, device={"accelerator": "cpu", "compile": "default"}, **settings)
        == expected
    )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2
    assert not torch._dynamo.utils.counters["graph_break"]
    plain, compiled = (load_checkpoint(tmp_path / run / "model.safetensors").network for run in ("plain", "compiled"))
    for (name, tensor), other in zip(plain.state_dict().items(), compiled.state_dict().values(), strict=True):
        assert torch.allclose(tensor, other, rtol=1e-3, atol=1e-5), name


def test_gradients_are_clipped_by_their_norm(tmp_path: Path, candidate: Candidate, monkeypatch: Any) -> None:
    """With a limit that every gradient exceeds, every step has exactly that norm."""
    norms = []
    step = torch.optim.SGD.step

    def watched(self: Any, closure: Any = None) -> Any:
        def measured() -> Any:
            loss = closure()
            gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            norms.append(torch.cat([gradient.flatten() for gradient in gradients]).norm().item())
            return loss

        return step(self, measured)

    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    run(tmp_path / "run", candidate, gradient_clip=0.01, darts={**DARTS, "auxiliary": False})
    assert len(norms) == 3
    assert norms == pytest.approx([0.01] * 3, rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"inherit_weights": True}, "inherit_weights is on, but the network that DARTS searches with is another"),
        ({"data": {**RECIPE["data"], "resolution": 16}}, "train with images of 32 or 36 or 40 pixels"),
        ({"data": {**RECIPE["data"], "resolution": None}}, "The auxiliary head needs features of 8 to 10 pixels"),
        ({"darts": {**DARTS, "stem": "imagenet"}}, "The auxiliary head needs features of 7 to 8 pixels, not 1 × 1"),
        ({"data": {**RECIPE["data"], "resolution": 34}}, "needs an even height and width"),
        (
            {"data": {**RECIPE["data"], "resolution": 34}, "darts": {**DARTS, "auxiliary": False}},
            "needs an even height and width",
        ),
        ({"data": {**RECIPE["data"], "batch_size": 200}}, "data.batch_size is 200, but there are 145 images"),
        ({"device": {"compile": "default"}}, "whose drop path rises would be compiled anew in every epoch"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_before_the_folder_is_claimed(
    tmp_path: Path, candidate: Candidate, arranged: dict[str, Any], changes: dict[str, Any], expected: str
) -> None:
    with pytest.raises(UserError) as caught:
        run(tmp_path / "run", candidate, **changes)
    message = str(caught.value)
    assert expected in message
    assert "\n" not in message
    assert message.endswith(".")
    assert not (tmp_path / "run").exists()
    assert "module" not in arranged


def test_looking_whether_the_head_fits_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    network: nn.Module = build_network(str(GENOTYPE), 10, {"kind": "trained", **DARTS}).eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    module_under_test.refuse_resolution(network, 32)
    assert not network.training
    for name, tensor in network.state_dict().items():
        assert tensor.device.type == "cpu"
        assert torch.equal(tensor, before[name]), name


PATHS = [[[0], [choice], [3], [4], [2], [3], [0]] for choice in (0, 1)]


@pytest.fixture
def board(tmp_path: Path) -> Candidate:
    """A path and a runner-up."""
    other = {"path": PATHS[1], "accuracy": 0.4, "flops": 1, "params": 1}
    data = {"name": "digits", "resolution": 32}
    child = Child(CreamPath.of(PATHS[0]), 10, 0.5, 1, 2, data, {"name": "a", "seed": 0}, runners_up=[other])
    file = tmp_path / "board" / "child.json"
    child.save(file, nn.Linear(1, 1))
    return Candidate(file)


@pytest.mark.parametrize("rank", [1, 2])
def test_the_rank_says_which_path_is_trained(
    tmp_path: Path, board: Candidate, arranged: dict[str, Any], rank: int
) -> None:
    with pytest.raises(Stopped):
        run(tmp_path / "run", board, rank=rank)
    wanted = build_network(str(CreamPath.of(PATHS[rank - 1])), 10, {})
    assert {n: t.shape for n, t in arranged["module"].model.state_dict().items()} == {
        name: tensor.shape for name, tensor in wanted.state_dict().items()
    }


@pytest.mark.parametrize("text", [str(CreamPath.of(PATHS[1])), str(GENOTYPE)], ids=["path", "genotype"])
def test_an_architecture_is_trained_by_its_text(tmp_path: Path, arranged: dict[str, Any], text: str) -> None:
    with pytest.raises(Stopped):
        run(tmp_path / "run", Candidate(None, text), data={**RECIPE["data"], "name": "digits"})
    size = {"kind": "trained", **DARTS} if text.startswith("Genotype") else {}
    wanted = build_network(text, 10, size)
    assert arranged["module"].model.state_dict().keys() == wanted.state_dict().keys()


@pytest.mark.parametrize("compile_", ["off", "default"])
def test_derivatives_that_are_faster_on_a_cpu_and_cannot_be_compiled(
    tmp_path: Path, arranged: dict[str, Any], compile_: str
) -> None:
    with pytest.raises(Stopped):
        run(
            tmp_path / "run",
            Candidate(None, str(GENOTYPE)),
            data={**RECIPE["data"], "name": "digits"},
            drop_path_rate=0.0,
            device={"accelerator": "cpu", "compile": compile_},
        )
    kinds = {type(m) for m in arranged["module"].model.modules() if isinstance(m, nn.Conv2d)}
    assert kinds == ({nn.Conv2d, DepthwiseConv2d, PointwiseConv2d} if compile_ == "off" else {nn.Conv2d})


@pytest.mark.parametrize("ema", [{}, {"decay": 0.9}], ids=["plain", "averaged"])
def test_a_training_begins_with_the_inherited_weights(
    tmp_path: Path, board: Candidate, arranged: dict[str, Any], ema: dict[str, Any]
) -> None:
    """And the average with them."""
    assert board.file is not None
    network = build_network(str(CreamPath.of(PATHS[0])), 10, {})
    with torch.no_grad():
        # Statistics are inherited, too.
        network.train()(torch.randn(8, 3, 32, 32))
    Child.load(board.file).save(board.file, network)
    with pytest.raises(Stopped):
        run(tmp_path / "run", board, inherit_weights=True, ema=ema)
    module = arranged["module"]
    found = [module.model] if module.ema is None else [module.model, module.ema.module]
    assert len(found) == 1 + bool(ema)
    expected = load_file(board.file.with_suffix(".safetensors"))
    for state in (model.state_dict() for model in found):
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_there_are_no_weights_of_a_runner_up(tmp_path: Path, board: Candidate) -> None:
    with pytest.raises(UserError, match="keeps the weights of rank 1 alone, and rank is 2"):
        run(tmp_path / "run", board, rank=2, inherit_weights=True)
    with pytest.raises(UserError, match="without a --child of a search there are no weights"):
        run(tmp_path / "run", Candidate(None, "cream_14"), inherit_weights=True)


@pytest.mark.parametrize("threads", [1, 2, None])
def test_it_computes_with_as_many_threads_as_it_is_told(
    tmp_path: Path, board: Candidate, arranged: dict[str, Any], threads: int | None
) -> None:
    before = torch.get_num_threads()
    try:
        with pytest.raises(Stopped):
            run(tmp_path / "run", board, device={"accelerator": "cpu", "threads": threads})
        assert torch.get_num_threads() == (threads or before)
    finally:
        torch.set_num_threads(before)


def test_a_trial_that_nni_starts_again_after_its_end_reports_its_end(
    tmp_path: Path, board: Candidate, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(CreamPath.of(PATHS[0]))
    result = {"network": path, "test_accuracy": 0.5, "val_accuracy": 0.25, "flops": 3, "params": 4, "folder": "f"}
    (tmp_path / "run").mkdir()
    (tmp_path / "run/result.json").write_text(json.dumps(result))
    reported: list[Any] = []
    monkeypatch.setattr(module_under_test.Reporter, "final", lambda _, metrics: reported.append(metrics))
    assert run(tmp_path / "run", board) == 0.5
    # Where it is by now.
    assert f"folder: {tmp_path / 'run'}\n" in capsys.readouterr().out
    assert reported == [
        {"default": 0.25, "val_accuracy": 0.25, "test_accuracy": 0.5, "flops": 3, "params": 4, "network": path}
    ]


# Of the same parameters, so that the checkpoint of one fits the other.
OTHER = Genotype(
    normal=(("sep_conv_3x3", 0), ("skip_connect", 1), *EDGES[2:]),
    normal_concat=(2, 3),
    reduce=EDGES,
    reduce_concat=(2, 3),
)


class TestAnotherTrainingInTheFolder:
    def forget(self, folder: Path) -> None:
        """Leave the folder as it was before it was noted of what a training is."""
        file = folder / "environment.json"
        noted = json.loads(file.read_text())
        del noted["training"]
        file.write_text(json.dumps(noted))

    def train(self, folder: Path, text: str) -> float:
        return run(folder, Candidate(None, text), data={**RECIPE["data"], "name": "digits"})

    @pytest.mark.parametrize("noted", [True, False])
    def test_that_has_ended(self, tmp_path: Path, noted: bool) -> None:
        accuracy = self.train(tmp_path, str(GENOTYPE))
        if not noted:
            self.forget(tmp_path)
        with pytest.raises(UserError) as caught:
            self.train(tmp_path, str(OTHER))
        before, now = (f"{one}{' on digits at 32 pixels' * noted}" for one in (GENOTYPE, OTHER))
        sentence = f"{tmp_path} holds a training of {before}, not of {now}; choose another folder with --name."
        assert str(caught.value) == sentence
        assert self.train(tmp_path, str(GENOTYPE)) == accuracy
        # As one may write it.
        assert self.train(tmp_path, str(GENOTYPE).replace(" ", "")) == accuracy

    def test_that_was_interrupted(self, tmp_path: Path, arranged: dict[str, Any]) -> None:
        with pytest.raises(Stopped):
            self.train(tmp_path, str(GENOTYPE))
        arranged.clear()
        with pytest.raises(UserError, match=r"holds a training of Genotype.*, not of Genotype"):
            self.train(tmp_path, str(OTHER))
        assert not arranged
        with pytest.raises(Stopped):
            self.train(tmp_path, str(GENOTYPE).replace(" ", ""))
        self.forget(tmp_path)
        with pytest.raises(Stopped):
            self.train(tmp_path, str(GENOTYPE))

    def test_by_another_recipe(self, tmp_path: Path, candidate: Candidate) -> None:
        """Also where it has ended."""
        run(tmp_path / "run", candidate)
        with pytest.raises(UserError, match="holds a run of another recipe"):
            run(tmp_path / "run", candidate, epochs=2)

    def test_of_another_child_of_the_same_path(
        self, tmp_path: Path, board: Candidate, arranged: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module_under_test, "_inherit", lambda *_: None)
        assert board.file is not None
        found = json.loads(board.file.read_text())
        others = {
            True: ({**found, "search": {"name": "b", "seed": 1}}, "not of .* with the weights of the child of SHA-256"),
            False: ({**found, "data": {"name": "digits", "resolution": 64}}, "at 32 pixels, not of .* at 64 pixels"),
        }
        for inherit, (content, expected) in others.items():
            # Without weights to inherit it is the data that is the child's.
            data = RECIPE["data"] if inherit else {**RECIPE["data"], "resolution": None}
            folder = tmp_path / f"run{inherit}"
            with pytest.raises(Stopped):
                run(folder, board, inherit_weights=inherit, data=data)
            (tmp_path / "other.json").write_text(json.dumps(content))
            with pytest.raises(UserError, match=expected):
                run(folder, Candidate(tmp_path / "other.json"), inherit_weights=inherit, data=data)
            # The child may have been moved.
            moved = Candidate(board.file.rename(tmp_path / "moved.json"))
            with pytest.raises(Stopped):
                run(folder, moved, inherit_weights=inherit, data=data)
            (tmp_path / "moved.json").rename(board.file)

    def test_of_a_child_that_was_found_on_another_folder(
        self, tmp_path: Path, board: Candidate, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert board.file is not None
        found = json.loads(board.file.read_text())

        def search_on(folder: Path) -> dict[str, Any]:
            data = Data(name="folder", folder=folder, resolution=32)
            notes = noted(data, load_data("folder", folder=folder, resolution=32))
            board.file.write_text(json.dumps({**found, "num_classes": 2, "data": notes}))
            return notes

        for name, classes in (("a", "cat dog"), ("b", "cat dog"), ("c", "cup pot")):
            for one in classes.split():
                (tmp_path / name / one).mkdir(parents=True)
                for number in range(10 + (name == "b")):
                    Image.new("RGB", (9, 9), number).save(tmp_path / name / one / f"{number}.png")
        path = str(CreamPath.of(PATHS[0]))
        result = {"network": path, "test_accuracy": 0.5, "val_accuracy": 0.25, "flops": 3, "params": 4, "folder": "f"}
        ended = {**result, "data": search_on(tmp_path / "a")}
        (tmp_path / "run").mkdir()
        file = tmp_path / "run/result.json"
        file.write_text(json.dumps(ended))
        data = {"data": {"batch_size": 4}}
        assert run(tmp_path / "run", board, **data) == 0.5
        for other in ("b", "c"):
            search_on(tmp_path / other)
            capsys.readouterr()
            with pytest.raises(UserError) as caught:
                run(tmp_path / "run", board, **data)
            assert str(caught.value) == (
                f"{tmp_path / 'run'} holds a training of {path} on {tmp_path / 'a'}, not on {tmp_path / other}; choose "
                "another folder with --name."
            )
            assert capsys.readouterr().out == ""
        # Where the images were not noted, another folder counts as other images.
        (tmp_path / "a").rename(tmp_path / "moved")
        search_on(tmp_path / "moved")
        assert run(tmp_path / "run", board, **data) == 0.5
        file.write_text(json.dumps({**ended, "data": {**ended["data"], "images": None}}))
        with pytest.raises(UserError, match=r"holds a training of .* on .*/a, not on .*/moved; choose"):
            run(tmp_path / "run", board, **data)
