"""The mixed cell of DARTS, executed state by state: what one state is used for by all its edges runs at once.

The sum is that of :class:`nni_cream.supernet.mixed_cell.MixedCell`, in another order:

- what does not depend on the edge (the ReLU and the pools of a state) is computed once;
- the depthwise convolutions of one kind are one convolution for all edges, channels last;
- a batch norm's statistics follow from the moments of the input of the pointwise convolution before it, so that norm
  and mixing weight become part of its weight, and all that goes into a node is accumulated by products
  (:mod:`nni_cream.supernet.pointwise`);
- ``none`` is left out.

``docs/performance.md`` has what that gains.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from nni_cream.genotype import CELL_INPUTS, edges_of
from nni_cream.models.darts_operations import FactorizedReduce, SepConv, Zero
from nni_cream.models.operations import DilConv
from nni_cream.supernet.depthwise import DepthwiseConv2d, convolve
from nni_cream.supernet.mixed import MixingWeights
from nni_cream.supernet.mixed_cell import MixedCell
from nni_cream.supernet.pointwise import joined, moments, products
from nni_cream.supernet.synchronised import averages, sharers

_POOLS: Final = (nn.MaxPool2d, nn.AvgPool2d)
_LAYERS_OF_A_STAGE: Final = (nn.ReLU, DepthwiseConv2d, nn.Conv2d, nn.BatchNorm2d)


class Stage(NamedTuple):
    """Depthwise convolution, pointwise convolution, and batch norm, of all edges that leave a state."""

    depthwise: tuple[Any, ...]
    pointwise: tuple[Any, ...]
    norms: tuple[Any, ...]


class Pool(NamedTuple):
    """A pool, and the batch norms that follow it on every edge."""

    pool: Any
    norms: tuple[Any, ...]


class Departure(NamedTuple):
    """What happens to one state on all edges that leave it; keys are columns of α.

    Attributes:
        edges: how many there are.
        stride: of the edges.
        identity: columns of identities.
        pools: by column.
        reductions: factorized reductions, one an edge.
        separable: stages of separable convolutions, one after the other.
        others: operations that run as they are, one an edge.
    """

    edges: int
    stride: int
    identity: list[int]
    pools: dict[int, Pool]
    reductions: dict[int, tuple[Any, ...]]
    separable: dict[int, list[Stage]]
    others: dict[int, tuple[Any, ...]]


class Statistics:
    """How the batch norms of a cell normalise at the moment, and what they are to remember of it.

    Args:
        norms: the batch norms, all in one mode.
    """

    def __init__(self, norms: Sequence[Any]) -> None:
        first = norms[0]
        self.of_batch: bool = first.training or first.running_mean is None
        self.eps: float = first.eps
        self._momentum = first.momentum if first.training and first.track_running_stats else None
        self._seen: list[tuple[Sequence[Any], Tensor, Tensor, int]] = []

    def choose(self, norms: Sequence[Any], mean: Tensor, variance: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return mean and variance to normalise with, given those of the batch ([norms or 1, channels]).

        The batch may be divided among processes, each with ``count`` values a channel.
        """
        count *= sharers()
        shape = (len(norms), mean.shape[-1])
        self._seen.append((norms, mean.detach().expand(shape), variance.detach().expand(shape), count))
        return mean, variance

    def running(self, norms: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Return the running mean and variance, [norms, channels]."""
        return torch.stack([norm.running_mean for norm in norms]), torch.stack([norm.running_var for norm in norms])

    def remember(self) -> None:
        """Move the running statistics, as batch norms in training do."""
        if self._momentum is None or not self._seen:
            return
        buffers: list[Tensor] = []
        targets: list[Tensor] = []
        counters: list[Tensor] = []
        for norms, mean, variance, count in self._seen:
            buffers += [norm.running_mean for norm in norms]
            targets += mean.unbind()
            buffers += [norm.running_var for norm in norms]
            targets += (variance * (count / (count - 1))).unbind()
            counters += [norm.num_batches_tracked for norm in norms]
        with torch.no_grad():
            torch._foreach_lerp_(buffers, targets, self._momentum)
            torch._foreach_add_(counters, 1)


class FusedCell(MixedCell):
    """A :class:`MixedCell` whose edges run together: same values, gradients, buffers, and state dict.

    Parameters and buffers stay where they are in a :class:`MixedCell`, but the modules of the operations are not
    called, so hooks on them do not run. An operation that is none of the paper's runs as it is, and the whole cell runs
    as a :class:`MixedCell` on a GPU, under autocast, when its batch norms are not all in one mode, and when a batch has
    a single value a channel or a size that a reduction refuses.

    Args:
        cell: as of :class:`MixedCell`.
        weights: likewise.
        skip_limit: likewise.
    """

    def __init__(self, cell: Any, weights: MixingWeights, skip_limit: int | None) -> None:
        super().__init__(cell, weights, skip_limit)
        edges = edges_of(self.nodes)
        rows_of = [[row for row, (_, state) in enumerate(edges) if state == s] for s in range(self.nodes + 1)]
        # In a tuple, so that the modules in it are not registered a second time.
        self._departures = tuple(self._plan(rows, state) for state, rows in enumerate(rows_of))
        self._order = [row for rows in rows_of for row in rows]
        self._fan_out = [len(rows) for rows in rows_of]
        self._norms = tuple(m for m in self.edges.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))

    def forward(self, before_last: Tensor, last: Tensor) -> Tensor:
        """Map the outputs of the two cells before, [N, C₀, H₀, W₀] and [N, C₁, H, W], to the cell's own."""
        if not self._can_run_fused(last):
            return super().forward(before_last, last)
        # [edges, operations] to [operations, edges], edges in the order of the states that they leave.
        # Indexing by numbers of the host would wait for a GPU, and could not be recorded.
        rows = self._weights().unbind()
        mixing = torch.stack([rows[row] for row in self._order], dim=1).split(self._fan_out, dim=1)
        statistics = Statistics(self._norms) if self._norms else None
        states = [self.preprocess0(before_last), self.preprocess1(last)]
        channels = states[0].shape[1]
        pending: Any = None
        for position, departure in enumerate(self._departures):
            joint = _depart(departure, states[position], mixing[position], statistics)
            pending = joint if pending is None else pending + joint
            if position >= CELL_INPUTS - 1:
                # The next node has all its edges now.
                states.append(pending[:, :channels])
                pending = pending[:, channels:]
        if statistics is not None:
            statistics.remember()
        return torch.cat(states[-self.concat :], dim=1)

    def _plan(self, rows: Sequence[int], state: int) -> Departure:
        stride = 2 if self.kind == "reduce" and state < CELL_INPUTS else 1
        departure = Departure(len(rows), stride, [], {}, {}, {}, {})
        for column, name in enumerate(self.operations):
            operations = tuple(self.edges[row][name] for row in rows)
            types = {type(operation) for operation in operations}
            if types == {Zero}:
                continue
            if types == {nn.Identity}:
                departure.identity.append(column)
            elif types == {FactorizedReduce} and all(_is_plain(operation.bn) for operation in operations):
                departure.reductions[column] = operations
            elif types == {nn.Sequential} and all(_is_pool(operation) for operation in operations):
                departure.pools[column] = Pool(operations[0][0], tuple(operation[1] for operation in operations))
            elif types <= {SepConv, DilConv} and all(_has_stages(operation.op) for operation in operations):
                layers = list(zip(*(operation.op for operation in operations), strict=True))
                departure.separable[column] = [Stage(*layers[i + 1 : i + 4]) for i in range(0, len(layers), 4)]
            else:
                departure.others[column] = operations
        return departure

    def _can_run_fused(self, last: Tensor) -> bool:
        # On a GPU this way has not been shown to have the textbook's gradients (docs/performance.md).
        if last.device.type != "cpu":
            return False
        shrink = 2 if self.kind == "reduce" else 1
        images, _, height, width = last.shape
        modes = {(norm.training, norm.track_running_stats, norm.momentum, norm.eps) for norm in self._norms}
        if len(modes) > 1 or torch.is_autocast_enabled(last.device.type) or height % shrink or width % shrink:
            return False
        if any("forward" in vars(norm) for norm in self._norms) or any(None in mode for mode in modes):
            return False
        return images * height * width > shrink**2


def _is_plain(norm: Any) -> bool:
    return type(norm) is nn.BatchNorm2d and not norm.affine


def _is_pool(operation: Any) -> bool:
    return len(operation) == 2 and type(operation[0]) in _POOLS and _is_plain(operation[1])


def _has_stages(layers: Any) -> bool:
    expected = _LAYERS_OF_A_STAGE * (len(layers) // 4)
    return tuple(type(layer) for layer in layers) == expected and all(_is_plain(norm) for norm in layers[3::4])


def _depart(departure: Departure, state: Tensor, mixing: Tensor, statistics: Any) -> Tensor:
    """Return what all edges of a state make of it, joined: [N, edges · C, H, W]."""
    state = state.contiguous(memory_format=torch.channels_last)
    edges, stride = departure.edges, departure.stride
    images, channels, height, width = state.shape
    active = state.relu()
    biases: list[Tensor] = []
    pairs: list[tuple[Tensor, Tensor]] = []
    if departure.identity or departure.pools:
        pair, bias = _shared(departure, state, mixing, statistics)
        pairs.append(pair)
        biases += bias
    for column, operations in departure.reductions.items():
        pair, offset = _reduce(operations, active, mixing[column], statistics)
        pairs.append(pair)
        biases.append(offset)
    if departure.separable:
        separable, offset = _separate(departure, active, mixing, statistics)
        pairs += separable
        biases.append(offset)
    total = None
    if pairs:
        bias = torch.stack(biases).sum(0) if biases else state.new_zeros(edges * channels)
        total = _maps(products(bias, *pairs), images, height // stride, width // stride)
    for column, operations in departure.others.items():
        weighted = [weight * op(state) for weight, op in zip(mixing[column], operations, strict=True)]
        own = torch.cat(weighted, dim=1)
        total = own if total is None else total + own
    if total is None:
        total = state.new_zeros(images, edges * channels, height // stride, width // stride)
    return total


def _matrix(features: Tensor) -> Tensor:
    """[N, C, H, W] in channels last, as [N·H·W, C]."""
    return features.permute(0, 2, 3, 1).reshape(-1, features.shape[1])


def _maps(matrix: Tensor, images: int, height: int, width: int) -> Tensor:
    return matrix.view(images, height, width, -1).permute(0, 3, 1, 2)


def _shared(departure: Departure, state: Tensor, mixing: Tensor, statistics: Any) -> Any:
    """Identities and pools: one feature map for all edges, which scale its channels."""
    maps, scales, biases = [], [], []
    edges, channels = departure.edges, state.shape[1]
    for column in departure.identity:
        maps.append(_matrix(state))
        scales.append(mixing[column, :, None].expand(edges, channels))
    for column, (pool, norms) in departure.pools.items():
        pooled = _matrix(pool(state))
        if statistics.of_batch:
            (mean,) = averages(pooled.mean(0, keepdim=True))
            (variance,) = averages((pooled - mean).square().mean(0, keepdim=True))
            mean, variance = statistics.choose(norms, mean, variance, len(pooled))
        else:
            mean, variance = statistics.running(norms)
        scale = mixing[column, :, None] * (variance + statistics.eps).rsqrt()
        maps.append(pooled)
        scales.append(scale)
        biases.append(-(scale * mean).flatten())
    diagonal = torch.stack(scales).transpose(1, 2)[..., None]
    identity = torch.eye(channels, dtype=state.dtype, device=state.device)
    weight = (diagonal * identity[:, None, :]).reshape(1, -1, edges * channels)
    return (torch.cat(maps, dim=1), weight), biases


def _reduce(operations: Sequence[Any], active: Tensor, mixing: Tensor, statistics: Any) -> Any:
    """Factorized reductions: two pointwise convolutions side by side, with one norm."""
    matrix = _matrix(torch.cat([active[:, :, ::2, ::2], active[:, :, 1::2, 1::2]], dim=1))
    halves = [
        torch.stack([getattr(operation, name).weight for operation in operations]).flatten(2)
        for name in ("conv_1", "conv_2")
    ]
    zeros = torch.zeros_like(halves[0])
    weight = torch.cat([torch.cat([halves[0], zeros], 2), torch.cat([zeros, halves[1]], 2)], 1)
    norms = [operation.bn for operation in operations]
    (matrix,), scaled, bias = _normalised(weight, [matrix], 1, norms, mixing, statistics)
    return (matrix, scaled.transpose(0, 1).reshape(1, matrix.shape[1], -1)), bias.flatten()


def _separate(departure: Departure, active: Tensor, mixing: Tensor, statistics: Any) -> Any:
    """Separable convolutions: all of a kind as one, up to the pointwise convolution that ends them."""
    edges = departure.edges
    repeated: dict[int, Tensor] = {}
    reached: dict[int, Tensor] = {}
    for column, stages in departure.separable.items():
        # A convolution whose taps are as far apart as its outputs sees no other pixels.
        step = departure.stride if _skips_pixels(stages[0].depthwise[0]) else 1
        if step not in repeated:
            repeated[step] = torch.cat([active[:, :, ::step, ::step]] * edges, dim=1)
        reached[column] = _convolve(stages[0], repeated[step], step)
    depth = 1
    while deeper := {c: stages for c, stages in departure.separable.items() if len(stages) > depth}:
        ended = [stages[depth - 1] for stages in deeper.values()]
        matrices = [_matrix(reached[column]) for column in deeper]
        matrices, weights, biases = _pointwise(ended, matrices, edges, None, statistics)
        for position, (column, stages) in enumerate(deeper.items()):
            between = products(biases[position].flatten(), (matrices[position], joined(weights[position]))).relu_()
            size = reached[column].shape
            reached[column] = _convolve(stages[depth], _maps(between, size[0], *size[2:]))
        depth += 1
    ended = [stages[-1] for stages in departure.separable.values()]
    matrices = [_matrix(features) for features in reached.values()]
    matrices, weights, biases = _pointwise(
        ended, matrices, edges, torch.stack([mixing[c] for c in departure.separable]), statistics
    )
    pairs = [(matrix, joined(weight)) for matrix, weight in zip(matrices, weights, strict=True)]
    return pairs, biases.sum(0).flatten()


def _skips_pixels(layer: Any) -> bool:
    return layer.dilation == layer.stride and all(p % s == 0 for p, s in zip(layer.padding, layer.stride, strict=True))


def _convolve(stage: Stage, features: Tensor, step: int = 1) -> Tensor:
    """Convolve depthwise, with every ``step``-th pixel given."""
    weight = torch.cat([layer.weight for layer in stage.depthwise])
    first = stage.depthwise[0]
    stride, padding, dilation = (
        tuple(number // step for number in pair) for pair in (first.stride, first.padding, first.dilation)
    )
    return convolve(features, weight, stride, padding, dilation)


def _pointwise(stages: Sequence[Stage], matrices: Sequence[Tensor], edges: int, mixing: Any, statistics: Any) -> Any:
    weight = torch.stack([layer.weight for stage in stages for layer in stage.pointwise]).flatten(2)
    norms = [norm for stage in stages for norm in stage.norms]
    matrices, scaled, bias = _normalised(weight, matrices, edges, norms, mixing, statistics)
    return matrices, scaled.view(len(stages), edges, *scaled.shape[1:]), bias.view(len(stages), edges, -1)


def _normalised(
    weight: Tensor, matrices: Sequence[Tensor], groups: int, norms: Sequence[Any], mixing: Any, statistics: Any
) -> tuple[Sequence[Tensor], Tensor, Tensor]:
    """Return the inputs, weights [M, in, out] and biases [M, out] of pointwise convolutions, norms and mixing included.

    Args:
        weight: of the convolutions, [M, out, in].
        matrices: their inputs, each of so many ``groups``.
        groups: of the inputs.
        norms: the batch norms, M.
        mixing: of every output, M in all; None for 1.
        statistics: of the norms.
    """
    if statistics.of_batch:
        found = [moments(matrix, groups) for matrix in matrices]
        matrices = [matrix for matrix, _, _ in found]
        inner_mean, covariance = (torch.cat(parts) for parts in list(zip(*found, strict=True))[1:])
        mean = (weight @ inner_mean[..., None])[..., 0]
        # Rounding can make a variance of nothing negative.
        variance = ((weight @ covariance) * weight).sum(-1).clamp_min(0)
        mean, variance = statistics.choose(norms, mean, variance, len(matrices[0]))
    else:
        mean, variance = statistics.running(norms)
    scale = (variance + statistics.eps).rsqrt()
    if mixing is not None:
        scale = scale * mixing.reshape(-1, 1)
    return matrices, (weight * scale[..., None]).transpose(1, 2), -scale * mean
