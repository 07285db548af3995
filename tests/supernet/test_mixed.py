from __future__ import annotations

from typing import Any

import nni
import nni.nas.nn.pytorch as nas
import pytest
import torch
from nni.nas.nn.pytorch import InputChoice, LayerChoice
from torch import Tensor, nn

from nni_cream.errors import UserError
from nni_cream.strategies.darts import DartsStrategy
from nni_cream.supernet.alphas import Alphas
from nni_cream.supernet.mixed import MixedInput, MixedLayer, weighted_sum


class Space(nas.ModelSpace):
    """Two layers that choose alike, one by itself, and two choices of inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.layer("shared")
        self.second = self.layer("shared")
        self.third = LayerChoice([nn.Identity(), nn.Linear(4, 4)], label="own")
        self.summed = InputChoice(4, n_chosen=2, reduction="sum", label="summed")
        self.averaged = InputChoice(3, n_chosen=2, reduction="mean", label="averaged")

    def layer(self, label: str) -> LayerChoice:
        return LayerChoice({"linear": nn.Linear(4, 4), "tanh": nn.Tanh(), "none": nn.Identity()}, label=label)

    def forward(self, features: Tensor) -> Tensor:
        states = [features, self.first(features)]
        states.append(self.second(states[-1]))
        states.append(self.third(states[-1]))
        total: Tensor = self.summed(states) + self.averaged(states[1:])
        return total


def relaxed(space: Any = Space) -> tuple[Any, Alphas]:
    torch.manual_seed(0)
    strategy = DartsStrategy()
    model = strategy.mutate_model(space())
    with torch.no_grad():
        for table in strategy.alphas.parameters():
            table.copy_(torch.randn_like(table))
    return model, strategy.alphas


def set_alpha(alphas: Alphas, name: str, values: list[float]) -> None:
    with torch.no_grad():
        alphas[name].copy_(torch.tensor(values))


class TestRelaxation:
    def test_every_choice_is_relaxed(self) -> None:
        space, alphas = relaxed()
        kinds = {name: type(module) for name, module in space.named_children()}
        assert kinds == dict.fromkeys(("first", "second", "third"), MixedLayer) | dict.fromkeys(
            ("summed", "averaged"), MixedInput
        )
        assert {name: tuple(alphas[name].shape) for name in alphas} == {
            "shared": (3,),
            "own": (2,),
            "summed": (4,),
            "averaged": (3,),
        }

    def test_forward_is_the_mean_of_the_candidates(self) -> None:
        space, alphas = relaxed()
        shared, own, summed, averaged = ([w.item() for w in alphas.mixing_weights(name)] for name in alphas)
        x = torch.randn(5, 4)
        states = [x]
        for layer in (space.first, space.second):
            x = shared[0] * layer["linear"](x) + shared[1] * x.tanh() + shared[2] * x
            states.append(x)
        states.append(own[0] * x + own[1] * space.third[1](x))
        # The sum of two inputs is twice their mean.
        expected = 2 * sum(w * s for w, s in zip(summed, states, strict=True)) + sum(
            w * s for w, s in zip(averaged, states[1:], strict=True)
        )
        torch.testing.assert_close(space(states[0]), expected)

    def test_parameters_are_the_weights_alone(self) -> None:
        space, _ = relaxed()
        assert [name for name, _ in space.named_parameters()] == [
            f"{layer}.{part}" for layer in ("first.linear", "second.linear", "third.1") for part in ("weight", "bias")
        ]

    def test_choices_of_one_label_share_alpha(self) -> None:
        space, alphas = relaxed()
        x = torch.randn(5, 4)
        (together,) = torch.autograd.grad(space(x).sum(), alphas["shared"])
        assert len(list(alphas)) == 4
        h, ends = 1e-2, []
        for sign in (1, -1):
            with torch.no_grad():
                alphas["shared"][0] += sign * h
                ends.append(space(x).sum().item())
                alphas["shared"][0] -= sign * h
        assert together[0].item() == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-2)

    def test_other_arguments_reach_the_candidates(self) -> None:
        class Scale(nn.Module):
            def forward(self, x: Tensor, *, by: float) -> Tensor:
                return x * by

        class Scaled(nas.ModelSpace):
            def __init__(self) -> None:
                super().__init__()
                self.layer = LayerChoice([Scale(), Scale()], label="scale")

        space, _ = relaxed(Scaled)
        torch.testing.assert_close(space.layer(torch.ones(2), by=3.0), torch.full((2,), 3.0))

    def test_nested_choices(self) -> None:
        class Nested(nas.ModelSpace):
            def __init__(self) -> None:
                super().__init__()
                inner = LayerChoice([nn.Identity(), nn.Tanh()], label="inner")
                self.layer = LayerChoice([nn.Sequential(inner, nn.Sigmoid()), nn.ReLU()], label="outer")

        space, alphas = relaxed(Nested)
        x = torch.randn(4)
        (a, b), (c, d) = alphas.mixing_weights("inner"), alphas.mixing_weights("outer")
        torch.testing.assert_close(space.layer(x), c * (a * x + b * x.tanh()).sigmoid() + d * x.relu())


class TestExport:
    def test_heaviest_layer(self) -> None:
        space, alphas = relaxed()
        set_alpha(alphas, "shared", [-1, 2, 1])
        set_alpha(alphas, "own", [0.1, 0.2])
        assert space.first.export({}) == {"shared": "tanh"}
        assert space.third.export({}) == {"own": 1}
        assert space.first.export({"shared": "none"}) == {}

    def test_of_equals_the_first(self) -> None:
        space, alphas = relaxed()
        set_alpha(alphas, "shared", [-1, 2, 2])
        assert space.first.export({}) == {"shared": "tanh"}
        set_alpha(alphas, "summed", [1, 2, 1, 1])
        assert space.summed.export({}) == {"summed": [0, 1]}
        set_alpha(alphas, "summed", [0, 0, 0, 0])
        assert space.summed.export({}) == {"summed": [0, 1]}

    def test_of_many_equals_the_first(self) -> None:
        class Wide(nas.ModelSpace):
            def __init__(self) -> None:
                super().__init__()
                self.inputs = InputChoice(60, n_chosen=4, reduction="mean", label="wide")

        space, alphas = relaxed(Wide)
        set_alpha(alphas, "wide", [k % 3 for k in range(60)])
        assert space.inputs.export({}) == {"wide": [2, 5, 8, 11]}

    def test_heaviest_inputs_in_their_own_order(self) -> None:
        space, alphas = relaxed()
        set_alpha(alphas, "summed", [1, -1, 0.5, 3])
        set_alpha(alphas, "averaged", [0, 1, 2])
        assert space.summed.export({}) == {"summed": [0, 3]}
        assert space.averaged.export({}) == {"averaged": [1, 2]}
        assert space.summed.export({"summed": [0, 1]}) == {}

    def test_the_network_of_an_export(self) -> None:
        space, alphas = relaxed()
        sample: dict[str, Any] = {}
        for module in space.children():
            sample |= module.export(sample)
        # With α far apart the relaxation is the network of the sample: one layer, or twice the one input.
        set_alpha(alphas, "shared", [100 * (name == sample["shared"]) for name in ("linear", "tanh", "none")])
        set_alpha(alphas, "own", [100 * (k == sample["own"]) for k in range(2)])
        for name, number in (("summed", 4), ("averaged", 3)):
            set_alpha(alphas, name, [100 * (k in sample[name]) for k in range(number)])
        x = torch.randn(5, 4)
        torch.testing.assert_close(space.freeze(sample)(x), space(x))

    def test_probabilities(self) -> None:
        space, alphas = relaxed()
        set_alpha(alphas, "own", [0, 0])
        set_alpha(alphas, "averaged", [0, 0, 0])
        assert space.third.export_probs({}) == {"own": {0: 0.5, 1: 0.5}}
        assert space.averaged.export_probs({}) == {"averaged": pytest.approx({0: 1 / 3, 1: 1 / 3, 2: 1 / 3})}
        weights = alphas.mixing_weights("shared").tolist()
        assert space.second.export_probs({}) == {"shared": dict(zip(("linear", "tanh", "none"), weights, strict=True))}
        assert space.third.export_probs({"own": {}}) == space.averaged.export_probs({"averaged": {}}) == {}

    def test_nothing_is_drawn(self) -> None:
        space, _ = relaxed()
        state = torch.get_rng_state()
        assert space.first.resample({}) == space.summed.resample({}) == {}
        assert torch.equal(torch.get_rng_state(), state)


class TestWeightedSum:
    def test_formula(self) -> None:
        a, b = torch.randn(2, 3), torch.randn(2, 3)
        torch.testing.assert_close(weighted_sum(torch.tensor([0.25, -2.0]), iter([a, b])), 0.25 * a - 2 * b)

    @pytest.mark.parametrize("number", [1, 3])
    def test_a_weight_for_each(self, number: int) -> None:
        with pytest.raises(ValueError, match="zip"):
            weighted_sum(torch.ones(number), [torch.ones(2)] * 2)


class Activation(LayerChoice):
    """A choice of somebody else, that may do anything."""


REFUSED: dict[str, tuple[Any, str]] = {
    "repeat": (lambda: nas.Repeat(lambda _: nn.Identity(), (1, 3), label="depth"), r"'depth' \(Repeat 'block.0'\)"),
    "value": (
        lambda: nas.MutableConv2d(3, nni.choice("width", [4, 8]), 3),
        r"'width' \(MutableConv2d 'block.0'\)",
    ),
    "any number of inputs": (
        lambda: InputChoice(3, n_chosen=None, reduction="sum", label="some"),
        r"'some' \(InputChoice 'block.0'\)",
    ),
    "concatenation": (
        lambda: InputChoice(3, n_chosen=2, reduction="concat", label="joined"),
        r"'joined' \(InputChoice 'block.0'\)",
    ),
    "list of inputs": (
        lambda: InputChoice(3, n_chosen=2, reduction="none", label="listed"),
        r"'listed' \(InputChoice 'block.0'\)",
    ),
    "subclass": (lambda: Activation([nn.ReLU(), nn.Tanh()], label="act"), r"'act' \(Activation 'block.0'\)"),
    "inside a candidate": (
        lambda: LayerChoice(
            [nn.Identity(), InputChoice(3, n_chosen=None, reduction="sum", label="some")], label="outer"
        ),
        r"'some' \(InputChoice 'block.0.1'\)",
    ),
}


class TestRefuse:
    @pytest.mark.parametrize("case", REFUSED)
    def test_says_which_choice(self, case: str) -> None:
        build, named = REFUSED[case]

        class Refused(nas.ModelSpace):
            def __init__(self) -> None:
                super().__init__()
                self.block = nn.Sequential(build())

        with pytest.raises(UserError, match=rf"The choice {named} cannot be searched by DartsStrategy, which takes"):
            DartsStrategy().mutate_model(Refused())

    @pytest.mark.parametrize("merge_op", ["all", "loose_end"])
    def test_cells_whose_output_depends_on_their_choices(self, merge_op: Any) -> None:
        class WithCell(nas.ModelSpace):
            def __init__(self) -> None:
                super().__init__()
                self.cell = nas.Cell([nn.Identity(), nn.Tanh()], num_nodes=2, merge_op=merge_op, label="normal")

        if merge_op == "all":
            space, _ = relaxed(WithCell)
            assert space.cell(torch.ones(2, 3)).shape == (2, 6)
            return
        message = r"cell 'normal' \(Cell 'cell'\) has merge_op='loose_end'.* takes cells with merge_op=\"all\"\.$"
        with pytest.raises(UserError, match=message):
            relaxed(WithCell)

    def test_modules_without_choices_pass(self) -> None:
        class Plain(nas.ParametrizedModule):
            def __init__(self, width: int) -> None:
                super().__init__()
                self.layer = nn.Linear(width, width)

        class Accepted(nas.ModelSpace):
            def __init__(self) -> None:
                super().__init__()
                self.plain = Plain(3)
                self.conv = nas.MutableConv2d(3, 4, 3)
                self.layer = LayerChoice([nn.ReLU(), nn.Tanh()], label="act")

        space, alphas = relaxed(Accepted)
        assert list(alphas) == ["act"]
        assert type(space.layer) is MixedLayer
