from __future__ import annotations

import pytest

from nni_cream.collapse import RISE, WINDOW, rises_sharply


class TestRisesSharply:
    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            ([], False),
            # Means of 3 and 4: exactly the factor, which is not yet sharp; then a little more.
            ([1, 2, 3, 4, 5, 2, 3, 4, 5, 6], False),
            ([1, 2, 3, 4, 5, 2, 3, 4, 5, 6.001], True),
            # One epoch too few, whatever the rise.
            ([1, 1, 1, 1, 100, 100, 100, 100, 100], False),
            ([1, 1, 1, 1, 1, 100, 100, 100, 100, 100], True),
            # Only the newest ten count.
            ([1000, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2], True),
            ([0.001, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1], False),
            # The newest epoch alone, and a fall.
            ([3, 3, 3, 3, 3, 3, 3, 3, 3, 9], True),
            ([3, 3, 3, 3, 3, 3, 3, 3, 3, 7.9], False),
            ([5, 5, 5, 5, 5, 1, 1, 1, 1, 1], False),
            # Says nothing where the older mean is not positive.
            ([0, 0, 0, 0, 0, 1, 1, 1, 1, 1], False),
            ([-1, -1, -1, -1, -1, 5, 5, 5, 5, 5], False),
            ([-3, -3, -3, -3, -3, -1, -1, -1, -1, -1], False),
            ([-1, -1, -1, 1, 2.5, 1, 1, 1, 1, 1], True),
        ],
    )
    def test_sequences(self, values: list[float], expected: bool) -> None:
        assert rises_sharply(values) is expected

    def test_window_and_rise(self) -> None:
        assert rises_sharply([1, 3, 3, 5], window=2, rise=1.9)
        assert not rises_sharply([1, 3, 3, 5], window=2, rise=2)
        assert rises_sharply([9, 1, 2], window=1)
        assert not rises_sharply([2], window=1)

    def test_published_rule(self) -> None:
        # Stop when the mean over the five epochs before is below 0.75 of that over the last five.
        assert WINDOW == 5
        assert pytest.approx(1 / 0.75) == RISE

    def test_does_not_change_what_it_is_given(self) -> None:
        values = (1.0,) * 5 + (2.0,) * 5
        assert rises_sharply(values)
        assert values == (1.0,) * 5 + (2.0,) * 5
