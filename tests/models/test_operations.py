from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nni_cream.models.operations import DilConv
from tests.reference import apply_rule, standard_normal


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5])
def test_dil_conv_is_a_large_kernel_with_holes(kernel: int, stride: int) -> None:
    operation = DilConv(4, 6, kernel, stride).double().eval()
    apply_rule(operation)
    features = standard_normal(1, 2, 4, 11, 11)

    state = operation.state_dict()
    assert list(state)[:3] == ["op.1.weight", "op.2.weight", "op.3.weight"]
    wide = torch.zeros(4, 1, 2 * kernel - 1, 2 * kernel - 1, dtype=torch.float64)
    wide[:, :, ::2, ::2] = state["op.1.weight"]
    expected = F.conv2d(features.clamp(min=0), wide, stride=stride, padding=kernel - 1, groups=4)
    expected = torch.einsum("oi,nihw->nohw", state["op.2.weight"][:, :, 0, 0], expected)
    mean, var, scale, shift = (
        state[f"op.3.{name}"].view(-1, 1, 1) for name in ("running_mean", "running_var", "weight", "bias")
    )
    expected = (expected - mean) / (var + 1e-5).sqrt() * scale + shift

    before = features.clone()
    torch.testing.assert_close(operation(features), expected, rtol=0, atol=1e-12)
    assert torch.equal(features, before)
    assert expected.shape == (2, 6, 11, 11) if stride == 1 else (2, 6, 6, 6)
