"""What a DARTS search reports of cells, and which genotype it ends with."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import Any

import nni.nas.nn.pytorch as nas
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from nni_cream.cost import measure_network
from nni_cream.genotype import CELL_KINDS, Genotype
from tests.strategies.darts.forcing import SetAlpha, genotype_of, preferring
from tests.strategies.darts.searches import HELD_OUT, SIZE, Search, cells, two_nodes
from tests.strategies.running import SMALL_RUNS

pytestmark = SMALL_RUNS


class TestCells:
    def test_reports(self, run: Callable[..., Search]) -> None:
        search = run(two_nodes, epochs=2, order="first", alpha_lr=1.0)
        assert len(search.reports) == 2
        for report in search.reports:
            alphas = search.alphas_after_epoch(report["epoch"])
            genotype = genotype_of(alphas)
            entropies = {}
            for kind in CELL_KINDS:
                weights = alphas[kind].softmax(1)
                entropies[kind] = -(weights * weights.log()).sum(1).mean().item()
                assert report[f"entropy_{kind}"] == pytest.approx(entropies[kind], rel=1e-5)
                assert report[f"skip_connections_{kind}"] == genotype.skip_connections(kind)
            assert report["entropy"] == pytest.approx(fmean(entropies.values()), rel=1e-5)
        seen = [report[f"entropy_{kind}"] for report in search.reports for kind in CELL_KINDS]
        assert len(set(seen)) == 4

    def test_every_edge_counts_the_same_in_the_entropy(self) -> None:
        class Mixed(nas.ModelSpace):
            """A cell with five edges, and one further choice."""

            def __init__(self) -> None:
                super().__init__()
                self.before = nas.LayerChoice([nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 3, padding=1)], label="before")
                self.space = two_nodes()

            def forward(self, images: Tensor) -> Tensor:
                return self.space(self.before(images))

            def extra_oneshot_hooks(self, strategy: Any) -> list[Any]:
                return self.space.extra_oneshot_hooks(strategy)

        search = Search(Mixed, epochs=1, order="first", alpha_lr=1.0).run()
        weights = [row.softmax(0) for table in search.alphas.values() for row in table.view(-1, table.shape[-1])]
        assert len(weights) == 5 + 5 + 1
        expected = fmean([-(w * w.log()).sum().item() for w in weights])
        assert search.reports[0]["entropy"] == pytest.approx(expected, rel=1e-5)

    def test_result_is_that_of_the_published_rule(self, run: Callable[..., Search]) -> None:
        search = run(two_nodes, epochs=2, order="first", alpha_lr=1.0)
        (final,) = search.final
        assert final["default"] == search.reports[-1]["val_accuracy"]
        assert Genotype.from_sample(final["architecture"]) == genotype_of(search.alphas)
        assert genotype_of(search.alphas) != genotype_of(search.steps[0].alphas)

    def test_skip_limit_holds_for_the_normal_cell_of_the_result(self) -> None:
        skips = {kind: preferring("skip_connect", 5) for kind in CELL_KINDS}
        search = Search(two_nodes, epochs=1, order="first", skip_limit=1, callbacks=[SetAlpha({1: skips})]).run()
        genotype = Genotype.from_sample(search.final[0]["architecture"])
        assert genotype == genotype_of(skips, normal_skip_limit=1)
        assert [genotype.skip_connections(kind) for kind in CELL_KINDS] == [1, 4]
        # What is reported, and what guards watch, is what there would be without the limit.
        assert [search.reports[0][f"skip_connections_{kind}"] for kind in CELL_KINDS] == [4, 4]

    def test_models(self, run: Callable[..., Search]) -> None:
        search = run(two_nodes, epochs=2, order="first", alpha_lr=1.0)
        (model,) = search.strategy.list_models()
        assert model.sample == search.final[0]["architecture"]
        images, _ = HELD_OUT.tensors
        network = two_nodes()
        network.load_state_dict(dict(zip(network.state_dict(), search.steps[-1].space_after.values(), strict=True)))
        assert torch.equal(model.executable_model().eval()(images), network.freeze(model.sample).eval()(images))

    def test_cost(self) -> None:
        """A low target, whose term outweighs everything else, makes the child cheaper."""

        def child(**settings: Any) -> int:
            # The most expensive operation is ahead at first.
            begin = preferring("sep_conv_3x3", 2, [0.5, 0.5])

            class Begin(pl.Callback):
                def on_train_start(self, trainer: Any, pl_module: Any) -> None:
                    for kind in CELL_KINDS:
                        pl_module.alphas[kind].data.copy_(begin)

            search = Search(cells, epochs=1, order="first", callbacks=[Begin()], **settings).run()
            return measure_network(cells().freeze(search.final[0]["architecture"]), SIZE).macs

        usual = child(alpha_lr=0.1)
        assert child(alpha_lr=0.1, flops_target=1.0, flops_weight=1.0) < usual
        assert child(alpha_lr=0.1, flops_target=1e9, flops_weight=1e9) == usual
