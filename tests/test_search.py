from __future__ import annotations

import pytest

from nni_cream.recipe import Data
from nni_cream.search import load_splits


@pytest.mark.slow
def test_a_licence_is_named_where_the_data_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    load_splits(Data(name="elpv", resolution=32), seed=0)
    assert "CC-BY-NC-SA-4.0" in capsys.readouterr().out.replace(" ", "-")


def test_data_without_a_licence_of_its_own_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    load_splits(Data(name="digits", resolution=32), seed=0)
    assert capsys.readouterr().out == ""
