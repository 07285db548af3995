"""What the strategies are told, in the ranges in which recipes take it, and in the words in which they refuse it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from nni_cream.errors import UserError
from nni_cream.latency import LatencyBudget

NamedPrior = Literal["even", "board"]
Teacher = Literal["matching", "top1", "none"]
Order = Literal["first", "second"]
HypergradientKind = Literal["exact", "finite_difference"]
EigenvalueGuard = Literal["off", "track", "stop", "rollback"]
Execution = Literal["fused", "textbook"]


@dataclass(frozen=True)
class CreamSettings:
    """What :class:`CreamStrategy` is told; the attributes are described there.

    Raises:
        UserError: if one of them is out of its range.
    """

    board_size: int
    board_images: int
    admission_gap: float
    warmup_epochs: int
    prior: NamedPrior | Sequence[float] | Mapping[str, Sequence[float]]
    teacher: Teacher
    flops_range: tuple[float, float] | None
    latency: LatencyBudget | None
    label_smoothing: float
    meta_interval: int
    matching_lr: float
    recalibration_batches: int
    seed: int

    def __post_init__(self) -> None:
        if isinstance(self.prior, str):
            _one_of("prior", self.prior, get_args(NamedPrior))
        _one_of("teacher", self.teacher, get_args(Teacher))
        _at_least(
            1,
            board_size=self.board_size,
            meta_interval=self.meta_interval,
            recalibration_batches=self.recalibration_batches,
        )
        _at_least(0, warmup_epochs=self.warmup_epochs, admission_gap=self.admission_gap, seed=self.seed)
        _at_least(0, label_smoothing=self.label_smoothing)
        _above_zero(board_images=self.board_images, matching_lr=self.matching_lr)


@dataclass(frozen=True)
class DartsSettings:
    """What :class:`DartsStrategy` is told; the attributes are described there.

    Raises:
        UserError: if one of them is out of its range.
    """

    order: Order
    hypergradient: HypergradientKind
    radius: float
    warmup_epochs: int
    alpha_lr: float
    alpha_betas: tuple[float, float]
    alpha_weight_decay: float
    gradient_clip: float | None
    label_smoothing: float
    stop_above_skips: int | None
    skip_limit: int | None
    eigenvalue: EigenvalueGuard
    flops_target: float | None
    flops_weight: float
    execution: Execution
    cuda_graphs: bool

    def __post_init__(self) -> None:
        _one_of("order", self.order, get_args(Order))
        _one_of("hypergradient", self.hypergradient, get_args(HypergradientKind))
        _one_of("eigenvalue", self.eigenvalue, get_args(EigenvalueGuard))
        _one_of("execution", self.execution, get_args(Execution))
        _at_least(0, warmup_epochs=self.warmup_epochs, alpha_weight_decay=self.alpha_weight_decay)
        _at_least(0, label_smoothing=self.label_smoothing)
        _at_least(0, stop_above_skips=self.stop_above_skips, skip_limit=self.skip_limit)
        _above_zero(radius=self.radius, alpha_lr=self.alpha_lr, gradient_clip=self.gradient_clip)
        _above_zero(flops_target=self.flops_target, flops_weight=self.flops_weight)


def _one_of(name: str, value: Any, words: Sequence[str]) -> None:
    """Make sure that an argument is one of some words.

    Raises:
        UserError: if it is none of them.
    """
    if value not in words:
        raise UserError(f"{name} is {value!r}, but should be {', '.join(map(repr, words[:-1]))} or {words[-1]!r}.")


def _at_least(lowest: float, **arguments: float | None) -> None:
    """Make sure that numbers are not below a bound; None is none.

    Raises:
        UserError: if one is; it has the argument's name.
    """
    for name, value in arguments.items():
        if value is not None and not value >= lowest:
            raise UserError(f"{name} is {value!r}, but should be at least {lowest}.")


def _above_zero(**arguments: float | None) -> None:
    """Make sure that numbers are positive; None is none.

    Raises:
        UserError: if one is not; it has the argument's name.
    """
    for name, value in arguments.items():
        if value is not None and not value > 0:
            raise UserError(f"{name} is {value!r}, but should be above 0.")
