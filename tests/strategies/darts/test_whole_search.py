"""Every step, report and result of a DARTS search, beside the same by hand; and what must not change them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from statistics import fmean
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from nni.nas.evaluator.pytorch import DataLoader, Lightning
from torch import Tensor
from torch.utils.data import IterableDataset, TensorDataset

from nni_cream.errors import UserError
from tests.strategies.darts.by_hand import expected_macs, logits_by_hand, search_by_hand
from tests.strategies.darts.searches import (
    ALPHA_BATCH,
    FOR_ALPHA,
    HELD_OUT,
    TRAIN_BATCH,
    TRAIN_BATCHES,
    TRAINING,
    WHOLE,
    Classifier,
    Search,
    assert_equal,
    cheap,
    differs,
    held_out,
    nested,
    prices,
    two_nodes,
)
from tests.strategies.running import SMALL_RUNS, State, assert_same

pytestmark = SMALL_RUNS


@pytest.mark.parametrize("case", WHOLE)
class TestWholeSearch:
    def test_every_step_is_that_computed_by_hand(self, case: str, run: Callable[..., Search]) -> None:
        search = run(**WHOLE[case])
        assert len(search.steps) == 3 * TRAIN_BATCHES
        for step, by_hand in zip(search.steps, search_by_hand(search), strict=True):
            assert step.loss == pytest.approx(by_hand.loss, rel=1e-9)
            assert_same(step.alphas_after, by_hand.alphas)
            assert_same(step.space_after, by_hand.space)
        assert differs(search.steps[0].alphas, search.alphas)

    def test_reports_are_the_means_of_the_epoch(self, case: str, run: Callable[..., Search]) -> None:
        search = run(**WHOLE[case])
        by_hand = list(search_by_hand(search))
        warmup = search.strategy.settings.warmup_epochs
        assert [report["epoch"] for report in search.reports] == [1, 2, 3]
        for number, report in enumerate(search.reports):
            steps = [step for step in by_hand if step.epoch == number]
            assert report["train_loss"] == pytest.approx(fmean([step.loss for step in steps]), rel=1e-6)
            assert report["train_accuracy"] == pytest.approx(fmean([step.correct for step in steps]), rel=1e-6)
            assert ("alpha_loss" in report) == (number >= warmup)
            if number >= warmup:
                assert report["alpha_loss"] == pytest.approx(fmean([step.alpha_loss for step in steps]), rel=1e-6)
            weights = [table.softmax(0) for table in steps[-1].alphas.values()]
            entropies = [-(w * w.log()).sum().item() for w in weights]
            assert report["entropy"] == pytest.approx(fmean(entropies), rel=1e-6)
            cost = {"expected_flops": pytest.approx(expected_macs(steps[-1].alphas).item(), rel=1e-6)}
            assert {name: report[name] for name in report if "flops" in name} == (
                cost if search.strategy.settings.flops_target else {}
            )
            assert not {"eigenvalue", "entropy_normal", "skip_connections_normal"} & set(report)

    def test_accuracy_is_that_of_the_supernet_in_evaluation(self, case: str, run: Callable[..., Search]) -> None:
        search = run(**WHOLE[case])
        images, labels = FOR_ALPHA.tensors
        for number, report in enumerate(search.reports):
            last = [step for step in search.steps if step.epoch == number][-1]
            logits = logits_by_hand(last.space_after, last.alphas_after, images, training=False)
            accuracy = (logits.argmax(1) == labels).double().mean().item()
            assert report["default"] == report["val_accuracy"] == pytest.approx(accuracy, rel=1e-6)

    def test_result_is_what_weighs_most(self, case: str, run: Callable[..., Search]) -> None:
        search = run(**WHOLE[case])
        order = {name: table.argsort(descending=True).tolist() for name, table in search.alphas.items()}
        expected = {
            "kernel": order["kernel"][0],
            "third": ["inner", "plain", "nothing"][order["third"][0]],
            "pick": order["pick"][:1],
            "two": sorted(order["two"][:2]),
            "average": sorted(order["average"][:2]),
        }
        if "inner" in order:
            expected["inner"] = order["inner"][0]
        assert search.final == [{"default": search.reports[-1]["val_accuracy"], "architecture": expected}]
        assert search.module.export() == expected


def test_cases_make_a_difference(run: Callable[..., Search]) -> None:
    # Otherwise the comparisons above would show less than they seem to.
    results = [run(**WHOLE[case]).alphas for case in WHOLE if WHOLE[case].get("space") is None]
    assert all(differs(a, b) for a, b in itertools.combinations(results, 2))
    clipped = run(**WHOLE["warm-up"]).classifier.norms
    assert all(before > 0.3 for before, _ in clipped)
    assert {round(after, 5) for _, after in clipped} == {0.3}
    costs = [expected_macs(step.alphas).item() for step in run(**WHOLE["expected cost"]).steps]
    assert max(costs) > cheap() > min(costs)


class TestWarmUp:
    def test_leaves_alpha_alone(self, run: Callable[..., Search]) -> None:
        search = run(**WHOLE["warm-up"])
        moved = [any(not torch.equal(s.alphas[n], s.alphas_after[n]) for n in s.alphas) for s in search.steps]
        assert moved == [False] * TRAIN_BATCHES + [True] * 2 * TRAIN_BATCHES

    @pytest.mark.parametrize("epochs", [1, 2])
    def test_that_never_ends_is_an_error(self, epochs: int) -> None:
        search = Search(epochs=epochs, warmup_epochs=2)
        with pytest.raises(UserError, match=f"after 2 warm-up epochs, but training lasts {epochs}: make"):
            search.run()
        assert not search.steps

    def test_may_last_until_the_last_epoch(self) -> None:
        assert len(Search(epochs=2, warmup_epochs=1).run().steps) == 2 * TRAIN_BATCHES


class TestOptimizers:
    def test_alpha_is_not_among_the_weights(self, run: Callable[..., Search]) -> None:
        module = run(**WHOLE["second order"]).module
        weights, alpha = module.trainer.optimizers
        of_weights = {id(p) for group in weights.param_groups for p in group["params"]}
        of_alpha = [id(p) for group in alpha.param_groups for p in group["params"]]
        assert of_weights == {id(parameter) for parameter in module.model.parameters()}
        assert of_alpha == [id(parameter) for parameter in module.alphas.parameters()]
        assert not of_weights & set(of_alpha)
        # As Lightning counts steps, for max_steps and for loggers.
        assert module.trainer.global_step == 3 * TRAIN_BATCHES

    def test_alpha_is_in_the_order_of_the_space(self, run: Callable[..., Search]) -> None:
        assert list(run(**WHOLE["second order"]).alphas) == ["kernel", "third", "pick", "two", "average"]
        inner = list(run(**WHOLE["first order"]).alphas)
        assert inner == ["kernel", "third", "inner", "pick", "two", "average"]

    def test_the_second_order_needs_sgd(self) -> None:
        search = Search(classifier=Classifier(torch.optim.Adam, lr=0.01))
        with pytest.raises(UserError, match="the optimizer of the weights is Adam"):
            search.run()
        assert not search.steps
        # Not only when α begins to learn.
        late = Search(classifier=Classifier(torch.optim.Adam, lr=0.01), warmup_epochs=1)
        with pytest.raises(UserError, match="is Adam"):
            late.run()
        assert not late.steps
        dampened = Search(classifier=Classifier(lr=0.01, momentum=0.9, dampening=0.5), order="second")
        with pytest.raises(UserError, match="dampening"):
            dampened.run()
        assert not dampened.steps

    def test_a_loader_that_knows_its_length_is_needed(self) -> None:
        class Endless(IterableDataset[Any]):
            def __iter__(self) -> Any:
                return itertools.cycle(zip(*TRAINING.tensors, strict=True))

        for images in ("training", "validation"):
            search = Search()
            name = {"training": "train_dataloaders", "validation": "val_dataloaders"}[images]
            setattr(search.evaluator, name, DataLoader(Endless(), TRAIN_BATCH))
            with pytest.raises(UserError, match=f"loader of the {images} images does not know how many"):
                search.run()
            assert not search.steps

    @pytest.mark.parametrize("trainer", [{"limit_val_batches": 0}, {"check_val_every_n_epoch": 2}])
    def test_every_epoch_is_validated(self, trainer: dict[str, Any]) -> None:
        search = Search(trainer=trainer)
        with pytest.raises(UserError, match="reports the accuracy of every epoch"):
            search.run()
        assert not search.steps

    @pytest.mark.parametrize("trainer", [{"min_epochs": 2}, {"min_steps": 7}])
    @pytest.mark.parametrize("guard", [{"stop_above_skips": 2}, {"eigenvalue": "stop"}, {"eigenvalue": "rollback"}])
    def test_a_search_that_may_be_ended_need_not_go_on(self, trainer: dict[str, Any], guard: dict[str, Any]) -> None:
        search = Search(two_nodes, trainer=trainer, **guard)
        with pytest.raises(UserError, match="min_epochs or min_steps would make it go on"):
            search.run()
        assert not search.steps

    def test_the_first_order_takes_any(self) -> None:
        search = Search(classifier=Classifier(torch.optim.Adam, lr=0.01), order="first", epochs=1).run()
        assert differs(search.steps[0].alphas, search.alphas)


class TestData:
    @staticmethod
    def batches(data: TensorDataset, size: int) -> list[tuple[Tensor, Tensor]]:
        return list(zip(*(tensor.split(size) for tensor in data.tensors), strict=True))

    @pytest.mark.parametrize("size", [ALPHA_BATCH, 4, 2, 1])
    def test_pairs_of_batches(self, size: int) -> None:
        for_alpha = DataLoader(FOR_ALPHA, batch_size=size)
        search = Search(epochs=2, order="first", for_alpha=for_alpha).run()
        training, others = self.batches(TRAINING, TRAIN_BATCH), self.batches(FOR_ALPHA, size)
        assert [step.epoch for step in search.steps] == [0] * TRAIN_BATCHES + [1] * TRAIN_BATCHES
        for number, step in enumerate(search.steps):
            position = number % TRAIN_BATCHES
            for ours, expected in (
                (step.batch["train"], training[position]),
                (step.batch["alpha"], others[position % len(others)]),
            ):
                assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))

    def test_other_images_may_be_reported_on(self, run: Callable[..., Search]) -> None:
        usual = run(**WHOLE["second order"])
        search = Search(gradient_clip=None, reporting_dataloader=held_out()).run()
        assert_equal(search.alphas, usual.alphas)
        images, labels = HELD_OUT.tensors
        for number, report in enumerate(search.reports):
            last = [step for step in search.steps if step.epoch == number][-1]
            logits = logits_by_hand(last.space_after, last.alphas_after, images, training=False)
            assert report["val_accuracy"] == pytest.approx((logits.argmax(1) == labels).double().mean().item())
            assert report["alpha_loss"] == usual.reports[number]["alpha_loss"]
        assert search.final[0]["default"] == search.reports[-1]["val_accuracy"]
        assert [r["val_accuracy"] for r in search.reports] != [r["val_accuracy"] for r in usual.reports]

    def test_sanity_check_of_lightning_counts_for_nothing(self, run: Callable[..., Search]) -> None:
        checked = Search(gradient_clip=None, trainer={"num_sanity_val_steps": 2}).run()
        assert checked.reports == run(**WHOLE["second order"]).reports

    def test_data_module(self, run: Callable[..., Search]) -> None:
        class Data(pl.LightningDataModule):
            def setup(self, stage: str) -> None:
                self.train, self.for_alpha = TRAINING, FOR_ALPHA

            def train_dataloader(self) -> Any:
                return DataLoader(self.train, batch_size=TRAIN_BATCH)

            def val_dataloader(self) -> Any:
                return DataLoader(self.for_alpha, batch_size=ALPHA_BATCH)

        search = Search(gradient_clip=None)
        search.evaluator = Lightning(search.classifier, search.evaluator.trainer, datamodule=Data())
        assert_equal(search.run().alphas, run(**WHOLE["second order"]).alphas)


class TestCostTerm:
    @pytest.fixture
    def search(self, run: Callable[..., Search]) -> Search:
        return run(**WHOLE["expected cost"])

    def test_gradient_is_that_of_the_formula(self, search: Search) -> None:
        module, alphas = search.module, search.alphas
        target, weight = module.settings.flops_target, module.settings.flops_weight

        def penalty(tables: State) -> float:
            return weight * max(0.0, expected_macs(tables).item() / target - 1)  # type: ignore[operator]

        for sign in (1, -1):
            # Towards dear, then towards cheap candidates.
            tables = {name: table.clone() for name, table in alphas.items()}
            tables["kernel"] = torch.tensor([-1.0, 1.0], dtype=torch.float64) * sign * 3
            with torch.no_grad():
                for name, table in tables.items():
                    module.alphas[name].copy_(table)
            gradients = dict(zip(module.alphas, module._cost_gradients(), strict=True))
            for name, table in tables.items():
                for i in range(len(table)):
                    ends = []
                    for h in (1e-5, -1e-5):
                        shifted = {**tables, name: table.clone()}
                        shifted[name][i] += h
                        ends.append(penalty(shifted))
                    assert gradients[name][i].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, abs=1e-8)
            value = module.cost_penalty(list(tables.values())).item()
            assert value == pytest.approx(penalty(tables), rel=1e-9)
            assert (value > 0) == (sign == 1)
            assert any(gradient.any() for gradient in gradients.values()) == (sign == 1)
        with torch.no_grad():
            for name, table in alphas.items():
                module.alphas[name].copy_(table)

    def test_a_target_that_is_met_changes_nothing(self, run: Callable[..., Search]) -> None:
        search = Search(gradient_clip=None, flops_target=2.0 * max(prices().values()), flops_weight=100.0).run()
        assert_equal(search.alphas, run(**WHOLE["second order"]).alphas)
        assert search.reports[0]["expected_flops"] > 0

    def test_nested_choices_have_no_expected_cost(self) -> None:
        search = Search(nested, flops_target=1.0)
        with pytest.raises(UserError, match=r"'third'.*holds further choices"):
            search.run()


def test_frozen_weights_stay_as_they_are(run: Callable[..., Search]) -> None:
    search = run(**WHOLE["frozen weights"])
    first, last = search.steps[0].space, search.steps[-1].space_after
    assert {n for n in first if torch.equal(first[n], last[n])} == {"second.1.0.weight", "head.bias"}


def test_the_module_of_the_evaluator_is_told(run: Callable[..., Search]) -> None:
    assert run(**WHOLE["second order"]).classifier.told == ["start", *["epoch", "epoch's end"] * 3]


def test_what_loggers_and_callbacks_see(run: Callable[..., Search]) -> None:
    search = run(**WHOLE["second order"])
    seen, report = search.module.trainer.callback_metrics, search.reports[-1]
    for name in ("val_accuracy", "train_accuracy", "entropy"):
        assert float(seen[name]) == pytest.approx(report[name], rel=1e-6)
    assert float(seen["train_loss"]) == pytest.approx(search.steps[-1].loss, rel=1e-6)


def test_same_seed_same_result(run: Callable[..., Search]) -> None:
    first = run(**WHOLE["second order"])
    again = Search(**WHOLE["second order"]).run()
    assert_equal(again.alphas, first.alphas)
    assert again.reports == first.reports
    assert differs(Search(seed=2, **WHOLE["second order"]).run().alphas, first.alphas)
