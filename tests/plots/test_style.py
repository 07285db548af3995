from __future__ import annotations

import itertools
from pathlib import Path

import matplotlib
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

from nni_cream.plots.style import COLOURS, epochs_below, keep_limits, name_ends, our_style, save_figure, spread
from tests.plots.reading import assert_readable, texts_of


class TestSpread:
    def test_what_is_far_apart_stays(self) -> None:
        assert spread([30, 10, 50], 12, 0, 100) == [30, 10, 50]

    def test_neighbours_move_apart_and_keep_their_order(self) -> None:
        assert spread([10, 12, 11], 10, 0, 100) == [10, 30, 20]

    def test_the_ends_hold(self) -> None:
        assert spread([99, 98, 97], 10, 0, 100) == [100, 90, 80]
        assert spread([-5], 10, 0, 100) == [0]
        assert spread([], 10, 0, 100) == []

    @given(st.lists(st.floats(-50, 150), min_size=2, max_size=30))
    def test_where_there_is_little_room_all_get_the_same(self, wanted: list[float]) -> None:
        found = spread(wanted, 10, 0, 100)
        assert all(-1e-9 <= number <= 100 + 1e-9 for number in found)
        gap = min(10, 100 / (len(wanted) - 1))
        for one, other in itertools.pairwise(sorted(found)):
            assert other - one >= gap - 1e-6
        order = sorted(range(len(wanted)), key=lambda i: wanted[i])
        assert [found[i] for i in order] == sorted(found)


def with_ends(*heights: float) -> Figure:
    with our_style():
        figure = Figure(figsize=(6, 2.5))
        axes = figure.add_axes((0.15, 0.2, 0.6, 0.65))
        axes.set_ylim(0, 10)
        epochs_below(axes, 1, 30)
        name_ends(axes, [(30, y, f"line {number}", COLOURS[number]) for number, y in enumerate(heights)])
    return figure


def test_names_stand_beside_the_ends_of_lines_and_on_no_other() -> None:
    figure = with_ends(5, 5.1, 5.2, 0, 10)
    assert_readable(figure)
    names = {text.get_text(): text for text in texts_of(figure) if text.get_text().startswith("line")}
    heights = {name: float(text.xyann[1]) for name, text in names.items()}  # type: ignore[attr-defined]
    assert sorted(heights, key=heights.__getitem__) == ["line 3", "line 0", "line 1", "line 2", "line 4"]
    assert (heights["line 3"], heights["line 4"]) == pytest.approx((0, 1))
    assert [names[f"line {number}"].get_color() for number in range(5)] == list(COLOURS[:5])


def test_epochs_are_whole_numbers() -> None:
    for last in (1, 2, 7, 600):
        figure = Figure()
        axes = figure.add_axes((0, 0, 1, 1))
        epochs_below(axes, 1, last)
        assert axes.get_xlim() == (0.5, last + 0.5)
        assert all(tick == int(tick) for tick in axes.get_xticks())
        assert axes.get_xlabel() == "epoch"


def test_values_that_hardly_differ_have_few_digits() -> None:
    figure = Figure()
    axes = figure.add_axes((0.2, 0.2, 0.7, 0.7))
    axes.plot([1, 2], [3_000_000.1, 3_000_000.2])
    keep_limits(axes)
    low, high = axes.get_ylim()
    assert high - low == pytest.approx(6000, rel=1e-3)
    assert (low + high) / 2 == pytest.approx(3_000_000.15, abs=1e-3)
    axes.plot([1, 2], [1, 2])
    axes.set_ylim(0.9, 2.1)
    keep_limits(axes)
    assert axes.get_ylim() == (0.9, 2.1)
    figure.canvas.draw()
    assert {label.get_text() for label in axes.get_yticklabels()} >= {"1", "1.2", "2"}


def test_a_figure_is_two_files_of_the_same_bytes_every_time(tmp_path: Path) -> None:
    figure = with_ends(1, 2)
    files = save_figure(figure, tmp_path / "new", "name")
    assert files == [tmp_path / "new/name.svg", tmp_path / "new/name.png"]
    assert sorted(files) == sorted((tmp_path / "new").iterdir())
    before = [file.read_bytes() for file in files]
    assert [file.read_bytes() for file in save_figure(with_ends(1, 2), tmp_path / "again", "name")] == before
    assert b"<dc:date>" not in before[0]
    assert b">line 1</text>" in before[0]
    with Image.open(files[1]) as picture:
        assert (picture.format, picture.size) == ("PNG", (900, 375))


def test_settings_of_matplotlib_are_left_alone() -> None:
    with matplotlib.rc_context({"font.size": 3, "axes.grid": False}):
        before = dict(matplotlib.rcParams)
        assert_readable(with_ends(1, 2))
        assert dict(matplotlib.rcParams) == before
