"""The Cream supernet as an NNI model space: a ``LayerChoice`` of operations for every block.

Source: Peng et al., "Cream of the Crop", NeurIPS 2020. Depth and resolution follow from a FLOPs interval as in the
published code; the FLOPs of that rule are those of ptflops 0.6 (:func:`nni_cream.cost.ptflops_macs`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import nni.nas.nn.pytorch as nas
import torch
from timm.models._efficientnet_blocks import InvertedResidual
from timm.models._efficientnet_builder import efficientnet_init_weights
from torch import Tensor, nn

from nni_cream.architecture import CreamPath, block_label
from nni_cream.cost import ptflops_macs
from nni_cream.errors import UserError
from nni_cream.models.cream import (
    CHOICES,
    DIL_CONVS,
    RESIDUAL_UNITS,
    STAGES,
    STEM_CHANNELS,
    Choice,
    ResidualUnitKind,
    build_child,
    known_operations,
    own_operations,
)

PAPER_RESOLUTION: Final = 224
RESOLUTION_STEP: Final = 32

# Stages (counted from 0 among the choice stages) in the order in which they are given further blocks, and the depth
# each may reach in the first and in the second round.
_DEPTH_ORDER: Final = (2, 3, 4, 1, 0)
_DEPTH_LIMITS: Final = ((3, 3, 3, 2, 2), (4, 4, 4, 4, 4))
SHALLOWEST: Final = (1,) * len(STAGES)
DEEPEST: Final = _DEPTH_LIMITS[-1]
# The published rule goes down to 32 pixels, but never accepts a network there.
_FEWEST_STEPS: Final = 2


@dataclass(frozen=True)
class SpacePlan:
    """How deep the choice stages are, and the resolution (pixels) that the budget is meant for."""

    depths: tuple[int, ...]
    resolution: int


@dataclass(frozen=True)
class StageCost:
    """Million MACs (ptflops convention) of every choice in the first block of a stage, and in each further block."""

    first: tuple[float, ...]
    further: tuple[float, ...]


@dataclass(frozen=True)
class BlockShape:
    """Where a block stands: channels before and after it, its stride, height and width (pixels) of what it is given."""

    in_channels: int
    out_channels: int
    stride: int
    size: int


def block_shapes(resolution: int) -> list[tuple[BlockShape, BlockShape]]:
    """Return, of every choice stage, where its first block stands, and where each further one does."""
    shapes = []
    size = -(-resolution // 2)
    in_channels = STEM_CHANNELS
    for stage in STAGES:
        first = BlockShape(in_channels, stage.channels, stage.stride, size)
        size = -(-size // stage.stride)
        in_channels = stage.channels
        shapes.append((first, BlockShape(in_channels, in_channels, 1, size)))
    return shapes


@lru_cache
def stage_costs(resolution: int) -> tuple[StageCost, ...]:
    """Count the choices of every stage at ``resolution`` pixels.

    At 224 pixels these are the numbers of the published table.
    """
    return tuple(
        StageCost(*(tuple(_million_macs(choice, shape) for choice in CHOICES) for shape in shapes))
        for shapes in block_shapes(resolution)
    )


def _million_macs(choice: Choice, shape: BlockShape) -> float:
    with torch.device("meta"):
        block = choice.build(shape.in_channels, shape.out_channels, shape.stride).eval()
        return ptflops_macs(block, torch.empty(1, shape.in_channels, shape.size, shape.size)) / 1e6


def plan_space(minimum: float, maximum: float, resolution: int | None = None) -> SpacePlan:
    """Choose depth and resolution for a FLOPs interval, as the published code does.

    The rule counts the blocks that are searched, not the network around them.

    Args:
        minimum: lower end of the interval, million MACs.
        maximum: upper end of the interval, million MACs.
        resolution: pixels, if the user fixes it; the rule then goes as near to the interval as it can. Otherwise it
            starts at 224 and falls in steps of 32, down to 64, while even the smallest network exceeds the maximum;
            each step also stretches the interval by 7 over the new number of steps, as in the published code.

    Raises:
        UserError: if ``minimum > maximum``; or, where the resolution is not fixed, if no network lies in the interval.
    """
    if minimum > maximum:
        raise UserError(
            f"The FLOPs interval [{minimum:g} M, {maximum:g} M] is empty: its minimum is above its maximum."
        )
    costs = stage_costs(resolution or PAPER_RESOLUTION)
    smallest = sum(stage.first[0] for stage in costs)
    largest = sum(stage.first[-1] for stage in costs)
    bound = largest + sum((_DEPTH_LIMITS[-1][s] - 1) * stage.further[-1] for s, stage in enumerate(costs))

    steps = PAPER_RESOLUTION // RESOLUTION_STEP
    low, high, stretch = minimum, maximum, 1.0
    while resolution is None and smallest > high and steps > _FEWEST_STEPS:
        steps -= 1
        stretch *= (PAPER_RESOLUTION // RESOLUTION_STEP) / steps
        low, high = minimum * stretch, maximum * stretch

    depths = [1] * len(STAGES)
    for limits in _DEPTH_LIMITS:
        for s, limit in zip(_DEPTH_ORDER, limits, strict=True):
            while depths[s] < limit and (largest < low or largest + costs[s].further[-1] <= high):
                depths[s] += 1
                largest += costs[s].further[-1]
    if resolution is None and (smallest > high or largest < low):
        least = smallest / math.prod(
            PAPER_RESOLUTION / RESOLUTION_STEP / fewer
            for fewer in range(_FEWEST_STEPS, PAPER_RESOLUTION // RESOLUTION_STEP)
        )
        raise UserError(
            f"No network fits the FLOPs interval [{minimum:g} M, {maximum:g} M]: a maximum of at least {least:.3g} M "
            f"and a minimum of at most {bound:.3g} M are possible."
        )
    return SpacePlan(tuple(depths), resolution or steps * RESOLUTION_STEP)


@torch.no_grad()
def align(candidates: Sequence[InvertedResidual]) -> None:
    """Let the inverted residuals of one block, in the order of :data:`CHOICES`, start as nearly the same function.

    A narrower candidate gets the first channels of the widest, and a larger kernel has the 3×3 one in its middle and
    zeros around it (which learn like any other weight). The weights come from the wide 3×3 and are copies: nothing is
    shared afterwards.
    """
    wide = candidates[CHOICES.index(Choice(3, 6))]
    source = {name: parameter.clone() for name, parameter in wide.named_parameters()}
    for choice, candidate in zip(CHOICES, candidates, strict=True):
        margin = (choice.kernel - 3) // 2
        for name, parameter in candidate.named_parameters():
            target: Tensor = parameter
            if name == "conv_dw.weight":
                parameter.zero_()
                target = parameter[:, :, margin : margin + 3, margin : margin + 3]
            target.copy_(source[name][tuple(slice(size) for size in target.shape)])


class CreamSpace(nas.ModelSpace):
    """The Cream supernet, [N, 3, R, R] to logits [N, num_classes].

    Args:
        depths: number of blocks of each of the five choice stages, from :func:`plan_space`.
        num_classes: number of classes.
        dil_conv: offer the two dilated convolutions of :data:`nni_cream.models.cream.DIL_CONVS` as well.
        resunit: kinds of residual units to offer as well, of :data:`nni_cream.models.cream.RESIDUAL_UNITS`.
        operations: names of operations of your own to offer as well, after the others, in this order; see
            :func:`nni_cream.models.cream.register_block_operation`.
        skip: offer, as the last candidate of every block but the first of a stage, to leave the block out, so that the
            depth is searched too.
        aligned: let the inverted residuals of a block start as (nearly) the same function, see :func:`align`. Without
            it a supernet needs several times the steps before random paths do better than chance; the published one
            starts without.

    Every block of stage s (counted from 1) is a choice labelled ``stage<s>_block<b>``; the first and the last stage are
    choices between one candidate each, so that samples, published paths, and state-dict keys
    (``blocks.<s>.<b>.<choice>.…``) have one form. Stem and head are those of the child networks, so
    ``space.freeze(sample)`` has the state-dict keys of ``build_child(space.architecture(sample))``.

    Raises:
        UserError: if the depths are not five numbers of at least 1, or there is no operation of such a name.
    """

    def __init__(
        self,
        depths: Sequence[int],
        num_classes: int,
        *,
        dil_conv: bool = False,
        resunit: Sequence[ResidualUnitKind] = (),
        operations: Sequence[str] = (),
        skip: bool = False,
        aligned: bool = False,
    ) -> None:
        super().__init__()
        if len(depths) != len(STAGES) or any(depth < 1 for depth in depths):
            raise UserError(f"The Cream supernet needs {len(STAGES)} depths of at least 1, not {list(depths)}.")
        self.num_classes = num_classes
        self.depths = tuple(depths)
        self.skip = skip
        self.offered = (
            *CHOICES,
            *(DIL_CONVS if dil_conv else ()),
            *(unit for unit in RESIDUAL_UNITS if unit.kind in resunit),
            *own_operations(operations),
        )
        number_of = {operation: number for number, operation in known_operations().items()}
        self._numbers = [number_of[operation] for operation in self.offered]
        # Stem, first and last stage, and head come from a child network; what lies between is replaced.
        template: Any = build_child(CreamPath(((0,),) * (len(STAGES) + 2)), num_classes=num_classes)
        self.conv_stem = template.conv_stem
        self.bn1 = template.bn1

        stages = [self._choose(0, [[template.blocks[0][0]]])]
        in_channels = STEM_CHANNELS
        inverted_residuals: list[list[Any]] = []
        for number, (stage, depth) in enumerate(zip(STAGES, depths, strict=True), start=1):
            blocks: list[list[nn.Module]] = []
            for block in range(depth):
                source, stride = (in_channels, stage.stride) if block == 0 else (stage.channels, 1)
                candidates: list[nn.Module] = [o.build(source, stage.channels, stride) for o in self.offered]
                inverted_residuals.append(candidates[: len(CHOICES)])
                if skip and block > 0:
                    candidates.append(nn.Identity())
                blocks.append(candidates)
            stages.append(self._choose(number, blocks))
            in_channels = stage.channels
        stages.append(self._choose(len(STAGES) + 1, [[template.blocks[-1][0]]]))
        self.blocks = nn.Sequential(*stages)

        self.global_pool = template.global_pool
        self.conv_head = template.conv_head
        self.act2 = template.act2
        self.classifier = template.classifier
        efficientnet_init_weights(self)
        if aligned:
            for block_candidates in inverted_residuals:
                align(block_candidates)

    @staticmethod
    def _choose(stage: int, blocks: Sequence[Sequence[nn.Module]]) -> nn.Sequential:
        return nn.Sequential(
            *(nas.LayerChoice(list(candidates), label=block_label(stage, b)) for b, candidates in enumerate(blocks))
        )

    def forward(self, images: Tensor) -> Tensor:
        """Run the supernet, or the network that it was frozen to."""
        features = self.blocks(self.bn1(self.conv_stem(images)))
        pooled = self.act2(self.conv_head(self.global_pool(features)))
        logits: Tensor = self.classifier(pooled.flatten(1))
        return logits

    def freeze(self, sample: dict[str, Any]) -> nn.Module:
        """Return the network of ``sample`` with the supernet's weights, without the blocks that it leaves out."""
        frozen: Any = super().freeze(sample)
        frozen.blocks = nn.Sequential(
            *(nn.Sequential(*(b for b in stage if not isinstance(b, nn.Identity))) for stage in frozen.blocks)
        )
        network: nn.Module = frozen
        return network

    def prior(self, probabilities: Sequence[float]) -> dict[str, tuple[float, ...]]:
        """Give every choice the prior of its candidates, as :class:`nni_cream.strategies.CreamStrategy` takes it.

        Args:
            probabilities: of the operations on offer and, if ``skip`` is on, of leaving the block out. The first block
                of a stage cannot be left out and takes those of the operations.

        Raises:
            UserError: if there are more or fewer of them than there are candidates.
        """
        if len(probabilities) != len(self.offered) + self.skip:
            raise UserError(
                f"The prior has {len(probabilities)} probabilities, but the blocks of this space have "
                f"{len(self.offered) + self.skip} candidates{', the last of which leaves the block out' * self.skip}."
            )
        return {
            block_label(stage, block): tuple(probabilities[: len(self.offered) + (self.skip and block > 0)])
            for stage, depth in enumerate(self.depths, start=1)
            for block in range(depth)
        }

    @property
    def operations(self) -> tuple[int, ...]:
        """The numbers of the operations on offer, as a path has them."""
        return tuple(self._numbers)

    def architecture(self, sample: dict[str, Any]) -> CreamPath:
        """Return the architecture that ``sample`` stands for: operations by their numbers, skipped blocks left out."""
        numbers = self.operations
        first, *stages, last = CreamPath.from_sample(sample).stages
        chosen = (tuple(numbers[i] for i in stage if i < len(numbers)) for stage in stages)
        return CreamPath((first, *chosen, last))
