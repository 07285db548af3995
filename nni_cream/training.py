"""The Lightning module that trains an image classifier: a supernet under a strategy, or one network by itself."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Mapping
from typing import Any

import nni
import torch
import torch.nn.functional as F
from nni.nas.evaluator.pytorch import LightningModule
from pytorch_lightning.trainer.states import TrainerFn
from timm.loss.cross_entropy import SoftTargetCrossEntropy
from timm.optim._optim_factory import create_optimizer_v2, get_optimizer_class, list_optimizers
from timm.scheduler.scheduler_factory import create_scheduler_v2
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from nni_cream import soundness
from nni_cream.averages import StepMean
from nni_cream.distributed import mean
from nni_cream.ema import WeightAverage
from nni_cream.errors import UserError
from nni_cream.mixing import Mixing


class Measures(nn.Module):
    """What is measured of one set of weights: shares of right answers, and the loss.

    Args:
        num_classes: number of classes.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.top1 = MulticlassAccuracy(num_classes, average="micro")
        self.top5 = MulticlassAccuracy(num_classes, average="micro", top_k=min(5, num_classes))
        # Lightning's own average loses an image where several processes have an odd number of them.
        self.loss = MeanMetric()

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Take one batch: logits [N, classes] and labels [N]."""
        self.top1(logits, targets)
        self.top5(logits, targets)
        self.loss(F.cross_entropy(logits, targets), weight=len(targets))


class ImageClassifier(LightningModule):
    """Trains ``model``, [N, 3, R, R] to logits [N, classes], and reports its accuracy to NNI.

    Args:
        num_classes: number of classes.
        optimizer: arguments of ``timm.optim.create_optimizer_v2``. Weight decay spares biases and batch norms.
        schedule: arguments of ``timm.scheduler.create_scheduler_v2``. Unless ``step_on_epochs`` is true, the learning
            rate changes after every step, and the number of steps is the true one.
        label_smoothing: of the training loss.
        auxiliary_weight: of the loss of an auxiliary head, in a network that has one.
        drop_path_rate: what the drop path of a network with ``set_drop_path_rate`` rises to, from 0, epoch by epoch.
        mixing: what mixes the images of a training batch, if anything does; it smooths labels itself, and
            ``label_smoothing`` does not count then.
        ema: arguments of ``timm.utils.ModelEmaV3``, which then averages the weights; None for no average. What is
            measured as ``val_accuracy`` and so on is of the averaged weights, ``val_plain_accuracy`` of the network's.

    Attributes:
        ema: the average, once there is a model, or None.

    Raises:
        UserError: if timm has no optimizer of that name, or the optimizer has no such argument.
    """

    def __init__(
        self,
        num_classes: int,
        optimizer: Mapping[str, Any],
        schedule: Mapping[str, Any],
        label_smoothing: float = 0.0,
        auxiliary_weight: float = 0.0,
        drop_path_rate: float = 0.0,
        mixing: Mixing | None = None,
        ema: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        _check_optimizer(optimizer)
        self.optimizer_arguments = dict(optimizer)
        self.schedule_arguments = dict(schedule)
        self.mixing = mixing
        self.criterion = (
            nn.CrossEntropyLoss(label_smoothing=label_smoothing) if mixing is None else SoftTargetCrossEntropy()
        )
        self.auxiliary_weight = auxiliary_weight
        self.drop_path_rate = drop_path_rate
        self.train_loss = StepMean()
        self.measures = Measures(num_classes)
        self.ema_arguments = ema
        self.ema: ModelEmaV3 | None = None
        self.plain_measures = None if ema is None else Measures(num_classes)

    def set_model(self, model: nn.Module) -> None:
        """Take the network to train; the average begins with its weights."""
        super().set_model(model)
        if self.ema_arguments is not None:
            # A part of this module, so that Lightning moves it between devices and keeps it in checkpoints.
            self.ema = ModelEmaV3(model, **self.ema_arguments).requires_grad_(False)
            # Lightning warns of what is in evaluation mode when a training begins; it sees to that where it measures.
            self.ema.train()

    def forward(self, images: Tensor) -> Tensor:
        """Return logits; of a network with an auxiliary head, in training, its as well."""
        logits: Tensor = self.model(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        images, targets = batch
        if self.mixing is not None:
            images, targets = self.mixing(images, targets, self.trainer.current_epoch)
        output = self(images)
        logits, *auxiliary = output if isinstance(output, tuple) else (output,)
        loss: Tensor = self.criterion(logits, targets)
        for others in auxiliary:
            loss = loss + self.auxiliary_weight * self.criterion(others, targets)
        shown = mean(loss)
        self.train_loss.update(shown)
        self.log("train_loss", shown, prog_bar=True)
        return loss

    def configure_callbacks(self) -> Any:
        """End a training that has diverged, if nothing else does, and average the weights."""
        callbacks = soundness.unless_there(self.trainer)
        there = any(isinstance(callback, WeightAverage) for callback in self.trainer.callbacks)
        return [*callbacks, *([WeightAverage()] if self.ema is not None and not there else [])]

    def on_train_start(self) -> None:
        """Drop as many paths as in the epoch that an interrupted training goes on with."""
        self._set_drop_path_rate()

    def on_train_epoch_start(self) -> None:
        """Begin a new average, and drop more paths than before."""
        self.train_loss.reset()
        self._set_drop_path_rate()

    def _set_drop_path_rate(self) -> None:
        if hasattr(self.model, "set_drop_path_rate"):
            self.model.set_drop_path_rate(self.drop_path_rate * self.trainer.current_epoch / self.trainer.max_epochs)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Measure one batch."""
        self._measure(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Measure one batch."""
        self._measure(batch, "test")

    def _measure(self, batch: tuple[Tensor, Tensor], stage: str) -> None:
        images, targets = batch
        logits = self(images)
        if self.ema is not None:
            self._count(f"{stage}_plain", self.plain_measures, logits, targets)
            logits = self.ema(images)
        self._count(stage, self.measures, logits, targets)

    def _count(self, name: str, measures: Any, logits: Tensor, targets: Tensor) -> None:
        measures.update(logits, targets)
        self.log(f"{name}_accuracy", measures.top1, on_epoch=True, prog_bar=True)
        self.log(f"{name}_top5", measures.top5, on_epoch=True)
        self.log(f"{name}_loss", measures.loss, on_epoch=True)

    def on_validation_epoch_end(self) -> None:
        """Report the epoch to NNI."""
        training = self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking
        if not training:
            return
        # In every process, because they put their averages together here.
        train_loss = self.train_loss.compute().item()
        if not self.trainer.is_global_zero:
            return
        measured = {
            name: value.item() for name, value in self.trainer.callback_metrics.items() if name.startswith("val_")
        }
        nni.report_intermediate_result(
            {
                "default": measured["val_accuracy"],
                "epoch": self.trainer.current_epoch + 1,
                "train_loss": train_loss,
                **measured,
            }
        )

    def configure_optimizers(self) -> Any:
        """Build optimizer and schedule with timm."""
        optimizer = create_optimizer_v2(self.model, **self.optimizer_arguments)
        if optimizer.defaults.get("fused") and optimizer.defaults.get("momentum"):
            # torch's fused step takes no parameters of which some have been stepped before and others have not, as in a
            # supernet. With a buffer of zeros the first step is the same.
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        epochs = self.trainer.max_epochs or 1
        scheduler, _ = create_scheduler_v2(
            optimizer,
            num_epochs=epochs,
            updates_per_epoch=math.ceil(self.trainer.estimated_stepping_batches / epochs),
            **{"step_on_epochs": False, **self.schedule_arguments},
        )
        interval = "epoch" if scheduler.t_in_epochs else "step"
        return [optimizer], [{"scheduler": scheduler, "interval": interval}]

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Advance a timm schedule, which wants to be told how many epochs or batches there have been."""
        if scheduler.t_in_epochs:
            scheduler.step(self.trainer.current_epoch + 1)
        else:
            scheduler.step_update(num_updates=self.trainer.fit_loop.total_batch_idx + 1)


def loss_scale(trainer: Any) -> float:
    """Return by what Lightning multiplies the loss, and with it the gradients until a step: 1 but with 16-mixed."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())


def _check_optimizer(arguments: Mapping[str, Any]) -> None:
    name = arguments["opt"]
    known = list_optimizers()
    if name.lower().removeprefix("lookahead_") not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
        raise UserError(f"timm has no optimizer {name!r} (optimizer.name); did you mean {near!r}?")
    taken = inspect.signature(get_optimizer_class(name.lower().removeprefix("lookahead_"))).parameters
    for execution in ("foreach", "fused"):
        if arguments.get(execution) and execution not in taken:
            raise UserError(
                f"The optimizer {name!r} has no {execution} execution (optimizer.execution); leave that out."
            )
    if "eps" in arguments and "eps" not in taken:
        raise UserError(f"The optimizer {name!r} has no eps (optimizer.eps); leave that out.")
