from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import nni
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from nni.runtime import trial_command_channel
from nni.runtime.trial_command_channel import ParameterRecord, TrialCommandChannel
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, ExponentialLR, LambdaLR, LinearLR, LRScheduler
from torch.utils.data import DataLoader, TensorDataset

from nni_cream.ema import WeightAverage
from nni_cream.errors import UserError
from nni_cream.genotype import Genotype
from nni_cream.mixing import Mixing
from nni_cream.models.darts import DartsOutput, build_darts
from nni_cream.recipe import Optimizer, Schedule
from nni_cream.training import ImageClassifier, Measures

CLASSES = 7
# 22 images in batches of 4: six steps an epoch, the last of two images.
IMAGES, BATCH, STEPS = 22, 4, 6

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    # Lightning's use of torch.
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]


class Channel(TrialCommandChannel):
    """Writes down what is reported to NNI."""

    def __init__(self) -> None:
        self.reports: list[dict[str, Any]] = []

    def receive_parameter(self) -> ParameterRecord:
        return ParameterRecord(parameter_id=None, parameters={})

    def send_metric(self, **metric: Any) -> None:  # type: ignore[override]
        assert metric["type"] == "PERIODICAL"
        self.reports.append(metric["value"])


@dataclass
class Recorder(pl.Callback):
    """Writes down every step's learning rates and loss."""

    rates: list[set[float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.rates.append({group["lr"] for group in trainer.optimizers[0].param_groups})

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"].item())

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.rates.append({group["lr"] for group in trainer.optimizers[0].param_groups})


@dataclass
class Run:
    module: ImageClassifier
    trainer: pl.Trainer
    before: nn.Module
    recorder: Recorder
    reports: list[dict[str, Any]]


def images(seed: int) -> TensorDataset:
    random = torch.Generator().manual_seed(seed)
    return TensorDataset(
        torch.randn(IMAGES, 3, 4, 4, generator=random), torch.randint(CLASSES, (IMAGES,), generator=random)
    )


TRAINING, VALIDATION = images(0), images(1)


def small_network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, CLASSES))


def fit(
    tmp_path: Path,
    schedule: Schedule,
    *,
    epochs: int = 2,
    stop_after: int | None = None,
    checkpoint: Path | None = None,
    network: nn.Module | None = None,
    optimizer: dict[str, Any] | None = None,
    further: Sequence[pl.Callback] = (),
    **arguments: Any,
) -> Run:
    torch.manual_seed(3)
    module = ImageClassifier(
        CLASSES,
        Optimizer(**{"name": "sgd", "lr": 0.1, "weight_decay": 0.01, **(optimizer or {})}).timm_arguments(),
        schedule.timm_arguments(),
        label_smoothing=0.2,
        **arguments,
    )
    module.set_model(small_network() if network is None else network)
    before = copy.deepcopy(module.model)
    recorder = Recorder()
    callbacks: list[pl.Callback] = [recorder, *further]
    if stop_after is not None:
        callbacks.append(StopAfter(stop_after))
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=callbacks,
    )
    channel = Channel()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial_command_channel, "_channel", channel)
        patch.setattr(nni.trial, "_intermediate_seq", 0)
        trainer.fit(module, DataLoader(TRAINING, BATCH), DataLoader(VALIDATION, BATCH), ckpt_path=checkpoint)
    return Run(module, trainer, before, recorder, channel.reports)


@dataclass
class StopAfter(pl.Callback):
    epochs: int

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return fit(tmp_path_factory.mktemp("run"), Schedule(name="linear"))


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


class TwoHeads(nn.Module):
    """As a network with an auxiliary head: in training it gives the logits of both."""

    def __init__(self) -> None:
        super().__init__()
        self.body = small_network()
        self.auxiliary = nn.Linear(48, CLASSES)
        self.rate: float | None = None
        self.rates: list[float | None] = []

    def forward(self, images: Tensor) -> Any:
        if self.training and self.rates[-1:] != [self.rate]:
            self.rates.append(self.rate)
        logits = self.body(images)
        return DartsOutput(logits, self.auxiliary(images.flatten(1))) if self.training else logits

    def set_drop_path_rate(self, rate: float) -> None:
        self.rate = rate


class TestAuxiliaryHead:
    @pytest.mark.parametrize("weight", [0.0, 0.4, 2.0])
    def test_its_loss_is_added_with_its_weight(self, tmp_path: Path, weight: float) -> None:
        run = fit(tmp_path, Schedule(), network=TwoHeads(), epochs=1, auxiliary_weight=weight)
        inputs, targets = (tensor[:BATCH] for tensor in TRAINING.tensors)
        wanted = F.one_hot(targets, CLASSES) * 0.8 + 0.2 / CLASSES
        losses = [-(wanted * logits.log_softmax(1)).sum(1).mean().item() for logits in run.before.train()(inputs)]
        assert run.recorder.losses[0] == pytest.approx(losses[0] + weight * losses[1], rel=1e-5)
        moved = not torch.equal(run.module.model.auxiliary.bias, run.before.auxiliary.bias)
        assert moved == (weight > 0)

    def test_does_not_take_part_in_what_is_measured(self, tmp_path: Path) -> None:
        run = fit(tmp_path, Schedule(), network=TwoHeads(), epochs=1, auxiliary_weight=0.4)
        with torch.no_grad():
            logits = run.module.model.body.eval()(VALIDATION.tensors[0])
        right = (logits.argmax(1) == VALIDATION.tensors[1]).double().mean().item()
        assert run.reports[-1]["val_accuracy"] == pytest.approx(right, rel=1e-6)


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


class TestLoss:
    def test_is_smoothed(self, finished: Run) -> None:
        inputs, targets = (tensor[:BATCH] for tensor in TRAINING.tensors)
        logits = copy.deepcopy(finished.before).train()(inputs)
        log_p = logits - logits.exp().sum(1, keepdim=True).log()
        wanted = F.one_hot(targets, CLASSES) * 0.8 + 0.2 / CLASSES
        loss = -(wanted * log_p).sum(1).mean().item()
        assert finished.recorder.losses[0] == pytest.approx(loss, rel=1e-5)
        unsmoothed = -log_p[torch.arange(BATCH), targets].mean().item()
        assert abs(loss - unsmoothed) > 1e-3

    def test_reported_is_the_mean_of_the_epochs_steps(self, finished: Run) -> None:
        losses = finished.recorder.losses
        assert [report["train_loss"] for report in finished.reports] == pytest.approx(
            [sum(losses[:STEPS]) / STEPS, sum(losses[STEPS:]) / STEPS], rel=1e-5
        )


class TestMixing:
    @pytest.mark.parametrize("weight", [None, 0.4])
    def test_the_loss_is_that_of_both_classes(self, tmp_path: Path, weight: float | None) -> None:
        """Of the first batch, from the definition: λ times the loss of the one, 1 - λ that of the other."""
        np.random.seed(7)
        share = np.random.RandomState(7)
        share.rand()  # whether to mix at all
        lam = share.beta(0.4, 0.4)
        network = small_network() if weight is None else TwoHeads()
        settings: dict[str, Any] = {"mixing": Mixing(CLASSES, mixup=0.4, label_smoothing=0.2)}
        run = fit(tmp_path, Schedule(), network=network, epochs=1, auxiliary_weight=weight or 0.0, **settings)
        inputs, targets = (tensor[:BATCH] for tensor in TRAINING.tensors)
        outputs = run.before.train()(lam * inputs + (1 - lam) * inputs.flip(0))

        def loss(logits: Tensor) -> float:
            log_p = logits.log_softmax(1)
            wanted = F.one_hot(targets, CLASSES) * 0.8 + 0.2 / CLASSES
            own, others = -(wanted * log_p).sum(1), -(wanted.flip(0) * log_p).sum(1)
            return (lam * own + (1 - lam) * others).mean().item()

        losses = [loss(outputs)] if weight is None else [loss(logits) for logits in outputs]
        expected = losses[0] if weight is None else losses[0] + weight * losses[1]
        assert run.recorder.losses[0] == pytest.approx(expected, rel=1e-5)
        assert 0.01 < lam < 0.99

    def test_ends_with_its_epoch(self, tmp_path: Path, finished: Run) -> None:
        """What is not mixed has the loss and the derivatives that labels have."""
        np.random.seed(7)
        before = np.random.get_state()[1].copy()
        never = fit(tmp_path, Schedule(), mixing=Mixing(CLASSES, mixup=0.4, label_smoothing=0.2, off_epoch=0))
        assert never.recorder.losses == pytest.approx(finished.recorder.losses, rel=1e-4)
        assert (np.random.get_state()[1] == before).all()
        later = fit(tmp_path, Schedule(), mixing=Mixing(CLASSES, mixup=0.4, label_smoothing=0.2, off_epoch=1))
        state = np.random.get_state()
        np.random.seed(7)
        for _ in range(STEPS):
            np.random.rand()
            np.random.beta(0.4, 0.4)
        assert (np.random.get_state()[1] == state[1]).all()
        assert np.random.get_state()[2] == state[2]
        assert later.recorder.losses[0] != pytest.approx(never.recorder.losses[0], rel=1e-3)

    def test_what_is_measured_is_not_mixed(self, tmp_path: Path) -> None:
        run = fit(tmp_path, Schedule(), epochs=1, mixing=Mixing(CLASSES, mixup=0.4))
        with torch.no_grad():
            logits = run.module.model.eval()(VALIDATION.tensors[0])
        assert run.reports[-1]["val_loss"] == pytest.approx(
            F.nll_loss(logits.log_softmax(1), VALIDATION.tensors[1]).item(), rel=1e-5
        )


class TestAveragedWeights:
    EMA = MappingProxyType({"decay": 0.7, "use_warmup": False})

    @pytest.fixture(scope="class")
    def averaged(self, tmp_path_factory: pytest.TempPathFactory) -> Run:
        return fit(tmp_path_factory.mktemp("averaged"), Schedule(), ema=self.EMA)

    def test_do_not_change_the_training(self, averaged: Run, finished: Run) -> None:
        for (name, ours), theirs in zip(
            averaged.module.model.state_dict().items(), finished.module.model.state_dict().values(), strict=True
        ):
            assert torch.equal(ours, theirs), name
        assert averaged.recorder.losses == finished.recorder.losses

    @pytest.mark.parametrize("stage", ["val", "test"])
    def test_are_measured_beside_the_plain_ones(self, tmp_path: Path, averaged: Run, stage: str) -> None:
        if stage == "val":
            measured = averaged.reports[-1]
        else:
            trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
            (measured,) = trainer.test(averaged.module, DataLoader(VALIDATION, BATCH), verbose=False)
        network = copy.deepcopy(averaged.module.model).eval()
        average = copy.deepcopy(network)
        average.load_state_dict(averaged.module.ema.module.state_dict())
        expected = {}
        for prefix, weights in ((stage, average), (f"{stage}_plain", network)):
            with torch.no_grad():
                logits = weights(VALIDATION.tensors[0])
            labels = VALIDATION.tensors[1]
            expected[f"{prefix}_accuracy"] = (logits.argmax(1) == labels).double().mean().item()
            expected[f"{prefix}_top5"] = (logits.topk(5).indices == labels[:, None]).any(1).double().mean().item()
            expected[f"{prefix}_loss"] = F.nll_loss(logits.log_softmax(1), labels).item()
        assert {name: value for name, value in measured.items() if stage in name} == pytest.approx(expected, rel=1e-5)
        assert abs(expected[f"{stage}_loss"] - expected[f"{stage}_plain_loss"]) > 1e-3
        if stage == "val":
            assert measured["default"] == measured["val_accuracy"]

    def test_are_no_part_of_what_is_optimized(self, averaged: Run) -> None:
        optimized = {id(p) for group in averaged.trainer.optimizers[0].param_groups for p in group["params"]}
        assert optimized == {id(parameter) for parameter in averaged.module.model.parameters()}
        assert not any(parameter.requires_grad for parameter in averaged.module.ema.parameters())

    def test_are_averaged_once_a_step_however_often_it_is_measured(self, averaged: Run) -> None:
        found = [callback for callback in averaged.trainer.callbacks if isinstance(callback, WeightAverage)]
        assert len(found) == 1
        averaged.trainer.validate(averaged.module, DataLoader(VALIDATION, BATCH), verbose=False)
        assert [c for c in averaged.trainer.callbacks if isinstance(c, WeightAverage)] == found

    def test_go_on_where_they_were_after_an_interruption(self, tmp_path: Path, averaged: Run) -> None:
        first = fit(tmp_path, Schedule(), stop_after=1, ema=self.EMA)
        first.trainer.save_checkpoint(tmp_path / "last.ckpt")
        second = fit(tmp_path, Schedule(), checkpoint=tmp_path / "last.ckpt", ema=self.EMA)
        assert first.reports + second.reports == averaged.reports
        state = second.module.ema.state_dict()
        for name, tensor in averaged.module.ema.state_dict().items():
            assert torch.equal(state[name], tensor), name


class TestMeasures:
    @pytest.fixture
    def logits(self, finished: Run) -> Tensor:
        with torch.no_grad():
            logits: Tensor = copy.deepcopy(finished.module.model).eval()(VALIDATION.tensors[0])
        return logits

    def test_accuracy_is_a_count(self, finished: Run, logits: Tensor) -> None:
        right = sum(
            row.index(max(row)) == target
            for row, target in zip(logits.tolist(), VALIDATION.tensors[1].tolist(), strict=True)
        )
        assert 0 < right < IMAGES
        assert finished.reports[-1]["val_accuracy"] == pytest.approx(right / IMAGES, rel=1e-6)

    def test_top5_is_a_count(self, finished: Run, logits: Tensor) -> None:
        right = sum(
            target in sorted(range(CLASSES), key=row.__getitem__)[-5:]
            for row, target in zip(logits.tolist(), VALIDATION.tensors[1].tolist(), strict=True)
        )
        assert 0 < right < IMAGES
        assert finished.reports[-1]["val_top5"] == pytest.approx(right / IMAGES, rel=1e-6)

    def test_loss_weighs_every_image_alike_and_is_not_smoothed(self, finished: Run, logits: Tensor) -> None:
        loss = F.nll_loss(logits.log_softmax(1), VALIDATION.tensors[1]).item()
        assert finished.reports[-1]["val_loss"] == pytest.approx(loss, rel=1e-5)

    def test_of_the_test_part_are_the_same(self, finished: Run, tmp_path: Path) -> None:
        trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
        (tested,) = trainer.test(finished.module, DataLoader(VALIDATION, BATCH), verbose=False)
        last = finished.reports[-1]
        assert tested == pytest.approx({name.replace("val", "test"): last[name] for name in last if "val" in name})


class TestReports:
    def test_one_an_epoch_and_none_of_the_sanity_check(self, finished: Run) -> None:
        assert finished.trainer.num_sanity_val_steps > 0
        assert [report["epoch"] for report in finished.reports] == [1, 2]

    def test_nnis_default_metric_is_the_accuracy(self, finished: Run) -> None:
        assert [report["default"] for report in finished.reports] == [r["val_accuracy"] for r in finished.reports]

    def test_can_be_sent(self, finished: Run) -> None:
        assert json.loads(json.dumps(finished.reports)) == finished.reports


def test_few_classes_need_no_special_case() -> None:
    measures = Measures(2)
    measures.update(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1, 1]))
    assert measures.top1.compute().item() == pytest.approx(2 / 3)
    assert measures.top5.compute().item() == 1


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
