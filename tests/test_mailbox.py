from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nni_cream.mailbox import Mailbox


class Line:
    """A line to somebody who answers only while ``up``."""

    def __init__(self, up: bool = True) -> None:
        self.up = up
        self.arrived: list[Any] = []

    def __call__(self, message: dict[str, Any]) -> None:
        if not self.up:
            raise ConnectionError("nobody answers")
        self.arrived.append(message["n"])


def message(number: int) -> dict[str, Any]:
    return {"n": number, "value": {"default": number / 3, "path": "[[0]]"}}


def test_what_arrives_leaves_nothing_behind(tmp_path: Path) -> None:
    line = Line()
    box = Mailbox(tmp_path / "box", line)
    assert box.post(message(1))
    assert box.post(message(2))
    assert box.deliver()
    assert line.arrived == [1, 2]
    assert not list(tmp_path.iterdir())


def test_what_does_not_arrive_waits_and_goes_first(tmp_path: Path) -> None:
    line = Line(up=False)
    box = Mailbox(tmp_path / "box", line)
    for number in range(1, 13):
        assert not box.post(message(number))
    assert not box.deliver()
    assert len(box.waiting()) == 12
    line.up = True
    assert box.post(message(13))
    assert line.arrived == list(range(1, 14))
    assert not (tmp_path / "box").exists()


def test_it_outlives_the_process_that_filled_it(tmp_path: Path) -> None:
    Mailbox(tmp_path / "box", Line(up=False)).post(message(1))
    sent: list[dict[str, Any]] = []
    assert Mailbox(tmp_path / "box", sent.append).deliver()
    assert sent == [message(1)]


def test_what_was_delivered_by_halves_is_delivered_to_the_end(tmp_path: Path) -> None:
    line = Line(up=False)
    box = Mailbox(tmp_path / "box", line)
    for number in (1, 2, 3):
        box.post(message(number))

    def once(message: dict[str, Any]) -> None:
        if line.arrived:
            line.up = False
        line(message)

    line.up = True
    assert not Mailbox(tmp_path / "box", once).deliver()
    assert line.arrived == [1]
    line.up = True
    assert box.post(message(4))
    assert line.arrived == [1, 2, 3, 4]


def test_a_damaged_message_is_kept_and_said_and_stops_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = Line(up=False)
    box = Mailbox(tmp_path / "box", line)
    for number in (1, 2, 3):
        box.post(message(number))
    (damaged, *_) = box.waiting()
    damaged.write_bytes(damaged.read_bytes()[:9])
    line.up = True
    assert box.post(message(4))
    assert line.arrived == [2, 3, 4]
    assert f"{damaged} is no message to NNI" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "box").iterdir()] == ["000000001.damaged"]


def test_other_errors_are_not_taken_for_an_outage(tmp_path: Path) -> None:
    def wrong(message: dict[str, Any]) -> None:
        raise TypeError("not this")

    with pytest.raises(TypeError, match="not this"):
        Mailbox(tmp_path / "box", wrong).post(message(1))
