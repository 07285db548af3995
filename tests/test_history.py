from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nni_cream.errors import UserError
from nni_cream.history import History, Seen


def test_a_file_gives_it_back(tmp_path: Path) -> None:
    history = History(500, board={1: [], 2: [Seen("[[0]]", 100 / 3, 7), Seen("[[1]]", 0.1, 9)]})
    history.save(tmp_path / "history.json")
    assert History.load(tmp_path / "history.json") == history
    assert history.epochs == 2


def test_times_are_there_where_the_budget_is_time(tmp_path: Path) -> None:
    with_time, without = Seen("[[0]]", 50.0, 7, 1.2345), Seen("[[1]]", 40.0, 9)
    history = History(500, board={1: [with_time, without]})
    history.save(tmp_path / "history.json")
    assert History.load(tmp_path / "history.json") == history
    (places,) = json.loads((tmp_path / "history.json").read_text())["board"].values()
    assert places == [
        {"path": "[[0]]", "score": 50.0, "macs": 7, "latency": 1.2345},
        {"path": "[[1]]", "score": 40.0, "macs": 9},
    ]
    assert (with_time.cost, without.cost) == (1.2345, 9)


def test_alphas_come_back_to_the_last_bit(tmp_path: Path) -> None:
    tables = np.random.default_rng(0).normal(size=(3, 5, 8)).astype(np.float32)
    History(10, alphas={"normal": tables.tolist()}).save(tmp_path / "history.json")
    history = History.load(tmp_path / "history.json")
    assert (np.asarray(history.alphas["normal"], np.float32) == tables).all()
    assert history.epochs == 3


GOOD: dict[str, Any] = {"format": "nni_cream.history/1", "images": 3, "board": {}, "alphas": {}}


@pytest.mark.parametrize(
    "content",
    [
        [],
        3,
        {},
        {**GOOD, "format": "nni_cream.child/1"},
        {**GOOD, "images": None},
        {**GOOD, "board": []},
        {**GOOD, "board": {"one": []}},
        {**GOOD, "board": {"1": [{"path": "[[0]]"}]}},
        {key: value for key, value in GOOD.items() if key != "alphas"},
    ],
    ids=str,
)
def test_what_is_none_is_refused(tmp_path: Path, content: Any) -> None:
    file = tmp_path / "history.json"
    file.write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        History.load(file)
    assert str(caught.value) == f"{file} is not a history of a search."
    file.write_text(json.dumps(GOOD))
    assert History.load(file) == History(3)


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"There is no history of a search .*history\.json"):
        History.load(tmp_path / "history.json")
