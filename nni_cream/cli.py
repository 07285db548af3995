"""What the command lines in ``trials/`` share."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from nni_cream import interruption
from nni_cream.errors import TrainingError, UserError
from nni_cream.imports import import_file
from nni_cream.ranks import is_first
from nni_cream.recipe import Recipe
from nni_cream.recipe_files import parse_override, to_yaml
from nni_cream.runs import RunDirectory, newest_training
from nni_cream.trouble import sentence_of

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
        UserError: if there is neither.
    """
    file: Path | None = arguments.checkpoint or newest_training()
    if file is None:
        raise UserError(
            "No training has ended yet (there is no model.safetensors below runs/): run trials/retrain_child.py first, "
            "or give a --checkpoint."
        )
    return file


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that ``--set`` changes."""
    return dict(parse_override(text) for text in arguments.overrides)


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


def run(main: Callable[[], None]) -> None:
    """Call ``main`` and exit.

    With one sentence on stderr, and 2 if the user asked for something that cannot be, 1 if the training has failed or
    the machine has run out of something; when interrupted, by the signal itself, from which NNI and shells know that
    nothing has failed. Of the several processes of a run only the first prints.
    """
    if not is_first():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
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
        trouble = sentence_of(error)
        if trouble is None:
            raise
        # What was half built complains once more when it is collected, as torch's data loader does.
        sys.unraisablehook = lambda _: None
        print(f"error: {trouble}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        _end_by(interruption.received() or signal.SIGINT)
    except SystemExit as error:
        # Lightning turns an interrupt into an exit.
        number = interruption.received()
        if number is not None or isinstance(error.__context__, KeyboardInterrupt):
            _end_by(number or signal.SIGINT)
        raise
    finally:
        undo()
        _leave_the_others()


def _leave_the_others() -> None:
    # gloo's threads, alive when the interpreter ends, would now and then abort the process.
    group = sys.modules.get("torch.distributed")
    if group is not None and group.is_available() and group.is_initialized():
        group.destroy_process_group()


def _leave_trouble_to_the_main_thread(ended: threading.ExceptHookArgs) -> None:
    # TensorBoard writes in a thread, and raises what ended that in the main thread again.
    if ended.exc_value is None or sentence_of(ended.exc_value) is None:
        threading.__excepthook__(ended)


def _end_by(number: int) -> None:
    if is_first():
        print("Interrupted; the same command goes on from the last checkpoint.", file=sys.stderr, flush=True)
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
