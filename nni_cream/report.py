"""The report of a run that has ended: one page for a person, and its pictures, made from the files of the run.

It is made at the end alone: a picture takes longer to draw than an epoch of a small search, and while a run goes on,
its curves are in TensorBoard and in NNI's web UI. Since all that it shows is in the run directory, a report that could
not be made is made by the same command later.
"""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from nni_cream import __version__
from nni_cream.architecture import CreamPath
from nni_cream.child import Child
from nni_cream.description import describe_path
from nni_cream.genotype import CELL_INPUTS, CELL_KINDS, CellKind, Genotype
from nni_cream.history import History
from nni_cream.latency import LatencyTable
from nni_cream.next_steps import Command, after_search, after_training
from nni_cream.page import Markup, element, facts, page, picture, section, table
from nni_cream.plots.alphas import MOST_NODES, draw_alphas
from nni_cream.plots.board import draw_board
from nni_cream.plots.cells import draw_cell
from nni_cream.plots.curves import draw_curves
from nni_cream.plots.pareto import Measured, draw_pareto, front_of
from nni_cream.plots.paths import draw_path
from nni_cream.plots.style import MACS, TIME, CostAxis, save_figure
from nni_cream.recipe import CreamRecipe, DartsRecipe, Recipe, RetrainRecipe
from nni_cream.recipe_files import changed_settings
from nni_cream.runs import RunDirectory, read_json, write_text

_MILLION: Final = 1_000_000
_CELLS: Final[dict[CellKind, str]] = {"normal": "normal cell", "reduce": "reduction cell"}


def leave_report(recipe: Recipe, directory: RunDirectory) -> None:
    """Write the report of a run that has ended, and its pictures, and say where it is.

    The run has ended by then: what goes wrong here is said on stderr in one line, and is no failure of the run.

    Args:
        recipe: of the run.
        directory: of the run, with its result.
    """
    try:
        write_report(recipe, directory)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        print(
            f"The run has ended well, but {directory.report} could not be made ({reason}); the same command tries "
            "again.",
            file=sys.stderr,
            flush=True,
        )
    else:
        _tell(directory)


def show_report(recipe: Recipe, directory: RunDirectory) -> None:
    """Say where the report of a run is that had ended before, and make it if it is not there."""
    if directory.report.exists():
        _tell(directory)
    else:
        leave_report(recipe, directory)


def _tell(directory: RunDirectory) -> None:
    print(f"report:    {directory.report.resolve()}", flush=True)


def write_report(recipe: Recipe, directory: RunDirectory) -> None:
    """Write ``report.html``, the pictures as SVG and PNG, and the pictures for TensorBoard.

    Args:
        recipe: of the run.
        directory: of the run, with its result.

    Raises:
        UserError: if a file of the run is missing or damaged.
    """
    run = _Run(recipe, directory)
    if isinstance(recipe, RetrainRecipe):
        title, parts = _training(run, recipe)
    elif isinstance(recipe, DartsRecipe):
        title, parts = _darts_search(run, recipe)
    else:
        assert isinstance(recipe, CreamRecipe)
        title, parts = _cream_search(run, recipe)
    _show_in_tensorboard(run)
    write_text(directory.report, page(title, *parts, _environment(run)))


class _Run:
    """The files of a run, and the pictures that have been drawn of it."""

    def __init__(self, recipe: Recipe, directory: RunDirectory) -> None:
        self.recipe = recipe
        self.directory = directory
        self.folder = folder = directory.path
        self.environment = read_json(folder / "environment.json", "description of a run")
        with (folder / "metrics.csv").open(newline="", encoding="utf-8") as lines:
            self.rows = list(csv.DictReader(lines))
        self.pictures: list[Path] = []

    def picture(self, figure: Figure, name: str, alternative: str, caption: str) -> Markup:
        """Write a picture, and return it for the page."""
        svg, png = save_figure(figure, self.folder, name)
        self.pictures.append(png)
        return picture(svg, alternative, caption)


@dataclass(frozen=True)
class _Budget:
    """What a Cream search was asked for.

    Attributes:
        interval: the least and the most cost.
        axis: how pictures show costs.
        text: the interval in words.
        sentence: the same behind "The search found a network of …, ".
        rows: what else is to be said of it.
    """

    interval: tuple[float, float]
    axis: CostAxis
    text: str
    sentence: str
    rows: tuple[tuple[str, str], ...] = ()


def _budget_of(run: _Run, recipe: CreamRecipe) -> _Budget:
    if recipe.latency.max is None:
        low, high = recipe.flops.min, recipe.flops.max
        return _Budget(
            (low * _MILLION, high * _MILLION),
            MACS,
            f"{_interval(low, high)} million multiply-accumulates for one image",
            f"between the {low:g} and {high:g} million that were asked for"
            if low
            else f"within the {high:g} million that were allowed",
        )
    low, high = recipe.latency.min, recipe.latency.max
    measured = LatencyTable.load(run.directory.latency)
    error, number = measured.validation.mean_error, len(measured.validation.networks)
    return _Budget(
        (low, high),
        TIME,
        f"{_interval(low, high)} ms, as predicted for a batch",
        f"predicted to take between the {low:g} and {high:g} ms for a batch that were asked for"
        if low
        else f"predicted to take no more than the {high:g} ms for a batch that were allowed",
        (
            ("Time of", str(measured.conditions)),
            ("Error of predictions", f"{_percent(error)}, the mean of {number} networks that were measured"),
        ),
    )


def _interval(low: float, high: float) -> str:
    return f"{low:g} to {high:g}" if low else f"at most {high:g}"


# The three kinds of run.


def _cream_search(run: _Run, recipe: CreamRecipe) -> tuple[str, list[Markup]]:
    child = Child.load(run.directory.child)
    history = History.load(run.directory.history)
    assert isinstance(child.architecture, CreamPath)
    budget = _budget_of(run, recipe)
    found = [child, *(child.ranked(rank) for rank in range(2, 2 + len(child.runners_up)))]
    measured = [Measured(path.accuracy, path.cost) for path in found]
    front = front_of(measured)
    times = [] if child.latency is None else ["Time (ms)"]
    lead = (
        f"The search found a network of {_millions(child.flops)} multiply-accumulates, {budget.sentence}. With the "
        f"weights of the supernet it answers {_percent(child.accuracy)} of {history.images:,} held-out images right; "
        "trained by itself it usually does better."
    )
    rows = [
        [
            str(rank),
            element("code", str(path.architecture)),
            f"{_percent(path.accuracy)} ± {_percent(_standard_error(path.accuracy, history.images))}",
            f"{path.flops / _MILLION:.3f}",
            f"{path.params / _MILLION:.3f}",
            *([] if path.latency is None else [f"{path.latency:.3f}"]),
            "no" if rank - 1 in front else "yes",
        ]
        for rank, path in enumerate(found, start=1)
    ]
    board = section(
        "The board",
        element(
            "p",
            f"The board keeps the best paths that the search has met, at most {recipe.cream.board_size}, and they "
            "teach the others. In the end each was measured with batch-norm statistics of its own, which gives the "
            "ranks.",
        ),
        table(
            ["Rank", "Path", "Accuracy", "MACs (M)", "Params (M)", *times, "Beaten"],
            rows,
            numbers=(0, 2, 3, 4, 5) if times else (0, 2, 3, 4),
        ),
        run.picture(
            draw_pareto(measured, budget.interval, history.images, budget.axis),
            "pareto",
            f"Accuracy against {budget.axis.words} of the {len(found)} paths in the table above.",
            "A path is beaten by another that is at least as good, costs no more, and is not the same in both. All "
            "were measured on the same images, so that two of them differ more surely than their bars suggest.",
        ),
        run.picture(
            draw_board(history.board, [str(path.architecture) for path in found], budget.interval, budget.axis),
            "board",
            f"Score of every path while it was on the board, by epoch, and below it the path's {budget.axis.words}.",
            "Scores after every epoch are measured with the statistics of a batch, and on other images than the ranks, "
            "so that their order may be another. Grey: paths that have left the board.",
        ),
    )
    parts = [
        element("p", lead, class_="lead"),
        _result(child),
        _path(run, child.architecture, child.data["resolution"]),
        board,
        _curves(
            run,
            "Held-out images: the best path on the board, or while it is empty the best of three at random. Training: "
            "the path of each step, before the step.",
        ),
        _searched(
            run,
            child,
            history,
            [
                ("Budget", budget.text),
                *budget.rows,
                ("Method", f"Cream, teacher: {recipe.cream.teacher}, board of {recipe.cream.board_size}"),
            ],
        ),
        _how_to_go_on(after_search(recipe, run.directory, len(child.runners_up))),
    ]
    return f"Cream search “{recipe.name}”", parts


def _darts_search(run: _Run, recipe: DartsRecipe) -> tuple[str, list[Markup]]:
    child = Child.load(run.directory.child)
    history = History.load(run.directory.history)
    genotype = child.architecture
    assert isinstance(genotype, Genotype)
    lead = (
        f"The search found the two cells below. The network that they make at the size of the search costs "
        f"{_millions(child.flops)} multiply-accumulates. With the weights of the supernet it answers "
        f"{_percent(child.accuracy)} of {history.images:,} held-out images right, and the supernet itself "
        f"{_percent(child.search['supernet_accuracy'])}; neither says much of how good the cells are once a network of "
        "them is trained by itself."
    )
    ended = child.search["ended_because"]
    warning = [element("p", f"The search was ended early: {ended}.")] if ended else []
    operations, limit = recipe.space.operations, ""
    if recipe.darts.skip_limit is not None:
        limit = f", with at most {recipe.darts.skip_limit} skip connections in the cell"
    maps = [
        run.picture(
            draw_alphas([np.asarray(after, np.float32) for after in history.alphas[kind]], operations, genotype, kind),
            f"alphas_{kind}",
            f"Mixing weight of every operation on every edge of the {_CELLS[kind]}, by epoch.",
            f"All edges of the {_CELLS[kind]}: a row of maps for a node, a column for where the edge comes from. A "
            f"node keeps the two edges whose strongest operation other than none weighs most{limit}.",
        )
        for kind in CELL_KINDS
        if genotype.nodes(kind) <= MOST_NODES
    ]
    omitted = element("p", "A cell has too many edges for a picture; history.json holds α after every epoch.")
    parts = [
        element("p", lead, class_="lead"),
        *warning,
        _result(child),
        _cells(run, genotype),
        section("α over time", *(maps or [omitted])),
        _curves(
            run,
            "Held-out images are seen by neither the weights nor α. The entropy is that of the mixing weights of an "
            f"edge: {math.log(len(operations)):.3f} where all {len(operations)} operations weigh the same, 0 where "
            "only one is left.",
        ),
        _searched(
            run,
            child,
            history,
            [
                (
                    "Supernet",
                    f"{recipe.space.cells} cells of {recipe.space.nodes} nodes, {recipe.space.channels} channels",
                ),
                ("Operations", ", ".join(operations)),
                ("Method", f"DARTS, {recipe.darts.order} order"),
            ],
        ),
        _how_to_go_on(after_search(recipe, run.directory)),
    ]
    return f"DARTS search “{recipe.name}”", parts


def _training(run: _Run, recipe: RetrainRecipe) -> tuple[str, list[Markup]]:
    result = read_json(run.folder / "result.json", "result of a training")
    network, data = result["network"], result["data"]
    lead = (
        f"The trained network answers {_percent(result['test_accuracy'])} of the test images right, which no search "
        f"and no training sees. It costs {_millions(result['flops'])} multiply-accumulates for an image."
    )
    numbers = [
        ("Test accuracy", _percent(result["test_accuracy"])),
        ("Test, among the first five", _percent(result["test_top5"])),
        ("Held-out accuracy", _percent(result["val_accuracy"])),
        ("Multiply-accumulates", _millions(result["flops"])),
        ("Parameters", _millions(result["params"])),
    ]
    if network.startswith("["):
        shown = _path(run, CreamPath.parse(network), data["resolution"])
    elif network.startswith("Genotype("):
        shown = _cells(run, Genotype.parse(network))
    else:
        shown = section(
            "The network", element("p", "The network of timm's that is called ", element("code", network), ".")
        )
    trained = [
        ("Data", _data(data)),
        ("Resolution", f"{data['resolution']} pixels"),
        ("Epochs", f"{recipe.epochs}"),
        ("Seed", f"{recipe.seed}"),
        ("Weights before", "those of the search" if recipe.inherit_weights else "random"),
    ]
    parts = [
        element("p", lead, class_="lead"),
        facts(numbers),
        _curves(run, "Held-out images are the same after every epoch; the test images are measured once, in the end."),
        shown,
        section("What was trained", table([], trained), *_changed(recipe)),
        _how_to_go_on(after_training(recipe, run.directory, network, data)),
    ]
    return f"Training “{recipe.name}”", parts


# Parts of a report.


def _result(child: Child) -> Markup:
    return facts(
        [
            ("Accuracy, shared weights", _percent(child.accuracy)),
            ("Multiply-accumulates", _millions(child.flops)),
            ("Parameters", _millions(child.params)),
            *([] if child.latency is None else [("Predicted time of a batch", f"{child.latency:.3f}\u00a0ms")]),
        ]
    )


def _path(run: _Run, path: CreamPath, resolution: int) -> Markup:
    rows = [
        [
            str(stage.number),
            str(stage.channels),
            f"{stage.size} × {stage.size}",
            "; ".join(block.words for block in stage.blocks),
        ]
        for stage in describe_path(path, resolution)
    ]
    return section(
        "The network",
        run.picture(
            draw_path(path, resolution),
            "path",
            "The blocks of the network, stage by stage; the table below says the same in words.",
            f"From an image of {resolution} × {resolution} pixels at the top to the classes at the bottom. Blocks in "
            "grey are the same in every path.",
        ),
        table(["Stage", "Channels", "Features", "Blocks"], rows, numbers=(1,)),
        element("p", "The path, as commands take it:"),
        element("pre", str(path)),
    )


def _cells(run: _Run, genotype: Genotype) -> Markup:
    parts = []
    for kind in CELL_KINDS:
        rows = [
            [str(node - CELL_INPUTS), *(f"{operation} of {_state(state)}" for operation, state in edges)]
            for node in range(CELL_INPUTS, CELL_INPUTS + genotype.nodes(kind))
            for edges in [genotype.edges_to(kind, node)]
        ]
        concatenated = ", ".join(str(state - CELL_INPUTS) for state in genotype.concat(kind))
        parts += [
            run.picture(
                draw_cell(genotype, kind),
                f"cell_{kind}",
                f"The {_CELLS[kind]} as a graph; the table below says the same in words.",
                f"The {_CELLS[kind]}. A node is the sum of its two edges. The cell's inputs are the outputs of the "
                f"cell before last and of the last cell, its output is nodes {concatenated}, concatenated.",
            ),
            table(["Node", "First edge", "Second edge"], rows),
        ]
    return section(
        "The cells", *parts, element("p", "The genotype, as commands take it:"), element("pre", str(genotype))
    )


def _state(state: int) -> str:
    return ("the cell before last", "the last cell")[state] if state < CELL_INPUTS else f"node {state - CELL_INPUTS}"


def _curves(run: _Run, caption: str) -> Markup:
    described = f"What was measured after each of {len(run.rows)} epochs; the numbers are in metrics.csv."
    return section("Curves", run.picture(draw_curves(run.rows), "curves", described, caption))


def _searched(run: _Run, child: Child, history: History, method: Sequence[tuple[str, str]]) -> Markup:
    done, planned = history.epochs, run.recipe.epochs
    rows = [
        ("Data", _data(child.data)),
        ("Classes", f"{child.num_classes}"),
        ("Resolution", f"{child.data['resolution']} pixels"),
        ("Held out", f"{history.images:,} images for the result above"),
        *method,
        ("Epochs", f"{done} of {planned}" if done < planned else f"{done}"),
        ("Seed", f"{run.recipe.seed}"),
    ]
    return section("What was searched", table([], rows), *_changed(run.recipe))


def _changed(recipe: Recipe) -> list[Markup]:
    rows = [
        [element("code", key), element("code", _shown(value)), element("code", _shown(default))]
        for key, (value, default) in changed_settings(recipe).items()
    ]
    if not rows:
        return [element("p", "All other settings are the defaults.")]
    return [
        element("p", "Settings that differ from the defaults; recipe.yml has all of them:"),
        table(["Setting", "In this run", "Default"], rows),
    ]


def _how_to_go_on(commands: Sequence[Command]) -> Markup:
    parts = [part for command in commands for part in (element("p", f"{command.what}:"), element("pre", command.text))]
    return section("How to go on", element("p", "In the folder of the project, with its environment active."), *parts)


def _environment(run: _Run) -> Markup:
    machine = run.environment["machine"]
    gpus = machine["cuda_visible_devices"]
    rows = [
        ("nni_cream", __version__),
        *run.environment["versions"].items(),
        ("system", machine["system"]),
        ("processor", f"{machine['processor']}, {machine['cores']} cores"),
        ("CUDA_VISIBLE_DEVICES", "not set" if gpus is None else repr(gpus)),
        ("folder", str(run.folder.resolve())),
    ]
    return section("Environment", table([], [(name, str(value)) for name, value in rows]))


def _show_in_tensorboard(run: _Run) -> None:
    # Here, because it takes a moment, and a run that is refused needs none.
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(run.folder / "tensorboard")) as writer:
        for png in run.pictures:
            with Image.open(png) as image:
                pixels = np.asarray(image.convert("RGB"))
            writer.add_image(f"report/{png.stem}", pixels, len(run.rows), dataformats="HWC")


# Numbers and values as text.


def _percent(share: float) -> str:
    return f"{100 * share:.2f}\u00a0%"


def _millions(number: int) -> str:
    return f"{number / _MILLION:.3f}\u00a0M"


def _standard_error(share: float, images: int) -> float:
    return math.sqrt(share * (1 - share) / images)


def _data(data: Mapping[str, Any]) -> str:
    return f"{data['name']} in {data['folder']}" if data["folder"] is not None else f"{data['name']}"


def _shown(value: Any) -> str:
    if isinstance(value, Path):
        return str(value)
    return json.dumps(value, ensure_ascii=False)
