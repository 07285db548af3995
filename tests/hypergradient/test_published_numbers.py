"""Hypergradients beside the numbers of the published code, and beside a formula."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from nni_cream.hypergradient import (
    PUBLISHED_RADIUS,
    Hypergradient,
    ParameterStep,
    exact,
    finite_difference,
    first_order,
    sgd_step,
)
from tests.darts_reference import GoldenSearch, golden_search
from tests.hypergradient.losses import SECOND_ORDER, Quadratic, assert_close, flat


@pytest.fixture(
    scope="module", params=["search_2_nodes.json", pytest.param("search_4_nodes.json", marks=pytest.mark.slow)]
)
def search(request: pytest.FixtureRequest) -> GoldenSearch:
    return golden_search(request.param)


class TestPublishedNumbers:
    def tables(self, search: GoldenSearch, numbers: dict[str, Any]) -> list[Tensor]:
        return [torch.tensor(numbers[kind], dtype=torch.float64) for kind in search.alphas]

    def test_first_order(self, search: GoldenSearch) -> None:
        result = first_order(search.loss("train"), search.loss("valid"), search.weights, search.tables, ())
        assert_close(result.gradients, self.tables(search, search.data["first_order"]), 1e-9)
        assert result.valid_loss.item() == pytest.approx(search.data["valid_loss_train_mode"], abs=1e-12)
        assert_close(result.implicit, [torch.zeros_like(table) for table in search.tables], 0)

    @pytest.mark.parametrize("momentum_buffers", [False, True])
    def test_second_order(self, search: GoldenSearch, momentum_buffers: bool) -> None:
        expected = search.data["with_momentum_buffer" if momentum_buffers else "no_momentum_buffer"]
        step = sgd_step(search.sgd(momentum_buffers=momentum_buffers), search.weights)
        given = search.loss("train"), search.loss("valid"), search.weights, search.tables, step
        results = {"exact": exact(*given), "finite_difference": finite_difference(*given)}
        for name, result in results.items():
            assert_close(result.gradients, self.tables(search, expected[name]), 1e-9)
            assert result.valid_loss.item() == pytest.approx(expected["unrolled_valid_loss"], abs=1e-12)
        a, b = (flat(results[name].gradients) for name in ("exact", "finite_difference"))
        relative = ((a - b).norm() / a.norm()).item()
        assert relative == pytest.approx(expected["relative_difference_of_the_two"], rel=1e-6)
        # The rest is the same in both: they differ in the implicit term alone.
        direct = [flat(r.gradients) - flat(r.implicit) for r in results.values()]
        torch.testing.assert_close(*direct, rtol=0, atol=1e-14)

    def test_the_published_radius(self, search: GoldenSearch) -> None:
        assert search.data["hyperparameters"]["finite_difference_r"] == PUBLISHED_RADIUS


class TestClosedForm:
    @SECOND_ORDER
    @pytest.mark.parametrize("with_buffers", [False, True])
    def test_groups_with_momentum_and_weight_decay(
        self, method: Callable[..., Hypergradient], with_buffers: bool
    ) -> None:
        case = Quadratic()
        plain: dict[str, Any] = {"lr": 0.2, "momentum": 0.9, "nesterov": False, "weight_decay": 0.3}
        nesterov: dict[str, Any] = {"lr": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 0.2}
        optimizer = torch.optim.SGD(
            [{"params": [case.weights[1]], **nesterov}, {"params": [case.weights[0]], **plain}], lr=1
        )
        if with_buffers:
            for weight, buffer in zip(case.weights, case.buffers, strict=True):
                optimizer.state[weight]["momentum_buffer"] = buffer
        m = case.buffers if with_buffers else [torch.zeros(3), torch.zeros(3)]
        w = [weight.detach() for weight in case.weights]
        g = [case.a[k] * w[k] + case.alphas[k] for k in range(2)]
        after = [
            w[0] - 0.2 * (0.9 * m[0] + g[0] + 0.3 * w[0]),
            w[1] - 0.1 * (g[1] + 0.2 * w[1] + 0.8 * (0.8 * m[1] + g[1] + 0.2 * w[1])),
        ]
        direct = [case.c[k] * case.alphas[k] for k in range(2)]
        slopes = [case.b[k] * (after[k] - case.t[k]) for k in range(2)]
        implicit = [-0.2 * slopes[0], -0.1 * 1.8 * slopes[1]]

        step = sgd_step(optimizer, case.weights)
        result = method(case.train_loss, case.valid_loss, case.weights, case.alphas, step)
        # The training gradient is linear in w, so the central difference is exact as well, but for rounding.
        tolerance = 1e-14 if method is exact else 1e-11
        assert_close(result.implicit, implicit, tolerance)
        assert_close(result.gradients, [a + b for a, b in zip(direct, implicit, strict=True)], tolerance)
        torch.testing.assert_close(result.valid_loss, case.valid_loss(after, case.alphas))

    def test_first_order_takes_no_step(self) -> None:
        case = Quadratic()

        def never(weights: Sequence[Tensor], alphas: Sequence[Tensor]) -> Tensor:
            raise AssertionError

        result = first_order(never, case.valid_loss, case.weights, case.alphas, ())
        assert_close(result.gradients, [case.c[k] * case.alphas[k] for k in range(2)], 1e-14)
        torch.testing.assert_close(result.valid_loss, case.valid_loss(case.weights, case.alphas).detach())

    @pytest.mark.parametrize(("radius", "sign"), [(0.01, 1), (0.5, 1), (0.5, -1)])
    def test_radius_is_how_far_the_weights_move(self, radius: float, sign: int) -> None:
        # L_train = α·w³: the central difference of w³ over ±r is 3·w² + r².
        w, alpha, lr = 0.7, -0.4, 0.3
        after = w - lr * alpha * 3 * w**2
        slope = sign * 2 * after

        def train_loss(weights: Sequence[Tensor], alphas: Sequence[Tensor]) -> Tensor:
            return (alphas[0] * weights[0] ** 3).sum()

        def valid_loss(weights: Sequence[Tensor], alphas: Sequence[Tensor]) -> Tensor:
            return sign * (weights[0] ** 2).sum()

        given = (
            train_loss,
            valid_loss,
            [torch.tensor([w], dtype=torch.float64)],
            [torch.tensor([alpha], dtype=torch.float64)],
            [ParameterStep(lr, 0.0, 0.0, None)],
        )
        (implicit,) = finite_difference(*given, radius=radius).implicit
        assert implicit.item() == pytest.approx(-lr * slope * (3 * w**2 + radius**2), rel=1e-9)
        assert exact(*given).implicit[0].item() == pytest.approx(-lr * slope * 3 * w**2, rel=1e-12)
        if radius == PUBLISHED_RADIUS:
            assert_close(finite_difference(*given).implicit, [implicit], 0)
