from __future__ import annotations

import pytest

from nni_cream.differentiation import leaves_out_weights, without_weights


def test_only_inside() -> None:
    assert not leaves_out_weights()
    with without_weights():
        assert leaves_out_weights()
        with without_weights():
            pass
        assert leaves_out_weights()
    assert not leaves_out_weights()


def test_not_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), without_weights():
        raise ZeroDivisionError
    assert not leaves_out_weights()
