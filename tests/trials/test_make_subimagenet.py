"""The command line that makes subImageNet, as a user starts it."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    for name in ("n02", "n01"):
        (tmp_path / "imagenet/train" / name).mkdir(parents=True)
        for number in (3, 1, 4, 2):
            (tmp_path / "imagenet/train" / name / f"{number}.JPEG").write_text(f"{name} {number}")
    return tmp_path / "imagenet"


def make(repository: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # -X importtime lists on stderr what was imported.
    full = [sys.executable, "-X", "importtime", str(repository / "trials/make_subimagenet.py"), *arguments]
    return subprocess.run(full, cwd=folder, capture_output=True, text=True, timeout=60, check=False)


def test_a_data_set_is_made_and_named_on_one_line(repository: Path, imagenet: Path, tmp_path: Path) -> None:
    options = ["--classes", "2", "--train-images", "2", "--val-images", "1"]
    result = make(repository, tmp_path, "imagenet", "new", *options)
    assert result.returncode == 0, result.stderr
    new = tmp_path / "new"
    listing = new / "listing.csv"
    assert result.stdout == f"Made {new}: 2 classes, 4 training and 2 validation images, listed in {listing}.\n"
    with listing.open(encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    assert [f"{row['part']}/{row['class']}/{row['file']}" for row in rows] == [
        *("train/n01/1.JPEG", "train/n01/2.JPEG", "train/n02/1.JPEG", "train/n02/2.JPEG"),
        *("val/n01/3.JPEG", "val/n02/3.JPEG"),
    ]
    for row in rows:
        made = new / row["part"] / row["class"] / row["file"]
        assert made.is_symlink()
        assert made.read_text() == Path(row["source"]).read_text() == f"{row['class']} {made.stem}"
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in result.stderr.splitlines()}
    assert "nni_cream" in imported
    assert not imported & {"torch", "torchvision", "timm", "nni"}


def test_without_options_it_is_the_published_size_and_what_is_missing_is_one_sentence(
    repository: Path, imagenet: Path, tmp_path: Path
) -> None:
    result = make(repository, tmp_path, "imagenet", "new")
    assert result.returncode == 2
    errors = [line for line in result.stderr.splitlines() if not line.startswith("import time:")]
    assert errors == [f"error: {imagenet / 'train'} holds 2 class folders, and 100 are needed."]
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == [imagenet]


def test_the_mode_is_taken(repository: Path, imagenet: Path, tmp_path: Path) -> None:
    options = ["--classes", "1", "--train-images", "3", "--val-images", "1", "--mode", "copy"]
    result = make(repository, tmp_path, "imagenet", "new", *options)
    assert result.returncode == 0, result.stderr
    made = tmp_path / "new/val/n01/4.JPEG"
    assert not made.is_symlink()
    assert made.read_text() == "n01 4"
