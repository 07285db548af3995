from __future__ import annotations

import csv
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from nni.nas.space import RawFormatModelSpace
from safetensors.torch import load_file
from torch import Tensor, nn

from nni_cream import search_darts as module_under_test
from nni_cream.child import Child, build_network
from nni_cream.cost import measure_network
from nni_cream.data import DataSplits, Fractions, load_data
from nni_cream.errors import UserError
from nni_cream.evaluate import evaluate, load_checkpoint
from nni_cream.genotype import Genotype
from nni_cream.history import History
from nni_cream.plots.cells import save_cells
from nni_cream.recipe import DartsRecipe, EvaluationRecipe
from nni_cream.recipe_files import to_yaml
from nni_cream.reporting import Reporter
from nni_cream.runs import RunDirectory
from nni_cream.search_darts import search_darts
from nni_cream.strategies.darts import DartsStrategy
from nni_cream.strategies.darts_module import DartsLightningModule
from tests.trainers import LIGHTNINGS_WARNINGS

# 144 images for the weights, so that an epoch is six steps; 719 for α, of which an epoch takes as many; 575 to report.
RECIPE: dict[str, Any] = {
    "name": "tiny",
    "seed": 4,
    "epochs": 2,
    "data": {
        "name": "digits",
        "resolution": 12,
        "batch_size": 24,
        "architecture_fraction": 0.5,
        "validation_fraction": 0.4,
    },
    "space": {
        "channels": 2,
        "cells": 3,
        "nodes": 2,
        "operations": ["none", "max_pool_3x3", "skip_connect", "sep_conv_3x3", "dil_conv_3x3"],
    },
    "optimizer": {"name": "momentum", "lr": 0.1, "weight_decay": 3e-4, "filter_bias_and_bn": False},
    "schedule": {"name": "cosine", "min_lr": 0.01},
    "darts": {"alpha_lr": 0.3},
    "device": {"accelerator": "cpu"},
}
STEPS = 6

pytestmark = LIGHTNINGS_WARNINGS


def recipe_with(**changes: Any) -> DartsRecipe:
    return DartsRecipe.model_validate({**RECIPE, **changes})


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def all_of(part: Any) -> tuple[Tensor, Tensor]:
    items = [part[i] for i in range(len(part))]
    return torch.stack([image for image, _ in items]), torch.tensor([label for _, label in items])


@dataclass
class Notes:
    """What a search was made of."""

    strategies: list[Any] = field(default_factory=list)
    settings: list[dict[str, Any]] = field(default_factory=list)
    evaluators: list[Any] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    reports: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class RateRecorder(pl.Callback):
    """Writes down the learning rate of the weights at every step, and after the last."""

    notes: Notes

    def _note(self, trainer: pl.Trainer) -> None:
        (weights,) = (o for o in trainer.optimizers if not getattr(o, "is_arch_optimizer", False))
        assert isinstance(weights, torch.optim.SGD)
        (rate,) = {group["lr"] for group in weights.param_groups}
        self.notes.rates.append(rate)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._note(trainer)

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._note(trainer)


def take_notes(patch: pytest.MonkeyPatch) -> Notes:
    notes = Notes()

    class Watched(DartsStrategy):
        def __init__(self, **settings: Any) -> None:
            notes.settings.append(settings)
            notes.strategies.append(self)
            super().__init__(**settings)

        def initialize(self, model_space: RawFormatModelSpace, engine: Any) -> Any:
            notes.evaluators.append(model_space.evaluator)
            return super().initialize(model_space, engine)

    make_trainer = module_under_test.make_trainer

    def watched_trainer(*args: Any, **kwargs: Any) -> Any:
        trainer = make_trainer(*args, **kwargs)
        trainer.callbacks.append(RateRecorder(notes))
        return trainer

    patch.setattr(module_under_test, "DartsStrategy", Watched)
    patch.setattr(module_under_test, "make_trainer", watched_trainer)
    patch.setattr(Reporter, "final", lambda _, metrics: notes.reports.append(metrics))
    return notes


@dataclass
class Search:
    folder: Path
    child: Child
    notes: Notes


def search(folder: Path, **changes: Any) -> Search:
    with pytest.MonkeyPatch.context() as patch:
        notes = take_notes(patch)
        return Search(folder, search_darts(recipe_with(**changes), RunDirectory(folder)), notes)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Search:
    return search(tmp_path_factory.mktemp("search"))


@pytest.fixture(scope="module")
def splits() -> DataSplits:
    return load_data("digits", resolution=12, seed=4, fractions=Fractions(validation=0.4, architecture=0.5))


class TestWhatASearchLeaves:
    def test_files(self, found: Search) -> None:
        names = {path.name for path in found.folder.iterdir()}
        drawn = ("cell_normal", "cell_reduce", "alphas_normal", "alphas_reduce", "curves")
        pictures = {f"{name}.{suffix}" for name in drawn for suffix in ("svg", "png")}
        wanted = {
            ".lock",
            "child.json",
            "child.safetensors",
            "history.json",
            "report.html",
            "metrics.csv",
            "recipe.yml",
            "environment.json",
            "checkpoints",
        }
        assert names == wanted | pictures | {"tensorboard"}
        assert (found.folder / "recipe.yml").read_text() == to_yaml(recipe_with())
        assert Child.load(found.folder / "child.json") == found.child

    def test_pictures_are_those_of_the_genotype(self, found: Search, tmp_path: Path) -> None:
        assert isinstance(found.child.architecture, Genotype)
        for file in save_cells(found.child.architecture, tmp_path):
            assert (found.folder / file.name).read_bytes() == file.read_bytes()

    def test_history_of_alpha(self, found: Search, splits: DataSplits) -> None:
        history = History.load(found.folder / "history.json")
        assert history.images == len(splits.validation)
        assert list(history.alphas) == ["normal", "reduce"]
        module = found.notes.strategies[0].oneshot_module
        for name, tables in history.alphas.items():
            assert len(tables) == 2
            assert torch.equal(torch.tensor(tables[-1]), module.alphas[name].detach())
            assert not torch.equal(torch.tensor(tables[0]), torch.tensor(tables[-1]))

    def test_metrics_of_every_epoch(self, found: Search) -> None:
        table = rows(found.folder)
        assert [int(row["epoch"]) for row in table] == [1, 2]
        for row in table:
            assert 0 < float(row["entropy"]) < math.log(5)
            # Two nodes have five edges in each kind of cell.
            mean = (float(row["entropy_normal"]) + float(row["entropy_reduce"])) / 2
            assert float(row["entropy"]) == pytest.approx(mean, rel=1e-6)
        module = found.notes.strategies[0].oneshot_module
        for name in ("normal", "reduce"):
            weights = module.alphas[name].detach().double().softmax(-1)
            entropy = -(weights * weights.log()).sum(-1).mean().item()
            assert float(table[-1][f"entropy_{name}"]) == pytest.approx(entropy, rel=1e-5)
            skips = found.child.architecture.skip_connections(name)  # type: ignore[union-attr]
            assert int(table[-1][f"skip_connections_{name}"]) == skips
        assert float(table[-1]["entropy"]) < float(table[0]["entropy"])

    def test_the_child_is_what_alpha_says(self, found: Search) -> None:
        """The rule of the paper, for each node: two edges of the strongest operations other than none."""
        operations = RECIPE["space"]["operations"]
        alphas = found.notes.strategies[0].oneshot_module.alphas
        for kind in ("normal", "reduce"):
            weights = alphas[kind].detach().softmax(-1)[:, 1:]
            best = weights.max(-1)
            edges = found.child.architecture.edges(kind)  # type: ignore[union-attr]
            for node, first, count in ((0, 0, 2), (1, 2, 3)):
                order = sorted(range(count), key=lambda state: -best.values[first + state])[:2]
                wanted = {(operations[1 + best.indices[first + state]], state) for state in order}
                assert set(edges[2 * node : 2 * node + 2]) == wanted

    def test_cost_is_that_of_the_network_of_the_search(self, found: Search) -> None:
        network = build_network(str(found.child.architecture), 10, {"kind": "search", **RECIPE["space"]})
        cost = measure_network(network, 12)
        assert (found.child.flops, found.child.params) == (cost.macs, cost.params)
        weights = load_file(found.folder / "child.safetensors")
        learned = sum(t.numel() for name, t in weights.items() if "running" not in name and "num_b" not in name)
        assert learned == cost.params

    @torch.no_grad()
    def test_accuracy_is_that_of_the_saved_network(self, splits: DataSplits, tmp_path: Path) -> None:
        # Longer than the other one, after whose twelve steps rounding decides whether anything has been learnt.
        gentle = {"darts": {"alpha_lr": 0.1, "order": "first"}, "optimizer": {**RECIPE["optimizer"], "lr": 0.05}}
        found = search(tmp_path / "longer", epochs=6, **gentle)
        network = load_checkpoint(found.folder / "child.json").network.eval()
        images, labels = all_of(splits.validation)
        correct = int((network(images).argmax(-1) == labels).sum())
        assert len(labels) == 575
        # A tie that another layout in memory decides otherwise is one image.
        assert found.child.accuracy * 575 == pytest.approx(correct, abs=1.01)
        assert 575 * 0.12 < correct < 575  # better than chance: there is something to compare

    @torch.no_grad()
    def test_batch_norms_have_statistics_of_the_child_itself(self, found: Search, splits: DataSplits) -> None:
        """The mean that the first norm was calibrated to is near the mean over the training images."""
        network = load_checkpoint(found.folder / "child.json").network.train()
        assert {int(t) for name, t in network.state_dict().items() if "num_batches" in name} == {STEPS}
        norm = network.stem[1]
        images, _ = all_of(splits.weights)
        mean = network.stem[0](images).mean((0, 2, 3))
        assert torch.allclose(norm.running_mean, mean, atol=0.1 * norm.running_var.sqrt().max().item())

    def test_weights_are_those_of_the_supernet(self, found: Search) -> None:
        module = found.notes.strategies[0].oneshot_module
        frozen = module.model.freeze(module.export())
        state = load_file(found.folder / "child.safetensors")
        for name, parameter in frozen.named_parameters():
            assert torch.equal(state[name], parameter), name

    def test_the_test_of_a_child(self, found: Search, splits: DataSplits) -> None:
        result = evaluate(
            EvaluationRecipe.model_validate({"device": {"accelerator": "cpu"}}), found.folder / "child.json"
        )
        assert (result.images, result.network) == (len(splits.test), str(found.child.architecture))
        assert (result.flops, result.params) == (found.child.flops, found.child.params)
        network = load_checkpoint(found.folder / "child.safetensors").network.eval()
        images, labels = all_of(splits.test)
        with torch.no_grad():
            order = network(images).argsort(dim=-1, descending=True)
        top = [(order[:, :k] == labels[:, None]).any(-1).double().mean().item() for k in (1, 5)]
        assert (result.top1, result.top5) == pytest.approx(tuple(top), abs=1.01 / len(labels))

    def test_report_and_notes(self, found: Search) -> None:
        child = found.child
        assert child.search == {
            "name": "tiny",
            "seed": 4,
            "epochs": 2,
            "supernet_accuracy": float(rows(found.folder)[-1]["val_accuracy"]),
            "ended_because": None,
        }
        assert child.space == {**RECIPE["space"], "concat": None}
        assert child.data == recipe_with().data.model_dump(mode="json")
        assert found.notes.reports == [
            {
                "default": child.search["supernet_accuracy"],
                "accuracy": child.accuracy,
                "flops": child.flops,
                "params": child.params,
                "genotype": str(child.architecture),
            }
        ]

    def test_the_same_again_searches_nothing_and_shows_it(
        self, found: Search, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise AssertionError("searched")

        monkeypatch.setattr(module_under_test, "DartsStrategy", fail)
        before = (found.folder / "child.json").stat().st_mtime_ns
        assert search_darts(recipe_with(), RunDirectory(found.folder)) == found.child
        assert (found.folder / "child.json").stat().st_mtime_ns == before
        first, *others = capsys.readouterr().out.splitlines()
        assert "holds a search that has ended" in first
        assert others == [
            f"genotype:  {found.child.architecture}",
            f"FLOPs:     {found.child.flops / 1e6:.2f} M multiply-accumulates",
            f"params:    {found.child.params / 1e6:.3f} M",
            f"accuracy:  {found.child.accuracy:.4f} with shared weights, on held-out images",
            f"folder:    {found.folder}",
            f"report:    {found.folder / 'report.html'}",
        ]


def _source(loader: Any) -> Any:
    return getattr(loader.dataset, "source", loader.dataset)


class TestWhatASearchIsGiven:
    def test_every_part_of_the_data_has_one_use(self, found: Search, splits: DataSplits) -> None:
        (evaluator,), (settings,) = found.notes.evaluators, found.notes.settings
        loaders = (evaluator.train_dataloaders, evaluator.val_dataloaders, settings["reporting_dataloader"])
        parts = (splits.weights, splits.architecture, splits.validation)
        for loader, part in zip(loaders, parts, strict=True):
            assert _source(loader).indices.tolist() == part.indices.tolist()
        used = [set(_source(loader).indices.tolist()) for loader in loaders] + [set(splits.test.indices.tolist())]
        assert sum(map(len, used)) == len(set.union(*used)) == 1797
        # α learns from images that vary, as in the published code; what is reported does not.
        transforms = [str(_source(loader).transform) for loader in loaders]
        varied, still = str(splits.weights.transform), str(splits.validation.transform)
        assert varied != still
        assert transforms == [varied, varied, still]
        assert [len(loader) for loader in loaders] == [STEPS, 719 // 24, 24]

    def test_every_setting_reaches_the_strategy_and_megaflops_become_flops(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Every setting is another than its default."""
        darts = {
            "order": "first",
            "hypergradient": "finite_difference",
            "radius": 0.02,
            "warmup_epochs": 1,
            "alpha_lr": 0.01,
            "alpha_betas": (0.4, 0.99),
            "alpha_weight_decay": 0.002,
            "gradient_clip": None,
            "label_smoothing": 0.1,
            "stop_above_skips": 2,
            "skip_limit": 1,
            "eigenvalue": "track",
            "flops_target": 2.5,
            "flops_weight": 3.0,
            "execution": "textbook",
            "cuda_graphs": False,
        }
        taken = {}

        def refuse(**settings: Any) -> None:
            taken.update(settings)
            raise UserError("No.")

        monkeypatch.setattr(module_under_test, "DartsStrategy", refuse)
        with pytest.raises(UserError, match="No"):
            search_darts(recipe_with(darts=darts), RunDirectory(tmp_path / "run"))
        del taken["reporting_dataloader"]
        assert taken == {**darts, "flops_target": 2_500_000}
        defaults = recipe_with(darts={}).darts.model_dump()
        assert darts.keys() == defaults.keys()
        assert all(darts[name] != value for name, value in defaults.items())
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"optimizer": {"name": "sdg"}, "darts": {"order": "first"}}, "timm has no optimizer 'sdg'"),
            ({"data": {**RECIPE["data"], "batch_size": 145}}, "data.batch_size is 145, but there are 144 images"),
            ({"space": {"operations": ["none", "conv"]}}, "conv"),
            ({"space": {"operations": ["none"]}}, "at least one operation other than none"),
            ({"data": {**RECIPE["data"], "name": "folder"}}, "folder"),
        ],
        ids=str,
    )
    def test_a_start_that_fails_claims_no_folder(self, tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
        with pytest.raises(UserError, match=expected):
            search_darts(recipe_with(**changes), RunDirectory(tmp_path / "run"))
        assert not (tmp_path / "run").exists()


class TestLearningRate:
    def test_of_every_step(self, found: Search) -> None:
        total = 2 * STEPS
        wanted = [0.01 + 0.045 * (1 + math.cos(math.pi * t / total)) for t in range(total + 1)]
        assert found.notes.rates == pytest.approx(wanted, abs=1e-12)

    @pytest.mark.slow
    @pytest.mark.parametrize("schedule", ["cosine", "exponential"])
    def test_of_every_epoch(self, tmp_path: Path, schedule: str) -> None:
        settings: dict[str, Any] = {"name": schedule, "interval": "epoch"}
        if schedule == "cosine":
            settings["min_lr"] = 0.001
        made = search(
            tmp_path,
            epochs=3,
            schedule=settings,
            darts={"order": "first"},
            optimizer={**RECIPE["optimizer"], "lr": 0.025},
        )
        weights = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.025)
        published = {
            "cosine": torch.optim.lr_scheduler.CosineAnnealingLR(weights, 3, eta_min=0.001),
            "exponential": torch.optim.lr_scheduler.ExponentialLR(weights, 0.97),
        }[schedule]
        # The constructor of each sets the rate of the first epoch.
        wanted = []
        for _ in range(3):
            wanted += [published.get_last_lr()[0]] * STEPS
            weights.step()
            published.step()
        assert made.notes.rates[:-1] == pytest.approx(wanted, abs=1e-12)
        assert made.notes.rates[-1] == pytest.approx(published.get_last_lr()[0], abs=1e-12)


class TestInterruption:
    def test_a_search_goes_on_where_it_was(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        changes: dict[str, Any] = {"epochs": 3, "darts": {"order": "first"}}
        step = DartsLightningModule.training_step

        def fail_in_the_second_epoch(self: Any, *args: Any) -> Any:
            if self.trainer.current_epoch == 1:
                raise RuntimeError("killed")
            return step(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(DartsLightningModule, "training_step", fail_in_the_second_epoch)
            with pytest.raises(RuntimeError, match="killed"):
                search(tmp_path, **changes)
        first = rows(tmp_path)
        assert [row["epoch"] for row in first] == ["1"]
        assert not (tmp_path / "child.json").exists()
        saved = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
        assert saved["epoch"] == 0
        (remembered,) = saved["darts"]["epochs"]

        again = search(tmp_path, **changes)
        table = rows(tmp_path)
        assert [row["epoch"] for row in table] == ["1", "2", "3"]
        assert table[0] == first[0]
        module = again.notes.strategies[0].oneshot_module
        assert [epoch.val_accuracy for epoch in module.epochs] == [float(row["val_accuracy"]) for row in table]
        for before, after in zip(remembered["alphas"], module.epochs[0].alphas, strict=True):
            assert torch.equal(before, after)
        # The rates are those of the two epochs that were left.
        wanted = [0.01 + 0.045 * (1 + math.cos(math.pi * t / (3 * STEPS))) for t in range(STEPS, 3 * STEPS + 1)]
        assert again.notes.rates == pytest.approx(wanted, abs=1e-12)
        assert Child.load(tmp_path / "child.json") == again.child

    @pytest.mark.slow
    def test_a_search_interrupted_after_its_last_epoch_still_ends(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save = Child.save

        def fail(self: Child, file: Path, network: nn.Module) -> None:
            save(self, tmp_path / "whole" / file.name, network)
            raise RuntimeError("killed")

        with monkeypatch.context() as patch:
            patch.setattr(Child, "save", fail)
            with pytest.raises(RuntimeError, match="killed"):
                search(tmp_path, darts={"order": "first"})
        before = rows(tmp_path)
        again = search(tmp_path, darts={"order": "first"})
        assert rows(tmp_path) == before
        assert len(before) == 2
        assert again.child.search["supernet_accuracy"] == float(before[-1]["val_accuracy"])
        for name in ("child.json", "child.safetensors"):
            assert (tmp_path / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_child_comes_after_the_history_and_the_report_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child counts as the end of a search; a report may fail."""
    order: list[str] = []
    monkeypatch.setattr(History, "save", lambda *_: order.append("history"))
    monkeypatch.setattr(Child, "save", lambda *_: order.append("child"))
    monkeypatch.setattr(module_under_test, "leave_report", lambda *_: order.append("report"))
    made = search(tmp_path, epochs=1, darts={"order": "first"})
    assert order == ["history", "child", "report"]
    assert len(made.notes.reports) == 1


def test_a_search_that_collapses_ends_early_and_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # No other operation, so that every cell is nothing but skip connections.
    space = {**RECIPE["space"], "operations": ["none", "skip_connect"]}
    made = search(tmp_path, epochs=4, space=space, darts={"order": "first", "stop_above_skips": 3})
    why = "the normal cell keeps 4 skip connections, more than 3; the result is that of epoch 1"
    assert made.child.search["ended_because"] == why
    assert f"The search was ended: {why}." in capsys.readouterr().out.splitlines()
    assert [row["epoch"] for row in rows(tmp_path)] == ["1"]
    assert made.child.search["epochs"] == 4
    # The epoch that it went back to is not counted twice.
    history = History.load(tmp_path / "history.json")
    assert {name: len(tables) for name, tables in history.alphas.items()} == {"normal": 1, "reduce": 1}
    assert "The search was ended early: the normal cell keeps" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_the_same_seed_finds_the_same(found: Search, tmp_path: Path) -> None:
    again = search(tmp_path)
    assert again.child == found.child
    first, second = (load_file(folder / "child.safetensors") for folder in (found.folder, tmp_path))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
