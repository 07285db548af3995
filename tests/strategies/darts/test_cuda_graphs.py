"""Steps that are recorded and replayed are those that are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nni_cream.cuda_graphs import WARM_UP, Recorded, Recorder
from nni_cream.strategies.darts_module import DartsLightningModule
from tests.stand_in_graphs import StandIn
from tests.strategies.darts.searches import (
    LEARNING_RATE,
    Classifier,
    Search,
    Space,
    assert_equal,
    frozen,
    two_nodes,
)
from tests.strategies.running import SMALL_RUNS, assert_same

pytestmark = SMALL_RUNS
ON_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
EPOCHS, BATCHES = 3, 5
KINDS: dict[str, dict[str, Any]] = {
    "first order": {"order": "first"},
    "finite difference": {"hypergradient": "finite_difference"},
    "exact": {},
    "exact, warm-up": {"warmup_epochs": 1},
    "exact, own space": {"space": Space},
    "exact, textbook": {"execution": "textbook"},
    "exact, frozen weights": {"space": frozen},
    "exact, cost": {"flops_target": 1.0, "flops_weight": 0.1},
}


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """Let searches be recorded on a CPU."""
    stand_in = StandIn()
    start = DartsLightningModule.on_train_start

    def on_train_start(self: DartsLightningModule) -> None:
        start(self)
        self.record_steps(Recorder(stand_in))

    monkeypatch.setattr(DartsLightningModule, "on_train_start", on_train_start)
    return stand_in


@pytest.mark.parametrize("kind", KINDS)
def test_every_step_is_the_same(kind: str, run: Callable[..., Search], recording: StandIn) -> None:
    # The learning rate falls after every epoch.
    settings = {"space": two_nodes, "epochs": EPOCHS, **KINDS[kind]}
    replayed = Search(**settings).run()
    steps = EPOCHS * BATCHES
    assert recording.recordings == 2
    of_alpha = steps - BATCHES * settings.get("warmup_epochs", 0)
    assert recording.replays == steps + of_alpha - 2 * WARM_UP
    with pytest.MonkeyPatch.context() as undo:
        undo.setattr(DartsLightningModule, "record_steps", lambda *_: None)
        plain = Search(**settings).run()
    assert len(plain.steps) == len(replayed.steps) == steps
    for ours, theirs in zip(replayed.steps, plain.steps, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-12)
        assert_same(ours.space_after, theirs.space_after, rtol=1e-12, atol=1e-12)
        assert_same(ours.alphas_after, theirs.alphas_after, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(replayed.reports, plain.reports, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-12)


class OneCycle(Classifier):
    """Its schedule changes the momentum as well."""

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=EPOCHS * BATCHES + 1)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def test_numbers_of_the_optimizer_may_change(
    run: Callable[..., Search], recording: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recording goes on with the numbers of Python that it was made with, whatever they are now."""
    frozen: dict[int, list[Any]] = {}
    replayed = Recorded._replayed

    def with_frozen_numbers(self: Any, *inputs: Any) -> Any:
        groups = self._function.__self__._weight_optimizer().param_groups
        now = [dict(group) for group in groups]
        for group, then in zip(groups, frozen.setdefault(id(self), now), strict=True):
            group.update(then)
        outputs = replayed(self, *inputs)
        for group, numbers in zip(groups, now, strict=True):
            group.update(numbers)
        return outputs

    monkeypatch.setattr(Recorded, "_replayed", with_frozen_numbers)
    settings = {"space": two_nodes, "epochs": EPOCHS}
    ours = Search(**settings, classifier=OneCycle()).run()
    assert recording.replays > 0
    monkeypatch.setattr(DartsLightningModule, "record_steps", lambda *_: None)
    plain = Search(**settings, classifier=OneCycle()).run()
    assert_same(ours.alphas, plain.alphas, rtol=1e-12, atol=1e-12)


@ON_A_GPU
@pytest.mark.parametrize("kind", KINDS)
def test_every_step_is_the_same_on_a_gpu(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(graph), replay(graph)))
    settings = {"space": two_nodes, "epochs": EPOCHS, **KINDS[kind], "trainer": {"accelerator": "gpu"}}
    replayed, plain = (Search(**settings, cuda_graphs=graphs).run() for graphs in (True, False))
    of_alpha = EPOCHS - settings.get("warmup_epochs", 0)
    assert len(replays) == BATCHES * (EPOCHS + of_alpha) - 2 * WARM_UP
    on_cpu = Search(**{**settings, "trainer": {}}).run()
    for other in (plain, on_cpu):
        assert len(replayed.steps) == len(other.steps) == EPOCHS * BATCHES
        for ours, theirs in zip(replayed.steps, other.steps, strict=True):
            assert ours.loss == pytest.approx(theirs.loss, rel=1e-8)
            for a, b in ((ours.space_after, theirs.space_after), (ours.alphas_after, theirs.alphas_after)):
                assert_same(*({name: t.cpu() for name, t in state.items()} for state in (a, b)), rtol=1e-7, atol=1e-9)


class Transfers(TorchDispatchMode):
    """Notes what would wait for a GPU, or come from the host, while a step is recorded."""

    NAMES = ("_local_scalar_dense", "lift_fresh", "nonzero", "equal", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.NAMES:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_waits_for_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    transfers = Transfers()
    start = DartsLightningModule.on_train_start

    def record(function: Any, inputs: Any, pool: Any) -> Any:
        with transfers:
            found = function(*inputs)
        return (lambda: None), found

    def on_train_start(self: DartsLightningModule) -> None:
        start(self)
        self.record_steps(Recorder(record))

    monkeypatch.setattr(DartsLightningModule, "on_train_start", on_train_start)
    Search(**{"space": two_nodes, "epochs": 2, **KINDS[kind]}).run()
    assert transfers.found == []


def test_a_recording_is_given_back(recording: StandIn) -> None:
    search = Search(two_nodes, epochs=1).run()
    assert recording.recordings == 2
    assert search.module._recorded == {}


def test_not_on_a_cpu(monkeypatch: pytest.MonkeyPatch, run: Callable[..., Search]) -> None:
    asked = []
    monkeypatch.setattr(DartsLightningModule, "record_steps", lambda *_: asked.append(1))
    search = Search(two_nodes, epochs=1).run()
    assert asked == []
    assert_equal(search.alphas, Search(two_nodes, epochs=1, cuda_graphs=False).run().alphas)
