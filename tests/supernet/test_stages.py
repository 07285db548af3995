from __future__ import annotations

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from nni_cream.supernet.stages import Found, activated, added

EPS = 1e-3
# Two kinds of convolutions on the edges of two states to three nodes.
KINDS, NODES, STATES, CHANNELS, ROWS = 2, 3, 2, 4, 30
EDGES = NODES * STATES


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def stage(channels: int = CHANNELS) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of the pointwise convolutions, and an input for every kind."""
    weight = random(KINDS * EDGES, channels, channels)
    first, second = (random(ROWS, EDGES * channels, seed=seed) for seed in (1, 2))
    return weight, first, second


def additions(channels: int = CHANNELS) -> tuple[Tensor, ...]:
    """Mixing weights, a bias, a total, and the two factors of a product."""
    mixing, bias = random(KINDS, EDGES, seed=3), random(NODES * channels, seed=4)
    return (
        mixing,
        bias,
        random(ROWS, NODES * channels, seed=5),
        random(ROWS, 5, seed=6),
        random(1, 5, NODES * channels, seed=7),
    )


def textbook(weight: Tensor, matrices: tuple[Tensor, ...]) -> list[Tensor]:
    """Every edge of every kind convolved and normalised by itself, in the order of the weights."""
    edges = [part for matrix in matrices for part in matrix.chunk(EDGES, dim=1)]
    outputs = [part @ w.t() for part, w in zip(edges, weight, strict=True)]
    return [F.batch_norm(output, None, None, training=True, eps=EPS) for output in outputs]


def of_nodes(weight: Tensor, first: Tensor, second: Tensor, *more: Tensor) -> Tensor:
    mixing, bias, total, matrix, factor = more
    return added(weight, [first, second], mixing, NODES, EPS, bias=bias, pairs=[(matrix, factor)], total=total)[0]


def of_edges(weight: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, ...]:
    # Times 1, so that the gradients of a check are not overwritten.
    return tuple(1 * result for result in activated(weight, [first, second], EDGES, EPS)[0])


class TestValues:
    def test_of_edges(self) -> None:
        weight, *matrices = stage()
        results, found = activated(weight, matrices, EDGES, EPS)
        edges = textbook(weight, tuple(matrices))
        for kind, result in enumerate(results):
            expected = torch.cat(edges[kind * EDGES : (kind + 1) * EDGES], dim=1).relu()
            torch.testing.assert_close(result, expected)
        outputs = [p @ w.t() for p, w in zip((e for m in matrices for e in m.chunk(EDGES, 1)), weight, strict=True)]
        torch.testing.assert_close(found.mean, torch.stack([output.mean(0) for output in outputs]))
        torch.testing.assert_close(found.variance, torch.stack([output.var(0, correction=0) for output in outputs]))
        assert not any(each.requires_grad for each in found)

    def test_of_nodes(self) -> None:
        weight, *matrices = stage()
        mixing, bias, total, matrix, factor = more = additions()
        before = total.clone()
        weighted = [m * e for m, e in zip(mixing.flatten(), textbook(weight, tuple(matrices)), strict=True)]
        nodes = [
            sum(weighted[kind * EDGES + node * STATES + state] for kind in range(KINDS) for state in range(STATES))
            for node in range(NODES)
        ]
        expected = torch.cat([torch.as_tensor(node) for node in nodes], dim=1)
        ours = of_nodes(weight, *matrices, *more)
        torch.testing.assert_close(ours, expected + bias + total + matrix @ factor[0])
        assert torch.equal(total, before)
        torch.testing.assert_close(added(weight, matrices, mixing, NODES, EPS)[0], expected)

    def test_by_known_statistics(self) -> None:
        weight, *matrices = stage()
        mean, variance = random(KINDS * EDGES, CHANNELS, seed=8), random(KINDS * EDGES, CHANNELS, seed=9).square()
        known = Found(mean, variance)
        results, found = activated(weight, matrices, EDGES, EPS, known)
        assert found == known
        outputs = [p @ w.t() for p, w in zip((e for m in matrices for e in m.chunk(EDGES, 1)), weight, strict=True)]
        expected = [((o - m) * (v + EPS).rsqrt()).relu() for o, m, v in zip(outputs, mean, variance, strict=True)]
        torch.testing.assert_close(torch.cat(list(results), dim=1), torch.cat(expected, dim=1))


class TestDerivatives:
    def test_of_edges(self) -> None:
        assert gradcheck(of_edges, stage(), fast_mode=True)
        assert gradgradcheck(of_edges, stage(), fast_mode=True)

    def test_of_nodes(self) -> None:
        assert gradcheck(of_nodes, (*stage(), *additions()), fast_mode=True)
        assert gradgradcheck(of_nodes, (*stage(), *additions()), fast_mode=True)

    def test_whatever_the_memory_of_what_arrives(self) -> None:
        """Cotangents are expanded where a sum is differentiated, and can be transposed."""
        given = (*stage(16), *additions(16))
        for function, variables in ((of_edges, given[:3]), (of_nodes, given)):
            results = function(*variables)
            total = sum(r.sin().sum() for r in (results if isinstance(results, tuple) else (results,)))
            assert isinstance(total, Tensor)
            slopes = torch.autograd.grad(total, variables, create_graph=True)
            seconds = []
            for change in (lambda t: t.contiguous(), lambda t: t, lambda t: t.mT.contiguous().mT if t.dim() > 1 else t):
                along = [change(torch.ones((), dtype=slope.dtype).expand_as(slope)) for slope in slopes]
                seconds.append(torch.autograd.grad(slopes, variables, along, retain_graph=True))
            for other in seconds[1:]:
                for a, b in zip(other, seconds[0], strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)

    def test_by_forward_mode(self) -> None:
        for function, given in ((of_edges, stage()), (of_nodes, (*stage(), *additions()))):
            assert gradcheck(function, given, check_forward_ad=True, fast_mode=True)
            assert gradgradcheck(function, given, check_fwd_over_rev=True, fast_mode=True)

    def test_in_some_of_the_variables(self) -> None:
        """What needs no gradient gets none, and changes nobody else's, of either order."""
        # Wide enough for no groups to be joined.
        given = (*stage(16), *additions(16))
        everything = torch.autograd.grad(of_nodes(*given).sin().sum(), given)
        for position, variable in enumerate(given):
            others = [tensor.detach() for tensor in given]
            others[position] = variable
            for twice in (False, True):
                (slope,) = torch.autograd.grad(of_nodes(*others).sin().sum(), variable, create_graph=twice)
                torch.testing.assert_close(slope, everything[position], rtol=1e-9, atol=1e-9)
                assert slope.requires_grad == twice

    def test_forward_mode(self) -> None:
        weight, *matrices = stage()
        along = random(*weight.shape, seed=8).detach()
        with forward_ad.dual_level():
            results = of_edges(forward_ad.make_dual(weight, along), *matrices)
            tangents = [forward_ad.unpack_dual(result).tangent for result in results]
        step = 1e-6
        ahead, behind = (of_edges(weight + sign * step * along, *matrices) for sign in (1, -1))
        for tangent, a, b in zip(tangents, ahead, behind, strict=True):
            torch.testing.assert_close(tangent, (a - b) / (2 * step), rtol=1e-5, atol=1e-6)
