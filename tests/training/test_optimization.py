"""The learning rate in every step, the optimizer, and drop path, which rises by the epoch."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, ExponentialLR, LambdaLR, LinearLR, LRScheduler

from nni_cream.errors import UserError
from nni_cream.genotype import Genotype
from nni_cream.models.darts import build_darts
from nni_cream.settings import Optimizer, Schedule
from nni_cream.training import ImageClassifier
from tests.trainers import LIGHTNINGS_WARNINGS
from tests.training.fitting import CLASSES, STEPS, Run, TwoHeads, fit, small_network

pytestmark = LIGHTNINGS_WARNINGS


class TestLearningRate:
    @pytest.mark.parametrize(
        ("schedule", "epochs", "expected"),
        [
            (Schedule(name="linear"), 2, lambda t: 0.1 * (1 - t / 12)),
            (Schedule(name="cosine"), 2, lambda t: 0.05 * (1 + math.cos(math.pi * t / 12))),
            (Schedule(name="linear", min_lr=0.02), 2, lambda t: 0.02 + 0.08 * (1 - t / 12)),
            (Schedule(name="cosine", min_lr=0.02), 2, lambda t: 0.02 + 0.04 * (1 + math.cos(math.pi * t / 12))),
            (Schedule(name="constant"), 2, lambda t: 0.1),
            # In the middle of the second epoch.
            (Schedule(name="exponential", decay_rate=0.5, decay_epochs=1.5), 2, lambda t: 0.1 if t < 9 else 0.05),
            # The warm-up climbs from warmup_lr; then the curve is where it would be without.
            (
                Schedule(name="linear", warmup_epochs=1, warmup_lr=0.01),
                3,
                lambda t: 0.01 + 0.09 * t / 6 if t < 6 else 0.1 * (1 - t / 18),
            ),
            (
                Schedule(name="cosine", warmup_epochs=1, warmup_lr=0.01),
                3,
                lambda t: 0.01 + 0.09 * t / 6 if t < 6 else 0.05 * (1 + math.cos(math.pi * t / 18)),
            ),
        ],
        ids=lambda value: str(value) if isinstance(value, Schedule) else None,
    )
    def test_follows_its_curve_in_every_step(
        self, tmp_path: Path, schedule: Schedule, epochs: int, expected: Callable[[int], float]
    ) -> None:
        rates = fit(tmp_path, schedule, epochs=epochs).recorder.rates
        assert all(len(groups) == 1 for groups in rates)
        # One more than there are steps: what would come after the last, which is the end of the curve.
        wanted = [expected(t) for t in range(epochs * STEPS + 1)]
        assert [max(groups) for groups in rates] == pytest.approx(wanted, abs=1e-12)

    @pytest.mark.parametrize(
        ("schedule", "published"),
        [
            (Schedule(name="cosine", interval="epoch"), lambda o: CosineAnnealingLR(o, 4)),
            (Schedule(name="cosine", interval="epoch", min_lr=0.02), lambda o: CosineAnnealingLR(o, 4, eta_min=0.02)),
            (Schedule(name="exponential", interval="epoch"), lambda o: ExponentialLR(o, 0.97)),
            # By a factor an epoch, however often that is looked up.
            (Schedule(name="exponential", interval="step", decay_rate=0.5), lambda o: ExponentialLR(o, 0.5)),
            # Every so many epochs, also where that is no whole number: 0, 1, 2 and 3 are 0, 0, 1 and 2 times 1.5.
            (
                Schedule(name="exponential", interval="epoch", decay_rate=0.5, decay_epochs=1.5),
                lambda o: LambdaLR(o, lambda epoch: 0.5 ** int(epoch / 1.5)),
            ),
            (
                Schedule(name="linear", interval="epoch", min_lr=0.02),
                lambda o: LinearLR(o, start_factor=1.0, end_factor=0.2, total_iters=4),
            ),
            (Schedule(name="constant", interval="epoch"), lambda o: ConstantLR(o, factor=1.0)),
        ],
        ids=lambda value: str(value) if isinstance(value, Schedule) else "",
    )
    def test_by_epochs_is_what_torch_has(
        self, tmp_path: Path, schedule: Schedule, published: Callable[[torch.optim.Optimizer], LRScheduler]
    ) -> None:
        torchs = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
        scheduler = published(torchs)
        wanted = []
        for _ in range(4):
            wanted += [scheduler.get_last_lr()[0]] * STEPS
            torchs.step()
            scheduler.step()
        wanted += scheduler.get_last_lr()  # what would come after the last
        rates = fit(tmp_path, schedule, epochs=4).recorder.rates
        assert all(len(groups) == 1 for groups in rates)
        assert [max(groups) for groups in rates] == pytest.approx(wanted, abs=1e-12)

    def test_by_epochs_warms_up_as_well(self, tmp_path: Path) -> None:
        schedule = Schedule(name="cosine", interval="epoch", warmup_epochs=2, warmup_lr=0.01)
        rates = [max(groups) for groups in fit(tmp_path, schedule, epochs=4).recorder.rates]
        wanted = [0.01, 0.055, *(0.05 * (1 + math.cos(math.pi * e / 4)) for e in (2, 3, 4))]
        assert rates == pytest.approx([rate for rate in wanted[:4] for _ in range(STEPS)] + wanted[4:], abs=1e-12)

    def test_by_epochs_goes_on_where_it_was_after_an_interruption(self, tmp_path: Path) -> None:
        schedule = Schedule(name="cosine", interval="epoch", min_lr=0.02)
        whole = fit(tmp_path, schedule, epochs=3)
        first = fit(tmp_path, schedule, epochs=3, stop_after=2)
        first.trainer.save_checkpoint(tmp_path / "last.ckpt")
        second = fit(tmp_path, schedule, epochs=3, checkpoint=tmp_path / "last.ckpt")
        assert first.recorder.rates[:-1] + second.recorder.rates == whole.recorder.rates
        assert first.reports + second.reports == whole.reports

    def test_goes_on_where_it_was_after_an_interruption(self, tmp_path: Path, finished: Run) -> None:
        first = fit(tmp_path, Schedule(name="linear"), stop_after=1)
        assert len(first.reports) == 1
        first.trainer.save_checkpoint(tmp_path / "last.ckpt")
        second = fit(tmp_path, Schedule(name="linear"), checkpoint=tmp_path / "last.ckpt")
        # The first run's list ends with the rate of the step that it did not take.
        assert first.recorder.rates[:-1] + second.recorder.rates == finished.recorder.rates
        assert first.reports + second.reports == finished.reports
        for name, tensor in finished.module.model.state_dict().items():
            assert torch.equal(second.module.model.state_dict()[name], tensor), name


class TestOptimizer:
    def test_decays_weights_but_neither_biases_nor_batch_norms(self, finished: Run) -> None:
        decay = {
            id(parameter): group["weight_decay"]
            for group in finished.trainer.optimizers[0].param_groups
            for parameter in group["params"]
        }
        found = {name: decay[id(parameter)] for name, parameter in finished.module.model.named_parameters()}
        assert found == {"0.weight": 0.01, "0.bias": 0, "1.weight": 0, "1.bias": 0, "4.weight": 0.01, "4.bias": 0}
        assert len(decay) == len(found)

    def test_without_the_filter_decays_everything(self, tmp_path: Path) -> None:
        run = fit(tmp_path, Schedule(), optimizer={"filter_bias_and_bn": False}, epochs=1)
        (group,) = run.trainer.optimizers[0].param_groups
        assert group["weight_decay"] == 0.01
        assert len(group["params"]) == len(list(run.module.model.parameters())) == 6

    @pytest.mark.parametrize("filtered", [True, False])
    def test_a_step_without_a_gradient_shrinks_what_decays(self, filtered: bool) -> None:
        torch.manual_seed(0)
        network = small_network()
        for parameter in network.parameters():
            nn.init.normal_(parameter)
            parameter.grad = torch.zeros_like(parameter)
        before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
        settings = Optimizer(name="momentum", lr=0.5, weight_decay=0.1, filter_bias_and_bn=filtered)
        create_optimizer_v2(network, **settings.timm_arguments()).step()
        for name, parameter in network.named_parameters():
            kept = filtered and (name.endswith("bias") or name.startswith("1."))
            wanted = before[name] * (1.0 if kept else 1 - 0.5 * 0.1)
            assert torch.allclose(parameter, wanted, rtol=1e-6), name


class TestDropPath:
    def test_rises_by_the_epoch(self, tmp_path: Path) -> None:
        run = fit(tmp_path, Schedule(), network=TwoHeads(), epochs=4, drop_path_rate=0.2)
        assert run.module.model.rates == pytest.approx([0.0, 0.05, 0.1, 0.15], abs=1e-12)

    def test_goes_on_where_it_was_after_an_interruption(self, tmp_path: Path) -> None:
        first = fit(tmp_path, Schedule(), network=TwoHeads(), epochs=4, drop_path_rate=0.2, stop_after=2)
        first.trainer.save_checkpoint(tmp_path / "last.ckpt")
        checkpoint = tmp_path / "last.ckpt"
        second = fit(tmp_path, Schedule(), network=TwoHeads(), epochs=4, drop_path_rate=0.2, checkpoint=checkpoint)
        assert second.module.model.rates == pytest.approx([0.1, 0.15], abs=1e-12)

    def test_of_a_darts_network_reaches_every_edge(self, tmp_path: Path) -> None:
        edges = (("sep_conv_3x3", 0), ("skip_connect", 1))
        genotype = Genotype(normal=edges, normal_concat=(2,), reduce=edges, reduce_concat=(2,))
        network = build_darts(genotype, num_classes=CLASSES, channels=2, cells=3, stem="cifar", drop_path_rate=0.9)
        fit(tmp_path, Schedule(), network=network, epochs=2, drop_path_rate=0.5)
        rates = [module.drop_prob for module in network.modules() if hasattr(module, "drop_prob")]
        assert rates
        assert set(rates) == {0.25}  # of the second epoch of two


def test_an_unknown_optimizer_is_named_before_anything_is_trained() -> None:
    with pytest.raises(UserError, match=r"timm has no optimizer 'adaam' \(optimizer.name\); did you mean 'adamw?'\?"):
        ImageClassifier(2, {"opt": "adaam"}, {})
    ImageClassifier(2, {"opt": "lookahead_sgd"}, {})


def test_an_optimizer_that_cannot_be_executed_so() -> None:
    with pytest.raises(UserError, match=r"The optimizer 'lamb' has no fused execution \(optimizer.execution\)"):
        ImageClassifier(2, {"opt": "lamb", "fused": True}, {})
    with pytest.raises(UserError, match=r"The optimizer 'momentum' has no eps \(optimizer.eps\); leave that out\."):
        ImageClassifier(2, {"opt": "momentum", "eps": 1e-3}, {})
    ImageClassifier(2, {"opt": "rmsproptf", "eps": 1e-3}, {})
    ImageClassifier(2, {"opt": "adamw", "fused": True}, {})
