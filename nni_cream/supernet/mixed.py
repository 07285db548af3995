"""Choices that run all their candidates at once, mixed by softmax(α): the continuous relaxation of DARTS.

Source: Liu et al., "DARTS: Differentiable Architecture Search", ICLR 2019, section 2.2, equation 2.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import torch
from nni.nas.nn.pytorch import Cell, InputChoice, LayerChoice
from nni.nas.nn.pytorch.base import MutableModule
from nni.nas.oneshot.pytorch.supermodule.base import BaseSuperNetModule
from torch import Tensor, nn

from nni_cream.errors import UserError
from nni_cream.supernet.alphas import Alphas

# Under this key NNI's mutation hooks find the α of the search in their memo.
ALPHAS: Final = "nni_cream.alphas"

MixingWeights = Callable[[], Tensor]


class MixedLayer(LayerChoice, BaseSuperNetModule):
    """A ``LayerChoice`` as the mean of its candidates, weighted by softmax(α).

    Args:
        candidates: as of the ``LayerChoice``.
        label: likewise.
        weights: gives the mixing weights, [candidates].
    """

    def __init__(self, candidates: Any, label: str, weights: MixingWeights) -> None:
        super().__init__(candidates, label=label)
        self._weights = weights

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run all candidates."""
        return weighted_sum(self._weights(), (candidate(*args, **kwargs) for candidate in self))

    def resample(self, memo: dict[str, Any]) -> dict[str, Any]:
        """Do nothing: all candidates are always active."""
        return {}

    def export(self, memo: dict[str, Any]) -> dict[str, Any]:
        """Return the candidate that weighs most; of equals, the first."""
        return {} if self.label in memo else {self.label: self.names[int(self._weights().argmax())]}

    def export_probs(self, memo: dict[str, Any]) -> dict[str, Any]:
        """Return the mixing weight of every candidate."""
        return {} if self.label in memo else {self.label: dict(zip(self.names, self._weights().tolist(), strict=True))}


class MixedInput(InputChoice, BaseSuperNetModule):
    """An ``InputChoice`` as the mean of its inputs weighted by softmax(α), times their number where it is a sum.

    Args:
        n_candidates: as of the ``InputChoice``.
        n_chosen: likewise.
        reduction: ``sum`` or ``mean``.
        label: as of the ``InputChoice``.
        weights: gives the mixing weights, [candidates].
    """

    def __init__(self, n_candidates: int, n_chosen: int, reduction: Any, label: str, weights: MixingWeights) -> None:
        super().__init__(n_candidates, n_chosen=n_chosen, reduction=reduction, label=label)
        self._weights = weights
        self._scale = n_chosen if reduction == "sum" else 1

    def forward(self, candidate_inputs: Sequence[Tensor]) -> Tensor:
        """Mix the inputs."""
        return weighted_sum(self._scale * self._weights(), candidate_inputs)

    def resample(self, memo: dict[str, Any]) -> dict[str, Any]:
        """Do nothing: all inputs are always active."""
        return {}

    def export(self, memo: dict[str, Any]) -> dict[str, Any]:
        """Return the inputs that weigh most, in their own order; of equals, the first."""
        if self.label in memo:
            return {}
        order = self._weights().argsort(descending=True, stable=True)
        return {self.label: sorted(order[: self.n_chosen].tolist())}

    def export_probs(self, memo: dict[str, Any]) -> dict[str, Any]:
        """Return the mixing weight of every input."""
        return {} if self.label in memo else {self.label: dict(enumerate(self._weights().tolist()))}


def weighted_sum(weights: Tensor, features: Iterable[Tensor]) -> Tensor:
    """Add up ``features``, each times its weight; weights [n], n tensors of one shape."""
    weighted = (weight * feature for weight, feature in zip(weights, features, strict=True))
    total: Tensor = functools.reduce(torch.add, weighted)
    return total


def refuse(module: nn.Module, name: str, memo: dict[str, Any], mutate_kwargs: dict[str, Any]) -> bool:
    """Refuse what the hooks before this one have left over: an NNI mutation hook, the last of its list.

    Raises:
        UserError: for a module with a choice that has no relaxation, or a cell whose output depends on its choices.
    """
    if isinstance(module, Cell) and module.merge_op != "all":
        # How wide the output is, and with it what comes after the cell, would be known only of the child.
        raise UserError(
            f"The cell {module.label!r} ({type(module).__name__} {name!r}) has merge_op={module.merge_op!r}, with "
            'which its output depends on its choices; DartsStrategy takes cells with merge_op="all".'
        )
    if isinstance(module, MutableModule) and not isinstance(module, BaseSuperNetModule) and module.mutables:
        labels = ", ".join(repr(getattr(mutable, "label", str(mutable))) for mutable in module.mutables)
        raise UserError(
            f"The choice {labels} ({type(module).__name__} {name!r}) cannot be searched by DartsStrategy, which takes "
            "LayerChoice, and InputChoice with n_chosen given and a sum or mean as reduction."
        )
    return True


def relax_choice(
    module: Any, name: str, memo: dict[str, Any], mutate_kwargs: dict[str, Any]
) -> MixedLayer | MixedInput | None:
    """Relax a ``LayerChoice`` or an ``InputChoice``: an NNI mutation hook."""
    alphas: Alphas = memo[ALPHAS]
    # Exactly these classes, as in NNI's own hooks: a subclass may compute something else.
    if type(module) is LayerChoice:
        return MixedLayer(module.candidates, module.label, alphas.share(module.label, len(module)))
    if type(module) is InputChoice and module.n_chosen is not None and module.reduction in ("sum", "mean"):
        weights = alphas.share(module.label, module.n_candidates)
        return MixedInput(module.n_candidates, module.n_chosen, module.reduction, module.label, weights)
    return None
