"""The DARTS search as a Lightning module: what a step, an epoch, and the end of a search do.

Source: Liu et al., "DARTS: Differentiable Architecture Search", ICLR 2019, algorithm 1. ``docs/darts.md`` says where we
depart from the published code, and why.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Final

import nni
import torch
import torch.nn.functional as F
from nni.nas.evaluator.pytorch import LightningModule
from nni.nas.oneshot.pytorch.base_lightning import BaseOneShotLightningModule
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler
from torchmetrics.aggregation import SumMetric

from nni_cream import hypergradient, soundness
from nni_cream.averages import StepMean
from nni_cream.collapse import WINDOW, rises_sharply
from nni_cream.cuda_graphs import Recorded, Recorder
from nni_cream.curvature import dominant_eigenvalue
from nni_cream.distributed import mean, processes
from nni_cream.errors import UserError
from nni_cream.genotype import CellKind, entropy
from nni_cream.hypergradient import Hypergradient
from nni_cream.launching import refuse_other_strategies
from nni_cream.strategies.schedules import refuse_plateau
from nni_cream.strategies.settings import DartsSettings
from nni_cream.supernet.alphas import Alphas
from nni_cream.supernet.expected_cost import ExpectedCost
from nni_cream.supernet.functional import has_tied_parameters, pure_loss
from nni_cream.supernet.mixed_cell import MixedCell
from nni_cream.tf32 import without_tf32
from nni_cream.training import loss_scale

Batch = tuple[Tensor, Tensor]

TRAIN: Final = "train"
ALPHA: Final = "alpha"


@dataclass(frozen=True)
class Epoch:
    """What is remembered of an epoch, so that a search can go back to it.

    Attributes:
        alphas: the tables of α after it.
        val_accuracy: of the supernet, in [0, 1].
        eigenvalue: dominant eigenvalue of the validation Hessian in α; None where it is not tracked.
    """

    alphas: list[Tensor]
    val_accuracy: float
    eigenvalue: float | None


class _Given(torch.autograd.Function):
    """A loss whose gradients are known: going back from it puts them where it would have put them."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, loss: Tensor, parameters: list[Tensor], gradients: list[Any]) -> Tensor:
        # The anchor is something to differentiate by, so that there is a way back.
        ctx.pairs = list(zip(parameters, gradients, strict=True))
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[None, ...]:
        for parameter, gradient in ctx.pairs:
            parameter.grad = gradient
        return None, None, None, None


class DartsLightningModule(BaseOneShotLightningModule):
    """The search itself; see :class:`DartsStrategy`.

    Args:
        training_module: the evaluator's module. Its ``forward`` gives logits, its ``configure_optimizers`` the
            optimizer and the schedule of the weights.
        settings: as given to the strategy.
        alphas: α.
        expected_cost: E[MACs] as a function of α, if it is to be held down.
    """

    def __init__(
        self,
        training_module: LightningModule,
        settings: DartsSettings,
        alphas: Alphas,
        expected_cost: ExpectedCost | None,
    ) -> None:
        super().__init__(training_module)
        self.settings = settings
        self.alphas = alphas
        self.expected_cost = expected_cost
        self.epochs: list[Epoch] = []
        self.ended_because: str | None = None
        self._alpha_names = [f"alphas.{name}" for name, _ in alphas.named_parameters()]
        self._weight_names: list[str] = []
        self._weights: list[Tensor] = []
        self._tied = True
        self._last_for_alpha: Batch | None = None
        self._recorded: dict[str, Recorded] = {}
        self._recorder: Recorder | None = None
        self._val_accuracy: float | None = None
        self._train_loss, self._train_accuracy, self._alpha_loss = StepMean(), StepMean(), StepMean()
        self._correct = SumMetric()
        self._seen = SumMetric()

    def set_model(self, model: nn.Module) -> None:
        """Take the relaxed space, whose parameters are the weights."""
        super().set_model(model)
        self._find_weights()
        self._tied = has_tied_parameters(self)

    def _find_weights(self) -> bool:
        """Take as weights what is to be trained now; tell whether that is something else than before."""
        named = {f"training_module.{name}": p for name, p in self.training_module.named_parameters()}
        names = [name for name, parameter in named.items() if parameter.requires_grad]
        changed = names != self._weight_names
        self._weight_names, self._weights = names, [named[name] for name in names]
        return changed

    # The step.

    def configure_architecture_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer of α."""
        settings = self.settings
        return torch.optim.Adam(
            self.alphas.parameters(),
            lr=settings.alpha_lr,
            betas=settings.alpha_betas,
            weight_decay=settings.alpha_weight_decay,
        )

    def configure_callbacks(self) -> Any:
        """End a search that has diverged, if nothing else does."""
        return soundness.unless_there(self.trainer)

    def describe_step(self) -> str:
        """Say how large the weights of operations are in each kind of cell."""
        shares = {name: self.alphas[name].detach().softmax(-1) for name in self.alphas}
        ranges = (f"{name} {share.min().item():.3g} to {share.max().item():.3g}" for name, share in shares.items())
        return f"with cell weights {', '.join(ranges)}"

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Let the evaluator's module decide how its schedule steps."""
        self.training_module.lr_scheduler_step(scheduler, metric)

    def on_train_start(self) -> None:
        """Check, before anything is trained, that the search can be what its settings say.

        Raises:
            UserError: if α would not learn, the step of the weights cannot be unrolled, their schedule waits for a
                metric, epochs go by without a validation, training ends before the first one, or the trainer has to go
                on where the search may be ended.

        Warns:
            UserWarning: if some validation batches would never be used.
        """
        super().on_train_start()
        refuse_other_strategies(self.trainer)
        refuse_plateau(self.trainer)
        # A search that was ended, and interrupted after that, has nothing left to train.
        self.trainer.should_stop = self.ended_because is not None
        epochs = self.trainer.max_epochs
        if epochs is not None and 0 <= epochs <= self.settings.warmup_epochs:
            raise UserError(
                f"α learns after {self.settings.warmup_epochs} warm-up epochs, but training lasts {epochs}: make "
                "darts.warmup_epochs smaller than epochs."
            )
        self._check_trainer()
        self._check_loaders()
        if self.settings.order == "second":
            hypergradient.sgd_step(self._weight_optimizer(), self._weights)
        can_be_recorded = self.device.type == "cuda" and processes() == 1 and self.trainer.precision != "16-mixed"
        if self.settings.cuda_graphs and can_be_recorded:
            self.record_steps(Recorder())

    def _check_trainer(self) -> None:
        trainer, settings = self.trainer, self.settings
        if trainer.limit_val_batches == 0 or trainer.check_val_every_n_epoch != 1:
            raise UserError(
                "DartsStrategy reports the accuracy of every epoch, but the trainer leaves validations out; leave its "
                "limit_val_batches above 0 and its check_val_every_n_epoch at 1."
            )
        first = trainer.val_check_batch
        # Where validations go by the clock there is no such batch.
        if first is not None and 0 <= trainer.max_steps < first:
            raise UserError(
                f"DartsStrategy reports the accuracy of every epoch, but training lasts {trainer.max_steps} steps "
                f"(max_steps), and the first validation comes after {first}; set max_steps to at least that."
            )
        may_end = settings.stop_above_skips is not None or settings.eigenvalue in ("stop", "rollback")
        if may_end and ((trainer.min_epochs or 0) > 1 or (trainer.min_steps or 0) > 0):
            raise UserError(
                "stop_above_skips and eigenvalue may end the search, but the trainer's min_epochs or min_steps would "
                "make it go on; leave them out."
            )

    def _check_loaders(self) -> None:
        batches, loader = self.trainer.num_training_batches, self.trainer.train_dataloader[ALPHA]
        if _in_fixed_order(loader) and len(loader) > batches:
            warnings.warn(
                f"α learns from the same {batches} of {len(loader)} validation batches in every epoch, which has no "
                "more training batches than that; shuffle the loader of the validation images (shuffle=True).",
                stacklevel=2,
            )

    def record_steps(self, recorder: Recorder) -> None:
        """Record both halves of a step after a few steps, and replay them from then on."""
        self._recorder = recorder
        self._recorded = {
            "α": Recorded(self._hypergradient_of, self._state_of_a_step, recorder),
            "weights": Recorded(self._gradients_of, self._state_of_a_step, recorder),
        }

    def _state_of_a_step(self) -> Iterator[Tensor | None]:
        yield from self.parameters()
        yield from self.buffers()
        state = self._weight_optimizer().state
        yield from (state.get(weight, {}).get("momentum_buffer") for weight in self._weights)

    @without_tf32()
    def training_step(self, batch: dict[str, Batch], batch_idx: int) -> Tensor | None:
        """Move α by a validation batch, then the weights by a training batch (algorithm 1)."""
        images, targets = batch[TRAIN]
        if self.trainer.current_epoch >= self.settings.warmup_epochs:
            self._architecture_step(batch[TRAIN], batch[ALPHA])
            if soundness.of(self.trainer).bad:
                self.advance_lr_schedulers(batch_idx)
                return None
        with self._fixed_alphas():
            logits, loss = self._forward(images, targets)
            clip = self.settings.gradient_clip
            if clip is not None:
                clip *= loss_scale(self.trainer)
            self.advance_optimization(loss, batch_idx, clip, "norm")
        self.advance_lr_schedulers(batch_idx)
        if soundness.of(self.trainer).bad:
            return None
        accuracy = (logits.argmax(-1) == targets).to(loss).mean()
        loss, accuracy = mean(torch.stack([loss.detach(), accuracy])).unbind()
        self._train_loss.update(loss)
        self._train_accuracy.update(accuracy)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def _architecture_step(self, training: Batch, validation: Batch) -> None:
        result = self.hypergradient(training, validation)
        gradients = result.gradients
        if self.expected_cost is not None:
            gradients = tuple(a + b for a, b in zip(gradients, self._cost_gradients(), strict=True))
        read: dict[str, Sequence[Tensor]] = {
            "α": list(self.alphas.parameters()),
            "loss of α": [result.valid_loss],
            "gradient of α": gradients,
        }
        guard = soundness.of(self.trainer)
        if not guard.allows(self, read):
            return
        optimizer: Any = self.architecture_optimizers()
        guard.remember(optimizer.optimizer, list(self.alphas.parameters()))
        for table, gradient in zip(self.alphas.parameters(), gradients, strict=True):
            table.grad = gradient
        # Not through Lightning, whose loss scaling (16-mixed) knows nothing of this gradient.
        optimizer.optimizer.step()
        optimizer.optimizer.zero_grad()
        self._last_for_alpha = validation
        self._alpha_loss.update(result.valid_loss)
        self.log("alpha_loss", result.valid_loss)

    def _forward(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits, and the loss to go back from."""
        if not self._recorded:
            logits = self.training_module(images)
            return logits, self._criterion(logits, targets)
        logits, loss, *gradients = self._recorded["weights"](images, targets)
        assert logits is not None
        # What the next call overwrites may be logged after it.
        return logits.clone(), _Given.apply(torch.zeros((), requires_grad=True), loss, self._weights, gradients)

    def _gradients_of(self, images: Tensor, targets: Tensor) -> tuple[Tensor | None, ...]:
        """Return logits, loss, and the gradients of the weights."""
        kind = self.device.type
        mixed, precision = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        # A weight that was rounded in a recording is no rounded weight for what follows it.
        with torch.enable_grad(), torch.autocast(kind, precision, mixed, cache_enabled=False):
            logits = self.training_module(images)
            loss = self._criterion(logits, targets)
        gradients = torch.autograd.grad(loss, self._weights, allow_unused=True)
        return logits.detach(), loss.detach(), *gradients

    @without_tf32()
    def hypergradient(self, training: Batch, validation: Batch) -> Hypergradient:
        """Return the gradient of the validation loss in α, of the kind that the settings ask for.

        In the parameters' own precision: a difference of gradients would be lost in a shorter one.
        """
        if not self._recorded:
            return self._hypergradient(training, validation, None)
        numbers = hypergradient.sgd_numbers(self._weight_optimizer(), self.device)
        found = self._recorded["α"](*training, *validation, numbers)
        loss, *tables = (tensor.clone() for tensor in found if tensor is not None)
        return Hypergradient(tuple(tables[: len(self.alphas)]), tuple(tables[len(self.alphas) :]), loss)

    def _hypergradient_of(self, *given: Tensor) -> tuple[Tensor, ...]:
        result = self._hypergradient(given[:2], given[2:4], given[4])
        return result.valid_loss, *result.gradients, *result.implicit

    def _hypergradient(self, training: Any, validation: Any, numbers: Tensor | None) -> Hypergradient:
        # Losses leave it by themselves, but their derivatives are computed here.
        with torch.autocast(self.device.type, enabled=False):
            return self._by_kind(training, validation, numbers)

    def _by_kind(self, training: Batch, validation: Batch, numbers: Tensor | None) -> Hypergradient:
        train_loss, valid_loss = self.pure_loss(training), self.pure_loss(validation)
        alphas = list(self.alphas.parameters())
        if self.settings.order == "first":
            return hypergradient.first_order(train_loss, valid_loss, self._weights, alphas, ())
        step = hypergradient.sgd_step(self._weight_optimizer(), self._weights, numbers)
        if self.settings.hypergradient == "exact":
            return hypergradient.exact(train_loss, valid_loss, self._weights, alphas, step)
        return hypergradient.finite_difference(
            train_loss, valid_loss, self._weights, alphas, step, self.settings.radius
        )

    def pure_loss(self, batch: Batch) -> Any:
        """Return the loss on ``batch`` as a function of (weights, alphas), which changes nothing in the supernet."""
        images, targets = batch
        names = (self._weight_names, self._alpha_names)
        return pure_loss(self, names, lambda logits: self._criterion(logits, targets), images, self._tied)

    def _criterion(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets, label_smoothing=self.settings.label_smoothing)

    def cost_penalty(self, alphas: list[Tensor]) -> Tensor:
        """Return what is added to the validation loss: weight·max(0, E[MACs] / target − 1), a scalar."""
        assert self.expected_cost is not None
        assert self.settings.flops_target is not None
        excess = self.expected_cost(alphas) / self.settings.flops_target - 1
        return self.settings.flops_weight * F.relu(excess)

    def _cost_gradients(self) -> tuple[Tensor, ...]:
        variables = [alpha.detach().requires_grad_() for alpha in self.alphas.parameters()]
        with torch.enable_grad():
            penalty = self.cost_penalty(variables)
        return torch.autograd.grad(penalty, variables, allow_unused=True, materialize_grads=True)

    @contextmanager
    def _fixed_alphas(self) -> Iterator[None]:
        # The step of the weights has no use for a gradient in α, and it costs a pass over every operation's output.
        self.alphas.requires_grad_(False)
        try:
            yield
        finally:
            self.alphas.requires_grad_(True)

    def _weight_optimizer(self) -> torch.optim.Optimizer:
        optimizers: list[torch.optim.Optimizer] = self.trainer.optimizers
        return next(o for o in optimizers if not getattr(o, "is_arch_optimizer", False))

    # The epoch.

    def on_train_epoch_start(self) -> None:
        """Begin new averages, with the weights that are to be trained by now."""
        super().on_train_epoch_start()
        # Layers may be unfrozen while a training runs; callbacks have had their turn.
        if self._find_weights() and self._recorded:
            assert self._recorder is not None
            # A recording holds the gradients of the weights of before. Memory goes back with the old ones.
            self.record_steps(Recorder(self._recorder.record))
        self._val_accuracy = None
        for metric in (self._train_loss, self._train_accuracy, self._alpha_loss):
            metric.reset()

    def on_validation_epoch_start(self) -> None:
        """Begin a new count."""
        self._correct.reset()
        self._seen.reset()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure the supernet on one held-out batch."""
        images, targets = batch
        self._correct.update((self.training_module(images).argmax(-1) == targets).sum())
        self._seen.update(len(targets))

    def on_validation_epoch_end(self) -> None:
        """Keep the accuracy for the report of the epoch; Lightning's sanity check is of no epoch."""
        if not self.trainer.sanity_checking:
            self._val_accuracy = (self._correct.compute() / self._seen.compute()).item()

    def on_train_epoch_end(self) -> None:
        """Report the epoch, whose validation is over by now, and end the search if it collapses.

        Not at the end of the validation, which Lightning runs in inference mode: there is no Hessian in it. An epoch
        that max_steps has cut short has had no validation, and is not reported.
        """
        super().on_train_epoch_end()
        accuracy = self._val_accuracy
        if accuracy is None:
            return
        metrics: dict[str, Any] = {
            "val_accuracy": accuracy,
            "train_loss": self._train_loss.compute().item(),
            "train_accuracy": self._train_accuracy.compute().item(),
        }
        learning = self.trainer.current_epoch >= self.settings.warmup_epochs
        if learning:
            metrics["alpha_loss"] = self._alpha_loss.compute().item()
        metrics |= self._describe_alphas()
        eigenvalue = None
        if learning and self.settings.eigenvalue != "off" and self._last_for_alpha is not None:
            metrics["eigenvalue"] = eigenvalue = self._dominant_eigenvalue(self._last_for_alpha)
        self.log_dict({name: float(value) for name, value in metrics.items() if name != "train_loss"}, sync_dist=True)
        if self.trainer.is_global_zero:
            nni.report_intermediate_result({"default": accuracy, "epoch": self.trainer.current_epoch + 1, **metrics})
        tables = [table.detach().cpu().clone() for table in self.alphas.parameters()]
        self.epochs.append(Epoch(tables, accuracy, eigenvalue))
        if learning:
            self._end_if_it_collapses()

    def _describe_alphas(self) -> dict[str, Any]:
        tables = {name: self.alphas[name].detach().float().cpu().numpy() for name in self.alphas}
        rows = {name: table.reshape(-1, table.shape[-1]) for name, table in tables.items()}
        total = sum(len(table) for table in rows.values())
        described: dict[str, Any] = {"entropy": sum(len(table) * entropy(table) for table in rows.values()) / total}
        cells = self.cells()
        for kind, cell in cells.items():
            described[f"entropy_{kind}"] = entropy(tables[kind])
            described[f"skip_connections_{kind}"] = cell.skip_connections()
        if self.expected_cost is not None:
            with torch.no_grad():
                described["expected_flops"] = self.expected_cost(list(self.alphas.parameters())).item()
        return described

    def cells(self) -> dict[CellKind, MixedCell]:
        """Return a cell of each kind; none in a space without cells."""
        found: dict[CellKind, MixedCell] = {}
        for module in self.model.modules():
            if isinstance(module, MixedCell):
                found.setdefault(module.kind, module)
        return found

    @without_tf32()
    def _dominant_eigenvalue(self, batch: Batch) -> float:
        loss = self.pure_loss(batch)
        return dominant_eigenvalue(lambda alphas: loss(self._weights, alphas), list(self.alphas.parameters()))

    # The end.

    def on_train_end(self) -> None:
        """Give back the memory of recorded steps, in which the weights are where they were during the training."""
        super().on_train_end()
        self._recorded, self._recorder = {}, None

    def _end_if_it_collapses(self) -> None:
        settings, normal = self.settings, self.cells().get("normal")
        limit = settings.stop_above_skips
        if limit is not None and normal is not None and normal.skip_connections() > limit:
            self._end(f"the normal cell keeps {normal.skip_connections()} skip connections, more than {limit}", back=1)
            return
        eigenvalues = [epoch.eigenvalue for epoch in self.epochs if epoch.eigenvalue is not None]
        if settings.eigenvalue in ("stop", "rollback") and rises_sharply(eigenvalues):
            back = WINDOW if settings.eigenvalue == "rollback" else 0
            self._end("the dominant eigenvalue of the validation Hessian rises sharply", back)

    def _end(self, why: str, back: int) -> None:
        """End the search with α as it was ``back`` epochs ago."""
        position = max(self.settings.warmup_epochs, len(self.epochs) - 1 - back)
        chosen = self.epochs[position]
        with torch.no_grad():
            for table, value in zip(self.alphas.parameters(), chosen.alphas, strict=True):
                table.copy_(value)
        self.ended_because = f"{why}; the result is that of epoch {position + 1}"
        self.epochs.append(chosen)
        self.trainer.should_stop = True

    def on_fit_end(self) -> None:
        """Report the result. The evaluator's own report is of no architecture and is left out."""
        if self.trainer.is_global_zero and self.epochs:
            nni.report_final_result({"default": self.epochs[-1].val_accuracy, "architecture": self.export()})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what Lightning does not know of."""
        epochs = [asdict(epoch) for epoch in self.epochs]
        # A checkpoint may be of the time between the last step of an epoch and its end, which needs what follows.
        checkpoint["darts"] = {
            "epochs": epochs,
            "ended_because": self.ended_because,
            "val_accuracy": self._val_accuracy,
        }
        if self.settings.eigenvalue != "off":
            checkpoint["darts"]["last_for_alpha"] = self._last_for_alpha

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what :meth:`on_save_checkpoint` kept."""
        state = checkpoint["darts"]
        self.epochs = [Epoch(**epoch) for epoch in state["epochs"]]
        self.ended_because = state["ended_because"]
        self._val_accuracy = state.get("val_accuracy")
        last = state.get("last_for_alpha")
        self._last_for_alpha = None if last is None else tuple(last)


def _in_fixed_order(loader: Any) -> bool:
    """Tell whether ``loader`` is known to give the same batches in every epoch."""
    if not isinstance(loader, DataLoader) or type(loader).__iter__ is not DataLoader.__iter__:
        return False
    # One with a batch sampler of its own has a sequential sampler as well, but does not use it.
    batches = loader.batch_sampler
    return type(batches) is BatchSampler and type(batches.sampler) is SequentialSampler
