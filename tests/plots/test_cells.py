from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import matplotlib.style
import numpy as np
import pytest
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from PIL import Image

from nni_cream.genotype import CELL_KINDS, PUBLISHED_GENOTYPES, CellKind, Genotype
from nni_cream.plots.cells import draw_cell, save_cells

OPERATIONS = ("none", "max_pool_3x3", "skip_connect", "sep_conv_3x3", "conv_7x1_1x7", "an_operation_with_a_long_name")
# Both edges from one input, the other input unused.
ONE_NODE = Genotype(
    normal=(("sep_conv_3x3", 0), ("skip_connect", 0)),
    normal_concat=(2,),
    reduce=(("none", 1), ("max_pool_3x3", 0)),
    reduce_concat=(2,),
)


def random_genotype(seed: int) -> Genotype:
    """One of 1 to 8 nodes; of those with an odd number each node of the reduction cell follows the one before it."""
    choose = random.Random(seed)
    nodes = range(2, 3 + seed % 8)
    normal, reduce = [], []
    for node in nodes:
        normal += [(choose.choice(OPERATIONS), choose.randrange(node)) for _ in range(2)]
        first = node - 1 if seed % 2 else choose.randrange(node)
        reduce += [(choose.choice(OPERATIONS), first), (choose.choice(OPERATIONS), choose.randrange(node))]
    return Genotype(
        tuple(normal), tuple(nodes), tuple(reduce), tuple(choose.sample(nodes, choose.randint(1, len(nodes))))
    )


GENOTYPES = {**PUBLISHED_GENOTYPES, "one node": ONE_NODE, **{f"random {s}": random_genotype(s) for s in range(16)}}
every_cell = pytest.mark.parametrize(
    ("genotype", "kind"),
    [pytest.param(genotype, kind, id=f"{name}-{kind}") for name, genotype in GENOTYPES.items() for kind in CELL_KINDS],
)


class Drawn:
    """The artists of a figure by their names, and where they are, in pixels."""

    def __init__(self, figure: Figure) -> None:
        self.figure = figure
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        self.renderer = canvas.get_renderer()
        self.artists = {str(artist.get_gid()): artist for artist in figure.get_children() if artist.get_gid()}

    def named(self, start: str) -> dict[str, Any]:
        return {name[len(start) :]: artist for name, artist in self.artists.items() if name.startswith(start)}

    def extent(self, artist: Artist) -> Bbox:
        return artist.get_window_extent(self.renderer)

    def boxes(self) -> dict[str, Bbox]:
        return {name: self.extent(box) for name, box in self.named("box-").items()}

    def points(self, name: str) -> np.ndarray[Any, Any]:
        """Many points along a line."""
        line: Any = self.artists[name]
        path = line.get_transform().transform_path(line.get_path())
        # Curves become chains of short lines first, and each of those 20 points.
        (chain,) = path.to_polygons(closed_only=False)
        steps = np.linspace(0, 1, 20)[:, None]
        return np.concatenate([(1 - steps) * a + steps * b for a, b in itertools.pairwise(chain)])

    def tip(self, name: str) -> np.ndarray[Any, Any]:
        head: Any = self.artists[name]
        corners = head.get_transform().transform(head.get_xy())
        return corners[corners[:, 0].argmax()]


def overlap(one: Bbox, other: Bbox) -> bool:
    return Bbox.intersection(one, other) is not None


def ends(genotype: Genotype, kind: CellKind) -> dict[str, tuple[str, str]]:
    """For every arrow that there should be, the names of the boxes where it begins and ends."""
    states = [f"state-{number}" for number in range(2 + genotype.nodes(kind))]
    arrows = {
        f"edge{node}-{position}": (states[state], states[node])
        for node in range(2, len(states))
        for position, (_, state) in enumerate(genotype.edges_to(kind, node))
    }
    return arrows | {f"concat-{states[state]}": (states[state], "state-output") for state in genotype.concat(kind)}


def texts(svg: Path) -> Counter[str]:
    found = ElementTree.parse(svg).iter("{http://www.w3.org/2000/svg}text")
    return Counter("".join(part.strip() for part in text.itertext()) for text in found)


@pytest.mark.parametrize("name", [*PUBLISHED_GENOTYPES, "one node", "random 6", "random 15"])
def test_svg_holds_every_name_and_number_as_text(name: str, tmp_path: Path) -> None:
    genotype = GENOTYPES[name]
    save_cells(genotype, tmp_path)
    for kind, title in (("normal", "Normal cell"), ("reduce", "Reduction cell")):
        expected = Counter(operation for operation, _ in genotype.edges(kind))
        expected.update(str(number) for number in range(genotype.nodes(kind)))
        expected.update([title, "ck−2", "ck−1", "ck"])
        assert texts(tmp_path / f"cell_{kind}.svg") == expected


def test_names_of_operations_stand_at_their_edges() -> None:
    drawn = Drawn(draw_cell(PUBLISHED_GENOTYPES["nasnet"], "reduce"))
    labels = {name: text.get_text() for name, text in drawn.named("text-").items()}
    assert labels["edge5-0"] == "skip_connect"
    assert labels["edge5-1"] == "avg_pool_3x3"
    assert labels["edge2-0"] == "sep_conv_5x5"
    assert labels["edge2-1"] == "sep_conv_7x7"
    assert (labels["state-0"], labels["state-1"], labels["state-output"]) == ("$c_{k{-}2}$", "$c_{k{-}1}$", "$c_{k}$")
    assert (labels["state-2"], labels["state-6"], labels["title"]) == ("0", "4", "Reduction cell")


@every_cell
def test_nothing_overlaps_and_all_is_inside(genotype: Genotype, kind: CellKind) -> None:
    drawn = Drawn(draw_cell(genotype, kind))
    boxes = drawn.boxes()
    assert len(boxes) == 3 + 3 * genotype.nodes(kind)
    solid = {**boxes, "title": drawn.extent(drawn.artists["text-title"])}
    for (one, first), (other, second) in itertools.combinations(solid.items(), 2):
        assert not overlap(first, second), (one, other)
    whole = drawn.figure.bbox
    for name, artist in drawn.artists.items():
        extent = drawn.extent(artist)
        assert whole.containsx(extent.x0), name
        assert whole.containsx(extent.x1), name
        assert whole.containsy(extent.y0), name
        assert whole.containsy(extent.y1), name
    for name, box in boxes.items():
        text = drawn.extent(drawn.artists[f"text-{name}"])
        # At least 4 pixels, of 100 an inch, on the left and on the right for a font that is a little wider.
        assert box.x0 + 4 < text.x0 < text.x1 < box.x1 - 4, name
        assert box.y0 < text.y0 < text.y1 < box.y1, name


@every_cell
def test_arrows_join_their_boxes_through_their_name_and_touch_no_other(genotype: Genotype, kind: CellKind) -> None:
    drawn = Drawn(draw_cell(genotype, kind))
    boxes = drawn.boxes()
    arrows = ends(genotype, kind)
    assert set(drawn.named("line-")) == set(drawn.named("head-")) == set(arrows)
    tips = []
    for name, (start, end) in arrows.items():
        points, tip = drawn.points(f"line-{name}"), drawn.tip(f"head-{name}")
        assert points[0][0] == pytest.approx(boxes[start].x1)
        assert boxes[start].y0 < points[0][1] < boxes[start].y1
        assert tip[0] == pytest.approx(boxes[end].x0)
        assert boxes[end].y0 < tip[1] < boxes[end].y1
        # Level from the end of the line to the tip, forward all the way.
        assert points[-1][1] == pytest.approx(tip[1])
        assert points[-1][0] < tip[0]
        assert (np.diff(points[:, 0]) > -1e-6).all()
        touched = {
            other
            for other, box in boxes.items()
            if ((points > box.min + 0.01) & (points < box.max - 0.01)).all(axis=1).any()
        }
        assert touched == ({name} if name.startswith("edge") else set())
        tips.append(tuple(tip))
    # Arrows that end at one box can be told apart: 10 pixels of 100 an inch.
    for (x, y), (other_x, other_y) in itertools.combinations(tips, 2):
        assert abs(x - other_x) > 1 or abs(y - other_y) > 10


@every_cell
def test_long_ways_are_level_and_curves_not_steep(genotype: Genotype, kind: CellKind) -> None:
    drawn = Drawn(draw_cell(genotype, kind))
    for name, line in drawn.named("line-").items():
        path = line.get_path()
        levels = [y for (_, y), code in zip(path.vertices, path.codes, strict=True) if code == path.LINETO]
        # Of an inch.
        assert np.ptp(levels or [0]) < 0.1
        steps = np.diff(drawn.points(f"line-{name}"), axis=0)
        assert (np.abs(steps[:, 1]) <= 5 * steps[:, 0] + 1e-6).all()


def test_an_input_that_nothing_uses_stays_near() -> None:
    boxes = Drawn(draw_cell(ONE_NODE, "normal")).boxes()
    assert 0 < boxes["state-0"].y0 - boxes["state-1"].y1 < 20


def test_two_edges_between_the_same_states_are_two_arrows() -> None:
    genotype = PUBLISHED_GENOTYPES["nasnet"]
    assert genotype.edges_to("normal", 5) == (("avg_pool_3x3", 0), ("avg_pool_3x3", 0))
    drawn = Drawn(draw_cell(genotype, "normal"))
    one, other = drawn.points("line-edge5-0"), drawn.points("line-edge5-1")
    distances = np.linalg.norm(one[:, None] - other[None], axis=-1)
    assert distances.min() > 5


def test_states_stand_to_the_right_of_what_they_are_made_of() -> None:
    genotype = PUBLISHED_GENOTYPES["amoebanet"]
    boxes = Drawn(draw_cell(genotype, "normal")).boxes()
    for start, end in ends(genotype, "normal").values():
        assert boxes[start].x1 < boxes[end].x0
    assert boxes["state-0"].x0 == boxes["state-1"].x0
    assert boxes["state-0"].y0 > boxes["state-1"].y1
    assert max(boxes, key=lambda name: boxes[name].x1) == "state-output"


def test_published_cells_have_few_crossings() -> None:
    """What 2,000 random starts find, and not only 40, is no better."""
    counted = {}
    for name, kind in itertools.product(PUBLISHED_GENOTYPES, CELL_KINDS):
        drawn = Drawn(draw_cell(PUBLISHED_GENOTYPES[name], kind))
        lines = [drawn.artists[f"line-{arrow}"] for arrow in ends(PUBLISHED_GENOTYPES[name], kind)]
        paths: list[Any] = [line.get_path() for line in lines]  # type: ignore[attr-defined]
        counted[name, kind] = sum(
            one.intersects_path(other, filled=False) for one, other in itertools.combinations(paths, 2)
        )
    assert counted == {
        ("nasnet", "normal"): 1,
        ("nasnet", "reduce"): 3,
        ("amoebanet", "normal"): 1,
        ("amoebanet", "reduce"): 4,
        ("darts_v1", "normal"): 3,
        ("darts_v1", "reduce"): 2,
        ("darts_v2", "normal"): 3,
        ("darts_v2", "reduce"): 1,
    }


def test_families_of_operations_have_colours_and_dashes() -> None:
    drawn = Drawn(draw_cell(PUBLISHED_GENOTYPES["amoebanet"], "normal"))
    looks: dict[str, set[tuple[str, str]]] = {}
    for name, line in drawn.named("line-").items():
        label = drawn.artists.get(f"text-{name}")
        operation: str = label.get_text() if label else "concat"  # type: ignore[attr-defined]
        head: Any = drawn.artists[f"head-{name}"]
        assert to_hex(head.get_facecolor()) == to_hex(line.get_edgecolor())
        looks.setdefault(operation, set()).add((to_hex(line.get_edgecolor()), str(line.get_linestyle())))
    assert all(len(look) == 1 for look in looks.values())
    assert looks["sep_conv_3x3"] == looks["sep_conv_5x5"]
    assert looks["avg_pool_3x3"] == looks["max_pool_3x3"]
    (conv,), (pool,), (skip,) = looks["sep_conv_3x3"], looks["avg_pool_3x3"], looks["skip_connect"]
    (concat,) = looks["concat"]
    colours = [colour for colour, _ in (conv, pool, skip, concat)]
    # Okabe and Ito's blue, vermilion and bluish green.
    assert colours[:3] == ["#0072b2", "#d55e00", "#009e73"]
    assert colours[3] not in colours[:3]
    assert len({dashes for _, dashes in (conv, pool, skip)}) == 3


def test_files_are_all_there_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "yet"
    files = save_cells(ONE_NODE, folder)
    assert files == [folder / f"cell_{kind}.{suffix}" for kind in ("normal", "reduce") for suffix in ("svg", "png")]
    assert sorted(folder.iterdir()) == sorted(files)


@pytest.mark.parametrize("name", [*PUBLISHED_GENOTYPES, "one node"])
def test_png_is_a_picture_of_the_size_of_the_figure(name: str, tmp_path: Path) -> None:
    save_cells(GENOTYPES[name], tmp_path)
    for kind in CELL_KINDS:
        with Image.open(tmp_path / f"cell_{kind}.png") as picture:
            assert picture.format == "PNG"
            pixels = np.asarray(picture.convert("RGB"))
        width, height = draw_cell(GENOTYPES[name], kind).get_size_inches()
        assert pixels.shape[1] == pytest.approx(150 * width, abs=1)
        assert pixels.shape[0] == pytest.approx(150 * height, abs=1)
        assert 600 < pixels.shape[1] < 1600
        assert 200 < pixels.shape[0] < 800
        assert (pixels[0] == 255).all()
        assert 0.02 < (pixels != 255).any(axis=2).mean() < 0.5


def test_same_bytes_for_the_same_genotype_in_another_process_and_without_pyplot(tmp_path: Path) -> None:
    genotype = PUBLISHED_GENOTYPES["nasnet"]
    program = (
        "import hashlib, json, sys, pathlib\n"
        "from nni_cream.genotype import Genotype\n"
        "from nni_cream.plots.cells import save_cells\n"
        "files = save_cells(Genotype.parse(sys.argv[1]), pathlib.Path(sys.argv[2]))\n"
        "hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]\n"
        "print(json.dumps([hashes, 'matplotlib.pyplot' in sys.modules]))\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "MPLBACKEND": "svg"}
    command = [sys.executable, "-c", program, str(genotype), str(tmp_path / "there")]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=120).stdout
    hashes, pyplot = json.loads(output)
    assert hashes == [hashlib.sha256(file.read_bytes()).hexdigest() for file in save_cells(genotype, tmp_path / "here")]
    assert len(set(hashes)) == 4
    assert not pyplot


def test_settings_of_matplotlib_are_neither_heeded_nor_changed(tmp_path: Path) -> None:
    plain = [file.read_bytes() for file in save_cells(ONE_NODE, tmp_path)]
    odd = {
        "savefig.bbox": "tight",
        "savefig.dpi": 30,
        "font.size": 30,
        "lines.dashed_pattern": [1, 1],
        "font.weight": 900,
    }
    with matplotlib.style.context(["dark_background", odd]), matplotlib.rc_context({"path.sketch": (9, 99, 9)}):
        before = dict(matplotlib.rcParams)
        assert [file.read_bytes() for file in save_cells(ONE_NODE, tmp_path)] == plain
        assert dict(matplotlib.rcParams) == before


def test_svg_tells_neither_time_nor_folder(tmp_path: Path) -> None:
    files = save_cells(ONE_NODE, tmp_path)
    svg = files[0].read_text(encoding="utf-8")
    assert "<dc:date>" not in svg
    assert str(tmp_path) not in svg


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = save_cells(ONE_NODE, tmp_path)
    old = files[0].read_bytes()

    def fail(_self: Figure, file: Path, **_options: Any) -> None:
        file.write_bytes(b"part")
        raise OSError("No space left on device")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="No space left"):
        save_cells(PUBLISHED_GENOTYPES["nasnet"], tmp_path)
    assert files[0].read_bytes() == old
    assert sorted(tmp_path.iterdir()) == sorted(files)
