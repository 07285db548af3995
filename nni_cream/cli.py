"""What the command lines in ``trials/`` share."""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import select
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

from nni_cream import interruption
from nni_cream.errors import TrainingError, UserError
from nni_cream.imports import import_file
from nni_cream.ranks import is_first
from nni_cream.recipe import CreamRecipe, DartsRecipe, EvaluationRecipe, Recipe, RetrainRecipe
from nni_cream.recipe_files import parse_override, text_keys, to_yaml
from nni_cream.runs import RunDirectory, newest_training
from nni_cream.trouble import is_broken_pipe, sentence_of

# The exit code of a command whose output nobody reads: 128 and the number of SIGPIPE.
_UNREAD = 141
# What NNI's tuner has chosen, for the further processes of a trial.
_TOLD = "NNI_CREAM_TOLD_BY_TUNER"


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are sentences like all others, and which takes no option by its beginning."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(allow_abbrev=False, **arguments)

    def error(self, message: str) -> NoReturn:
        """Refuse the command line.

        Raises:
            UserError: always.
        """
        raise UserError(f"On the command line: {message} (--help lists the options).")


def add_import(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` the option of the commands that build networks; the file is imported as soon as it is met."""
    parser.add_argument(
        "--import",
        dest="imported",
        type=import_file,
        metavar="FILE",
        action="append",
        default=[],
        help="run this Python file first, such as one that registers operations of yours; may be repeated",
    )


def make_settings_parser(description: str | None, recipe: Path | None) -> argparse.ArgumentParser:
    """Return a parser with the options that every command has; without a ``recipe`` the command chooses one itself."""
    parser = Parser(description=(description or "").partition("\n")[0])
    parser.add_argument(
        "--recipe", type=Path, default=recipe, help=f"settings, a YAML file (default: {recipe or 'by the child'})"
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="change one setting, such as data.batch_size=32; may be repeated",
    )
    add_import(parser)
    return parser


def make_parser(description: str | None, recipe: Path | None) -> argparse.ArgumentParser:
    """Return a parser with the options that every trial has: a command that makes a run directory."""
    parser = make_settings_parser(description, recipe)
    parser.add_argument("--name", help="name of the run, instead of the recipe's")
    parser.add_argument("--output", type=Path, help="run directory (default: $NNI_OUTPUT_DIR, else runs/<name>)")
    return parser


def add_checkpoint_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which checkpoint is read, and how."""
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="model.safetensors of a training, child.json of a search, or a checkpoint of another program (default: "
        "the newest training below runs/)",
    )
    parser.add_argument("--model", help="timm's name of the network, for a checkpoint that does not say it")
    parser.add_argument(
        "--weights",
        choices=("ema", "plain"),
        default="ema",
        help="which weights to take from a checkpoint that has averaged (EMA) and plain ones (default: %(default)s)",
    )


def checkpoint_of(arguments: argparse.Namespace) -> Path:
    """Return the checkpoint that the command line names, or that of the newest training.

    Raises:
        UserError: if there is neither, or it is a folder or may not be read; whoever reads it says if it is missing.
    """
    file: Path | None = arguments.checkpoint or newest_training()
    if file is None:
        raise UserError(
            "No training has ended yet (there is no model.safetensors below runs/): run trials/retrain_child.py first, "
            "or give a --checkpoint."
        )
    try:
        if file.is_dir():
            held = [file / name for name in ("model.safetensors", "child.json") if (file / name).is_file()]
            advice = f"give {held[0]}" if held else "give a file, such as the model.safetensors of a training"
            raise UserError(f"--checkpoint {file} is a folder; {advice}.")
        with file.open("rb"):
            pass
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(f"--checkpoint {file} cannot be read: {error.strerror}.") from None
    return file


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that ``--set`` changes."""
    texts: dict[str, bool] = {}
    # What takes text in one kind of recipe takes it in all that have it, but not all take None.
    for kind in (CreamRecipe, DartsRecipe, RetrainRecipe, EvaluationRecipe):
        for key, optional in text_keys(kind).items():
            texts[key] = optional or texts.get(key, False)
    return dict(parse_override(text, texts) for text in arguments.overrides)


def overrides_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that the command line, and NNI's tuner after it, change."""
    overrides = settings_of(arguments)
    if arguments.name is not None:
        overrides["name"] = arguments.name
    return {**overrides, **tuner_parameters()}


def refuse_nni(what: str) -> None:
    """Make sure that this is no trial of NNI's, which reports one training.

    Raises:
        UserError: if it is; ``what`` trains several.
    """
    if "NNI_PLATFORM" in os.environ:
        raise UserError(
            f"{what} trains several times, and a trial of NNI reports one training: let the search space give each "
            "trial its seed (seed: {_type: choice, _value: [0, 1, 2]})."
        )


def refuse_twice(option: str, values: Sequence[object]) -> None:
    """Make sure that an option names nothing twice.

    Raises:
        UserError: if it does.
    """
    for value in values:
        if values.count(value) > 1:
            raise UserError(f"{option} names {value} twice; name it once.")


def refuse_unwritable(file: Path) -> None:
    """Make sure that a file can be written as the ``--output`` of a command; nothing is left behind.

    Raises:
        UserError: if it is a folder, or cannot be written where it would be.
    """
    try:
        is_folder = file.is_dir()
        nearest = next(folder for folder in file.absolute().parents if folder.exists())
    # A name that is too long, or that has a zero byte.
    except (OSError, ValueError) as error:
        raise UserError(f"--output {file} cannot be written: {error}.") from None
    if is_folder:
        raise UserError(f"--output {file} is a folder; give a file in it.")
    try:
        # Whoever may write to all files may write to none in /proc, so that trying is the only way to know.
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError:
        raise UserError(f"--output {file} cannot be written: {nearest} is no folder that you may write to.") from None


def open_run(recipe: Recipe, output: Path | None) -> RunDirectory:
    """Choose the folder of a run, and make sure that it is free for it; write nothing.

    Raises:
        UserError: if it holds a run of another recipe, or another process runs in it.
    """
    directory = RunDirectory.for_run(recipe.name, output)
    if not is_first():
        # The first process has seen to it.
        return directory
    directory.refuse_another(to_yaml(recipe))
    if directory.owner() is not None:
        from nni_cream.reporting import await_owner

        await_owner(directory)
    return directory


def tuner_parameters() -> dict[str, Any]:
    """Return the settings that NNI's tuner chose for this trial; none where there is no NNI.

    It has to be called before a strategy runs, because NNI's sequential engine replaces the channel to the manager.

    Raises:
        UserError: if they are not a mapping of keys.
    """
    if "NNI_PLATFORM" not in os.environ:
        return {}
    if not is_first():
        # The manager tells a trial once. Lightning starts further processes in the environment of the first.
        if _TOLD not in os.environ:
            raise UserError("NNI's trials start their processes themselves, with device.devices; leave torchrun out.")
        told: dict[str, Any] = json.loads(os.environ[_TOLD])
        return told
    import nni

    parameters = nni.get_next_parameter()
    if not isinstance(parameters, dict):
        raise UserError(f"NNI's tuner sent {parameters!r} where a mapping of recipe keys was expected.")
    os.environ[_TOLD] = json.dumps(parameters)
    return parameters


def run(main: Callable[[], None], *, goes_on: bool = True) -> None:
    """Call ``main`` and exit.

    With one sentence on stderr, and 2 if the user asked for something that cannot be, 1 if the training has failed or
    the machine has run out of something; when interrupted, by the signal itself, from which NNI and shells know that
    nothing has failed. When nobody reads the output any more (``| head``), quietly and with 141, as shells tell of
    programs that SIGPIPE ends. Of the several processes of a run only the first prints, with an escape in place of what
    the encoding of the terminal lacks.

    Args:
        main: the command.
        goes_on: whether the same command goes on where it was interrupted; if not, it begins anew.

    Raises:
        SystemExit: with these codes.
    """
    for stream in (sys.stdout, sys.stderr):
        # Not every stand-in for them has an encoding.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if not is_first():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    # NNI's logger writes to stdout, and would show a traceback for every line of which nobody reads it.
    told, logging.raiseExceptions = logging.raiseExceptions, False
    undo = interruption.install()
    threading.excepthook = _leave_trouble_to_the_main_thread
    try:
        main()
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except UserError as error:
        # A DataLoader worker wraps its error in a traceback, the sentence coming last.
        sentence = str(error).rpartition(f"{UserError.__module__}.{UserError.__qualname__}: ")[2].strip()
        print(f"error: {sentence}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        unread = is_broken_pipe(error) and any(map(_is_unread, (sys.stdout, sys.stderr)))
        trouble = sentence_of(error, goes_on)
        if trouble is None and not unread:
            raise
        # What was half built complains once more when it is collected, as torch's data loader does.
        sys.unraisablehook = lambda _: None
        if unread:
            sys.exit(_UNREAD)
        print(f"error: {trouble}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        _end_by(interruption.received() or signal.SIGINT, goes_on)
    except SystemExit as error:
        # Lightning turns an interrupt into an exit.
        number = interruption.received()
        if number is not None or isinstance(error.__context__, KeyboardInterrupt):
            _end_by(number or signal.SIGINT, goes_on)
        raise
    finally:
        undo()
        logging.raiseExceptions = told
        _leave_the_others()
        _drop_what_is_unread()


def _is_unread(stream: TextIO) -> bool:
    """Tell whether ``stream`` goes into a pipe whose other end is closed."""
    try:
        number = stream.fileno()
    # It has none, such as one in memory.
    except OSError:
        return False
    poll = select.poll()
    poll.register(number, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _drop_what_is_unread() -> None:
    # The interpreter would complain of what it cannot write at its end.
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def _leave_the_others() -> None:
    # gloo's threads, alive when the interpreter ends, would now and then abort the process.
    group = sys.modules.get("torch.distributed")
    if group is not None and group.is_available() and group.is_initialized():
        group.destroy_process_group()


def _leave_trouble_to_the_main_thread(ended: threading.ExceptHookArgs) -> None:
    # TensorBoard writes in a thread, and raises what ended that in the main thread again.
    if ended.exc_value is None or sentence_of(ended.exc_value) is None:
        threading.__excepthook__(ended)


def _end_by(number: int, goes_on: bool) -> None:
    if is_first():
        advice = "; the same command goes on from the last checkpoint" if goes_on else ""
        print(f"Interrupted{advice}.", file=sys.stderr, flush=True)
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
