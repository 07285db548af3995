"""The expected cost of the network that α stands for, differentiable in α."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nni_cream.cost import CostTable
from nni_cream.genotype import CELL_INPUTS, KEPT_EDGES, edge_label, edges_of
from nni_cream.supernet.alphas import Alphas
from nni_cream.supernet.mixed import MixedLayer
from nni_cream.supernet.mixed_cell import MixedCell


class ExpectedCost(nn.Module):
    """E[MACs] of a child whose operations are drawn from the mixing weights, and the edges of a node evenly.

    Of the edges to a node of a cell, two are kept: each counts with the probability that it is one of them. Every
    other choice counts as it is.

    Args:
        table: MACs of every candidate, from :func:`nni_cream.cost.measure_space` on the space before it was relaxed.
        supernet: the relaxed space.
        alphas: its α.
    """

    def __init__(self, table: CostTable, supernet: nn.Module, alphas: Alphas) -> None:
        super().__init__()
        rows: dict[str, list[tuple[str, float]]] = {}
        for module in supernet.modules():
            if isinstance(module, MixedCell):
                rows[module.kind] = [
                    (edge_label(module.kind, node, state), KEPT_EDGES / node) for node, state in edges_of(module.nodes)
                ]
            elif isinstance(module, MixedLayer):
                rows[module.label] = [(module.label, 1.0)]
        self._fixed = float(table.fixed.macs)
        self._tables = [position for position, name in enumerate(alphas) if name in rows]
        for position, name in enumerate(alphas):
            if name in rows:
                macs = [[share * cost.macs for cost in table.choices[label]] for label, share in rows[name]]
                self.register_buffer(f"macs{position}", torch.tensor(macs), persistent=False)
        assert CELL_INPUTS == KEPT_EDGES  # so that a node's first two edges are kept with probability 1

    def forward(self, alphas: Sequence[Tensor]) -> Tensor:
        """Return the expected MACs for one image, a scalar, at ``alphas``, the tables in their order."""
        total = torch.full((), self._fixed, device=alphas[0].device)
        for position in self._tables:
            weights = alphas[position].softmax(-1)
            macs: Tensor = getattr(self, f"macs{position}")
            total = total + (macs.to(weights.dtype).view_as(weights) * weights).sum()
        return total
