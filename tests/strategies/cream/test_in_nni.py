"""CreamStrategy among NNI's: precisions, experiments, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nni.nas.nn.pytorch as nas
import pytest
import torch
from nni.nas.evaluator import FunctionalEvaluator
from nni.nas.evaluator.pytorch import Classification, DataLoader
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.space import RawFormatModelSpace
from torch.utils.data import TensorDataset

from nni_cream.errors import UserError
from nni_cream.strategies.cream import CreamStrategy
from tests.six_paths import CLASSES, SixPaths
from tests.strategies.cream.searches import BATCH, HELD_OUT, Search
from tests.strategies.running import SMALL_RUNS
from tests.trainers import QUIET

pytestmark = SMALL_RUNS


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true", "bf16-true"])
def test_other_precisions(precision: str, data: TensorDataset) -> None:
    torch.set_default_dtype(torch.float32)
    images, labels = data.tensors
    data = TensorDataset(images.float(), labels)
    held_out = DataLoader(data, batch_size=2 * BATCH)
    search = Search(data, held_out=held_out, meta_interval=3, trainer={"precision": precision}).run()
    assert len(search.module.ranking) >= 3
    assert all(torch.isfinite(parameter).all() for parameter in search.module.parameters())


def test_images_may_lie_on_another_device_than_the_space(data: TensorDataset) -> None:
    # Those that stay on a GPU are there before Lightning takes the space there.
    evaluator = Search(data).evaluator
    strategy = CreamStrategy(board_images=2)
    strategy.initialize(RawFormatModelSpace.from_model(SixPaths().to("meta"), evaluator), SequentialExecutionEngine())
    assert strategy._description is not None
    assert strategy._description[2] == CLASSES


class TestUserErrors:
    @pytest.mark.parametrize("epochs", [1, 2])
    def test_warm_up_that_never_ends(self, epochs: int, data: TensorDataset) -> None:
        search = Search(data, epochs=epochs, warmup_epochs=2)
        with pytest.raises(UserError, match=f"opens after 2 warm-up epochs, but training lasts {epochs}"):
            search.run()
        assert not search.steps

    def test_evaluator_that_is_not_lightning(self) -> None:
        space = RawFormatModelSpace.from_model(SixPaths(), FunctionalEvaluator(len))
        with pytest.raises(UserError, match="needs a Lightning evaluator, not a FunctionalEvaluator"):
            CreamStrategy()(space, SequentialExecutionEngine())

    def test_no_validation_images(self, data: TensorDataset) -> None:
        evaluator = Classification(num_classes=CLASSES, train_dataloaders=DataLoader(data), **QUIET)
        with pytest.raises(UserError, match="needs validation images"):
            CreamStrategy()(RawFormatModelSpace.from_model(SixPaths(), evaluator), SequentialExecutionEngine())

    @pytest.mark.parametrize(
        ("batch", "kept", "message"),
        [(1, 4, "validation batch has 1, and board_images is 4"), (20, 1, "validation batch has 20, .* is 1")],
    )
    def test_batches_of_one_image(self, batch: int, kept: int, message: str, data: TensorDataset) -> None:
        with pytest.raises(UserError, match=f"at least 2 images: .*{message}"):
            Search(data, held_out=DataLoader(HELD_OUT, batch_size=batch), board_images=kept).initialize()
        Search(data, held_out=DataLoader(HELD_OUT, batch_size=2), board_images=2).initialize()

    def test_more_images_to_keep_than_a_batch_has(self, data: TensorDataset) -> None:
        # No path could ever enter the board, and the search would end without an architecture.
        with pytest.raises(UserError, match="board_images"):
            Search(data, board_images=BATCH + 1).run()


def test_a_nas_experiment_runs_it(data: TensorDataset, nas_experiment: Callable[..., Any]) -> None:
    search = Search(data)
    experiment = nas_experiment(SixPaths(), search.evaluator, search.strategy)
    ranking = [path.sample for path in search.module.ranking]
    assert len(ranking) >= 3
    assert experiment.export_top_models(2, formatter="dict") == ranking[:2]
    network = experiment.export_top_models(formatter="instance")[0]
    assert not any(isinstance(module, nas.LayerChoice) for module in network.modules())
