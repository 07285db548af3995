"""The mixed cell of DARTS, executed state by state: what one state is used for by all its edges runs at once.

The sum is that of :class:`nni_cream.supernet.mixed_cell.MixedCell`, in another order:

- the cell's two inputs are there from the start and of one size, so their edges run together;
- what does not depend on the edge (the ReLU and the pools of a state) is computed once;
- the depthwise convolutions of one kind are one convolution for all edges, channels last;
- a batch norm's statistics follow from the moments of the input of the pointwise convolution before it, so that norm
  and mixing weight become part of its weight, and all that goes into a node is accumulated by products
  (:mod:`nni_cream.supernet.stages`);
- ``none`` is left out.

``docs/performance.md`` has what that gains.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from nni_cream.genotype import CELL_INPUTS, edges_of
from nni_cream.models.darts_operations import FactorizedReduce, SepConv, Zero
from nni_cream.models.operations import AveragePool, DilConv
from nni_cream.supernet.copies import concatenated, repeated
from nni_cream.supernet.depthwise import DepthwiseConv2d, PointwiseConv2d, convolve
from nni_cream.supernet.kernels import are_there_kernels_for
from nni_cream.supernet.mixed import MixingWeights
from nni_cream.supernet.mixed_cell import MixedCell
from nni_cream.supernet.norm_statistics import RunningStatistics, Statistics
from nni_cream.supernet.pointwise import moments, normalised, products, spread
from nni_cream.supernet.stages import activated, added

# Bytes of an array that holds what two states send to every node; above, it is more than caches hold, and each state
# goes by itself. Measured on CPUs.
_LARGEST: Final = 6_000_000
_POOLS: Final = (nn.MaxPool2d, AveragePool)
_LAYERS_OF_A_STAGE: Final = (nn.ReLU, DepthwiseConv2d, PointwiseConv2d, nn.BatchNorm2d)


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
    """What happens to some states, which lie side by side, on all edges that leave them; keys are columns of α.

    All of them are connected to the same nodes. What there is of every edge is ordered by node, then by state.

    Attributes:
        states: how many there are.
        nodes: that they are connected to.
        stride: of the edges.
        identity: columns of identities.
        pools: by column.
        reductions: factorized reductions, one an edge.
        separable: stages of separable convolutions, one after the other.
        others: operations that run as they are, one an edge.
        alone: the departures of the states one by one, if there are several.
    """

    states: int
    nodes: int
    stride: int
    identity: list[int]
    pools: dict[int, Pool]
    reductions: dict[int, tuple[Any, ...]]
    separable: dict[int, list[Stage]]
    others: dict[int, tuple[Any, ...]]
    alone: tuple[Departure, ...]


class FusedCell(MixedCell):
    """A :class:`MixedCell` whose edges run together: same values, gradients, buffers, and state dict.

    Parameters and buffers stay where they are in a :class:`MixedCell`, but the modules of the operations are not
    called, so hooks on them do not run. An operation that is none of the paper's runs as it is, and the whole cell runs
    as a :class:`MixedCell` on a GPU without Triton, under autocast, when its batch norms are not all in one mode, and
    when a batch has a single value a channel or a size that a reduction refuses.

    Args:
        cell: as of :class:`MixedCell`.
        weights: likewise.
        skip_limit: likewise.
    """

    def __init__(self, cell: Any, weights: MixingWeights, skip_limit: int | None) -> None:
        super().__init__(cell, weights, skip_limit)
        row_of = {edge: row for row, edge in enumerate(edges_of(self.nodes))}
        together = [tuple(range(CELL_INPUTS)), *((state,) for state in range(CELL_INPUTS, self.nodes + 1))]
        last = CELL_INPUTS + self.nodes
        rows_of = [
            [row_of[node, s] for node in range(max(CELL_INPUTS, states[0] + 1), last) for s in states]
            for states in together
        ]
        # In a tuple, so that the modules in it are not registered a second time.
        self._departures = tuple(self._plan(*pair) for pair in zip(together, rows_of, strict=True))
        self._order = [row for rows in rows_of for row in rows]
        self._fan_out = [len(rows) for rows in rows_of]
        self._norms = tuple(m for m in self.edges.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
        self._running = RunningStatistics([norm for departure in self._departures for norm in _norms_of(departure)])

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        # Another type or device: other buffers.
        result = super()._apply(*args, **kwargs)
        self._running.bind()
        return result

    def forward(self, before_last: Tensor, last: Tensor) -> Tensor:
        """Map the outputs of the two cells before, [N, C₀, H₀, W₀] and [N, C₁, H, W], to the cell's own."""
        if not self._can_run_fused(last):
            return super().forward(before_last, last)
        # [edges, operations] to [operations, edges], edges in the order of the departures.
        # Indexing by numbers of the host would wait for a GPU, and could not be recorded.
        rows = self._weights().unbind()
        mixing = torch.stack([rows[row] for row in self._order], dim=1).split(self._fan_out, dim=1)
        statistics = Statistics(self._norms, self._running) if self._norms else None
        state = concatenated([self.preprocess0(before_last), self.preprocess1(last)], dim=1)
        nodes: list[Tensor] = []
        pending: Tensor | None = None
        for departure, weights in zip(self._departures, mixing, strict=True):
            pending = _depart(departure, state, weights, statistics, pending)
            images, channels, height, width = state.shape
            channels //= departure.states
            # The next node has all its edges now.
            node, pending = pending.split([channels, pending.shape[1] - channels], dim=1)
            state = _maps(node, images, height // departure.stride, width // departure.stride)
            nodes.append(state)
        if statistics is not None:
            statistics.remember()
        return concatenated(nodes[-self.concat :], dim=1)

    def _plan(self, states: Sequence[int], rows: Sequence[int]) -> Departure:
        stride = 2 if self.kind == "reduce" and states[0] < CELL_INPUTS else 1
        number = len(states)
        alone = tuple(self._plan([s], rows[i::number]) for i, s in enumerate(states)) if number > 1 else ()
        departure = Departure(number, len(rows) // number, stride, [], {}, {}, {}, {}, alone)
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
        # Without kernels of its own it is slower on a GPU than the textbook.
        if last.device.type != "cpu" and not are_there_kernels_for(last):
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


def _depart(departure: Departure, state: Tensor, mixing: Tensor, statistics: Any, before: Tensor | None) -> Tensor:
    """Return what the edges that leave some states bring to every node, as a matrix [N·H·W, nodes · C].

    Args:
        departure: the edges.
        state: the states side by side, [N, states · C, H, W].
        mixing: [operations, edges].
        statistics: of the norms.
        before: what other edges have brought there; None for nothing.
    """
    nodes, stride = departure.nodes, departure.stride
    channels = state.shape[1] // departure.states
    large = state.device.type == "cpu" and nodes * state.numel() * state.element_size() > _LARGEST
    if departure.alone and large:
        for position, (part, single) in enumerate(zip(state.split(channels, dim=1), departure.alone, strict=True)):
            before = _depart(single, part, mixing[:, position :: departure.states], statistics, before)
        assert before is not None
        return before
    state = state.contiguous(memory_format=torch.channels_last)
    active = state.relu()
    rows = mixing.unbind()
    biases: list[Tensor] = []
    pairs: list[tuple[Tensor, Tensor]] = []
    if departure.identity or departure.pools:
        pair, bias = _shared(departure, state, rows, statistics)
        pairs.append(pair)
        biases += bias
    for column, operations in departure.reductions.items():
        for position, part in enumerate(active.split(channels, dim=1)):
            leaving = slice(position, None, departure.states)
            pair, offset = _reduce(operations[leaving], part, rows[column][leaving], statistics)
            pairs.append(pair)
            biases.append(offset)
    total = before
    bias = torch.stack(biases).sum(0) if biases else None
    if departure.separable:
        total = _separate(departure, active, rows, statistics, bias, pairs, before)
    elif pairs:
        total = products(state.new_zeros(nodes * channels) if bias is None else bias, *pairs, total=before)
    for column, operations in departure.others.items():
        parts = state.split(channels, dim=1) * nodes
        weighted = [w * op(part) for w, op, part in zip(rows[column].unbind(), operations, parts, strict=True)]
        firsts = range(0, len(weighted), departure.states)
        sums = [functools.reduce(torch.add, weighted[i : i + departure.states]) for i in firsts]
        own = _matrix(torch.cat(sums, dim=1))
        total = own if total is None else total + own
    if total is None:
        images, _, height, width = state.shape
        total = state.new_zeros(images * (height // stride) * (width // stride), nodes * channels)
    return total


def _matrix(features: Tensor) -> Tensor:
    """[N, C, H, W] in channels last, as [N·H·W, C]."""
    return features.permute(0, 2, 3, 1).reshape(-1, features.shape[1])


def _maps(matrix: Tensor, images: int, height: int, width: int) -> Tensor:
    return matrix.view(images, height, width, -1).permute(0, 3, 1, 2)


def _shared(departure: Departure, state: Tensor, mixing: Sequence[Tensor], statistics: Any) -> Any:
    """Identities and pools: feature maps for all edges, which scale their channels."""
    states, nodes = departure.states, departure.nodes
    channels = state.shape[1] // states
    unchanged, pools = len(departure.identity), departure.pools.values()
    maps = torch.cat([*[_matrix(state)] * unchanged, *(_matrix(pool.pool(state)) for pool in pools)], dim=1)
    shape = (-1, nodes, states, channels)
    scales = [mixing[column].view(1, nodes, states, 1).expand(shape) for column in departure.identity]
    biases = []
    if pools:
        norms = [norm for pool in pools for norm in pool.norms]
        if statistics.of_batch:
            # Of all maps: that is less work than to part them.
            maps, *moments = spread(maps)
            mean, variance = (
                each.view(-1, 1, states, channels)[unchanged:].expand(-1, nodes, -1, -1) for each in moments
            )
            statistics.saw(norms, mean, variance, len(maps))
        else:
            mean, variance = (each.view(shape) for each in statistics.known(norms))
        weights = torch.stack([mixing[column] for column in departure.pools]).view(-1, nodes, states, 1)
        scale = weights * (variance + statistics.eps).rsqrt()
        scales.append(scale)
        biases.append(-(scale * mean).sum((0, 2)).flatten())
    # [maps, nodes, states, channels] to a diagonal of channels for every map, state and node.
    diagonal = torch.cat(scales).permute(0, 2, 3, 1)[..., None]
    identity = torch.eye(channels, dtype=state.dtype, device=state.device)
    weight = (diagonal * identity[:, None, :]).reshape(1, -1, nodes * channels)
    return (maps, weight), biases


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
    known = statistics.known(norms)
    if known is None:
        (matrix,), inner_mean, covariance = moments([matrix], 1)
        scaled, bias, mean, variance = normalised(weight, inner_mean, covariance, mixing, statistics.eps)
        statistics.saw(norms, mean, variance, len(matrix))
    else:
        scale = mixing[:, None] * (known.variance + statistics.eps).rsqrt()
        scaled, bias = (weight * scale[..., None]).transpose(1, 2), -scale * known.mean
    return (matrix, scaled.transpose(0, 1).reshape(1, matrix.shape[1], -1)), bias.flatten()


def _separate(
    departure: Departure,
    active: Tensor,
    mixing: Sequence[Tensor],
    statistics: Any,
    bias: Tensor | None,
    pairs: Sequence[tuple[Tensor, Tensor]],
    before: Tensor | None,
) -> Tensor:
    """Separable convolutions: all of a kind as one, up to the sums that end them, to which the rest is added."""
    nodes = departure.nodes
    edges = nodes * departure.states
    inputs: dict[int, Tensor] = {}
    reached: dict[int, Tensor] = {}
    for column, stages in departure.separable.items():
        # A convolution whose taps are as far apart as its outputs sees no other pixels.
        step = departure.stride if _skips_pixels(stages[0].depthwise[0]) else 1
        if step not in inputs:
            inputs[step] = repeated(active[:, :, ::step, ::step], nodes)
        reached[column] = _convolve(stages[0], inputs[step], step)
    depth = 1
    while deeper := {c: stages for c, stages in departure.separable.items() if len(stages) > depth}:
        weight, norms = _ends([stages[depth - 1] for stages in deeper.values()])
        matrices = [_matrix(reached[column]) for column in deeper]
        results, found = activated(weight, matrices, edges, statistics.eps, statistics.known(norms))
        statistics.saw(norms, *found, len(matrices[0]))
        for (column, stages), result in zip(deeper.items(), results, strict=True):
            size = reached[column].shape
            reached[column] = _convolve(stages[depth], _maps(result, size[0], *size[2:]))
        depth += 1
    weight, norms = _ends([stages[-1] for stages in departure.separable.values()])
    matrices = [_matrix(features) for features in reached.values()]
    weights = torch.stack([mixing[column] for column in departure.separable])
    known = statistics.known(norms)
    total, found = added(weight, matrices, weights, nodes, statistics.eps, known, bias, pairs, before)
    statistics.saw(norms, *found, len(matrices[0]))
    return total


def _norms_of(departure: Departure) -> list[Any]:
    """Return all norms of a departure, in the order in which it uses them."""
    norms = [norm for pool in departure.pools.values() for norm in pool.norms]
    for operations in departure.reductions.values():
        norms += [
            operations[i].bn for s in range(departure.states) for i in range(s, len(operations), departure.states)
        ]
    for depth in range(max((len(stages) for stages in departure.separable.values()), default=0)):
        deeper = [stages for stages in departure.separable.values() if len(stages) > depth + 1]
        norms += [norm for stages in deeper for norm in stages[depth].norms]
    return norms + [norm for stages in departure.separable.values() for norm in stages[-1].norms]


def _skips_pixels(layer: Any) -> bool:
    return layer.dilation == layer.stride and all(p % s == 0 for p, s in zip(layer.padding, layer.stride, strict=True))


def _convolve(stage: Stage, features: Tensor, step: int = 1) -> Tensor:
    """Convolve depthwise, with every ``step``-th pixel given."""
    weight = concatenated([layer.weight for layer in stage.depthwise])
    first = stage.depthwise[0]
    stride, padding, dilation = (
        tuple(number // step for number in pair) for pair in (first.stride, first.padding, first.dilation)
    )
    return convolve(features, weight, stride, padding, dilation)


def _ends(stages: Sequence[Stage]) -> tuple[Tensor, list[Any]]:
    """Return the weights of pointwise convolutions, [M, out, in], and the norms that follow them."""
    weight = concatenated([layer.weight for stage in stages for layer in stage.pointwise]).flatten(1)
    channels = stages[0].norms[0].num_features
    return weight.view(-1, channels, weight.shape[1]), [norm for stage in stages for norm in stage.norms]
