from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from nni_cream.errors import UserError
from nni_cream.models.darts_operations import PAPER_OPERATIONS
from nni_cream.recipe import (
    AnyRecipe,
    ChildData,
    CreamRecipe,
    DartsNetworkSettings,
    DartsRecipe,
    Data,
    EvaluationData,
    EvaluationRecipe,
    Optimizer,
    RetrainRecipe,
    Settings,
    changed_settings,
    dotted_keys,
    load_recipe,
    parse_override,
    to_yaml,
)

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = sorted((ROOT / "experiments" / "recipes").glob("*.yml"))
KINDS: dict[str, type[Settings]] = {
    "search": CreamRecipe,
    "cream": CreamRecipe,
    "uniform": CreamRecipe,
    "darts": DartsRecipe,
    "retrain": RetrainRecipe,
    "test": EvaluationRecipe,
}

DARTS = {"name": "a", "epochs": 30}
SMALLEST = {"name": "a", "epochs": 30, "flops": {"min": 1, "max": 2}}


def kind_of(file: Path) -> type[Settings]:
    return KINDS[file.name.partition("_")[0]]


def write(folder: Path, settings: dict[str, Any]) -> Path:
    file = folder / "wrong.yml"
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return file


def refusal(file: Path, overrides: dict[str, Any] | None = None, kind: type[Settings] = CreamRecipe) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(kind, file, overrides or {})
    return checked_sentence(str(caught.value))


def checked_sentence(message: str) -> str:
    assert "\n" not in message
    assert message[-1] in ".?"
    assert message[-2] not in ".?!"
    return message


class TestShippedRecipes:
    def test_there_are_some(self) -> None:
        assert {kind_of(file) for file in SHIPPED} >= {CreamRecipe, DartsRecipe, RetrainRecipe, EvaluationRecipe}

    @pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
    def test_holds_what_is_written_in_it(self, file: Path) -> None:
        recipe = load_recipe(kind_of(file), file, {})
        written = yaml.safe_load(file.read_text(encoding="utf-8"))
        assert isinstance(recipe, kind_of(file))
        assert _overlaid(recipe.model_dump(mode="json"), written) == recipe.model_dump(mode="json")

    @pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
    def test_begins_with_the_command_that_runs_it(self, file: Path) -> None:
        words = file.read_text(encoding="utf-8").partition("\n")[0].split()
        assert words[:2] == ["#", "python"]
        assert (ROOT / words[2]).is_file()
        assert words[words.index("--recipe") + 1] == str(file.relative_to(ROOT))

    @pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
    def test_survives_being_written(self, file: Path, tmp_path: Path) -> None:
        recipe = load_recipe(kind_of(file), file, {})
        (tmp_path / "again.yml").write_text(to_yaml(recipe), encoding="utf-8")
        assert load_recipe(kind_of(file), tmp_path / "again.yml", {}) == recipe


def shipped(name: str, kind: type[AnyRecipe]) -> AnyRecipe:
    return load_recipe(kind, ROOT / "experiments" / "recipes" / f"{name}.yml", {})


def test_the_uniform_search_is_the_other_one_without_teachers() -> None:
    cream, uniform = (shipped(name, CreamRecipe) for name in ("cream_mnist5k", "uniform_mnist5k"))
    assert (cream.cream.teacher, uniform.cream.teacher, uniform.cream.prior) == ("matching", "none", "even")
    # What is left over is about teachers alone.
    taught = {"teacher": cream.cream.teacher, "meta_interval": 50, "matching_lr": 0.01}
    assert uniform.cream.model_copy(update=taught) == cream.cream
    assert uniform.model_copy(update={"name": cream.name, "cream": cream.cream}) == cream


RETRAININGS = [file for file in SHIPPED if file.name.startswith("retrain_")]


class TestTrainings:
    """What a training is made of can be made of every recipe that is shipped."""

    def test_of_every_kind(self) -> None:
        names = {file.stem.removeprefix("retrain_") for file in RETRAININGS}
        darts = {"darts_cifar10", "darts_imagenet", "darts_mnist5k"}
        assert names >= {"cream_imagenet", "mnist5k", "elpv", "folder"} | darts

    @pytest.mark.parametrize("file", RETRAININGS, ids=lambda file: file.name)
    def test_can_be_built(self, file: Path) -> None:
        import torch
        from timm.optim import create_optimizer_v2
        from timm.scheduler import create_scheduler_v2
        from torch import nn

        from nni_cream.data import load_data
        from nni_cream.data_names import Augmentation
        from nni_cream.mixing import Mixing
        from nni_cream.training import ImageClassifier

        recipe = load_recipe(RetrainRecipe, file, {})
        augmentation = Augmentation(**recipe.data.augmentation.model_dump())
        size = recipe.data.resolution or 32
        image, _ = load_data("digits", resolution=size, augmentation=augmentation).weights[0]
        assert image.shape == (3, size, size)
        assert image.isfinite().all()
        mixing = Mixing(10, **recipe.mixing.model_dump()) if recipe.mixing.wanted else None
        optimizer, schedule = recipe.optimizer.timm_arguments(), recipe.schedule.timm_arguments()
        module = ImageClassifier(10, optimizer, schedule, mixing=mixing, ema=recipe.ema.timm_arguments())
        module.set_model(nn.Linear(3, 10))
        assert (module.ema is not None) == (recipe.ema.decay is not None)
        steps = create_optimizer_v2(module.model, **optimizer)
        scheduler, epochs = create_scheduler_v2(steps, num_epochs=recipe.epochs, updates_per_epoch=10, **schedule)
        assert scheduler is not None
        assert epochs == recipe.epochs
        if mixing is not None:
            number = recipe.data.batch_size
            images, targets = mixing(torch.randn(number, 3, 8, 8), torch.zeros(number, dtype=torch.long), 0)
            assert (images.shape, targets.shape) == ((number, 3, 8, 8), (number, 10))


class TestPublishedSettings:
    """The papers' settings, from their text and their published code."""

    def test_training_of_a_path_on_imagenet(self) -> None:
        from timm.optim import RMSpropTF, create_optimizer_v2
        from timm.scheduler import create_scheduler_v2
        from torch import nn

        recipe = shipped("retrain_cream_imagenet", RetrainRecipe)
        assert (recipe.epochs, recipe.data.batch_size, recipe.data.name) == (500, 8 * 128, "imagenet")
        # That of the search, on which the cost of the child depends.
        assert recipe.data.resolution is None
        assert (recipe.label_smoothing, recipe.drop_rate, recipe.drop_path_rate) == (0.1, 0.2, 0)
        varied = recipe.data.augmentation
        assert (varied.auto_augment, varied.re_prob, varied.re_mode) == ("rand-m9-mstd0.5", 0.2, "pixel")
        assert varied.interpolation == "random"
        assert recipe.ema.timm_arguments() == {"decay": 0.9999, "use_warmup": False}
        assert not recipe.mixing.wanted
        optimizer = create_optimizer_v2(nn.Linear(2, 2), **recipe.optimizer.timm_arguments())
        assert type(optimizer) is RMSpropTF
        decaying, sparing = sorted(optimizer.param_groups, key=lambda group: -group["weight_decay"])
        assert (decaying["weight_decay"], sparing["weight_decay"]) == (1e-5, 0)
        for group in (decaying, sparing):
            assert (group["lr"], group["eps"], group["momentum"]) == (0.064, 1e-3, 0.9)
        scheduler, _ = create_scheduler_v2(optimizer, num_epochs=500, **recipe.schedule.timm_arguments())
        found = [optimizer.param_groups[0]["lr"]]
        for epoch in range(1, 11):
            scheduler.step(epoch)
            found.append(optimizer.param_groups[0]["lr"])
        warmup = [1e-6 + (0.064 - 1e-6) * epoch / 3 for epoch in range(3)]
        # 3 and 4 are in the second stretch of 2.4 epochs, 5 to 7 in the third, 8 and 9 in the fourth, 10 in the fifth.
        falling = [0.064 * 0.973**n for n in (1, 1, 2, 2, 2, 3, 3, 4)]
        assert found == pytest.approx([*warmup, *falling], rel=1e-9)

    def test_search_on_cifar10(self) -> None:
        recipe = shipped("darts_cifar10", DartsRecipe)
        assert (recipe.epochs, recipe.data.batch_size, recipe.data.name) == (50, 64, "cifar10")
        weights = recipe.optimizer
        assert (weights.name, weights.lr, weights.momentum, weights.weight_decay) == ("momentum", 0.025, 0.9, 3e-4)
        assert not weights.filter_bias_and_bn
        assert (recipe.schedule.name, recipe.schedule.interval, recipe.schedule.min_lr) == ("cosine", "epoch", 0.001)
        assert recipe.schedule.warmup_epochs == recipe.darts.warmup_epochs == 0
        alpha = recipe.darts
        assert (alpha.alpha_lr, alpha.alpha_betas, alpha.alpha_weight_decay) == (3e-4, (0.5, 0.999), 1e-3)
        assert (alpha.order, alpha.gradient_clip, alpha.label_smoothing) == ("second", 5, 0)
        assert (recipe.space.channels, recipe.space.cells, recipe.space.nodes, recipe.space.concat) == (16, 8, 4, None)
        assert recipe.space.operations == PAPER_OPERATIONS
        # Half of the images that are not reported on.
        fractions = (recipe.data.architecture_fraction, recipe.data.validation_fraction)
        assert fractions == (0.49, 0.02)
        assert 1 - sum(fractions) == pytest.approx(recipe.data.architecture_fraction)
        varied = recipe.data.augmentation
        assert (varied.crop_padding, varied.hflip, varied.color_jitter, varied.cutout) == (4, 0.5, 0, None)

    def test_training_on_cifar10(self) -> None:
        recipe = shipped("retrain_darts_cifar10", RetrainRecipe)
        assert (recipe.epochs, recipe.data.batch_size, recipe.data.name) == (600, 96, "cifar10")
        weights = recipe.optimizer
        assert (weights.name, weights.lr, weights.momentum, weights.weight_decay) == ("momentum", 0.025, 0.9, 3e-4)
        assert not weights.filter_bias_and_bn
        assert (recipe.schedule.name, recipe.schedule.interval, recipe.schedule.min_lr) == ("cosine", "epoch", 0)
        assert (recipe.gradient_clip, recipe.auxiliary_weight, recipe.drop_path_rate) == (5, 0.4, 0.2)
        assert recipe.label_smoothing == recipe.drop_rate == 0
        varied = recipe.data.augmentation
        assert (varied.crop_padding, varied.hflip, varied.color_jitter, varied.cutout) == (4, 0.5, 0, 16)
        assert recipe.darts.model_dump() == {"channels": 36, "cells": 20, "stem": "cifar", "auxiliary": True}

    def test_training_on_imagenet(self) -> None:
        recipe = shipped("retrain_darts_imagenet", RetrainRecipe)
        assert (recipe.epochs, recipe.data.batch_size, recipe.data.name) == (250, 128, "imagenet")
        assert recipe.data.folder == Path("data/imagenet")
        weights = recipe.optimizer
        assert (weights.name, weights.lr, weights.momentum, weights.weight_decay) == ("momentum", 0.1, 0.9, 3e-5)
        schedule = recipe.schedule
        assert (schedule.name, schedule.interval, schedule.decay_rate) == ("exponential", "epoch", 0.97)
        assert (recipe.gradient_clip, recipe.auxiliary_weight, recipe.label_smoothing) == (5, 0.4, 0.1)
        assert recipe.drop_path_rate == 0
        varied = recipe.data.augmentation
        assert (varied.hflip, varied.color_jitter, varied.auto_augment) == (0.5, (0.4, 0.4, 0.4, 0.2), None)
        assert recipe.darts.model_dump() == {"channels": 48, "cells": 14, "stem": "imagenet", "auxiliary": True}

    @pytest.mark.parametrize("file", [f for f in SHIPPED if f.name.startswith("darts_")], ids=lambda file: file.name)
    def test_spaces_can_be_built(self, file: Path) -> None:
        import torch

        from search_spaces.darts import DartsSpace

        recipe = load_recipe(DartsRecipe, file, {})
        with torch.device("meta"):
            space = DartsSpace(10, **recipe.space.model_dump())
            sizes = [len(cell.edges) for cell in space.cells]
        nodes = recipe.space.nodes
        assert sizes == [sum(range(2, 2 + nodes))] * recipe.space.cells
        assert space.stem[0].weight.shape == (3 * recipe.space.channels, 3, 3, 3)
        assert space.classifier.in_features == 4 * recipe.space.channels * nodes
        if file.stem == "darts_cifar10":
            parameters = sum(parameter.numel() for parameter in space.parameters())
            assert round(parameters / 1e6, 2) == 1.93  # what the published search prints

    @pytest.mark.parametrize(
        ("name", "resolution", "classes", "millions"),
        [("retrain_darts_cifar10", 32, 10, 3.35), ("retrain_darts_imagenet", 224, 1000, 4.72)],
    )
    def test_trained_networks_are_of_the_published_size(
        self, name: str, resolution: int, classes: int, millions: float
    ) -> None:
        import torch

        from nni_cream.child import build_network
        from nni_cream.genotype import PUBLISHED_GENOTYPES

        recipe = shipped(name, RetrainRecipe)
        assert recipe.data.resolution == resolution
        size = {"kind": "trained", **recipe.darts.model_dump()}
        with torch.device("meta"):
            network = build_network(str(PUBLISHED_GENOTYPES["darts_v2"]), classes, size)
            logits, auxiliary = network.train()(torch.empty(2, 3, resolution, resolution))
        assert logits.shape == auxiliary.shape == (2, classes)
        tested = sum(p.numel() for name, p in network.named_parameters() if "auxiliary" not in name)
        assert round(tested / 1e6, 2) == millions

    def test_training_of_what_was_found_on_mnist_has_a_network(self) -> None:
        import torch

        from nni_cream.child import build_network
        from nni_cream.genotype import PUBLISHED_GENOTYPES

        recipe = shipped("retrain_darts_mnist5k", RetrainRecipe)
        size = {"kind": "trained", **recipe.darts.model_dump()}
        with torch.device("meta"):
            network = build_network(str(PUBLISHED_GENOTYPES["darts_v1"]), 10, size)
            resolution = recipe.data.resolution or 32
            assert network.train()(torch.empty(2, 3, resolution, resolution)).shape == (2, 10)


def _overlaid(below: Any, above: Any) -> Any:
    if isinstance(below, dict) and isinstance(above, dict):
        return below | {key: _overlaid(below.get(key), value) for key, value in above.items()}
    return above


class TestWrittenRecipe:
    def test_every_setting_comes_back(self, tmp_path: Path) -> None:
        recipe = CreamRecipe.model_validate(
            {
                **SMALLEST,
                "seed": 2**32 - 1,
                "data": {"folder": "Ordner mit Übergröße", "augmentation": {"scale": (0.5, 1), "hflip": 0.5}},
                "optimizer": {"lr": 1e-7},
                "schedule": {"warmup_lr": 1e-9},
                "cream": {"prior": (0.5, 0.25, 0.25)},
            }
        )
        (tmp_path / "r.yml").write_text(to_yaml(recipe), encoding="utf-8")
        again = load_recipe(CreamRecipe, tmp_path / "r.yml", {})
        assert again == recipe
        assert again.data.folder == Path("Ordner mit Übergröße")
        assert again.cream.prior == (0.5, 0.25, 0.25)
        assert again.schedule.warmup_lr == 1e-9

    def test_names_every_setting(self) -> None:
        def keys(settings: dict[str, Any], prefix: str = "") -> set[str]:
            found = set()
            for name, value in settings.items():
                found |= {prefix + name} | (keys(value, f"{prefix}{name}.") if isinstance(value, dict) else set())
            return found

        recipe = CreamRecipe.model_validate(SMALLEST)
        assert keys(yaml.safe_load(to_yaml(recipe))) == set(dotted_keys(CreamRecipe))


class TestUnknownKeys:
    @pytest.mark.parametrize(
        ("settings", "wrong", "right"),
        [
            ({"epoch": 3}, "epoch", "epochs"),
            ({"optimiser": {"lr": 1}}, "optimiser", "optimizer"),
            ({"lr": 0.1}, "lr", "optimizer.lr"),
            ({"optimizer": {"learning_rate": 1}}, "optimizer.learning_rate", "optimizer.lr"),
            ({"data": {"batchsize": 3}}, "data.batchsize", "data.batch_size"),
            ({"data": {"augmentation": {"hlip": 1}}}, "data.augmentation.hlip", "data.augmentation.hflip"),
            ({"data": {"augmentations": {"hflip": 1}}}, "data.augmentations", "data.augmentation"),
            ({"cream": {"warm_up_epochs": 1}}, "cream.warm_up_epochs", "cream.warmup_epochs"),
        ],
    )
    def test_names_file_key_and_the_nearest_key(
        self, tmp_path: Path, settings: dict[str, Any], wrong: str, right: str
    ) -> None:
        file = write(tmp_path, SMALLEST | settings)
        assert refusal(file) == f"{file}: '{wrong}' is not a setting; did you mean '{right}'?"

    def test_is_named_before_what_else_is_wrong(self, tmp_path: Path) -> None:
        # 'epoch' is also why 'epochs' is missing.
        message = refusal(write(tmp_path, {"name": "a", "epoch": 3, "flops": {"min": 2, "max": 1}}))
        assert "'epoch' is not a setting; did you mean 'epochs'?" in message

    @pytest.mark.parametrize("settings", [{1: 2}, {"data": {1: 2}}])
    def test_that_are_no_text(self, tmp_path: Path, settings: dict[str, Any]) -> None:
        assert "the key 1 should be text." in refusal(write(tmp_path, SMALLEST | settings))

    def test_of_the_other_kind_of_recipe(self, tmp_path: Path) -> None:
        file = write(tmp_path, {"name": "a", "epochs": 1, "flops": {"min": 1, "max": 2}})
        assert "'flops' is not a setting" in refusal(file, kind=RetrainRecipe)


class TestWrongValues:
    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            # Types.
            ({"epochs": "ten"}, "'epochs' is 'ten', but should be a valid integer"),
            ({"epochs": 2.5}, "'epochs' is 2.5, but should be a valid integer"),
            ({"epochs": True}, "epochs: true is not a value for this setting."),
            ({"optimizer": {"lr": True}}, "optimizer.lr: true is not"),
            ({"epochs": None}, "'epochs' is None, but should be"),
            ({"optimizer": 5}, "'optimizer' is 5, but should be a group of settings."),
            ({"data": None}, "'data' is None, but should be a group of settings."),
            ({"data": {"folder": 3}}, "'data.folder' is 3, but should be a path."),
            ({"data": {"download": "maybe"}}, "'data.download' is 'maybe', but should be true or false."),
            ({"data": {"augmentation": {"scale": 3}}}, "'data.augmentation.scale' is 3, but should be a list."),
            ({"data": {"augmentation": {"scale": [1]}}}, "'data.augmentation.scale[1]' is missing."),
            ({"data": {"augmentation": {"scale": [1, 2, 3]}}}, "'data.augmentation.scale' is [1, 2, 3], but should"),
            ({"device": {"precision": 16}}, "'device.precision' is 16, but should be '32-true'"),
            # Ranges.
            ({"epochs": 0}, "'epochs' is 0, but should be greater than 0."),
            ({"seed": -1}, "'seed' is -1, but should be greater than or equal to 0."),
            ({"seed": 2**32}, "'seed' is 4294967296, but should be less than or equal to 4294967295."),
            ({"data": {"resolution": 7}}, "'data.resolution' is 7"),
            ({"data": {"batch_size": 1}}, "'data.batch_size' is 1"),
            ({"data": {"architecture_fraction": 1}}, "'data.architecture_fraction' is 1"),
            ({"data": {"augmentation": {"hflip": 1.5}}}, "'data.augmentation.hflip' is 1.5"),
            ({"data": {"augmentation": {"scale": [0, 3]}}}, "'data.augmentation.scale[0]' is 0"),
            ({"optimizer": {"momentum": 1}}, "'optimizer.momentum' is 1, but should be less than 1."),
            ({"device": {"devices": 0}}, "'device.devices' is 0"),
            # Numbers that are none.
            ({"optimizer": {"lr": float("nan")}}, "'optimizer.lr' is nan, but should be a finite number."),
            ({"optimizer": {"weight_decay": float("inf")}}, "'optimizer.weight_decay' is inf"),
            ({"flops": {"min": float("nan"), "max": 2}}, "'flops.min' is nan"),
            ({"flops": {"min": 1, "max": float("inf")}}, "'flops.max' is inf"),
            ({"cream": {"prior": [1, float("nan")]}}, "'cream.prior[1]' is nan, but should be a finite number."),
            # Settings that do not go together.
            ({"flops": {"min": 3, "max": 2}}, "flops: min is 3, above max 2."),
            ({"latency": {"table": "l.json", "min": 3, "max": 2}}, "latency: min is 3, above max 2."),
            ({"latency": {"table": "l.json"}}, "latency: a table is given, but no max; say how many milliseconds"),
            ({"latency": {"table": "l.json", "min": 1}}, "latency: a table is given, but no max"),
            (
                {"latency": {"max": 2}},
                "latency: max is given, but no table, which says what networks take; measure one",
            ),
            ({"latency": {"min": 2}}, "latency: min is given, but no table"),
            ({"latency": {"table": "l.json", "max": 0}}, "'latency.max' is 0, but should be greater than 0."),
            (
                {"latency": {"table": "l.json", "min": -1, "max": 2}},
                "'latency.min' is -1, but should be greater than or",
            ),
            ({"latency": {"table": 3, "max": 2}}, "'latency.table' is 3, but should be a path."),
            ({"latency": {"milliseconds": 3}}, "'latency.milliseconds' is not a setting; did you mean 'latency."),
            ({"cream": {"warmup_epochs": 30}}, "cream.warmup_epochs is 30"),
            ({"cream": {"board_images": 1}}, "'cream.board_images' is 1, but should be greater than or equal to 2."),
            ({"cream": {"board_images": 33}}, "data.batch_size is 64: make it at most half of that."),
            ({"cream": {"board_images": 33}}, "cream.board_images is 33, but learning to match takes two slices"),
            ({"cream": {"board_images": 65, "teacher": "top1"}}, "data.batch_size is 64: make it at most as much."),
            ({"cream": {"board_images": 65, "teacher": "none"}}, "is 65, but an entry keeps as many images from a b"),
            ({"data": {"batch_size": 7}}, "cream.board_images is 4, but learning to match takes two slices"),
            ({"cream": {"prior": [0, 0]}}, "cream: the prior gives every candidate probability 0."),
            ({"cream": {"prior": []}}, "cream: the prior gives every candidate probability 0."),
            ({"cream": {"prior": [1, -1]}}, "'cream.prior[1]' is -1, but should be greater than or equal to 0."),
            ({"cream": {"prior": "oven"}}, "'cream.prior' is 'oven', but should be 'even' or 'board'."),
            ({"schedule": {"warmup_epochs": 30}}, "schedule.warmup_epochs is 30"),
            ({"schedule": {"min_lr": 0.2}}, "schedule.min_lr is 0.2, above optimizer.lr 0.1."),
            ({"data": {"architecture_fraction": 0.6, "validation_fraction": 0.4}}, "data: architecture_fraction and"),
            ({"optimizer": {"name": "sgd", "momentum": 0}}, "write name: momentum."),
            # Names.
            ({"data": {"name": "mnits"}}, "there is no data set 'mnits'; did you mean 'mnist5k'?"),
            ({"data": {"name": "cifar-100"}}, "there is no data set 'cifar-100'; did you mean 'cifar100'?"),
            ({"name": "a/b"}, "'name' is 'a/b', but should match"),
            ({"name": ".."}, "'name' is '..', but should match"),
            ({"name": ""}, "'name' is '', but should match"),
            ({"name": "a\n"}, "'name' is 'a\\n', but should match"),
            ({"cream": {"teacher": "x"}}, "'cream.teacher' is 'x', but should be 'matching', 'top1' or 'none'."),
            ({"schedule": {"name": "x"}}, "'schedule.name' is 'x', but should be 'linear', 'cosine', 'exponential' or"),
            ({"space": {"resunit": "basic"}}, "'space.resunit' is 'basic', but should be a list."),
            ({"space": {"resunit": True}}, "space.resunit: true is not a value for this setting."),
            (
                {"space": {"resunit": ["basic", "wide"]}},
                "'space.resunit[1]' is 'wide', but should be 'bottleneck' or 'basic'.",
            ),
        ],
        ids=str,
    )
    def test_are_refused_in_a_sentence(self, tmp_path: Path, settings: dict[str, Any], expected: str) -> None:
        file = write(tmp_path, SMALLEST | settings)
        message = refusal(file)
        assert message.startswith(f"{file}: ")
        assert expected in message

    @pytest.mark.parametrize("missing", ["name", "epochs", "flops"])
    def test_missing(self, tmp_path: Path, missing: str) -> None:
        settings = {key: value for key, value in SMALLEST.items() if key != missing}
        file = write(tmp_path, settings)
        assert refusal(file) == f"{file}: the setting '{missing}' is missing."

    @pytest.mark.parametrize(
        "settings",
        [
            {"flops": {"min": 2, "max": 2}},
            {"cream": {"warmup_epochs": 29}},
            {"cream": {"board_images": 32}},
            {"cream": {"board_images": 2}, "data": {"batch_size": 4}},
            {"cream": {"board_images": 64, "teacher": "top1"}},
            {"cream": {"board_images": 64, "teacher": "none"}},
            {"space": {"resunit": ["basic", "bottleneck"]}},
            {"space": {"resunit": []}},
            {"data": {"resolution": None}},
            {"cream": {"prior": [0, 1]}},
            {"schedule": {"warmup_epochs": 29, "min_lr": 0.1}},
            {"optimizer": {"lr": "1e-4"}},  # YAML 1.1 reads 1e-4 as text.
            {"epochs": 30.0},  # What a tuner that draws from a grid sends.
        ],
        ids=str,
    )
    def test_at_the_limit_are_taken(self, tmp_path: Path, settings: dict[str, Any]) -> None:
        load_recipe(CreamRecipe, write(tmp_path, SMALLEST | settings), {})


class TestDarts:
    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            (
                {"darts": {"warmup_epochs": 30}},
                "darts.warmup_epochs is 30, but α learns after it and epochs is 30: make",
            ),
            ({"schedule": {"warmup_epochs": 30}}, "schedule.warmup_epochs is 30"),
            (
                {"optimizer": {"name": "adam"}},
                "optimizer.name is 'adam', but darts.order: second unrolls a step of sgd",
            ),
            ({"optimizer": {"name": "lookahead_sgd"}}, "optimizer.name is 'lookahead_sgd', but darts.order: second"),
            (
                {"device": {"precision": "16-mixed"}, "optimizer": {"execution": "fused"}},
                "optimizer.execution is 'fused', which cannot clip the gradients of device.precision 16-mixed",
            ),
            ({"device": {"compile": "default"}}, "'device.compile' is not a setting"),
            (
                {"device": {"devices": 3}},
                "data.batch_size is 64, but the 3 of device.devices share every batch: make it a multiple of that.",
            ),
            ({"space": {"concat": 5}}, "space.concat is 5, but a cell has space.nodes = 4."),
            ({"space": {"concat": 3, "nodes": 2}}, "space.concat is 3, but a cell has space.nodes = 2."),
            ({"space": {"concat": 0}}, "'space.concat' is 0, but should be greater than 0."),
            ({"space": {"channels": 3}}, "'space.channels' is 3, but should be a multiple of 2."),
            ({"space": {"channels": 0}}, "'space.channels' is 0, but should be greater than or equal to 2."),
            ({"space": {"cells": 2}}, "'space.cells' is 2, but should be greater than or equal to 3."),
            ({"space": {"nodes": 0}}, "'space.nodes' is 0"),
            ({"space": {"operations": "none"}}, "'space.operations' is 'none', but should be a list."),
            ({"space": {"operations": [1]}}, "'space.operations[0]' is 1, but should be a valid string."),
            (
                {"data": {"resolution": 30}},
                "data.resolution is 30, but the two reduction cells halve it twice: make it a",
            ),
            ({"data": {"resolution": None}}, "'data.resolution' is None, but should be"),
            ({"darts": {"order": "third"}}, "'darts.order' is 'third', but should be 'first' or 'second'."),
            ({"darts": {"order": 2}}, "'darts.order' is 2, but should be 'first' or 'second'."),
            ({"darts": {"hypergradient": "x"}}, "'darts.hypergradient' is 'x', but should be 'exact' or 'finite_diff"),
            ({"darts": {"eigenvalue": "x"}}, "'darts.eigenvalue' is 'x', but should be 'off', 'track', 'stop' or"),
            ({"darts": {"eigenvalue": True}}, "darts.eigenvalue: true is not a value for this setting."),
            ({"darts": {"radius": 0}}, "'darts.radius' is 0, but should be greater than 0."),
            ({"darts": {"warmup_epochs": -1}}, "'darts.warmup_epochs' is -1"),
            ({"darts": {"alpha_lr": -0.1}}, "'darts.alpha_lr' is -0.1, but should be greater than 0."),
            ({"darts": {"alpha_betas": [0.5]}}, "'darts.alpha_betas[1]' is missing."),
            ({"darts": {"alpha_betas": [0.5, 1]}}, "'darts.alpha_betas[1]' is 1, but should be less than 1."),
            ({"darts": {"alpha_betas": 0.5}}, "'darts.alpha_betas' is 0.5, but should be a list."),
            ({"darts": {"alpha_weight_decay": -1}}, "'darts.alpha_weight_decay' is -1"),
            ({"darts": {"gradient_clip": 0}}, "'darts.gradient_clip' is 0, but should be greater than 0."),
            ({"darts": {"label_smoothing": 1}}, "'darts.label_smoothing' is 1, but should be less than 1."),
            ({"darts": {"stop_above_skips": -1}}, "'darts.stop_above_skips' is -1"),
            ({"darts": {"skip_limit": 1.5}}, "'darts.skip_limit' is 1.5, but should be a valid integer"),
            ({"darts": {"flops_target": 0}}, "'darts.flops_target' is 0, but should be greater than 0."),
            ({"darts": {"flops_target": float("inf")}}, "'darts.flops_target' is inf, but should be a finite number."),
            ({"darts": {"flops_weight": -2}}, "'darts.flops_weight' is -2"),
            ({"darts": {"arch_lr": 1}}, "'darts.arch_lr' is not a setting; did you mean 'darts.alpha_lr'?"),
            ({"space": {"layers": 8}}, "'space.layers' is not a setting; did you mean 'space."),
            ({"cream": {}}, "'cream' is not a setting; did you mean"),
            ({"flops": {"min": 1, "max": 2}}, "'flops' is not a setting; did you mean 'darts.flops_"),
            # What other recipes have as well.
            ({"schedule": {"interval": "batch"}}, "'schedule.interval' is 'batch', but should be 'step' or 'epoch'."),
            ({"schedule": {"decay_rate": 0}}, "'schedule.decay_rate' is 0, but should be greater than 0."),
            ({"schedule": {"decay_rate": 1.1}}, "'schedule.decay_rate' is 1.1, but should be less than or equal to 1."),
            (
                {"optimizer": {"filter_bias_and_bn": "maybe"}},
                "'optimizer.filter_bias_and_bn' is 'maybe', but should be",
            ),
            (
                {"data": {"augmentation": {"cutout": 0}}},
                "'data.augmentation.cutout' is 0, but should be greater than 0.",
            ),
            ({"data": {"augmentation": {"crop_padding": -4}}}, "'data.augmentation.crop_padding' is -4"),
            ({"data": {"augmentation": {"crop_padding": True}}}, "data.augmentation.crop_padding: true is not a value"),
        ],
        ids=str,
    )
    def test_what_cannot_be_is_refused_in_a_sentence(
        self, tmp_path: Path, settings: dict[str, Any], expected: str
    ) -> None:
        file = write(tmp_path, DARTS | settings)
        message = refusal(file, kind=DartsRecipe)
        assert message.startswith(f"{file}: ")
        assert expected in message

    @pytest.mark.parametrize(
        "settings",
        [
            {"darts": {"warmup_epochs": 29}},
            {"darts": {"order": "first"}, "optimizer": {"name": "adam"}},
            *({"optimizer": {"name": name}} for name in ("sgd", "momentum", "nesterov", "SGD")),
            {"device": {"precision": "bf16-mixed"}, "optimizer": {"execution": "foreach"}},
            {"device": {"precision": "32-true"}, "optimizer": {"execution": "fused"}},
            {"device": {"precision": "16-mixed"}, "optimizer": {"execution": "foreach"}},
            {"space": {"concat": 4, "channels": 2, "cells": 3}},
            {"data": {"resolution": 36}},
            {"darts": {"gradient_clip": None, "flops_target": None, "skip_limit": 0, "stop_above_skips": 0}},
            {"darts": {"eigenvalue": "off"}},
        ],
        ids=str,
    )
    def test_what_is_at_the_limit_is_taken(self, tmp_path: Path, settings: dict[str, Any]) -> None:
        load_recipe(DartsRecipe, write(tmp_path, DARTS | settings), {})

    def test_a_word_that_yaml_reads_as_false_is_a_word(self, tmp_path: Path) -> None:
        (tmp_path / "r.yml").write_text("name: a\nepochs: 1\ndarts: {eigenvalue: off}\n")
        assert load_recipe(DartsRecipe, tmp_path / "r.yml", {}).darts.eigenvalue == "off"
        overrides = dict([parse_override("darts.eigenvalue=off")])
        assert overrides == {"darts.eigenvalue": False}
        recipe = load_recipe(DartsRecipe, write(tmp_path, {**DARTS, "darts": {"eigenvalue": "track"}}), overrides)
        assert recipe.darts.eigenvalue == "off"

    def test_the_optimizers_that_are_unrolled_are_torchs_sgd(self) -> None:
        import timm.optim
        import torch
        from torch import nn

        for name in timm.optim.list_optimizers():
            try:
                DartsRecipe.model_validate({**DARTS, "optimizer": {"name": name}})
            except ValueError:
                continue
            built = timm.optim.create_optimizer_v2(nn.Linear(1, 1), **Optimizer(name=name).timm_arguments())
            assert type(built) is torch.optim.SGD
            assert built.defaults["nesterov"] == (name != "momentum")

    def test_no_setting_is_unknown_to_the_strategy_or_the_space(self) -> None:
        import inspect

        import torch

        from nni_cream.models.darts import DartsNetwork
        from nni_cream.strategies.darts import DartsStrategy
        from search_spaces.darts import DartsSpace

        recipe = DartsRecipe.model_validate(DARTS)

        def defaults(kind: type) -> dict[str, Any]:
            return {name: parameter.default for name, parameter in inspect.signature(kind).parameters.items()}

        # NNI wraps it in a class that takes anything.
        strategy, network = defaults(DartsStrategy.__wrapped__), defaults(DartsNetwork)
        for name, value in recipe.darts.model_dump().items():
            assert strategy[name] == value, name
        assert set(strategy) - set(recipe.darts.model_dump()) == {"reporting_dataloader", "mutation_hooks"}
        with torch.device("meta"):
            ours, theirs = DartsSpace(10, **recipe.space.model_dump()), DartsSpace(10)
        assert [(n, p.shape) for n, p in ours.named_parameters()] == [
            (n, p.shape) for n, p in theirs.named_parameters()
        ]
        assert (ours.operations, ours.concat) == (theirs.operations, theirs.concat)
        assert set(DartsNetworkSettings.model_fields) < set(network)

    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            ({"darts": {"cells": 2}}, "'darts.cells' is 2, but should be greater than or equal to 3."),
            ({"darts": {"channels": 5}}, "'darts.channels' is 5, but should be a multiple of 2."),
            ({"darts": {"stem": "mnist"}}, "'darts.stem' is 'mnist', but should be 'cifar' or 'imagenet'."),
            ({"darts": {"order": "first"}}, "'darts.order' is not a setting; did you mean 'darts."),
            ({"gradient_clip": 0}, "'gradient_clip' is 0, but should be greater than 0."),
            ({"auxiliary_weight": -0.4}, "'auxiliary_weight' is -0.4"),
            ({"drop_path_rate": 1}, "'drop_path_rate' is 1, but should be less than 1."),
            ({"drop_path_rate": -0.1}, "'drop_path_rate' is -0.1"),
            ({"ema": {"decay": 1}}, "'ema.decay' is 1, but should be less than 1."),
            ({"ema": {"decay": 0}}, "'ema.decay' is 0, but should be greater than 0."),
            ({"ema": {"decay": True}}, "ema.decay: true is not a value for this setting."),
            ({"ema": {"warmup": "maybe"}}, "'ema.warmup' is 'maybe', but should be true or false"),
            ({"ema": None}, "'ema' is None, but should be a group of settings."),
            ({"ema_decay": 0.9}, "'ema_decay' is not a setting; did you mean 'ema.decay'?"),
            ({"mixing": {"mixup": -1}}, "'mixing.mixup' is -1, but should be greater than or equal to 0."),
            ({"mixing": {"cutmix": float("nan")}}, "'mixing.cutmix' is nan, but should be a finite number."),
            ({"mixing": {"prob": 1.5}}, "'mixing.prob' is 1.5, but should be less than or equal to 1."),
            ({"mixing": {"switch_prob": -1}}, "'mixing.switch_prob' is -1"),
            ({"mixing": {"mixup": 1, "off_epoch": 0}}, "'mixing.off_epoch' is 0, but should be greater than 0."),
            (
                {"mixing": {"off_epoch": 3}},
                "mixing: off_epoch is 3, but with mixup and cutmix of 0 nothing is mixed: give one of them.",
            ),
            (
                {"mixing": {"mixup": 0.2}, "data": {"batch_size": 33}},
                "data.batch_size is 33, but mixing.mixup and mixing.cutmix take the images of a batch in pairs: make",
            ),
            ({"mixing": {"cutmix": 1}, "data": {"batch_size": 33}}, "data.batch_size is 33, but mixing.mixup and"),
            ({"schedule": {"decay_epochs": 0}}, "'schedule.decay_epochs' is 0, but should be greater than 0."),
            ({"optimizer": {"eps": 0}}, "'optimizer.eps' is 0, but should be greater than 0."),
        ],
        ids=str,
    )
    def test_a_training_that_cannot_be_is_refused(
        self, tmp_path: Path, settings: dict[str, Any], expected: str
    ) -> None:
        assert expected in refusal(write(tmp_path, DARTS | settings), kind=RetrainRecipe)

    @pytest.mark.parametrize(
        "settings",
        [
            {"data": {"batch_size": 33}},
            # Two processes have 3 images each, and mix the 6 that they share.
            {"data": {"batch_size": 6}, "device": {"devices": 2}, "mixing": {"mixup": 0.2}},
            {"mixing": {"cutmix": 1, "off_epoch": 300}},
            {"ema": {"decay": None}},
            {"ema": {"decay": 0.9999, "warmup": False}},
        ],
        ids=str,
    )
    def test_a_training_at_the_limit_is_taken(self, tmp_path: Path, settings: dict[str, Any]) -> None:
        load_recipe(RetrainRecipe, write(tmp_path, DARTS | settings), {})


class TestNesterov:
    def test_refuses_what_torch_refuses(self) -> None:
        import timm.optim
        from torch import nn

        def fails_in_torch(name: str) -> bool:
            try:
                timm.optim.create_optimizer_v2(nn.Linear(1, 1), **(settings | {"opt": name}))
            except ValueError as error:
                assert "Nesterov" in str(error)  # noqa: PT017 (others would be new to us)
                return True
            except AssertionError as error:
                assert "CUDA required" in str(error)  # noqa: PT017
            return False

        settings = Optimizer(name="momentum", momentum=0).timm_arguments()
        # timm lists neither its aliases nor the wrapper.
        names = [*timm.optim.list_optimizers(), "nesterov", "nesterovw", "SGD", "lookahead_sgd", "lookahead_adam"]
        refused = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Of packages that some optimizers would like to have.
            expected = {name for name in names if fails_in_torch(name)}
            for name in names:
                try:
                    Optimizer(name=name, momentum=0)
                except ValueError as error:
                    refused[name] = str(error)
            assert set(refused) == expected
            assert {"sgd", "nesterov", "lookahead_sgd"} <= expected
            assert all("write name: momentum" in message for message in refused.values())
            assert not fails_in_torch("momentum")

    def test_with_momentum_is_taken(self) -> None:
        assert Optimizer(name="sgd", momentum=0.1).timm_arguments()["opt"] == "sgd"


class TestFiles:
    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            (b"name: [", "is not valid YAML"),
            (b"name: a\n  epochs: 3", "is not valid YAML"),
            (b"a\0b", "is not valid YAML"),
            (b"name: a\nepochs: 3\nname: b", "is not valid YAML: 'name' stands in lines 1 and 3; leave one out."),
            (b"data:\n  name: a\n  name: a", "is not valid YAML: 'name' stands in lines 2 and 3; leave one out."),
            (b"data: {name: a, 'name': b}", "'name' stands in lines 1 and 1"),
            (b"name: " + b"[" * 5000, "is not valid YAML"),
            (b"name: !!python/object/apply:os.system [ls]", "is not valid YAML"),
            (b"seed: 2020-13-45", "is not valid YAML"),  # PyYAML takes it for a date.
            (b"", "should be a YAML mapping of settings"),
            (b"# nothing but a comment", "should be a YAML mapping of settings"),
            (b"- a\n- b", "should be a YAML mapping of settings"),
            (b"epochs", "should be a YAML mapping of settings"),
            (b"name: \xff", "cannot be read"),
        ],
    )
    def test_that_are_no_recipe(self, tmp_path: Path, content: bytes, expected: str) -> None:
        file = tmp_path / "wrong.yml"
        file.write_bytes(content)
        message = refusal(file)
        assert message.startswith(f"The recipe {file} ")
        assert expected in message

    def test_that_are_missing(self, tmp_path: Path) -> None:
        message = refusal(tmp_path / "none.yml")
        assert message == f"There is no recipe {tmp_path / 'none.yml'}; those shipped are in experiments/recipes/."

    def test_that_are_folders(self, tmp_path: Path) -> None:
        assert refusal(tmp_path).startswith(f"The recipe {tmp_path} cannot be read: ")


class TestOverrides:
    def test_replace_what_the_file_says(self, tmp_path: Path) -> None:
        file = write(tmp_path, SMALLEST | {"optimizer": {"lr": 0.5, "momentum": 0.8}})
        recipe = load_recipe(
            CreamRecipe,
            file,
            {"optimizer.lr": 0.2, "data.augmentation.hflip": 0.5, "cream.prior": [1, 2], "epochs": 40},
        )
        assert (recipe.optimizer.lr, recipe.optimizer.momentum) == (0.2, 0.8)
        assert recipe.data.augmentation.hflip == 0.5
        assert recipe.cream.prior == (1, 2)
        assert recipe.epochs == 40

    def test_may_replace_a_group(self, tmp_path: Path) -> None:
        file = write(tmp_path, SMALLEST | {"optimizer": {"lr": 0.5, "momentum": 0.8}})
        assert load_recipe(CreamRecipe, file, {"optimizer": {"lr": 0.2}}).optimizer == Optimizer(lr=0.2)

    @pytest.mark.parametrize(
        ("wrong", "right"),
        [
            ("optimizer.l", "optimizer.lr"),
            ("lr", "optimizer.lr"),
            ("optimizr.lr", "optimizer.lr"),
            ("data.name.x", "data.name"),
            ("batch_size", "data.batch_size"),
        ],
    )
    def test_of_an_unknown_key(self, tmp_path: Path, wrong: str, right: str) -> None:
        message = refusal(write(tmp_path, SMALLEST), {wrong: 1})
        assert message == f"'{wrong}' is not a setting; did you mean '{right}'?"

    @pytest.mark.parametrize(
        ("overrides", "group"),
        [
            ({"data": 5, "data.folder": "x"}, "data"),
            ({"data.augmentation": 5, "data.augmentation.hflip": 1}, "data.augmentation"),
        ],
    )
    def test_of_a_member_of_what_is_no_group_any_more(
        self, tmp_path: Path, overrides: dict[str, Any], group: str
    ) -> None:
        message = refusal(write(tmp_path, SMALLEST), overrides)
        assert (
            message
            == f"'{list(overrides)[-1]}' cannot be set because '{group}' is not a group of settings in the recipe."
        )

    def test_with_a_wrong_value(self, tmp_path: Path) -> None:
        assert "'optimizer.lr' is -1, but should be greater than 0." in refusal(
            write(tmp_path, SMALLEST), {"optimizer.lr": -1}
        )

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("data.folder=null", ("data.folder", None)),
            ("data.folder=", ("data.folder", None)),
            ("cream.prior=[1, 2.5]", ("cream.prior", [1, 2.5])),
            ("data.download=true", ("data.download", True)),
            ("optimizer.lr=0.2", ("optimizer.lr", 0.2)),
            ("data.folder=/a=b", ("data.folder", "/a=b")),
            (" epochs = 3", ("epochs", 3)),
            ("optimizer={lr: 0.2}", ("optimizer", {"lr": 0.2})),
        ],
    )
    def test_on_the_command_line_are_yaml(self, text: str, expected: tuple[str, Any]) -> None:
        assert parse_override(text) == expected

    @pytest.mark.parametrize("text", ["epochs", "=3", " =3", "epochs=[", "seed=2020-13-45"])
    def test_on_the_command_line_that_are_none(self, text: str) -> None:
        with pytest.raises(UserError) as caught:
            parse_override(text)
        assert repr(text) in checked_sentence(str(caught.value))


class TestDataOfASearch:
    def test_takes_the_resolution_that_follows_from_the_interval(self, tmp_path: Path) -> None:
        file = write(tmp_path, SMALLEST | {"data": {"name": "digits", "resolution": 48, "workers": 3, "folder": "a"}})
        assert load_recipe(CreamRecipe, file, {}).data.resolution == 48
        recipe = load_recipe(CreamRecipe, file, dict([parse_override("data.resolution=null")]))
        assert recipe.data.resolution is None
        assert recipe.data.at(96) == Data(name="digits", resolution=96, workers=3, folder=Path("a"))
        (tmp_path / "written.yml").write_text(to_yaml(recipe), encoding="utf-8")
        assert load_recipe(CreamRecipe, tmp_path / "written.yml", {}) == recipe

    def test_is_the_only_one_without_a_resolution(self) -> None:
        with pytest.raises(ValueError, match="resolution"):
            Data.model_validate({"resolution": None})
        with pytest.raises(ValueError, match="resolution"):
            CreamRecipe.model_validate({**SMALLEST, "data": {"resolution": None}}).data.at(4)
        for inheriting in (ChildData(resolution=None), EvaluationData(resolution=None)):
            assert inheriting.completed({}).resolution == 32
            assert inheriting.completed({"resolution": 48}).resolution == 48


class TestDataOfAChild:
    @pytest.fixture
    def searched(self) -> dict[str, Any]:
        data = Data(name="folder", folder=Path("/images"), resolution=48, batch_size=16, validation_fraction=0.3)
        return data.model_dump(mode="json")

    def test_takes_data_set_and_resolution_from_the_search_and_nothing_else(self, searched: dict[str, Any]) -> None:
        assert ChildData().completed(searched) == Data(name="folder", folder=Path("/images"), resolution=48)

    def test_keeps_what_the_recipe_gives(self, searched: dict[str, Any]) -> None:
        given = ChildData(resolution=64, batch_size=8, folder=Path("/others"))
        assert given.completed(searched) == Data(name="folder", folder=Path("/others"), resolution=64, batch_size=8)

    def test_takes_the_folder_only_for_the_same_data_set(self, searched: dict[str, Any]) -> None:
        assert ChildData(name="folder").completed(searched).folder == Path("/images")
        assert ChildData(name="digits").completed(searched) == Data(name="digits", folder=None, resolution=48)
        other = ChildData(name="imagenet", folder=Path("/imagenet"))
        assert other.completed(searched).folder == Path("/imagenet")

    def test_without_a_search_is_the_default(self) -> None:
        assert ChildData().completed({}) == Data()

    @pytest.mark.parametrize("searched", [{"name": "mnits"}, {"resolution": "large"}, {"folder": 3}])
    def test_of_a_search_that_makes_no_sense(self, searched: dict[str, Any]) -> None:
        with pytest.raises(UserError, match=str(next(iter(searched.values())))) as caught:
            ChildData().completed(searched)
        assert checked_sentence(str(caught.value)).startswith("The data settings of the search: ")


class TestDataOfACheckpoint:
    @pytest.fixture
    def stored(self) -> dict[str, Any]:
        data = Data(
            name="cifar10",
            folder=Path("/images"),
            download=True,
            resolution=48,
            batch_size=16,
            validation_fraction=0.3,
            augmentation={"interpolation": "bicubic", "hflip": 0.5},
        )
        return data.model_dump(mode="json")

    def test_is_what_is_stored_in_it(self, stored: dict[str, Any]) -> None:
        assert EvaluationData().completed(stored) == Data.model_validate({**stored, "download": False})

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("folder", Path("/others")),
            ("download", True),
            ("resolution", 64),
            ("batch_size", 8),
            ("workers", 2),
        ],
    )
    def test_keeps_what_the_recipe_gives(self, stored: dict[str, Any], key: str, value: Any) -> None:
        completed = EvaluationData.model_validate({key: value}).completed(stored)
        assert getattr(completed, key) == value
        assert completed == EvaluationData().completed(stored).model_copy(update={key: value})

    def test_keeps_how_the_recipe_resizes(self, stored: dict[str, Any]) -> None:
        given = EvaluationData.model_validate({"augmentation": {"interpolation": "bilinear"}})
        assert given.completed(stored).augmentation.interpolation == "bilinear"

    def test_takes_the_folder_only_for_the_same_data_set(self, stored: dict[str, Any]) -> None:
        assert EvaluationData(name="cifar10").completed(stored).folder == Path("/images")
        other = EvaluationData(name="cifar100").completed(stored)
        assert (other.name, other.folder, other.resolution) == ("cifar100", None, 48)

    @pytest.mark.parametrize("stored", [{"name": "mnits"}, {"resolution": "large"}, {"colour": "blue"}])
    def test_that_makes_no_sense(self, stored: dict[str, Any]) -> None:
        with pytest.raises(UserError, match=r"mnits|large|colour") as caught:
            EvaluationData().completed(stored)
        assert checked_sentence(str(caught.value)).startswith("The data settings of the checkpoint: ")

    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            ({"data": {"name": "mnits"}}, "did you mean 'mnist5k'?"),
            ({"data": {"validation_fraction": 0.2}}, "'data.validation_fraction' is not a setting"),
            ({"data": {"augmentation": {"interpolation": "random"}}}, "'data.augmentation.interpolation' is 'random'"),
            ({"device": {"devices": 2}}, "device.devices is 2, but a checkpoint is tested on one device."),
            ({"epochs": 3}, "'epochs' is not a setting"),
        ],
        ids=str,
    )
    def test_is_checked_as_soon_as_the_recipe_is_read(
        self, tmp_path: Path, settings: dict[str, Any], expected: str
    ) -> None:
        assert expected in refusal(write(tmp_path, settings), kind=EvaluationRecipe)


def test_checking_a_recipe_imports_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from nni_cream import cli, runs\n"
        "from nni_cream.recipe import CreamRecipe, load_recipe\n"
        f"load_recipe(CreamRecipe, Path({str(ROOT / 'experiments/recipes/cream_mnist5k.yml')!r}), {{'epochs': 99}})\n"
        "heavy = {'torch', 'nni', 'timm', 'torchvision', 'pytorch_lightning', 'torchmetrics', 'sklearn'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


class TestChangedSettings:
    def test_are_none_where_only_what_has_to_be_given_is_given(self) -> None:
        recipe = CreamRecipe.model_validate({"name": "a", "epochs": 30, "flops": {"min": 1, "max": 2}})
        assert changed_settings(recipe) == {}

    def test_are_named_with_value_and_default(self) -> None:
        recipe = DartsRecipe.model_validate(
            {
                "name": "a",
                "epochs": 3,
                "seed": 7,
                "data": {"resolution": 16, "augmentation": {"hflip": 0.5}, "name": "mnist5k"},
                "space": {"operations": ["none", "skip_connect"]},
                "optimizer": {"name": "momentum"},
                "darts": {"eigenvalue": "track", "alpha_betas": [0.5, 0.999]},
            }
        )
        changed = changed_settings(recipe)
        assert changed.pop("space.operations")[0] == ("none", "skip_connect")
        assert changed == {
            "seed": (7, 0),
            "data.resolution": (16, 32),
            "data.augmentation.hflip": (0.5, None),
            "optimizer.name": ("momentum", "sgd"),
            "darts.eigenvalue": ("track", "off"),
        }

    @pytest.mark.parametrize("kind", [CreamRecipe, DartsRecipe, RetrainRecipe, EvaluationRecipe])
    def test_have_keys_that_can_be_set(self, kind: type[Settings]) -> None:
        required = {"name": "a", "epochs": 30, "flops": {"min": 1, "max": 2}}
        given = {key: value for key, value in required.items() if key in kind.model_fields}
        recipe = kind.model_validate({**given, "device": {"threads": 3}})
        assert changed_settings(recipe) == {"device.threads": (3, None)}
        assert set(changed_settings(recipe)) <= set(dotted_keys(kind))
