"""The matching layer: which path of the board teaches a student, how much, and how the layer learns that.

Source: Peng et al., "Cream of the Crop", NeurIPS 2020, section 3.3, equations 4 to 7.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn


class MatchingLayer(nn.Module):
    """One logit for a student and a board entry, from how differently they answer the entry's images.

    Args:
        images: number of images stored with an entry, n.
        classes: number of classes, C.
    """

    def __init__(self, images: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(images * classes, 1)

    def forward(self, student: Tensor, stored: Tensor) -> Tensor:
        """Compare softmax outputs ``student`` with ``stored``, both [entries, n, C], and return logits [entries].

        In the layer's own precision: the slope that it learns from would be 0 in a shorter one.
        """
        difference = (student - stored).flatten(1).to(self.linear.weight.dtype)
        with torch.autocast(difference.device.type, enabled=False):
            logits: Tensor = self.linear(difference)
        return logits.squeeze(1)


def inner_product(left: Iterable[Tensor], right: Iterable[Tensor]) -> Tensor:
    """Return ⟨left, right⟩ over two lists of tensors of the same shapes."""
    return torch.stack([(a * b).sum() for a, b in zip(left, right, strict=True)]).sum()


def matching_gradient(
    weight: Tensor,
    parameters: Sequence[Tensor],
    teaching_gradient: Sequence[Tensor],
    validation_gradient: Sequence[Tensor],
    learning_rate: float,
) -> tuple[Tensor, ...]:
    """Gradient, in the matching layer, of a student's validation loss after one step of being taught.

    w' are the weights after the optimizer's own step on ρ·KD, momentum and weight decay included. How they depend on ρ
    is taken as in plain SGD, w' = w − η·ρ(θ)·∇w KD. As ρ does not depend on w here, the chain rule closes:
    dL_val(w')/dθ = −η·⟨∇L_val(w'), ∇w KD(w)⟩·∂ρ/∂θ, and no second backward through the network is needed. With
    Nesterov's momentum μ the true factor is 1 + μ times −η, a constant that the learning rate of θ absorbs.

    Args:
        weight: ρ, a scalar that depends on ``parameters``.
        parameters: θ, those of the matching layer.
        teaching_gradient: ∇w KD at the weights before the step, not multiplied by ρ.
        validation_gradient: ∇w L_val at the weights after the step.
        learning_rate: η, that of the weights.

    Returns:
        One gradient for every tensor of ``parameters``.
    """
    slope = -learning_rate * inner_product(validation_gradient, teaching_gradient)
    # Products of a backward pass would be in the precision of autocast, too.
    with torch.autocast(weight.device.type, enabled=False):
        return torch.autograd.grad(weight, list(parameters), grad_outputs=slope.to(weight.dtype).reshape(weight.shape))
