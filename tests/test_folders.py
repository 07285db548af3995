from __future__ import annotations

import re
from pathlib import Path

import pytest

from nni_cream.errors import UserError
from nni_cream.folders import resolved


def test_home_and_links_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "link").symlink_to("images")
    assert resolved(Path("~/link")) == (tmp_path / "images").resolve()


@pytest.mark.parametrize("folder", ["a\0b", "~nobody-of-that-name/a", "a\ud800b"])
def test_what_no_folder_can_be_called_is_refused_in_a_sentence(folder: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"The folder {folder!r} cannot be: ")) as caught:
        resolved(Path(folder))
    assert re.search(r"[^.]\.$", str(caught.value))


def test_links_in_a_circle_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(UserError, match="cannot be: "):
        resolved(tmp_path / "a")
