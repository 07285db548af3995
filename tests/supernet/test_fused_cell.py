from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn

from nni_cream.curvature import dominant_eigenvalue
from nni_cream.differentiation import leaves_out_weights
from nni_cream.errors import UserError
from nni_cream.hypergradient import exact, finite_difference, first_order, sgd_step
from nni_cream.models import darts_operations
from nni_cream.models.darts_operations import OPERATIONS, PAPER_OPERATIONS
from nni_cream.strategies.darts import DartsStrategy
from nni_cream.supernet import depthwise, depthwise_forms, fused_cell, stages
from nni_cream.supernet.batch_norm import batch_statistics, recalibrated
from nni_cream.supernet.functional import pure_loss
from nni_cream.supernet.fused_cell import FusedCell
from nni_cream.supernet.mixed_cell import MixedCell
from search_spaces.darts import DartsSpace
from tests.darts_reference import Together

# NORMAL, REDUCE, REDUCE after a reduction, NORMAL after a reduction.
POSITIONS = range(4)


def relaxed(execution: Any, dtype: torch.dtype = torch.float64, **network: Any) -> Together:
    """A relaxed space, with running statistics that tell the batch norms of different edges apart."""
    torch.manual_seed(0)
    space = DartsSpace(5, **{"channels": 4, "cells": 4, "nodes": 2, **network})
    strategy = DartsStrategy(execution=execution)
    strategy.mutate_model(space)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for table in strategy.alphas.parameters():
            table.normal_(generator=generator)
        for name, buffer in space.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(generator=generator)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2, generator=generator)
    return Together(space, strategy.alphas).to(dtype)


def pair(**network: Any) -> tuple[Together, Together]:
    """The oracle and what is tested, alike."""
    textbook, fused = relaxed("textbook", **network), relaxed("fused", **network)
    assert {type(cell) for cell in textbook.space.cells} == {MixedCell}
    assert {type(cell) for cell in fused.space.cells} == {FusedCell}
    return textbook, fused


@contextmanager
def textbook_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[MixedCell]]:
    """Collect the fused cells that run as in the textbook."""
    calls: list[MixedCell] = []
    original = MixedCell.forward

    def forward(self: MixedCell, before_last: Tensor, last: Tensor) -> Tensor:
        calls.append(self)
        return original(self, before_last, last)

    with monkeypatch.context() as patch:
        patch.setattr(MixedCell, "forward", forward)
        yield calls


def inputs(cell: Any, number: int = 3, size: int = 8) -> list[Tensor]:
    """The outputs of two earlier cells, as a leaf each."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for block in (cell.preprocess0, cell.preprocess1):
        halves = hasattr(block, "conv_1")
        channels = (block.conv_1 if halves else block.op[1]).in_channels
        side = size * (1 + halves)
        shape = (number, channels, side, side)
        found.append(torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_())
    return found


def derivatives(output: Tensor, variables: Sequence[Tensor]) -> list[Tensor]:
    """Value, gradient, and product of the Hessian with a vector, of a curved function of ``output``."""
    generator = torch.Generator().manual_seed(3)

    def like(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, dtype=tensor.dtype, generator=generator).to(tensor.device)

    loss = (output.sin() * like(output)).sum()
    first = torch.autograd.grad(loss, variables, create_graph=True, materialize_grads=True)
    along = sum((slope * like(slope)).sum() for slope in first)
    assert isinstance(along, Tensor)
    second = torch.autograd.grad(along, variables, materialize_grads=True)
    return [output, *first, *second]


def assert_same(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        scale = max(1.0, b.detach().abs().max().item()) if b.numel() else 1.0
        torch.testing.assert_close(a.detach() / scale, b.detach() / scale, rtol=1e-10, atol=1e-11)


def assert_cells_agree(textbook: Together, fused: Together, position: int, size: int = 8, device: str = "cpu") -> None:
    """Compare on a CPU, with what is tested on ``device``."""
    results = []
    for network, where in ((textbook, "cpu"), (fused.to(device), device)):
        cell = network.space.cells[position]
        given = [features.detach().to(where).requires_grad_() for features in inputs(cell, size=size)]
        variables = [*given, *cell.parameters(), *network.alphas.parameters()]
        # A gradient that nobody differentiates is computed in another way.
        plain = torch.autograd.grad(cell(*given).sin().sum(), variables, materialize_grads=True)
        found = [*plain, *derivatives(cell(*given), variables), *cell.buffers()]
        results.append([tensor.cpu() for tensor in found])
    assert any(slope.abs().max() > 1e-3 for slope in results[0][1:])
    assert_same(results[1], results[0])


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
class TestCell:
    @pytest.mark.parametrize("position", POSITIONS)
    @pytest.mark.parametrize("nodes", [1, 2, 3, pytest.param(4, marks=pytest.mark.slow), 5])
    def test_nodes(self, nodes: int, position: int, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        # Five nodes with fewer operations, which is enough for another number of edges.
        operations = PAPER_OPERATIONS if nodes < 5 else ("skip_connect", "avg_pool_3x3", "dil_conv_3x3")
        textbook, fused = pair(nodes=nodes, operations=operations)
        textbook.train(training)
        fused.train(training)
        assert_cells_agree(textbook, fused, position)
        with textbook_calls(monkeypatch) as calls, torch.no_grad():
            fused.space.cells[position](*inputs(fused.space.cells[position]))
        assert not calls

    @pytest.mark.parametrize("position", POSITIONS)
    @pytest.mark.parametrize("operation", [name for name in OPERATIONS if name != "none"])
    def test_operation(self, operation: str, position: int, training: bool) -> None:
        textbook, fused = pair(nodes=1, operations=(operation, "none"))
        textbook.train(training)
        fused.train(training)
        assert_cells_agree(textbook, fused, position)

    @pytest.mark.parametrize("position", POSITIONS)
    def test_inputs_too_large_to_go_together(
        self, position: int, training: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        textbook, fused = pair(nodes=2)
        textbook.train(training)
        fused.train(training)
        images = [features.detach() for features in inputs(fused.space.cells[position])]
        convolve, convolved = fused_cell.convolve, []

        def counted(*arguments: Any) -> Tensor:
            convolved.append(arguments)
            return convolve(*arguments)

        monkeypatch.setattr(fused_cell, "convolve", counted)
        # Four kinds, two of them twice, of both inputs together and of the first node.
        fused.space.cells[position](*images)
        assert len(convolved) == 12
        convolved.clear()
        monkeypatch.setattr(fused_cell, "_LARGEST", 0)
        fused.space.cells[position](*images)
        assert len(convolved) == 18
        monkeypatch.setattr(fused_cell, "convolve", convolve)
        for network in (textbook, fused):
            for norm in network.modules():
                if isinstance(norm, nn.BatchNorm2d):
                    norm.reset_running_stats()
        assert_cells_agree(textbook, fused, position)

    def test_order_of_operations(self, training: bool) -> None:
        textbook, fused = pair(operations=("dil_conv_5x5", "none", "conv_7x1_1x7", "sep_conv_3x3", "max_pool_3x3"))
        textbook.train(training)
        fused.train(training)
        for position in POSITIONS:
            assert_cells_agree(textbook, fused, position)

    # Groups of one, joined in pairs, of which there may be an odd number left, and wide enough by themselves.
    @pytest.mark.parametrize("channels", [2, 8, 10, 16])
    def test_channels(self, channels: int, training: bool) -> None:
        operations = ("skip_connect", "sep_conv_3x3", "dil_conv_3x3")
        textbook, fused = pair(nodes=3, channels=channels, operations=operations)
        textbook.train(training)
        fused.train(training)
        for position in (0, 1):
            assert_cells_agree(textbook, fused, position)

    def test_size(self, training: bool) -> None:
        # Large enough for all that a weight gradient distinguishes, and a size that its parts do not divide.
        for size in (12, 7):
            textbook, fused = pair(nodes=1, operations=("sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5", "max_pool_3x3"))
            textbook.train(training)
            fused.train(training)
            assert_cells_agree(textbook, fused, 0, size=size)

    def test_concat(self, training: bool) -> None:
        textbook, fused = pair(nodes=3, concat=2, operations=("skip_connect", "dil_conv_3x3"))
        textbook.train(training)
        fused.train(training)
        for position in POSITIONS:
            assert_cells_agree(textbook, fused, position)


def images(number: int = 4, size: int = 16, seed: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(number, 3, size, size, dtype=torch.float64, generator=generator)


LABELS = torch.tensor([0, 1, 2, 3])


class TestNetwork:
    @pytest.mark.slow
    def test_second_order(self) -> None:
        textbook, fused = pair(nodes=4, cells=5)
        results = []
        for network in (textbook, fused):
            given = images().requires_grad_()
            results.append(derivatives(network(given), [given, *network.parameters()]))
        assert_same(results[1], results[0])

    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    def test_training(self, memory_format: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        textbook, fused = pair()
        before = [buffer.clone() for buffer in fused.buffers()]
        with textbook_calls(monkeypatch) as calls:
            for network in (textbook, fused):
                network.to(memory_format=memory_format)
                optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
                for step in range(3):
                    optimizer.zero_grad()
                    F.cross_entropy(network(images(seed=step).to(memory_format=memory_format)), LABELS).backward()
                    optimizer.step()
        assert {type(cell) for cell in calls} == {MixedCell}
        assert_same([*fused.parameters(), *fused.buffers()], [*textbook.parameters(), *textbook.buffers()])
        counters = [b for name, b in fused.named_buffers() if name.endswith("num_batches_tracked")]
        assert all(counter == 3 and counter.dtype == torch.long for counter in counters)
        assert not any(torch.equal(a, b) for a, b in zip(before, fused.buffers(), strict=True))
        with torch.no_grad():
            logits = [network.eval()(images().to(memory_format=memory_format)) for network in (textbook, fused)]
        assert_same(logits[1:], logits[:1])

    def test_names_and_parameters(self) -> None:
        textbook, fused = pair()
        state = fused.state_dict()
        assert list(state) == list(textbook.state_dict())
        assert [name for name, _ in fused.named_parameters()] == [name for name, _ in textbook.named_parameters()]
        with torch.no_grad():
            for parameter in fused.parameters():
                parameter.add_(1)
        textbook.load_state_dict(fused.state_dict())
        assert_same([fused.eval()(images())], [textbook.eval()(images())])

    def test_a_copy_is_another_network(self) -> None:
        _, fused = pair()
        twin = copy.deepcopy(fused)
        expected = fused.eval()(images())
        with torch.no_grad():
            for parameter in fused.parameters():
                parameter.zero_()
        assert_same([twin.eval()(images())], [expected])

    def test_frozen(self) -> None:
        textbook, fused = pair()
        samples = []
        for network in (textbook, fused):
            sample: dict[str, Any] = {}
            for cell in network.space.cells:
                sample |= cell.export(sample)
            samples.append(sample)
        assert samples[0] == samples[1]
        frozen = [network.space.freeze(samples[0]).eval() for network in (textbook, fused)]
        assert_same([frozen[1](images())], [frozen[0](images())])
        own = {id(parameter) for parameter in fused.space.parameters()}
        assert {id(parameter) for parameter in frozen[1].cells.parameters()} < own

    @pytest.mark.slow
    def test_single_precision(self) -> None:
        textbook, fused = pair(nodes=3)
        exactly = derivatives(textbook(images()), list(textbook.parameters()))
        errors = []
        for network in (textbook, fused):
            single = copy.deepcopy(network).float()
            rounded = derivatives(single(images().float()), list(single.parameters()))
            errors.append(
                [(a - b).norm().item() / (1e-6 + b.norm().item()) for a, b in zip(rounded, exactly, strict=True)]
            )
        assert max(errors[1]) < 3 * max(errors[0])
        assert sum(errors[1]) < 2 * sum(errors[0])


class TestPureFunction:
    def functions(self, network: Together) -> tuple[Any, ...]:
        weights, alphas = list(network.space.parameters()), list(network.alphas.parameters())
        names = [
            [f"{part}.{name}" for name, _ in getattr(network, part).named_parameters()] for part in ("space", "alphas")
        ]
        losses = [
            pure_loss(network, names, lambda logits: F.cross_entropy(logits, LABELS), images(seed=seed))
            for seed in (5, 6)
        ]
        optimizer = torch.optim.SGD(weights, 0.1, momentum=0.9, weight_decay=1e-3)
        return (*losses, weights, alphas, sgd_step(optimizer, weights))

    @pytest.mark.parametrize("kind", [first_order, finite_difference, exact])
    def test_hypergradient(self, kind: Any) -> None:
        textbook, fused = pair(operations=("none", "avg_pool_3x3", "skip_connect", "sep_conv_3x3", "dil_conv_5x5"))
        before = [tensor.clone() for tensor in fused.state_dict().values()]
        ours, theirs = (kind(*self.functions(network)) for network in (fused, textbook))
        # The difference quotient is taken over kinks, which rounding may put on another side.
        tolerance = 1e-6 if kind is finite_difference else 1e-10
        for a, b in zip(ours.gradients, theirs.gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        assert all(torch.equal(a, b) for a, b in zip(before, fused.state_dict().values(), strict=True))
        assert all(parameter.grad is None for parameter in fused.parameters())

    def test_stages_are_one_operation_where_gradients_are_differentiated(self, monkeypatch: pytest.MonkeyPatch) -> None:
        _, fused = pair(operations=("none", "sep_conv_3x3"))

        def by_parts(*_: Any) -> Any:
            raise AssertionError("a stage ran by parts")

        monkeypatch.setattr(stages, "_end_by_parts", by_parts)
        loss, _, weights, alphas, _ = functions = self.functions(fused)
        exact(*functions)
        dominant_eigenvalue(lambda tables: loss(weights, tables), alphas)
        with pytest.raises(AssertionError, match="by parts"), forward_ad.dual_level():
            loss(weights, [forward_ad.make_dual(alpha.detach(), torch.ones_like(alpha)) for alpha in alphas])

    def test_weights_get_no_second_derivative(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """α is all that the exact hypergradient is asked for in the end."""
        for network in pair(operations=("none", "sep_conv_3x3")):
            computed = []
            weight_gradient = depthwise_forms.weight_gradient

            def count(*arguments: Any, computed: Any = computed, compute: Any = weight_gradient) -> Tensor:
                computed.append(leaves_out_weights())
                gradient: Tensor = compute(*arguments)
                return gradient

            monkeypatch.setattr(depthwise_forms, "weight_gradient", count)
            monkeypatch.setattr(depthwise._WeightGradient, "compute", staticmethod(count))
            exact(*self.functions(network))
            monkeypatch.undo()
            convolutions = sum(isinstance(module, depthwise.DepthwiseConv2d) for module in network.modules())
            assert 0 < len(computed) <= 2 * convolutions
            assert not any(computed)

    def test_what_was_differentiated_twice_is_let_go(self) -> None:
        _, fused = pair()
        kept = []
        for end in (False, True):
            loss, _, weights, alphas, _ = self.functions(fused)
            variables = [weight.detach().requires_grad_() for weight in weights]
            architecture = [alpha.detach().requires_grad_() for alpha in alphas]
            slopes = torch.autograd.grad(loss(variables, architecture), variables, create_graph=True, allow_unused=True)
            if end:
                torch.autograd.grad(
                    sum(slope.sum() for slope in slopes if slope is not None), architecture, allow_unused=True
                )
            kept += [weakref.ref(variable) for variable in variables]
            del slopes, variables
        assert not any(each() is not None for each in kept)

    def test_given_weights_count(self) -> None:
        textbook, fused = pair()
        losses = []
        for network in (textbook, fused):
            loss, _, weights, alphas, _ = self.functions(network)
            losses.append(loss([1.1 * weight for weight in weights], [2 * alpha for alpha in alphas]))
        assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-12)
        assert losses[1].item() != pytest.approx(self.functions(fused)[0](*self.functions(fused)[2:4]).item(), rel=1e-3)


class TestRunsAsInTheTextbook:
    """Where the fused execution does not apply, the textbook's result or error is what comes."""

    def check(self, fused: Together, monkeypatch: pytest.MonkeyPatch, given: Tensor) -> Tensor:
        with textbook_calls(monkeypatch) as calls:
            output: Tensor = fused(given)
        assert calls == list(fused.space.cells)
        return output

    def test_autocast(self, monkeypatch: pytest.MonkeyPatch) -> None:
        textbook, fused = pair(dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = self.check(fused, monkeypatch, images().float()), textbook(images().float())
        assert torch.equal(ours, theirs)
        assert all(torch.equal(a, b) for a, b in zip(fused.buffers(), textbook.buffers(), strict=True))

    def test_another_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        _, fused = pair()
        cell = fused.space.cells[0].to("meta")
        fused.alphas.to("meta")
        given = [tensor.detach().to("meta") for tensor in inputs(cell)]
        with textbook_calls(monkeypatch) as calls:
            assert cell(*given).is_meta
        assert calls == [cell]

    def test_norms_in_different_modes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        textbook, fused = pair()
        for network in (textbook, fused):
            for cell in network.space.cells:
                next(m for m in cell.edges.modules() if isinstance(m, nn.BatchNorm2d)).eval()
        assert torch.equal(self.check(fused, monkeypatch, images()), textbook(images()))

    def test_recalibration(self) -> None:
        textbook, fused = pair()
        outputs = []
        for network in (textbook, fused):
            with recalibrated(network, [images(seed=1), images(seed=2)]):
                outputs.append(network(images()))
        assert_same(outputs[1:], outputs[:1])

    def test_batch_norms_by_groups(self, monkeypatch: pytest.MonkeyPatch) -> None:
        textbook, fused = pair()
        with batch_statistics(fused, groups=2):
            ours = self.check(fused, monkeypatch, images())
        with batch_statistics(textbook, groups=2):
            assert torch.equal(ours, textbook(images()))

    def test_single_value(self) -> None:
        for network in pair():
            # After the reduction, that is: the batch norms before it see four values.
            cell = network.space.cells[1]
            with pytest.raises(ValueError, match="more than 1 value per channel"):
                cell(*inputs(cell, number=1, size=2))

    def test_one_image(self) -> None:
        textbook, fused = pair()
        assert_same([fused(images(1))], [textbook(images(1))])
        assert_same(list(fused.buffers()), list(textbook.buffers()))

    def test_size_that_cannot_be_halved(self) -> None:
        for network in pair():
            with pytest.raises(UserError, match="even height and width, not 7 × 7"):
                network.space.cells[1](*inputs(network.space.cells[1], size=7))

    def test_affine_norms(self) -> None:
        textbook, fused = relaxed("textbook"), relaxed("textbook")
        for network in (textbook, fused):
            for cell in network.space.cells:
                for module in list(cell.edges.modules()):
                    for name, child in list(module.named_children()):
                        if isinstance(child, nn.BatchNorm2d):
                            setattr(module, name, nn.BatchNorm2d(child.num_features).double())
        # A fused cell made of such a cell runs its operations one by one.
        cell = fused.space.cells[0]
        again = _Parts(cell)
        made = FusedCell(again, lambda: fused.alphas.mixing_weights("normal"), None)
        given = inputs(cell)
        assert_same([made(*given)], [textbook.space.cells[0](*given)])


class _Parts:
    """A relaxed cell in the form of the one that it was made of."""

    def __init__(self, cell: MixedCell) -> None:
        self.kind, self.operations, self.concat = cell.kind, cell.operations, cell.concat
        self.preprocess0, self.preprocess1 = cell.preprocess0, cell.preprocess1
        self.edges = [_Edge(list(edge.values())) for edge in cell.edges]
        self.inputs = [_Edge([]) for _ in range(cell.nodes)]


class _Edge(list[nn.Module]):
    def __init__(self, operations: list[nn.Module]) -> None:
        super().__init__(operations)
        self.choice = _CHOICE


_CHOICE = DartsSpace(2, channels=2, cells=3, nodes=1).cells[0].edges[0].choice


def test_no_operation_but_none_and_unknown_ones() -> None:
    textbook, fused = pair(nodes=1, operations=("none", "conv_7x1_1x7"))
    for position in POSITIONS:
        assert_cells_agree(textbook, fused, position)


class TestOwnOperations:
    @pytest.fixture(params=[1e-5, 1e-3])
    def eps(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float:
        """Register a convolution whose norm has this ε."""
        eps: float = request.param

        def own(channels: int, stride: int, affine: bool) -> nn.Module:
            convolution = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
            return nn.Sequential(nn.ReLU(), convolution, nn.BatchNorm2d(channels, eps, affine=affine))

        monkeypatch.setattr(darts_operations, "_BUILDERS", dict(darts_operations._BUILDERS))
        darts_operations.register_edge_operation("own")(own)
        return eps

    @pytest.mark.parametrize("position", POSITIONS)
    def test_run_beside_the_others_if_their_norms_are_alike(
        self, position: int, eps: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        textbook, fused = pair(operations=("sep_conv_3x3", "own", "skip_connect"))
        assert_cells_agree(textbook, fused, position)
        with textbook_calls(monkeypatch) as calls, torch.no_grad():
            fused.space.cells[position](*inputs(fused.space.cells[position]))
        assert len(calls) == (eps != 1e-5)
