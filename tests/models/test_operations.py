from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from nni_cream.models.operations import AveragePool, DilConv
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


DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stride", [1, 2])
def test_every_average_goes_back_to_what_it_is_of(stride: int, device: str) -> None:
    """torch's own pool forgets the padding there, on CUDA and channels last (pytorch/pytorch#188344)."""
    features = standard_normal(1, 2, 3, 6, 8).to(device, memory_format=torch.channels_last).requires_grad_()
    averages = AveragePool(3, stride, padding=1, count_include_pad=False)(features)
    weights = torch.arange(averages[0].numel(), dtype=features.dtype).view(averages.shape[1:])
    (slope,) = torch.autograd.grad((averages * weights.to(device)).sum(), features)

    expected = torch.zeros(features.shape, dtype=features.dtype)
    value = torch.zeros(averages.shape, dtype=features.dtype)
    given = features.detach().cpu()
    for y, x in itertools.product(*(range(size) for size in averages.shape[2:])):
        rows, columns = (slice(max(0, stride * i - 1), stride * i + 2) for i in (y, x))
        window = given[:, :, rows, columns]
        value[:, :, y, x] = window.mean((2, 3))
        expected[:, :, rows, columns] += (weights[:, y, x] / window[0, 0].numel())[None, :, None, None]
    torch.testing.assert_close(averages.detach().cpu(), value, rtol=0, atol=1e-12)
    torch.testing.assert_close(slope.cpu(), expected, rtol=0, atol=1e-12)


def test_an_average_elsewhere_than_on_a_cpu_is_not_of_channels_last() -> None:
    features = torch.empty(2, 3, 6, 8, device="meta").to(memory_format=torch.channels_last)
    assert AveragePool(3, 1, padding=1)(features).is_contiguous()
    kept = AveragePool(3, 1, padding=1)(torch.ones(2, 3, 6, 8).to(memory_format=torch.channels_last))
    assert kept.is_contiguous(memory_format=torch.channels_last)
