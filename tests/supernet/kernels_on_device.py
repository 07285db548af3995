"""The kernels for GPUs: on a GPU where there is one, in Triton's interpreter elsewhere.

No test of this name is collected by itself: ``test_triton_kernels.py`` starts it in a process that has Triton.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nni_cream.supernet import depthwise_forms, kernels, matrices, triton_kernels
from tests.supernet.test_depthwise import Case, images, layers, second_order
from tests.supernet.test_fused_cell import assert_cells_agree, pair

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
WHOLE = (torch.float64, torch.float32)
CASES = [
    Case(3, 1, 2, 2, (6, 7)),
    Case(5, 1, 4, 2, (8, 8)),
    Case(3, 2, 2, 2, (7, 8)),
    Case(5, 2, 4, 2, (8, 7)),
    Case(3, 3, 4, 2, (9, 8)),
    Case(5, 1, 2, 1, (6, 6)),
    Case(2, 2, 0, 1, (7, 6)),
]


@pytest.fixture(autouse=True)
def used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let kernels be used on a CPU as well; collects the names of those that are."""
    calls: list[str] = []

    class Noted:
        def __getattr__(self, name: str) -> Any:
            calls.append(name)
            return getattr(triton_kernels, name)

    def kernels_for(*tensors: Tensor) -> Any:
        differentiable = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        return None if differentiable or tensors[0].device.type != DEVICE else Noted()

    monkeypatch.setattr(depthwise_forms, "kernels_for", kernels_for)
    monkeypatch.setattr(matrices, "kernels_for", kernels_for)
    return calls


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    """Compare with double precision."""
    assert ours.shape == theirs.shape
    apart = (ours.double().cpu() - theirs.cpu()).norm() / theirs.cpu().norm()
    assert apart.item() < TOLERANCES[ours.dtype]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_depthwise_convolutions(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if case.size == (8, 8):
        # Several lines for every program.
        monkeypatch.setattr(triton_kernels, "_PROGRAMS", 3)
    channels, kernel = 18, (case.kernel, case.kernel)
    stride, padding, dilation = ((number, number) for number in (case.stride, case.padding, case.dilation))
    features = images(case, channels).to(dtype).double().requires_grad_()
    weight = torch.randn(channels, 1, *kernel).to(dtype).double().requires_grad_()
    output = F.conv2d(features, weight, None, stride, padding, dilation, groups=channels)
    grad = torch.randn(output.shape).to(dtype).double()
    by_features, by_weight = torch.autograd.grad(output, (features, weight), grad)
    x, w, g = (tensor.detach().to(DEVICE, dtype) for tensor in (features, weight, grad))
    found = triton_kernels.convolve(x, w, output.shape[2:], stride, padding, dilation, False)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert_close(found, output.detach())
    assert_close(triton_kernels.convolve(g, w, case.size, stride, padding, dilation, True), by_features)
    assert_close(triton_kernels.weight_gradient(x, g, kernel, stride, padding, dilation), by_weight)


@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_derivatives(case: Case, used: list[str]) -> None:
    ours, theirs = layers(case)
    expected = second_order(theirs, images(case))
    given = images(case).to(DEVICE, memory_format=torch.channels_last)
    for a, b in zip(second_order(ours.to(DEVICE), given), expected, strict=True):
        assert_close(a.detach(), b.detach())
    assert set(used) == {"convolve", "weight_gradient"}


def test_torchs_own_where_nothing_is_dilated(used: list[str]) -> None:
    case = Case(3, 1, 1, 1, (5, 6))
    ours, _ = layers(case)
    second_order(ours.to(DEVICE), images(case).to(DEVICE))
    assert used == []


@pytest.mark.parametrize("dtype", WHOLE, ids=str)
@pytest.mark.parametrize(("groups", "left", "right"), [(1, 16, 16), (3, 16, 20), (2, 70, 9), (4, 33, 64)])
def test_cross_products(groups: int, left: int, right: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    first = torch.randn(300, groups * left + 3).to(dtype)[:, 3:]
    second = torch.randn(300, groups * right).to(dtype)
    expected = matrices._grouped(first.double().contiguous(), groups).transpose(1, 2) @ matrices._grouped(
        second.double(), groups
    )
    assert_close(triton_kernels.cross_product(first.to(DEVICE), second.to(DEVICE), groups), expected)
    # As torch gives the gradient of a sum.
    same = torch.ones(1, dtype=dtype).expand(300, groups * right)
    expected = matrices._grouped(first.double().contiguous(), groups).sum(1)[:, :, None].expand(-1, -1, right)
    assert_close(triton_kernels.cross_product(first.to(DEVICE), same.to(DEVICE), groups), expected)


@pytest.mark.parametrize("dtype", WHOLE, ids=str)
def test_sums_of_columns(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernels, "_PROGRAMS", 3)
    torch.manual_seed(0)
    matrix = torch.randn(300, 40).to(dtype)[:, 5:]
    exact = matrix.double()
    given = matrix.to(DEVICE)
    assert_close(matrices.column_sums(given), exact.sum(0))
    for found, expected in zip(
        matrices.column_sums_and_squares(given), (exact.sum(0), exact.square().sum(0)), strict=True
    ):
        assert_close(found, expected)


def test_a_sum_that_is_differentiated_is_torchs() -> None:
    matrix = torch.randn(4, 3, device=DEVICE, requires_grad=True)
    (slope,) = torch.autograd.grad((matrices.column_sums(matrix) ** 2).sum(), matrix)
    torch.testing.assert_close(slope, (2 * matrix.detach().sum(0)).expand(4, 3))


def test_operations_are_counted_as_those_of_torch() -> None:
    case, channels = Case(5, 2, 4, 2, (8, 7)), 6
    features, weight = (
        torch.randn(2, channels, *case.size, device=DEVICE),
        torch.randn(channels, 1, 5, 5, device=DEVICE),
    )
    arguments = ((2, 2), (4, 4), (2, 2))
    with FlopCounterMode(display=False) as torchs:
        output = F.conv2d(features, weight, None, *arguments, groups=channels)
    with FlopCounterMode(display=False) as forward:
        triton_kernels.convolve(features, weight, output.shape[2:], *arguments, False)
    with FlopCounterMode(display=False) as by_input:
        triton_kernels.convolve(output, weight, case.size, *arguments, True)
    with FlopCounterMode(display=False) as by_weight:
        triton_kernels.weight_gradient(features, output, (5, 5), *arguments)
    counts = [mode.get_total_flops() for mode in (torchs, forward, by_input, by_weight)]
    assert set(counts) == {2 * output.numel() * 25}
    matrix = torch.randn(50, 12, device=DEVICE)
    with FlopCounterMode(display=False) as mode:
        triton_kernels.cross_product(matrix, matrix, 3)
    assert mode.get_total_flops() == 2 * 50 * 3 * 4 * 4


@pytest.mark.parametrize("position", [0, 1], ids=["normal", "reduction"])
def test_a_fused_cell(position: int, used: list[str]) -> None:
    textbook, fused = pair(nodes=1)
    assert_cells_agree(textbook, fused, position, size=4, device=DEVICE)
    assert set(used) == {"convolve", "weight_gradient", "cross_product", "column_sums"}


def test_they_are_for_gpus() -> None:
    features = torch.ones(2, 3, device=DEVICE)
    assert kernels.kernels_for(features) is (triton_kernels if DEVICE == "cuda" else None)
    assert kernels.are_there_kernels_for(features) == (DEVICE == "cuda")
    assert kernels.kernels_for(features.clone().requires_grad_()) is None
