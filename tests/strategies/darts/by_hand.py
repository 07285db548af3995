"""A search with DARTS by hand, with nothing of ours: the space as one function, derivatives through whole steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.strategies.darts.searches import DECAY, FALL, LEARNING_RATE, MOMENTUM, Search, prices
from tests.strategies.running import State


def batch_norm(state: State, name: str, x: Tensor, moved: State | None, training: bool) -> Tensor:
    mean, variance = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    if training:
        number = x.numel() / x.shape[1]
        if moved is not None:
            batch_mean, batch_variance = x.mean((0, 2, 3)), x.var((0, 2, 3))
            moved[f"{name}.running_mean"] = (0.9 * mean + 0.1 * batch_mean).detach()
            moved[f"{name}.running_var"] = (0.9 * variance + 0.1 * batch_variance).detach()
            moved[f"{name}.num_batches_tracked"] = state[f"{name}.num_batches_tracked"] + 1
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3)) * (number - 1) / number
    x = (x - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
    return x * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]


def logits_by_hand(
    state: State, alphas: State, images: Tensor, moved: State | None = None, training: bool = True
) -> Tensor:
    weights = {name: table.exp() / table.exp().sum() for name, table in alphas.items()}

    def convolve(name: str, x: Tensor) -> Tensor:
        kernel = state[f"{name}.0.weight"]
        x = nn.functional.conv2d(x, kernel, padding=kernel.shape[-1] // 2)
        return batch_norm(state, f"{name}.1", x, moved, training)

    def layer(name: str, x: Tensor) -> Tensor:
        return (1 + convolve(name, x).exp()).log()

    def mean(label: str, *features: Tensor) -> Tensor:
        return (weights[label].view(-1, 1, 1, 1, 1) * torch.stack(features)).sum(0)

    a = convolve("stem", images)
    b = mean("kernel", layer("first.0", a), layer("first.1", a))
    c = mean("kernel", layer("second.0", b), layer("second.1", b))
    if "inner" in weights:
        inner = mean("inner", layer("third.inner.0", c), layer("third.inner.1", c))
    else:
        inner = layer("third.inner", c)
    d = mean("third", inner, layer("third.plain", c), c)
    features = mean("pick", a, b, c) + 2 * mean("two", b, c, d) * mean("average", a, c, d)
    return features.mean((2, 3)) @ state["head.weight"].T + state["head.bias"]


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    log = logits - logits.exp().sum(1, keepdim=True).log()
    picked = log[torch.arange(len(labels)), labels]
    return -((1 - smoothing) * picked + smoothing * log.mean(1)).mean()


def expected_macs(alphas: State) -> Tensor:
    first, third = alphas["kernel"].softmax(0), alphas["third"].softmax(0)
    return sum(first[i] * third[j] * macs for (i, j), macs in prices().items())  # type: ignore[return-value]


@dataclass
class StepByHand:
    epoch: int
    loss: float
    correct: float
    alpha_loss: float
    space: State
    alphas: State


def search_by_hand(search: Search) -> Iterator[StepByHand]:
    """All steps of a search, from what its first one starts from; the batches are those that it was given."""
    settings = search.strategy.settings
    state, alphas = dict(search.steps[0].space), dict(search.steps[0].alphas)
    names = [name for name, parameter in search.module.model.named_parameters() if parameter.requires_grad]
    adam_moments = {name: (torch.zeros_like(t), torch.zeros_like(t)) for name, t in alphas.items()}
    buffers: State = {}
    updates = 0
    for step in search.steps:
        rate = LEARNING_RATE * FALL**step.epoch
        alpha_loss = float("nan")
        if step.epoch >= settings.warmup_epochs:
            variables = {name: table.clone().requires_grad_() for name, table in alphas.items()}
            w = {name: state[name].clone().requires_grad_() for name in names}
            if settings.order == "second":
                images, labels = step.batch["train"]
                loss = cross_entropy(
                    logits_by_hand({**state, **w}, variables, images), labels, settings.label_smoothing
                )
                slopes = torch.autograd.grad(loss, list(w.values()), create_graph=True)
                w = {
                    name: v - rate * (slope + DECAY * v + MOMENTUM * buffers.get(name, torch.zeros(())))
                    for (name, v), slope in zip(w.items(), slopes, strict=True)
                }
            images, labels = step.batch["alpha"]
            loss = cross_entropy(logits_by_hand({**state, **w}, variables, images), labels, settings.label_smoothing)
            alpha_loss = loss.item()
            if settings.flops_target is not None:
                loss = loss + settings.flops_weight * (expected_macs(variables) / settings.flops_target - 1).clamp(0)
            gradients = torch.autograd.grad(loss, list(variables.values()))
            updates += 1
            for (name, table), slope in zip(alphas.items(), gradients, strict=True):
                gradient = slope + settings.alpha_weight_decay * table
                beta1, beta2 = settings.alpha_betas
                first = beta1 * adam_moments[name][0] + (1 - beta1) * gradient
                second = beta2 * adam_moments[name][1] + (1 - beta2) * gradient**2
                adam_moments[name] = first, second
                size = (second / (1 - beta2**updates)).sqrt() + 1e-8
                alphas[name] = table - settings.alpha_lr * first / (1 - beta1**updates) / size
        w = {name: state[name].clone().requires_grad_() for name in names}
        images, labels = step.batch["train"]
        moved: State = {}
        logits = logits_by_hand({**state, **w}, alphas, images, moved)
        loss = cross_entropy(logits, labels, settings.label_smoothing)
        slopes = torch.autograd.grad(loss, list(w.values()))
        norm = torch.cat([slope.flatten() for slope in slopes]).norm()
        limit = settings.gradient_clip
        factor = 1.0 if limit is None else min(1.0, limit / (norm.item() + 1e-6))
        for (name, v), slope in zip(w.items(), slopes, strict=True):
            gradient = factor * slope + DECAY * v.detach()
            buffers[name] = MOMENTUM * buffers.get(name, torch.zeros(())) + gradient
            state[name] = v.detach() - rate * buffers[name]
        state |= moved
        correct = (logits.argmax(1) == labels).double().mean().item()
        yield StepByHand(step.epoch, loss.item(), correct, alpha_loss, dict(state), dict(alphas))
