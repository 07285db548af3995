"""DartsStrategy among NNI's: evaluators, experiments, hooks, precisions, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nni
import nni.nas.nn.pytorch as nas
import pytest
import torch
from nni.nas.evaluator import FunctionalEvaluator
from nni.nas.evaluator.pytorch import Classification, DataLoader
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.space import RawFormatModelSpace
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from nni_cream.errors import UserError
from nni_cream.genotype import Genotype
from nni_cream.strategies.darts import DartsStrategy
from tests.strategies.darts.forcing import genotype_of
from tests.strategies.darts.searches import (
    ALPHA_BATCH,
    CLASSES,
    FOR_ALPHA,
    HELD_OUT,
    LEARNING_RATE,
    TRAIN_BATCH,
    TRAINING,
    Search,
    Space,
    cells,
    cheap,
    differs,
)
from tests.strategies.running import SMALL_RUNS
from tests.trainers import QUIET

pytestmark = SMALL_RUNS


def test_no_epochs_no_result() -> None:
    search = Search(epochs=0).run()
    assert not search.reports
    assert not search.final


def test_hooks_of_the_user_come_first() -> None:
    seen: list[str] = []

    def keep(module: nn.Module, name: str, memo: Any, arguments: Any) -> bool:
        seen.append(name)
        return name.startswith("first")

    search = Search(epochs=1, mutation_hooks=[keep])
    supernet = search.strategy.mutate_model(Space())
    assert {"stem", "first", "second"} <= set(seen)
    assert type(supernet.first) is nas.LayerChoice
    assert type(supernet.second) is not nas.LayerChoice


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_other_precisions(precision: str) -> None:
    torch.set_default_dtype(torch.float32)
    images, labels = TRAINING.tensors
    loader = DataLoader(TensorDataset(images.float(), labels), batch_size=TRAIN_BATCH)
    for hypergradient in ("exact", "finite_difference"):
        search = Search(
            training=loader,
            for_alpha=loader,
            epochs=1,
            trainer={"precision": precision},
            hypergradient=hypergradient,
            flops_target=cheap(),
            eigenvalue="track",
        ).run()
        assert differs(search.steps[0].alphas, search.alphas)
        assert all(torch.isfinite(parameter).all() for parameter in search.module.parameters())
        assert all(value == value for value in search.reports[0].values())


class WithMutable(nas.ModelSpace):
    def __init__(self, mutable: Callable[[], Any]) -> None:
        super().__init__()
        self.layer = nas.LayerChoice([nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 3, padding=1)], label="fine")
        self.odd = mutable()

    def forward(self, images: Tensor) -> Tensor:
        return self.odd(self.layer(images)).mean((2, 3))


class TestUserErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"order": "Second"}, "order is 'Second', but should be 'first' or 'second'."),
            (
                {"hypergradient": "exakt"},
                "hypergradient is 'exakt', but should be 'exact' or 'finite_difference'.",
            ),
            ({"execution": "fuse"}, "execution is 'fuse', but should be 'fused' or 'textbook'."),
            (
                {"eigenvalue": "watch"},
                "eigenvalue is 'watch', but should be 'off', 'track', 'stop' or 'rollback'.",
            ),
            ({"radius": 0}, "radius is 0, but should be above 0."),
            ({"warmup_epochs": -1}, "warmup_epochs is -1, but should be at least 0."),
        ],
    )
    def test_arguments_out_of_range(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError) as refused:
            DartsStrategy(**arguments)
        assert str(refused.value) == message

    @pytest.mark.parametrize(
        "mutable",
        [
            lambda: nas.InputChoice(3, n_chosen=None, label="odd"),
            lambda: nas.InputChoice(3, n_chosen=1, reduction="concat", label="odd"),
            lambda: nas.Repeat(nn.Conv2d(3, 3, 1), (1, 3), label="odd"),
            lambda: nas.MutableConv2d(3, nni.choice("odd", [3, 6]), 1),
        ],
        ids=["any number", "concat", "repeat", "value"],
    )
    def test_choice_that_cannot_be_relaxed(self, mutable: Callable[[], Any]) -> None:
        search = Search(lambda: WithMutable(mutable))
        with pytest.raises(UserError, match=r"'odd'.*cannot be searched by DartsStrategy, .* a sum or mean"):
            search.run()
        assert not search.steps

    def test_choice_of_the_space_itself(self) -> None:
        class WithWidth(Space):
            def __init__(self) -> None:
                super().__init__()
                self.add_mutable(nni.choice("width", [1, 2]))

        search = Search(WithWidth)
        with pytest.raises(UserError, match=r"The choice 'width' \(WithWidth 'model'\) cannot be searched by DartsS"):
            search.run()
        assert not search.steps

    @pytest.mark.parametrize(
        "loaders",
        [lambda one: [one, one], lambda one: [one], lambda one: {"a": one, "b": one}],
        ids=["two", "a list of one", "by name"],
    )
    def test_several_validation_loaders(self, loaders: Callable[[Any], Any]) -> None:
        several = loaders(DataLoader(FOR_ALPHA, batch_size=ALPHA_BATCH))
        kind = type(several).__name__
        with pytest.raises(UserError, match=rf"one loader of validation images \(val_dataloaders\), not a {kind} of"):
            Search(for_alpha=several).run()
        with pytest.raises(UserError, match=rf"images to report on \(reporting_dataloader\), not a {kind} of"):
            Search(reporting_dataloader=several).run()

    def test_space_without_choices(self) -> None:
        class Plain(nas.ModelSpace):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(3, CLASSES)

        with pytest.raises(UserError, match="with choices: there is none"):
            Search(Plain).run()

    def test_evaluator_that_is_not_lightning(self) -> None:
        space = RawFormatModelSpace.from_model(Space(), FunctionalEvaluator(len))
        with pytest.raises(UserError, match="needs a Lightning evaluator, not a FunctionalEvaluator"):
            DartsStrategy()(space, SequentialExecutionEngine())

    def test_no_validation_images(self) -> None:
        evaluator = Classification(num_classes=CLASSES, train_dataloaders=DataLoader(TRAINING), **QUIET)
        with pytest.raises(UserError, match="needs validation images"):
            DartsStrategy()(RawFormatModelSpace.from_model(Space(), evaluator), SequentialExecutionEngine())


def test_nnis_own_evaluator() -> None:
    """Its own reports are left out: they are of no architecture."""
    search = Search(epochs=2)
    search.evaluator = Classification(
        learning_rate=LEARNING_RATE,
        optimizer=torch.optim.SGD,
        num_classes=CLASSES,
        train_dataloaders=DataLoader(TRAINING, batch_size=TRAIN_BATCH),
        val_dataloaders=DataLoader(FOR_ALPHA, batch_size=ALPHA_BATCH),
        **QUIET,
        num_sanity_val_steps=0,
        max_epochs=2,
    )
    search.run()
    assert [report["epoch"] for report in search.reports] == [1, 2]
    assert [final["architecture"] for final in search.final] == [search.module.export()]


def test_survives_nnis_serialisation() -> None:
    strategy = DartsStrategy(order="first", alpha_betas=(0.9, 0.99), skip_limit=2, eigenvalue="rollback")
    loaded = nni.load(nni.dump(strategy))
    assert isinstance(loaded, DartsStrategy)
    assert loaded.settings.order == "first"
    assert tuple(loaded.settings.alpha_betas) == (0.9, 0.99)
    assert (loaded.settings.skip_limit, loaded.settings.eigenvalue) == (2, "rollback")
    assert loaded.settings.radius == strategy.settings.radius


def test_a_nas_experiment_runs_it(nas_experiment: Callable[..., Any]) -> None:
    search = Search(epochs=1)
    experiment = nas_experiment(cells(), search.evaluator, search.strategy)
    (sample,) = experiment.export_top_models(formatter="dict")
    assert Genotype.from_sample(sample) == genotype_of(search.alphas)
    (network,) = experiment.export_top_models(formatter="instance")
    assert not any(isinstance(module, nas.LayerChoice | nas.InputChoice) for module in network.modules())
    images, _ = HELD_OUT.tensors
    assert network.eval()(images).shape == (len(images), CLASSES)
