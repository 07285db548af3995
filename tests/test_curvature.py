from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nni_cream.curvature import dominant_eigenvalue
from tests.darts_reference import golden_search


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def quadratic(eigenvalues: Sequence[float], seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues, and eigenvectors in general position."""
    basis, _ = torch.linalg.qr(random(len(eigenvalues), len(eigenvalues), seed=seed))
    return basis @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.T


class TestQuadratic:
    @pytest.mark.parametrize(
        "eigenvalues",
        [
            (3.0, 1.0, 0.5, -0.2, 0.0, 0.3),
            # The largest, not the largest in magnitude.
            (2.0, 1.0, -50.0, -3.0, 0.1, 0.4),
            # Negative definite.
            (-0.5, -1.0, -2.0, -8.0, -3.0, -4.0),
            (-1000.0, -1e-3, -5.0, -1.0, -2.0, -7.0),
            (1e-6, 2e-6, 5e-6, 0.0, -1e-6, 3e-6),
            # Several alike.
            (2.0, 2.0, 2.0, 1.0, 1.0, 0.0),
        ],
    )
    def test_known_eigenvalue(self, eigenvalues: Sequence[float]) -> None:
        matrix = quadratic(eigenvalues)

        def loss(alphas: Sequence[Tensor]) -> Tensor:
            flat = torch.cat([alpha.flatten() for alpha in alphas])
            return flat @ matrix @ flat / 2 + flat.sum()

        result = dominant_eigenvalue(loss, [random(2, 2), random(2)])
        assert result == pytest.approx(max(eigenvalues), rel=1e-3, abs=1e-3 * 1e-6)

    def test_size_of_the_published_tables(self) -> None:
        eigenvalues = np.linspace(-1, 3, 2 * 14 * 8).tolist()
        matrix = quadratic(eigenvalues)

        def loss(alphas: Sequence[Tensor]) -> Tensor:
            flat = torch.cat([alpha.flatten() for alpha in alphas])
            return flat @ matrix @ flat / 2

        assert dominant_eigenvalue(loss, [random(14, 8), random(14, 8)]) == pytest.approx(3, rel=2e-3)

    def test_single_alpha(self) -> None:
        alpha = torch.tensor([0.5], dtype=torch.float64)
        assert dominant_eigenvalue(lambda alphas: (-(alphas[0] ** 4)).sum(), [alpha]) == pytest.approx(-12 * 0.25)

    def test_two_alphas(self) -> None:
        # x²·y at (1, 2): the Hessian is [[4, 2], [2, 0]].
        alphas = [torch.tensor([1.0], dtype=torch.float64), torch.tensor([2.0], dtype=torch.float64)]
        result = dominant_eigenvalue(lambda alphas: (alphas[0] ** 2 * alphas[1]).sum(), alphas)
        assert result == pytest.approx(2 + 8**0.5, rel=1e-3)

    def test_table_that_the_loss_does_not_use(self) -> None:
        def loss(alphas: Sequence[Tensor]) -> Tensor:
            return (alphas[0] ** 2).sum()

        assert dominant_eigenvalue(loss, [random(3), random(3)]) == pytest.approx(2, rel=1e-3)
        # Its curvature is 0, which is more than negative.
        assert dominant_eigenvalue(lambda alphas: -loss(alphas), [random(3), random(3)]) == pytest.approx(0, abs=1e-3)

    @pytest.mark.parametrize("size", [2, 30, 112])
    def test_few_different_eigenvalues(self, size: int) -> None:
        loss = lambda alphas: -(alphas[0] ** 2).sum()  # noqa: E731
        assert dominant_eigenvalue(loss, [random(size), random(size)]) == pytest.approx(0, abs=1e-6)

    def test_no_curvature_at_all(self) -> None:
        alphas, weights = [random(4, 1), random(3)], random(3)
        # What a softmax makes of single operations; a linear function; one that does not depend on α.
        assert dominant_eigenvalue(lambda alphas: alphas[0].softmax(-1).square().sum(), alphas) == 0
        assert dominant_eigenvalue(lambda alphas: alphas[1] @ weights, alphas) == 0
        assert dominant_eigenvalue(lambda alphas: weights.sum(), alphas) == 0


class TestNetwork:
    def loss(self, alphas: Sequence[Tensor]) -> Tensor:
        a, b = alphas[0].softmax(-1), alphas[1].softmax(-1)
        x = random(10, 4, seed=2)
        for row in a:
            x = row[0] * x.tanh() + row[1] * x.sin() + row[2] * (x @ random(4, 4, seed=3))
        logits = b[0] * x + b[1] * x**2
        return F.cross_entropy(logits, torch.arange(10) % 4)

    def test_torch_and_numpy(self) -> None:
        alphas = [random(3, 3, seed=4), random(2, seed=5)]

        def flat_loss(flat: Tensor) -> Tensor:
            return self.loss([flat[:9].view(3, 3), flat[9:]])

        hessian = torch.autograd.functional.hessian(flat_loss, torch.cat([alpha.flatten() for alpha in alphas]))
        eigenvalues = np.linalg.eigvalsh(hessian.numpy())
        assert eigenvalues[-1] > 0.1 > 0 > eigenvalues[0]
        assert dominant_eigenvalue(self.loss, alphas) == pytest.approx(eigenvalues[-1], rel=1e-3)
        assert dominant_eigenvalue(lambda a: -self.loss(a), alphas) == pytest.approx(-eigenvalues[0], rel=1e-3)

    def test_single_precision(self) -> None:
        alphas = [random(3, 3, seed=4), random(2, seed=5)]
        expected = dominant_eigenvalue(self.loss, alphas)

        def loss(alphas: Sequence[Tensor]) -> Tensor:
            assert alphas[0].dtype == torch.float32
            return self.loss([alpha.double() for alpha in alphas]).float()

        assert dominant_eigenvalue(loss, [alpha.float() for alpha in alphas]) == pytest.approx(expected, rel=2e-3)

    def test_changes_nothing_and_draws_nothing(self) -> None:
        alphas = [nn.Parameter(random(3, 3, seed=4)), nn.Parameter(random(2, seed=5))]
        alphas[0].grad = torch.ones(3, 3, dtype=torch.float64)
        before, state, numpy_state = copy.deepcopy(alphas), torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[union-attr,index]
        results = [dominant_eigenvalue(self.loss, alphas) for _ in range(2)]
        with torch.no_grad():
            results.append(dominant_eigenvalue(self.loss, alphas))
        assert results[0] == results[1] == results[2]
        assert torch.equal(torch.get_rng_state(), state)
        assert (np.random.get_state()[1] == numpy_state).all()  # type: ignore[index]
        assert all(torch.equal(a, b) for a, b in zip(alphas, before, strict=True))
        assert torch.equal(alphas[0].grad, torch.ones(3, 3, dtype=torch.float64))
        assert alphas[1].grad is None

    @pytest.mark.slow
    def test_supernet(self) -> None:
        search = golden_search("search_2_nodes.json")
        loss = search.loss("valid")
        sizes = [table.numel() for table in search.tables]

        def flat_loss(flat: Tensor) -> Tensor:
            pieces = flat.split(sizes)
            return loss(search.weights, [p.view(t.shape) for p, t in zip(pieces, search.tables, strict=True)])

        flat = torch.cat([table.detach().flatten() for table in search.tables])
        expected = np.linalg.eigvalsh(torch.autograd.functional.hessian(flat_loss, flat).numpy())[-1]
        result = dominant_eigenvalue(lambda alphas: loss(search.weights, alphas), search.tables)
        assert result == pytest.approx(expected, rel=1e-3)
