"""Gradients of the validation loss in the architecture α, seen through a step of the weights w.

DARTS looks for the α that minimises L_val(w'(α), α), where w' is what one step of SGD on L_train makes of w:

    w'(α) = w − s·∇w L_train(w, α) − (momentum and weight decay, which do not depend on α)

with s the learning rate. So (Liu et al., "DARTS", ICLR 2019, equation 7, with momentum and weight decay):

    dL_val/dα = ∇α L_val(w', α) − ∇²α,w L_train(w, α) · s·∇w' L_val(w', α)

The functions here have one signature and differ in the second, implicit term: :func:`first_order` leaves it out (and
takes w' = w), :func:`finite_difference` estimates it as the published code does, :func:`exact` differentiates. They are
pure: losses are functions of (w, α), nothing that is given is changed, and no ``.grad`` is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from nni_cream.differentiation import without_weights
from nni_cream.errors import UserError

Loss = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]

PUBLISHED_RADIUS: Final = 0.01


@dataclass(frozen=True)
class ParameterStep:
    """How one step of SGD changes one parameter: w' = w − ``scale``·g − ``decay``·w − ``drift``·m.

    Attributes:
        scale: factor of the gradient g, the learning rate (with Nesterov's momentum μ times 1 + μ).
        decay: factor of the parameter itself, from weight decay.
        drift: factor of the momentum buffer m.
        buffer: m, of the parameter's shape; None where there is none yet.
    """

    scale: float | Tensor
    decay: float | Tensor
    drift: float | Tensor
    buffer: Tensor | None


Step = Sequence[ParameterStep]


def sgd_numbers(optimizer: torch.optim.Optimizer, device: torch.device) -> Tensor:
    """Return what schedules may change of SGD, [groups, 3]: learning rate, momentum, and weight decay.

    What is recorded reads these numbers from a tensor, and would go on with the present ones else.
    """
    return torch.tensor([_numbers_of(group) for group in optimizer.param_groups], dtype=torch.float64, device=device)


def _numbers_of(group: dict[str, Any]) -> Sequence[Any]:
    return [float(group[name]) for name in ("lr", "momentum", "weight_decay")]


def sgd_step(
    optimizer: torch.optim.Optimizer, weights: Sequence[Tensor], numbers: Tensor | None = None
) -> list[ParameterStep]:
    """Return what the next step of ``optimizer`` does to ``weights``, apart from their gradient.

    Args:
        optimizer: of the weights.
        weights: w.
        numbers: of each of its groups, from :func:`sgd_numbers`, in place of its own.

    Raises:
        UserError: if it is not ``torch.optim.SGD``, or dampens or maximises: its step is another formula then.
    """
    if type(optimizer) is not torch.optim.SGD:
        raise UserError(
            f"The unrolled step is one of SGD, but the optimizer of the weights is {type(optimizer).__name__}; take "
            "torch.optim.SGD ('sgd' or 'momentum' in a recipe), or order: first."
        )
    steps: dict[Tensor, ParameterStep] = {}
    for position, group in enumerate(optimizer.param_groups):
        if group["dampening"] or group["maximize"]:
            raise UserError("The unrolled step knows neither dampening nor maximize; leave them out of the optimizer.")
        lr, momentum, weight_decay = _numbers_of(group) if numbers is None else numbers[position].unbind()
        scale, drift = (lr * (1 + momentum), lr * momentum**2) if group["nesterov"] else (lr, lr * momentum)
        # Once for all parameters, which are recognised by it as those that move alike.
        decay = scale * weight_decay
        for parameter in group["params"]:
            buffer = optimizer.state.get(parameter, {}).get("momentum_buffer")
            steps[parameter] = ParameterStep(scale, decay, drift, buffer)
    # What the optimizer does not know stays where it is.
    return [steps.get(weight, ParameterStep(0.0, 0.0, 0.0, None)) for weight in weights]


@dataclass(frozen=True)
class Hypergradient:
    """What the validation loss does when α changes.

    Attributes:
        gradients: dL_val/dα, one tensor for each of ``alphas``.
        implicit: the part of it that comes through the weights; zeros for the first order.
        valid_loss: L_val at the weights that it was measured at, a scalar.
    """

    gradients: tuple[Tensor, ...]
    implicit: tuple[Tensor, ...]
    valid_loss: Tensor


def first_order(
    train_loss: Loss, valid_loss: Loss, weights: Sequence[Tensor], alphas: Sequence[Tensor], step: Step
) -> Hypergradient:
    """Return ∇α L_val(w, α): as if the weights did not depend on α (section 2.3, ξ = 0).

    Args:
        train_loss: L_train, not called.
        valid_loss: L_val, a scalar function of (weights, alphas).
        weights: w.
        alphas: α.
        step: the step of the weights, not read.
    """
    with _leaves(alphas) as variables:
        loss = valid_loss([weight.detach() for weight in weights], variables)
        gradients = _gradients(loss, variables)
    return Hypergradient(gradients, tuple(torch.zeros_like(alpha) for alpha in alphas), loss.detach())


def finite_difference(
    train_loss: Loss,
    valid_loss: Loss,
    weights: Sequence[Tensor],
    alphas: Sequence[Tensor],
    step: Step,
    radius: float = PUBLISHED_RADIUS,
) -> Hypergradient:
    """Return the hypergradient with the implicit term as a central difference, as published (equation 8).

    The weights move by ±ε·v along v = s·∇w' L_val, with ε = ``radius`` / ‖v‖, and ∇α L_train is taken at both ends.
    With ReLU or max pooling in the network the kinks in between make this another quantity than :func:`exact`
    (``docs/darts.md``).

    Args:
        train_loss: L_train, a scalar function of (weights, alphas).
        valid_loss: L_val, likewise.
        weights: w.
        alphas: α.
        step: the step of the weights, from :func:`sgd_step`.
        radius: how far the weights move, in the Euclidean norm.
    """
    with _leaves(weights) as variables:
        loss = train_loss(variables, [alpha.detach() for alpha in alphas])
        slopes = torch.autograd.grad(loss, variables, allow_unused=True)
    moved = _moved(weights, slopes, step)
    learns = [slope is not None for slope in slopes]
    # Small arrays that were made between large ones, whose memory cannot be given back as long as they are there.
    del slopes, loss, variables
    unrolled = _unroll(moved, learns, valid_loss, alphas, step)
    norm = torch.linalg.vector_norm(torch.stack(list(torch._foreach_norm(unrolled.direction))))
    # Where the validation loss does not depend on the weights there is nothing to differentiate through. Not an if: a
    # GPU would be waited for.
    depends = norm > 0
    epsilon = torch.where(depends, radius / norm, 0)

    def at(sign: int) -> tuple[Tensor, ...]:
        along = _times(unrolled.direction, sign * epsilon)
        moved = torch._foreach_add([weight.detach() for weight in weights], along)
        with _leaves(alphas) as variables:
            return _gradients(train_loss(moved, variables), variables)

    implicit = tuple(torch.where(depends, (b - a) / (2 * epsilon), 0) for a, b in zip(at(1), at(-1), strict=True))
    return unrolled.hypergradient(implicit)


def exact(
    train_loss: Loss, valid_loss: Loss, weights: Sequence[Tensor], alphas: Sequence[Tensor], step: Step
) -> Hypergradient:
    """Return the hypergradient by automatic differentiation.

    The gradient of the unrolled step is differentiated once more, which saves computing it a second time. Forward over
    reverse mode, which keeps no graph of a gradient, was no faster (``docs/darts.md``).

    Args:
        train_loss: L_train, a scalar function of (weights, alphas).
        valid_loss: L_val, likewise.
        weights: w.
        alphas: α.
        step: the step of the weights, from :func:`sgd_step`.
    """
    with _leaves(weights) as variables, _leaves(alphas) as architecture:
        loss = train_loss(variables, architecture)
        slopes = torch.autograd.grad(loss, variables, create_graph=True, allow_unused=True)
    learns = [slope is not None for slope in slopes]
    unrolled = _unroll(_moved(weights, slopes, step), learns, valid_loss, alphas, step)
    moving = [(s, v) for s, v in zip(slopes, unrolled.direction, strict=True) if s is not None and s.requires_grad]
    if not moving:
        return unrolled.hypergradient(tuple(torch.zeros_like(alpha) for alpha in alphas))
    with without_weights():
        implicit: Any = torch.autograd.grad(
            [slope for slope, _ in moving],
            architecture,
            torch._foreach_neg([direction for _, direction in moving]),
            allow_unused=True,
            materialize_grads=True,
        )
    return unrolled.hypergradient(tuple(implicit))


@dataclass(frozen=True)
class _Unrolled:
    """L_val after the step: its gradient in α at fixed w', and s·∇w' L_val, the direction of the implicit term."""

    direct: tuple[Tensor, ...]
    direction: tuple[Tensor, ...]
    valid_loss: Tensor

    def hypergradient(self, implicit: tuple[Tensor, ...]) -> Hypergradient:
        total = tuple(a + b for a, b in zip(self.direct, implicit, strict=True))
        return Hypergradient(total, implicit, self.valid_loss)


def _moved(weights: Sequence[Tensor], slopes: Sequence[Tensor | None], step: Step) -> list[Tensor]:
    """Return w'."""
    moved = [weight.detach() for weight in weights]
    # The optimizer leaves alone what has no gradient.
    kinds = [
        None if slope is None else (how.scale, how.decay, how.drift, how.buffer is None, slope.dtype)
        for slope, how in zip(slopes, step, strict=True)
    ]
    for (scale, decay, drift, is_fresh, _), places in _alike(kinds):
        before = [moved[place] for place in places]
        after = torch._foreach_sub(before, _times([_given(slopes[place]).detach() for place in places], scale))
        torch._foreach_sub_(after, _times(before, decay))
        if not is_fresh:
            torch._foreach_sub_(after, _times([_given(step[place].buffer) for place in places], drift))
        for place, weight in zip(places, after, strict=True):
            moved[place] = weight
    return moved


def _alike(kinds: Sequence[Any]) -> Iterable[tuple[Any, list[int]]]:
    """Give the places of every kind but None.

    What is alike is computed together: a GPU takes longer to begin with a small tensor than to be done with it.
    """
    places: dict[Any, list[int]] = {}
    for place, kind in enumerate(kinds):
        if kind is not None:
            places.setdefault(kind, []).append(place)
    return places.items()


def _given(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _times(tensors: Sequence[Tensor], factor: float | Tensor) -> list[Tensor]:
    if isinstance(factor, Tensor):
        # A tensor of one number counts as a number only in the same precision.
        return list(torch._foreach_mul(list(tensors), factor.to(tensors[0].dtype)))
    return list(torch._foreach_mul(list(tensors), factor))


def _unroll(
    moved: Sequence[Tensor], learns: Sequence[bool], valid_loss: Loss, alphas: Sequence[Tensor], step: Step
) -> _Unrolled:
    with _leaves(moved) as variables, _leaves(alphas) as architecture:
        loss = valid_loss(variables, architecture)
        gradients = _gradients(loss, [*variables, *architecture])
    by_weights, direct = gradients[: len(moved)], gradients[len(moved) :]
    # A weight that no step has moved does not depend on α.
    direction = [v if moves else torch.zeros_like(v) for v, moves in zip(by_weights, learns, strict=True)]
    for (scale, _), places in _alike([(how.scale, v.dtype) for how, v in zip(step, direction, strict=True)]):
        for place, scaled in zip(places, _times([direction[place] for place in places], scale), strict=True):
            direction[place] = scaled
    return _Unrolled(direct, tuple(direction), loss.detach())


@contextmanager
def _leaves(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Give detached views of ``tensors`` that can be differentiated by."""
    with torch.enable_grad():
        yield [tensor.detach().requires_grad_() for tensor in tensors]


def _gradients(loss: Tensor, variables: Sequence[Tensor]) -> tuple[Tensor, ...]:
    gradients: Any = torch.autograd.grad(loss, list(variables), allow_unused=True, materialize_grads=True)
    return tuple(gradients)
