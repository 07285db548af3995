from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nni_cream.errors import UserError
from nni_cream.genotype import PUBLISHED_GENOTYPES
from nni_cream.models import darts_operations
from nni_cream.models.darts_operations import (
    OPERATIONS,
    PAPER_OPERATIONS,
    FactorizedReduce,
    ReLUConvBN,
    build_candidate,
    build_operation,
    build_searched,
    register_edge_operation,
)
from nni_cream.models.operations import AveragePool
from tests.reference import apply_rule, golden, standard_normal

CHANNELS = 4


def features(size: int = 8) -> Tensor:
    return standard_normal(1, 2, CHANNELS, size, size)


def with_weights(operation: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    operation = operation.double().eval()
    apply_rule(operation)
    return operation, operation.state_dict()


def normalized(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    mean, var, scale, shift = (
        state[f"{name}.{part}"].view(-1, 1, 1) for part in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (var + 1e-5).sqrt() * scale + shift


def mixed(x: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("oi,nihw->nohw", weight[:, :, 0, 0], x)


def windows(x: Tensor, kernel: tuple[int, int], stride: int, padding_value: float) -> Tensor:
    """All windows of every channel, [N, C, H', W', kernel height, kernel width]."""
    (height, width) = (kernel[0] // 2, kernel[1] // 2)
    padded = F.pad(x, (width, width, height, height), value=padding_value)
    return padded.unfold(2, kernel[0], stride).unfold(3, kernel[1], stride)


def same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_the_paper_searches_among_eight_operations_in_this_order() -> None:
    assert list(PAPER_OPERATIONS) == golden("darts/genotypes.json")["primitives"]


def test_every_published_genotype_can_be_built() -> None:
    named = {name for genotype in PUBLISHED_GENOTYPES.values() for name, _ in genotype.normal + genotype.reduce}
    assert named <= set(OPERATIONS)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", OPERATIONS)
class TestEveryOperation:
    @staticmethod
    def operation(name: str, stride: int, affine: bool) -> nn.Module:
        return build_operation(name, CHANNELS, stride, affine=affine).double()

    def test_shape(self, name: str, stride: int, affine: bool) -> None:
        size = 8 // stride
        assert self.operation(name, stride, affine)(features()).shape == (2, CHANNELS, size, size)

    def test_input_is_left_alone(self, name: str, stride: int, affine: bool) -> None:
        before = features()
        self.operation(name, stride, affine)(before)
        assert torch.equal(before, features())

    def test_no_convolution_has_a_bias(self, name: str, stride: int, affine: bool) -> None:
        modules = list(self.operation(name, stride, affine).modules())
        assert all(module.bias is None for module in modules if isinstance(module, nn.Conv2d))
        norms = [module for module in modules if isinstance(module, nn.BatchNorm2d)]
        assert all((norm.affine, norm.eps, norm.momentum) == (affine, 1e-5, 0.1) for norm in norms)


@pytest.mark.parametrize("stride", [1, 2])
class TestValues:
    def test_none(self, stride: int) -> None:
        same(
            build_operation("none", CHANNELS, stride, affine=True)(features()), 0 * features()[..., ::stride, ::stride]
        )

    def test_max_pool(self, stride: int) -> None:
        expected = windows(features(), (3, 3), stride, -torch.inf).amax((-2, -1))
        same(build_operation("max_pool_3x3", CHANNELS, stride, affine=True)(features()), expected)

    def test_average_pool_does_not_count_padding(self, stride: int) -> None:
        inside = windows(torch.ones_like(features()), (3, 3), stride, 0).sum((-2, -1))
        assert inside.min() == 4
        expected = windows(features(), (3, 3), stride, 0).sum((-2, -1)) / inside
        same(build_operation("avg_pool_3x3", CHANNELS, stride, affine=True)(features()), expected)

    @pytest.mark.parametrize("kernel", [3, 5, 7])
    def test_sep_conv(self, kernel: int, stride: int) -> None:
        operation, state = with_weights(build_operation(f"sep_conv_{kernel}x{kernel}", CHANNELS, stride, affine=True))
        expected = features()
        for first, step in ((1, stride), (5, 1)):
            seen = windows(expected.clamp(min=0), (kernel, kernel), step, 0)
            depthwise = torch.einsum("nchwij,cij->nchw", seen, state[f"op.{first}.weight"][:, 0])
            pointwise = mixed(depthwise, state[f"op.{first + 1}.weight"])
            expected = normalized(pointwise, state, f"op.{first + 2}")
        same(operation(features()), expected)

    def test_conv_7x1_1x7(self, stride: int) -> None:
        operation, state = with_weights(build_operation("conv_7x1_1x7", CHANNELS, stride, affine=True))
        rows = windows(features().clamp(min=0), (1, 7), 1, 0)
        across = torch.einsum("nchwij,ocij->nohw", rows, state["op.1.weight"])[..., ::stride]
        columns = windows(across, (7, 1), 1, 0)
        down = torch.einsum("nchwij,ocij->nohw", columns, state["op.2.weight"])[..., ::stride, :]
        same(operation(features()), normalized(down, state, "op.3"))

    @pytest.mark.parametrize("kernel", [3, 5])
    def test_dil_conv(self, kernel: int, stride: int) -> None:
        operation, state = with_weights(build_operation(f"dil_conv_{kernel}x{kernel}", CHANNELS, stride, affine=True))
        extent = 2 * kernel - 1
        seen = windows(features().clamp(min=0), (extent, extent), stride, 0)[..., ::2, ::2]
        depthwise = torch.einsum("nchwij,cij->nchw", seen, state["op.1.weight"][:, 0])
        same(operation(features()), normalized(mixed(depthwise, state["op.2.weight"]), state, "op.3"))


def test_skip_connect_keeps_the_features() -> None:
    x = features()
    assert build_operation("skip_connect", CHANNELS, 1, affine=True)(x) is x


@pytest.mark.parametrize(("in_channels", "out_channels"), [(CHANNELS, CHANNELS), (CHANNELS, 6)])
def test_factorized_reduce_sees_every_second_pixel_twice(in_channels: int, out_channels: int) -> None:
    operation, state = with_weights(FactorizedReduce(in_channels, out_channels, affine=True))
    active = features().clamp(min=0)
    even = mixed(active[..., ::2, ::2], state["conv_1.weight"])
    odd = mixed(active[..., 1::2, 1::2], state["conv_2.weight"])
    same(operation(features()), normalized(torch.cat([even, odd], dim=1), state, "bn"))


def test_skip_connect_of_stride_2_is_a_factorized_reduce() -> None:
    operation = build_operation("skip_connect", CHANNELS, 2, affine=True)
    names = [name for name in operation.state_dict() if name.endswith("weight")]
    assert names == ["conv_1.weight", "conv_2.weight", "bn.weight"]


def test_relu_conv_bn() -> None:
    operation, state = with_weights(ReLUConvBN(CHANNELS, 6, affine=True))
    expected = normalized(mixed(features().clamp(min=0), state["op.1.weight"]), state, "op.2")
    same(operation(features()), expected)


@pytest.mark.parametrize("name", PAPER_OPERATIONS)
def test_candidates_have_no_affine_norm_and_pools_have_one_more(name: str) -> None:
    candidate = build_candidate(name, CHANNELS, 1).double().train()
    norms = [module for module in candidate.modules() if isinstance(module, nn.BatchNorm2d)]
    assert not any(norm.affine for norm in norms)
    out = candidate(features())
    if "pool" in name:
        assert len(norms) == 1
    if norms:
        same(out.mean((0, 2, 3)), torch.zeros(CHANNELS, dtype=torch.float64))


@pytest.mark.parametrize(("cell", "channels", "stride"), [(0, 4, 1), (1, 8, 2)])
@pytest.mark.parametrize("name", PAPER_OPERATIONS)
def test_candidates_have_the_published_entries(name: str, cell: int, channels: int, stride: int) -> None:
    """The search network of the reference begins with a normal and a reduction cell."""
    prefix = f"cells.{cell}._ops.0._ops.{PAPER_OPERATIONS.index(name)}."
    entries = golden("darts/search_2_nodes.json")["state_dict"]
    expected = [(entry.removeprefix(prefix), tuple(shape)) for entry, shape in entries if entry.startswith(prefix)]
    state = build_candidate(name, channels, stride).state_dict()
    assert [(entry, tuple(tensor.shape)) for entry, tensor in state.items()] == expected


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: build_operation("conv_9x9", 4, 1, affine=True),
            "no operation 'conv_9x9' in DARTS; there are none, max",
        ),
        (lambda: build_candidate("", 4, 1), "no operation ''"),
        (lambda: build_operation("skip_connect", 5, 2, affine=True), "an even number of channels, not 5"),
        (
            lambda: FactorizedReduce(4, 4, affine=True)(torch.zeros(1, 4, 7, 8)),
            "an even height and width, not 7 × 8; choose images .* such as multiples of 32",
        ),
        (lambda: FactorizedReduce(4, 4, affine=True)(torch.zeros(1, 4, 8, 7)), "not 8 × 7"),
    ],
)
def test_what_cannot_be_built_is_an_error(build: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build()


def block(norm: Callable[..., nn.Module] = nn.BatchNorm2d, inplace: bool = False) -> Callable[..., nn.Module]:
    def own(channels: int, stride: int, affine: bool) -> nn.Module:
        convolution = nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False)
        return nn.Sequential(nn.ReLU(inplace), convolution, norm(channels, affine=affine))

    return own


class TestRegister:
    @pytest.fixture(autouse=True)
    def _afterwards_there_is_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(darts_operations, "_BUILDERS", dict(darts_operations._BUILDERS))

    def test_an_operation_is_built_by_its_name(self) -> None:
        own = block()
        assert register_edge_operation("own")(own) is own
        trained, searched = build_operation("own", 6, 2, affine=True), build_searched("own", 6, 2)
        assert [norm.affine for norm in (trained[2], searched[2])] == [True, False]  # type: ignore[index]
        assert trained(torch.zeros(1, 6, 8, 8)).shape == (1, 6, 4, 4)
        # For derivatives of any order, as the package's own.
        assert type(build_candidate("own", 6, 1)[1]).__name__ == "DepthwiseConv2d"  # type: ignore[index]
        with pytest.raises(UserError, match=r"conv_7x1_1x7, own, and those registered by a file that --import names\."):
            build_operation("other", 6, 1, affine=True)

    def test_its_average_pools_are_right_on_every_device(self) -> None:
        class Mine(nn.AvgPool2d):
            pass

        def alone(channels: int, stride: int, affine: bool) -> nn.Module:
            return nn.AvgPool2d(3, stride, 1, count_include_pad=False)

        def within(channels: int, stride: int, affine: bool) -> nn.Module:
            return nn.Sequential(nn.AvgPool2d(3, stride, 1), Mine(1), nn.MaxPool2d(1))

        register_edge_operation("alone")(alone)
        register_edge_operation("within")(within)
        pool: Any = build_operation("alone", 6, 2, affine=True)
        assert type(pool) is AveragePool
        assert (pool.kernel_size, pool.stride, pool.padding, pool.count_include_pad) == (3, 2, 1, False)
        assert [type(each) for each in build_operation("within", 6, 1, affine=True).children()] == [
            AveragePool,
            Mine,
            nn.MaxPool2d,
        ]
        # A batch norm follows one in a search, as those of the paper.
        assert type(build_searched("alone", 6, 1)) is nn.Sequential

    def test_a_pool_is_followed_by_a_norm_in_a_search(self) -> None:
        register_edge_operation("max_pool_5x5")(lambda channels, stride, affine: nn.MaxPool2d(5, stride, padding=2))
        assert [type(part) for part in build_searched("max_pool_5x5", 4, 1).children()] == [
            nn.MaxPool2d,
            nn.BatchNorm2d,
        ]

    def test_a_function_that_is_defined_once_more_takes_its_own_place(self) -> None:
        register_edge_operation("own")(block())
        again = block(nn.BatchNorm2d)
        register_edge_operation("own")(again)
        assert darts_operations._BUILDERS["own"] is again

        def other(channels: int, stride: int, affine: bool) -> nn.Module:
            return again(channels, stride, affine)

        with pytest.raises(UserError, match="There is an operation 'own' already; give yours another name"):
            register_edge_operation("own")(other)
        assert darts_operations._BUILDERS["own"] is again

    def test_the_packages_own_stay(self) -> None:
        with pytest.raises(UserError, match="There is an operation 'skip_connect' already"):
            register_edge_operation("skip_connect")(block())

    @pytest.mark.parametrize(
        ("builder", "message"),
        [
            (
                lambda c, stride, affine: nn.Conv2d(c, c, 3, padding=1),
                r"makes \[2, 16, 8, 8\] of \[2, 16, 8, 8\] at stride 2, but an edge needs \[2, 16, 4, 4\]",
            ),
            (lambda c, stride, affine: nn.Conv2d(c, 2 * c, 1, stride), r"makes \[2, 32, 8, 8\] of .* at stride 1"),
            (block(lambda c, affine: nn.BatchNorm2d(c)), "scales and shifts although affine is False"),
            (block(inplace=True), "changes its input in place, which other edges read as well"),
        ],
    )
    def test_what_an_edge_cannot_use_is_an_error(self, builder: Any, message: str) -> None:
        with pytest.raises(UserError, match=f"operation 'own' {message}|of the operation 'own' {message}"):
            register_edge_operation("own")(builder)
        assert "own" not in darts_operations._BUILDERS

    @pytest.mark.parametrize("name", ["", "conv 3x3", "3x3", "conv-3x3"])
    def test_names_are_those_that_a_genotype_can_have(self, name: str) -> None:
        with pytest.raises(UserError, match="cannot be called"):
            register_edge_operation(name)

    def test_checking_draws_no_random_number(self) -> None:
        before = torch.get_rng_state()
        register_edge_operation("own")(block())
        assert torch.equal(torch.get_rng_state(), before)
