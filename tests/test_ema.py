from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from nni_cream.settings import Ema, Schedule
from nni_cream.soundness import Soundness
from tests.trainers import LIGHTNINGS_WARNINGS
from tests.training.fitting import STEPS, fit, small_network

pytestmark = LIGHTNINGS_WARNINGS

State = dict[str, Tensor]


class Steps(pl.Callback):
    """Writes down weights and running statistics after every step, and their average when the next one begins."""

    def __init__(self) -> None:
        self.weights: list[State] = []
        self.averages: list[State] = []

    def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
        self.averages.append(copied(module.ema.module))

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.weights.append(copied(module.model))

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self.averages.append(copied(module.ema.module))


def copied(network: nn.Module) -> State:
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def run(tmp_path: Path, ema: Ema, *further: pl.Callback, network: nn.Module | None = None) -> Steps:
    steps = Steps()
    fit(tmp_path, Schedule(), network=network, further=[*further, steps], ema=ema.timm_arguments())
    return steps


@pytest.mark.parametrize(
    ("ema", "decay"),
    [
        (Ema(decay=0.7, warmup=False), lambda before: 0.7),
        # 1 - 2^(-2/3), 1 - 3^(-2/3), … up to 0.7: five steps have been taken before the first with the whole.
        (Ema(decay=0.7, warmup=True), lambda before: min(0.7, 1 - (1 + before) ** (-2 / 3))),
    ],
    ids=["at once", "warmed up"],
)
def test_they_follow_the_recursion(tmp_path: Path, ema: Ema, decay: Any) -> None:
    steps = run(tmp_path, ema)
    assert len(steps.weights) == 2 * STEPS
    # The first step is what the average begins with.
    expected = {name: tensor.double() for name, tensor in steps.weights[0].items()}
    for before, (weights, average) in enumerate(zip(steps.weights, steps.averages[1:], strict=True)):
        if before:
            kept = decay(before)
            expected = {name: kept * expected[name] + (1 - kept) * weights[name].double() for name in weights}
        for name, tensor in average.items():
            if tensor.is_floating_point():
                assert torch.allclose(tensor.double(), expected[name], rtol=1e-4, atol=1e-6), (before, name)
            else:
                assert torch.equal(tensor, weights[name]), name
    moved = (expected["0.weight"] - steps.weights[-1]["0.weight"]).abs().max()
    assert moved > 1e-3


class Spoilt(nn.Module):
    """A network whose answers in one training step are no numbers."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.body = small_network()
        self.step = step
        self.steps = 0

    def forward(self, images: Tensor) -> Any:
        logits = self.body(images)
        if self.training:
            self.steps += 1
            if self.steps == self.step:
                return logits * float("nan")
        return logits


def test_a_step_that_is_left_out_does_not_count(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    steps = run(tmp_path, Ema(decay=0.7, warmup=False), Soundness(1), network=Spoilt(4))
    assert "it is left out, 1 of at most 1" in capfd.readouterr().err
    same = [
        all(torch.equal(after[name], before[name]) for name in before)
        for before, after in zip(steps.averages, steps.averages[1:], strict=False)
    ]
    assert [number for number, unchanged in enumerate(same, start=1) if unchanged] == [4]


def test_without_a_decay_nothing_is_averaged(tmp_path: Path) -> None:
    assert Ema().timm_arguments() is None
    run = fit(tmp_path, Schedule(), epochs=1, ema=None)
    assert run.module.ema is None
    assert not any("ema" in name or "plain" in name for name in [*run.module.state_dict(), *run.reports[0]])
