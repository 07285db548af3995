from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nni_cream.architecture import CreamPath
from nni_cream.cost import measure_network, measure_space, ptflops_macs
from nni_cream.errors import UserError
from nni_cream.models import cream
from nni_cream.models.cream import CHOICES, STAGES, Choice, build_child
from search_spaces.cream import CreamSpace, SpacePlan, align, plan_space, stage_costs
from tests.reference import apply_rule, golden, run_through, standard_normal, use_exact_gates

PLANS: dict[str, Any] = golden("cream/b_search_for_layer.json")
FORWARD = [
    pytest.param(case, id=f"depth{sum(map(len, case['arch']))}")
    for case in golden("cream/c_forward.json")["cases"]
    if case["model"] == "supernet600"
]
ESTIMATES: dict[str, Any] = golden("cream/f_flopsest.json")
PATH = CreamPath.parse("[0] [2] [3,1] [0,4] [5] [1] [0]")
DEPTHS = (1, 2, 2, 1, 1)


def interval(row: dict[str, Any]) -> str:
    return f"{row['min']}-{row['max']}"


def is_planned(minimum: float, maximum: float) -> bool:
    try:
        plan_space(minimum, maximum)
    except UserError:
        return False
    return True


def threshold(holds: Callable[[float], bool], low: float, high: float) -> float:
    """Where ``holds`` becomes true, by bisection."""
    assert not holds(low)
    assert holds(high)
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


class TestPlan:
    @pytest.mark.parametrize("row", PLANS["grid"], ids=interval)
    def test_published_intervals(self, row: dict[str, Any]) -> None:
        # The published code plans for an interval whose minimum is above its maximum; here it is an error.
        if row["sta_num"] is None or row["min"] > row["max"]:
            with pytest.raises(UserError):
                plan_space(row["min"], row["max"])
        else:
            assert plan_space(row["min"], row["max"]) == SpacePlan(tuple(row["sta_num"]), row["resolution"])

    def test_both_kinds_of_outcome_are_covered(self) -> None:
        rows = PLANS["grid"]
        assert len(rows) == 37
        assert sum(row["sta_num"] is None for row in rows) == 5

    def test_interval_the_wrong_way_round(self) -> None:
        with pytest.raises(UserError, match=r"interval \[300 M, 200 M\] is empty"):
            plan_space(300, 200)

    @pytest.mark.parametrize("interval", [(0, 1), (0, 2.7), (800, 1000), (600, 10**9)])
    def test_message_says_what_is_possible(self, interval: tuple[float, float]) -> None:
        with pytest.raises(UserError, match=r"No network fits the FLOPs interval \[") as error:
            plan_space(*interval)
        numbers = re.search(r"a maximum of at least (\S+) M and a minimum of at most (\S+) M", str(error.value))
        assert numbers
        least = threshold(lambda maximum: is_planned(0, maximum), 1, 10)
        greatest = threshold(lambda minimum: not is_planned(minimum, 10**9), 10, 1000)
        assert numbers.groups() == (f"{least:.3g}", f"{greatest:.3g}") == ("2.79", "557")

    def test_a_fixed_resolution_is_kept(self) -> None:
        assert plan_space(0, 65).resolution == 192
        assert plan_space(0, 65, 192).resolution == 192

    @pytest.mark.parametrize(
        ("interval", "resolution", "depth"),
        [
            ((0, 65), 224, 1),
            ((0, 1), 64, 1),
            ((0, 0.79), 64, 1),  # stretched as for free resolutions, it would have room for more
            ((0, 1), 100, 1),
            ((800, 1000), 224, 4),
            ((50, 60), 64, 4),
            ((600, 10**9), 100, 4),
        ],
    )
    def test_a_fixed_resolution_goes_as_near_as_it_can(
        self, interval: tuple[float, float], resolution: int, depth: int
    ) -> None:
        assert plan_space(*interval, resolution) == SpacePlan((depth,) * 5, resolution)

    def test_depth_follows_from_the_costs_at_the_fixed_resolution(self) -> None:
        # Costs fall with the area, so a quarter of the area affords depth that the budget had no room for.
        assert sum(plan_space(0, 121, 112).depths) > sum(plan_space(0, 121, 224).depths) == 5

    @pytest.mark.parametrize("resolution", [32, 64, 224])
    def test_largest_network_stays_under_the_maximum(self, resolution: int) -> None:
        costs = stage_costs(resolution)
        smallest = sum(stage.first[0] for stage in costs)
        for factor in (2.0, 3.0, 5.0, 8.0):
            depths = plan_space(0, factor * smallest, resolution).depths
            largest = sum(c.first[-1] + (d - 1) * c.further[-1] for c, d in zip(costs, depths, strict=True))
            assert largest <= factor * smallest
            # One more block anywhere would be too much, or there is a limit of four.
            assert all(
                d == 4 or largest + c.further[-1] > factor * smallest for c, d in zip(costs, depths, strict=True)
            )


class TestCosts:
    def test_published_table(self) -> None:
        table = [[list(pair) for pair in zip(c.first, c.further, strict=True)] for c in stage_costs(224)]
        expected = [[PLANS["flops_op_dict"][str(s)][str(i)] for i in range(6)] for s in range(5)]
        torch.testing.assert_close(torch.tensor(table), torch.tensor(expected), rtol=0, atol=5e-7)
        assert [[[round(v, 6) for v in pair] for pair in stage] for stage in table] == expected

    @pytest.mark.parametrize("resolution", [40, 100])
    def test_odd_sizes_cost_what_the_network_costs(self, resolution: int) -> None:
        lists = [[0], [2], [3, 1], [0, 4], [5], [1], [0]]
        costs = stage_costs(resolution)
        estimate = sum(
            cost.first[stage[0]] + sum(cost.further[i] for i in stage[1:])
            for cost, stage in zip(costs, lists[1:-1], strict=True)
        )
        with torch.device("meta"):
            network = build_child(CreamPath.of(lists), num_classes=2).eval()
            images = torch.empty(1, 3, resolution, resolution)
            choices_only = sum(ptflops_macs(block, inputs) for block, inputs in blocks_with_inputs(network, images))
        assert choices_only / 1e6 == pytest.approx(estimate, rel=1e-12)

    @pytest.mark.parametrize("row", ESTIMATES["archs"], ids=lambda row: f"{row['flops_M']:.1f}M")
    def test_published_estimates(self, row: dict[str, Any]) -> None:
        resolution = ESTIMATES["resolution"]
        path = CreamPath.of([[choice for choice in stage if choice >= 0] for stage in row["arch"]])  # -1: no block
        with torch.device("meta"):
            network = build_child(path, num_classes=1000).eval()
            images = torch.empty(1, 3, resolution, resolution)
            macs = sum(ptflops_macs(b, x) for b, x in blocks_with_inputs(network, images, slice(0, 7)))
        assert macs / 1e6 + ESTIMATES["flops_fixed_M"] == pytest.approx(row["flops_M"], abs=1e-6)
        params = sum(p.numel() for p in network.blocks.parameters())
        assert params / 1e6 + ESTIMATES["params_fixed_M"] == pytest.approx(row["params_M"], abs=1e-9)


def blocks_with_inputs(network: Any, images: Tensor, stages: slice = slice(1, 6)) -> list[tuple[nn.Module, Tensor]]:
    seen: list[tuple[nn.Module, Tensor]] = []
    for stage in network.blocks[stages]:
        for block in stage:
            block.register_forward_pre_hook(lambda module, args: seen.append((module, args[0])))
    network(images)
    for block, _ in seen:
        block._forward_pre_hooks.clear()
    return seen


class Reference:
    """The supernet with the reference's weights, run once through a path of the reference.

    Torch's own hard-sigmoid, which the supernet has, is off by 3e-8 in its backward pass even in double precision.
    """

    def __init__(self, case: dict[str, Any], exact_gates: bool) -> None:
        self.case = case
        self.tolerance = 1e-9 if exact_gates else 1e-6
        # The published code writes -1 for a block that is left out.
        skips = any(-1 in stage for stage in case["arch"])
        self.space = CreamSpace([len(stage) for stage in case["arch"][1:-1]], 10, skip=skips).double()
        sample = CreamPath.of([[len(CHOICES) if i == -1 else i for i in stage] for stage in case["arch"]]).to_sample()
        apply_rule(self.space, sample)
        if exact_gates:
            use_exact_gates(self.space)
        run_through(self.space, sample)
        images = standard_normal(case["input_seed"], *case["input_shape"])
        self.space.eval()
        with torch.no_grad():
            self.evaluated = self.space(images)
        self.space.train()
        self.trained = self.space(images)
        self.loss = nn.functional.cross_entropy(self.trained, torch.tensor([3, 7]), label_smoothing=0.1)
        self.loss.backward()


@pytest.fixture(scope="module", params=FORWARD)
def case(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="module", params=[True, False], ids=["timm's gates", "torch's gates"])
def reference(request: pytest.FixtureRequest, case: dict[str, Any]) -> Reference:
    return Reference(case, request.param)


def exact(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


class TestForward:
    def test_evaluation(self, reference: Reference) -> None:
        torch.testing.assert_close(reference.evaluated, exact(reference.case["eval_logits"]), rtol=0, atol=1e-9)

    def test_training(self, reference: Reference) -> None:
        torch.testing.assert_close(reference.trained, exact(reference.case["train_logits"]), rtol=0, atol=1e-9)
        assert reference.loss.item() == pytest.approx(reference.case["train_loss_ls0.1_target_3_7"], abs=1e-9)

    def test_gradients(self, reference: Reference) -> None:
        gradients = {
            name: parameter.grad.abs().sum().item()
            for name, parameter in reference.space.named_parameters()
            if parameter.grad is not None
        }
        assert len(gradients) == reference.case["n_rand_parameters"]
        assert gradients == pytest.approx(reference.case["grad_abs_sum"], rel=reference.tolerance)

    def test_running_mean(self, reference: Reference) -> None:
        expected = exact(reference.case["bn1_running_mean_after"])
        torch.testing.assert_close(reference.space.bn1.running_mean, expected, rtol=0, atol=1e-12)


@pytest.fixture
def space() -> CreamSpace:
    torch.manual_seed(0)
    return CreamSpace(DEPTHS, 10)


class TestSpace:
    def test_choices_are_labelled_like_paths(self, space: CreamSpace) -> None:
        simplified = space.simplify()
        assert set(simplified) == set(PATH.to_sample())
        sizes = {label: len(choice.values) for label, choice in simplified.items()}
        assert sizes == {label: 1 if label in ("stage0_block0", "stage6_block0") else 6 for label in simplified}

    @pytest.mark.parametrize("depths", [(), (1, 1, 1, 1), (1, 1, 1, 1, 1, 1), (1, 1, 0, 1, 1), (1, 1, -1, 1, 1)])
    def test_depths_that_do_not_fit_are_an_error(self, depths: tuple[int, ...]) -> None:
        with pytest.raises(UserError, match=r"needs 5 depths of at least 1, not \["):
            CreamSpace(depths, 10)

    def test_only_the_first_block_of_a_stage_has_the_stride(self, space: CreamSpace) -> None:
        for stage, table in zip(space.blocks[1:-1], STAGES, strict=True):
            for number, block in enumerate(stage):
                assert {candidate.conv_dw.stride for candidate in block} == {
                    (table.stride,) * 2 if number == 0 else (1, 1)
                }

    def test_freezing_gives_the_child(self, space: CreamSpace) -> None:
        sample = PATH.to_sample()
        apply_rule(space, sample)
        frozen = space.freeze(sample)
        child = build_child(PATH, num_classes=10)
        state = space.state_dict()
        chosen: dict[str, Tensor] = {}
        for name in child.state_dict():
            parts = name.split(".")
            if parts[0] == "blocks":
                parts.insert(3, str(sample[f"stage{parts[1]}_block{parts[2]}"]))
            chosen[name] = state[".".join(parts)]
        assert list(frozen.state_dict()) == list(chosen)
        child.load_state_dict(chosen)

        images = standard_normal(5, 2, 3, 64, 64).float()
        run_through(space, sample)
        for network in (space, frozen, child):
            network.eval()
        with torch.no_grad():
            expected = child(images)
            assert torch.equal(frozen(images), expected)
            assert torch.equal(space(images), expected)
        assert expected.std() > 0

    def test_architecture_of_a_sample(self, space: CreamSpace) -> None:
        assert space.architecture(PATH.to_sample()) == PATH

    @pytest.mark.parametrize("size", [32, 64])
    def test_shape_of_logits(self, space: CreamSpace, size: int) -> None:
        assert space.eval()(torch.zeros(3, 3, size, size)).shape == (3, 10)

    def test_weights_follow_from_the_seed(self, space: CreamSpace) -> None:
        torch.manual_seed(0)
        again = CreamSpace(DEPTHS, 10)
        assert all(torch.equal(a, b) for a, b in zip(space.parameters(), again.parameters(), strict=True))

    @pytest.mark.parametrize("options", [{}, {"dil_conv": True, "resunit": ("basic", "bottleneck"), "skip": True}])
    def test_weights_begin_by_the_rule_of_efficientnets(self, options: Any) -> None:
        torch.manual_seed(0)
        for name, layer in CreamSpace(DEPTHS, 10, **options).named_modules():
            if isinstance(layer, nn.Conv2d):
                fan_out = layer.kernel_size[0] * layer.kernel_size[1] * layer.out_channels // layer.groups
                squares = layer.weight.detach().square() * fan_out / 2  # of a standard normal distribution
                assert squares.mean().item() == pytest.approx(1, abs=5 * (2 / squares.numel()) ** 0.5), name
            elif isinstance(layer, nn.Linear):
                limit = layer.out_features**-0.5
                assert 0.99 * limit < layer.weight.abs().max() <= limit
                assert layer.weight.square().mean().item() == pytest.approx(limit**2 / 3, rel=0.05)
            elif isinstance(layer, nn.BatchNorm2d):
                assert torch.equal(layer.weight, torch.ones_like(layer.weight)), name
            if getattr(layer, "bias", None) is not None:
                assert not layer.bias.any(), name

    def test_unaligned_candidates_are_independent(self, space: CreamSpace) -> None:
        wide3, wide5 = (space.blocks[1][0][CHOICES.index(c)] for c in (Choice(3, 6), Choice(5, 6)))
        assert not torch.equal(wide3.conv_pw.weight, wide5.conv_pw.weight)


OPTIONS = {"dil_conv": True, "resunit": ("basic",), "skip": True}


class TestOptions:
    # Candidates: 0 to 5 inverted residuals, 6 and 7 dil_conv, 8 the basic residual unit, 9 no block.
    SAMPLE = CreamPath.parse("[0] [8,9,9] [7,9,3] [6,8,9] [1,9] [4] [0]").to_sample()
    ARCHITECTURE = CreamPath.parse("[0] [9] [7,3] [6,9] [1] [4] [0]")

    @pytest.fixture
    def space(self) -> CreamSpace:
        torch.manual_seed(0)
        return CreamSpace((3, 3, 3, 2, 1), 10, **OPTIONS)

    @pytest.mark.parametrize(
        ("options", "sizes"),
        [
            ({}, (6, 6)),
            ({"dil_conv": True}, (8, 8)),
            ({"resunit": ("bottleneck",)}, (7, 7)),
            ({"resunit": ("basic", "bottleneck")}, (8, 8)),
            ({"skip": True}, (6, 7)),
            ({"dil_conv": True, "resunit": ("bottleneck", "basic"), "skip": True}, (10, 11)),
        ],
    )
    def test_candidates_of_first_and_further_blocks(self, options: Any, sizes: tuple[int, int]) -> None:
        simplified = CreamSpace(DEPTHS, 10, **options).simplify()
        assert tuple(len(simplified[f"stage2_block{b}"].values) for b in range(2)) == sizes
        assert len(simplified["stage0_block0"].values) == len(simplified["stage6_block0"].values) == 1

    def test_architecture_numbers_operations_and_leaves_skipped_blocks_out(self, space: CreamSpace) -> None:
        assert space.architecture(self.SAMPLE) == self.ARCHITECTURE
        bottleneck = CreamSpace(DEPTHS, 10, resunit=["bottleneck"])
        sample = CreamPath.parse("[0] [6] [1,6] [0,4] [5] [1] [0]").to_sample()
        assert bottleneck.architecture(sample) == CreamPath.parse("[0] [8] [1,8] [0,4] [5] [1] [0]")

    def test_frozen_network_is_the_child(self, space: CreamSpace) -> None:
        names = list(space.state_dict())
        frozen = space.freeze(self.SAMPLE)
        child = build_child(self.ARCHITECTURE, num_classes=10)
        assert {n: t.shape for n, t in frozen.state_dict().items()} == {
            n: t.shape for n, t in child.state_dict().items()
        }
        child.load_state_dict(frozen.state_dict())
        run_through(space, self.SAMPLE)
        images = standard_normal(5, 2, 3, 64, 64).float()
        with torch.no_grad():
            expected = child.eval()(images)
            assert torch.equal(frozen.eval()(images), expected)
            assert torch.equal(space.eval()(images), expected)
        assert expected.std() > 0
        assert list(space.state_dict()) == names  # freezing took nothing from the supernet

    def test_prior_of_every_choice(self, space: CreamSpace) -> None:
        probabilities = (0.1,) * 6 + (0.05, 0.05, 0.1, 0.2)
        prior = space.prior(probabilities)
        assert set(prior) == {label for label in self.SAMPLE if not label.startswith(("stage0", "stage6"))}
        assert prior["stage1_block0"] == probabilities[:-1]
        assert prior["stage1_block1"] == prior["stage4_block1"] == probabilities

    @pytest.mark.parametrize(
        ("options", "given", "message"),
        [
            ({}, 7, "The prior has 7 probabilities, but the blocks of this space have 6 candidates."),
            ({"skip": True}, 6, "have 7 candidates, the last of which leaves the block out."),
            (OPTIONS, 9, "have 10 candidates, the last of which"),
        ],
    )
    def test_prior_that_does_not_fit_is_an_error(self, options: Any, given: int, message: str) -> None:
        with pytest.raises(UserError, match=message):
            CreamSpace(DEPTHS, 10, **options).prior((1 / given,) * given)

    def test_the_inverted_residuals_can_be_aligned_beside_them(self) -> None:
        torch.manual_seed(0)
        block = CreamSpace(DEPTHS, 10, **OPTIONS, aligned=True).blocks[2][1]
        small, large = (block[CHOICES.index(Choice(k, 6))].conv_dw.weight for k in (3, 7))
        assert torch.equal(large[:, :, 2:5, 2:5], small)
        assert block[6].op[1].weight.std() > 0.1


class TestOwnOperations:
    @pytest.fixture(autouse=True)
    def _two(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cream, "_OWN", {})
        for name, number, kernel in (("five", 130, 5), ("three", 100, 3)):

            def build(i: int, o: int, s: int, kernel: int = kernel) -> nn.Module:
                return nn.Sequential(nn.Conv2d(i, o, kernel, s, padding=kernel // 2, bias=False), nn.BatchNorm2d(o))

            cream.register_block_operation(name, number=number)(build)

    def test_they_come_after_the_others_and_before_leaving_out(self) -> None:
        space = CreamSpace(DEPTHS, 10, resunit=["basic"], operations=["three", "five"], skip=True)
        sizes = [len(space.simplify()[f"stage2_block{b}"].values) for b in range(2)]
        assert sizes == [9, 10]
        sample = CreamPath.parse("[0] [8] [7,9] [6,1] [5] [7] [0]").to_sample()
        assert space.architecture(sample) == CreamPath.parse("[0] [130] [100] [9,1] [5] [100] [0]")
        assert space.prior((0.1,) * 10)["stage2_block1"] == (0.1,) * 10

    def test_frozen_network_is_the_child_and_costs_as_much(self) -> None:
        torch.manual_seed(0)
        space = CreamSpace(DEPTHS, 10, operations=["five", "three"])
        sample = CreamPath.parse("[0] [6] [7,2] [0,6] [7] [3] [0]").to_sample()
        path = space.architecture(sample)
        assert str(path) == "[[0], [130], [100, 2], [0, 130], [100], [3], [0]]"
        child = build_child(path, num_classes=10)
        child.load_state_dict(space.freeze(sample).state_dict())
        run_through(space, sample)
        images = standard_normal(5, 2, 3, 64, 64).float()
        with torch.no_grad():
            assert torch.equal(space.eval()(images), child.eval()(images))
        assert measure_space(space, (3, 64, 64)).of(sample) == measure_network(child, 64)

    def test_what_is_not_registered_is_an_error(self) -> None:
        with pytest.raises(UserError, match="There is no block operation 'seven'; of your own there are five, three"):
            CreamSpace(DEPTHS, 10, operations=["seven"])


class TestAlign:
    @pytest.fixture
    def aligned(self) -> CreamSpace:
        torch.manual_seed(0)
        return CreamSpace(DEPTHS, 10, aligned=True).double()

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("expansion", [4, 6])
    def test_kernels_start_as_the_same_function(self, aligned: CreamSpace, expansion: int, training: bool) -> None:
        # The first block of a stage changes the number of channels, so no residual hides its output.
        for stage in aligned.blocks[1:-1]:
            candidates = [c for choice, c in zip(CHOICES, stage[0], strict=True) if choice.expansion == expansion]
            assert not candidates[0].has_skip
            images = standard_normal(1, 4, candidates[0].conv_pw.in_channels, 9, 9)
            outputs = [candidate.train(training)(images) for candidate in candidates]
            assert len(outputs) == 3
            assert outputs[0].std() > 1e-3
            for output in outputs[1:]:
                torch.testing.assert_close(output, outputs[0], rtol=1e-12, atol=1e-12)

    def test_whole_networks_agree(self, aligned: CreamSpace) -> None:
        images = standard_normal(2, 4, 3, 64, 64)
        logits = []
        for chosen in ("[0] [1] [1,1] [1,1] [1] [1] [0]", "[0] [5] [3,1] [5,3] [3] [5] [0]"):
            run_through(aligned, CreamPath.parse(chosen).to_sample())
            logits.append(aligned.train()(images))
        torch.testing.assert_close(logits[0], logits[1], rtol=1e-9, atol=1e-12)

    def test_narrow_candidates_hold_the_first_channels_of_the_wide_one(self, aligned: CreamSpace) -> None:
        for stage in aligned.blocks[1:-1]:
            for block in stage:
                wide, narrow = (block[CHOICES.index(Choice(3, e))] for e in (6, 4))
                n = narrow.conv_pw.out_channels
                r = narrow.se.conv_reduce.out_channels
                assert n * 6 == wide.conv_pw.out_channels * 4
                assert torch.equal(narrow.conv_pw.weight, wide.conv_pw.weight[:n])
                assert torch.equal(narrow.conv_dw.weight, wide.conv_dw.weight[:n])
                assert torch.equal(narrow.conv_pwl.weight, wide.conv_pwl.weight[:, :n])
                assert torch.equal(narrow.se.conv_reduce.weight, wide.se.conv_reduce.weight[:r, :n])
                assert torch.equal(narrow.se.conv_expand.weight, wide.se.conv_expand.weight[:n, :r])

    def test_large_kernels_hold_the_small_one_in_their_middle(self, aligned: CreamSpace) -> None:
        block = aligned.blocks[2][1]
        small, large = (block[CHOICES.index(Choice(k, 6))].conv_dw.weight for k in (3, 7))
        assert torch.equal(large[:, :, 2:5, 2:5], small)
        assert torch.count_nonzero(large) == torch.count_nonzero(small)

    def test_nothing_is_shared_afterwards(self, aligned: CreamSpace) -> None:
        addresses = [parameter.data_ptr() for parameter in aligned.parameters()]
        assert len(set(addresses)) == len(addresses)

    def test_the_wide_small_candidate_keeps_its_weights(self, space: CreamSpace) -> None:
        candidates = list(space.blocks[3][1])
        before = copy.deepcopy(candidates[1].state_dict())
        align(candidates)
        assert all(torch.equal(before[name], tensor) for name, tensor in candidates[1].state_dict().items())
        assert all(p.requires_grad for candidate in candidates for p in candidate.parameters())
