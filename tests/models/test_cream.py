from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.data.constants import DEFAULT_CROP_PCT, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath
from timm.models._efficientnet_blocks import EdgeResidual
from torch import nn
from torchvision.models import resnet

import nni_cream  # noqa: F401 (registers the networks)
from nni_cream.architecture import CreamPath
from nni_cream.cost import measure_network, ptflops_macs
from nni_cream.errors import UserError
from nni_cream.models import cream
from nni_cream.models.cream import (
    CHOICES,
    OPERATIONS,
    PUBLISHED,
    DilConvChoice,
    ResidualUnitChoice,
    ResidualUnitKind,
    block_strings,
    build_child,
    known_operations,
    own_operations,
    register_block_operation,
)
from tests.reference import apply_rule, golden, standard_normal, use_exact_gates

REFERENCE: dict[str, Any] = golden("cream/a_childnets.json")
NETWORKS = [pytest.param(f"cream_{name}", row, id=name) for name, row in REFERENCE["published"].items()]


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def test_the_published_networks_are_those_of_the_paper() -> None:
    assert list(PUBLISHED) == [f"cream_{name}" for name in REFERENCE["published"]]
    assert set(timm.list_models("cream_*")) == set(PUBLISHED)


@pytest.mark.parametrize(("name", "row"), NETWORKS)
@pytest.mark.usefixtures("on_meta")
class TestPublished:
    def test_path_and_resolution(self, name: str, row: dict[str, Any]) -> None:
        assert PUBLISHED[name].path.to_json() == row["arch_list"]
        assert PUBLISHED[name].resolution == row["image_size"]

    def test_blocks_keep_the_quirk_of_single_block_stages(self, name: str, row: dict[str, Any]) -> None:
        expected = [
            [text.replace("_s2_", "_s1_") if block else text for block, text in enumerate(stage)]
            for stage in row["resolved_block_strings"]
        ]
        assert block_strings(PUBLISHED[name].path, published=True) == expected

    def test_state_dict_has_the_published_keys_in_order(self, name: str, row: dict[str, Any]) -> None:
        state = timm.create_model(name).state_dict()
        assert [[key, list(tensor.shape)] for key, tensor in state.items()] == row["state_dict"]

    def test_cost(self, name: str, row: dict[str, Any]) -> None:
        network = timm.create_model(name).eval()
        size = row["image_size"]
        assert parameters(network) == row["params"]
        assert ptflops_macs(network, torch.empty(1, 3, size, size)) == row["macs_ptflops_0_6_3"]
        cost = measure_network(network, size)
        assert (cost.macs, cost.params) == (row["macs_flopcounter"], row["params"])


@pytest.mark.parametrize("name", REFERENCE["choices_applied_to_single_block_stages"])
@pytest.mark.usefixtures("on_meta")
def test_searched_paths_have_no_quirk(name: str) -> None:
    row = REFERENCE["choices_applied_to_single_block_stages"][name]
    network = build_child(CreamPath.of(row["arch_list"]), num_classes=1000).eval()
    size = row["image_size"]
    assert parameters(network) == row["params"] != REFERENCE["published"][name]["params"]
    assert ptflops_macs(network, torch.empty(1, 3, size, size)) == row["macs_ptflops_0_6_3"]
    assert measure_network(network, size).macs == row["macs_flopcounter"]


@pytest.mark.parametrize("name", ["cream_481", "cream_604"])
def test_without_single_block_stages_there_is_no_quirk_to_keep(name: str) -> None:
    path = PUBLISHED[name].path
    assert block_strings(path) == block_strings(path, published=True)


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=c["model"]) for c in golden("cream/c_forward.json")["cases"] if "childnet" in c["model"]],
)
class TestForward:
    @staticmethod
    def network(case: dict[str, Any]) -> nn.Module:
        network = timm.create_model(case["model"].replace("childnet", "cream_"), num_classes=10).double()
        apply_rule(network)
        use_exact_gates(network)
        return network

    def test_evaluation(self, case: dict[str, Any]) -> None:
        network = self.network(case).eval()
        assert parameters(network) == case["params"]
        with torch.no_grad():
            logits = network(standard_normal(case["input_seed"], *case["input_shape"]))
        exact = torch.tensor(case["eval_logits"], dtype=torch.float64)
        torch.testing.assert_close(logits, exact, rtol=0, atol=1e-12)

    def test_training(self, case: dict[str, Any]) -> None:
        network = self.network(case).train()
        logits = network(standard_normal(case["input_seed"], *case["input_shape"]))
        exact = torch.tensor(case["train_logits"], dtype=torch.float64)
        torch.testing.assert_close(logits, exact, rtol=0, atol=1e-12)
        loss = nn.functional.cross_entropy(logits, torch.tensor([3, 7]))
        assert loss.item() == pytest.approx(case["train_loss_ce_target_3_7"], abs=1e-12)
        loss.backward()
        gradients = {name: p.grad.abs().sum().item() for name, p in network.named_parameters() if p.grad is not None}
        assert gradients == pytest.approx(case["grad_abs_sum"], rel=1e-9)


@pytest.mark.usefixtures("on_meta")
class TestTimmConventions:
    @pytest.mark.parametrize(("name", "row"), NETWORKS)
    def test_default_configuration(self, name: str, row: dict[str, Any]) -> None:
        configuration = timm.create_model(name).default_cfg
        size = row["image_size"]
        expected = {
            "num_classes": 1000,
            "input_size": (3, size, size),
            "pool_size": {64: (2, 2), 96: (3, 3), 160: (5, 5), 224: (7, 7)}[size],
            "crop_pct": DEFAULT_CROP_PCT,
            "interpolation": "bicubic",
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
        }
        assert {key: configuration[key] for key in expected} == expected
        assert (DEFAULT_CROP_PCT, *IMAGENET_DEFAULT_MEAN) == (0.875, 0.485, 0.456, 0.406)

    def test_named_layers_exist(self) -> None:
        network = timm.create_model("cream_14", num_classes=7)
        layers = dict(network.named_modules())
        assert layers[network.default_cfg["first_conv"]].in_channels == 3
        assert layers[network.default_cfg["classifier"]].out_features == 7

    def test_number_of_classes(self) -> None:
        network = timm.create_model("cream_14", num_classes=10)
        assert network(torch.empty(2, 3, 64, 64)).shape == (2, 10)
        # The classifier is 1280 × classes + classes.
        assert parameters(network) == REFERENCE["published"]["14"]["params"] - 990 * 1281

    def test_features_only(self) -> None:
        network = timm.create_model("cream_14", features_only=True)
        assert network.feature_info.channels() == [16, 24, 40, 96, 320]
        assert network.feature_info.reduction() == [2, 4, 8, 16, 32]
        shapes = [tuple(feature.shape[1:]) for feature in network(torch.empty(1, 3, 64, 64))]
        assert shapes == [(16, 32, 32), (24, 16, 16), (40, 8, 8), (96, 4, 4), (320, 2, 2)]

    def test_no_pretrained_weights_are_promised(self) -> None:
        assert not timm.list_models("cream_*", pretrained=True)


def test_dropout_acts_in_training_only() -> None:
    images = torch.ones(1, 3, 64, 64)
    network = timm.create_model("cream_14", num_classes=10, drop_rate=0.5).eval()
    assert torch.equal(network(images), network(images))
    for module in network.modules():
        if not isinstance(module, nn.BatchNorm2d):
            module.training = True
    assert not torch.equal(network(images), network(images))


def test_child_keeps_its_drop_rates() -> None:
    path = CreamPath.parse("[0] [3] [3,3] [3,3] [3] [3] [0]")
    network = build_child(path, num_classes=2, drop_rate=0.25, drop_path_rate=0.2)
    assert network.drop_rate == 0.25
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in network.blocks[1:6] for block in stage]
    assert len(rates) == 7
    assert rates == sorted(rates)
    assert 0.0 < rates[1] < rates[-1] < 0.2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[0] [3] [3] [3] [3] [0]", "has 6 stages, but the stage table has 7"),
        ("[0] [3] [3] [3] [3] [3] [3] [0]", "has 8 stages, but the stage table has 7"),
        ("[1] [3] [3] [3] [3] [3] [0]", "must begin and end with"),
        ("[0] [3] [3] [3] [3] [3] [0,0]", "must begin and end with"),
        ("[0] [3] [3,10] [3] [3] [3] [0]", "Stage 2 of the Cream path names choice 10, but choices go from 0 to 9"),
    ],
)
def test_paths_that_do_not_fit_are_errors(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_child(CreamPath.parse(text), num_classes=10)


def test_choices_are_in_the_published_order() -> None:
    assert [(c.kernel, c.expansion) for c in CHOICES] == [(3, 4), (3, 6), (5, 4), (5, 6), (7, 4), (7, 6)]
    dilated3, dilated5, bottleneck, basic = OPERATIONS[len(CHOICES) :]
    assert (dilated3, dilated5) == (DilConvChoice(3), DilConvChoice(5))
    assert (bottleneck, basic) == (ResidualUnitChoice("bottleneck"), ResidualUnitChoice("basic"))


@pytest.mark.parametrize(("in_channels", "out_channels", "stride"), [(16, 24, 2), (24, 24, 1), (80, 96, 1)])
@pytest.mark.parametrize("kind", ["bottleneck", "basic"])
def test_residual_units_are_those_of_resnet(
    kind: ResidualUnitKind, in_channels: int, out_channels: int, stride: int
) -> None:
    unit = ResidualUnitChoice(kind).build(in_channels, out_channels, stride).double()
    apply_rule(unit)
    shortcut = None
    if (in_channels, stride) != (out_channels, 1):
        convolution = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
        shortcut = nn.Sequential(convolution, nn.BatchNorm2d(out_channels))
    if kind == "bottleneck":
        expected = resnet.Bottleneck(in_channels, out_channels // 4, stride, shortcut)
    else:
        expected = resnet.BasicBlock(in_channels, out_channels, stride, shortcut)
    expected.double().load_state_dict(unit.state_dict())
    features = standard_normal(1, 2, in_channels, 7, 7)
    torch.testing.assert_close(unit(features), expected(features), rtol=0, atol=1e-12)


class TestFurtherOperations:
    PATH = CreamPath.parse("[0] [6,8] [9] [7,3,6] [8] [1,9] [0]")

    def test_each_stands_where_the_path_has_it(self) -> None:
        network = build_child(self.PATH, num_classes=10)
        kinds = [[type(block).__name__ for block in stage] for stage in network.blocks]
        assert kinds[1:-1] == [
            ["DilConv", "Bottleneck"],
            ["BasicBlock"],
            ["DilConv", "InvertedResidual", "DilConv"],
            ["Bottleneck"],
            ["InvertedResidual", "BasicBlock"],
        ]
        kernels = [block.op[1].kernel_size[0] for stage in network.blocks for block in stage if hasattr(block, "op")]
        assert kernels == [3, 5, 3]

    def test_resolution_falls_as_without_them(self) -> None:
        network = build_child(self.PATH, num_classes=10)
        features = network.bn1(network.conv_stem(torch.zeros(1, 3, 64, 64)))
        sizes = []
        for stage in network.blocks:
            features = stage(features)
            sizes.append(tuple(features.shape[1:]))
        assert sizes == [
            (16, 32, 32), (24, 16, 16), (40, 8, 8), (80, 4, 4), (96, 4, 4), (192, 2, 2), (320, 2, 2)
        ]  # fmt: skip

    def test_residual_units_have_the_drop_path_of_their_depth(self) -> None:
        network = build_child(self.PATH, num_classes=10, drop_path_rate=0.2)
        rates = [
            block.drop_path.drop_prob
            for stage in network.blocks[1:-1]
            for block in stage
            if isinstance(getattr(block, "drop_path", None), DropPath)
        ]
        assert len(rates) == 6  # four residual units and two inverted residuals; a dil_conv has nothing to drop
        assert rates == sorted(set(rates))

    def test_weights_are_initialised_as_those_of_other_blocks(self) -> None:
        torch.manual_seed(0)
        block = build_child(CreamPath.parse("[0] [9] [9] [9] [9] [9] [0]"), num_classes=2).blocks[5][0]
        # Fan-out, as timm's EfficientNets: a standard deviation of sqrt(2 / (3 * 3 * 192)).
        assert block.conv2.weight.std().item() == pytest.approx((2 / (9 * 192)) ** 0.5, rel=0.02)


def fused(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    return EdgeResidual(in_channels, out_channels, 3, stride, exp_ratio=2)


class TestRegister:
    @pytest.fixture(autouse=True)
    def _afterwards_there_is_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cream, "_OWN", {})

    def test_a_path_names_an_operation_by_its_number(self) -> None:
        assert register_block_operation("fused", number=120)(fused) is fused
        assert list(known_operations()) == [*range(len(OPERATIONS)), 120]
        network = build_child(CreamPath.parse("[0] [120] [3,120] [3] [3] [3] [0]"), num_classes=10, drop_path_rate=0.2)
        own = [block for stage in network.blocks for block in stage if isinstance(block, EdgeResidual)]
        assert [(block.conv_exp.in_channels, block.conv_exp.stride, block.bn2.num_features) for block in own] == [
            (16, (2, 2), 24),
            (40, (1, 1), 40),
        ]
        rates = [block.drop_path.drop_prob for block in own]
        assert 0 < rates[0] < rates[1] < 0.2
        # As timm's EfficientNets: fan-out.
        assert own[1].conv_exp.weight.std().item() == pytest.approx((2 / (9 * 80)) ** 0.5, rel=0.05)

    def test_a_path_of_an_operation_that_is_not_registered_is_an_error(self) -> None:
        path = CreamPath.parse("[0] [120] [3] [3] [3] [3] [0]")
        with pytest.raises(
            UserError, match=r"Stage 1 .* names choice 120, but choices go from 0 to 9; those of your own .* --import"
        ):
            build_child(path, num_classes=10)

    def test_operations_by_name(self) -> None:
        register_block_operation("fused", number=101)(fused)
        register_block_operation("deep", number=100)(lambda i, o, s: nn.Conv2d(i, o, 5, s, padding=2))
        assert [choice.name for choice in own_operations(["deep", "fused"])] == ["deep", "fused"]
        with pytest.raises(
            UserError, match="There is no block operation 'dep'; of your own there are fused, deep, and"
        ):
            own_operations(["dep"])
        with pytest.raises(UserError, match="'fused' is to be offered twice; name it once"):
            own_operations(["fused", "deep", "fused"])

    def test_a_function_that_is_defined_once_more_takes_its_own_place(self) -> None:
        def build(widened: float) -> Any:
            return lambda i, o, s: EdgeResidual(i, o, 3, s, exp_ratio=widened)

        register_block_operation("fused", number=100)(build(2.0))
        register_block_operation("fused", number=100)(build(3.0))
        (choice,) = own_operations(["fused"])
        assert choice.build(16, 16, 1).conv_exp.out_channels == 48  # type: ignore[union-attr]

    @pytest.mark.parametrize(("name", "number"), [("fused", 101), ("other", 100), ("fused", 100)])
    def test_names_and_numbers_that_are_taken(self, name: str, number: int) -> None:
        register_block_operation("fused", number=100)(fused)
        with pytest.raises(UserError, match="There is an operation 'fused' of number 100 already"):
            register_block_operation(name, number=number)(lambda i, o, s: fused(i, o, s))
        assert list(known_operations())[len(OPERATIONS) :] == [100]

    @pytest.mark.parametrize(
        ("builder", "message"),
        [
            (
                lambda i, o, s: nn.Conv2d(i, o, 1),
                r"makes \[2, 24, 8, 8\] of \[2, 16, 8, 8\] at stride 2, but \[2, 24, 4",
            ),
            (lambda i, o, s: nn.Conv2d(i, o + o % 5, 1, s), r"makes \[2, 28, 4, 4\] .*, but \[2, 24, 4, 4\] is needed"),
            # Of the stage with stride 1 whose channels change.
            (
                lambda i, o, s: nn.Identity() if s == 1 and i != 24 else nn.Conv2d(i, o, 1, s),
                "is an nn.Identity, which stands for a block that is left out: offer that with skip",
            ),
        ],
    )
    def test_what_a_block_cannot_use_is_an_error(self, builder: Any, message: str) -> None:
        with pytest.raises(UserError, match=f"The operation 'own' {message}"):
            register_block_operation("own", number=100)(builder)
        assert len(known_operations()) == len(OPERATIONS)

    @pytest.mark.parametrize(
        ("name", "number", "message"),
        [
            ("3x3", 100, "cannot be called '3x3'"),
            ("own", 99, "The number of the operation 'own' is 99; numbers of your own begin at 100"),
            ("own", True, "is True; numbers"),
        ],
    )
    def test_names_and_numbers_that_cannot_be(self, name: str, number: int, message: str) -> None:
        with pytest.raises(UserError, match=message):
            register_block_operation(name, number=number)
