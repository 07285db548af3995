from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from nni_cream import interruption


@pytest.fixture(autouse=True)
def _handlers_are_put_back() -> Iterator[None]:
    before = [signal.getsignal(number) for number in interruption.SIGNALS]
    yield
    assert [signal.getsignal(number) for number in interruption.SIGNALS] == before


def send(number: int) -> None:
    os.kill(os.getpid(), number)


class TestSignals:
    @pytest.mark.parametrize("number", interruption.SIGNALS)
    def test_end_what_runs_and_then_change_nothing(self, number: int) -> None:
        undo = interruption.install()
        assert interruption.received() is None
        with pytest.raises(KeyboardInterrupt):
            send(number)
        for other in interruption.SIGNALS:
            send(other)
        assert interruption.received() == number
        undo()

    @pytest.mark.parametrize("number", interruption.SIGNALS)
    def test_wait_while_they_are_deferred(self, number: int) -> None:
        undo = interruption.install()
        end = interruption.defer()
        send(number)
        send(number)
        assert interruption.received() == number
        end()
        send(number)
        assert interruption.received() == number
        undo()

    def test_raise_again_after_the_deferral(self) -> None:
        undo = interruption.install()
        interruption.defer()()
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGTERM)
        undo()

    def test_of_one_process_end_the_others_of_its_run(self) -> None:
        undo = interruption.install()
        interruption.end_with_others()
        assert interruption.received() == signal.SIGTERM
        undo()
        undo = interruption.install()
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        interruption.end_with_others()
        assert interruption.received() == signal.SIGINT
        undo()

    def test_are_left_as_they_are_by_other_threads(self) -> None:
        def elsewhere() -> None:
            interruption.install()()
            interruption.defer()()

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
