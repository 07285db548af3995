"""The networks that DARTS trains once it has found its cells.

Source: Liu et al., "DARTS: Differentiable Architecture Search", ICLR 2019, section 3 and appendix A, and its published
code, whose names of weights are kept: published checkpoints load as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple, get_args

import torch
from timm.layers.classifier import create_classifier
from timm.layers.drop import DropPath
from timm.layers.helpers import get_device_dtype
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from nni_cream.errors import UserError
from nni_cream.genotype import CELL_INPUTS, KEPT_EDGES, NONE, CellKind, Genotype
from nni_cream.models.darts_operations import (
    PAPER_OPERATIONS,
    FactorizedReduce,
    ReLUConvBN,
    build_operation,
    build_searched,
)

Stem = Literal["cifar", "imagenet"]

_AUXILIARY: Final = "auxiliary_head."


class DartsOutput(NamedTuple):
    """What a network with an auxiliary head returns in training: both logits, [N, classes] each."""

    logits: Tensor
    auxiliary: Tensor


class Cell(nn.Module):
    """A cell: the outputs of the cell before last and of the last cell to the concatenation of its nodes.

    A reduction cell halves height and width: the edges that start at one of its inputs have stride 2. In training every
    edge is dropped with the probability ``drop_path.drop_prob``, 0 at first, for each sample, and divided by the
    probability of keeping it otherwise; an identity is never dropped.

    Args:
        genotype: names the operations.
        kind: which of the genotype's two cells.
        before_channels: channels of the output of the cell before last.
        last_channels: channels of the output of the last cell.
        channels: channels of every node, C.
        after_reduction: whether the last cell was a reduction, so that the one before is twice as large.
        searched: whether it is a cell as the search leaves it: no batch norm scales or shifts, every pool is followed
            by one, and the weights have the names that they have in :class:`search_spaces.darts.DartsSpace`.

    Raises:
        UserError: if the genotype names an operation that does not exist, or a reduction is asked for an odd number of
            channels.
    """

    def __init__(
        self,
        genotype: Genotype,
        kind: CellKind,
        before_channels: int,
        last_channels: int,
        channels: int,
        *,
        after_reduction: bool,
        searched: bool = False,
    ) -> None:
        super().__init__()
        edges = genotype.edges(kind)
        self.inputs = [state for _, state in edges]
        self.concat = genotype.concat(kind)
        self.out_channels = channels * len(self.concat)
        adapt = FactorizedReduce if after_reduction else ReLUConvBN
        self.preprocess0 = adapt(before_channels, channels, affine=not searched)
        self.preprocess1 = ReLUConvBN(last_channels, channels, affine=not searched)
        operations = nn.ModuleList()
        for name, state in edges:
            stride = 2 if kind == "reduce" and state < CELL_INPUTS else 1
            operations.append(
                build_searched(name, channels, stride)
                if searched
                else build_operation(name, channels, stride, affine=True)
            )
        self._operations_name = "edges" if searched else "_ops"
        self.add_module(self._operations_name, operations)
        self.drop_path = DropPath()

    def forward(self, before: Tensor, last: Tensor) -> Tensor:
        """Map [N, before_channels, …] and [N, last_channels, H, W] to [N, out_channels, H / stride, W / stride]."""
        states = [self.preprocess0(before), self.preprocess1(last)]
        for first in range(0, len(self.inputs), KEPT_EDGES):
            states.append(self._edge(first, states) + self._edge(first + 1, states))
        return torch.cat([states[state] for state in self.concat], dim=1)

    def _edge(self, edge: int, states: list[Tensor]) -> Tensor:
        operation = getattr(self, self._operations_name)[edge]
        features: Tensor = operation(states[self.inputs[edge]])
        if isinstance(operation, nn.Identity):
            return features
        dropped: Tensor = self.drop_path(features)
        return dropped


class AuxiliaryHead(nn.Module):
    """The second classifier, which sees the features after two thirds of the network and helps in training only.

    ReLU, average pool 5×5, 1×1 convolution to 128 channels, batch norm, ReLU, 2×2 convolution to 768, batch norm (in
    the published ImageNet networks there is none), ReLU, linear. The 2×2 convolution has to cover all that the pool
    leaves, which fixes the resolution: features of 8 to 10 pixels with the stride 3 of CIFAR, 7 or 8 with ImageNet's 2.

    Args:
        in_channels: channels of the features.
        num_classes: number of classes; 0 for the 768 features before the linear layer.
        stem: of which network it is a part.
    """

    def __init__(self, in_channels: int, num_classes: int, stem: Stem) -> None:
        super().__init__()
        stride = 3 if stem == "cifar" else 2
        # Sizes of features that the pool makes 2 × 2, and how much larger the image is.
        self.sizes = range(5 + stride, 5 + 2 * stride)
        self.reduction = 4 if stem == "cifar" else 32
        self.features = nn.Sequential(
            nn.ReLU(),
            nn.AvgPool2d(5, stride),
            nn.Conv2d(in_channels, 128, 1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.Conv2d(128, 768, 2, bias=False),
            *([nn.BatchNorm2d(768)] if stem == "cifar" else []),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.classifier: nn.Module
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """Give the head a new linear layer for ``num_classes`` classes; 0 for none."""
        factory = get_device_dtype(self)
        self.classifier = nn.Linear(768, num_classes, **factory) if num_classes > 0 else nn.Identity()
        self.classifier.train(self.training)

    def forward(self, features: Tensor) -> Tensor:
        """Map [N, in_channels, H, W] to logits [N, num_classes].

        Raises:
            UserError: if H or W is a size that the head is not made for.
        """
        height, width = features.shape[-2:]
        if height not in self.sizes or width not in self.sizes:
            right = " or ".join(str(size * self.reduction) for size in self.sizes)
            raise UserError(
                f"The auxiliary head needs features of {self.sizes[0]} to {self.sizes[-1]} pixels, not "
                f"{height} × {width}; train with images of {right} pixels, or without the head (auxiliary=False)."
            )
        logits: Tensor = self.classifier(self.features(features))
        return logits


class DartsNetwork(nn.Module):
    """A stack of cells, in which those at one and two thirds of the depth halve the resolution and double the channels.

    [N, in_chans, R, R] to logits [N, num_classes]; in training with an auxiliary head, to a :class:`DartsOutput`. The
    CIFAR network reduces the resolution by 4, so R is a multiple of 4; the ImageNet network by 32, so R is a multiple
    of 32.

    Args:
        genotype: the two cells.
        channels: channels of the nodes of the first cell, C.
        cells: number of cells, at least 3.
        stem: ``cifar`` is one convolution at full resolution; ``imagenet`` are three that halve it each, and a first
            cell that treats the smaller two as the output of a reduction.
        num_classes: number of classes; 0 for pooled features in place of logits.
        in_chans: channels of the images.
        global_pool: timm's name of the pooling before the classifier; empty for none.
        auxiliary: whether there is an auxiliary head, behind the second reduction cell.
        drop_rate: probability of dropping a feature before the classifier (dropout).
        drop_path_rate: probability of dropping an edge for a sample, the same in all cells; see :class:`Cell`.
        searched: whether the cells are as a search leaves them; see :class:`Cell`.
        device: where the weights are put.
        dtype: type of the weights.

    Raises:
        UserError: if there is no such stem or operation, there are too few cells, the channels are not positive or, in
            the ImageNet network, odd, or ``drop_path_rate`` is not a probability below 1.
    """

    stem: nn.Sequential | None
    stem0: nn.Sequential
    stem1: nn.Sequential | None

    def __init__(
        self,
        genotype: Genotype,
        *,
        channels: int,
        cells: int,
        stem: Stem,
        num_classes: int,
        in_chans: int = 3,
        global_pool: str = "avg",
        auxiliary: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        searched: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if stem not in get_args(Stem):
            raise UserError(f"There is no DARTS stem {stem!r}; there are {' and '.join(get_args(Stem))}.")
        if cells < 3:
            raise UserError(f"A DARTS network has at least 3 cells, two of them reductions, not {cells}.")
        if channels < 1 or (stem == "imagenet" and channels % 2):
            parity = ", and even for ImageNet, whose stem begins with half of them" if stem == "imagenet" else ""
            raise UserError(f"The channels of a DARTS network are a positive number{parity}, not {channels}.")
        self.num_classes = num_classes
        self.in_chans = in_chans

        if stem == "cifar":
            stem_channels = 3 * channels
            self.stem = nn.Sequential(
                nn.Conv2d(in_chans, stem_channels, 3, padding=1, bias=False), nn.BatchNorm2d(stem_channels)
            )
        else:
            stem_channels = channels
            self.stem = None
            self.stem0 = nn.Sequential(
                nn.Conv2d(in_chans, channels // 2, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(channels // 2),
                nn.ReLU(),
                nn.Conv2d(channels // 2, channels, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(channels),
            )
            self.stem1 = nn.Sequential(
                nn.ReLU(),
                nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(channels),
            )

        reductions = (cells // 3, 2 * cells // 3)
        stack: list[Cell] = []
        before_channels = last_channels = stem_channels
        after_reduction = stem == "imagenet"
        for index in range(cells):
            kind: CellKind = "reduce" if index in reductions else "normal"
            if kind == "reduce":
                channels *= 2
            cell = Cell(
                genotype,
                kind,
                before_channels,
                last_channels,
                channels,
                after_reduction=after_reduction,
                searched=searched,
            )
            stack.append(cell)
            before_channels, last_channels = last_channels, cell.out_channels
            after_reduction = kind == "reduce"
        self.cells = nn.ModuleList(stack)
        self.set_drop_path_rate(drop_path_rate)

        self._auxiliary_input = f"cells.{reductions[1]}"
        self.auxiliary_head: AuxiliaryHead | None = None
        if auxiliary:
            self.auxiliary_head = AuxiliaryHead(stack[reductions[1]].out_channels, num_classes, stem)
        self.num_features = last_channels
        self.global_pool, self.head_drop, self.classifier = create_classifier(
            self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate
        )
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

        # The last features of every resolution, in timm's form.
        ends = (reductions[0] - 1, reductions[1] - 1, cells - 1)
        taps = [(f"cells.{end}", stack[end].out_channels) for end in ends]
        if stem == "imagenet":
            taps = [("stem0.2", stem_channels // 2), ("stem0.4", stem_channels), *taps]
        largest = 1 if stem == "cifar" else 2
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": width, "reduction": largest * 2**level, "module": name}
            for level, (name, width) in enumerate(taps)
        ]
        self.to(device=device, dtype=dtype)

    def set_drop_path_rate(self, rate: float) -> None:
        """Set the probability of dropping an edge in all cells; in the published training it rises with every epoch.

        Raises:
            UserError: if it is not a probability below 1.
        """
        if not 0.0 <= rate < 1.0:
            raise UserError(f"The drop-path rate is a probability from 0 to below 1, not {rate}.")
        for module in self.modules():
            if isinstance(module, DropPath):
                module.drop_prob = rate

    def _states(self, images: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and output of one module after the other, from the stem to the last cell."""
        if self.stem is not None:
            before = last = self.stem(images)
            yield "stem", last
        else:
            before = images
            for position, layer in enumerate(self.stem0):
                before = layer(before)
                yield f"stem0.{position}", before
            if self.stem1 is None:
                return
            last = self.stem1(before)
            yield "stem1", last
        for index, cell in enumerate(self.cells):
            before, last = last, cell(before, last)
            yield f"cells.{index}", last

    def forward(self, images: Tensor) -> Tensor | DartsOutput:
        """Map images [N, in_chans, R, R] to logits [N, num_classes], in training with those of the auxiliary head.

        Raises:
            UserError: if the height or width cannot be halved at a reduction, or does not fit the auxiliary head.
        """
        if self.auxiliary_head is None or not self.training:
            return self.forward_head(self.forward_features(images))
        for name, features in self._states(images):
            if name == self._auxiliary_input:
                auxiliary = self.auxiliary_head(features)
        return DartsOutput(self.forward_head(features), auxiliary)

    def forward_features(self, images: Tensor) -> Tensor:
        """Map images to the output of the last cell, [N, num_features, R / reduction, R / reduction]."""
        for _, state in self._states(images):
            features = state
        return features

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Map the features of the last cell to logits, or, with ``pre_logits``, to what the classifier is given."""
        pooled: Tensor = self.head_drop(self.global_pool(features))
        if pre_logits:
            return pooled
        logits: Tensor = self.classifier(pooled)
        return logits

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the last features of several resolutions, as timm's other networks do.

        Args:
            images: [N, in_chans, R, R].
            indices: positions in ``feature_info``; a number for so many of the last, None for all.
            norm: part of timm's interface; there is no norm to apply.
            stop_early: compute no more than what is asked for.
            output_fmt: ``NCHW``.
            intermediates_only: leave out the features of the last module that ran.

        Raises:
            UserError: if another output format is asked for.
        """
        if output_fmt != "NCHW":
            raise UserError(f"Features of a DARTS network have the format NCHW, not {output_fmt}.")
        taken, last = feature_take_indices(len(self.feature_info), indices)
        names = {self.feature_info[index]["module"] for index in taken}
        intermediates = []
        for name, features in self._states(images):
            if name in names:
                intermediates.append(features)
            if stop_early and name == self.feature_info[last]["module"]:
                break
        return intermediates if intermediates_only else (features, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what :meth:`forward_intermediates` does not need for ``indices``, and return them from the start.

        Args:
            indices: as there.
            prune_norm: part of timm's interface; there is no norm to remove.
            prune_head: whether to remove the heads even if all cells stay.
        """
        taken, last = feature_take_indices(len(self.feature_info), indices)
        part, position = self.feature_info[last]["module"].split(".")
        end = int(position) + 1
        if part == "stem0":
            self.stem0, self.stem1, self.cells = nn.Sequential(*list(self.stem0)[:end]), None, nn.ModuleList()
        else:
            self.cells = nn.ModuleList(list(self.cells)[:end])
        self.num_features = self.feature_info[last]["num_chs"]
        if prune_head or last < len(self.feature_info) - 1:
            self.auxiliary_head = None
            self.reset_classifier(0, "")
        return list(taken)

    def get_classifier(self) -> nn.Module:
        """Return the classifier, a linear layer or an identity."""
        classifier: nn.Module = self.classifier
        return classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, and that of the auxiliary head, by new ones.

        Args:
            num_classes: number of classes; 0 for no classifier.
            global_pool: timm's name of the pooling; None to keep it, empty for none.
        """
        self.num_classes = num_classes
        self.global_pool, self.classifier = create_classifier(
            self.num_features,
            num_classes,
            pool_type=self.global_pool.pool_type if global_pool is None else global_pool,
            **get_device_dtype(self),
        )
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        if self.auxiliary_head is not None:
            self.auxiliary_head.reset_classifier(num_classes)
        self.classifier.train(self.training)
        self.global_pool.train(self.training)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Return the patterns by which timm groups weights by depth: the stem, every cell, and the heads."""
        return {"stem": r"^stem", "blocks": r"^cells\.(\d+)"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Refuse: computing a cell twice would move the running statistics of its batch norms twice.

        Raises:
            UserError: if it is to be enabled.
        """
        if enable:
            raise UserError("DARTS networks have no gradient checkpointing; train with smaller batches instead.")


def build_darts(genotype: Genotype, *, num_classes: int, **arguments: Any) -> DartsNetwork:
    """Build the network of a searched genotype: [N, 3, R, R] to logits [N, num_classes].

    Args:
        genotype: the two cells.
        num_classes: number of classes.
        arguments: further ones of :class:`DartsNetwork`.

    Raises:
        UserError: as :class:`DartsNetwork`.
    """
    return DartsNetwork(genotype, num_classes=num_classes, **arguments)


def searched_size(
    genotype: Genotype,
    *,
    channels: int = 16,
    cells: int = 8,
    nodes: int = 4,
    concat: int | None = None,
    operations: Sequence[str] = PAPER_OPERATIONS,
) -> dict[str, Any]:
    """Return the arguments with which :class:`DartsNetwork` is what a search has left of its space.

    Args:
        genotype: what the search has found.
        channels: as of :class:`search_spaces.darts.DartsSpace`, and so are the others.
        cells: likewise.
        nodes: likewise.
        concat: likewise.
        operations: likewise.

    Raises:
        UserError: if there is no such space, or the genotype is not one of it.
    """
    check_space(channels, cells, nodes, concat, operations)
    # It knows what a space cannot say.
    genotype.to_sample(operations)
    return {"channels": channels, "cells": cells, "stem": "cifar", "searched": True}


def check_space(channels: int, cells: int, nodes: int, concat: int | None, operations: Sequence[str]) -> None:
    """Make sure that there is a :class:`search_spaces.darts.DartsSpace` of these arguments.

    Raises:
        UserError: if there is none.
    """
    if channels < 2 or channels % 2:
        raise UserError(f"A DARTS space has an even number of channels, at least 2, not {channels}.")
    if cells < 3:
        raise UserError(f"A DARTS space needs at least 3 cells, two of them reductions, not {cells}.")
    if nodes < 1:
        raise UserError(f"A DARTS cell needs at least 1 node, not {nodes}.")
    if concat is not None and not 1 <= concat <= nodes:
        raise UserError(f"The output of a DARTS cell is made of 1 to {nodes} of its nodes, not of {concat}.")
    if len(set(operations)) != len(operations):
        raise UserError(f"The operations of a DARTS space are {', '.join(operations)}; name each once.")
    if not set(operations) - {NONE}:
        raise UserError("A DARTS space needs at least one operation other than none.")


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Leave out the auxiliary head's entries that ``model`` has no place of that shape for.

    Published files contain the head, and networks that are only tested have none; a network for other classes has
    another one.
    """
    own = model.state_dict()
    return {
        name: tensor
        for name, tensor in state_dict.items()
        if not name.startswith(_AUXILIARY) or (name in own and own[name].shape == tensor.shape)
    }
