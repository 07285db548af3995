"""DARTS for NNI, with the second order.

Source: Liu et al., "DARTS: Differentiable Architecture Search", ICLR 2019.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nni
import torch
from nni.nas.evaluator.pytorch import Lightning, LightningModule
from nni.nas.execution import SequentialExecutionEngine
from nni.nas.nn.pytorch import ModelSpace
from nni.nas.oneshot.pytorch.strategy import MutationHook, OneShotStrategy
from nni.nas.space import RawFormatModelSpace
from pytorch_lightning.utilities import CombinedLoader
from torch import nn

from nni_cream.cost import CostTable, measure_space
from nni_cream.errors import UserError
from nni_cream.hypergradient import PUBLISHED_RADIUS
from nni_cream.loading import validation_loader
from nni_cream.strategies.darts_module import ALPHA, TRAIN, DartsLightningModule
from nni_cream.strategies.settings import DartsSettings, EigenvalueGuard, Execution, HypergradientKind, Order
from nni_cream.supernet.alphas import Alphas
from nni_cream.supernet.expected_cost import ExpectedCost
from nni_cream.supernet.mixed import ALPHAS, refuse, relax_choice


@nni.trace
class DartsStrategy(OneShotStrategy):
    """Search by gradient descent in the continuous relaxation of a space (DARTS), to first or second order.

    Every choice becomes the mean of its candidates, weighted by softmax(α). Each step moves α by a batch of the
    evaluator's validation images, then the weights by a batch of its training images. To second order, α moves by the
    gradient of the validation loss as it is *after* the step of the weights that comes next, momentum and weight decay
    included.

    In a :class:`search_spaces.darts.DartsSpace` whole cells are relaxed as in the paper; which edges a node keeps
    follows from the operations on them. In other spaces a ``LayerChoice`` becomes the mean of its candidates and an
    ``InputChoice`` that of its inputs, each with α of its own.

    The evaluator's Lightning module must give logits from ``forward``, and take batches of images and labels. Its
    optimizer must be ``torch.optim.SGD`` for the second order.

    Args:
        order: ``"first"`` or ``"second"``.
        hypergradient: how the second order is computed: ``"exact"``, by automatic differentiation, or
            ``"finite_difference"``, as in the published code.
        radius: how far the finite difference moves the weights, in the Euclidean norm.
        warmup_epochs: epochs before α begins to learn.
        alpha_lr: learning rate of α, whose optimizer is Adam.
        alpha_betas: its betas.
        alpha_weight_decay: its weight decay.
        gradient_clip: largest norm of the gradient of the weights; None for no limit.
        label_smoothing: of the cross entropy, in training and for α.
        stop_above_skips: end the search when the normal cell keeps more skip connections than this, with α as it was
            one epoch before; None for no such end.
        skip_limit: keep at most so many skip connections in the normal cell when it is exported; None for no limit.
        eigenvalue: the dominant eigenvalue of the validation Hessian in α, on the last batch that α has learnt from,
            is not computed (``"off"``); reported after every epoch (``"track"``); or, when it rises sharply, ends the
            search with α as it is (``"stop"``) or as it was five epochs before (``"rollback"``).
        flops_target: multiply-accumulates for one image that the child should not exceed, at the size of the space;
            None if it does not matter.
        flops_weight: of the term ``flops_weight · max(0, E[MACs] / flops_target − 1)`` that is then added to the
            validation loss.
        execution: how the cells of a :class:`search_spaces.darts.DartsSpace` run: ``"fused"``, what leaves one state
            together (:class:`nni_cream.supernet.fused_cell.FusedCell`), or ``"textbook"``, one operation of one edge
            after another, as for operations that are changed after the space has been relaxed. The sums are the same.
        cuda_graphs: on a GPU, record a step after the first few and launch its kernels together from then on
            (:mod:`nni_cream.cuda_graphs`). Python code in the network, hooks for example, runs no more then. Not with
            several processes or a scaled loss (``16-mixed``).
        reporting_dataloader: held-out images for the accuracy that is reported; the evaluator's validation images,
            which α learns from, if None.
        mutation_hooks: as in NNI.

    Raises:
        UserError: if an argument is out of its range.
        UserError: when the search starts, if the space has choices that cannot be relaxed, the evaluator's optimizer
            takes a step that cannot be unrolled, its schedule waits for a metric, there are several validation loaders,
            a loader does not know how many batches it has, or its trainer leaves out validations, ends before the first
            one, or has to go on where the search may be ended.

    See Also:
        nni.nas.strategy.DARTS: NNI's own, of first order.
    """

    def __init__(
        self,
        *,
        order: Order = "second",
        hypergradient: HypergradientKind = "exact",
        radius: float = PUBLISHED_RADIUS,
        warmup_epochs: int = 0,
        alpha_lr: float = 3e-4,
        alpha_betas: tuple[float, float] = (0.5, 0.999),
        alpha_weight_decay: float = 1e-3,
        gradient_clip: float | None = 5.0,
        label_smoothing: float = 0.0,
        stop_above_skips: int | None = None,
        skip_limit: int | None = None,
        eigenvalue: EigenvalueGuard = "off",
        flops_target: float | None = None,
        flops_weight: float = 1.0,
        execution: Execution = "fused",
        cuda_graphs: bool = True,
        reporting_dataloader: Any = None,
        mutation_hooks: list[MutationHook] | None = None,
    ) -> None:
        super().__init__(mutation_hooks=mutation_hooks)
        self.settings = DartsSettings(
            order=order,
            hypergradient=hypergradient,
            radius=radius,
            warmup_epochs=warmup_epochs,
            alpha_lr=alpha_lr,
            alpha_betas=alpha_betas,
            alpha_weight_decay=alpha_weight_decay,
            gradient_clip=gradient_clip,
            label_smoothing=label_smoothing,
            stop_above_skips=stop_above_skips,
            skip_limit=skip_limit,
            eigenvalue=eigenvalue,
            flops_target=flops_target,
            flops_weight=flops_weight,
            execution=execution,
            cuda_graphs=cuda_graphs,
        )
        self.reporting_dataloader = reporting_dataloader
        self.alphas = Alphas()
        self._priced: tuple[ModelSpace, CostTable] | None = None

    def default_mutation_hooks(self) -> list[MutationHook]:
        """Relax layer choices and input choices; anything else that is mutable is an error."""
        return [relax_choice, refuse]

    def run_hook(self, hook: MutationHook, name: str, module: nn.Module, memo: dict[str, Any]) -> Any:
        """Give the hooks α, the limit of skip connections, and how cells are to run."""
        memo[ALPHAS] = self.alphas
        settings = self.settings
        return hook(module, name, memo, {"skip_limit": settings.skip_limit, "execution": settings.execution})

    def train_dataloader(self, train_dataloader_fn: Callable[[], Any], val_dataloader_fn: Callable[[], Any]) -> Any:
        """Pair every training batch with a batch for α, which start anew when there are fewer of them."""
        loaders = {TRAIN: train_dataloader_fn(), ALPHA: val_dataloader_fn()}
        fewer = _length(loaders[ALPHA], "validation") <= _length(loaders[TRAIN], "training")
        return CombinedLoader(loaders, "max_size_cycle" if fewer else "min_size")

    def val_dataloader(self, train_dataloader_fn: Callable[[], Any], val_dataloader_fn: Callable[[], Any]) -> Any:
        """Return the images for the accuracy that is reported."""
        return val_dataloader_fn() if self.reporting_dataloader is None else self.reporting_dataloader

    def _initialize(self, model_space: RawFormatModelSpace, engine: SequentialExecutionEngine) -> RawFormatModelSpace:
        evaluator = model_space.evaluator
        if not isinstance(evaluator, Lightning):
            raise UserError(f"DartsStrategy needs a Lightning evaluator, not a {type(evaluator).__name__}.")
        loader = validation_loader(evaluator)
        if loader is None:
            raise UserError("DartsStrategy needs validation images in the evaluator: α learns from them.")
        _refuse_collection(loader, "validation images (val_dataloaders)")
        _refuse_collection(self.reporting_dataloader, "images to report on (reporting_dataloader)")
        space = model_space.model_space
        if not isinstance(space, ModelSpace) or not space.simplify():
            raise UserError("DartsStrategy needs a model space with choices: there is none in this one.")
        # NNI shows its hooks the modules inside the space, but not the space, whose attributes are not its mutables.
        refuse(space, "model", {}, {})
        if self.settings.flops_target is not None:
            # A loader draws a random number when it starts, and the same search without a target does not.
            with torch.random.fork_rng(()):
                images, _ = next(iter(loader))
            self._priced = space, measure_space(space, tuple(images.shape[1:]))
        return super()._initialize(model_space, engine)

    def configure_oneshot_module(self, training_module: LightningModule) -> DartsLightningModule:
        """Wrap the evaluator's module in the search."""
        cost = None
        if self._priced is not None:
            # The space itself has been relaxed by now.
            space, table = self._priced
            cost = ExpectedCost(table, space, self.alphas)
        return DartsLightningModule(training_module, self.settings, self.alphas, cost)


def _refuse_collection(loader: Any, images: str) -> None:
    if isinstance(loader, list | tuple | dict | CombinedLoader):
        raise UserError(
            f"DartsStrategy takes one loader of {images}, not a {type(loader).__name__} of loaders; join their data "
            "sets in one (torch.utils.data.ConcatDataset)."
        )


def _length(loader: Any, images: str) -> int:
    try:
        return len(loader)
    except TypeError as error:
        raise UserError(
            f"The loader of the {images} images does not know how many batches it has, and DartsStrategy pairs every "
            "training batch with one for α; give its data set a length (__len__)."
        ) from error
