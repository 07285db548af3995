from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any, NamedTuple

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from nni_cream.architecture import CreamPath
from nni_cream.differentiation import without_weights
from nni_cream.models.cream import build_child
from nni_cream.models.darts_operations import build_operation
from nni_cream.supernet import depthwise_forms
from nni_cream.supernet.depthwise import DepthwiseConv2d, PointwiseConv2d, with_explicit_derivatives


class Case(NamedTuple):
    kernel: int
    stride: int
    padding: int
    dilation: int
    size: tuple[int, int]


CASES = [
    # Those of DARTS, on even and odd sizes.
    *(
        Case(kernel, stride, dilation * (kernel // 2), dilation, size)
        for kernel in (3, 5)
        for stride in (1, 2)
        for dilation in (1, 2)
        for size in ((8, 8), (7, 10))
    ),
    Case(7, 1, 3, 1, (8, 9)),
    Case(7, 2, 3, 1, (8, 9)),
    # More padding than the kernel reaches, none at all, strides that leave pixels over, larger strides and dilations.
    Case(5, 1, 5, 1, (6, 5)),
    Case(5, 1, 0, 1, (6, 8)),
    Case(5, 3, 1, 1, (12, 10)),
    Case(3, 4, 0, 3, (13, 14)),
    Case(3, 3, 4, 2, (9, 8)),
    Case(1, 2, 0, 1, (5, 6)),
    Case(2, 2, 0, 1, (7, 6)),
    # Planes that are smaller than the kernel.
    Case(3, 1, 1, 1, (2, 3)),
    Case(3, 2, 1, 1, (2, 3)),
    Case(5, 1, 2, 1, (4, 4)),
    Case(5, 2, 2, 1, (4, 3)),
    Case(7, 1, 3, 1, (3, 4)),
    Case(5, 2, 4, 2, (4, 3)),
]


def layers(case: Case, channels: int = 3) -> tuple[DepthwiseConv2d, nn.Conv2d]:
    """One of ours and one of torch, with the same weight."""
    torch.manual_seed(0)
    ours = DepthwiseConv2d(channels, case.kernel, case.stride, case.padding, case.dilation).double()
    theirs = nn.Conv2d(
        channels, channels, case.kernel, case.stride, case.padding, case.dilation, groups=channels, bias=False
    ).double()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def images(case: Case, channels: int = 3, number: int = 2, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(number, channels, *case.size, dtype=torch.float64, generator=generator)


def second_order(layer: nn.Conv2d, features: Tensor) -> list[Tensor]:
    """Value, gradients, and the gradients of a function of the gradients."""
    features = features.clone().requires_grad_()
    output = layer(features)
    first = torch.autograd.grad((output**3).sum(), [features, layer.weight], create_graph=True)
    # The sine of a large number is its rounding.
    second = torch.autograd.grad(sum((g / g.detach().abs().max()).sin().sum() for g in first), [features, layer.weight])
    return [output, *first, *second]


@pytest.mark.parametrize("case", CASES, ids=str)
class TestDerivatives:
    def test_torch(self, case: Case) -> None:
        ours, theirs = layers(case)
        for a, b in zip(*(second_order(layer, images(case)) for layer in (ours, theirs)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)

    def test_numbers(self, case: Case) -> None:
        case = case._replace(size=(case.size[0] - 1, case.size[1] - 2)) if case.padding else case
        ours, _ = layers(case, channels=2)
        features = images(case, channels=2, number=1).requires_grad_()

        def apply(features: Tensor, weight: Tensor) -> Tensor:
            ours.weight.requires_grad_(False)
            output: Tensor = torch.func.functional_call(ours, {"weight": weight}, (features,))
            return output

        weight = ours.weight.detach().clone().requires_grad_()
        assert gradcheck(apply, (features, weight), check_forward_ad=True, fast_mode=True)
        assert gradgradcheck(apply, (features, weight), check_fwd_over_rev=True, fast_mode=True)


LARGE = Case(5, 2, 4, 2, (7, 8))

# Weight gradients have ways of their own there, by kernel, dilation and size.
CHANNELS_LAST = (
    Case(5, 1, 2, 1, (6, 9)),
    Case(5, 2, 2, 1, (11, 12)),
    Case(5, 1, 2, 1, (5, 4)),
    Case(5, 1, 4, 2, (10, 12)),
    Case(5, 1, 4, 2, (8, 10)),
    Case(3, 1, 2, 2, (6, 8)),
    Case(3, 1, 2, 2, (6, 7)),
    Case(3, 2, 2, 2, (6, 8)),
    Case(7, 1, 3, 1, (8, 9)),
    Case(3, 1, 1, 1, (2, 2)),
    Case(3, 1, 1, 1, (1, 1)),
    Case(5, 1, 2, 1, (4, 4)),
    Case(5, 2, 2, 1, (4, 4)),
    Case(7, 2, 3, 1, (4, 3)),
    Case(5, 1, 4, 2, (4, 4)),
    Case(5, 1, 4, 2, (8, 8)),
)

# (case, channels last, how the weight gradient is computed there on a CPU).
WAYS = [
    (Case(3, 1, 1, 1, (3, 3)), True, ["torch"]),
    (Case(3, 2, 1, 1, (4, 4)), True, ["torch"]),
    (Case(3, 1, 1, 1, (3, 3)), False, ["torch"]),
    (Case(3, 1, 1, 1, (2, 2)), True, ["products"]),
    (Case(5, 1, 2, 1, (4, 4)), True, ["products"]),
    (Case(5, 1, 2, 1, (4, 4)), False, ["products"]),
    (Case(7, 2, 3, 1, (4, 4)), True, ["products"]),
    (Case(5, 1, 2, 1, (8, 8)), True, ["strips", "torch", "torch"]),
    (Case(5, 1, 2, 1, (8, 8)), False, ["planes"]),
    (Case(5, 2, 2, 1, (8, 8)), True, ["planes"]),
    (Case(7, 1, 3, 1, (8, 8)), True, ["planes"]),
    (Case(5, 1, 4, 2, (12, 12)), True, ["strips", "torch", "torch"]),
    (Case(5, 1, 4, 2, (4, 4)), True, ["products"]),
    (Case(5, 1, 4, 2, (8, 8)), True, ["planes"]),
    (Case(5, 2, 4, 2, (8, 8)), True, ["planes"]),
]


def ways_of(case: Case, channels_last: bool, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return which ways a backward pass goes to the gradient of the weight, one within the other."""
    taken = []
    for name in ("_torchs_weight_gradient", "_by_products", "_by_strips", "_by_planes"):
        compute = getattr(depthwise_forms, name)

        def spy(*arguments: Any, name: str = name, compute: Any = compute) -> Tensor:
            taken.append(name.removesuffix("_weight_gradient").strip("_").removeprefix("by_").removesuffix("s"))
            gradient: Tensor = compute(*arguments)
            return gradient

        monkeypatch.setattr(depthwise_forms, name, spy)
    ours, theirs = layers(case)
    given = images(case)
    ours(given.to(memory_format=torch.channels_last) if channels_last else given).square().sum().backward()
    theirs(given).square().sum().backward()
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-12, atol=1e-12)
    return taken


@pytest.mark.parametrize(("case", "channels_last", "expected"), WAYS, ids=str)
def test_the_way_to_a_weight_gradient(
    case: Case, channels_last: bool, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ways_of(case, channels_last, monkeypatch) == [name.removesuffix("s") for name in expected]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("kernel", "way", "bound"), [(5, "strip", "STRIPS"), (7, "plane", "PLANES")])
def test_a_large_weight_gradient_is_torchs(
    kernel: int, way: str, bound: str, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(kernel, stride, kernel // 2, 1, (14, 14))
    size = images(case).nbytes * (stride if way == "strip" else 1)
    monkeypatch.setattr(depthwise_forms, f"_LARGEST_{bound}", size)
    assert ways_of(case, True, monkeypatch)[0] == way
    monkeypatch.setattr(depthwise_forms, f"_LARGEST_{bound}", size - stride)
    assert ways_of(case, True, monkeypatch)[0] == "torch"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_low_precision_are_rounded_once(dtype: torch.dtype) -> None:
    case = Case(5, 1, 2, 1, (4, 4))
    ours, theirs = layers(case)
    features = images(case, number=64).to(dtype)
    ours.to(dtype)(features).sum().backward()
    theirs(features.double()).sum().backward()
    assert ours.weight.grad is not None
    assert ours.weight.grad.dtype == dtype
    torch.testing.assert_close(ours.weight.grad.double(), theirs.weight.grad, rtol=2 * torch.finfo(dtype).eps, atol=0.1)


class TestModes:
    def test_channels_last(self) -> None:
        for case in (LARGE, LARGE._replace(stride=1), Case(3, 1, 1, 1, (6, 6)), *CHANNELS_LAST):
            ours, theirs = layers(case)
            ours, theirs = ours.to(memory_format=torch.channels_last), theirs
            given = images(case).to(memory_format=torch.channels_last)
            for a, b in zip(second_order(ours, given), second_order(theirs, images(case)), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("needs", ["features", "weight"])
    def test_one_gradient_only(self, needs: str) -> None:
        ours, theirs = layers(LARGE)
        results = []
        for layer in (ours, theirs):
            features = images(LARGE).requires_grad_(needs == "features")
            layer.weight.requires_grad_(needs == "weight")
            layer(features).sum().backward()
            assert (features.grad is None) == (needs == "weight")
            assert (layer.weight.grad is None) == (needs == "features")
            results.append(features.grad if needs == "features" else layer.weight.grad)
        torch.testing.assert_close(results[0], results[1])

    @pytest.mark.parametrize("moving", ["features", "weight", "both"])
    def test_forward_mode(self, moving: str) -> None:
        for case in (LARGE, Case(3, 1, 1, 1, (6, 6))):
            ours, _ = layers(case)
            weight, by_weight = ours.weight.detach(), torch.randn_like(ours.weight)
            features, by_features = images(case), images(case, seed=2)
            with forward_ad.dual_level():
                x = features if moving == "weight" else forward_ad.make_dual(features, by_features)
                w = weight if moving == "features" else forward_ad.make_dual(weight, by_weight)
                output = torch.func.functional_call(ours, {"weight": w}, (x,))
                value, tangent = forward_ad.unpack_dual(output)

            def convolve(a: Tensor, b: Tensor, case: Case = case) -> Tensor:
                return F.conv2d(a, b, None, case.stride, case.padding, case.dilation, groups=3)

            expected = torch.zeros_like(value)
            if moving != "weight":
                expected += convolve(by_features, weight)
            if moving != "features":
                expected += convolve(features, by_weight)
            torch.testing.assert_close(value, convolve(features, weight))
            torch.testing.assert_close(tangent, expected)

    def test_single_precision(self) -> None:
        ours, theirs = layers(LARGE)
        single = second_order(ours.float(), images(LARGE).float())
        for a, b in zip(single, second_order(theirs, images(LARGE)), strict=True):
            assert a.dtype == torch.float32
            assert ((a - b).norm() / b.norm()).item() < 1e-5


@pytest.mark.parametrize("asked", ["both", "input", "weight"])
def test_on_another_device_torchs_own_gradients(asked: str) -> None:
    layer = DepthwiseConv2d(3, 5, 2, 2).to("meta")
    features = torch.empty(2, 3, 9, 7, device="meta", requires_grad=True)
    needed = {"both": [features, layer.weight], "input": [features], "weight": [layer.weight]}[asked]
    layer.weight.requires_grad_(asked != "input")
    features.requires_grad_(asked != "weight")
    found = torch.autograd.grad(layer(features).sum(), needed)
    assert [gradient.shape for gradient in found] == [variable.shape for variable in needed]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_pointwise_convolution_as_a_product(stride: int, bias: bool) -> None:
    torch.manual_seed(0)
    theirs = nn.Conv2d(5, 7, 1, stride, bias=bias).double()
    ours: Any = with_explicit_derivatives(copy.deepcopy(theirs))
    features = images(LARGE, channels=5).to(memory_format=torch.channels_last)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PointwiseConv2d, "forward", PointwiseConv2d.as_product)
        found = second_order(ours, features)
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    for a, b in zip(found, second_order(theirs, features), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("size", "channels_last", "product"),
    [((8, 8), True, True), ((8, 9), True, False), ((8, 8), False, False), ((1, 1), False, True)],
)
def test_where_a_pointwise_convolution_is_a_product_on_a_cpu(
    size: tuple[int, int], channels_last: bool, product: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    as_product = PointwiseConv2d.as_product

    def spy(self: PointwiseConv2d, features: Tensor) -> Tensor:
        calls.append(features.shape)
        return as_product(self, features)

    monkeypatch.setattr(PointwiseConv2d, "as_product", spy)
    features = torch.randn(2, 5, *size)
    layer = PointwiseConv2d(5, 7)
    output = layer(features.to(memory_format=torch.channels_last) if channels_last else features)
    assert bool(calls) == product
    torch.testing.assert_close(output, F.conv2d(features, layer.weight))


class TestReplacement:
    def test_depthwise_and_pointwise_convolutions_and_no_others(self) -> None:
        class Mine(nn.Conv2d):
            pass

        def build() -> nn.Sequential:
            torch.manual_seed(0)
            return nn.Sequential(
                nn.Conv2d(4, 4, 5, 2, 2, groups=4, bias=False),
                nn.ReLU(),
                nn.Conv2d(4, 4, 1, bias=False),
                nn.Sequential(
                    nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4, bias=False),
                    nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False),
                    nn.Conv2d(4, 8, 3, padding=1, groups=4, bias=False),
                    nn.Conv2d(8, 1, 1, bias=False),
                    nn.Conv2d(1, 1, 3, padding=1, groups=1, bias=False),
                    nn.Conv2d(1, 4, 1, bias=False),
                ),
                Mine(4, 4, 3, groups=4, bias=False),
                nn.Conv2d(4, 4, 1, groups=4, bias=True),
                nn.Conv2d(4, 4, (1, 3), padding=1, groups=4, bias=False),
                nn.Conv2d(4, 4, 3, (1, 2), padding=1, groups=4, bias=False),
                nn.Conv2d(4, 4, 3, padding=(1, 2), groups=4, bias=False),
                nn.Conv2d(4, 4, 3, padding=2, dilation=(1, 2), groups=4, bias=False),
                nn.Conv2d(4, 4, 3, padding="same", groups=4, bias=False),
                nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False, padding_mode="circular"),
                nn.Conv2d(4, 6, 1, 2, bias=False),
                nn.Conv2d(6, 4, 1),
                nn.Conv2d(4, 4, 1, padding=1, bias=False),
                nn.Conv2d(4, 4, 1, (1, 2), bias=False),
                nn.Conv2d(4, 4, 1, groups=2, bias=False),
            ).double()

        before, network = build(), build()
        parameters = dict(network.named_parameters())
        assert with_explicit_derivatives(network) is network
        kinds: list[Any] = [DepthwiseConv2d, PointwiseConv2d]
        depthwise, pointwise = (
            [name for name, module in network.named_modules() if isinstance(module, kind)] for kind in kinds
        )
        assert depthwise == ["0", "3.0"]
        assert pointwise == ["2", "3.3", "3.5", "12", "13", "15"]
        replaced = depthwise + pointwise
        for (name, module), (_, old) in zip(network.named_modules(), before.named_modules(), strict=True):
            assert name in replaced or type(module) is type(old)
        # The very parameters, under the names that they had.
        after = dict(network.named_parameters())
        assert list(after) == list(parameters)
        assert all(after[name] is parameters[name] for name in after)
        assert list(network.state_dict()) == list(before.state_dict())
        x = torch.randn(2, 4, 24, 24, dtype=torch.float64)
        torch.testing.assert_close(network(x), before(x))

    @pytest.mark.parametrize("stride", [1, 2])
    @pytest.mark.parametrize("name", ["sep_conv_3x3", "sep_conv_5x5", "sep_conv_7x7", "dil_conv_3x3", "dil_conv_5x5"])
    def test_operations_of_darts(self, name: str, stride: int) -> None:
        torch.manual_seed(0)
        before: Any = build_operation(name, 4, stride, affine=False).double()
        after: Any = with_explicit_derivatives(copy.deepcopy(before))
        depthwise = [m for m in after.modules() if isinstance(m, DepthwiseConv2d)]
        assert len(depthwise) == (2 if name.startswith("sep") else 1)
        results = []
        for operation in (before, after):
            x = torch.randn(
                2, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
            ).requires_grad_()
            output = operation(x)
            weights = list(operation.parameters())
            first = torch.autograd.grad((output**3).sum(), [x, *weights], create_graph=True)
            second = torch.autograd.grad(sum((g**2).sum() for g in first), [x, *weights])
            results.append([output, *first, *second])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)

    def test_a_hook_stays(self) -> None:
        network = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4, bias=False))
        shapes = []
        network[0].register_forward_hook(lambda layer, given, output: shapes.append(output.shape))
        with_explicit_derivatives(network)(torch.zeros(1, 4, 5, 5))
        assert type(network[0]) is DepthwiseConv2d
        assert shapes == [(1, 4, 3, 3)]

    # At these resolutions planes are smaller than kernels from the third and from the fifth stage on.
    @pytest.mark.parametrize("resolution", [32, 64])
    def test_networks_of_cream(self, resolution: int) -> None:
        torch.manual_seed(0)
        before = build_child(CreamPath.parse("[0] [0] [1,4] [2,5] [5,0] [2] [0]"), num_classes=5).double()
        before.to(memory_format=torch.channels_last)
        after: Any = with_explicit_derivatives(copy.deepcopy(before))
        kinds = [type(module) for module in after.modules() if isinstance(module, nn.Conv2d)]
        # The others are the stem's and the last stage's.
        assert kinds.count(DepthwiseConv2d) == 9
        assert kinds.count(nn.Conv2d) == 1
        x = torch.randn(6, 3, resolution, resolution, dtype=torch.float64)
        for network in (before, after):
            network(x).square().sum().backward()
        gradients = [torch.cat([p.grad.flatten() for p in network.parameters()]) for network in (before, after)]
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12 * gradients[0].abs().max().item())

    def test_a_copy_is_another_layer(self) -> None:
        ours, theirs = layers(LARGE)
        twin = copy.deepcopy(ours)
        with torch.no_grad():
            ours.weight.zero_()
        torch.testing.assert_close(twin(images(LARGE)), theirs(images(LARGE)))


def test_without_weights() -> None:
    case = Case(5, 1, 2, 1, (8, 8))
    layer, _ = layers(case)
    features = images(case).requires_grad_()
    (expected,) = torch.autograd.grad(layer(features).sin().sum(), features)
    with without_weights():
        slopes = torch.autograd.grad(layer(features).sin().sum(), [features, layer.weight], allow_unused=True)
    assert torch.equal(slopes[0], expected)
    assert slopes[1] is None
    # Of a gradient likewise: it was recorded outside.
    given, weight = torch.autograd.grad(layer(features).sin().sum(), [features, layer.weight], create_graph=True)
    everything = given.square().sum() + weight.square().sum()
    (expected,) = torch.autograd.grad(everything, features, retain_graph=True)
    with without_weights():
        torch.testing.assert_close(torch.autograd.grad(everything, features)[0], expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "built",
    [
        "FactorizedReduce(channels, 4, affine=True)",
        "with_explicit_derivatives(torch.nn.Conv2d(channels, 4, 1, stride=2))",
    ],
)
def test_a_reduction_of_few_channels_overwrites_no_memory(built: str) -> None:
    """As torch does where a 1×1 convolution has stride 2; in a process of its own, which would not survive it."""
    program = f"""
import torch
from nni_cream.models.darts_operations import FactorizedReduce
from nni_cream.supernet.depthwise import with_explicit_derivatives

kept = []
for repetition in range(50):
    for channels in (1, 2, 4, 6, 7):
        operation = {built}.to(memory_format=torch.channels_last)
        features = torch.randn(8, channels, 12, 12).to(memory_format=torch.channels_last)
        operation(features).square().sum().backward()
        kept += [torch.ones(17 + repetition) for _ in range(10)]
assert all((tensor == 1).all() for tensor in kept)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
