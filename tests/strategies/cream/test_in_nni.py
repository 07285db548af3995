"""CreamStrategy among NNI's: precisions, experiments, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nni.nas.nn.pytorch as nas
import pytest
import pytorch_lightning as pl
import torch
from nni.nas.evaluator import FunctionalEvaluator
from nni.nas.evaluator.pytorch import Classification, DataLoader, Lightning
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.space import RawFormatModelSpace
from torch import Tensor
from torch.utils.data import IterableDataset, TensorDataset

from nni_cream.errors import UserError
from nni_cream.strategies import cream_module
from nni_cream.strategies.cream import CreamStrategy
from nni_cream.training import ImageClassifier
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

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"teacher": "Top1"}, "teacher is 'Top1', but should be 'matching', 'top1' or 'none'."),
            ({"prior": "Board"}, "prior is 'Board', but should be 'even' or 'board'."),
            ({"board_size": 0}, "board_size is 0, but should be at least 1."),
            ({"meta_interval": 0}, "meta_interval is 0, but should be at least 1."),
            ({"recalibration_batches": 0}, "recalibration_batches is 0, but should be at least 1."),
            ({"warmup_epochs": -1}, "warmup_epochs is -1, but should be at least 0."),
            ({"matching_lr": float("nan")}, "matching_lr is nan, but should be above 0."),
        ],
    )
    def test_arguments_out_of_range(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError) as refused:
            CreamStrategy(**arguments)
        assert str(refused.value) == message

    def test_steps_that_end_before_the_warm_up(self, data: TensorDataset) -> None:
        search = Search(data, epochs=30, trainer={"max_steps": 6})
        with pytest.raises(UserError, match=r"after 1 warm-up epochs of 6 steps, but training lasts 6 steps"):
            search.run()
        assert not search.steps
        assert Search(data, epochs=30, trainer={"max_steps": 7}).run().module.ranking

    def test_a_schedule_that_waits_for_a_metric(self, data: TensorDataset) -> None:
        class Waiting(ImageClassifier):
            def configure_optimizers(self) -> Any:
                optimizer = torch.optim.SGD(self.parameters(), 0.1)
                plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
                return [optimizer], [{"scheduler": plateau, "monitor": "val_accuracy"}]

        search = Search(data, classifier=Waiting(CLASSES, {"opt": "sgd", "lr": 0.1}, {"sched": "cosine"}))
        with pytest.raises(UserError, match="ReduceLROnPlateau waits for a metric"):
            search.run()
        assert not search.steps

    def test_several_validation_loaders(self, data: TensorDataset) -> None:
        loaders = [DataLoader(HELD_OUT, batch_size=2 * BATCH)] * 2
        with pytest.raises(UserError, match="on one validation loader, but was given 2 of them"):
            Search(data, held_out=loaders).run()

    def test_no_validation(self, data: TensorDataset) -> None:
        search = Search(data, trainer={"limit_val_batches": 0})
        with pytest.raises(UserError, match="scores paths on validation images"):
            search.run()
        assert not search.steps


@pytest.mark.parametrize("end", [{"max_steps": 9}, {"max_time": "00:00:00:02"}])
def test_steps_or_time_may_end_a_search(end: dict[str, Any], data: TensorDataset) -> None:
    search = Search(data, trainer={"max_epochs": -1, **end}).run()
    assert len(search.module.ranking) == len(search.module.board) >= 3
    assert search.final[0]["default"] == search.module.ranking[0].accuracy


class Skipping(SixPaths):
    """Every other pass that is differentiated leaves out its first choice."""

    passes = 0

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        Skipping.passes += torch.is_grad_enabled()
        if not torch.is_grad_enabled() or Skipping.passes % 2:
            features = self.first(features)
        return self.head(self.second(features).mean((2, 3)))


@pytest.mark.parametrize("phase", [0, 1])
def test_what_a_pass_leaves_out_has_no_gradient_in_a_meta_step(phase: int, data: TensorDataset) -> None:
    Skipping.passes = phase
    steps = Search(data, meta_interval=8, space=Skipping).run().steps
    weights = [[state["linear.weight"] for state in (step.matching, step.matching_after)] for step in steps]
    assert [index for index, pair in enumerate(weights) if not torch.equal(*pair)] == [8, 16]


def test_validations_may_be_rare(data: TensorDataset) -> None:
    """The board opens before Lightning has asked for the validation images."""
    search = Search(data, epochs=4, trainer={"check_val_every_n_epoch": 4}).run()
    assert [report["epoch"] for report in search.reports] == [4]
    assert len(search.module.ranking) == 4


def test_validation_images_without_a_length(data: TensorDataset) -> None:
    class Unsized(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return zip(*HELD_OUT.tensors, strict=True)

    unsized = Search(data)
    unsized.evaluator.val_dataloaders = DataLoader(Unsized(), batch_size=2 * BATCH)
    assert unsized.run().reports == Search(data).run().reports


def test_a_data_module_is_set_up_first(data: TensorDataset) -> None:
    class Data(pl.LightningDataModule):
        def prepare_data(self) -> None:
            self.prepared = True

        def setup(self, stage: str) -> None:
            assert self.prepared
            self.train, self.held_out = data, HELD_OUT

        def train_dataloader(self) -> Any:
            return DataLoader(self.train, batch_size=BATCH)

        def val_dataloader(self) -> Any:
            return DataLoader(self.held_out, batch_size=2 * BATCH)

    search = Search(data)
    search.evaluator = Lightning(search.evaluator.module, search.evaluator.trainer, datamodule=Data())
    assert search.run().reports == Search(data).run().reports


def test_a_data_module_that_divides_its_images_anew_is_ranked_on_those_of_the_training(data: TensorDataset) -> None:
    class Data(pl.LightningDataModule):
        divisions = 0

        def setup(self, stage: str) -> None:
            self.divisions += 1
            # By another number a validation would have other accuracies.
            self.held_out = TensorDataset(*data[: 10 * self.divisions])

        def train_dataloader(self) -> Any:
            return DataLoader(data, batch_size=BATCH)

        def val_dataloader(self) -> Any:
            return DataLoader(self.held_out, batch_size=BATCH)

    search = Search(data)
    search.evaluator = Lightning(search.evaluator.module, search.evaluator.trainer, datamodule=Data())
    counts: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        count_right = cream_module.count_right

        def counted(*arguments: Any) -> tuple[int, int]:
            right, seen = count_right(*arguments)
            counts.append(seen)
            return right, seen

        patch.setattr(cream_module, "count_right", counted)
        search.run()
    assert set(counts) == {20}


def test_a_nas_experiment_runs_it(data: TensorDataset, nas_experiment: Callable[..., Any]) -> None:
    search = Search(data)
    experiment = nas_experiment(SixPaths(), search.evaluator, search.strategy)
    ranking = [path.sample for path in search.module.ranking]
    assert len(ranking) >= 3
    assert experiment.export_top_models(2, formatter="dict") == ranking[:2]
    network = experiment.export_top_models(formatter="instance")[0]
    assert not any(isinstance(module, nas.LayerChoice) for module in network.modules())
