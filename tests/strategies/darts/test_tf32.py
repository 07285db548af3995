"""A step of DARTS computes in float32, also where torch would take TF32 for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.strategies.darts.searches import Classifier, Search, two_nodes
from tests.strategies.running import SMALL_RUNS

pytestmark = SMALL_RUNS


def allowed() -> tuple[bool, bool]:
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("settings", [{}, {"order": "first"}, {"hypergradient": "finite_difference"}], ids=str)
def test_no_pass_of_a_step_may_use_it(
    settings: dict[str, Any], run: Callable[..., Search], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = allowed()
    assert before[0]
    seen: list[tuple[bool, bool]] = []

    class Watched(Classifier):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if torch.is_grad_enabled():
                seen.append(allowed())
            return super().forward(images)

    gradients = torch.autograd.grad

    def grad(*arguments: Any, **named: Any) -> Any:
        seen.append(allowed())
        return gradients(*arguments, **named)

    monkeypatch.setattr(torch.autograd, "grad", grad)
    Search(two_nodes, epochs=1, classifier=Watched(), eigenvalue="track", **settings).run()
    assert len(seen) > 10
    assert set(seen) == {(False, False)}
    assert allowed() == before
