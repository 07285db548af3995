from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from nni_cream.tf32 import without_tf32

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]
HAS_NEW_NAMES = hasattr(torch.backends.cuda.matmul, "fp32_precision")


def allow(convolutions: bool, products: bool) -> None:
    torch.backends.cudnn.allow_tf32 = convolutions
    torch.backends.cuda.matmul.allow_tf32 = products


def by_new_names(precision: str) -> None:
    backends: Any = torch.backends
    backends.cudnn.conv.fp32_precision = backends.cuda.matmul.fp32_precision = precision


# What somebody may have asked torch for before.
STATES: dict[str, Callable[[], Any]] = {
    "as it is": lambda: None,
    "both": lambda: allow(True, True),
    "products alone": lambda: allow(False, True),
    "none": lambda: allow(False, False),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
}
if HAS_NEW_NAMES:
    STATES["new names"] = lambda: by_new_names("tf32")


def settings() -> list[Any]:
    """All that torch can be asked; where it refuses to answer, that."""
    backends: Any = torch.backends
    questions: list[Callable[[], Any]] = [
        torch.get_float32_matmul_precision,
        lambda: backends.cudnn.allow_tf32,
        lambda: backends.cuda.matmul.allow_tf32,
    ]
    if HAS_NEW_NAMES:
        questions += [
            lambda: backends.fp32_precision,
            lambda: backends.cuda.matmul.fp32_precision,
            lambda: backends.cudnn.conv.fp32_precision,
            lambda: backends.cudnn.rnn.fp32_precision,
        ]
    answers: list[Any] = []
    for question in questions:
        try:
            answers.append(question())
        except RuntimeError:
            answers.append(RuntimeError)
    return answers


@pytest.fixture(params=STATES)
def before(request: pytest.FixtureRequest) -> Iterator[list[Any]]:
    default = settings()
    STATES[request.param]()
    yield settings()
    if HAS_NEW_NAMES:
        by_new_names("none")
    torch.set_float32_matmul_precision("highest")
    allow(True, False)
    assert settings()[:3] == default[:3]


def test_it_is_off_inside_and_all_is_as_before_afterwards(before: list[Any]) -> None:
    backends: Any = torch.backends
    with without_tf32():
        if HAS_NEW_NAMES:
            assert "tf32" not in (backends.fp32_precision, backends.cudnn.conv.fp32_precision)
            assert backends.cuda.matmul.fp32_precision != "tf32"
        if before[0] is not RuntimeError:
            # Who has used the older names goes on to read them.
            assert (backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32) == (False, False)
    assert settings() == before
    with pytest.raises(ValueError, match="inside"), without_tf32():
        raise ValueError("inside")
    assert settings() == before


@pytest.mark.parametrize("device", DEVICES)
def test_numbers_are_of_float32(device: str, before: list[Any]) -> None:
    torch.manual_seed(0)
    features, weight = torch.randn(4, 16, 16, 16), torch.randn(16, 16, 3, 3)
    matrices = torch.randn(2, 64, 64)
    with without_tf32():
        found = torch.nn.functional.conv2d(features.to(device), weight.to(device), padding=1).cpu()
        product = (matrices[0].to(device) @ matrices[1].to(device)).cpu()
    if device == "cuda":
        # On a CPU, "medium" is bfloat16, which is none of ours.
        torch.testing.assert_close(product.double(), matrices[0].double() @ matrices[1].double(), rtol=1e-4, atol=1e-4)
    expected = torch.nn.functional.conv2d(features.double(), weight.double(), padding=1)
    assert ((found - expected).norm() / expected.norm()).item() < 1e-5
