from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from nni_cream.tf32 import without_tf32

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]


def allowed() -> tuple[bool, bool]:
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


@pytest.fixture(params=[(True, True), (True, False), (False, True)])
def before(request: pytest.FixtureRequest) -> Iterator[tuple[bool, bool]]:
    default = allowed()
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = request.param
    yield request.param
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = default


def test_it_is_off_inside_and_as_before_afterwards(before: tuple[bool, bool]) -> None:
    with without_tf32():
        assert allowed() == (False, False)
    assert allowed() == before
    with pytest.raises(ValueError, match="inside"), without_tf32():
        raise ValueError("inside")
    assert allowed() == before


@pytest.mark.parametrize("device", DEVICES)
def test_a_convolution_is_of_float32(device: str) -> None:
    torch.manual_seed(0)
    features, weight = torch.randn(4, 16, 16, 16), torch.randn(16, 16, 3, 3)
    with without_tf32():
        found = torch.nn.functional.conv2d(features.to(device), weight.to(device), padding=1).cpu()
    expected = torch.nn.functional.conv2d(features.double(), weight.double(), padding=1)
    assert ((found - expected).norm() / expected.norm()).item() < 1e-5
