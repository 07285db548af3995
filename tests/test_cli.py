from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nni
import pytest
import torch

from nni_cream.cli import make_parser, overrides_of, run, tuner_parameters
from nni_cream.errors import TrainingError, UserError
from nni_cream.recipe import CreamRecipe
from nni_cream.recipe_files import load_recipe
from nni_cream.trouble import sentence_of

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "experiments" / "recipes" / "cream_mnist5k.yml"


@pytest.fixture(autouse=True)
def _without_nni(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("NNI_"):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _hooks_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command may replace them, since its process ends with it."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)


def tuner_sends(monkeypatch: pytest.MonkeyPatch, parameters: Any) -> None:
    monkeypatch.setenv("NNI_PLATFORM", "local")
    monkeypatch.setattr(nni, "get_next_parameter", lambda: parameters)


def overrides(*words: str) -> dict[str, Any]:
    return overrides_of(make_parser("A trial.", Path("recipe.yml")).parse_args(words))


class TestOptions:
    def test_defaults(self) -> None:
        arguments = make_parser("A trial.", Path("some/recipe.yml")).parse_args([])
        assert arguments.recipe == Path("some/recipe.yml")
        assert arguments.output is None
        assert overrides_of(arguments) == {}

    def test_set_may_be_repeated_and_the_last_counts(self) -> None:
        given = overrides("--set", "epochs=3", "--set", "optimizer.lr=0.2", "--set", "epochs=4")
        assert given == {"epochs": 4, "optimizer.lr": 0.2}

    def test_name_is_text_even_where_yaml_would_read_a_number(self) -> None:
        assert overrides("--name", "2024") == {"name": "2024"}
        assert overrides("--set", "name=2024") == {"name": 2024}

    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            (["--colour"], "On the command line: unrecognized arguments: --colour (--help lists the options)."),
            (["--set"], "On the command line: argument --set: expected one argument (--help lists the options)."),
            (["--out", "a"], "On the command line: unrecognized arguments: --out a (--help lists the options)."),
        ],
    )
    def test_that_are_none_are_refused_in_a_sentence(self, words: list[str], expected: str) -> None:
        with pytest.raises(UserError) as caught:
            overrides(*words)
        assert str(caught.value) == expected

    def test_help_is_the_first_line_of_the_docstring(self) -> None:
        text = make_parser("Do a thing.\n\nAt length.\n", Path("recipe.yml")).format_help()
        assert "Do a thing." in text
        assert "At length" not in text


class TestTuner:
    def test_without_nni_is_not_asked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail() -> None:
            raise AssertionError("asked")

        monkeypatch.setattr(nni, "get_next_parameter", fail)
        assert tuner_parameters() == {}

    def test_has_the_last_word(self, monkeypatch: pytest.MonkeyPatch) -> None:
        tuner_sends(monkeypatch, {"seed": 3, "optimizer.lr": 0.2})
        assert overrides("--set", "seed=1", "--set", "epochs=9") == {"seed": 3, "epochs": 9, "optimizer.lr": 0.2}

    def test_sets_the_recipe(self, monkeypatch: pytest.MonkeyPatch) -> None:
        tuner_sends(monkeypatch, {"data.batch_size": 32.0, "optimizer": {"name": "momentum", "lr": 0.3}})
        recipe = load_recipe(CreamRecipe, RECIPE, overrides())
        assert recipe.data.batch_size == 32
        assert (recipe.optimizer.name, recipe.optimizer.lr) == ("momentum", 0.3)

    @pytest.mark.parametrize(
        ("parameters", "expected"),
        [
            ({"learning_rate": 0.2}, "'learning_rate' is not a setting; did you mean"),
            ({"optimizer.lr": -1.0}, "'optimizer.lr' is -1.0, but should be greater than 0."),
            ({"cream.warmup_epochs": 30}, "cream.warmup_epochs is 30"),
        ],
    )
    def test_is_checked_as_the_command_line_is(
        self, monkeypatch: pytest.MonkeyPatch, parameters: dict[str, Any], expected: str
    ) -> None:
        tuner_sends(monkeypatch, parameters)
        with pytest.raises(UserError) as caught:
            load_recipe(CreamRecipe, RECIPE, overrides())
        assert expected in str(caught.value)

    @pytest.mark.parametrize("parameters", [None, 3, ["lr"]])
    def test_that_sends_no_mapping(self, monkeypatch: pytest.MonkeyPatch, parameters: Any) -> None:
        tuner_sends(monkeypatch, parameters)
        with pytest.raises(UserError, match="NNI's tuner sent") as caught:
            tuner_parameters()
        assert repr(parameters) in str(caught.value)


class Unreadable:
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> None:
        raise UserError("The image a.png cannot be read.")


class TestRun:
    def test_prints_what_the_user_did_wrong(self, capsys: pytest.CaptureFixture[str]) -> None:
        def main() -> None:
            raise UserError("There is no such thing.")

        with pytest.raises(SystemExit) as caught:
            run(main)
        assert caught.value.code == 2
        assert capsys.readouterr() == ("", "error: There is no such thing.\n")

    def test_prints_the_sentence_alone_also_from_a_worker(self, capsys: pytest.CaptureFixture[str]) -> None:
        from torch.utils.data import DataLoader

        with pytest.raises(SystemExit) as caught:
            run(lambda: next(iter(DataLoader(Unreadable(), num_workers=1))))  # type: ignore[arg-type]
        assert caught.value.code == 2
        assert capsys.readouterr() == ("", "error: The image a.png cannot be read.\n")

    def test_lets_our_own_faults_through(self) -> None:
        def main() -> None:
            raise KeyError("ours")

        with pytest.raises(KeyError, match="ours"):
            run(main)

    def test_returns_where_all_went_well(self) -> None:
        called = []
        run(lambda: called.append(True))
        assert called == [True]


def misspelt_key(_output: Path) -> list[str]:
    return ["--set", "optimizer.learning_rate=0.2"]


def missing_recipe(_output: Path) -> list[str]:
    return ["--recipe", "none.yml"]


def run_of_another_recipe(output: Path) -> list[str]:
    output.mkdir()
    (output / "recipe.yml").write_text("name: other\n", encoding="utf-8")
    return []


@pytest.mark.parametrize(
    ("arrange", "expected"),
    [
        (misspelt_key, "'optimizer.learning_rate' is not a setting; did you mean 'optimizer.lr'?"),
        (missing_recipe, "There is no recipe none.yml"),
        (run_of_another_recipe, "holds a run of another recipe"),
    ],
)
def test_a_wrong_command_line_ends_in_one_sentence_and_touches_nothing(
    tmp_path: Path, arrange: Callable[[Path], list[str]], expected: str
) -> None:
    output = tmp_path / "run"
    arguments = arrange(output)
    before = {path: path.read_bytes() if path.is_file() else None for path in tmp_path.rglob("*")}
    script = ROOT / "trials" / "search_cream.py"
    command = [sys.executable, str(script), "--recipe", str(RECIPE), "--output", str(output), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert expected in line
    assert {path: path.read_bytes() if path.is_file() else None for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    "program",
    [
        "raise KeyboardInterrupt",
        # As Lightning does.
        "try:\n        raise KeyboardInterrupt\n    except KeyboardInterrupt:\n        sys.exit(1)",
    ],
    ids=["plain", "Lightning"],
)
def test_an_interrupt_ends_the_process_as_a_signal(program: str) -> None:
    program = f"import sys\nfrom nni_cream.cli import run\ndef main():\n    {program}\nrun(main)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == -signal.SIGINT
    assert result.stderr == "Interrupted; the same command goes on from the last checkpoint.\n"


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device", "a/b"), MemoryError("too much"), torch.OutOfMemoryError("CUDA")],
    ids=lambda error: type(error).__name__,
)
def test_trouble_of_the_machine_is_a_sentence_and_no_success(
    capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        run(main)
    assert caught.value.code == 1
    assert capsys.readouterr().err == f"error: {sentence_of(error)}\n"


def test_a_failed_training_is_no_success(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise TrainingError("the loss is nan")

    with pytest.raises(SystemExit) as caught:
        run(main)
    assert caught.value.code == 1
    assert capsys.readouterr().err == "error: the loss is nan\n"


def test_the_processes_of_a_run_part_before_they_end(tmp_path: Path) -> None:
    """Threads of a group that is still there at the end of a process abort it now and then."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    run(lambda: None)
    assert not torch.distributed.is_initialized()
