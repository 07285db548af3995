"""Cream for NNI: single-path training in which the best paths so far teach the others.

Source: Peng et al., "Cream of the Crop: Distilling Prioritized Paths For One-Shot Neural Architecture Search",
NeurIPS 2020.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import nni
import torch
from nni.nas.evaluator.pytorch import Lightning, LightningModule
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.oneshot.pytorch.strategy import MutationHook, OneShotStrategy, no_default_hook
from nni.nas.oneshot.pytorch.supermodule.sampling import PathSamplingInput, PathSamplingLayer
from nni.nas.space import RawFormatModelSpace

from nni_cream.cost import CostTable, measure_space
from nni_cream.errors import UserError
from nni_cream.latency import LatencyBudget
from nni_cream.loading import validation_loader
from nni_cream.strategies.cream_module import CreamLightningModule
from nni_cream.strategies.settings import CreamSettings, NamedPrior, Teacher
from nni_cream.supernet.batch_norm import batch_statistics
from nni_cream.supernet.paths import PathSpace


@nni.trace
class CreamStrategy(OneShotStrategy):
    """Search a single-path supernet with prioritized paths as teachers (Cream).

    Every step trains one path, drawn from a prior among the paths inside a FLOPs interval. The paths that do best
    are kept on a board. A student on the way is taught by the entry that a small matching layer picks for it:
    loss = (ρ·KD + (2 − ρ)·CE) / 2, where KD is the cross entropy against the teacher's softmax. The matching layer
    itself learns, every few steps, from what being taught did to the student's validation loss. In the end the board
    is ranked on held-out images with batch-norm statistics recomputed for every path.

    The evaluator's Lightning module must give logits from ``forward``, and take batches of images and labels; its
    validation images score the board while the search runs.

    Args:
        board_size: places on the board.
        board_images: images kept with an entry, at least 2; also the size of the two slices of a meta step.
        admission_gap: points of accuracy by which a dearer path must beat the worst entry.
        warmup_epochs: epochs before the board opens.
        prior: ``"even"``; ``"board"``, the frequencies on the board; the probabilities of the candidates, which apply
            to every choice with as many candidates; or, by label, the probabilities of each choice's candidates. What
            no probabilities apply to has the ``weights`` that its ``LayerChoice`` was made with, even unless given.
        teacher: ``"matching"``; ``"top1"``, the best entry with ρ = 0.5; or ``"none"``, plain single-path training.
        flops_range: hard interval of multiply-accumulates for one image; None for no bound.
        latency: hard interval of predicted time in its place. Time is then also what a cheaper path needs less of,
            where the board decides by cost.
        label_smoothing: of the cross entropy with the labels.
        meta_interval: steps between two updates of the matching layer.
        matching_lr: learning rate of the matching layer.
        recalibration_batches: training batches over which a path's batch-norm statistics are recomputed.
        seed: of the paths that are drawn.
        ranking_dataloader: held-out images for the final ranking; the evaluator's validation images if None.
        mutation_hooks: as in NNI.

    Raises:
        UserError: if both ``flops_range`` and ``latency`` are given, or an argument is out of its range.
        UserError: when the search starts, if the interval holds no path, the prior fits no choice, the space has
            choices that cannot be searched so, there are several validation loaders, or the evaluator's schedule waits
            for a metric.

    See Also:
        nni.nas.strategy.RandomOneShot: single-path training without teachers.
    """

    def __init__(
        self,
        *,
        board_size: int = 10,
        board_images: int = 4,
        admission_gap: float = 5.0,
        warmup_epochs: int = 20,
        prior: NamedPrior | Sequence[float] | Mapping[str, Sequence[float]] = "even",
        teacher: Teacher = "matching",
        flops_range: tuple[float, float] | None = None,
        latency: LatencyBudget | None = None,
        label_smoothing: float = 0.1,
        meta_interval: int = 200,
        matching_lr: float = 1e-4,
        recalibration_batches: int = 20,
        seed: int = 0,
        ranking_dataloader: Any = None,
        mutation_hooks: list[MutationHook] | None = None,
    ) -> None:
        super().__init__(mutation_hooks=mutation_hooks)
        if flops_range is not None and latency is not None:
            raise UserError("CreamStrategy has one budget: give flops_range or latency, not both.")
        self.settings = CreamSettings(
            board_size=board_size,
            board_images=board_images,
            admission_gap=admission_gap,
            warmup_epochs=warmup_epochs,
            prior=prior,
            teacher=teacher,
            flops_range=flops_range,
            latency=latency,
            label_smoothing=label_smoothing,
            meta_interval=meta_interval,
            matching_lr=matching_lr,
            recalibration_batches=recalibration_batches,
            seed=seed,
        )
        self.ranking_dataloader = ranking_dataloader
        self._description: tuple[PathSpace, CostTable, int] | None = None

    def default_mutation_hooks(self) -> list[MutationHook]:
        """Replace layer choices and input choices; anything else that is mutable is an error."""
        return [PathSamplingLayer.mutate, PathSamplingInput.mutate, no_default_hook]

    def _initialize(self, model_space: RawFormatModelSpace, engine: SequentialExecutionEngine) -> RawFormatModelSpace:
        evaluator = model_space.evaluator
        if not isinstance(evaluator, Lightning):
            raise UserError(f"CreamStrategy needs a Lightning evaluator, not a {type(evaluator).__name__}.")
        loader = validation_loader(evaluator)
        if loader is None:
            raise UserError("CreamStrategy needs validation images in the evaluator: they score the paths.")
        if isinstance(loader, Sequence | Mapping):
            raise UserError(
                f"CreamStrategy scores paths on one validation loader, but was given {len(loader)} of them."
            )
        images, _ = next(iter(loader))
        if min(len(images), self.settings.board_images) < 2:
            raise UserError(
                f"CreamStrategy normalises by batch, and needs batches of at least 2 images: a validation batch has "
                f"{len(images)}, and board_images is {self.settings.board_images}."
            )
        space = model_space.model_space
        paths = PathSpace(space)
        table = measure_space(space, tuple(images.shape[1:]))
        with torch.no_grad(), batch_statistics(space):
            # Images may be on the device of the search already, where the space comes only when that begins.
            num_classes = space(images[:2].to(next(space.parameters()).device)).shape[-1]
        self._description = (paths, table, num_classes)
        # A data module is set up once more for the training, and may divide its images anew.
        if self.ranking_dataloader is None and not evaluator.datamodule:
            self.ranking_dataloader = loader
        return super()._initialize(model_space, engine)

    def configure_oneshot_module(self, training_module: LightningModule) -> CreamLightningModule:
        """Wrap the evaluator's module in the search."""
        assert self._description is not None
        paths, table, num_classes = self._description
        return CreamLightningModule(training_module, self.settings, paths, table, num_classes, self.ranking_dataloader)

    def list_models(self, sort: bool = True, limit: int | None = 1) -> Iterator[RawFormatModelSpace]:
        """List the paths of the board, the best first, with the supernet's weights.

        Args:
            sort: must be true.
            limit: how many at most; None for the whole board.
        """
        self.oneshot_module.set_model(self.supernet)
        for path in self.oneshot_module.ranking[:limit]:
            yield self.model_space.freeze(path.sample)
