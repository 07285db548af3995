from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nni.nas.evaluator.pytorch import Trainer
from pytorch_lightning.plugins import MixedPrecision
from torch import Tensor, nn

from nni_cream import cli, soundness
from nni_cream.checkpoints import LastTwo
from nni_cream.errors import TrainingError
from nni_cream.soundness import Soundness, first_not_finite, refuse_broken
from nni_cream.strategies import cream_module
from nni_cream.strategies.cream_module import CreamLightningModule
from nni_cream.strategies.darts_module import DartsLightningModule
from tests import distributed_worker as small
from tests import resuming
from tests.trainers import LIGHTNINGS_WARNINGS, QUIET

TRAINING, ALPHA, RETRAINING = 3, 4, 11  # the seeds of the images that the small searches and trainings learn from

pytestmark = LIGHTNINGS_WARNINGS


def cream(**settings: Any) -> Any:
    return small.cream(**{"board_images": 4, **settings})


def spoil(monkeypatch: pytest.MonkeyPatch, seed: int, value: float = math.nan) -> None:
    """Let one pixel of one image be no number."""
    make = small.labelled_images

    def spoilt(number: int, own: int, size: int) -> Any:
        data = make(number, own, size)
        if own == seed:
            data.tensors[0][5, 0, 0, 0] = value
        return data

    monkeypatch.setattr(small, "labelled_images", spoilt)


class TestNaming:
    def test_finds_the_first(self) -> None:
        good, bad = torch.ones(3), torch.tensor([1.0, math.inf])
        assert first_not_finite({"a": [good, good], "b": []}) is None
        assert first_not_finite({}) is None
        assert first_not_finite({"a": [good], "b": [good, bad], "c": [bad]}) == ("b", math.inf)
        name, value = first_not_finite({"a": [good, torch.tensor([math.nan])]}) or ("", 0.0)
        assert name == "a"
        assert math.isnan(value)

    def test_waits_for_the_device_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        waits = []
        for name in ("item", "tolist", "__bool__", "__float__"):
            method = getattr(Tensor, name)
            monkeypatch.setattr(Tensor, name, lambda self, m=method, n=name: (waits.append(n), m(self))[1])
        first_not_finite({"loss": [torch.ones(())], "gradient": [torch.ones(3) for _ in range(50)]})
        assert waits == ["tolist"]


class TestWhatEndsASearch:
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_of_cream(self, monkeypatch: pytest.MonkeyPatch, value: float) -> None:
        spoil(monkeypatch, TRAINING, value)
        with pytest.raises(TrainingError) as caught:
            cream()
        where = r"The loss is nan in step [1-4] of epoch 1, on path \[[0-2], [01]\], at learning rate 0\.[01]\d*"
        assert caught.match(where + r": the training has diverged, and its last checkpoint is of before; a lower .*\.$")
        assert "\n" not in str(caught.value)

    def test_of_the_matching_layer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        nothing = torch.tensor(math.nan)
        monkeypatch.setattr(cream_module, "matching_gradient", lambda _, ps, *__: tuple(nothing + p for p in ps))
        where = r"The gradient of the matching layer is nan in step \d of epoch \d, on path"
        with pytest.raises(TrainingError, match=where):
            cream()

    ORDERS = pytest.mark.parametrize(
        "settings",
        [{"order": "first"}, {"hypergradient": "finite_difference"}, {"hypergradient": "exact"}],
        ids=["first", "finite difference", "exact"],
    )

    @ORDERS
    def test_of_darts_by_alpha(self, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]) -> None:
        spoil(monkeypatch, ALPHA)
        with pytest.raises(TrainingError) as caught:
            small.darts("fused", **settings)
        weights = r"with cell weights normal 0\.\d+ to 0\.\d+, reduce 0\.\d+ to 0\.\d+"
        assert caught.match(rf"The loss of α is nan in step [1-4] of epoch 1, {weights}, at learning rate 0\.[01]\d*: ")

    @ORDERS
    def test_of_darts_by_its_gradient(self, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]) -> None:
        compute = small.DartsStrategy.configure_oneshot_module

        def spoilt(self: Any, module: Any) -> Any:
            made = compute(self, module)
            find = made.hypergradient

            def broken(*batches: Any) -> Any:
                found = find(*batches)
                return replace(found, gradients=tuple(g / 0 for g in found.gradients))

            made.hypergradient = broken
            return made

        monkeypatch.setattr(small.DartsStrategy, "configure_oneshot_module", spoilt)
        with pytest.raises(TrainingError, match=r"The gradient of α is (nan|inf) in step 1 of epoch 1, with cell"):
            small.darts("fused", **settings)

    def test_of_darts_by_the_weights(self, monkeypatch: pytest.MonkeyPatch) -> None:
        spoil(monkeypatch, TRAINING)
        with pytest.raises(TrainingError, match=r"The loss is nan in step [1-4] of epoch 1, with cell weights normal "):
            small.darts("fused", order="first")

    def spoil_module(self, monkeypatch: pytest.MonkeyPatch, spoil_it: Callable[[Any], None]) -> None:
        """Spoil something of the module when its training begins."""
        begin = lambda _, trainer, module: spoil_it(module)  # noqa: E731
        monkeypatch.setattr(small.Watcher, "on_train_start", begin, raising=False)

    @pytest.mark.parametrize(
        ("search", "about"),
        [
            (cream, r"on path \[[0-2], [01]\], "),
            (lambda: small.darts("fused", order="first"), "with cell weights normal .*, reduce .*, "),
            (small.training, ""),
        ],
        ids=["cream", "darts", "training"],
    )
    def test_by_a_gradient_of_the_weights_alone(
        self, monkeypatch: pytest.MonkeyPatch, search: Callable[[], Any], about: str
    ) -> None:
        """The loss is finite."""

        def broken(module: Any) -> None:
            for weight in module.parameters():
                if weight.dim() == 4:
                    weight.register_hook(lambda gradient: torch.full_like(gradient, math.inf))

        self.spoil_module(monkeypatch, broken)
        where = (
            rf"^The gradient is (inf|nan) in step 1 of epoch 1, {about}at learning rate 0\.[01]\d*: the training has "
        )
        with pytest.raises(TrainingError, match=where):
            search()

    def test_by_alpha_itself(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(module: Any) -> None:
            next(module.alphas.parameters()).data.view(-1)[1] = math.inf

        self.spoil_module(monkeypatch, broken)
        with pytest.raises(TrainingError, match=r"^The α is inf in step 1 of epoch 1, with cell weights normal nan to"):
            small.darts("fused", order="first")

    def test_of_a_training(self, monkeypatch: pytest.MonkeyPatch) -> None:
        spoil(monkeypatch, RETRAINING)
        with pytest.raises(TrainingError, match=r"The loss is nan in step [1-4] of epoch 1, at learning rate 0\.[01]"):
            small.training()


class Probe(Soundness):
    """Notes at which steps weights, momenta and running statistics have changed."""

    def __init__(self, skips: int) -> None:
        super().__init__(skips)
        self.changed: list[bool] = []
        self.were_bad: list[bool] = []

    def state(self, trainer: Any, module: Any) -> Any:
        momenta = [optimizer.state_dict()["state"] for optimizer in trainer.optimizers]
        # Averages of the epoch are no state of the training.
        kept = {name: tensor for name, tensor in module.state_dict().items() if "value" not in name}
        return copy.deepcopy([momenta, {n: t for n, t in kept.items() if not n.endswith("weight") or t.dim()}])

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, module, batch, batch_idx)
        self.before = self.state(trainer, module)

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.changed.append(resuming.differences(self.state(trainer, module), self.before) != [])
        self.were_bad.append(self.bad)


class TestLeavingOut:
    @pytest.mark.parametrize(
        ("search", "seed", "bad"),
        [
            (lambda: cream(meta_interval=1), TRAINING, 4),
            (lambda: small.darts("fused"), TRAINING, 2),
            (lambda: small.darts("fused", order="first"), ALPHA, 4),
            (small.training, RETRAINING, 2),
        ],
        ids=["cream", "darts", "darts, alpha", "training"],
    )
    def test_changes_nothing_and_goes_on(
        self,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        search: Callable[[], Any],
        seed: int,
        bad: int,
    ) -> None:
        spoil(monkeypatch, seed)
        probe = Probe(bad)
        monkeypatch.setattr(soundness, "unless_there", lambda _: [probe])
        found = search()
        assert probe.skipped == sum(probe.were_bad) == bad
        assert probe.changed == [not was for was in probe.were_bad]
        assert all(tensor.isfinite().all() for tensor in found["state"].values())
        lines = [line for line in capsys.readouterr().err.splitlines() if "is left out" in line]
        assert len(lines) == bad
        assert lines[0].startswith("The loss")
        assert lines[0].endswith(f"; it is left out, 1 of at most {bad}.")
        for report in found.get("reports", []):
            assert all(math.isfinite(value) for value in report.values() if isinstance(value, float))

    @pytest.mark.parametrize(
        ("part", "images_of", "search"),
        [
            (
                (CreamLightningModule, "_meta_step"),
                lambda path, images, targets, batch_idx: images,
                lambda: cream(meta_interval=1),
            ),
            (
                (DartsLightningModule, "_architecture_step"),
                lambda training, validation: training[0],
                lambda: small.darts("fused", order="first"),
            ),
        ],
        ids=["cream", "darts"],
    )
    def test_takes_back_what_its_first_part_has_changed(
        self,
        monkeypatch: pytest.MonkeyPatch,
        part: tuple[type, str],
        images_of: Callable[..., Tensor],
        search: Callable[[], Any],
    ) -> None:
        """Only the images of the second part are bad: those of the main loss, and of the loss of the weights."""
        take = getattr(*part)
        probe = Probe(3)
        taken = 0

        def spoilt(self: Any, *arguments: Any) -> None:
            nonlocal taken
            take(self, *arguments)
            assert not probe.bad
            assert resuming.differences(probe.state(self.trainer, self), probe.before) != []
            taken += 1
            if taken <= 3:
                images_of(*arguments)[-1] = math.nan

        monkeypatch.setattr(*part, spoilt)
        monkeypatch.setattr(soundness, "unless_there", lambda _: [probe])
        found = search()
        assert probe.skipped == sum(probe.were_bad) == 3
        assert probe.changed == [not was for was in probe.were_bad]
        for report in found["reports"]:
            assert all(math.isfinite(value) for value in report.values() if isinstance(value, float))

    def test_counts_in_no_average(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A training accuracy is one of images that have been learnt from."""
        spoil(monkeypatch, TRAINING)
        probe = Probe(2)
        monkeypatch.setattr(soundness, "unless_there", lambda _: [probe])
        averages: list[Any] = []
        take = small.DartsStrategy.configure_oneshot_module

        def noted(self: Any, module: Any) -> Any:
            made = take(self, module)
            averages.append(made._train_accuracy)
            return made

        monkeypatch.setattr(small.DartsStrategy, "configure_oneshot_module", noted)
        small.darts("fused", order="first")
        # Three of the four steps of the last epoch.
        assert [average.weight.item() for average in averages] == [3]

    def test_of_the_matching_layer_leaves_all_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        nothing = torch.tensor(math.nan)
        monkeypatch.setattr(cream_module, "matching_gradient", lambda _, ps, *__: tuple(nothing + p for p in ps))
        probe = Probe(99)
        monkeypatch.setattr(soundness, "unless_there", lambda _: [probe])
        found = cream()
        assert probe.skipped > 1
        assert not any(name.startswith("matching.") for names in found["moved"] for name in names)
        assert probe.changed == [not was for was in probe.were_bad]
        assert [math.isnan(loss) for loss in found["losses"]] == probe.were_bad

    def test_has_a_bound(self, monkeypatch: pytest.MonkeyPatch) -> None:
        spoil(monkeypatch, TRAINING)
        monkeypatch.setattr(soundness, "unless_there", lambda _: [Soundness(3)])
        with pytest.raises(TrainingError, match=r"The loss is nan in step [1-4] of epoch 4, on path"):
            cream()

    def test_is_counted_in_checkpoints(self) -> None:
        first, again = Soundness(3), Soundness(3)
        first.skipped = 2
        again.load_state_dict(first.state_dict())
        assert again.skipped == 2


def halved(epochs: int, watcher: Any) -> Any:
    """Make a trainer that computes in float16, as on a GPU, and scales the loss."""
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024))
    return Trainer(**QUIET, max_epochs=epochs, callbacks=[watcher], num_sanity_val_steps=0, plugins=[precision])


class TestHalfPrecision:
    """Of 16-mixed: Lightning's own plugin, and PyTorch's own scaler."""

    @pytest.fixture(autouse=True)
    def half(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(small, "trainer", halved)

    @pytest.mark.parametrize(("search", "seed"), [(small.training, RETRAINING), (cream, TRAINING)])
    def test_leaves_out_so_many_bad_steps(
        self, monkeypatch: pytest.MonkeyPatch, search: Callable[[], Any], seed: int
    ) -> None:
        spoil(monkeypatch, seed)
        probe = Probe(1)
        monkeypatch.setattr(soundness, "unless_there", lambda _: [probe])
        with pytest.raises(TrainingError, match=r"^The loss( of .*)? is nan in step [1-4] of epoch 2, "):
            search()
        assert probe.skipped == 2
        assert probe.changed == [not was for was in probe.were_bad]
        assert probe.were_bad.count(True) == 1

    @pytest.mark.parametrize("execution", ["foreach", "fused"])
    def test_a_bad_loss_with_sound_gradients_moves_nothing(
        self, monkeypatch: pytest.MonkeyPatch, execution: str
    ) -> None:
        """The scaler looks at the gradients alone."""
        compute = small.ImageClassifier.training_step
        monkeypatch.setattr(
            small.ImageClassifier,
            "training_step",
            lambda self, batch, number: compute(self, batch, number) + (math.inf if number == 2 else 0),
        )
        monkeypatch.setattr(small, "SGD", {**small.SGD, execution: True})
        probe = Probe(2)
        monkeypatch.setattr(soundness, "unless_there", lambda _: [probe])
        small.training()
        assert probe.were_bad == [False, False, True, False] * 2
        assert probe.changed == [not was for was in probe.were_bad]


class TestLossScaling:
    """What the callback does when PyTorch's scaler has unscaled the gradients."""

    @pytest.fixture
    def weight(self) -> nn.Parameter:
        weight = nn.Parameter(torch.ones(2))
        weight.grad = torch.tensor([math.inf, 1.0])
        return weight

    def step(self, weight: nn.Parameter, scale: float, loss: float) -> Soundness:
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(torch.ones(()))  # it has no scale before
        optimizer = torch.optim.SGD([weight], 0.5)
        loop = SimpleNamespace(batch_idx=4)
        plugin = SimpleNamespace(scaler=scaler)
        trainer = SimpleNamespace(precision_plugin=plugin, fit_loop=loop, current_epoch=1, optimizers=[optimizer])
        callback = Soundness(1)
        callback.on_before_backward(trainer, None, torch.tensor(loss))
        callback.on_before_optimizer_step(trainer, SimpleNamespace(trainer=trainer), optimizer)
        return callback

    def test_a_gradient_too_large_for_the_scale_is_left_to_the_scaler(self, weight: nn.Parameter) -> None:
        callback = self.step(weight, 65536.0, loss=3.0)
        assert (callback.skipped, callback.bad) == (0, False)
        assert weight.grad is not None
        assert weight.grad[0] == math.inf  # by which it knows

    @pytest.mark.parametrize(("scale", "loss"), [(65536.0, math.nan), (0.5, 3.0)])
    def test_a_loss_or_a_gradient_that_no_scale_helps_counts(
        self, weight: nn.Parameter, scale: float, loss: float
    ) -> None:
        callback = self.step(weight, scale, loss)
        assert (callback.skipped, callback.bad) == (1, True)


class TestCheckpoints:
    @pytest.mark.parametrize(
        ("kind", "sentence"),
        [
            ("cream", r"The loss is nan in step 3 of epoch 1, on path \[\d.*\], at learning rate 0\.0\d+"),
            (
                "darts",
                r"The loss of α is nan in step 3 of epoch 1, with cell weights normal .*, at learning rate 0\.0\d+",
            ),
            ("retrain", r"The loss is nan in step 3 of epoch 1, at learning rate 0\.05"),
        ],
    )
    def test_are_of_before_and_the_trial_has_failed(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        kind: str,
        sentence: str,
    ) -> None:
        begin = LastTwo.on_train_batch_start

        def spoilt(self: LastTwo, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            begin(self, trainer, module, batch, batch_idx)
            if batch_idx == 2:
                images, _ = batch["train"] if kind == "darts" else batch
                images[3] = math.nan

        monkeypatch.setattr(LastTwo, "on_train_batch_start", spoilt)
        with pytest.raises(SystemExit) as caught:
            cli.run(lambda: resuming.run(kind, tmp_path, {"checkpoint_minutes": 1e-6}))
        assert caught.value.code == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert re.fullmatch(f"error: {sentence}: the training has diverged, and its last checkpoint is of .*", error)
        checkpoint = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
        assert checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"] == 2
        assert all(t.isfinite().all() for t in checkpoint["state_dict"].values())

    @pytest.mark.parametrize(
        ("where", "what"),
        [("weight", "weight"), ("running_var", "running statistic"), ("momentum", "state of an optimizer")],
    )
    def test_of_what_is_no_number_are_refused(self, where: str, what: str) -> None:
        norm = nn.BatchNorm1d(2)
        optimizer = torch.optim.SGD(norm.parameters(), 0.1, momentum=0.9)
        norm(torch.randn(3, 2)).square().sum().backward()
        optimizer.step()
        refuse_broken(norm, [optimizer])
        broken = optimizer.state[norm.weight]["momentum_buffer"] if where == "momentum" else getattr(norm, where)
        with torch.no_grad():
            broken[1] = math.inf
        with pytest.raises(TrainingError, match=rf"^A {what} is inf: the training has diverged"):
            refuse_broken(norm, [optimizer])
