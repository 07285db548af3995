from __future__ import annotations

import errno
import os
import runpy
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

from nni_cream.cli import (
    Parser,
    add_checkpoint_options,
    checkpoint_of,
    make_parser,
    overrides_of,
    refuse_unwritable,
    run,
    tuner_parameters,
)
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
        assert overrides("--set", "name=2024") == {"name": "2024"}

    def test_a_folder_is_taken_as_it_stands(self, tmp_path: Path) -> None:
        given = overrides("--set", "data.folder=photos #2", "--set", "seed=3 # a comment")
        assert given == {"data.folder": "photos #2", "seed": 3}
        assert overrides("--set", "data.name=null") == {"data.name": None}
        assert load_recipe(CreamRecipe, RECIPE, given).data.folder == Path("photos #2")

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


# As a search does in which NNI's logger and strategy meet the error first.
PRINTS = """
import logging, os, sys
from nni_cream.cli import run
logger = logging.getLogger("a")
logger.addHandler(logging.StreamHandler(sys.stdout))
def main():
    print("first", flush=True)
    input()
    try:
        print("second", flush=True)
    except OSError as error:
        logger.error("the model fails")
        raise RuntimeError("caught on the way") from error
    finally:
        open("reached", "x")
run(main)
"""


class TestUnreadOutput:
    @pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
    @pytest.mark.parametrize("with_errors", [False, True])
    def test_ends_a_command_quietly(self, tmp_path: Path, unbuffered: str, with_errors: bool) -> None:
        command = [sys.executable, "-c", PRINTS]
        pipe = subprocess.PIPE
        with subprocess.Popen(
            command,
            stdin=pipe,
            stdout=pipe,
            stderr=subprocess.STDOUT if with_errors else pipe,
            cwd=tmp_path,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered, "PYTHONPATH": str(ROOT)},
            text=True,
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stdout.readline() == "first\n"
            process.stdout.close()
            process.stdin.write("\n")
            process.stdin.close()
            assert with_errors or (process.stderr is not None and process.stderr.read() == "")
            assert process.wait(60) == 141
        assert (tmp_path / "reached").exists()

    def test_that_is_left_at_the_end_is_dropped(self) -> None:
        program = "from nni_cream.cli import run\ndef main():\n    input()\n    print('last')\nrun(main)"
        command = [sys.executable, "-c", program]
        pipe = subprocess.PIPE
        # Such as what --help prints: written at the very end.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment, text=True) as process:
            assert process.stdout is not None
            process.stdout.close()
            process.stdout = None
            _, err = process.communicate("\n", timeout=60)
        assert (process.returncode, err) == (0, "")

    def test_a_broken_pipe_of_another_kind_is_a_fault(self) -> None:
        def main() -> None:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

        with pytest.raises(BrokenPipeError):
            run(main)


@pytest.mark.parametrize("failing", [False, True])
def test_what_the_encoding_lacks_is_shown_as_an_escape(failing: bool) -> None:
    program = (
        "from nni_cream.cli import run\nfrom nni_cream.errors import UserError\ndef main():\n    print('3 × 3')\n"
        f"    if {failing}: raise UserError('no τ…')\nrun(main)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        check=False,
    )
    assert done.stdout == "3 \\xd7 3\n"
    assert done.stderr == ("error: no \\u03c4\\u2026\n" if failing else "")
    assert done.returncode == (2 if failing else 0)


class TestOutput:
    def test_that_can_be_written_leaves_nothing(self, tmp_path: Path) -> None:
        refuse_unwritable(tmp_path / "a" / "b.onnx")
        assert list(tmp_path.iterdir()) == []
        (tmp_path / "b.onnx").write_bytes(b"old")
        refuse_unwritable(tmp_path / "b.onnx")
        assert (tmp_path / "b.onnx").read_bytes() == b"old"

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("folder", "--output {place}/folder is a folder; give a file in it."),
            ("file/x.onnx", "--output {place}/file/x.onnx cannot be written: {place}/file is no folder that you may"),
            ("/proc/x/y.onnx", "--output /proc/x/y.onnx cannot be written: /proc is no folder that you may write to."),
            ("a" * 300, "cannot be written: "),
        ],
    )
    def test_that_cannot_be_written(self, tmp_path: Path, name: str, expected: str) -> None:
        (tmp_path / "folder").mkdir()
        (tmp_path / "file").touch()
        with pytest.raises(UserError) as caught:
            refuse_unwritable(tmp_path / name)
        assert expected.format(place=tmp_path) in str(caught.value)


class TestCheckpoint:
    def given(self, file: Path) -> Path:
        parser = Parser()
        add_checkpoint_options(parser)
        return checkpoint_of(parser.parse_args(["--checkpoint", str(file)]))

    def test_that_is_missing_is_left_to_whoever_reads_it(self, tmp_path: Path) -> None:
        assert self.given(tmp_path / "none.pth") == tmp_path / "none.pth"

    def test_that_is_a_folder(self, tmp_path: Path) -> None:
        def sentence() -> str:
            with pytest.raises(UserError) as caught:
                self.given(tmp_path)
            return str(caught.value)

        start = f"--checkpoint {tmp_path} is a folder; give "
        assert sentence() == f"{start}a file, such as the model.safetensors of a training."
        for name in ("child.json", "model.safetensors"):
            (tmp_path / name).touch()
            assert sentence() == f"{start}{tmp_path / name}."

    def test_that_may_not_be_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(file: Path, *_: object) -> None:
            raise PermissionError(errno.EACCES, "Permission denied", str(file))

        monkeypatch.setattr(Path, "open", refuse)
        with pytest.raises(UserError, match=r"^--checkpoint .*a\.pth cannot be read: Permission denied\.$"):
            self.given(tmp_path / "a.pth")

    def test_of_a_name_that_no_file_has(self) -> None:
        with pytest.raises(UserError, match="cannot be read: File name too long"):
            self.given(Path("a" * 300))


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


def test_only_what_goes_on_says_so_when_interrupted() -> None:
    program = "from nni_cream.cli import run\ndef main():\n    raise KeyboardInterrupt\nrun(main, goes_on=False)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stderr) == (-signal.SIGINT, "Interrupted.\n")


def test_what_keeps_no_checkpoints_does_not_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    said: dict[str, bool] = {}
    monkeypatch.setattr(sys, "path", list(sys.path))
    for script in sorted((ROOT / "trials").glob("*.py")):
        monkeypatch.setattr(
            "nni_cream.cli.run", lambda _main, *, goes_on=True, name=script.stem: said.update({name: goes_on})
        )
        runpy.run_path(str(script), run_name="__main__")
    assert said == {
        "compare": True,
        "export_child": False,
        "make_subimagenet": False,
        "measure_latency": False,
        "rank_correlation": True,
        "retrain_child": True,
        "search_cream": True,
        "search_darts": True,
        "test_child": False,
    }


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device", "a/b"), MemoryError("too much"), torch.OutOfMemoryError("CUDA")],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("goes_on", [True, False])
def test_trouble_of_the_machine_is_a_sentence_and_no_success(
    capsys: pytest.CaptureFixture[str], error: Exception, goes_on: bool
) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        run(main, goes_on=goes_on)
    assert caught.value.code == 1
    assert capsys.readouterr().err == f"error: {sentence_of(error, goes_on)}\n"


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
