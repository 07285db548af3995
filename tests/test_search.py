from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from nni_cream.architecture import CreamPath
from nni_cream.board import BoardHistory, Place
from nni_cream.checkpoints import PARTS
from nni_cream.child import Child, build_network
from nni_cream.cost import Cost, measure, measure_network, measure_space
from nni_cream.data import Augmentation, DataSplits, Fractions, LabelledImages, load_data
from nni_cream.errors import UserError
from nni_cream.history import History, Seen
from nni_cream.latency import LatencyTable
from nni_cream.models.cream import OPERATIONS, STAGES, STEM_CHANNELS, build_child
from nni_cream.recipe import CreamRecipe
from nni_cream.recipe_files import load_recipe, parse_override, to_yaml
from nni_cream.reporting import Reporter
from nni_cream.runs import RunDirectory
from nni_cream.search import (
    flops_range,
    latency_table_of,
    load_splits,
    make_loader,
    make_training_loader,
    on_device,
    refuse_unreachable,
    search_cream,
)
from nni_cream.settings import Data, Device, Flops
from nni_cream.strategies.cream import CreamStrategy
from nni_cream.strategies.cream_module import RankedPath
from nni_cream.supernet.paths import PathSpace
from search_spaces.cream import CreamSpace, SpacePlan
from tests.latency_tables import made_up

# Every setting is another than its default. The depths are 1, 2, 3, 3, 1, and candidate 6 is operation 9, the residual
# unit; candidate 7 leaves the block out.
RECIPE: dict[str, Any] = {
    "name": "stub",
    "seed": 5,
    "epochs": 7,
    "data": {
        "name": "digits",
        "resolution": 32,
        "batch_size": 48,
        "validation_fraction": 0.2,
        "architecture_fraction": 0.15,
        "augmentation": {"hflip": 0.3, "interpolation": "bicubic"},
    },
    "optimizer": {"name": "adam", "lr": 0.02, "momentum": 0.8, "weight_decay": 0.003},
    "schedule": {"name": "cosine", "warmup_epochs": 2, "warmup_lr": 1e-5, "min_lr": 1e-4},
    "flops": {"min": 0.5, "max": 6},
    "space": {"resunit": ["basic"], "skip": True},
}
CREAM: dict[str, Any] = {
    "board_size": 6,
    "board_images": 9,
    "admission_gap": 3.5,
    "warmup_epochs": 4,
    "prior": "board",
    "teacher": "top1",
    "label_smoothing": 0.05,
    "meta_interval": 11,
    "matching_lr": 0.003,
    "recalibration_batches": 13,
}


class Stub:
    """Stands in the place of ``CreamStrategy``: takes notes, and has found ``ranking`` without searching."""

    ranking: ClassVar[list[RankedPath]] = []
    made: ClassVar[list[Stub]] = []
    refusal: ClassVar[UserError | None] = None
    places: ClassVar[list[tuple[Place, ...]]] = []

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.oneshot_module = self
        self.history = BoardHistory()
        self.history.epochs = dict(enumerate(self.places, start=1))
        self.has_run = False
        self.made.append(self)

    def initialize(self, model_space: Any, engine: Any) -> None:
        self.space, self.evaluator = model_space.model_space, model_space.evaluator
        if self.refusal:
            raise self.refusal
        if not self.ranking:
            self.ranking.append(ranked(CreamPath.of([[0], *([0] * depth for depth in self.space.depths), [0]]), 1, 2))

    def run(self) -> None:
        self.paths = PathSpace(self.space)
        self.has_run = True

    @torch.no_grad()
    def calibrated_network(self, sample: dict[str, Any]) -> nn.Module:
        """The network of the path at place i, with nothing but i in it."""
        (place,) = (i for i, path in enumerate(self.ranking) if path.sample == sample)
        network = build_child(self.space.architecture(sample), num_classes=10)
        for tensor in network.state_dict().values():
            tensor.fill_(place)
        return network


@pytest.fixture(autouse=True)
def _stub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stub, "ranking", [])
    monkeypatch.setattr(Stub, "made", [])
    monkeypatch.setattr(Stub, "refusal", None)
    monkeypatch.setattr(Stub, "places", [])
    monkeypatch.setattr("nni_cream.search.CreamStrategy", Stub)
    # Drawing takes longer than all the rest.
    monkeypatch.setattr("nni_cream.search.leave_report", lambda _, directory: print(f"report of {directory.path}"))
    monkeypatch.setattr("nni_cream.search.show_report", lambda _, directory: print(f"again of {directory.path}"))


TABLE = made_up((0, 1, 2, 3, 4, 5, 9))


def timed(folder: Path, **latency: Any) -> dict[str, Any]:
    """Changes of the recipe that give it a budget of time, by a table in ``folder``."""
    TABLE.save(folder / "measured.json")
    return {"latency": {"table": folder / "measured.json", "min": 1, "max": 2.5, **latency}}


def ranked(path: CreamPath, accuracy: float, macs: int) -> RankedPath:
    return RankedPath(path.to_sample(), accuracy, Cost(macs, 7 * macs))


def search(folder: Path, changes: dict[str, Any] | None = None, **cream: Any) -> tuple[Child, Stub]:
    recipe = CreamRecipe.model_validate({**RECIPE, **(changes or {}), "cream": {**CREAM, **cream}})
    child = search_cream(recipe, RunDirectory(folder))
    (strategy,) = Stub.made
    return child, strategy


@pytest.fixture(scope="module")
def splits() -> DataSplits:
    return load_data(
        "digits",
        resolution=32,
        seed=5,
        augmentation=Augmentation(hflip=0.3, interpolation="bicubic"),
        fractions=Fractions(validation=0.2, architecture=0.15),
    )


class TestWhatASearchIsGiven:
    def test_every_setting_reaches_the_strategy(self, tmp_path: Path) -> None:
        _, strategy = search(tmp_path)
        del strategy.settings["ranking_dataloader"]
        assert strategy.settings == {**CREAM, "flops_range": (500_000, 6_000_000), "seed": 5}
        assert strategy.has_run

    def test_a_budget_of_time_takes_the_place_of_that_of_macs(self, tmp_path: Path) -> None:
        _, strategy = search(tmp_path / "run", timed(tmp_path))
        del strategy.settings["ranking_dataloader"]
        # The depths still follow from flops.
        depths = (1, 2, 3, 3, 1)
        assert strategy.space.depths == depths
        budget = TABLE.budget(depths, (0, 1, 2, 3, 4, 5, 9), True, 1, 2.5)
        assert strategy.settings == {**CREAM, "latency": budget, "seed": 5}
        paths = PathSpace(strategy.space)
        assert {label: len(times) for label, times in budget.choices.items()} == dict(
            zip(paths.labels, paths.sizes, strict=True)
        )

    def test_probabilities_reach_the_blocks(self, tmp_path: Path) -> None:
        _, strategy = search(tmp_path, prior=[1, 2, 3, 4, 5, 6, 7, 8])
        depths = (1, 2, 3, 3, 1)
        # The first block of a stage cannot be left out.
        assert strategy.settings["prior"] == {
            f"stage{stage}_block{block}": (1, 2, 3, 4, 5, 6, 7, 8)[: 8 if block else 7]
            for stage, depth in enumerate(depths, start=1)
            for block in range(depth)
        }
        assert strategy.space.depths == depths

    def test_weights_architecture_and_ranking_see_their_own_part(self, tmp_path: Path, splits: DataSplits) -> None:
        _, strategy = search(tmp_path)
        training, validation = strategy.evaluator.train_dataloaders, strategy.evaluator.val_dataloaders
        ranking = strategy.settings["ranking_dataloader"]
        loaders = (training, validation, ranking)
        sources = [getattr(loader.dataset, "source", loader.dataset) for loader in loaders]
        parts = [splits.weights, splits.architecture, splits.validation]
        assert [source.indices.tolist() for source in sources] == [part.indices.tolist() for part in parts]
        assert len({len(part) for part in parts}) == 3
        assert [str(source.transform) for source in sources] == [str(part.transform) for part in parts]
        # Only training drops what is left over.
        assert [sum(len(labels) for _, labels in loader) for loader in loaders] == [
            len(splits.weights) // 48 * 48,
            len(splits.architecture),
            len(splits.validation),
        ]

    def test_optimizer_schedule_and_length(self, tmp_path: Path) -> None:
        _, strategy = search(tmp_path)
        module = strategy.evaluator.module
        assert module.optimizer_arguments == {
            "opt": "adam",
            "lr": 0.02,
            "momentum": 0.8,
            "weight_decay": 0.003,
            "filter_bias_and_bn": True,
        }
        assert module.schedule_arguments == {
            "sched": "cosine",
            "step_on_epochs": False,
            "warmup_epochs": 2,
            "warmup_lr": 1e-5,
            "min_lr": 1e-4,
        }
        assert strategy.evaluator.trainer.max_epochs == 7

    @pytest.mark.parametrize("memory_format", ["channels_last", "contiguous_format"])
    def test_layout_in_memory(self, tmp_path: Path, memory_format: str) -> None:
        _, strategy = search(tmp_path, {"device": {"memory_format": memory_format}})
        stem = strategy.space.conv_stem.weight
        assert stem.is_contiguous(memory_format=getattr(torch, memory_format))

    def test_a_checkpoint_if_there_is_one(self, tmp_path: Path) -> None:
        _, strategy = search(tmp_path / "new")
        assert strategy.evaluator.fit_kwargs == {"ckpt_path": None}
        Stub.made.clear()
        checkpoint = tmp_path / "old" / "checkpoints" / "last.ckpt"
        checkpoint.parent.mkdir(parents=True)
        progress = {"total": {"processed": 12}}
        content = {**dict.fromkeys(PARTS), "loops": {"fit_loop": {"epoch_loop.batch_progress": progress}}}
        torch.save(content, checkpoint)
        _, strategy = search(tmp_path / "old")
        assert strategy.evaluator.fit_kwargs == {"ckpt_path": checkpoint}
        # What was logged after it is not shown twice.
        assert strategy.evaluator.trainer.logger._kwargs["purge_step"] == 12

    @pytest.mark.parametrize(
        ("flops", "resolution", "depths"),
        [
            ({"min": 0, "max": 600}, 224, (4, 4, 4, 4, 4)),
            ({"min": 0, "max": 30}, 128, (1, 1, 1, 1, 1)),
        ],
        ids=str,
    )
    def test_a_resolution_that_follows_from_the_interval(
        self, repository: Path, tmp_path: Path, flops: dict[str, float], resolution: int, depths: tuple[int, ...]
    ) -> None:
        overrides = {**dict([parse_override("data.resolution=null")]), "flops": flops}
        recipe = load_recipe(CreamRecipe, repository / "tests/experiments/tiny_recipe.yml", overrides)
        child = search_cream(recipe, RunDirectory(tmp_path))
        (strategy,) = Stub.made
        assert strategy.space.depths == depths
        assert child.data == {**recipe.data.model_dump(mode="json"), "resolution": resolution}
        assert json.loads((tmp_path / "child.json").read_text())["data"] == child.data
        for loader in (strategy.evaluator.train_dataloaders, strategy.settings["ranking_dataloader"]):
            assert loader.dataset[0][0].shape == (3, resolution, resolution)


class TestWhatASearchEndsWith:
    # The third and the fourth skip other blocks than the first and the second, and are the same networks.
    RANKING = (
        ([[0], [1], [2, 3], [0, 7, 4], [6, 1, 1], [5], [0]], 0.9, 300),
        ([[0], [4], [3, 7], [5, 2, 7], [1, 7, 6], [0], [0]], 0.8, 500),
        ([[0], [1], [2, 3], [0, 4, 7], [6, 1, 1], [5], [0]], 0.75, 301),
        ([[0], [4], [3, 7], [5, 7, 2], [1, 6, 7], [0], [0]], 0.7, 501),
        ([[0], [0], [0, 0], [0, 0, 0], [0, 0, 0], [0], [0]], 0.6, 200),
        ([[0], [5], [0, 7], [0, 7, 7], [0, 7, 7], [0], [0]], 0.5, 400),
    )
    BEST = ((0,), (1,), (2, 3), (0, 4), (9, 1, 1), (5,), (0,))
    OTHERS = (
        {"path": [[0], [4], [3], [5, 2], [1, 9], [0], [0]], "accuracy": 0.8, "flops": 500, "params": 3500},
        {"path": [[0], [0], [0, 0], [0, 0, 0], [0, 0, 0], [0], [0]], "accuracy": 0.6, "flops": 200, "params": 1400},
        {"path": [[0], [5], [0], [0], [0], [0], [0]], "accuracy": 0.5, "flops": 400, "params": 2800},
    )

    @pytest.fixture(autouse=True)
    def _found(self, _stub: None) -> None:
        Stub.ranking.extend(ranked(CreamPath.of(path), accuracy, macs) for path, accuracy, macs in self.RANKING)

    def test_the_best_path_and_those_after_it(self, tmp_path: Path) -> None:
        child, _ = search(tmp_path)
        data = Data.model_validate(RECIPE["data"]).model_dump(mode="json")
        assert child == Child(
            architecture=CreamPath(self.BEST),
            num_classes=10,
            accuracy=0.9,
            flops=300,
            params=2100,
            data=data,
            search={"name": "stub", "seed": 5, "epochs": 7},
            runners_up=list(self.OTHERS),
        )
        assert Child.load(tmp_path / "child.json") == child

    def test_one_that_skips_otherwise_stands_for_both_where_it_is_the_better(self, tmp_path: Path) -> None:
        Stub.ranking[:4] = [Stub.ranking[place] for place in (2, 3, 0, 1)]
        child, _ = search(tmp_path)
        assert isinstance(child.architecture, CreamPath)
        assert (child.architecture.stages, child.accuracy, child.flops) == (self.BEST, 0.75, 301)
        assert [(other["accuracy"], other["flops"]) for other in child.runners_up] == [
            (0.7, 501),
            (0.6, 200),
            (0.5, 400),
        ]

    def test_predicted_times(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        reported: list[dict[str, Any]] = []
        monkeypatch.setattr(Reporter, "final", lambda _, metrics: reported.append(metrics))
        Stub.ranking[:] = [replace(path, latency=1.5 + place / 8) for place, path in enumerate(Stub.ranking)]
        Stub.places[:] = [(Place((0, 1, 2, 3, 0, 7, 4, 6, 1, 1, 5, 0), 60.5, 301, 1.5),)]
        child, _ = search(tmp_path / "run", timed(tmp_path))
        # The third and the fourth are the first and the second once more.
        assert child.latency == 1.5
        assert [other["latency"] for other in child.runners_up] == [1.625, 2.0, 2.125]
        assert [child.ranked(rank).latency for rank in (2, 3)] == [1.625, 2.0]
        assert child.search["latency_of"] == "a batch of 1 on Abacus 3000, 2 threads, 32-true, torch 2.13.0+cpu"
        assert Child.load(tmp_path / "run/child.json") == child
        assert reported[0]["latency"] == 1.5
        told = "latency:   1.500 ms predicted for a batch of 1 on Abacus 3000, 2 threads, 32-true, torch 2.13.0+cpu"
        assert told in capsys.readouterr().out.splitlines()
        (seen,) = History.load(tmp_path / "run/history.json").board[1]
        assert seen == Seen(str(CreamPath(self.BEST)), 60.5, 301, 1.5)

    def test_calibrated_weights_of_the_best(self, tmp_path: Path) -> None:
        child, _ = search(tmp_path)
        weights = load_file(tmp_path / "child.safetensors")
        expected = build_network(str(child.architecture), 10, {}).state_dict()
        assert {name: tensor.shape for name, tensor in weights.items()} == {n: t.shape for n, t in expected.items()}
        assert not any(tensor.any() for tensor in weights.values())

    def test_a_report_to_the_tuner_and_to_a_person(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        reported: list[dict[str, Any]] = []
        monkeypatch.setattr(Reporter, "final", lambda _, metrics: reported.append(metrics))
        Stub.ranking[0] = RankedPath(Stub.ranking[0].sample, 0.98765, Cost(3_701_696, 1_244_890))
        search(tmp_path)
        path = str([list(stage) for stage in self.BEST])
        numbers = {"default": 0.98765, "accuracy": 0.98765, "flops": 3_701_696, "params": 1_244_890}
        assert reported == [{**numbers, "path": path}]
        assert capsys.readouterr().out.splitlines() == [
            f"path:      {path}",
            "FLOPs:     3.70 M multiply-accumulates",
            "params:    1.245 M",
            "accuracy:  0.9877 with shared weights, on held-out images",
            f"folder:    {tmp_path}",
            f"report of {tmp_path}",
        ]

    def test_the_same_again_searches_nothing_and_reports_its_end(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        # NNI starts a trial again whose end it has not seen.
        reported: list[dict[str, Any]] = []
        monkeypatch.setattr(Reporter, "final", lambda _, metrics: reported.append(metrics))
        child, _ = search(tmp_path)
        before = (tmp_path / "child.json").stat().st_mtime_ns
        assert search(tmp_path)[0] == child  # search() makes sure that there has been one strategy
        assert (tmp_path / "child.json").stat().st_mtime_ns == before
        assert reported[1:] == reported[:1]
        assert capsys.readouterr().out.splitlines()[-1] == f"again of {tmp_path}"

    def test_the_child_comes_after_the_history_and_the_report_last(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A child counts as the end of a search; a report may fail."""
        order: list[str] = []
        monkeypatch.setattr(History, "save", lambda *_: order.append("history"))
        monkeypatch.setattr(Child, "save", lambda *_: order.append("child"))
        monkeypatch.setattr(Reporter, "final", lambda *_: order.append("NNI"))
        monkeypatch.setattr("nni_cream.search.leave_report", lambda *_: order.append("report"))
        search(tmp_path)
        assert order == ["history", "child", "NNI", "report"]

    def test_a_history_of_the_board(self, tmp_path: Path, splits: DataSplits) -> None:
        """Paths that are one architecture are seen once, as the better one."""
        paths = [path for path, _, _ in self.RANKING[:4]]
        indices = [tuple(itertools.chain.from_iterable(path)) for path in paths]
        Stub.places[:] = [
            (),
            (Place(indices[2], 60.5, 301), Place(indices[1], 50.0, 500), Place(indices[0], 40.0, 300)),
            (Place(indices[0], 70.25, 300), Place(indices[3], 65.0, 501)),
        ]
        search(tmp_path)
        best, second = str(CreamPath(self.BEST)), str(CreamPath.of(self.OTHERS[0]["path"]))  # type: ignore[arg-type]
        assert History.load(tmp_path / "history.json") == History(
            len(splits.validation),
            board={
                1: [],
                2: [Seen(best, 60.5, 301), Seen(second, 50.0, 500)],
                3: [Seen(best, 70.25, 300), Seen(second, 65.0, 501)],
            },
        )


class TestTable:
    """What a search makes of the table of its budget."""

    def recipe(self, **changes: Any) -> CreamRecipe:
        return CreamRecipe.model_validate({**RECIPE, "cream": CREAM, **changes})

    def refusal(self, folder: Path, changes: dict[str, Any]) -> str:
        with pytest.raises(UserError) as caught:
            search_cream(self.recipe(**changes), RunDirectory(folder / "run"))
        assert not (folder / "run").exists()
        assert not Stub.made
        return str(caught.value)

    def test_an_interval_beyond_all_paths_is_refused_with_the_range_that_there_is(self, tmp_path: Path) -> None:
        # Operation i of TABLE.operations, 7 to leave a block out; the depths are 1, 2, 3, 3, 1.
        def extreme(choose: Any, deepest: bool) -> float:
            total = 0.0
            times = TABLE.milliseconds
            for stage, depth in zip(times.stages, (4,) * 5 if deepest else (1, 2, 3, 3, 1), strict=True):
                further = choose([0, *(round(1.24 * time, 4) for time in stage.further)])
                total += round(1.24 * choose(stage.first), 4) + (depth - 1) * further
            return total + sum(
                round(1.24 * t, 4) for t in (times.stem, times.first_stage, times.last_stage, times.head)
            )

        low, high, highest = extreme(min, False), extreme(max, False), extreme(max, True)
        file = tmp_path / "measured.json"
        for least, most in ((high + 0.001, 99), (0, low - 0.001)):
            assert self.refusal(tmp_path, timed(tmp_path, min=least, max=most)) == (
                f"By {file} no network takes {least:g} ms to {most:g} ms a batch (latency.min to latency.max): those "
                f"of this search take {low:.4g} ms to {high:.4g} ms, and with other depths, which flops decides, "
                f"{low:.4g} ms to {highest:.4g} ms are possible."
            )
        search(tmp_path / "run", timed(tmp_path, min=high - 0.001, max=99))

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"data": {**RECIPE["data"], "resolution": 40}}, "images of 32 pixels, but those of this search have 40"),
            ({"space": {"resunit": ["bottleneck"]}}, "has no times of what this search offers: residual unit (bottle"),
        ],
        ids=str,
    )
    def test_one_of_another_search_is_refused(self, tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
        sentence = self.refusal(tmp_path, {**timed(tmp_path), **changes})
        assert sentence.startswith(f"The latency table {tmp_path / 'measured.json'} is for ")
        assert expected in sentence

    def test_one_of_other_classes_is_refused(self, tmp_path: Path) -> None:
        changes = timed(tmp_path)
        made_up(num_classes=9).save(tmp_path / "measured.json")
        assert "is for 9 classes, but the data of this search has 10;" in self.refusal(tmp_path, changes)

    def test_one_that_is_missing_is_refused(self, tmp_path: Path) -> None:
        changes = timed(tmp_path)
        (tmp_path / "measured.json").unlink()
        assert self.refusal(tmp_path, changes) == f"There is no latency table {tmp_path / 'measured.json'}."

    def test_a_search_keeps_the_one_that_it_began_with(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        changes = timed(tmp_path)
        directory, file = RunDirectory(tmp_path / "run"), tmp_path / "measured.json"
        search(directory.path, changes)
        assert LatencyTable.load(directory.latency) == TABLE
        kept = functools.partial(latency_table_of, self.recipe(**changes), directory)
        capsys.readouterr()
        assert kept() == TABLE
        assert capsys.readouterr().out == ""
        told = f"{file} has changed; this search keeps the latency table that it began with, {directory.latency}.\n"
        for change in (lambda: made_up().save(file), lambda: file.write_text("{")):
            change()
            assert kept() == TABLE
            assert capsys.readouterr().out == told
        file.unlink()
        assert kept() == TABLE
        assert capsys.readouterr().out == ""
        # With these it would not find its paths again.
        directory.latency.write_text("{}")
        with pytest.raises(UserError, match=r"run/latency\.json is not a latency table"):
            kept()

    def test_what_lies_in_a_folder_before_a_search_begins_is_not_its_table(self, tmp_path: Path) -> None:
        changes = timed(tmp_path)
        directory = RunDirectory(tmp_path / "run")
        made_up().save(directory.latency)
        search(directory.path, changes)
        assert LatencyTable.load(directory.latency) == TABLE

    def test_there_is_none_without_a_budget_of_time(self, tmp_path: Path) -> None:
        search(tmp_path)
        assert latency_table_of(self.recipe(), RunDirectory(tmp_path)) is None
        assert not (tmp_path / "latency.json").exists()
        assert "latency" not in json.loads((tmp_path / "child.json").read_text())


class TestFolder:
    def test_is_claimed_by_a_search_that_starts(self, tmp_path: Path) -> None:
        search(tmp_path)
        assert (tmp_path / "recipe.yml").read_text() == to_yaml(CreamRecipe.model_validate({**RECIPE, "cream": CREAM}))
        assert json.loads((tmp_path / "environment.json").read_text())["seed"] == 5

    def test_is_not_claimed_by_one_that_the_strategy_refuses(self, tmp_path: Path) -> None:
        Stub.refusal = UserError("No.")
        with pytest.raises(UserError, match="No"):
            search(tmp_path / "run")
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"optimizer": {"name": "sdg"}}, "timm has no optimizer 'sdg'"),
            ({"data": {**RECIPE["data"], "batch_size": 8000}}, "data.batch_size is 8000"),
        ],
        ids=str,
    )
    def test_is_not_claimed_by_settings_that_do_not_fit(
        self, tmp_path: Path, changes: dict[str, Any], expected: str
    ) -> None:
        recipe = CreamRecipe.model_validate({**RECIPE, **changes, "cream": CREAM})
        with pytest.raises(UserError, match=expected):
            search_cream(recipe, RunDirectory(tmp_path / "run"))
        assert not (tmp_path / "run").exists()
        assert not any(strategy.has_run for strategy in Stub.made)

    def test_is_not_claimed_by_an_interval_without_any_network(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("nni_cream.search.CreamStrategy", CreamStrategy)
        recipe = CreamRecipe.model_validate({**RECIPE, "flops": {"min": 400, "max": 500}, "cream": CREAM})
        with pytest.raises(UserError, match="No network costs 400 M to 500 M"):
            search_cream(recipe, RunDirectory(tmp_path / "run"))
        assert not (tmp_path / "run").exists()


def images(number: int) -> LabelledImages:
    """As many, each of them its own number."""
    numbers: Any = list(range(number))
    return numbers


def loader_of(number: int, data: Data, *, training: bool = False, devices: int = 1) -> Any:
    if training:
        return make_training_loader(images(number), data, 0, Device(devices=devices))
    return make_loader(images(number), data, Device(devices=devices))


def batches(number: int, batch_size: int, **options: Any) -> list[list[int]]:
    return [batch.tolist() for batch in loader_of(number, Data(batch_size=batch_size, resident=False), **options)]


class TestBatches:
    @pytest.mark.parametrize("batch_size", [2, 3, 4, 5, 7, 8, 16, 48, 64, 71, 143, 1000])
    def test_of_an_evaluation_are_as_equal_as_can_be(self, batch_size: int) -> None:
        for number in (*range(2, 40), 143, 144, 359, 400):
            found = batches(number, batch_size)
            assert list(itertools.chain(*found)) == list(range(number))
            sizes = [len(batch) for batch in found]
            assert min(sizes) >= 2
            assert max(sizes) - min(sizes) <= 1
            if batch_size == 2 and number % 2:
                assert sorted(sizes) == [2] * (number // 2 - 1) + [3]
            else:
                assert max(sizes) <= batch_size
                assert len(sizes) == -(-number // batch_size)

    def test_of_one_image_cannot_be_helped(self) -> None:
        assert batches(1, 8) == [[0]]

    def test_of_a_training_are_full_and_shuffled(self) -> None:
        loader = make_training_loader(images(50), Data(batch_size=8, resident=False), 0, Device())
        epochs = [[batch.tolist() for batch in loader] for _ in range(2)]
        for found in epochs:
            assert [len(batch) for batch in found] == [8] * 6
            seen = list(itertools.chain(*found))
            assert len(set(seen)) == 48
            assert seen != sorted(seen)
        assert epochs[0] != epochs[1]

    def test_of_a_training_need_as_many_images(self) -> None:
        assert sorted(batches(8, 8, training=True)[0]) == list(range(8))
        with pytest.raises(UserError) as caught:
            make_training_loader(images(7), Data(batch_size=8, resident=False), 0, Device())
        assert str(caught.value) == ("data.batch_size is 8, but there are 7 images to train on: make it at most that.")

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("number", [6, 7, 22, 50])
    def test_are_divided_among_the_devices(self, monkeypatch: pytest.MonkeyPatch, number: int, training: bool) -> None:
        whole = batches(number, 6, training=training)
        parts = []
        for rank in range(3):
            monkeypatch.setenv("RANK", str(rank))
            parts.append(batches(number, 6, training=training, devices=3))
        assert [list(itertools.chain(*pieces)) for pieces in zip(*parts, strict=True)] == whole
        if training:
            assert {len(piece) for part in parts for piece in part} == {2}

    def test_of_fewer_images_than_devices_are_refused(self) -> None:
        with pytest.raises(UserError) as caught:
            batches(2, 6, devices=3)
        expected = "device.devices is 3, but a part of the data has 2 images: make it smaller."
        assert str(caught.value) == expected

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("workers", [0, 2])
    def test_are_loaded_by_workers_that_stay(self, training: bool, workers: int) -> None:
        loader = loader_of(8, Data(batch_size=4, workers=workers, resident=False), training=training)
        assert (loader.num_workers, loader.persistent_workers) == (workers, workers > 0)


def test_processes_without_a_core_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    with pytest.raises(UserError, match=r"device.devices is 4, but on the CPU these are processes and .* has 3 cores"):
        on_device(Device(accelerator="cpu", devices=4))
    assert on_device(Device(accelerator="cpu", devices=3), logger=False).num_devices == 3


@pytest.mark.parametrize("number", [1, 2])
def test_gpus_are_counted_among_those_that_are_visible(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """NNI makes some of the machine's visible, and CUDA numbers these from 0."""
    monkeypatch.setattr("lightning_fabric.accelerators.cuda.num_cuda_devices", lambda: 2)
    monkeypatch.setattr("pytorch_lightning.accelerators.cuda.num_cuda_devices", lambda: 2)
    trainer = on_device(Device(accelerator="gpu", devices=number), logger=False)
    assert trainer.device_ids == list(range(number))


def cheapest_and_dearest(operations: Sequence[int], resolution: int, num_classes: int) -> list[int]:
    """MACs of the network with one block a stage, the cheapest, and of that with four, the dearest."""

    def in_order(source: int, target: int, stride: int, size: int) -> list[int]:
        images = torch.empty(1, source, size, size)
        costs = {i: measure(OPERATIONS[i].build(source, target, stride), images).macs for i in operations}
        return sorted(operations, key=costs.__getitem__)

    low, high = [], []
    size, channels = -(-resolution // 2), STEM_CHANNELS
    with torch.device("meta"):
        for stage in STAGES:
            first = in_order(channels, stage.channels, stage.stride, size)
            size, channels = -(-size // stage.stride), stage.channels
            further = in_order(channels, channels, 1, size)
            low.append([first[0]])
            high.append([first[-1], *[further[-1]] * 3])
        networks = (build_child(CreamPath.of([[0], *s, [0]]), num_classes=num_classes) for s in (low, high))
        return [measure_network(network, resolution).macs for network in networks]


@pytest.mark.parametrize(
    ("options", "operations", "resolution"),
    [
        ({}, range(6), 32),
        ({"aligned": True, "skip": True}, range(6), 64),
        ({"dil_conv": True}, range(8), 32),
        ({"resunit": ("basic",)}, (*range(6), 9), 32),
        ({"dil_conv": True, "resunit": ("bottleneck", "basic"), "skip": True}, range(10), 48),
    ],
    ids=str,
)
def test_intervals_without_any_network_are_refused(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], operations: Sequence[int], resolution: int
) -> None:
    # Slow, and asked for the same every time.
    monkeypatch.setattr("search_spaces.cream.CreamSpace", functools.cache(CreamSpace))
    monkeypatch.setattr("nni_cream.search.measure_space", functools.cache(measure_space))
    low, high = (macs / 1e6 for macs in cheapest_and_dearest(operations, resolution, 7))
    plan = SpacePlan((2, 2, 2, 2, 2), resolution)  # whatever the depths

    def refusal(minimum: float, maximum: float) -> str:
        with pytest.raises(UserError) as caught:
            refuse_unreachable(Flops(min=minimum, max=maximum), plan, options, 7)
        return str(caught.value)

    for minimum, maximum in ((0, low), (high, high), (high, 1000), (low + 0.1, low + 0.2)):
        refuse_unreachable(Flops(min=minimum, max=maximum), plan, options, 7)
    assert refusal(0, low - 1e-6)
    assert refusal(high + 1e-6, 1000)
    assert refusal(0.01, 0.02) == (
        "No network costs 0.01 M to 0.02 M multiply-accumulates (flops.min to flops.max) at "
        f"{resolution} pixels: those of this space cost {low:.12g} M to {high:.12g} M."
    )


def test_an_interval_may_end_at_the_cost_of_a_path() -> None:
    costs = [33_554_283, *np.random.default_rng(0).integers(3_000_000, 600_000_000, 2000).tolist()]
    assert any(float(f"{cost / 1e6:.6f}") * 1e6 != cost for cost in costs)
    for cost in costs:
        told = float(f"{cost / 1e6:.6f}")
        assert flops_range(Flops(min=told, max=told)) == (cost, cost)


def test_further_operations_widen_the_interval() -> None:
    plain, further = (cheapest_and_dearest(range(number), 32, 10) for number in (6, 10))
    assert further[0] < plain[0] < plain[1] < further[1]


@pytest.mark.slow
def test_a_licence_is_named_where_the_data_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    load_splits(Data(name="elpv", resolution=32), seed=0)
    assert "CC-BY-NC-SA-4.0" in capsys.readouterr().out.replace(" ", "-")


def test_data_without_a_licence_of_its_own_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    load_splits(Data(name="digits", resolution=32), seed=0)
    assert capsys.readouterr().out == ""
