from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from scipy.stats import kendalltau

from nni_cream.architecture import CreamPath
from nni_cream.child import Child, build_network
from nni_cream.cost import measure_network
from nni_cream.errors import UserError
from nni_cream.rank_correlation import (
    Counts,
    FinishedSearch,
    complete_data,
    count_shared,
    count_test_images,
    draw_samples,
    plan_trainings,
    put_together,
    tau_between_seeds,
)
from nni_cream.recipe import CreamRecipe, RetrainRecipe
from nni_cream.recipe_files import to_yaml
from nni_cream.runs import RunDirectory
from nni_cream.search import search_cream
from nni_cream.strategies.cream_module import CreamLightningModule, RankedPath
from tests import latency_tables
from tests.resuming import CREAM
from tests.test_retrain import GENOTYPE, SPACE

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*logging interval"),
    # Lightning's use of torch.
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]

DATA = {"name": "digits", "folder": None, "resolution": 32}
# Blocks may be left out, so that a path does not tell which of a stage are.
RECIPE: dict[str, Any] = {
    **CREAM,
    "epochs": 2,
    "data": {**CREAM["data"], "batch_size": 64, "validation_fraction": 0.3},
    "space": {"aligned": True, "skip": True},
    "flops": {"min": 1.5, "max": 3.0},
}


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[FinishedSearch, list[RankedPath]]:
    """A small search, and how it has ranked its board."""
    folder = tmp_path_factory.mktemp("runs") / "searched"
    ranking: list[RankedPath] = []
    rank = CreamLightningModule._rank

    def watched(module: CreamLightningModule) -> None:
        rank(module)
        ranking[:] = module.ranking

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CreamLightningModule, "_rank", watched)
        patch.setattr("nni_cream.search.leave_report", lambda *_: None)
        search_cream(CreamRecipe.model_validate(RECIPE), RunDirectory(folder))
    return FinishedSearch.open(folder), ranking


def made_up(folder: Path, num_classes: int = 10, data: dict[str, Any] = DATA, **changes: Any) -> FinishedSearch:
    """What a search leaves, but for its weights."""
    recipe = CreamRecipe.model_validate({**RECIPE, **changes})
    RunDirectory(folder).begin(to_yaml(recipe), recipe.seed)
    path = CreamPath.parse("[0] [0] [1] [2] [3] [0] [0]")
    child = Child(path, num_classes, 0.5, 1, 2, data, {"name": "a", "seed": 0})
    child.save(folder / "child.json", torch.nn.Linear(1, 1))
    return FinishedSearch.open(folder)


@pytest.mark.slow
class TestSharedWeights:
    def test_judge_as_the_search_does(self, searched: tuple[FinishedSearch, list[RankedPath]]) -> None:
        search, ranking = searched
        assert len(ranking) >= 2
        counts = count_shared(search, [path.sample for path in ranking])
        assert counts.accuracies == tuple(path.accuracy for path in ranking)
        assert counts.accuracies[0] == search.child.accuracy
        # It ranks on the validation part.
        assert counts.images > 2 * len(ranking)
        assert counts.right == tuple(round(path.accuracy * counts.images) for path in ranking)

    def test_of_a_path_do_not_depend_on_the_others(self, searched: tuple[FinishedSearch, list[RankedPath]]) -> None:
        search, _ = searched
        samples = list(draw_samples([search], 3, seed=1).values())
        all_at_once = count_shared(search, samples)
        assert count_shared(search, samples[2:]).right == all_at_once.right[2:]
        assert len(set(all_at_once.right)) > 1

    def test_need_a_checkpoint(self, tmp_path: Path) -> None:
        search = made_up(tmp_path / "a")
        with pytest.raises(UserError, match="has no checkpoint, and so no shared weights"):
            count_shared(search, [])

    def test_need_the_checkpoint_of_this_supernet(
        self, searched: tuple[FinishedSearch, list[RankedPath]], tmp_path: Path
    ) -> None:
        other = made_up(tmp_path / "a", space={"aligned": True, "skip": True, "dil_conv": True})
        other.directory.checkpoint.parent.mkdir()
        other.directory.checkpoint.symlink_to(searched[0].directory.checkpoint.resolve())
        with pytest.raises(UserError, match=r"last\.ckpt does not fit the supernet of .*recipe\.yml"):
            count_shared(other, [])

    def test_need_the_images_of_the_search(
        self, searched: tuple[FinishedSearch, list[RankedPath]], tmp_path: Path
    ) -> None:
        other = made_up(tmp_path / "a", num_classes=12)
        other.directory.checkpoint.parent.mkdir()
        other.directory.checkpoint.symlink_to(searched[0].directory.checkpoint.resolve())
        with pytest.raises(UserError, match="is a search for 12 classes, but digits has 10 now"):
            count_shared(other, [])


class TestSearches:
    def test_of_one_space_have_the_same_paths(self, tmp_path: Path) -> None:
        cream = made_up(tmp_path / "cream")
        uniform = made_up(tmp_path / "uniform", seed=8, epochs=4, cream={"teacher": "none", "warmup_epochs": 1})
        samples = draw_samples([cream, uniform], 6, seed=3)
        assert len(samples) == 6
        assert list(draw_samples([cream], 4, seed=3)) == list(samples)[:4]
        assert list(draw_samples([uniform], 4, seed=4)) != list(samples)[:4]
        for path in list(samples)[:2]:
            assert 1.5e6 <= measure_network(build_network(str(path), 10, {}), 32).macs <= 3e6

    def test_by_time_keep_to_the_table_that_they_have_kept(self, tmp_path: Path) -> None:
        """Where the original was is not looked at."""
        table = latency_tables.made_up(operations=tuple(range(7)))
        interval = {"table": "nowhere.json", "min": 1.4, "max": 1.6}
        search = made_up(tmp_path / "cream", flops={"min": 0.5, "max": 100.0}, latency=interval)
        table.save(search.directory.latency)
        samples = draw_samples([search], 6, seed=3)
        assert len(samples) == 6
        assert all(1.4 <= table.of(path) <= 1.6 for path in samples)
        without = draw_samples([made_up(tmp_path / "by_cost")], 6, seed=3)
        assert not all(1.4 <= table.of(path) <= 1.6 for path in without)

    @pytest.mark.parametrize(
        ("changes", "what"),
        [
            ({"flops": {"min": 1.5, "max": 2.5}}, "paths"),
            ({"space": {"aligned": True, "skip": True, "dil_conv": True}}, "paths"),
            ({"num_classes": 11}, "images"),
            ({"data": {**DATA, "name": "mnist5k"}}, "images"),
            ({"data": {**DATA, "folder": "/elsewhere"}}, "images"),
            ({"data": {**DATA, "resolution": 64}}, "images"),
        ],
        ids=str,
    )
    def test_of_another_space_are_not_compared(self, tmp_path: Path, changes: dict[str, Any], what: str) -> None:
        searches = [made_up(tmp_path / "cream"), made_up(tmp_path / "other", **changes)]
        with pytest.raises(UserError, match=rf"other is a search of other {what} than .*cream, so that they cannot be"):
            draw_samples(searches, 3, seed=0)

    def test_with_fewer_paths(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("nni_cream.compare.PATIENCE", 4)
        with pytest.raises(UserError, match=r"--paths is 9, but among .* draws there are 4 different paths: ask"):
            draw_samples([made_up(tmp_path / "cream")], 9, seed=0)

    def test_of_darts_rank_no_paths(self, tmp_path: Path) -> None:
        child = Child(GENOTYPE, 10, 0.5, 1, 2, DATA, {"name": "a", "seed": 0}, space=SPACE)
        child.save(tmp_path / "child.json", torch.nn.Linear(1, 1))
        with pytest.raises(UserError, match=r"holds a DARTS search, which .* ranks no paths"):
            FinishedSearch.open(tmp_path)

    def test_that_have_not_ended(self, tmp_path: Path) -> None:
        (tmp_path / "child.json").touch()
        with pytest.raises(UserError, match=r"child\.json is a file; give the folder of a search, perhaps"):
            FinishedSearch.open(tmp_path / "child.json")
        (tmp_path / "child.json").unlink()
        with pytest.raises(UserError, match=r"holds no search that has ended \(it has no child\.json\)"):
            FinishedSearch.open(tmp_path)


PATHS = [CreamPath.parse(f"[[0], [{choice}], [3], [4, 0], [2], [3], [0]]") for choice in range(4)]
TRAINING = RetrainRecipe.model_validate({"name": "alone", "epochs": 2, "seed": 7, "data": {"batch_size": 32}})


class TestTrainings:
    def test_are_of_every_path_with_every_seed(self, tmp_path: Path) -> None:
        recipe = complete_data(TRAINING, made_up(tmp_path / "search"))
        plan = plan_trainings(PATHS, recipe, [3, 1], tmp_path)
        assert list(plan) == PATHS
        assert [list(trainings) for trainings in plan.values()] == [[3, 1]] * 4
        for path, trainings in plan.items():
            for seed, training in trainings.items():
                assert (training.candidate.file, training.candidate.name) == (None, str(path))
                assert training.recipe == recipe.model_copy(update={"seed": seed})
        data = recipe.data
        assert (data.name, data.resolution, data.batch_size) == ("digits", 32, 32)
        folder = plan[PATHS[2]][1].folder
        assert folder == tmp_path / "paths/0-2-3-4.0-2-3-0/seed1"
        # A place of its own for each, which does not depend on the number of paths.
        assert len({training.folder for trainings in plan.values() for training in trainings.values()}) == 8
        assert plan_trainings(PATHS[2:], recipe, [1], tmp_path)[PATHS[2]][1].folder == folder

    def test_by_another_recipe_are_not_taken(self, tmp_path: Path) -> None:
        plan = plan_trainings(PATHS, TRAINING, [0], tmp_path)
        training = plan[PATHS[1]][0]
        RunDirectory(training.folder).begin(to_yaml(training.recipe), 0)
        plan_trainings(PATHS, TRAINING, [0], tmp_path)
        with pytest.raises(UserError, match=r"0-1-3-4\.0-2-3-0/seed0 holds a run of another recipe"):
            plan_trainings(PATHS, TRAINING.model_copy(update={"epochs": 3}), [0], tmp_path)


class TestResult:
    SHARED = (Counts((80, 90, 85, 70), 100), Counts((70, 80, 90, 90), 100))
    # Of 250 images. The shares of the first two paths, as float32 has them, have different sums.
    RIGHT = ((215, 233), (224, 224), (244, 248), (220, 236))

    def put_together(self, folder: Path, seeds: int, searches: int = 2) -> tuple[str, Any]:
        names = ("cream", "uniform")[:searches]
        plan = plan_trainings(PATHS, TRAINING, list(range(seeds)), folder)
        for number, (path, trainings) in enumerate(plan.items()):
            for seed, training in trainings.items():
                accuracy = torch.tensor(self.RIGHT[number][seed] / 250).item()
                result = {"network": str(path), "test_accuracy": accuracy, "val_accuracy": 0.5}
                result |= {"flops": 3_000_000 + number, "params": 1_000_000, "folder": str(training.folder)}
                training.folder.mkdir(parents=True)
                (training.folder / "result.json").write_text(json.dumps(result))
        text = put_together([made_up(folder / name) for name in names], self.SHARED[:searches], plan, 250, folder)
        assert (folder / "rank_correlation.md").read_text() == text
        return text, json.loads((folder / "rank_correlation.json").read_text())

    def test_correlates_the_test_accuracies(self, tmp_path: Path) -> None:
        text, stored = self.put_together(tmp_path, 1)
        alone = [right for right, _ in self.RIGHT]
        taus = [kendalltau(counts.right, alone).statistic for counts in self.SHARED]
        assert [found["tau"]["value"] for found in stored["searches"].values()] == pytest.approx(taus)
        assert stored["differences_to_the_first"]["uniform"]["value"] == pytest.approx(taus[1] - taus[0])
        assert stored["tau_between_seeds"] is None
        assert stored["versions"]["torch"] == version("torch")
        low, high = stored["searches"]["cream"]["tau"]["interval"]
        difference = stored["differences_to_the_first"]["uniform"]
        lines = text.splitlines()
        assert lines[:3] == [
            "| search | paths | Kendall's τ [95 % interval] | difference to cream |",
            "|---|---|---|---|",
            f"| cream | 4 | {taus[0]:.2f} [{low:.2f}, {high:.2f}] |  |",
        ]
        assert lines[3].startswith(f"| uniform | 4 | {taus[1]:.2f} [")
        low, high = difference["interval"]
        assert low < difference["value"] < high
        assert lines[3].endswith(f" | {difference['value']:.2f} [{low:.2f}, {high:.2f}] |")
        assert lines[5] == (
            "| path | MACs (M) | parameters (M) | trained: test accuracy | shared weights: cream | "
            "shared weights: uniform |"
        )
        assert lines[7:] == [
            f"| `{path}` | 3.00 | 1.000 | {right[0] / 250:.4f} | {first / 100:.4f} | {second / 100:.4f} |"
            for path, right, first, second in zip(
                PATHS, self.RIGHT, *(counts.right for counts in self.SHARED), strict=True
            )
        ]
        assert [row["path"] for row in stored["paths"]] == [path.to_json() for path in PATHS]
        assert stored["paths"][3]["shared_accuracy"] == {"cream": 0.7, "uniform": 0.9}
        for suffix in ("svg", "png"):
            assert (tmp_path / f"rank_correlation.{suffix}").stat().st_size > 1000

    def test_of_one_search_is_no_difference(self, tmp_path: Path) -> None:
        text, stored = self.put_together(tmp_path, 2, searches=1)
        first, second, third, fourth, *_ = text.splitlines()
        assert first == "| search | paths | Kendall's τ [95 % interval] |"
        assert {line.count("|") for line in (first, second, third, fourth)} == {4}
        assert stored["differences_to_the_first"] == {}

    def test_of_several_seeds_the_mean_counts(self, tmp_path: Path) -> None:
        text, stored = self.put_together(tmp_path, 2)
        # The first two paths have the same mean, which no rounding may put in an order.
        sums = [sum(right) for right in self.RIGHT]
        assert sums[0] == sums[1]
        expected = [kendalltau(counts.right, sums).statistic for counts in self.SHARED]
        assert [found["tau"]["value"] for found in stored["searches"].values()] == pytest.approx(expected)
        between = kendalltau(*zip(*self.RIGHT, strict=True)).statistic
        assert stored["tau_between_seeds"] == pytest.approx(between)
        assert f"| one seed of the trainings against another | 4 | {between:.2f} | |" in text.splitlines()
        assert stored["paths"][0]["test_accuracy"]["mean"] == pytest.approx(224 / 250)
        assert stored["paths"][0]["seeds"]["1"]["test_accuracy"] == pytest.approx(233 / 250)

    def test_of_searches_of_one_name_has_both(self, tmp_path: Path) -> None:
        searches = [made_up(tmp_path / place / "trial") for place in "ab"]
        from nni_cream.rank_correlation import _names

        assert _names(searches) == [str(tmp_path / "a/trial"), str(tmp_path / "b/trial")]


def test_agreement_of_seeds_is_the_mean_over_pairs() -> None:
    right = [(5, 3, 9), (7, 1, 8), (6, 6, 6), (9, 7, 5)]
    columns = list(zip(*right, strict=True))
    pairs = [kendalltau(columns[i], columns[j]).statistic for i, j in ((0, 1), (0, 2), (1, 2))]
    assert tau_between_seeds(right) == pytest.approx(sum(pairs) / 3)
    assert tau_between_seeds([(row[0],) for row in right]) is None
    assert tau_between_seeds([(1, 1), (1, 2)]) is None


def test_the_test_part_is_counted(tmp_path: Path) -> None:
    recipe = complete_data(TRAINING, made_up(tmp_path / "search"))
    # A fifth of each class of the 1,797 images, rounded.
    assert count_test_images(recipe) == pytest.approx(1797 / 5, abs=5)
    assert yaml.safe_load(to_yaml(recipe))["data"]["name"] == "digits"
