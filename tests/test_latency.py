from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from nni_cream.architecture import CreamPath
from nni_cream.errors import UserError
from nni_cream.latency import Calibration, LatencyBudget, LatencyTable, Validation, WholeNetwork, rounded
from nni_cream.supernet.paths import PathSpace
from search_spaces.cream import CreamSpace
from tests.latency_tables import made_up

TABLE = made_up()


@cache
def space_of(depths: tuple[int, ...], **options: Any) -> CreamSpace:
    with torch.device("meta"):
        return CreamSpace(depths, 10, **options)


def sizes_of(space: CreamSpace) -> dict[str, int]:
    paths = PathSpace(space)
    return dict(zip(paths.labels, paths.sizes, strict=True))


def by_hand(table: LatencyTable, path: CreamPath) -> Decimal:
    """The prediction, added in decimals from the table as it stands in its file."""
    content = json.loads(json.dumps(table.model_dump(mode="json")), parse_float=Decimal)
    times, operations = content["milliseconds"], content["operations"]
    parts = [times["stem"], times["first_stage"], times["last_stage"], times["head"]]
    for stage, chosen in zip(times["stages"], path.stages[1:-1], strict=True):
        for block, operation in enumerate(chosen):
            parts.append(stage["further" if block > 0 else "first"][operations.index(operation)])
    return sum(((time * Decimal("1.24")).quantize(Decimal("0.0001")) for time in parts), Decimal(0))


class TestPrediction:
    @pytest.mark.parametrize(
        "text",
        ["[0] [3] [3] [3] [3] [3] [0]", "[0] [5,0] [1] [2,2,4] [0] [3,1,5,0] [0]", "[0] [0] [0] [0] [0] [0] [0]"],
    )
    def test_is_the_sum_of_all_parts_times_the_factor(self, text: str) -> None:
        path = CreamPath.parse(text)
        assert Decimal(repr(TABLE.of(path))) == by_hand(TABLE, path)

    def test_of_further_operations_finds_them_by_their_numbers(self) -> None:
        table = made_up((9, 0, 6))
        path = CreamPath.parse("[0] [6] [0] [9,9] [0] [9] [0]")
        assert Decimal(repr(table.of(path))) == by_hand(table, path)

    def test_times_are_whole_multiples_of_a_tenth_of_a_microsecond(self) -> None:
        assert [rounded(time) for time in (1.23456789, 0.00004, 0.000051, 0.0)] == [1.2346, 0.0001, 0.0001, 0.0001]


class TestCalibration:
    def test_has_the_least_squares(self) -> None:
        generator = np.random.default_rng(0)
        predicted, measured = generator.uniform(1, 5, (2, 20))
        found = Calibration.of(networks(predicted.tolist(), measured.tolist()))
        (expected,), *_ = np.linalg.lstsq(predicted[:, None], measured, rcond=None)
        assert found.scale == pytest.approx(expected)
        assert [network.measured for network in found.networks] == measured.tolist()


class TestFile:
    def test_gives_the_table_back(self, tmp_path: Path) -> None:
        file = tmp_path / "latency.json"
        TABLE.save(file)
        assert LatencyTable.load(file) == TABLE
        content = json.loads(file.read_text())
        assert content["format"] == "nni_cream.latency/1"
        assert content["milliseconds"]["stem"] == 0.0517
        assert content["conditions"]["name"] == "Abacus 3000"

    def test_that_is_missing_or_of_another_kind(self, tmp_path: Path) -> None:
        file = tmp_path / "latency.json"
        with pytest.raises(UserError, match=r"There is no latency table .*latency\.json\.$"):
            LatencyTable.load(file)
        for text in ("[]", "3", "{}", '{"format": "nni_cream.child/1"}', '{"format": "nni_cream.latency/2"}'):
            file.write_text(text)
            with pytest.raises(UserError) as caught:
                LatencyTable.load(file)
            assert str(caught.value) == f"{file} is not a latency table; trials/measure_latency.py makes one."
        file.write_text("{")
        with pytest.raises(UserError, match=r"latency\.json is not a latency table: Expecting property name"):
            LatencyTable.load(file)

    @pytest.mark.parametrize(
        ("damage", "expected"),
        [
            (lambda c: c.pop("resolution"), "the setting 'resolution' is missing."),
            (lambda c: c["milliseconds"].pop("head"), "the setting 'milliseconds.head' is missing."),
            (lambda c: c.update(colour=1), "'colour' is not a setting"),
            (lambda c: c["milliseconds"].update(stem=-0.1), "'milliseconds.stem' is -0.1, but should be greater than"),
            (lambda c: c["milliseconds"].update(stem=math.nan), "'milliseconds.stem' is nan, but should be"),
            (lambda c: c["milliseconds"].update(stem=1e9), "'milliseconds.stem' is 1000000000.0, but should be less"),
            (lambda c: c["milliseconds"].update(stem="x"), "'milliseconds.stem' is 'x', but should be a valid number"),
            (lambda c: c["milliseconds"]["stages"][1]["first"].__setitem__(2, -1), "is -1, but should be greater"),
            (lambda c: c["milliseconds"]["stages"].pop(), "there are 4 stages, but there should be 5."),
            (
                lambda c: c["milliseconds"]["stages"][1]["further"].pop(),
                "stage 2 has 5 times of its further block, but",
            ),
            (lambda c: c["operations"].__setitem__(1, -1), "'operations[1]' is -1, but should be greater than"),
            (lambda c: c["operations"].__setitem__(1, 10), "4, 5], but there is none of number 10."),
            (
                lambda c: c["operations"].__setitem__(1, 0),
                "operations are [0, 0, 2, 3, 4, 5], but each should be there",
            ),
            (lambda c: c["conditions"].update(device="tpu"), "'conditions.device' is 'tpu', but should be 'cpu' or"),
            (lambda c: c["conditions"].update(batch_size=True), "true is not a value for this setting."),
            (lambda c: c["calibration"].update(scale=0), "'calibration.scale' is 0, but should be greater than 0."),
            (lambda c: c["validation"].update(kendall=1.5), "'validation.kendall' is 1.5, but should be less"),
        ],
    )
    def test_that_is_damaged(self, tmp_path: Path, damage: Callable[[Any], Any], expected: str) -> None:
        content = copy.deepcopy(TABLE.model_dump(mode="json"))
        damage(content)
        file = tmp_path / "latency.json"
        file.write_text(json.dumps(content))
        with pytest.raises(UserError) as caught:
            LatencyTable.load(file)
        message = str(caught.value)
        assert message.startswith(f"{file} is not a whole latency table: ")
        assert expected in message
        assert "\n" not in message


class TestAnotherSearch:
    def refusal(self, resolution: int, num_classes: int, operations: tuple[int, ...]) -> str:
        with pytest.raises(UserError) as caught:
            TABLE.refuse_another(Path("l.json"), resolution, num_classes, operations)
        message = str(caught.value)
        end = "; measure again, with trials/measure_latency.py and the recipe of this search."
        assert message.startswith("The latency table l.json is for ")
        assert message.endswith(end)
        return message.removeprefix("The latency table l.json is for ").removesuffix(end)

    def test_is_refused_with_the_difference(self) -> None:
        assert self.refusal(64, 10, range(6)) == "images of 32 pixels, but those of this search have 64"  # type: ignore[arg-type]
        assert self.refusal(32, 7, (0, 1)) == "10 classes, but the data of this search has 7"
        assert self.refusal(32, 10, (0, 6, 9)) == (
            "other blocks, and has no times of what this search offers: dilated separable convolution 3×3, residual "
            "unit (basic)"
        )

    @pytest.mark.parametrize("operations", [(0, 1, 2, 3, 4, 5), (3,)])
    def test_of_the_same_or_of_fewer_operations_is_not(self, operations: tuple[int, ...]) -> None:
        TABLE.refuse_another(Path("l.json"), 32, 10, operations)


SPACES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "shallow": ((1, 1, 1, 1, 1), {}),
    "deep": ((1, 2, 3, 1, 4), {}),
    "further operations": ((2, 1, 2, 1, 1), {"dil_conv": True, "resunit": ("bottleneck", "basic")}),
    "some of them": ((2, 1, 2, 1, 1), {"resunit": ("basic",)}),
    "skip": ((2, 3, 1, 1, 2), {"skip": True, "resunit": ("basic",)}),
}


@pytest.fixture(scope="module", params=SPACES)
def space(request: pytest.FixtureRequest) -> CreamSpace:
    depths, options = SPACES[request.param]
    return space_of(depths, **options)


def budget_of(
    space: CreamSpace, low: float = 0, high: float = math.inf, table: LatencyTable | None = None
) -> LatencyBudget:
    return (table or made_up(tuple(range(10)))).budget(space.depths, space.operations, space.skip, low, high)


class TestBudget:
    def test_costs_of_a_space_are_predictions_of_its_networks(self, space: CreamSpace) -> None:
        paths, table = PathSpace(space), made_up(tuple(range(10)))
        sampler = budget_of(space).sampler(sizes_of(space))
        generator = np.random.default_rng(0)
        for _ in range(300):
            path = tuple(int(generator.integers(size)) for size in paths.sizes)
            architecture = space.architecture(paths.to_sample(path))
            assert Decimal(sampler.cost(path)) / 10_000 == by_hand(table, architecture)
            assert sampler.cost(path) / 10_000 == table.of(architecture)

    def test_extremes_are_reached_and_not_passed(self, space: CreamSpace) -> None:
        budget = budget_of(space)
        for end, choose in ((budget.shortest, min), (budget.longest, max)):
            sizes = sizes_of(space)
            path = tuple(choose(range(sizes[label]), key=budget.choices[label].__getitem__) for label in sizes)
            assert budget.sampler(sizes).cost(path) / 10_000 == end
            for place, label in enumerate(sizes):
                for other in range(sizes[label]):
                    changed = (*path[:place], other, *path[place + 1 :])
                    assert choose(budget.sampler(sizes).cost(changed) / 10_000, end) == end

    def test_left_out_blocks_take_no_time(self) -> None:
        space = space_of((2, 1, 1, 1, 1), skip=True)
        budget = budget_of(space)
        assert budget.choices["stage1_block1"][-1] == 0
        assert len(budget.choices["stage1_block0"]) == 6
        assert min(budget.choices["stage1_block0"]) > 0


EVERY = list(itertools.product([0], *[range(6)] * 5, [0]))


class TestDraws:
    """In a space of 7,776 paths, by going through all of them."""

    SPACE = space_of((1, 1, 1, 1, 1))
    TIMES: ClassVar = {path: by_hand(TABLE, CreamPath(tuple((i,) for i in path))) for path in EVERY}

    def budget(self, low: float, high: float) -> LatencyBudget:
        return budget_of(self.SPACE, low, high, TABLE)

    def drawn(self, low: float, high: float, number: int = 400) -> set[tuple[int, ...]]:
        sampler = self.budget(low, high).sampler(sizes_of(self.SPACE))
        prior = [[1 / size] * size for size in sizes_of(self.SPACE).values()]
        generator = np.random.default_rng(0)
        return {sampler.draw(prior, generator) for _ in range(number)}

    @pytest.mark.parametrize("where", [0, 0.25, 0.5, 0.9])
    def test_are_all_paths_inside_and_no_other(self, where: float) -> None:
        ordered = sorted(self.TIMES.values())
        start = int(where * len(ordered))
        low, high = ordered[start], ordered[start + 30]
        inside = {path for path, time in self.TIMES.items() if low <= time <= high}
        assert 31 <= len(inside) < 60
        assert self.drawn(float(low), float(high)) == inside

    def test_an_end_belongs_to_the_interval(self) -> None:
        for time in sorted(set(self.TIMES.values()))[:: len(EVERY) // 7]:
            inside = {path for path, other in self.TIMES.items() if other == time}
            assert self.drawn(float(time), float(time), 20) <= inside

    def test_an_end_that_no_binary_fraction_is_belongs_to_it_too(self) -> None:
        awkward = [n / 10_000 for n in range(1, 30_000) if n / 10_000 * 10_000 != n]
        assert len(awkward) > 100
        for time in awkward[:300]:
            budget = LatencyBudget({"only": (time,)}, 0, time, time)
            assert budget.sampler({"only": 1}).draw([[1.0]], np.random.default_rng(0)) == (0,)

    def test_a_gap_between_paths_is_named_in_milliseconds(self) -> None:
        ordered = sorted(set(self.TIMES.values()))
        below, above = next((a, b) for a, b in itertools.pairwise(ordered) if b - a > Decimal("0.0005"))
        low, high = float(below) + 0.0001, float(above) - 0.0001
        with pytest.raises(UserError) as caught:
            self.budget(low, high).sampler(sizes_of(self.SPACE))
        assert str(caught.value) == (
            f"No path costs {low:.12g} ms to {high:.12g} ms a batch: the paths of this space cost "
            f"{float(ordered[0]):.12g} ms to {float(ordered[-1]):.12g} ms, and those nearest to the interval "
            f"{float(below):.12g} ms and {float(above):.12g} ms."
        )

    def test_of_a_space_with_other_choices_are_refused(self) -> None:
        with pytest.raises(UserError, match=r"has 0 times for the choice 'stage1_block1', which has 6 candidates"):
            self.budget(0, 9).sampler(sizes_of(space_of((2, 1, 1, 1, 1))))
        with pytest.raises(UserError, match=r"has 6 times for the choice 'stage1_block0', which has 7 candidates"):
            self.budget(0, 9).sampler(sizes_of(space_of((1, 1, 1, 1, 1), resunit=("basic",))))


def networks(predicted: list[float], measured: list[float]) -> list[WholeNetwork]:
    return [WholeNetwork(path="[[0]]", predicted=p, measured=m) for p, m in zip(predicted, measured, strict=True)]


class TestValidation:
    def test_by_hand(self) -> None:
        found = Validation.of(networks([1.0, 2.0, 3.0, 3.0], [1.25, 2.0, 2.4, 4.0]))
        # Off by -20 %, 0, +25 %, -25 %.
        assert found.mean_error == pytest.approx(0.175)
        assert found.bias == pytest.approx(-0.05)
        # Of six pairs five are in order, and one is tied in the first list.
        assert found.kendall == pytest.approx(5 / math.sqrt(5 * 6))
        x, y = [-1.25, -0.25, 0.75, 0.75], [-1.1625, -0.4125, -0.0125, 1.5875]
        covariance = sum(a * b for a, b in zip(x, y, strict=True))
        assert found.pearson == pytest.approx(covariance / math.sqrt(sum(a * a for a in x) * sum(b * b for b in y)))

    def test_of_what_is_all_the_same_nothing_correlates(self) -> None:
        for pair in (([1.0, 1.0], [1.0, 2.0]), ([1.0, 2.0], [3.0, 3.0])):
            found = Validation.of(networks(*pair))
            assert (found.pearson, found.kendall) == (None, None)
            assert LatencyTable.model_validate(made_up(validation=found).model_dump()).validation == found
