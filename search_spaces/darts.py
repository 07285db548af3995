"""The DARTS search space as an NNI model space: an operation for every edge, two edges for every node.

Source: Liu et al., "DARTS: Differentiable Architecture Search", ICLR 2019, section 2.1 and appendix A.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import nni.nas.nn.pytorch as nas
import torch
from nni.nas.nn.pytorch.base import MutableModule
from torch import Tensor, nn

from nni_cream.genotype import CELL_INPUTS, KEPT_EDGES, CellKind, Genotype, edge_label, edges_of, inputs_label
from nni_cream.models.darts import check_space
from nni_cream.models.darts_operations import PAPER_OPERATIONS, FactorizedReduce, ReLUConvBN, build_candidate
from nni_cream.supernet.depthwise import with_explicit_derivatives
from nni_cream.supernet.fused_cell import FusedCell
from nni_cream.supernet.mixed import ALPHAS
from nni_cream.supernet.mixed_cell import DiscreteCell, MixedCell, discrete_cell

STEM_MULTIPLIER: Final = 3


class DartsCell(MutableModule):
    """A cell: every node is the sum of two edges, and every edge one operation on an earlier state.

    Args:
        kind: ``normal``, or ``reduce``, which halves height and width: edges from the cell's inputs have stride 2.
        nodes: number of nodes.
        concat: number of nodes, the last ones, whose concatenation is the output.
        in_channels: channels of the output of the cell before last, and of the last cell.
        channels: channels of every node.
        after_reduction: whether the last cell was a reduction cell, so that the output of the one before is still of
            twice the size.
        operations: names of the operations that every edge offers.
    """

    def __init__(
        self,
        kind: CellKind,
        *,
        nodes: int,
        concat: int,
        in_channels: tuple[int, int],
        channels: int,
        after_reduction: bool,
        operations: Sequence[str],
    ) -> None:
        super().__init__()
        self.kind = kind
        self.nodes = nodes
        self.concat = concat
        self.operations = tuple(operations)
        bring = FactorizedReduce if after_reduction else ReLUConvBN
        self.preprocess0 = with_explicit_derivatives(bring(in_channels[0], channels, affine=False))
        self.preprocess1 = with_explicit_derivatives(ReLUConvBN(in_channels[1], channels, affine=False))
        self.edges = nn.ModuleList()
        for node, state in edges_of(nodes):
            stride = 2 if kind == "reduce" and state < CELL_INPUTS else 1
            candidates: dict[str, Any] = {name: build_candidate(name, channels, stride) for name in operations}
            self.edges.append(nas.LayerChoice(candidates, label=edge_label(kind, node, state)))
        self.inputs = nn.ModuleList(
            nas.InputChoice(node, n_chosen=KEPT_EDGES, reduction="sum", label=inputs_label(kind, node))
            for node in range(CELL_INPUTS, CELL_INPUTS + nodes)
        )

    def forward(self, before_last: Tensor, last: Tensor) -> Tensor:
        """Map the outputs of the two cells before, [N, C₀, H₀, W₀] and [N, C₁, H, W], to the cell's own."""
        states = [self.preprocess0(before_last), self.preprocess1(last)]
        edges = iter(self.edges)
        for choose in self.inputs:
            # A node takes as many edges from the iterator as there are states so far.
            states.append(choose([edge(state) for state, edge in zip(states, edges, strict=False)]))
        return torch.cat(states[-self.concat :], dim=1)

    def freeze(self, sample: dict[str, Any]) -> DiscreteCell:
        """Return the cell of ``sample``, without the edges and operations that it leaves out."""
        self.validate(sample)
        return discrete_cell(self, sample)


class DartsSpace(nas.ModelSpace):
    """The search network of DARTS, [N, 3, R, R] to logits [N, num_classes].

    All normal cells make the same choices, and so do all reduction cells, which stand at a third and at two thirds of
    the depth and double the channels. ``freeze(sample)`` gives the discrete network of this size, with the weights
    that it has here; the larger one that is trained afterwards is :class:`nni_cream.models.darts.DartsNetwork`.

    Args:
        num_classes: number of classes.
        channels: channels C of the first cells, an even number.
        cells: number of cells, at least 3.
        nodes: number of nodes of a cell.
        concat: number of nodes, the last ones, whose concatenation is the output of a cell; None for all.
        operations: names of the operations that every edge offers, in the order of the columns of α; at least one
            other than ``none``.

    Raises:
        UserError: if a number is too small, or there is no such operation.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        channels: int = 16,
        cells: int = 8,
        nodes: int = 4,
        concat: int | None = None,
        operations: Sequence[str] = PAPER_OPERATIONS,
    ) -> None:
        super().__init__()
        check_space(channels, cells, nodes, concat, operations)
        self.operations = tuple(operations)
        self.concat = nodes if concat is None else concat
        width = STEM_MULTIPLIER * channels
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.cells = nn.ModuleList()
        in_channels, after_reduction = (width, width), False
        for position in range(cells):
            reduction = position in (cells // 3, 2 * cells // 3)
            channels *= 1 + reduction
            self.cells.append(
                DartsCell(
                    "reduce" if reduction else "normal",
                    nodes=nodes,
                    concat=self.concat,
                    in_channels=in_channels,
                    channels=channels,
                    after_reduction=after_reduction,
                    operations=operations,
                )
            )
            in_channels, after_reduction = (in_channels[1], self.concat * channels), reduction
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(in_channels[1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Run the search network, or the network that it was frozen to."""
        before_last = last = self.stem(images)
        for cell in self.cells:
            before_last, last = last, cell(before_last, last)
        logits: Tensor = self.classifier(self.global_pool(last).flatten(1))
        return logits

    def genotype(self, sample: dict[str, Any]) -> Genotype:
        """Return the genotype that ``sample`` stands for."""
        return Genotype.from_sample(sample, self.concat)

    def sample(self, genotype: Genotype) -> dict[str, Any]:
        """Return the NNI sample that freezes this space to ``genotype``.

        Raises:
            UserError: if the genotype is not one of this space.
        """
        return genotype.to_sample(self.operations)

    def extra_oneshot_hooks(self, _strategy: Any) -> list[Any]:
        """Let a differentiable search of ours relax whole cells; other strategies of NNI see the choices in them."""
        return [_relax_cell]


def _relax_cell(
    module: nn.Module, _name: str, memo: dict[str, Any], mutate_kwargs: dict[str, Any]
) -> tuple[MixedCell, bool] | None:
    if not isinstance(module, DartsCell) or ALPHAS not in memo:
        return None
    weights = memo[ALPHAS].share(module.kind, len(module.edges), len(module.operations))
    limit = mutate_kwargs.get("skip_limit") if module.kind == "normal" else None
    relaxed = MixedCell if mutate_kwargs.get("execution") == "textbook" else FusedCell
    return relaxed(module, weights, limit), True
