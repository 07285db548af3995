from __future__ import annotations

import copy
import itertools
from collections import OrderedDict
from typing import Any

import nni.nas.nn.pytorch as nas
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nni_cream.architecture import CreamPath
from nni_cream.cost import Cost, CostTable, measure, measure_network, measure_space, ptflops_macs
from nni_cream.errors import UserError
from nni_cream.models.cream import CHOICES, build_child
from search_spaces.cream import CreamSpace

RESOLUTION = 40
DEPTHS = (1, 1, 2, 1, 1)


class Twice(nas.ModelSpace):
    """One label decides two layers of different cost; another choice has named candidates."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4))
        self.first = nas.LayerChoice([nn.Conv2d(4, 8, k, padding=k // 2) for k in (3, 1, 5)], label="kernel")
        self.second = nas.LayerChoice(
            [nn.Conv2d(8, 8, k, stride=2, padding=k // 2, groups=8) for k in (3, 1, 5)], label="kernel"
        )
        self.third = nas.LayerChoice(OrderedDict(plain=nn.Conv2d(8, 6, 1), none=nn.MaxPool2d(1)), label="layer")
        self.join = nas.InputChoice(3, n_chosen=2, label="inputs")
        self.head = nn.Linear(6, 5)

    def forward(self, images: Tensor) -> Tensor:
        features = self.third(self.second(self.first(self.stem(images))))[:, :6]
        features = self.join([features, 2 * features, 3 * features])
        return self.head(features.mean((2, 3)))


class Again(nas.ModelSpace):
    """One choice runs twice, on two sizes, and one in training alone; a layer is given a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.ones(1, 3, 2, 2))
        self.body = nas.LayerChoice([nn.Conv2d(3, 3, k, padding=k // 2) for k in (3, 1)], label="body")
        self.auxiliary = nas.LayerChoice([nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 3)], label="auxiliary")
        self.head = nn.Conv2d(3, 5, 1)

    def forward(self, images: Tensor) -> Tensor:
        features = self.body(nn.functional.avg_pool2d(self.body(images), 2))
        if self.training:
            features = self.auxiliary(features)
        return self.head(features).mean((2, 3)) + self.head(self.query).mean((2, 3))


class Nested(nas.ModelSpace):
    def __init__(self) -> None:
        super().__init__()
        inner = nas.LayerChoice([nn.Conv2d(3, 3, 1), nn.Identity()], label="inner")
        self.outer = nas.LayerChoice([nn.Sequential(inner, nn.ReLU()), nn.Identity()], label="outer")

    def forward(self, images: Tensor) -> Tensor:
        return self.outer(images)


class TestMeasure:
    def test_convolution_counts_one_for_each_multiplication(self) -> None:
        convolution = nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2)
        assert measure(convolution, torch.zeros(1, 6, 10, 14)) == Cost(
            macs=5 * 7 * 8 * (6 // 2) * 9, params=8 * 3 * 9 + 8
        )

    def test_network_by_hand(self) -> None:
        network = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(100, 7))
        assert measure_network(network, 5) == Cost(macs=25 * 3 * 4 + 700, params=12 + 8 + 707)

    @pytest.mark.parametrize("training", [True, False])
    def test_the_network_is_untouched(self, training: bool) -> None:
        network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train(training)
        before = copy.deepcopy(network.state_dict())
        measure(network, torch.ones(1, 3, 4, 4))
        measure_network(network, 4)
        assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
        assert network.training == network[1].training == training

    def test_mode_comes_back_after_an_error(self) -> None:
        network = nn.Conv2d(3, 4, 1).train()
        with pytest.raises(RuntimeError):
            measure(network, torch.ones(1, 5, 4, 4))
        assert network.training

    @pytest.mark.parametrize(
        "name", ["cream_14", "efficientnet_b0", "mobilenetv3_small_050", "convnext_atto", "every layer"]
    )
    def test_on_meta_it_is_what_torch_counts_where_all_is_computed(self, name: str) -> None:
        activations = [nn.GELU(), nn.Sigmoid()]
        activations += [a(inplace) for a in (nn.Hardsigmoid, nn.Hardswish, nn.ReLU, nn.SiLU) for inplace in (0, 1)]
        norms = [nn.BatchNorm2d(5, affine=False), nn.BatchNorm2d(5, track_running_stats=False)]
        between = [nn.Sequential(nn.Conv2d(5, 5, 3), layer) for layer in (*activations, *norms)]
        every = nn.Sequential(nn.Conv2d(3, 5, 1), *between, nn.Conv2d(5, 2, 1))
        network = every if name == "every layer" else timm.create_model(name)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network.eval()(torch.randn(1, 3, 64, 64))
        assert measure_network(network, 64).macs == counter.get_total_flops() / 2 > 0

    def test_a_norm_of_another_number_of_channels_is_refused_on_meta_too(self) -> None:
        with pytest.raises(UserError, match=r"cannot take images of 8 pixels"):
            measure_network(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(5)), 8)

    def test_arithmetic(self) -> None:
        assert Cost(5, 2) + Cost(3, 7) - Cost(1, 1) == Cost(7, 8)


@pytest.fixture(scope="module")
def table() -> CostTable:
    return measure_space(CreamSpace(DEPTHS, 10), (3, RESOLUTION, RESOLUTION))


class TestCreamTable:
    @staticmethod
    def built(sample: dict[str, int]) -> Cost:
        with torch.device("meta"):
            return measure_network(build_child(CreamPath.from_sample(sample), num_classes=10), RESOLUTION)

    def test_every_choice_of_every_block_costs_what_the_child_costs(self, table: CostTable) -> None:
        base = CreamPath(((0,), *((0,) * depth for depth in DEPTHS), (0,))).to_sample()
        reference = self.built(base)
        assert table.of(base) == reference
        blocks = [label for label in base if not label.startswith(("stage0", "stage6"))]
        assert set(table.choices) == set(base)
        for label in blocks:
            for index in range(1, len(CHOICES)):
                sample = {**base, label: index}
                assert table.of(sample) == self.built(sample)
                assert table.of(sample).macs > reference.macs

    def test_changes_in_several_blocks_add_up(self, table: CostTable) -> None:
        sample = CreamPath.parse("[0] [5] [1] [2,3] [4] [3] [0]").to_sample()
        assert table.of(sample) == self.built(sample)

    def test_further_operations_and_skipped_blocks_cost_what_the_child_costs(self) -> None:
        space = CreamSpace(DEPTHS, 10, dil_conv=True, resunit=("bottleneck", "basic"), skip=True)
        table = measure_space(space, (3, RESOLUTION, RESOLUTION))
        base = CreamPath(((0,), *((0,) * depth for depth in DEPTHS), (0,))).to_sample()
        seen = set()
        for label, options in table.choices.items():
            for index in range(6, len(options)):
                sample = {**base, label: index}
                with torch.device("meta"):
                    child = build_child(space.architecture(sample), num_classes=10)
                assert table.of(sample) == measure_network(child, RESOLUTION)
                seen.add((label, index))
        blocks = sum(DEPTHS)
        assert len(seen) == 4 * blocks + (blocks - len(DEPTHS))
        assert table.choices["stage3_block1"][10] == Cost(0, 0)

    def test_ends_of_the_range(self, table: CostTable) -> None:
        cheapest = CreamPath.parse("[0] [0] [0] [0,0] [0] [0] [0]").to_sample()
        dearest = CreamPath.parse("[0] [5] [5] [5,5] [5] [5] [0]").to_sample()
        assert (table.cheapest, table.dearest) == (self.built(cheapest).macs, self.built(dearest).macs)


class TestAnySpace:
    def test_every_path_costs_what_its_network_costs(self) -> None:
        space = Twice()
        table = measure_space(space, (3, 16, 16))
        assert {label: len(options) for label, options in table.choices.items()} == {"kernel": 3, "layer": 2}
        costs = []
        for (i, kernel), (j, layer) in itertools.product(enumerate((0, 1, 2)), enumerate(("plain", "none"))):
            frozen = space.freeze({"kernel": kernel, "layer": layer, "inputs": [0, 2]})
            assert table.of({"kernel": i, "layer": j}) == measure_network(frozen, 16)
            costs.append(table.of({"kernel": i, "layer": j}).macs)
        assert len(set(costs)) == 6
        assert (table.cheapest, table.dearest) == (min(costs), max(costs))

    def test_choices_that_run_twice_or_in_training_alone(self) -> None:
        table = measure_space(Again(), (3, 16, 16))
        for body, auxiliary in itertools.product((0, 1), (0, 1)):
            frozen = Again().freeze({"body": body, "auxiliary": auxiliary})
            assert table.of({"body": body, "auxiliary": auxiliary}) == measure_network(frozen, 16)
        assert table.choices["body"][0].macs == (16 * 16 + 8 * 8) * 3 * 3 * 9

    def test_the_space_is_untouched(self) -> None:
        space = Twice().train()
        space.stem.eval()
        before = copy.deepcopy(space.state_dict())
        modes = {name: module.training for name, module in space.named_modules()}
        measure_space(space, (3, 16, 16))
        assert {name: module.training for name, module in space.named_modules()} == modes
        after = space.state_dict()
        assert all(after[name].device.type == "cpu" and torch.equal(before[name], after[name]) for name in before)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in space.modules())

    def test_nested_choices_are_refused_by_name(self) -> None:
        with pytest.raises(UserError, match=r"The choice 'outer' \(outer\) holds further choices"):
            measure_space(Nested(), (3, 8, 8))


class TestPtflops:
    @pytest.mark.parametrize(
        ("layer", "shape", "macs"),
        [
            (nn.Conv2d(4, 6, 3, padding=1, bias=False), (1, 4, 5, 5), 25 * 6 * 4 * 9),
            (nn.Conv2d(4, 6, 3, padding=1, groups=2), (1, 4, 5, 5), 25 * 6 * 2 * 9 + 25 * 6),
            (nn.BatchNorm2d(4), (1, 4, 5, 5), 2 * 100),
            (nn.Linear(8, 3), (1, 8), 24),
            (nn.ReLU(), (1, 4, 5, 5), 100),
            (nn.AdaptiveAvgPool2d(1), (1, 4, 5, 5), 100),
            (nn.SiLU(), (1, 4, 5, 5), 0),
            (nn.Hardsigmoid(), (1, 4, 5, 5), 0),
        ],
        ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
    )
    def test_layer_by_hand(self, layer: nn.Module, shape: tuple[int, ...], macs: int) -> None:
        assert ptflops_macs(layer.eval(), torch.zeros(shape)) == macs

    def test_hooks_are_gone_afterwards_also_after_an_error(self) -> None:
        network: Any = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
        ptflops_macs(network, torch.zeros(1, 3, 4, 4))
        with pytest.raises(RuntimeError):
            ptflops_macs(network, torch.zeros(1, 5, 4, 4))
        assert not any(module._forward_hooks for module in network.modules())
