"""Networks of cells of DARTS: beside the reference, and part by part."""

from __future__ import annotations

import re
import zlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nni_cream.errors import UserError
from nni_cream.genotype import PUBLISHED_GENOTYPES, CellKind, Genotype
from nni_cream.models.darts import AuxiliaryHead, Cell, DartsNetwork, DartsOutput, build_darts
from tests.reference import apply_rule, golden, standard_normal

V2 = PUBLISHED_GENOTYPES["darts_v2"]


def small(**changes: Any) -> DartsNetwork:
    arguments: dict[str, Any] = {"num_classes": 10, "channels": 2, "cells": 3, "stem": "cifar", **changes}
    return build_darts(arguments.pop("genotype", V2), **arguments)


def genotype(normal: list[tuple[str, int]], reduce: list[tuple[str, int]]) -> Genotype:
    return Genotype(normal=tuple(normal), normal_concat=(2,), reduce=tuple(reduce), reduce_concat=(2,))


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case["seed"]) for case in golden("darts/evaluation.json")["cases"]]
)
class TestReference:
    @staticmethod
    def network(case: dict[str, Any]) -> DartsNetwork:
        network = build_darts(
            PUBLISHED_GENOTYPES[case["genotype"].lower()],
            num_classes=case["num_classes"],
            channels=case["C"],
            cells=case["layers"],
            stem={"CIFAR": "cifar", "ImageNet": "imagenet"}[case["network"]],  # type: ignore[arg-type]
            auxiliary=case["auxiliary"],
        ).double()
        apply_rule(network, seed=case["seed"])
        return network

    @staticmethod
    def images(case: dict[str, Any]) -> Tensor:
        return standard_normal(zlib.crc32((case["seed"] + "x").encode()) & 0x7FFFFFFF, *case["input_shape"])

    @staticmethod
    def same(actual: Tensor, expected: list[list[float]]) -> None:
        torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)

    def test_state_dict_has_the_published_keys_in_order(self, case: dict[str, Any]) -> None:
        network = self.network(case)
        assert [[key, list(tensor.shape)] for key, tensor in network.state_dict().items()] == case["state_dict"]
        assert sum(p.numel() for p in network.parameters()) == case["parameters"]

    def test_evaluation(self, case: dict[str, Any]) -> None:
        with torch.no_grad():
            self.same(self.network(case).eval()(self.images(case)), case["eval_logits"])

    def test_training(self, case: dict[str, Any]) -> None:
        with torch.no_grad():
            output = self.network(case).train()(self.images(case))
        assert isinstance(output, DartsOutput)
        self.same(output.logits, case["train"]["logits"])
        self.same(output.auxiliary, case["train"]["auxiliary_logits"])


class TestCells:
    @pytest.mark.parametrize(
        ("cells", "reductions"), [(3, [1, 2]), (4, [1, 2]), (5, [1, 3]), (14, [4, 9]), (20, [6, 13])]
    )
    @pytest.mark.usefixtures("on_meta")
    def test_channels_double_and_resolution_halves_at_one_and_two_thirds(
        self, cells: int, reductions: list[int]
    ) -> None:
        network = small(channels=4, cells=cells)
        shapes: list[tuple[int, ...]] = []
        for cell in network.cells:
            cell.register_forward_hook(lambda _cell, _inputs, output: shapes.append(tuple(output.shape[1:])))
        network(torch.empty(2, 3, 32, 32))
        levels = [sum(index >= reduction for reduction in reductions) for index in range(cells)]
        # Four nodes of the published cell are concatenated.
        assert shapes == [(4 * 4 * 2**level, 32 // 2**level, 32 // 2**level) for level in levels]

    def test_value_of_a_cell(self) -> None:
        edges = [("max_pool_3x3", 0), ("skip_connect", 1), ("avg_pool_3x3", 2), ("skip_connect", 0)]
        cells = Genotype(normal=tuple(edges), normal_concat=(3, 2), reduce=tuple(edges), reduce_concat=(2,))
        cell = Cell(cells, "normal", 6, 5, 4, after_reduction=False).double().eval()
        apply_rule(cell)
        before, last = standard_normal(1, 2, 6, 8, 8), standard_normal(2, 2, 5, 8, 8)
        first, second = cell.preprocess0(before), cell.preprocess1(last)
        node2 = nn.functional.max_pool2d(first, 3, 1, 1) + second
        node3 = nn.functional.avg_pool2d(node2, 3, 1, 1, count_include_pad=False) + first
        torch.testing.assert_close(cell(before, last), torch.cat([node3, node2], dim=1), rtol=0, atol=1e-12)


class TestDropPath:
    """Cells of one node with two edges, of which every sample keeps or drops each: node = a · left + b · right."""

    RATE = 0.3
    SAMPLES = 2000

    def factors(self, kind: CellKind, left: str, right: str) -> Tensor:
        """The factors a and b of every sample, found by least squares, [samples, 2]."""
        edges = [(left, 0), (right, 1)]
        cell = Cell(genotype(edges, edges), kind, 4, 4, 4, after_reduction=False).double()
        apply_rule(cell)
        cell.eval()
        # The batch norms stay as they are, so that what an edge computes does not depend on the other samples.
        cell.drop_path.train()
        cell.drop_path.drop_prob = self.RATE
        torch.manual_seed(0)
        before, last = standard_normal(1, 1, 4, 4, 4), standard_normal(2, 1, 4, 4, 4)
        with torch.no_grad():
            nodes = cell(before.expand(self.SAMPLES, -1, -1, -1), last.expand(self.SAMPLES, -1, -1, -1)).flatten(1)
            states = (cell.preprocess0(before), cell.preprocess1(last))
            kept = torch.stack([cell._ops[edge](states[edge]).flatten() for edge in range(2)], dim=1)
        factors = torch.linalg.lstsq(kept, nodes.T).solution
        torch.testing.assert_close(kept @ factors, nodes.T, rtol=0, atol=1e-9)
        return factors.T

    @pytest.mark.parametrize(
        ("kind", "left", "right"),
        [
            ("normal", "max_pool_3x3", "avg_pool_3x3"),
            ("normal", "sep_conv_3x3", "dil_conv_5x5"),
            ("reduce", "skip_connect", "skip_connect"),
            ("reduce", "conv_7x1_1x7", "avg_pool_3x3"),
        ],
    )
    def test_every_edge_of_every_sample_is_dropped_or_scaled(self, kind: CellKind, left: str, right: str) -> None:
        factors = self.factors(kind, left, right)
        keep = 1 - self.RATE
        dropped = factors.abs() < 1e-6
        torch.testing.assert_close(factors[~dropped], torch.full_like(factors[~dropped], 1 / keep), rtol=0, atol=1e-6)
        # Independently: the four cases are as frequent as products say, within four standard deviations.
        for left_dropped in (True, False):
            for right_dropped in (True, False):
                share = ((dropped[:, 0] == left_dropped) & (dropped[:, 1] == right_dropped)).double().mean().item()
                p = (self.RATE if left_dropped else keep) * (self.RATE if right_dropped else keep)
                assert share == pytest.approx(p, abs=4 * (p * (1 - p) / self.SAMPLES) ** 0.5)

    def test_an_identity_is_exempt(self) -> None:
        factors = self.factors("normal", "skip_connect", "max_pool_3x3")
        torch.testing.assert_close(factors[:, 0], torch.ones(self.SAMPLES, dtype=torch.float64), rtol=0, atol=1e-9)
        assert set((factors[:, 1] * (1 - self.RATE)).round().abs().tolist()) == {0.0, 1.0}

    def test_the_rate_is_the_same_everywhere_and_can_be_changed(self) -> None:
        network = small(cells=5, drop_path_rate=0.2)
        rates = [cell.drop_path.drop_prob for cell in network.cells]
        assert rates == [0.2] * 5
        network.set_drop_path_rate(0.1)
        assert [cell.drop_path.drop_prob for cell in network.cells] == [0.1] * 5

    def test_it_acts_in_training_only_and_not_at_rate_0(self) -> None:
        images = standard_normal(1, 4, 3, 8, 8).float()
        network = small(drop_path_rate=0.5).eval()
        assert torch.equal(network(images), network(images))
        network.train()
        assert not torch.equal(network(images), network(images))
        network.set_drop_path_rate(0.0)
        assert torch.equal(network(images), network(images))

    def test_it_has_no_entries_in_the_state_dict(self) -> None:
        assert list(small(drop_path_rate=0.5).state_dict()) == list(small().state_dict())


@pytest.mark.usefixtures("on_meta")
class TestAuxiliaryHead:
    def test_without_it_and_in_evaluation_there_are_only_logits(self) -> None:
        for network in (small().train(), small(auxiliary=True).eval()):
            logits = network(torch.empty(2, 3, 32, 32))
            assert isinstance(logits, Tensor)
            assert logits.shape == (2, 10)

    @pytest.mark.parametrize(("stem", "sizes"), [("cifar", (32, 36, 40)), ("imagenet", (224, 256))])
    def test_right_sizes(self, stem: str, sizes: tuple[int, ...]) -> None:
        network = small(stem=stem, channels=4, auxiliary=True, num_classes=7)
        for size in sizes:
            output = network(torch.empty(2, 3, size, size))
            assert (output.logits.shape, output.auxiliary.shape) == ((2, 7), (2, 7))

    @pytest.mark.parametrize(
        ("stem", "shape", "message"),
        [
            ("cifar", (28, 32), "features of 8 to 10 pixels, not 7 × 8; train with images of 32 or 36 or 40 pixels"),
            ("cifar", (32, 44), "not 8 × 11"),
            ("imagenet", (192, 192), "features of 7 to 8 pixels, not 6 × 6; train with images of 224 or 256 pixels"),
            ("imagenet", (288, 288), "not 9 × 9"),
        ],
    )
    def test_wrong_sizes(self, stem: str, shape: tuple[int, int], message: str) -> None:
        network = small(stem=stem, channels=4, auxiliary=True)
        with pytest.raises(UserError, match=message):
            network(torch.empty(2, 3, *shape))
        assert network.eval()(torch.empty(2, 3, *shape)).shape == (2, 10)
        assert small(stem=stem, channels=4).train()(torch.empty(2, 3, *shape)).shape == (2, 10)

    @pytest.mark.parametrize(("stem", "norms"), [("cifar", 2), ("imagenet", 1)])
    def test_only_cifar_has_a_norm_after_the_second_convolution(self, stem: Any, norms: int) -> None:
        head = AuxiliaryHead(8, 10, stem)
        assert sum(isinstance(module, nn.BatchNorm2d) for module in head.modules()) == norms


def test_gradients_of_the_auxiliary_head_reach_the_cells_before_it_only() -> None:
    network = small(cells=6, auxiliary=True)
    network(torch.ones(2, 3, 32, 32)).auxiliary.sum().backward()
    reached = {name.rsplit(".", 1)[0] for name, p in network.named_parameters() if p.grad is not None}
    assert {name.split(".")[1] for name in reached if name.startswith("cells")} == {"0", "1", "2", "3", "4"}
    assert "classifier" not in reached


def test_gradient_checkpointing_is_refused() -> None:
    network = small()
    network.set_grad_checkpointing(False)
    with pytest.raises(UserError, match="no gradient checkpointing"):
        network.set_grad_checkpointing()


@pytest.mark.parametrize(("stem", "size", "count"), [("cifar", 16, 3), ("imagenet", 64, 5)])
class TestIntermediates:
    def test_they_are_the_outputs_of_the_named_modules(self, stem: str, size: int, count: int) -> None:
        network = small(stem=stem, channels=4, cells=5).eval()
        images = standard_normal(1, 2, 3, size, size).float()
        outputs: dict[str, Tensor] = {}
        for name, module in network.named_modules():
            module.register_forward_hook(lambda _m, _inputs, output, name=name: outputs.__setitem__(name, output))
        with torch.no_grad():
            last, intermediates = network.forward_intermediates(images)
            features = network.forward_features(images)
        assert len(intermediates) == len(network.feature_info) == count
        for info, intermediate in zip(network.feature_info, intermediates, strict=True):
            assert torch.equal(intermediate, outputs[info["module"]])
            assert intermediate.shape[1:] == (info["num_chs"], size // info["reduction"], size // info["reduction"])
        assert torch.equal(last, features)
        assert torch.equal(intermediates[-1], features)

    def test_some_of_them(self, stem: str, size: int, count: int) -> None:
        network = small(stem=stem, channels=4, cells=5).eval()
        images = standard_normal(1, 2, 3, size, size).float()
        everything = network.forward_intermediates(images, intermediates_only=True)
        for indices in (2, [0, -1], [1]):
            chosen = range(count - 2, count) if indices == 2 else [index % count for index in indices]  # type: ignore[union-attr]
            some = network.forward_intermediates(images, indices, stop_early=True, intermediates_only=True)
            assert [torch.equal(a, everything[i]) for a, i in zip(some, chosen, strict=True)] == [True] * len(chosen)

    def test_stopping_early_computes_no_more(self, stem: str, size: int, count: int) -> None:
        network = small(stem=stem, channels=4, cells=5)
        ran: list[int] = []
        for index, cell in enumerate(network.cells):
            cell.register_forward_hook(lambda _cell, _inputs, _output, index=index: ran.append(index))
        network.forward_intermediates(torch.zeros(2, 3, size, size), [count - 2], stop_early=True)
        assert ran == [0, 1, 2]

    def test_other_formats_are_an_error(self, stem: str, size: int, count: int) -> None:
        with pytest.raises(UserError, match="the format NCHW, not NLC"):
            small(stem=stem, channels=4).forward_intermediates(torch.zeros(1, 3, size, size), output_fmt="NLC")

    def test_pruning_leaves_what_is_needed(self, stem: str, size: int, count: int) -> None:
        images = standard_normal(1, 2, 3, size, size).float()
        for level in range(count):
            network = small(stem=stem, channels=4, cells=5, auxiliary=True).eval()
            expected = network.forward_intermediates(images, intermediates_only=True)[level]
            assert network.prune_intermediate_layers([level]) == [level]
            info = network.feature_info[level]
            last = list(dict(network.named_parameters()))[-1]
            kept = info["module"].split(".")
            if info["module"] == "stem0.2":
                kept[1] = "1"  # the ReLU has no weights
            assert last.split(".")[:2] == kept
            assert torch.equal(network(images), expected)
            assert network.num_features == info["num_chs"]
            network.reset_classifier(6, "avg")
            assert network.train()(images).shape == (2, 6)


def test_the_global_pool_of_imagenet_is_the_published_7_by_7_one() -> None:
    network = small(stem="imagenet", channels=4).double()
    features = standard_normal(1, 2, network.num_features, 7, 7)
    pooled = nn.functional.avg_pool2d(features, 7).flatten(1)
    torch.testing.assert_close(network.forward_head(features, pre_logits=True), pooled, rtol=0, atol=1e-12)


def test_dropout_acts_before_the_classifier_and_in_training_only() -> None:
    network = small(drop_rate=0.5)
    features = torch.ones(400, network.num_features, 1, 1)
    torch.manual_seed(0)
    pooled = network.forward_head(features, pre_logits=True)
    assert set(pooled.unique().tolist()) == {0.0, 2.0}
    assert (pooled == 0).float().mean().item() == pytest.approx(0.5, abs=4 * 0.5 / pooled.numel() ** 0.5)
    assert torch.equal(network.eval().forward_head(features, pre_logits=True), features.flatten(1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"genotype": genotype([("conv_9x9", 0), ("skip_connect", 1)], [("none", 0), ("none", 1)])},
            "no operation 'conv_9x9'",
        ),
        ({"cells": 2}, "at least 3 cells, two of them reductions, not 2"),
        ({"channels": 0}, "a positive number, not 0"),
        ({"stem": "imagenet", "channels": 5}, "a positive number, and even for ImageNet, .*, not 5"),
        ({"stem": "cifar100"}, "no DARTS stem 'cifar100'; there are cifar and imagenet"),
        ({"drop_path_rate": 1.0}, "a probability from 0 to below 1, not 1.0"),
        ({"drop_path_rate": -0.1}, "not -0.1"),
    ],
)
def test_networks_that_cannot_be_are_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        small(**changes)


def test_drop_path_rates_that_cannot_be_are_errors_later_too() -> None:
    network = small()
    for rate in (1.0, -0.5, float("nan")):
        with pytest.raises(UserError, match=re.escape(f"not {rate}")):
            network.set_drop_path_rate(rate)


@pytest.mark.parametrize(("stem", "size"), [("cifar", 30), ("imagenet", 240)])
@pytest.mark.usefixtures("on_meta")
def test_images_that_cannot_be_halved_are_an_error(stem: str, size: int) -> None:
    with pytest.raises(UserError, match="an even height and width, not 15 × 15"):
        small(stem=stem, channels=4, cells=4)(torch.empty(2, 3, size, size))


@pytest.mark.usefixtures("on_meta")
def test_odd_channels_work_on_small_images() -> None:
    assert small(channels=5, cells=5, auxiliary=True)(torch.empty(2, 3, 32, 32)).auxiliary.shape == (2, 10)
