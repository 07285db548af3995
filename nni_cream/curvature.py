"""The curvature of the validation loss in α, whose sharp rise announces that a DARTS search collapses.

Source: Zela et al., "Understanding and Robustifying Differentiable Architecture Search", ICLR 2020, section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from nni_cream.differentiation import without_weights

_TOLERANCE: Final = 1e-3


def dominant_eigenvalue(loss: Callable[[Sequence[Tensor]], Tensor], alphas: Sequence[Tensor]) -> float:
    """Return the largest eigenvalue of ∇²α L, by Lanczos iteration on exact Hessian-vector products.

    Args:
        loss: L, a scalar function of α.
        alphas: where; they are not changed.
    """
    variables = [alpha.detach().requires_grad_() for alpha in alphas]
    with torch.enable_grad(), without_weights():
        value = loss(variables)
        if not value.requires_grad:
            return 0.0
        gradients = torch.autograd.grad(value, variables, create_graph=True, allow_unused=True, materialize_grads=True)
    # The others are constant.
    varying = [number for number, gradient in enumerate(gradients) if gradient.requires_grad]
    if not varying:
        return 0.0
    sizes = [alpha.numel() for alpha in alphas]

    def product(vector: NDArray[np.float64]) -> NDArray[np.float64]:
        pieces = torch.from_numpy(np.asarray(vector, dtype=np.float64).reshape(-1)).split(sizes)
        directions = [piece.view(a.shape).to(a) for piece, a in zip(pieces, alphas, strict=True)]
        with without_weights():
            rows = torch.autograd.grad(
                [gradients[number] for number in varying],
                variables,
                [directions[number] for number in varying],
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
        flat: NDArray[np.float64] = torch.cat([row.flatten() for row in rows]).double().cpu().numpy()
        return flat

    size = sum(sizes)
    if size == 1:
        return float(product(np.ones(1))[0])
    # Fixed, and drawn without touching anybody's random numbers. Not all ones: a softmax does not see a shift, so that
    # direction has curvature 0.
    start = np.random.default_rng(0).standard_normal(size)
    along = product(start)
    if not along.any():
        # Such as that of a single operation, whose weight is 1 whatever α is; Lanczos has nothing to begin with.
        return 0.0
    operator = LinearOperator((size, size), matvec=product, dtype=np.float64)
    (largest,) = eigsh(operator, k=1, which="LA", v0=start, tol=_TOLERANCE, return_eigenvectors=False)
    if largest < (start @ along) / (start @ start):
        # Less than the curvature along the start: of a Hessian with few different eigenvalues ARPACK can miss some.
        hessian = np.stack([product(row) for row in np.eye(size)])
        largest = np.linalg.eigvalsh((hessian + hessian.T) / 2)[-1]
    return float(largest)
