"""What a network costs: multiply-accumulates (MACs) and parameters.

Papers on small networks, and timm, write "FLOPs" for multiply-accumulates; so do our recipes and metrics
(``flops: 14_000_000`` is 14 M MACs). The numbers come from torch's own FLOP counter, which counts two for each.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from nni_cream.errors import UserError

_OPERATIONS: Final = torch.ops.aten
_ACTIVATIONS: Final = frozenset(
    getattr(_OPERATIONS, name).default for name in ("gelu", "hardsigmoid", "hardswish", "relu", "sigmoid", "silu")
)


class _ShapesAlone(TorchDispatchMode):
    """On the meta device, answers norms and activations, which cost nothing here, by a tensor like their input.

    torch takes them apart in Python there to find its shape, which takes longer than all the rest of counting.
    """

    def __torch_dispatch__(self, operation: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], Tensor) and args[0].is_meta:
            if operation in _ACTIVATIONS:
                return torch.empty_like(args[0])
            if operation is _OPERATIONS.native_batch_norm.default:
                # The other two are what a pass backward would need.
                return torch.empty_like(args[0]), args[0].new_empty(0), args[0].new_empty(0)
        return operation(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Cost:
    """MACs for one image, and number of parameters."""

    macs: int
    params: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.macs + other.macs, self.params + other.params)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.macs - other.macs, self.params - other.params)


def measure(module: nn.Module, *inputs: Tensor) -> Cost:
    """Count what ``module`` costs on ``inputs``, a batch of one image, in evaluation mode.

    Modules and inputs may lie on the ``meta`` device, where counting computes nothing.
    """
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter, _ShapesAlone():
            module(*inputs)
    finally:
        for part, training in modes:
            part.training = training
    return Cost(counter.get_total_flops() // 2, _parameters(module))


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def measure_network(network: nn.Module, resolution: int) -> Cost:
    """Count what ``network`` costs on one RGB image of ``resolution`` × ``resolution`` pixels.

    An auxiliary head, which serves training alone, does not count, as in the papers.

    Raises:
        UserError: if it cannot take such images.
    """
    # Without gradients, also those of parameters that a network gives to its layers as inputs: the counter asks for the
    # function of an input's gradient, which there is none of here.
    on_meta: Any = copy.deepcopy(network).to("meta").requires_grad_(False)
    if getattr(on_meta, "auxiliary_head", None) is not None:
        on_meta.auxiliary_head = None
    try:
        return measure(on_meta, torch.empty(1, 3, resolution, resolution, device="meta"))
    # What timm's networks raise for a size that is not theirs.
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f"The network cannot take images of {resolution} pixels (data.resolution): {reason}."
        ) from error


@dataclass(frozen=True)
class CostTable:
    """The cost of every choice of a space in which a path costs the sum of its choices.

    ``choices[label][i]`` is the cost of the i-th candidate of the choices with that label; ``fixed`` is everything
    that every path has.
    """

    fixed: Cost
    choices: Mapping[str, tuple[Cost, ...]]

    def of(self, indices: Mapping[str, int]) -> Cost:
        """Return the cost of the path that takes candidate ``indices[label]`` at every label."""
        return sum((options[indices[label]] for label, options in self.choices.items()), start=self.fixed)

    @property
    def cheapest(self) -> int:
        """MACs of the cheapest path."""
        return self.fixed.macs + sum(min(cost.macs for cost in options) for options in self.choices.values())

    @property
    def dearest(self) -> int:
        """MACs of the most expensive path."""
        return self.fixed.macs + sum(max(cost.macs for cost in options) for options in self.choices.values())


def measure_space(space: nn.Module, image_shape: tuple[int, ...]) -> CostTable:
    """Measure every candidate of every ``LayerChoice`` of an NNI model space.

    Args:
        space: a space of ``LayerChoice``. One that runs several times in a forward pass costs the sum of these, and one
            that runs in training alone no MACs. Input choices cost nothing. It is not touched.
        image_shape: shape of one image, ``(3, R, R)``.

    Raises:
        UserError: if a choice lies inside a candidate of another choice: a path's cost is no sum then.
    """
    from nni.nas.nn.pytorch import LayerChoice

    on_meta = copy.deepcopy(space).to("meta").eval().requires_grad_(False)
    choices = {name: module for name, module in on_meta.named_modules() if isinstance(module, LayerChoice)}
    for outer, choice in choices.items():
        if any(isinstance(inner, LayerChoice) for inner in choice.modules() if inner is not choice):
            raise UserError(
                f"The choice {choice.label!r} ({outer}) holds further choices; costs of nested choices do not add up."
            )

    inputs: dict[str, list[tuple[Any, ...]]] = {name: [] for name in choices}
    handles = [
        choice.register_forward_pre_hook(lambda _module, args, name=name: inputs[name].append(args))
        for name, choice in choices.items()
    ]
    fixed = measure(on_meta, torch.empty(1, *image_shape, device="meta"))
    for handle in handles:
        handle.remove()

    table: dict[str, tuple[Cost, ...]] = {}
    for name, choice in choices.items():
        options = tuple(
            Cost(sum(measure(candidate, *args).macs for args in inputs[name]), _parameters(candidate))
            for candidate in choice
        )
        # The dry run went through the default candidate, while all candidates' parameters were counted.
        executed = options[choice.names.index(choice._dry_run_choice)]
        fixed = fixed - Cost(executed.macs, sum(option.params for option in options))
        previous = table.get(choice.label)
        table[choice.label] = (
            options if previous is None else tuple(a + b for a, b in zip(previous, options, strict=True))
        )
    return CostTable(fixed, table)


def ptflops_macs(module: nn.Module, *inputs: Tensor) -> int:
    """Count MACs as ptflops 0.6 did for the published Cream networks, to compare with the paper's names.

    It adds to the MACs of convolutions their biases, two per element of a batch norm, one per input element of an
    average pool and one per output element of a ReLU, and counts no SiLU, gate, or residual addition. A linear layer
    counts without its bias.
    """
    total = 0

    def count(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        if isinstance(layer, nn.Conv2d):
            per_output = layer.weight[0].numel()
            total += output[0].numel() * per_output + (output[0].numel() if layer.bias is not None else 0)
        elif isinstance(layer, nn.Linear):
            total += layer.weight.numel()
        elif isinstance(layer, nn.modules.batchnorm._BatchNorm):
            total += 2 * output[0].numel()
        elif isinstance(layer, nn.ReLU):
            total += output[0].numel()
        elif isinstance(layer, nn.AdaptiveAvgPool2d | SqueezeExcite):
            # timm's squeeze averages without a pooling module of its own.
            total += args[0][0].numel()

    with _forward_hooks(module, count), torch.no_grad(), _ShapesAlone():
        module(*inputs)
    return total


@contextmanager
def _forward_hooks(module: nn.Module, hook: Any) -> Iterator[None]:
    handles = [layer.register_forward_hook(hook) for layer in module.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
