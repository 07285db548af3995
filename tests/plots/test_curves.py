from __future__ import annotations

import itertools
from typing import Any

import pytest

from nni_cream.plots.curves import draw_curves
from nni_cream.plots.style import COLOURS
from tests.plots.reading import assert_readable, lines_of, points_of, texts_of

CREAM = {"default": 0.5, "val_accuracy": 0.9, "mean_val_accuracy": 0.8, "train_loss": 1.5, "train_accuracy": 0.7}
DARTS = {
    "val_accuracy": 0.9,
    "train_loss": 1.5,
    "train_accuracy": 0.7,
    "alpha_loss": 1.6,
    "entropy": 2.0,
    "entropy_normal": 2.04,
    "skip_connections_normal": 3,
    "entropy_reduce": 1.96,
    "skip_connections_reduce": 1,
    "expected_flops": 2_500_000.0,
    "eigenvalue": 0.25,
}
TRAINING = {"train_loss": 1.5, "val_accuracy": 0.9, "val_top5": 0.99, "val_loss": 0.3}


def rows(metrics: dict[str, Any], epochs: int = 3, first: int = 1) -> list[dict[str, str]]:
    """As they are read from a table: text, every number a hundredth less than in the epoch before."""
    return [
        {"epoch": str(first + epoch), **{name: str(value * (1 - epoch / 100)) for name, value in metrics.items()}}
        for epoch in range(epochs)
    ]


def panels(table: list[dict[str, str]]) -> dict[str, tuple[str, set[str]]]:
    """The unit and the lines of every panel, from top to bottom."""
    figure = draw_curves(table)
    ordered = sorted(figure.axes, key=lambda axes: -axes.get_position().y0)
    return {
        axes.get_title(loc="left"): (axes.get_ylabel(), {str(line.get_gid()) for line in axes.lines})
        for axes in ordered
    }


def test_every_metric_has_its_line_in_the_unit_of_its_axis() -> None:
    assert panels(rows(CREAM)) == {
        "Accuracy": ("right answers (%)", {"val_accuracy", "mean_val_accuracy", "train_accuracy"}),
        "Loss": ("cross-entropy (nats)", {"train_loss"}),
    }
    assert panels(rows(TRAINING)) == {
        "Accuracy": ("right answers (%)", {"val_accuracy", "val_top5"}),
        "Loss": ("cross-entropy (nats)", {"train_loss", "val_loss"}),
    }
    found = panels(rows(DARTS))
    assert list(found) == [
        "Accuracy",
        "Loss",
        "Indecision of α",
        "Skip connections",
        "Curvature of the validation loss in α",
        "Expected cost",
    ]
    assert found["Expected cost"] == ("MACs (million)", {"expected_flops"})
    assert found["Loss"][1] == {"train_loss", "alpha_loss"}


def test_points_are_those_of_the_table() -> None:
    figure = draw_curves(rows(DARTS))
    expected = {"val_accuracy": 90, "train_loss": 1.5, "expected_flops": 2.5, "skip_connections_normal": 3}
    for metric, first in expected.items():
        (points,) = points_of(figure, metric)
        assert points == [(epoch, pytest.approx(first * (1 - (epoch - 1) / 100))) for epoch in (1, 2, 3)]


def test_a_metric_that_some_epochs_lack_has_the_others() -> None:
    """α does not learn in the warm-up of DARTS."""
    table = rows(DARTS, epochs=4)
    table[0]["alpha_loss"] = ""
    del table[1]["alpha_loss"]
    (points,) = points_of(draw_curves(table), "alpha_loss")
    assert [epoch for epoch, _ in points] == [3, 4]


@pytest.mark.parametrize("metrics", [CREAM, DARTS, TRAINING], ids=["cream", "darts", "training"])
@pytest.mark.parametrize("epochs", [1, 2, 30, 600])
def test_it_can_be_read(metrics: dict[str, Any], epochs: int) -> None:
    assert_readable(draw_curves(rows(metrics, epochs)))


def test_lines_of_a_panel_differ_in_colour_and_dashes() -> None:
    figure = draw_curves(rows(CREAM, 30))
    lines = [line for (line,) in lines_of(figure).values() if line.axes is figure.axes[-1]]
    assert len(lines) == 3
    for one, other in itertools.combinations(lines, 2):
        assert one.get_color() != other.get_color()
        assert (
            one.get_linestyle() != other.get_linestyle() or one._unscaled_dash_pattern != other._unscaled_dash_pattern
        )  # type: ignore[attr-defined]
    assert {line.get_color() for line in lines} <= set(COLOURS)
    names = {text.get_text(): text.get_color() for text in texts_of(figure)}
    by_metric = {str(line.get_gid()): line.get_color() for line in lines}
    assert names["mean of the paths"] == by_metric["mean_val_accuracy"]


def test_a_single_epoch_is_a_dot() -> None:
    (line,) = lines_of(draw_curves(rows(CREAM, 1)))["val_accuracy"]
    assert line.get_marker() == "o"
    (line,) = lines_of(draw_curves(rows(CREAM, 60)))["val_accuracy"]
    assert line.get_marker() in (None, "None")
