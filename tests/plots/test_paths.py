from __future__ import annotations

import itertools
from typing import Any

import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from nni_cream.architecture import CreamPath
from nni_cream.models.cream import PUBLISHED
from nni_cream.plots.paths import draw_path
from tests.plots.reading import assert_readable, texts_of
from tests.plots.test_cells import Drawn, overlap

EVERY_OPERATION = CreamPath.parse("[0] [0, 1] [2, 3] [4, 5, 6] [7, 8, 9] [3] [0]")
PATHS = {
    "shallow": CreamPath.parse("[0] [0] [3] [4] [2] [3] [0]"),
    "every operation": EVERY_OPERATION,
    **{name: network.path for name, network in PUBLISHED.items()},
}
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


def named_texts(figure: Figure) -> dict[str, str]:
    return {str(text.get_gid()): text.get_text() for text in texts_of(figure) if text.get_gid()}


@every_path
def test_a_row_for_every_stage_and_a_box_for_every_block(path: CreamPath) -> None:
    texts = named_texts(draw_path(path, 224))
    for row, stage in enumerate(path.stages, start=1):
        boxes = [name for name in texts if name.startswith(f"text-{row}-")]
        assert len(boxes) == len(stage)
    assert texts["row-0"] == "stem · 16 channels · 112×112"
    assert texts["row-6"] == "stage 5 · 192 channels · 7×7"
    assert texts["row-8"] == "head · 1,280 features"


def test_boxes_say_what_the_path_says() -> None:
    texts = named_texts(draw_path(EVERY_OPERATION, 32))
    shown = [texts[f"text-{row}-{place}"] for row, place in ((2, 0), (2, 1), (3, 1), (4, 2), (5, 0), (5, 1), (5, 2))]
    assert shown == ["3×3, ×4", "3×3, ×6", "5×5, ×6", "3×3 dilated", "5×5 dilated", "bottleneck", "basic"]
    assert texts["row-4"] == "stage 3 · 80 channels · 2×2"


def test_larger_kernels_are_darker_and_wider_expansions_taller() -> None:
    drawn = Drawn(draw_path(EVERY_OPERATION, 32))
    boxes: dict[str, Any] = drawn.named("box-")
    kernels = [boxes[name] for name in ("2-0", "3-0", "4-0")]
    light = [sum(to_rgb(box.get_facecolor())) for box in kernels]
    assert light == sorted(light, reverse=True)
    assert len(set(light)) == 3
    heights = {name: round(box.get_height(), 3) for name, box in boxes.items()}
    assert heights["2-1"] == heights["3-1"] == heights["4-1"] > heights["2-0"] == heights["3-0"] == heights["4-0"]


@every_path
def test_it_can_be_read(path: CreamPath) -> None:
    figure = draw_path(path, 224)
    assert_readable(figure)
    drawn = Drawn(figure)
    boxes = drawn.boxes()
    for one, other in itertools.combinations(boxes.values(), 2):
        assert not overlap(one, other)
    for name, box in boxes.items():
        text = drawn.extent(drawn.artists[f"text-{name}"])
        assert box.x0 + 2 < text.x0 < text.x1 < box.x1 - 2, name
        assert box.y0 < text.y0 < text.y1 < box.y1, name
        assert drawn.figure.bbox.x1 > box.x1 + 10
    rows = [drawn.extent(text) for name, text in drawn.artists.items() if name.startswith("row-")]
    assert max(row.x1 for row in rows) < min(box.x0 for box in boxes.values())


@every_path
def test_an_arrow_leads_to_every_box_but_the_first_and_through_none(path: CreamPath) -> None:
    drawn = Drawn(draw_path(path, 224))
    boxes = drawn.boxes()
    arrows: dict[str, Any] = drawn.named("arrow-")
    assert set(arrows) == set(boxes) - {"0-0"}
    names = list(boxes)
    for before, name in itertools.pairwise(names):
        corners = arrows[name]._path_original.vertices * drawn.figure.dpi
        start, end = corners[0], corners[-1]
        box = boxes[before]
        assert box.x0 - 1 <= start[0] <= box.x1 + 1
        assert box.y0 - 1 <= start[1] <= box.y1 + 1
        target = boxes[name]
        assert target.x0 - 1 <= end[0] <= target.x1 + 1
        assert target.y0 - 1 <= end[1] <= target.y1 + 1
        for (x, y), (to_x, to_y) in itertools.pairwise(corners):
            middle = ((x + to_x) / 2, (y + to_y) / 2)
            assert not any(other.contains(*middle) for other in boxes.values()), (before, name)
