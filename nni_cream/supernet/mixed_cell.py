"""DARTS cells as supernet modules, and the discrete cells that a search leaves.

Source: Liu et al., "DARTS: Differentiable Architecture Search", ICLR 2019, section 2.2, equations 1 and 2.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from nni.nas.oneshot.pytorch.supermodule.base import BaseSuperNetModule
from torch import Tensor, nn

from nni_cream.genotype import (
    CELL_INPUTS,
    SKIP,
    CellKind,
    cell_sample,
    derive_edges,
    edge_label,
    edges_of,
    inputs_label,
)
from nni_cream.supernet.mixed import MixingWeights, weighted_sum


class DiscreteCell(nn.Module):
    """A cell in which every node is the sum of two operations, each of one earlier state.

    Args:
        preprocess0: brings the output of the cell before last to the cell's channels.
        preprocess1: likewise the output of the last cell.
        states: for every edge, two a node, the state that it comes from.
        operations: for every edge, what is done to it.
        concat: number of nodes, the last ones, whose concatenation is the output.
    """

    def __init__(
        self,
        preprocess0: nn.Module,
        preprocess1: nn.Module,
        states: Sequence[int],
        operations: Sequence[nn.Module],
        concat: int,
    ) -> None:
        super().__init__()
        self.preprocess0 = preprocess0
        self.preprocess1 = preprocess1
        self.edges = nn.ModuleList(operations)
        self.states = tuple(states)
        self.concat = concat

    def forward(self, before_last: Tensor, last: Tensor) -> Tensor:
        """Map the outputs of the two cells before, [N, C₀, H₀, W₀] and [N, C₁, H, W], to the cell's own."""
        states = [self.preprocess0(before_last), self.preprocess1(last)]
        edges = list(zip(self.edges, self.states, strict=True))
        for (first, i), (second, j) in zip(edges[::2], edges[1::2], strict=True):
            states.append(first(states[i]) + second(states[j]))
        return torch.cat(states[-self.concat :], dim=1)


def discrete_cell(cell: Any, sample: Mapping[str, Any]) -> DiscreteCell:
    """Return the discrete cell that ``sample`` describes, made of the very modules of ``cell``.

    Args:
        cell: a :class:`MixedCell` or a :class:`search_spaces.darts.DartsCell`.
        sample: an NNI sample of the space.
    """
    rows = {edge: row for row, edge in enumerate(edges_of(cell.nodes))}
    nodes = range(CELL_INPUTS, CELL_INPUTS + cell.nodes)
    kept = [(node, state) for node in nodes for state in sample[inputs_label(cell.kind, node)]]
    operations = [cell.edges[rows[edge]][sample[edge_label(cell.kind, *edge)]] for edge in kept]
    return DiscreteCell(cell.preprocess0, cell.preprocess1, [state for _, state in kept], operations, cell.concat)


class MixedCell(BaseSuperNetModule):
    """A DARTS cell in the paper's relaxation: a node is the sum, over all earlier states, of all operations mixed.

    This is the textbook execution, one operation of one edge after another. Which two edges a node keeps is no choice
    of its own here: they follow from α by the published rule when the cell is exported.

    Args:
        cell: the :class:`search_spaces.darts.DartsCell` that is relaxed; the module takes its parts over.
        weights: gives the mixing weights, [edges, operations].
        skip_limit: as of :func:`nni_cream.genotype.derive_edges`.
    """

    def __init__(self, cell: Any, weights: MixingWeights, skip_limit: int | None) -> None:
        super().__init__()
        self.kind: CellKind = cell.kind
        self.operations: tuple[str, ...] = cell.operations
        self.concat: int = cell.concat
        self.nodes: int = len(cell.inputs)
        self.preprocess0 = cell.preprocess0
        self.preprocess1 = cell.preprocess1
        self.edges: Any = nn.ModuleList(
            nn.ModuleDict(dict(zip(self.operations, edge, strict=True))) for edge in cell.edges
        )
        self._weights = weights
        self._skip_limit = skip_limit
        for choice in (*cell.edges, *cell.inputs):
            self.add_mutable(choice.choice)

    def forward(self, before_last: Tensor, last: Tensor) -> Tensor:
        """Map the outputs of the two cells before, [N, C₀, H₀, W₀] and [N, C₁, H, W], to the cell's own."""
        states = [self.preprocess0(before_last), self.preprocess1(last)]
        edges = zip(self.edges, self._weights(), strict=True)
        for _ in range(self.nodes):
            # A node takes as many edges from the iterator as there are states so far.
            mixed = [
                weighted_sum(weights, (operation(state) for operation in edge.values()))
                for state, (edge, weights) in zip(states, edges, strict=False)
            ]
            states.append(functools.reduce(torch.add, mixed))
        return torch.cat(states[-self.concat :], dim=1)

    def freeze(self, sample: dict[str, Any]) -> nn.Module:
        """Return the discrete cell of ``sample``, with the weights that it has here."""
        self.validate(sample)
        return discrete_cell(self, sample)

    def resample(self, memo: dict[str, Any]) -> dict[str, Any]:
        """Do nothing: all operations are always active."""
        return {}

    def export(self, memo: dict[str, Any]) -> dict[str, Any]:
        """Return the edges and operations that the published rule keeps."""
        if inputs_label(self.kind, CELL_INPUTS) in memo:
            return {}
        kept = derive_edges(self._current_weights(), self.operations, self._skip_limit)
        return cell_sample(self.kind, kept, self.operations)

    def skip_connections(self) -> int:
        """Count the skip connections that the published rule keeps, whatever ``skip_limit`` is."""
        kept = derive_edges(self._current_weights(), self.operations)
        return sum(operation == SKIP for operation, _ in kept)

    def _current_weights(self) -> Any:
        return self._weights().detach().float().cpu().numpy()

    def export_probs(self, memo: dict[str, Any]) -> dict[str, Any]:
        """Return the mixing weight of every operation on every edge."""
        labels = [edge_label(self.kind, node, state) for node, state in edges_of(self.nodes)]
        rows = self._weights().tolist()
        return {
            label: dict(zip(self.operations, row, strict=True))
            for label, row in zip(labels, rows, strict=True)
            if label not in memo
        }
