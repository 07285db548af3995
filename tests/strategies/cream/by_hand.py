"""A step of a Cream search by hand, with NNI's unmutated space."""

from __future__ import annotations

import torch
from torch import Tensor

from nni_cream.board import BoardEntry
from tests.reference import run_through
from tests.six_paths import SixPaths
from tests.strategies.cream.searches import HELD_OUT, HELD_OUT_BATCHES, LEARNING_RATE, Step
from tests.strategies.running import State

SMOOTHING = 0.1


def space_of(state: State) -> SixPaths:
    space = SixPaths().double().train()
    space.load_state_dict(state)
    return space


def path_of(sample: dict[str, int]) -> tuple[int, ...]:
    return (sample["first"], sample["second"])


def sample_of(path: tuple[int, ...]) -> dict[str, int]:
    return dict(zip(("first", "second"), path, strict=True))


def answers(state: State, sample: dict[str, int], images: Tensor) -> Tensor:
    """The softmax of a path with the statistics of the batch; the state stays as it is."""
    space = space_of(state)
    run_through(space, sample)
    with torch.no_grad():
        return space(images).softmax(-1)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    log = logits.log_softmax(-1)
    picked = log[torch.arange(len(labels)), labels]
    return -((1 - SMOOTHING) * picked + SMOOTHING * log.mean(-1)).mean()


def distillation(logits: Tensor, soft_targets: Tensor) -> Tensor:
    return -(soft_targets * logits.log_softmax(-1)).sum(-1).mean()


def matching_logits(step: Step, state: State, matching: State) -> Tensor:
    differences = [(answers(state, step.drawn, entry.images) - entry.features).flatten() for entry in step.board]
    return torch.stack(differences) @ matching["linear.weight"][0] + matching["linear.bias"]


def teaching_by_hand(step: Step, mode: str, state: State, matching: State) -> tuple[BoardEntry, Tensor] | None:
    if mode == "none" or not step.board:
        return None
    if mode == "top1":
        return max(step.board, key=lambda entry: entry.score), torch.tensor(0.5)
    logits = matching_logits(step, state, matching)
    return step.board[int(logits.argmax())], logits.max().sigmoid()


def step_by_hand(step: Step, mode: str, state: State, matching: State) -> tuple[float, State]:
    """The loss, and all parameters and buffers of the supernet after one SGD step on it."""
    images, labels = step.batch
    teaching = teaching_by_hand(step, mode, state, matching)
    space = space_of(state)
    run_through(space, step.drawn)
    logits = space(images)
    loss = cross_entropy(logits, labels)
    if teaching:
        entry, weight = teaching
        soft_targets = answers(state, sample_of(entry.path), images)
        loss = (weight * distillation(logits, soft_targets) + (2 - weight) * loss) / 2
    loss.backward()
    with torch.no_grad():
        for parameter in space.parameters():
            if parameter.grad is not None:
                parameter -= LEARNING_RATE * parameter.grad
    return loss.item(), space.state_dict()


def share_of_held_out(state: State, sample: dict[str, int]) -> float:
    right = sum(int((answers(state, sample, x).argmax(-1) == labels).sum()) for x, labels in HELD_OUT_BATCHES)
    return 100 * right / len(HELD_OUT)


def percent_correct(state: State, sample: dict[str, int], batch: tuple[Tensor, Tensor]) -> float:
    images, labels = batch
    return 100 * int((answers(state, sample, images).argmax(-1) == labels).sum()) / len(labels)
