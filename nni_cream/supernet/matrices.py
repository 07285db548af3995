"""Products of matrices, group by group, as pointwise convolutions have them.

A matrix [P, groups · C] is a channels-last feature map, one row a pixel of an image.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from nni_cream.supernet.kernels import kernels_for

# Products of narrower groups cost more than the zeros that join them; measured on CPUs.
_NARROWEST: Final = 16


def block_count(groups: int, channels: int) -> int:
    """Return the number of blocks that groups of so many channels are joined to."""
    wide = (n for n in range(1, groups + 1) if groups % n == 0 and n * channels >= _NARROWEST)
    return groups // next(wide, groups)


def joined(weight: Tensor) -> Tensor:
    """Return the weights [groups, in, out] of a grouped product, as fewer block-diagonal ones if they are narrow."""
    groups, rows, columns = weight.shape
    blocks = block_count(groups, rows)
    if blocks == groups:
        return weight
    together = groups // blocks
    identity = torch.eye(together, dtype=weight.dtype, device=weight.device)
    parts = weight.view(blocks, together, rows, 1, columns) * identity[:, None, :, None]
    return parts.reshape(blocks, together * rows, together * columns)


def diagonal_blocks(matrices: Tensor, groups: int) -> Tensor:
    """Return the [groups, in, out] on the diagonal of matrices of groups that were joined, [blocks, …]."""
    blocks, rows, columns = matrices.shape
    if blocks == groups:
        return matrices
    together = groups // blocks
    parts = matrices.view(blocks, together, rows // together, together, columns // together)
    return parts.diagonal(0, 1, 3).permute(0, 3, 1, 2).reshape(groups, rows // together, columns // together)


def _grouped(matrix: Tensor, groups: int) -> Tensor:
    return matrix.view(matrix.shape[0], groups, -1).transpose(0, 1)


def add_product(matrix: Tensor, weight: Tensor, total: Tensor | None = None) -> Tensor:
    """Return matrix·weight, group by group, added to ``total`` in place if there is one."""
    groups, _, columns = weight.shape
    if groups == 1:
        return torch.mm(matrix, weight[0]) if total is None else total.addmm_(matrix, weight[0])
    keep = 0 if total is None else 1
    total = matrix.new_empty(matrix.shape[0], groups * columns) if total is None else total
    _grouped(total, groups).baddbmm_(_grouped(matrix, groups), weight, beta=keep)
    return total


def cross_product(first: Tensor, second: Tensor, groups: int) -> Tensor:
    """Return firstᵀ·second, group by group: [groups, columns of first, columns of second]."""
    if kernels := kernels_for(first, second):
        product: Tensor = kernels.cross_product(first, second, groups)
        return product
    if groups == 1:
        return torch.mm(first.t(), second)[None]
    return torch.bmm(_grouped(first, groups).transpose(1, 2), _grouped(second, groups))


def begin_sum(bias: Tensor | None, before: Tensor | None, rows: int) -> Tensor | None:
    """Return a new matrix to add products to; None if there is nothing to begin with."""
    if bias is None:
        return None if before is None else before.clone(memory_format=torch.contiguous_format)
    return bias.expand(rows, -1).contiguous() if before is None else (before + bias).contiguous()


def column_sums(matrix: Tensor) -> Tensor:
    """Return the sum of the rows, [C]."""
    if kernels := kernels_for(matrix):
        sums: Tensor = kernels.column_sums(matrix, False)
        return sums[0]
    return matrix.sum(0)


def column_sums_and_squares(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of the rows, and that of their squares, [C] each."""
    if kernels := kernels_for(matrix):
        sums, squares = kernels.column_sums(matrix, True).unbind()
        return sums, squares
    return matrix.sum(0), (matrix * matrix).sum(0)
