"""What users of NNI do with a strategy, on a space and with data of their own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import nni
import nni.nas.nn.pytorch as nas
import pytest
import torch
from nni.nas.evaluator.pytorch import Classification, DataLoader
from nni.nas.space import RawFormatModelSpace
from nni.nas.strategy import CreamStrategy, DartsStrategy
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import nni_cream
from nni_cream.errors import UserError
from tests.latency_tables import made_up
from tests.trainers import QUIET

CLASSES = 3


class Theirs(nas.ModelSpace):
    """Choices of layers, on request one of them within another, and of inputs."""

    def __init__(self, nested: bool = False) -> None:
        super().__init__()
        self.stem = nas.LayerChoice({"small": nn.Conv2d(3, 4, 1), "large": nn.Conv2d(3, 4, 3, padding=1)}, label="stem")
        block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        inner = nas.LayerChoice([nn.Identity(), block], label="inner") if nested else block
        self.body = nas.LayerChoice([nn.Sequential(inner, nn.ReLU()), nn.MaxPool2d(3, 1, 1)], label="body")
        self.route = nas.InputChoice(n_candidates=2, n_chosen=1, label="route")
        self.head = nn.Linear(4, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        stem = self.stem(images)
        logits: Tensor = self.head(self.route([stem, self.body(stem)]).mean((2, 3)))
        return logits


class WithValue(nas.ModelSpace):
    """A choice of a number, which is no choice among modules."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nas.LayerChoice([nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3, padding=1)], label="layer")
        self.odd = nas.MutableConv2d(4, nni.choice("width", [4, 8]), 1)
        self.head = nas.MutableLinear(nni.choice("width", [4, 8]), CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.odd(self.layer(images)).mean((2, 3)))
        return logits


def cream() -> Any:
    return CreamStrategy(board_size=3, board_images=4, warmup_epochs=1, meta_interval=2, recalibration_batches=2)


def darts() -> Any:
    return DartsStrategy()


def evaluator() -> Any:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(48, 3, 8, 8, generator=generator)
    labels = (images.mean((1, 2, 3)) > 0).long()
    data = TensorDataset(images, labels)
    return Classification(
        learning_rate=0.05,
        optimizer=torch.optim.SGD,
        num_classes=CLASSES,
        train_dataloaders=DataLoader(data, batch_size=16, shuffle=True),
        val_dataloaders=DataLoader(data, batch_size=16),
        max_epochs=3,
        **QUIET,
    )


@pytest.fixture
def experiment(nas_experiment: Callable[..., Any]) -> Callable[..., Any]:
    """Run an experiment of NNI's with our data, and give it."""
    return lambda space, strategy: nas_experiment(space, evaluator(), strategy)


@pytest.mark.parametrize(
    ("strategy", "nested", "number"),
    [(cream, False, 3), (darts, False, 1), (darts, True, 1)],
    ids=["Cream", "DARTS", "DARTS, nested"],
)
def test_their_space_is_searched_and_exported_in_every_format(
    experiment: Callable[..., Any], strategy: Callable[[], Any], nested: bool, number: int
) -> None:
    space = Theirs(nested)
    ended = experiment(space, strategy())
    samples = ended.export_top_models(number, formatter="dict")
    assert len(samples) == number
    assert len({str(sample) for sample in samples}) == number
    for sample in samples:
        assert sample["stem"] in ("small", "large")
        assert (sample["body"], sample["route"]) in [(body, route) for body in (0, 1) for route in ([0], [1])]
        assert set(sample) == set(space.simplify())

    models = ended.export_top_models(number)
    assert all(isinstance(model, RawFormatModelSpace) for model in models)
    assert [model.sample for model in models] == samples
    networks = ended.export_top_models(number, formatter="instance")
    images = torch.randn(2, 3, 8, 8)
    for network in networks:
        assert not any(isinstance(module, nas.LayerChoice | nas.InputChoice) for module in network.modules())
        assert network.eval()(images).shape == (2, CLASSES)
    # Of DARTS there is one, however many are asked for.
    assert len(ended.export_top_models(3)) == number
    # NNI writes code for graph spaces only, and says so.
    with pytest.raises(ValueError, match='"code" is only supported for GraphModelSpace'):
        ended.export_top_models(formatter="code")


def test_top_k_is_the_order_of_the_board(experiment: Callable[..., Any]) -> None:
    strategy = cream()
    samples = experiment(Theirs(), strategy).export_top_models(3, formatter="dict")
    ranking = strategy.oneshot_module.ranking
    assert [path.sample for path in ranking[:3]] == samples
    assert [path.accuracy for path in ranking] == sorted((path.accuracy for path in ranking), reverse=True)


@pytest.mark.parametrize(("strategy", "name"), [(cream, "CreamStrategy"), (darts, "DartsStrategy")])
def test_a_choice_that_cannot_be_searched_is_refused_by_name_with_the_reason(
    experiment: Callable[..., Any], strategy: Callable[[], Any], name: str
) -> None:
    reason = (
        rf"'(odd|width)'.*cannot be searched by {name}, which takes LayerChoice, and InputChoice with n_chosen given"
    )
    with pytest.raises(UserError, match=reason):
        experiment(WithValue(), strategy())


def test_choices_within_choices_are_refused_by_cream_with_the_reason(experiment: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match=r"choice 'body' .*holds further choices; costs of nested choices do not add"):
        experiment(Theirs(nested=True), cream())


@pytest.mark.parametrize(
    "made",
    [
        lambda: CreamStrategy(board_size=7, prior=[0.25, 0.75], teacher="top1", flops_range=(1e6, 2e6), seed=3),
        lambda: CreamStrategy(prior={"stem": [0.5, 0.5]}, warmup_epochs=4),
        lambda: CreamStrategy(latency=made_up().budget((4, 4, 4, 4, 4), range(6), True, 1, 3.5)),
        lambda: DartsStrategy(order="first", alpha_betas=(0.9, 0.99), skip_limit=2, eigenvalue="rollback"),
    ],
    ids=["Cream", "Cream, prior by label", "Cream, budget of time", "DARTS"],
)
def test_survives_nnis_serialisation(made: Callable[[], Any]) -> None:
    strategy = made()
    loaded = nni.load(nni.dump(strategy))
    assert type(loaded) is type(strategy)
    # JSON knows no tuples.
    assert nni.dump(loaded) == nni.dump(strategy)
    for name, value in vars(strategy.settings).items():
        found = getattr(loaded.settings, name)
        assert (tuple(found) if isinstance(value, tuple) else found) == value


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "loader"), [(CreamStrategy, "ranking_dataloader"), (DartsStrategy, "reporting_dataloader")]
)
def test_is_loaded_with_the_users_data_in_a_process_that_knows_nni_only(strategy: Any, loader: str) -> None:
    dumped = nni.dump(strategy(**{loader: DataLoader([3, 1, 4, 1, 5], batch_size=2)}))
    program = "import sys, nni; strategy = nni.load(sys.argv[1]); print(type(strategy).__name__, "
    program += f"*[batch.tolist() for batch in strategy.{loader}])"
    command = [sys.executable, "-W", "ignore", "-c", program, dumped]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.stdout == f"{strategy.__name__} [3, 1] [4, 1] [5]\n", result.stderr


def test_the_names_are_listed_where_nni_users_look() -> None:
    import nni.nas.strategy as strategies

    listed = nni_cream.list_strategies()
    assert {"CreamStrategy", "DartsStrategy", "DARTS", "ENAS", "Random", "RegularizedEvolution"} <= set(listed)
    assert listed == sorted(listed)
    for name in listed:
        assert issubclass(getattr(strategies, name), strategies.Strategy)
    assert {"CreamStrategy", "DartsStrategy"} <= set(dir(strategies))
    with pytest.raises(AttributeError, match="has no attribute 'Strateggy'"):
        strategies.Strateggy  # noqa: B018


@pytest.mark.slow
def test_listing_works_in_a_process_that_has_imported_nothing_else() -> None:
    program = "import nni_cream; print(*nni_cream.list_strategies())"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert {"CreamStrategy", "DartsStrategy"} <= set(result.stdout.split())


NAMES = "CreamStrategy, DartsStrategy"


@pytest.mark.slow
@pytest.mark.parametrize(
    "program",
    [
        f"import nni_cream; from nni.nas.strategy import {NAMES}",
        f"import torch; import nni.nas.strategy; import nni_cream; from nni.nas.strategy import {NAMES}",
        # torch imports us while NNI's strategies are half imported.
        "from nni.nas.strategy import DartsStrategy, CreamStrategy",
        f"from nni_cream.strategies import {NAMES}; import nni.nas.strategy as nni;"
        "assert (nni.CreamStrategy, nni.DartsStrategy) == (CreamStrategy, DartsStrategy)",
        f"from nni.nas.strategy import DARTS, {NAMES}; assert DARTS is not DartsStrategy",
    ],
    ids=["before", "after", "first", "itself", "beside others"],
)
def test_nni_has_the_strategies_in_either_order_of_imports(program: str) -> None:
    program += f"; print(*(strategy.__module__ for strategy in ({NAMES})))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert result.stdout == "nni_cream.strategies.cream nni_cream.strategies.darts\n", result.stderr
