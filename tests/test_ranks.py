"""What the further processes of a run leave to the first."""

from __future__ import annotations

import sys
from pathlib import Path

import nni
import pytest

from nni_cream.cli import open_run, run, tuner_parameters
from nni_cream.errors import TrainingError, UserError
from nni_cream.ranks import is_first, rank
from nni_cream.recipe import CreamRecipe
from nni_cream.reporting import Reporter
from nni_cream.runs import RunDirectory

RECIPE = CreamRecipe.model_validate({"name": "a", "epochs": 30, "flops": {"min": 1, "max": 2}})


@pytest.fixture(autouse=True)
def _nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")


def test_a_process_by_itself_is_the_first() -> None:
    assert (rank(), is_first()) == (0, True)


@pytest.mark.parametrize(("name", "value", "expected"), [("LOCAL_RANK", "1", 1), ("RANK", "3", 3), ("RANK", "0", 0)])
def test_lightning_and_torchrun_tell(monkeypatch: pytest.MonkeyPatch, name: str, value: str, expected: int) -> None:
    monkeypatch.setenv(name, value)
    assert (rank(), is_first()) == (expected, expected == 0)


def test_the_rank_among_all_machines_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("RANK", "2")
    assert rank() == 2


@pytest.mark.usefixtures("second")
def test_nothing_is_written(tmp_path: Path) -> None:
    directory = open_run(RECIPE, tmp_path / "run")
    directory.begin("name: a\n", seed=0)
    assert not directory.path.exists()
    # As the first process has it by then.
    first = tmp_path / "other"
    first.mkdir()
    (first / "recipe.yml").write_text("name: b\n")
    RunDirectory(first).begin("name: a\n", seed=0)
    assert open_run(RECIPE, first).path == first


@pytest.mark.usefixtures("second")
def test_nothing_is_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    run(lambda: print("epoch 1"))
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("second")
def test_nni_is_not_talked_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NNI_PLATFORM", "local")
    monkeypatch.setattr("nni_cream.reporting.get_default_trial_command_channel", lambda: pytest.fail("talks to NNI"))
    reporter = Reporter(tmp_path, quiet=False)
    reporter.deliver()
    with pytest.raises(TrainingError):
        reporter.final({"default": float("nan")})
    reporter.final({"default": 0.5})
    assert not list(tmp_path.iterdir())


def test_what_the_tuner_has_chosen_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NNI_PLATFORM", "local")
    monkeypatch.setattr(nni, "get_next_parameter", lambda: {"optimizer.lr": 0.2, "data.name": "digits"})
    told = tuner_parameters()
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(nni, "get_next_parameter", lambda: pytest.fail("talks to NNI"))
    assert tuner_parameters() == told == {"optimizer.lr": 0.2, "data.name": "digits"}


@pytest.mark.usefixtures("second")
def test_torchrun_under_nni_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NNI_PLATFORM", "local")
    monkeypatch.delenv("NNI_CREAM_TOLD_BY_TUNER", raising=False)
    with pytest.raises(
        UserError, match=r"start their processes themselves, with device\.devices; leave torchrun out\."
    ):
        tuner_parameters()
