"""A whole step of a DARTS search, beside that of the reference."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from nni.nas.evaluator.pytorch import DataLoader
from torch.utils.data import TensorDataset

from nni_cream.genotype import CELL_KINDS
from nni_cream.strategies.darts import DartsStrategy
from tests.darts_reference import GoldenSearch, golden_search, space_of
from tests.strategies.darts.searches import Classifier, Search
from tests.strategies.running import SMALL_RUNS

pytestmark = SMALL_RUNS


class TestPublishedStep:
    """One whole step of a search, beside that of the reference."""

    class Begin(pl.Callback):
        """Gives the search the reference's weights, α, and momentum."""

        def __init__(self, golden: GoldenSearch, momentum_buffers: bool) -> None:
            self.golden, self.momentum_buffers = golden, momentum_buffers

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.model.load_state_dict(self.golden.space.state_dict())
            pl_module.alphas.load_state_dict(self.golden.alphas.state_dict())
            if self.momentum_buffers:
                for name, parameter in pl_module.model.named_parameters():
                    trainer.optimizers[0].state[parameter]["momentum_buffer"] = self.golden.momentum(name)

    @pytest.fixture(
        scope="class", params=["search_2_nodes.json", pytest.param("search_4_nodes.json", marks=pytest.mark.slow)]
    )
    def golden(self, request: pytest.FixtureRequest) -> GoldenSearch:
        return golden_search(request.param)

    @pytest.mark.parametrize("momentum_buffers", [False, True])
    @pytest.mark.parametrize("kind", ["exact", "finite_difference"])
    def test_is_that_of_the_reference(self, golden: GoldenSearch, kind: Any, momentum_buffers: bool) -> None:
        data, given = golden.data, golden.data["hyperparameters"]
        expected = data["with_momentum_buffer" if momentum_buffers else "no_momentum_buffer"]
        expected = expected[f"one_search_step_with_{kind}"]
        number = data["input_shape"][0]
        loaders = [
            DataLoader(TensorDataset(golden.images[part], golden.targets[part]), batch_size=number)
            for part in ("train", "valid")
        ]
        sgd = {"lr": given["eta"], "momentum": given["momentum"], "weight_decay": given["weight_decay"]}
        search = Search(
            lambda: space_of(data["network"]),
            epochs=1,
            training=loaders[0],
            for_alpha=loaders[1],
            reporting_dataloader=loaders[1],
            classifier=Classifier(**sgd),
            callbacks=[self.Begin(golden, momentum_buffers)],
            # The rest are the defaults, which are the published ones.
            alpha_lr=given["arch_lr"],
            alpha_betas=tuple(given["arch_betas"]),
            alpha_weight_decay=given["arch_weight_decay"],
            gradient_clip=given["grad_clip"],
            hypergradient=kind,
        ).run()
        (step,) = search.steps
        (norms,) = search.classifier.norms
        assert step.loss == pytest.approx(expected["train_loss"], abs=1e-9)
        assert norms[0] == pytest.approx(expected["grad_norm_before_clip"], abs=1e-9)
        assert norms[1] == pytest.approx(min(expected["grad_norm_before_clip"], given["grad_clip"]), rel=1e-6)
        for name in CELL_KINDS:
            table = torch.tensor(expected[f"alphas_{name}"])
            torch.testing.assert_close(step.alphas_after[name], table, rtol=0, atol=1e-9)
        for name, _ in golden.space.named_parameters():
            weight = step.space_after[name]
            sums = [weight.sum().item(), weight.abs().sum().item()]
            assert sums == pytest.approx(expected["weights_after"][golden.names[name]], abs=1e-8), name
        assert len(expected["weights_after"]) == len(golden.weights)
        # As after a single forward pass in training mode; the reference's own step moves them four times.
        moved = torch.tensor(data["stem.1.running_mean_after_one_training_forward"])
        torch.testing.assert_close(step.space_after["stem.1.running_mean"], moved, rtol=0, atol=1e-12)
        for name, tensor in step.space_after.items():
            if name.endswith("num_batches_tracked"):
                assert tensor == 1, name

    def test_the_published_numbers_are_the_defaults(self, golden: GoldenSearch) -> None:
        given, settings = golden.data["hyperparameters"], DartsStrategy().settings
        assert settings.order == "second"
        assert settings.alpha_lr == given["arch_lr"]
        assert list(settings.alpha_betas) == given["arch_betas"]
        assert settings.alpha_weight_decay == given["arch_weight_decay"]
        assert settings.gradient_clip == given["grad_clip"]
        assert settings.radius == given["finite_difference_r"]
        assert settings.label_smoothing == settings.warmup_epochs == 0
