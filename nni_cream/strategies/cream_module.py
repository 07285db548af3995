"""The Cream search as a Lightning module: what a step, an epoch, and the end of a search do.

Source: Peng et al., "Cream of the Crop: Distilling Prioritized Paths For One-Shot Neural Architecture Search",
NeurIPS 2020. Where the published code departs from its own description we follow the description; ``docs/cream.md``
lists each case.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import nni
import numpy as np
import torch
import torch.nn.functional as F
from lightning_fabric.utilities.data import sized_len
from nni.mutable import Sample
from nni.nas.evaluator.pytorch import LightningModule
from nni.nas.oneshot.pytorch.base_lightning import BaseOneShotLightningModule
from nni.nas.oneshot.pytorch.supermodule.base import BaseSuperNetModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from nni_cream import soundness
from nni_cream.averages import StepMean
from nni_cream.board import BoardEntry, BoardHistory, PrioritizedBoard
from nni_cream.cost import Cost, CostTable
from nni_cream.distributed import agreed, average_, gathered, mean, processes, total
from nni_cream.errors import UserError
from nni_cream.latency import TICKS
from nni_cream.launching import refuse_other_strategies
from nni_cream.loading import first_batches
from nni_cream.matching import MatchingLayer, matching_gradient
from nni_cream.sampling import Path, PathSampler, Prior
from nni_cream.strategies.schedules import refuse_plateau
from nni_cream.strategies.settings import CreamSettings
from nni_cream.supernet.batch_norm import batch_norms, batch_statistics, count_right, recalibrated
from nni_cream.supernet.depthwise import with_explicit_derivatives
from nni_cream.supernet.paths import PathSpace, activate, read_prior
from nni_cream.supernet.synchronised import alone
from nni_cream.training import loss_scale

# Paths that are measured at the end of an epoch while nothing is on the board yet.
_PROBES = 3
_TOP1_WEIGHT = 0.5


@dataclass(frozen=True)
class RankedPath:
    """A path after the search.

    Attributes:
        sample: what NNI calls it.
        accuracy: in [0, 1] on held-out images, with batch norms of its own.
        cost: of its network.
        latency: predicted time in milliseconds for a batch, where the budget is one of time.
    """

    sample: dict[str, Any]
    accuracy: float
    cost: Cost
    latency: float | None = None

    @property
    def _order(self) -> tuple[float, float, str]:
        return (-self.accuracy, self.cost.macs if self.latency is None else self.latency, str(self.sample))


@dataclass(frozen=True)
class Teaching:
    """Who teaches a step, and the weight ρ of the teaching, a scalar."""

    entry: BoardEntry
    weight: Tensor


class CreamLightningModule(BaseOneShotLightningModule):
    """The search itself; see :class:`CreamStrategy`.

    Args:
        training_module: the evaluator's module. Its ``forward`` gives logits, its ``configure_optimizers`` the
            optimizer and the schedule of the weights.
        settings: as given to the strategy.
        paths: the choices of the space.
        table: what each choice costs.
        num_classes: length of the logits.
        ranking_batches: held-out batches for the final ranking; the trainer's validation batches if None.
    """

    def __init__(
        self,
        training_module: LightningModule,
        settings: CreamSettings,
        paths: PathSpace,
        table: CostTable,
        num_classes: int,
        ranking_batches: Any,
    ) -> None:
        super().__init__(training_module)
        self.settings = settings
        self.paths = paths
        self.table = table
        self.board = PrioritizedBoard(settings.board_size, settings.admission_gap)
        self.history = BoardHistory()
        self.matching = MatchingLayer(settings.board_images, num_classes)
        self.ranking: list[RankedPath] = []
        self._ranking_batches = ranking_batches
        self._generator = np.random.default_rng(settings.seed)
        self.sampler = self._make_sampler()
        self._board_prior: tuple[tuple[BoardEntry, ...], Prior] | None = None
        self._fixed_prior = read_prior(settings.prior, paths)
        # A prior that leaves no path inside the interval is an error now, not after the first image.
        self.sampler.draw(self._fixed_prior, np.random.default_rng(0))
        self._held_out: Iterator[tuple[Tensor, Tensor]] | None = None
        self._held_out_position = 0
        self._typical_accuracy = 0.0
        self._steps = 0
        self._train_loss, self._train_accuracy, self._teaching_weight = StepMean(), StepMean(), StepMean()
        self._path: Path = ()
        self._measured: list[Path] = []
        self._correct: list[Tensor] = []
        self._seen = 0

    # Paths and their prior.

    def _make_sampler(self) -> PathSampler:
        if self.settings.latency is not None:
            return self.settings.latency.sampler(dict(zip(self.paths.labels, self.paths.sizes, strict=True)))
        low, high = self.settings.flops_range or (self.table.cheapest, self.table.dearest)
        costs = [[cost.macs for cost in self._options(label)] for label in self.paths.labels]
        return PathSampler(costs, self.table.fixed.macs, low, high)

    def _options(self, label: str) -> Sequence[Cost]:
        # A choice without layers of its own (an InputChoice) costs nothing.
        return self.table.choices.get(label, (Cost(0, 0),) * len(self.paths.values[label]))

    @property
    def prior(self) -> Prior:
        """The probabilities that the next path is drawn from, before the interval of the budget is imposed."""
        if not (isinstance(self.settings.prior, str) and self.settings.prior == "board"):
            return self._fixed_prior
        if self._board_prior is None or self._board_prior[0] is not self.board.entries:
            self._board_prior = (self.board.entries, self.board.frequencies(self.paths.sizes))
        return self._board_prior[1]

    # Looking for these in every step takes as long as a layer of a small network.

    @functools.cached_property
    def _choices(self) -> list[BaseSuperNetModule]:
        return list(self.supernet_modules())

    @functools.cached_property
    def _norms(self) -> list[_BatchNorm]:
        return batch_norms(self.model)

    @functools.cached_property
    def _others(self) -> list[nn.Module]:
        return [module for module in self.training_module.modules() if not isinstance(module, _BatchNorm)]

    @contextmanager
    def _judging(self, groups: int = 1) -> Iterator[None]:
        """Let the supernet answer as when it is validated, by the statistics of the batch, and keep no trace of it.

        Args:
            groups: as of :func:`batch_statistics`.
        """
        # What eval() does, past the checks of attributes in nn.Module, which are slow for all modules of a supernet.
        training = [vars(module) for module in self._others if module.training]
        try:
            for attributes in training:
                attributes["training"] = False
            with torch.no_grad(), batch_statistics(self._norms, groups):
                yield
        finally:
            for attributes in training:
                attributes["training"] = True

    def _activate(self, path: Path) -> None:
        activate(self._choices, self.paths.to_sample(path))

    def resample(self) -> Sample:
        """Draw a path inside the interval of the budget and activate it."""
        path = self.sampler.draw(self.prior, self._generator)
        self._activate(path)
        return self.paths.to_sample(path)

    # Training.

    def configure_architecture_optimizers(self) -> torch.optim.Optimizer | None:
        """Return the optimizer of the matching layer, if there is one to train."""
        if self.settings.teacher != "matching":
            return None
        return torch.optim.SGD(self.matching.parameters(), lr=self.settings.matching_lr, momentum=0.9, nesterov=True)

    def configure_callbacks(self) -> Any:
        """End a search that has diverged, if nothing else does."""
        return soundness.unless_there(self.trainer)

    def describe_step(self) -> str:
        """Say which path is being trained."""
        return f"on path {list(self._path)}"

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Let the evaluator's module decide how its schedule steps."""
        self.training_module.lr_scheduler_step(scheduler, metric)

    def on_fit_start(self) -> None:
        """Check, before anything is trained, that paths can be scored and that the board gets a chance.

        On a CPU, convolutions become those of :mod:`nni_cream.supernet.depthwise`, which are faster there.

        Raises:
            UserError: if they cannot, or it would not.
        """
        super().on_fit_start()
        refuse_other_strategies(self.trainer)
        if self.device.type == "cpu":
            with_explicit_derivatives(self.model)
        if self.trainer.limit_val_batches == 0:
            raise UserError(
                "CreamStrategy scores paths on validation images, but the trainer leaves validations out; leave its "
                "limit_val_batches above 0."
            )
        epochs = self.trainer.max_epochs
        if epochs is not None and 0 <= epochs <= self.settings.warmup_epochs:
            raise UserError(
                f"The board opens after {self.settings.warmup_epochs} warm-up epochs, but training lasts {epochs}: "
                "no path could ever enter it; set cream.warmup_epochs below epochs."
            )

    def on_train_start(self) -> None:
        """Check likewise what is known only now: how many steps an epoch has, and the schedule of the weights.

        Raises:
            UserError: if training ends before the board opens, or the schedule waits for a metric.
        """
        super().on_train_start()
        refuse_plateau(self.trainer)
        steps, warmup = self.trainer.max_steps, self.settings.warmup_epochs
        if 0 <= steps <= warmup * self.trainer.num_training_batches:
            raise UserError(
                f"The board opens after {warmup} warm-up epochs of {self.trainer.num_training_batches} steps, but "
                f"training lasts {steps} steps (max_steps): no path could ever enter it; set warmup_epochs lower."
            )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor | None:
        """Train one path for one batch."""
        images, targets = batch
        if batch_idx == 0:
            self._check_batch(len(images) * processes())
        path = self._path = self.paths.to_path(self.resample())
        if self.settings.teacher == "matching" and self.board.entries and self._meta_step_is_due():
            self._meta_step(path, images, targets, batch_idx)
            if soundness.of(self.trainer).bad:
                self._leave_out(batch_idx)
                return None

        teaching = self._choose_teacher() if self.board.entries else None
        soft_targets = self._ask_teacher(teaching, path, images) if teaching else None
        logits = self.training_module(images)
        loss = F.cross_entropy(logits, targets, label_smoothing=self.settings.label_smoothing)
        if teaching and soft_targets is not None:
            weight = teaching.weight.detach()
            loss = (weight * F.cross_entropy(logits, soft_targets) + (2 - weight) * loss) / 2
            self._teaching_weight.update(weight)
            self.log("teaching_weight_step", weight)
        self.advance_optimization(loss, batch_idx)
        if soundness.of(self.trainer).bad:
            self._leave_out(batch_idx)
            return None
        self.advance_lr_schedulers(batch_idx)
        self._steps += 1

        accuracy, loss = _percent_correct(logits, targets), mean(loss)
        self._train_loss.update(loss)
        self._train_accuracy.update(accuracy / 100)
        self.log("train_loss", loss, prog_bar=True)
        self.log("train_accuracy", accuracy / 100)
        if self.trainer.current_epoch >= self.settings.warmup_epochs:
            self._consider(path, images, logits.detach(), accuracy)
        return loss

    def _leave_out(self, batch_idx: int) -> None:
        """Count a step that was none, and let its path neither onto the board nor into averages."""
        self.advance_lr_schedulers(batch_idx)
        self._steps += 1

    def _check_batch(self, size: int) -> None:
        # Only for the first batch: the last one of an epoch may well be smaller, and is left out of both uses.
        kept = self.settings.board_images
        if size < (2 * kept if self.settings.teacher == "matching" else kept):
            raise UserError(
                f"board_images is {kept}, but a batch has {size} images; an entry keeps that many of them, and "
                "learning to match takes two slices of that size: make it smaller, or the batch larger."
            )

    def _meta_step_is_due(self) -> bool:
        return self._steps > 0 and self._steps % self.settings.meta_interval == 0

    def _choose_teacher(self) -> Teaching | None:
        """Pick the entry that teaches the active path."""
        entries = self.board.entries
        if self.settings.teacher == "none":
            return None
        if self.settings.teacher == "top1":
            return Teaching(entries[0], torch.tensor(_TOP1_WEIGHT, device=self.device))
        # A board from a checkpoint lies on the CPU.
        images = torch.cat([entry.images for entry in entries]).to(self.device)
        with alone(), self._judging(groups=len(entries)):
            answers = self.training_module(images).softmax(-1).unflatten(0, (len(entries), -1))
        stored = torch.stack([entry.features for entry in entries])
        logits = self.matching(answers, stored.to(answers))
        best = agreed(int(logits.argmax()))
        return Teaching(entries[best], logits[best].sigmoid())

    def _ask_teacher(self, teaching: Teaching, student: Path, images: Tensor) -> Tensor:
        """Return the teacher's class probabilities for ``images``, and leave the student active."""
        self._activate(teaching.entry.path)
        with self._judging():
            answers: Tensor = self.training_module(images).softmax(-1)
        self._activate(student)
        return answers

    def _meta_step(self, path: Path, images: Tensor, targets: Tensor, batch_idx: int) -> None:
        """Teach the student on one slice, see what that does on another, and move the matching layer accordingly.

        The slices are small, so that every process takes the same two, whole ones.
        """
        size = self.settings.board_images
        images, targets = gathered(images[: 2 * size]), gathered(targets[: 2 * size])
        if len(images) < 2 * size:
            return
        with alone():
            self._match(path, images, targets, batch_idx)

    def _match(self, path: Path, images: Tensor, targets: Tensor, batch_idx: int) -> None:
        size = self.settings.board_images
        teaching = self._choose_teacher()
        assert teaching is not None
        soft_targets = self._ask_teacher(teaching, path, images[:size])
        weights = [p for p in self.model.parameters() if p.requires_grad]
        teaching_loss = F.cross_entropy(self.training_module(images[:size]), soft_targets)
        # Without it small gradients would be 0 in 16-mixed.
        scale = loss_scale(self.trainer)
        gradients = torch.autograd.grad(scale * teaching_loss, weights, allow_unused=True)
        drawn = [(p, g / scale) for p, g in zip(weights, gradients, strict=True) if g is not None]
        taught = {"gradient of teaching": [g for _, g in drawn]}
        if scale > 1 and soundness.first_not_finite(taught):
            # It has left the range of float16, which says nothing about the search: Lightning's scaler does the same.
            scaler = self.trainer.precision_plugin.scaler
            scaler.update(scale * scaler.get_backoff_factor())
            return
        learning_rate = self._weight_optimizer().param_groups[0]["lr"]
        guard = soundness.of(self.trainer)
        guard.remember(self._weight_optimizer(), [p for p, _ in drawn])
        # A loss with the gradient that is known already, in place of a second pass through the network.
        linear = torch.stack([(p * g).sum() for p, g in drawn]).sum()
        self.advance_optimization(teaching.weight.detach() * linear, batch_idx)
        if guard.bad:
            return

        held_out, labels = images[size : 2 * size], targets[size : 2 * size]
        validation_loss = F.cross_entropy(
            self.training_module(held_out), labels, label_smoothing=self.settings.label_smoothing
        )
        # What stochastic depth leaves out of this pass has a gradient of 0.
        validation_gradients = torch.autograd.grad(
            validation_loss, [p for p, _ in drawn], allow_unused=True, materialize_grads=True
        )
        parameters = list(self.matching.parameters())
        gradients = matching_gradient(
            teaching.weight, parameters, [g for _, g in drawn], validation_gradients, learning_rate
        )
        average_(gradients)
        read = {"loss of the matching layer": [validation_loss.detach()], "gradient of the matching layer": gradients}
        if not guard.allows(self, read):
            return
        optimizer: torch.optim.Optimizer = self.architecture_optimizers().optimizer
        guard.remember(optimizer, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        # Not through Lightning, whose loss scaling (16-mixed) knows nothing of this gradient.
        optimizer.step()
        optimizer.zero_grad()

    def _weight_optimizer(self) -> torch.optim.Optimizer:
        optimizers: list[torch.optim.Optimizer] = self.trainer.optimizers
        return next(o for o in optimizers if not getattr(o, "is_arch_optimizer", False))

    # The board.

    def _consider(self, path: Path, images: Tensor, logits: Tensor, accuracy: float) -> None:
        """Admit ``path`` to the board if it deserves a place.

        The accuracy on the batch that it was just trained on only decides whether it is worth measuring: its score is
        that of a held-out batch, which is the scale on which the entries are measured again after every epoch.
        """
        typical, self._typical_accuracy = self._typical_accuracy, 0.9 * self._typical_accuracy + 0.1 * accuracy
        room = len(self.board) < self.board.capacity
        count = self.settings.board_images
        if len(images) * processes() < count or path in self.board or not (room or accuracy > typical):
            return
        held_out, targets = self._next_held_out()
        with self._judging():
            score = _percent_correct(self.training_module(held_out), targets)
        macs, latency = self.cost(path).macs, self.latency(path)
        if self.board.admits(score, macs if latency is None else latency):
            # The first of all processes' images.
            kept, answers = (gathered(tensor[:count])[:count].clone() for tensor in (images, logits))
            self.board.add(BoardEntry(path, score, macs, kept, answers.float().softmax(-1), latency))

    def _next_held_out(self) -> tuple[Tensor, Tensor]:
        if self._held_out is None:
            loader = copy.copy(self._validation_loader())
            if isinstance(loader, DataLoader):
                # The validation of an epoch would begin an iterator anew whose workers it shares.
                loader._iterator = None
            endless = itertools.chain.from_iterable(itertools.repeat(loader))
            # One that does not know its length is gone through from the beginning.
            length = sized_len(loader)
            first = self._held_out_position % length if length else self._held_out_position
            self._held_out = itertools.islice(endless, first, None)
        while True:
            self._held_out_position += 1
            batch = next(self._held_out)
            if not _is_too_small(batch):
                return self._moved(batch)

    def _validation_loader(self) -> Any:
        if self.trainer.val_dataloaders is None:
            # Lightning asks for it when the first validation is due, which may be epochs later.
            self.trainer.fit_loop.epoch_loop.val_loop.setup_data()
        return self.trainer.val_dataloaders

    def _moved(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Do with a batch what Lightning does with those of its own loops: right precision, right device."""
        images, targets = self.trainer.precision_plugin.convert_input(batch)
        return images.to(self.device), targets.to(self.device)

    def on_train_epoch_start(self) -> None:
        """Begin new averages."""
        super().on_train_epoch_start()
        for average in (self._train_loss, self._train_accuracy, self._teaching_weight):
            average.reset()

    def on_validation_epoch_start(self) -> None:
        """Decide which paths are measured: those on the board, or a few others while it is empty."""
        self._measured = [entry.path for entry in self.board.entries]
        if not self._measured:
            probes = np.random.default_rng((self.settings.seed, self.trainer.current_epoch))
            self._measured = [self.sampler.draw(self.prior, probes) for _ in range(_PROBES)]
        self._correct = [torch.zeros((), device=self.device) for _ in self._measured]
        self._seen = 0

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Measure every path on one held-out batch."""
        images, targets = batch
        if _is_too_small(batch):
            return
        self._seen += len(images)
        with batch_statistics(self._norms):
            for path, correct in zip(self._measured, self._correct, strict=True):
                self._activate(path)
                correct += (self.training_module(images).argmax(-1) == targets).sum()

    def on_validation_epoch_end(self) -> None:
        """Give the board its new scores, and report the best accuracy."""
        if self.trainer.sanity_checking:
            return
        seen, *correct = total(self._seen, *(int(number) for number in self._correct))
        shares = [number / seen for number in correct]
        percent = (100 * number / seen for number in correct)
        self.board.rescore(dict(zip(self._measured, percent, strict=True)))
        self.history.remember(self.trainer.current_epoch + 1, self.board)
        self.log("val_accuracy", max(shares), prog_bar=True, sync_dist=True)
        self.log("board_size", float(len(self.board)), sync_dist=True)
        if self._teaching_weight.weight > 0:
            self.log("teaching_weight_epoch", self._teaching_weight.compute(), sync_dist=True)
        # In every process, because they put their averages together here.
        train_loss, train_accuracy = self._train_loss.compute().item(), self._train_accuracy.compute().item()
        if not self.trainer.is_global_zero:
            return
        nni.report_intermediate_result(
            {
                "default": max(shares),
                "epoch": self.trainer.current_epoch + 1,
                "val_accuracy": max(shares),
                "mean_val_accuracy": sum(shares) / len(shares),
                "train_loss": train_loss,
                "train_accuracy": train_accuracy,
                "board_size": len(self.board),
            }
        )

    # The end.

    def on_train_end(self) -> None:
        """Rank the board on held-out images, each path with batch-norm statistics of its own."""
        super().on_train_end()
        self._rank()

    def _rank(self) -> None:
        ranked = []
        batches = self._validation_loader() if self._ranking_batches is None else self._ranking_batches
        for entry in self.board.entries:
            self._activate(entry.path)
            held_out = map(self._moved, batches)
            correct, seen = total(*count_right(self.model, self.training_module, self._calibration_images(), held_out))
            sample, cost = self.paths.to_sample(entry.path), self.cost(entry.path)
            ranked.append(RankedPath(sample, correct / seen, cost, self.latency(entry.path)))
        self.ranking = sorted(ranked, key=lambda path: path._order)

    def on_fit_end(self) -> None:
        """Report the best path. The evaluator's own report is of no single path and is left out."""
        # A search that was interrupted after its last epoch has nothing left to train, and Lightning skips its end.
        if not self.ranking:
            self._rank()
        if self.trainer.is_global_zero and self.ranking:
            best = self.ranking[0]
            nni.report_final_result(
                {
                    "default": best.accuracy,
                    "flops": best.cost.macs,
                    "params": best.cost.params,
                    **({} if best.latency is None else {"latency": best.latency}),
                    "path": best.sample,
                }
            )

    def cost(self, path: Path) -> Cost:
        """Return what the network of ``path`` costs."""
        chosen = (self._options(label)[i] for label, i in zip(self.paths.labels, path, strict=True))
        return sum(chosen, start=self.table.fixed)

    def latency(self, path: Path) -> float | None:
        """Return what the network of ``path`` is predicted to take, in milliseconds, where the budget is of time."""
        return None if self.settings.latency is None else self.sampler.cost(path) / TICKS

    def calibrated_network(self, sample: dict[str, Any]) -> nn.Module:
        """Return a copy of the network of ``sample`` with its shared weights and batch-norm statistics of its own."""
        activate(self._choices, sample)
        with recalibrated(self.model, self._calibration_images()):
            # freeze() hands out the chosen candidates themselves, whose statistics are put back in a moment.
            network: nn.Module = copy.deepcopy(self.model.freeze(sample))
        return network

    def _calibration_images(self) -> Iterator[Tensor]:
        # Of an epoch after the last, whatever has been loaded before: the same images for every path. Where steps or
        # hours end the training in place of epochs, Lightning has -1 here.
        epochs = max(self.trainer.max_epochs or 0, 0)
        for batch in first_batches(self.trainer.train_dataloader, self.settings.recalibration_batches, epochs):
            yield self._moved(batch)[0]

    def export(self) -> Sample:
        """Return the best path as an NNI sample."""
        if not self.ranking:
            raise RuntimeError(
                "There is no best path: the search has not ended, or it ended before a path was on the board."
            )
        return dict(self.ranking[0].sample)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what Lightning does not know of."""
        checkpoint["cream"] = {
            "board": self.board.state_dict(),
            "history": self.history.state_dict(),
            "generator": self._generator.bit_generator.state,
            "held_out_position": self._held_out_position,
            "typical_accuracy": self._typical_accuracy,
            "steps": self._steps,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what :meth:`on_save_checkpoint` kept."""
        state = checkpoint["cream"]
        self.board.load_state_dict(state["board"])
        self.history.load_state_dict(state["history"])
        self._generator.bit_generator.state = state["generator"]
        self._held_out_position = state["held_out_position"]
        self._typical_accuracy = state["typical_accuracy"]
        self._steps = state["steps"]


def _is_too_small(batch: tuple[Tensor, Tensor]) -> bool:
    """Tell whether a batch, such as the last one of a loader, has no statistics to normalise with."""
    return total(len(batch[0]))[0] < 2


def _percent_correct(logits: Tensor, targets: Tensor) -> float:
    # A ratio of integers: equal accuracies have to be equal numbers, however many images they were measured on.
    correct, number = total(int((logits.argmax(-1) == targets).sum()), len(targets))
    return 100 * correct / number
