from __future__ import annotations

import pytest

from nni_cream.differentiation import differentiated_twice, is_differentiated_twice


def test_only_inside() -> None:
    assert not is_differentiated_twice()
    with differentiated_twice():
        assert is_differentiated_twice()
        with differentiated_twice():
            pass
        assert is_differentiated_twice()
    assert not is_differentiated_twice()


def test_not_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), differentiated_twice():
        raise ZeroDivisionError
    assert not is_differentiated_twice()
