from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from nni_cream.models.darts_operations import PAPER_OPERATIONS
from nni_cream.recipe import CreamRecipe, DartsRecipe, EvaluationRecipe, RetrainRecipe
from nni_cream.recipe_files import AnyRecipe, dotted_keys, load_recipe, parse_override, to_yaml
from nni_cream.settings import DartsNetworkSettings, Optimizer
from tests.recipes import DARTS, ROOT, SHIPPED, SMALLEST, kind_of, refusal, write


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


def test_checking_a_recipe_imports_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from nni_cream import cli, runs\n"
        "from nni_cream.recipe import CreamRecipe\n"
        "from nni_cream.recipe_files import load_recipe\n"
        f"load_recipe(CreamRecipe, Path({str(ROOT / 'experiments/recipes/cream_mnist5k.yml')!r}), {{'epochs': 99}})\n"
        "heavy = {'torch', 'nni', 'timm', 'torchvision', 'pytorch_lightning', 'torchmetrics', 'sklearn'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
