from __future__ import annotations

import json
import math
import os
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import timm

from nni_cream import compare as module_under_test
from nni_cream.architecture import CreamPath
from nni_cream.child import Child, build_network
from nni_cream.compare import (
    FOUND,
    MOBILE,
    RANDOM,
    Contestant,
    Row,
    compare,
    kept_table,
    line_up,
    nearest_network,
    random_genotypes,
    random_paths,
    refuse_unfit,
    table,
)
from nni_cream.cost import measure_network
from nni_cream.errors import UserError
from nni_cream.genotype import Genotype
from nni_cream.recipe import CreamRecipe
from nni_cream.recipe_files import to_yaml
from nni_cream.runs import RunDirectory
from nni_cream.seeds import Spread
from nni_cream.settings import DartsNetworkSettings, Latency
from tests.latency_tables import made_up
from tests.test_retrain import GENOTYPE, SPACE
from tests.test_seeds import recipe
from tests.trainers import LIGHTNINGS_WARNINGS

SEARCH = CreamRecipe.model_validate(
    {"name": "a", "epochs": 30, "data": {"name": "digits", "resolution": 32}, "flops": {"min": 2.5, "max": 3.0}}
)
DATA = {"name": "digits", "resolution": 32}

pytestmark = LIGHTNINGS_WARNINGS


@pytest.fixture(scope="module")
def paths() -> list[CreamPath]:
    return random_paths(SEARCH, 10, 8, CreamPath.parse("[0] [0] [1] [2] [3] [0] [0]"), seed=0)


class TestRandomPaths:
    def test_lie_in_the_interval_of_the_search(self, paths: list[CreamPath]) -> None:
        costs = [measure_network(build_network(str(path), 10, {}), 32).macs for path in paths]
        assert all(2.5e6 <= cost <= 3e6 for cost in costs)
        assert len(set(paths)) == 8
        assert len({choice for path in paths for stage in path.stages[1:-1] for choice in stage}) == 6

    def test_do_not_depend_on_their_number_nor_hold_what_was_found(self, paths: list[CreamPath]) -> None:
        again = random_paths(SEARCH, 10, 3, paths[1], seed=0)
        assert again == [paths[0], *paths[2:4]]
        assert random_paths(SEARCH, 10, 3, paths[1], seed=1) != again

    def test_keep_to_the_time_of_a_search_with_such_a_budget(self) -> None:
        interval = {"table": "latency.json", "min": 1.45, "max": 1.55}
        search = SEARCH.model_copy(update={"latency": Latency.model_validate(interval)})
        table = made_up()
        found = random_paths(search, 10, 8, CreamPath.parse("[0] [0] [1] [2] [3] [0] [0]"), seed=0, latency=table)
        assert len(set(found)) == 8
        assert all(1.45 <= table.of(path) <= 1.55 for path in found)
        without = random_paths(SEARCH, 10, 8, CreamPath.parse("[0] [0] [1] [2] [3] [0] [0]"), seed=0)
        assert not all(1.45 <= table.of(path) <= 1.55 for path in without)
        child = Child(found[0], 10, 0.5, 1, 2, DATA, {"name": "a", "seed": 0}, latency=1.5)
        assert [c.network for c in line_up(child, search, 32, 2, [], 0, table)] == [str(path) for path in found[:3]]

    def test_that_are_not_so_many(self, paths: list[CreamPath], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module_under_test, "PATIENCE", 5)
        with pytest.raises(UserError, match="--random is 8, but among 5 draws there are 5 different paths besides"):
            random_paths(SEARCH, 10, 8, paths[0], seed=9)


def test_the_table_that_a_search_has_kept_to_is_its_own_copy(tmp_path: Path) -> None:
    """Where the original was is not looked at."""
    search = SEARCH.model_copy(update={"latency": Latency.model_validate({"table": "nowhere.json", "max": 1.5})})
    directory = RunDirectory(tmp_path)
    with pytest.raises(UserError, match=re.escape(str(directory.latency))):
        kept_table(search, directory)
    made_up().save(directory.latency)
    assert kept_table(search, directory) == made_up()
    assert kept_table(SEARCH, directory) is None


def test_random_genotypes_are_of_the_space_of_the_search() -> None:
    space = {**SPACE, "operations": ["none", "skip_connect", "sep_conv_3x3", "max_pool_3x3"]}
    child = Child(GENOTYPE, 10, 0.5, 1, 2, {"name": "digits", "resolution": 8}, {"name": "a", "seed": 0}, space=space)
    drawn = random_genotypes(child, 30, seed=0)
    for genotype in drawn:
        assert (genotype.normal_concat, genotype.reduce_concat) == (GENOTYPE.normal_concat, GENOTYPE.reduce_concat)
        for cell in (genotype.normal, genotype.reduce):
            assert [{state for _, state in cell[:2]}, len({state for _, state in cell[2:]})] == [{0, 1}, 2]
            assert Genotype.parse(str(genotype)) == genotype
    operations = [operation for genotype in drawn for operation, _ in (*genotype.normal, *genotype.reduce)]
    assert {operations.count(operation) > 50 for operation in space["operations"][1:]} == {True}
    assert len(operations) == 240
    assert random_genotypes(child, 3, seed=0) == drawn[:3]


@pytest.mark.parametrize("resolution", [32, 64])
def test_the_nearest_network_is_nearest_in_cost(resolution: int) -> None:
    costs = {name: measure_network(timm.create_model(name, num_classes=10), resolution).macs for name in MOBILE[:3]}
    assert costs[MOBILE[0]] < costs[MOBILE[1]] < costs[MOBILE[2]]
    for name, cost in costs.items():
        assert nearest_network(cost, 10, resolution, MOBILE[:3]) == name
    # By their ratio: the geometric mean is as near to both.
    middle = math.sqrt(costs[MOBILE[0]] * costs[MOBILE[1]])
    assert nearest_network(int(middle * 0.99), 10, resolution, MOBILE[:3]) == MOBILE[0]
    assert nearest_network(int(middle * 1.01), 10, resolution, MOBILE[:3]) == MOBILE[1]


def test_the_nearest_network_has_the_classes_of_the_data() -> None:
    # 5.49 and 14.19 M with two classes, 6.52 and 15.47 M with timm's thousand, of which the smaller would be nearer.
    neighbours = ("mobilenetv3_small_100", "mobilenetv3_large_075")
    assert nearest_network(9_190_000, 2, 64, neighbours) == "mobilenetv3_large_075"
    assert nearest_network(9_190_000, 1000, 64, neighbours) == "mobilenetv3_small_100"


def test_who_takes_part(paths: list[CreamPath]) -> None:
    cost = measure_network(timm.create_model(MOBILE[1], num_classes=10), 32).macs
    child = Child(paths[0], 10, 0.5, cost, 2, DATA, {"name": "a", "seed": 0})
    assert line_up(child, SEARCH, 32, 2, None, 0) == [
        Contestant(FOUND, "found", str(paths[0])),
        Contestant(RANDOM, "random1", str(paths[1])),
        Contestant(RANDOM, "random2", str(paths[2])),
        Contestant(MOBILE[1], MOBILE[1], MOBILE[1]),
        Contestant("resnet18", "resnet18", "resnet18"),
    ]
    assert [c.name for c in line_up(child, SEARCH, 32, 0, ["cream_14"], 0)] == ["found", "cream_14"]


def test_the_table() -> None:
    rows = [
        Row(FOUND, 1, 3_235_136, 1_339_338, Spread(0.98, 0.0012, 3)),
        Row(RANDOM, 2, 3_000_000.5, 1_000_000.5, Spread(0.97123, 0.00456, 6)),
        Row("resnet18", 1, 37e6, 11e6, Spread(0.99, None, 1)),
    ]
    assert table(rows).splitlines() == [
        "| network | trainings | MACs (M) | parameters (M) | test accuracy |",
        "|---|---|---|---|---|",
        "| found by the search | 3 | 3.24 | 1.339 | 0.9800 ± 0.0012 |",
        "| random, 2 networks | 6 | 3.00 | 1.000 | 0.9712 ± 0.0046 |",
        "| resnet18 | 1 | 37.00 | 11.000 | 0.9900 |",
    ]


def test_all_are_trained_alike_and_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = Child(GENOTYPE, 10, 0.5, 1, 2, {"name": "digits", "resolution": 8}, {"name": "a", "seed": 0}, space=SPACE)
    contestants = line_up(child, None, 8, 2, [], 0)
    rows = compare(recipe(0), contestants, [0, 1], tmp_path)
    results = {
        (contestant.name, seed): json.loads((tmp_path / contestant.name / f"seed{seed}/result.json").read_text())
        for contestant in contestants
        for seed in (0, 1)
    }
    assert [results[contestant.name, 0]["network"] for contestant in contestants] == [c.network for c in contestants]

    def spread(*names: str) -> Spread:
        return Spread.of([results[name, seed]["test_accuracy"] for name in names for seed in (0, 1)])

    def mean(key: str) -> float:
        return (results["random1", 0][key] + results["random2", 0][key]) / 2

    found = results["found", 0]
    assert rows == [
        Row(FOUND, 1, found["flops"], found["params"], spread("found")),
        Row(RANDOM, 2, mean("flops"), mean("params"), spread("random1", "random2")),
    ]
    assert (tmp_path / "comparison.md").read_text() == table(rows)
    written = json.loads((tmp_path / "comparison.json").read_text())
    assert [row["group"] for row in written["rows"]] == [FOUND, RANDOM]
    assert written["rows"][1]["test_accuracy"] == vars(rows[1].test_accuracy)
    assert list(written["networks"]) == ["found", "random1", "random2"]
    assert written["versions"]["torch"] == version("torch")
    assert written["machine"]["cores"] == os.cpu_count()

    def fails(*_: Any, **__: Any) -> Any:
        raise AssertionError("trained again")

    monkeypatch.setattr("nni_cream.retrain.make_trainer", fails)
    assert compare(recipe(0), contestants, [0, 1], tmp_path) == rows
    # Another child has been found meanwhile.
    other = Contestant(FOUND, "found", contestants[1].network)
    with pytest.raises(UserError, match=r"found/seed0 holds a training of Genotype.*, not of Genotype.* with --name\."):
        compare(recipe(0), [other], [0, 1], tmp_path)
    # One by one recipe and one by another are not to be compared.
    longer = recipe(0).model_copy(update={"epochs": 2})
    with pytest.raises(UserError, match="found/seed0 holds a run of another recipe"):
        compare(longer, contestants, [0, 1], tmp_path)


@pytest.mark.parametrize("what", ["recipe", "network"])
def test_the_last_training_of_another_comparison_is_refused_before_the_first_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    contestants = [Contestant(FOUND, "found", str(GENOTYPE)), Contestant("resnet18", "resnet18", "resnet18")]

    class Trained(Exception):
        pass

    def trains(*_: Any, **__: Any) -> Any:
        raise Trained

    monkeypatch.setattr(module_under_test, "retrain_seeds", trains)
    last = RunDirectory(tmp_path / "resnet18/seed1")
    with pytest.raises(Trained):
        compare(recipe(0), contestants, [0, 1], tmp_path)
    last.keep_to("resnet34 on digits at 8 pixels" if what == "network" else "resnet18 on digits at 8 pixels")
    last.begin(to_yaml(recipe(1) if what == "network" else recipe(1).model_copy(update={"epochs": 2})), 1)
    expected = {"recipe": "holds a run of another recipe", "network": "holds a training of resnet34"}[what]
    with pytest.raises(UserError, match=f"resnet18/seed1 {expected}"):
        compare(recipe(0), contestants, [0, 1], tmp_path)


@pytest.mark.parametrize(
    ("network", "changes", "expected"),
    [
        ("resnet19", {}, "resnet19 cannot take part: timm has no network 'resnet19'; did you mean 'resnet18'?"),
        ("vit_tiny_patch16_224", {}, "vit_tiny_patch16_224 cannot take part: The network cannot take images of 8 pix"),
        ("vgg11", {"drop_path_rate": 0.1}, "vgg11 cannot take part: timm cannot build 'vgg11': .*drop_path_rate"),
        (
            str(GENOTYPE),
            {"darts": DartsNetworkSettings(channels=4, cells=4, auxiliary=True)},
            "needs features of 8 to 10 pixels",
        ),
    ],
    ids=["unknown", "pixels", "rate", "head"],
)
def test_who_cannot_be_trained_is_refused(network: str, changes: dict[str, Any], expected: str) -> None:
    able = [Contestant(FOUND, "found", str(GENOTYPE)), Contestant("resnet18", "resnet18", "resnet18")]
    refuse_unfit(recipe(0), able, 10)
    with pytest.raises(UserError, match=expected):
        refuse_unfit(recipe(0).model_copy(update=changes), [able[1], Contestant("a", network, network)], 10)
