"""Time the exact hypergradient in reverse and in forward mode, in ratio to a step of first order.

    python benchmarks/exact_product.py

Each with PyTorch's derivatives of depthwise convolutions and with explicit ones. All in one process, in turn, in
float32. The reverse mode with explicit derivatives is what the package does; the others are here.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from common import save_result
from hypergradients import Network
from torch import Tensor, nn
from torch.autograd import forward_ad

from nni_cream.hypergradient import Step, exact, finite_difference, first_order, sgd_step
from nni_cream.strategies.darts import DartsStrategy
from nni_cream.supernet.depthwise import DepthwiseConv2d, PointwiseConv2d
from nni_cream.supernet.functional import pure_loss
from search_spaces.darts import DartsSpace

Loss = Callable[..., Tensor]


def exact_forward(
    train_loss: Loss, valid_loss: Loss, weights: Sequence[Tensor], alphas: Sequence[Tensor], step: Step
) -> tuple[Tensor, ...]:
    """Return the exact hypergradient by forward over reverse mode: one more pass, without a graph of a gradient."""
    variables = [weight.detach().requires_grad_() for weight in weights]
    slopes = torch.autograd.grad(train_loss(variables, [alpha.detach() for alpha in alphas]), variables)
    moved = [
        (w.detach() - how.scale * g - how.decay * w.detach()).requires_grad_()
        for w, g, how in zip(weights, slopes, step, strict=True)
    ]
    architecture = [alpha.detach().requires_grad_() for alpha in alphas]
    gradients = torch.autograd.grad(valid_loss(moved, architecture), [*moved, *architecture])
    by_weights, direct = gradients[: len(moved)], gradients[len(moved) :]
    with forward_ad.dual_level():
        moving = [
            forward_ad.make_dual(w.detach(), how.scale * v) for w, v, how in zip(weights, by_weights, step, strict=True)
        ]
        by_alphas = torch.autograd.grad(train_loss(moving, architecture), architecture)
        implicit = [forward_ad.unpack_dual(gradient).tangent for gradient in by_alphas]
        return tuple((a - b).detach() for a, b in zip(direct, implicit, strict=True))


def with_torch_derivatives(module: nn.Module) -> nn.Module:
    """Put ``nn.Conv2d`` in place of our convolutions."""
    for name, child in list(module.named_children()):
        if isinstance(child, DepthwiseConv2d | PointwiseConv2d):
            size: Any = (child.kernel_size, child.stride, child.padding, child.dilation)
            plain = nn.Conv2d(child.in_channels, child.out_channels, *size, groups=child.groups, bias=False)
            plain.weight = child.weight
            setattr(module, name, plain)
        else:
            with_torch_derivatives(child)
    return module


def contenders(shape: Sequence[int], memory_format: torch.memory_format) -> dict[str, Callable[[], Any]]:
    """Return everything that is timed, by name, on a network of its own that starts alike."""
    channels, cells, batch, resolution = shape
    found: dict[str, Callable[[], Any]] = {}
    for derivatives in ("explicit", "torch's"):
        torch.manual_seed(0)
        # The textbook execution calls the modules that with_torch_derivatives replaces.
        strategy = DartsStrategy(execution="textbook")
        space: nn.Module = strategy.mutate_model(DartsSpace(10, channels=channels, cells=cells))
        if derivatives == "torch's":
            with_torch_derivatives(space)
        network = Network(space, strategy.alphas).to(memory_format=memory_format)
        weights, alphas = list(space.parameters()), list(strategy.alphas.parameters())
        names = [
            [f"{part}.{name}" for name, _ in getattr(network, part).named_parameters()] for part in ("space", "alphas")
        ]
        losses = []
        for _ in range(2):
            images = torch.randn(batch, 3, resolution, resolution).to(memory_format=memory_format)
            labels = torch.randint(10, (batch,))
            losses.append(pure_loss(network, names, lambda logits, y=labels: F.cross_entropy(logits, y), images))
        optimizer = torch.optim.SGD(weights, 0.025, momentum=0.9, weight_decay=3e-4)
        arguments = (*losses, weights, alphas, sgd_step(optimizer, weights))

        def step_of_weights(loss: Loss = losses[0], w: Any = weights, a: Any = alphas) -> None:
            torch.autograd.grad(loss(w, [alpha.detach() for alpha in a]), w)

        kinds = {
            "step of the weights": step_of_weights,
            "first order": lambda x=arguments: first_order(*x).gradients,
            "finite difference": lambda x=arguments: finite_difference(*x).gradients,
            "exact, reverse": lambda x=arguments: exact(*x).gradients,
            "exact, forward": lambda x=arguments: exact_forward(*x),
        }
        found |= {f"{kind}, {derivatives} derivatives": function for kind, function in kinds.items()}
        agree = zip(kinds["exact, reverse"](), kinds["exact, forward"](), strict=True)
        assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in agree)
    return found


def main() -> None:
    """Measure, write the result, and print it as a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", type=int, nargs=4, default=[8, 5, 32, 32], help="channels, cells, batch, pixels")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count, after one that does not")
    parser.add_argument("--contiguous", action="store_true", help="NCHW in memory, not channels last")
    arguments = parser.parse_args()
    memory_format = torch.contiguous_format if arguments.contiguous else torch.channels_last
    functions = contenders(arguments.shape, memory_format)
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for round_number in range(arguments.repeats + 1):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if round_number:
                seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print("| hypergradient | derivatives | median, s | step, in steps of first order |")
    print("|---|---|---|---|")
    rows = []
    reference = sum(medians[f"{kind}, explicit derivatives"] for kind in ("first order", "step of the weights"))
    for name, median in medians.items():
        kind, derivatives = name.removesuffix(" derivatives").rsplit(", ", 1)
        if kind != "step of the weights":
            ratio = (median + medians[f"step of the weights, {derivatives} derivatives"]) / reference
            rows.append({"kind": kind, "derivatives": derivatives, "seconds": seconds[name], "step_ratio": ratio})
            print(f"| {kind} | {derivatives} | {median:.2f} | {ratio:.2f} |")
    shape = dict(zip(("channels", "cells", "batch", "resolution"), arguments.shape, strict=True))
    file = save_result(
        "exact_product",
        {
            "what": "time of a hypergradient; a step is that and a step of the weights",
            "shape": shape,
            "memory_format": str(memory_format),
            "threads": torch.get_num_threads(),
            "repeats": arguments.repeats,
            "rows": rows,
        },
    )
    print(f"written to {file}")


if __name__ == "__main__":
    main()
