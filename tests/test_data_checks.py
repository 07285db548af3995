from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import nn

from nni_cream import data_checks
from nni_cream.child import save_network
from nni_cream.data import DataSplits, load_data
from nni_cream.data_checks import (
    fingerprint,
    has_another_test_part,
    has_the_same_test_part,
    names_another_folder,
    noted,
    refuse_other_classes,
    refuse_unreadable,
)
from nni_cream.errors import UserError
from nni_cream.runs import write_json
from nni_cream.settings import Data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        (tmp_path / "images" / name / "deeper").mkdir(parents=True)
        for index in range(10):
            Image.new("RGB", (9, 9), index).save(tmp_path / "images" / name / "deeper" / f"{index}.png")
    return tmp_path / "images"


def splits_of(folder: Path, **arguments: Any) -> DataSplits:
    return load_data("folder", folder=folder, resolution=8, **arguments)


class TestFingerprint:
    def test_counts_all_images(self, folder: Path) -> None:
        assert fingerprint(splits_of(folder)).number == 20
        assert fingerprint(load_data("digits", resolution=8)).number == 1797

    def test_does_not_depend_on_where_the_folder_is_or_what_is_in_a_file(self, folder: Path) -> None:
        before = fingerprint(splits_of(folder))
        Image.new("L", (30, 3)).save(folder / "a" / "deeper" / "0.png")
        assert fingerprint(splits_of(folder.rename(folder.with_name("moved")))) == before

    def test_depends_on_names_classes_and_division(self, folder: Path) -> None:
        found = [fingerprint(splits_of(folder)).sha256, fingerprint(splits_of(folder, seed=1)).sha256]
        (folder / "a" / "deeper" / "0.png").rename(folder / "a" / "deeper" / "x.png")
        found.append(fingerprint(splits_of(folder)).sha256)
        (folder / "a" / "deeper" / "x.png").unlink()
        found.append(fingerprint(splits_of(folder)).sha256)
        (folder / "a").rename(folder / "c")
        found.append(fingerprint(splits_of(folder)).sha256)
        assert len(set(found)) == 5

    def test_depends_on_pixels_and_labels(self) -> None:
        splits = load_data("digits", resolution=8)
        found = [fingerprint(splits).sha256]
        images = splits.test.images
        assert isinstance(images.store, np.ndarray)
        store, labels = images.store.copy(), images.labels.copy()
        store[splits.test.indices[3], 2, 2] ^= 1
        labels[splits.test.indices[3]] ^= 1
        for changed in (dataclasses.replace(images, store=store), dataclasses.replace(images, labels=labels)):
            splits.test.images = changed
            found.append(fingerprint(splits).sha256)
        assert len(set(found)) == 3


class TestNotes:
    """What a network's file says of its images, compared with those that there are now."""

    def read(self, folder: Path) -> tuple[dict[str, Any], Data, DataSplits]:
        data = Data(name="folder", folder=folder, resolution=8)
        splits = splits_of(folder)
        # As a file keeps it.
        return json.loads(json.dumps(noted(data, splits))), data, splits

    def test_are_the_settings_with_a_whole_path(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(folder.parent)
        notes, data, _ = self.read(Path(folder.name))
        assert notes.pop("images")["class_names"] == ["a", "b"]
        assert notes == {**data.model_dump(mode="json"), "folder": str(folder)}
        digits = Data(name="digits")
        assert noted(digits, load_data("digits", resolution=8)) == digits.model_dump(mode="json")

    def test_the_same_images(self, folder: Path) -> None:
        notes, data, splits = self.read(folder)
        refuse_other_classes(notes, splits, Path("child.json"))
        for again in (splits, splits_of(folder, seed=1)):
            assert not has_another_test_part(notes, data, again)

    def test_further_images(self, folder: Path) -> None:
        notes, data, before = self.read(folder)
        for name in ("a", "b"):
            for index in range(10, 15):
                Image.new("RGB", (9, 9)).save(folder / name / "deeper" / f"{index}.png")
        splits = splits_of(folder)
        assert len(splits.test) > len(before.test)
        refuse_other_classes(notes, splits, Path("child.json"))
        assert has_another_test_part(notes, data, splits)
        # Of another folder nothing was said.
        moved = folder.rename(folder.with_name("moved"))
        assert not has_another_test_part(notes, Data(name="folder", folder=moved), splits_of(moved))

    def test_other_names_of_classes(self, folder: Path) -> None:
        notes, _, _ = self.read(folder)
        (folder / "a").rename(folder / "z")
        with pytest.raises(UserError) as caught:
            refuse_other_classes(notes, splits_of(folder), Path("child.json"))
        assert str(caught.value) == (
            "child.json tells the classes a, b apart, but the folder has b, z: class 0 was 'a' and would be 'b'; give "
            "each class its name as it was."
        )

    def test_names_of_classes_that_are_no_text(self, folder: Path, tmp_path: Path) -> None:
        (folder / "a").rename(os.fsdecode(os.fsencode(folder) + b"/a\xff"))
        notes, _, splits = self.read(folder)
        assert notes["images"]["class_names"] == ["a\\xff", "b"]
        refuse_other_classes(notes, splits, Path("child.json"))
        # A search would fail in its end else.
        save_network(tmp_path / "a.safetensors", nn.Linear(1, 1), architecture="a", num_classes=2, data=notes, size={})
        write_json(tmp_path / "child.json", notes)

    def test_of_another_folder(self, folder: Path, tmp_path: Path) -> None:
        notes, data, splits = self.read(folder)
        assert not names_another_folder(notes, data)
        moved = folder.rename(tmp_path / "moved")
        _, data, splits = self.read(moved)
        assert names_another_folder(notes, data)
        assert has_the_same_test_part(notes, splits)
        (moved / "a").rename(moved / "c")
        assert not has_the_same_test_part(notes, splits_of(moved))
        # Of what was not noted nothing is known.
        assert not has_the_same_test_part({"folder": str(folder)}, splits)
        assert not names_another_folder({}, data)
        assert not names_another_folder(notes, Data(name="digits"))

    def test_files_without_notes(self, folder: Path) -> None:
        _, data, splits = self.read(folder)
        for notes in ({}, {"images": None}, data.model_dump(mode="json")):
            refuse_other_classes(notes, splits, Path("child.json"))
            assert not has_another_test_part(notes, data, splits)


class TestReading:
    def test_takes_what_can_be_read(self, folder: Path) -> None:
        refuse_unreadable(splits_of(folder))
        refuse_unreadable(load_data("digits", resolution=8))

    @pytest.mark.parametrize(
        ("number", "rest"),
        [
            (1, "."),
            (2, "; nor can {1}."),
            (4, "; nor can {1}, {2}, {3}."),
            (7, "; nor can {1}, {2}, {3} and 3 more."),
        ],
    )
    def test_names_the_first_that_cannot(self, folder: Path, number: int, rest: str) -> None:
        files = [str(folder / "a" / "deeper" / f"{index}.png") for index in range(number)]
        for file in files:
            Path(file).write_bytes(Path(file).read_bytes()[:-30])
        with pytest.raises(UserError) as caught:
            refuse_unreadable(splits_of(folder))
        sentence = str(caught.value)
        assert sentence.startswith(f"image {files[0]} cannot be read: ")
        assert sentence.endswith(rest.format(*files))
        assert sum(file in sentence for file in files) == min(number, 4)

    def test_leaves_very_many_training_images_to_the_first_epoch(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        splits = splits_of(folder)
        for part, refused in ((splits.weights, False), (splits.test, True)):
            file = Path(part.images.store[part.indices[0]])
            whole = file.read_bytes()
            file.write_bytes(b"")
            monkeypatch.setattr(data_checks, "MOST_TRAINING_FILES", len(splits.weights))
            with pytest.raises(UserError):
                refuse_unreadable(splits)
            monkeypatch.setattr(data_checks, "MOST_TRAINING_FILES", len(splits.weights) - 1)
            if refused:
                with pytest.raises(UserError):
                    refuse_unreadable(splits)
            else:
                refuse_unreadable(splits)
            file.write_bytes(whole)
