"""Whether a training still computes numbers: what is not finite is found in the step in which it appears."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn

from nni_cream.distributed import mean, processes
from nni_cream.errors import TrainingError
from nni_cream.ranks import is_first

_ADVICE: Final = ": the training has diverged, and its last checkpoint is of before; a lower optimizer.lr may help."


@torch.no_grad()
def first_not_finite(named: Mapping[str, Sequence[Tensor]]) -> tuple[str, float] | None:
    """Return the first name under which a number is not finite, and the norm of those under it; None if all are.

    The device is waited for once, however many tensors there are.
    """
    given = {name: tensors for name, tensors in named.items() if tensors}
    if not given:
        return None
    norms = torch.stack([torch.nn.utils.get_total_norm(tensors).float() for tensors in given.values()]).tolist()
    return next(((name, norm) for name, norm in zip(given, norms, strict=True) if not math.isfinite(norm)), None)


class _Before:
    """Parameters, and what their optimizer keeps of them, as they are before a step."""

    def __init__(self, optimizer: Any, parameters: Sequence[nn.Parameter]) -> None:
        # timm's Lookahead keeps everything in the optimizer that it wraps.
        self._state: Any = getattr(optimizer, "_base_optimizer", optimizer).state
        self._parameters = [(parameter, parameter.detach().clone()) for parameter in parameters]
        self._kept = {p: copy.deepcopy(self._state[p]) for p in parameters if p in self._state}

    @torch.no_grad()
    def restore(self) -> None:
        for parameter, before in self._parameters:
            parameter.copy_(before)
            if parameter in self._kept:
                self._state[parameter] = self._kept[parameter]
            else:
                self._state.pop(parameter, None)


class Soundness(Callback):
    """Ends a training in the step whose loss or gradient is not finite, before any weight has changed.

    Steps that scale the loss (16-mixed) leave out some by themselves until the scale fits; those are not counted.

    Args:
        skips: how many such steps may be left out, in the whole training, before one ends it.

    Attributes:
        skipped: how many have been.
        bad: whether this step is one.
    """

    def __init__(self, skips: int = 0) -> None:
        self.skips = skips
        self.skipped = 0
        self.bad = False
        self._loss: Tensor | None = None
        self._buffers: list[tuple[Tensor, Tensor]] = []
        self._moved: list[_Before] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        """Remember the running statistics of batch norms, which change before a loss is known."""
        self.bad = False
        self._moved = []
        if self.skipped < self.skips:
            self._buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]

    def on_before_backward(self, trainer: Any, module: Any, loss: Tensor) -> None:
        """Take the loss of the step."""
        self._loss = loss.detach()

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        """Look at the loss and the gradient; leave out the step, or end the training, if they are not finite."""
        assert self._loss is not None
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        loss = mean(self._loss) if processes() > 1 else self._loss
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        found = first_not_finite({"loss": [loss], "gradient": [p.grad for p in parameters]})
        if found is None or (scaler is not None and found[0] == "gradient" and scaler.get_scale() > 1):
            return
        self.refuse(module, *found)
        for parameter in parameters:
            if getattr(optimizer, "_step_supports_amp_scaling", False) and scaler is not None:
                # A fused one looks at the gradients itself, and there have to be some.
                parameter.grad.fill_(math.inf)
            else:
                parameter.grad = None

    def remember(self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> None:
        """Keep what a step of ``optimizer`` is about to change, for a training step that has more parts than this one.

        If one of the parts that follow is bad, all of it is left out. Without steps to be left out nothing is kept.

        Args:
            optimizer: that makes the step.
            parameters: those that it will change.
        """
        if self.skipped < self.skips:
            self._moved.append(_Before(optimizer, parameters))

    def allows(self, module: Any, named: Mapping[str, Sequence[Tensor]]) -> bool:
        """Tell whether a step that Lightning does not know of may be taken: whether all that it depends on is finite.

        Raises:
            TrainingError: if it may not, and no more steps may be left out.
        """
        found = first_not_finite(named)
        if found is not None:
            self.refuse(module, *found)
        return found is None

    def refuse(self, module: Any, what: str, value: float) -> None:
        """Leave this step out, and put back what its parts have changed.

        Args:
            module: what is trained; its ``describe_step()``, if there is one, says what the step was about.
            what: the thing that is not finite.
            value: of it.

        Raises:
            TrainingError: if no more steps may be left out.
        """
        if self.bad:
            # Seen already, in another part of it.
            return
        trainer = module.trainer
        describe = getattr(module, "describe_step", None)
        about = f"{describe()}, " if describe else ""
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        step = f"step {trainer.fit_loop.batch_idx + 1} of epoch {trainer.current_epoch + 1}"
        sentence = f"The {what} is {value} in {step}, {about}at learning rate {rate:g}"
        self.skipped += 1
        self.bad = True
        if self.skipped > self.skips:
            if not is_first():
                # All have found it, and one says so.
                sys.exit(1)
            raise TrainingError(sentence + _ADVICE)
        for buffer, before in self._buffers:
            buffer.copy_(before)
        for part in reversed(self._moved):
            part.restore()
        if is_first():
            print(f"{sentence}; it is left out, {self.skipped} of at most {self.skips}.", file=sys.stderr, flush=True)

    def state_dict(self) -> dict[str, int]:
        """Return how many steps have been left out."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore it."""
        self.skipped = state["skipped"]


def of(trainer: Any) -> Soundness:
    """Return the callback of ``trainer``."""
    return next(callback for callback in trainer.callbacks if isinstance(callback, Soundness))


def unless_there(trainer: Any) -> list[Callback]:
    """Return a callback for ``trainer``, which ends at the first bad step, unless it has one."""
    return [] if any(isinstance(callback, Soundness) for callback in trainer.callbacks) else [Soundness()]


def refuse_broken(module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Make sure that weights, buffers and the state of optimizers are finite.

    Raises:
        TrainingError: if one is not.
    """
    states: list[Any] = [state for optimizer in optimizers for state in optimizer.state.values()]
    named: dict[str, list[Tensor]] = {
        "weight": list(module.parameters()),
        "running statistic": list(module.buffers()),
        "state of an optimizer": [value for state in states for value in state.values() if isinstance(value, Tensor)],
    }
    floating = {name: [t for t in tensors if t.is_floating_point()] for name, tensors in named.items()}
    found = first_not_finite(floating)
    if found is not None:
        raise TrainingError(f"A {found[0]} is {found[1]}{_ADVICE}")
