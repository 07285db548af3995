from __future__ import annotations

import csv
import errno
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nni_cream import subimagenet
from nni_cream.errors import UserError
from nni_cream.subimagenet import make_subimagenet

SMALL: dict[str, Any] = {"classes": 2, "train_images": 3, "val_images": 2}
CLASSES = ["n03", "n01", "n02"]
# Six images in an order that is neither the one by name nor its reverse, and what does not count.
IMAGES = ["d.JPEG", "a.png", "f.jpg", "c.WebP", "e.Tiff", "b.jpeg"]
OTHERS = ["0.txt", "a.png.bak", ".a.png", "jpg"]
TRAIN, VAL = ["a.png", "b.jpeg", "c.WebP"], ["d.JPEG", "e.Tiff"]


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    """Three classes; the content of a file is its class and name."""
    root = tmp_path / "imagenet"
    for name in CLASSES:
        (root / "train" / name).mkdir(parents=True)
        for file in IMAGES + OTHERS:
            (root / "train" / name / file).write_text(f"{name} {file}")
        (root / "train" / name / "0.jpg").mkdir()
    shutil.copytree(root / "train/n01", root / "train/.n00")
    (root / "train" / "n00.jpg").write_text("in no class")
    return root


def contents(folder: Path) -> dict[str, Any]:
    """All that is below a folder, with what a careless write would change."""
    found: dict[str, Any] = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(folder))] = (content, status.st_mode, status.st_mtime_ns)
    return found


def files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def expected(names: list[str]) -> dict[str, str]:
    parts = {"train": TRAIN, "val": VAL}
    return {f"{part}/{name}/{file}": f"{name} {file}" for part in parts for name in names for file in parts[part]}


def refusal(*arguments: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        make_subimagenet(*arguments, **{**SMALL, **options})
    return str(caught.value)


class TestWhatIsTaken:
    @pytest.mark.parametrize("mode", ["symlink", "copy", "hardlink"])
    def test_is_the_first_by_name_and_nothing_else(
        self, imagenet: Path, tmp_path: Path, mode: subimagenet.Mode
    ) -> None:
        before = contents(imagenet)
        listing = make_subimagenet(imagenet, tmp_path / "new", mode=mode, **SMALL)
        found = files(tmp_path / "new")
        assert found.pop("listing.csv") == listing.read_text()
        assert found == expected(["n01", "n02"])
        assert contents(imagenet) == before
        assert sorted(path.name for path in tmp_path.iterdir()) == ["imagenet", "new"]

    def test_is_listed_in_a_fixed_order(self, imagenet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        listing = make_subimagenet(Path("imagenet"), Path("new"), **SMALL)
        assert listing == tmp_path / "new" / "listing.csv"
        with listing.open(newline="", encoding="utf-8") as lines:
            header, *rows = csv.reader(lines)
        assert header == ["part", "class", "file", "source"]
        assert rows == [
            [part, name, file, str(imagenet / "train" / name / file)]
            for part, names in (("train", TRAIN), ("val", VAL))
            for name in ("n01", "n02")
            for file in names
        ]

    def test_has_the_first_classes_by_name(self, imagenet: Path, tmp_path: Path) -> None:
        for number in (7, 4, 9, 11, 5, 8, 12, 6, 10):
            shutil.copytree(imagenet / "train/n01", imagenet / "train" / f"n{number:02}")
        make_subimagenet(imagenet, tmp_path / "new", **{**SMALL, "classes": 9})
        names = [f"n{number:02}" for number in range(1, 10)]
        assert sorted(path.name for path in (tmp_path / "new/train").iterdir()) == names
        assert sorted(path.name for path in (tmp_path / "new/val").iterdir()) == names

    def test_may_have_names_that_are_no_text(self, imagenet: Path, tmp_path: Path) -> None:
        odd = b'0,"\xff.png'
        (imagenet / "train/n01" / os.fsdecode(odd)).write_text("odd")
        listing = make_subimagenet(imagenet, tmp_path / "new", **SMALL)
        assert (tmp_path / "new/train/n01" / os.fsdecode(odd)).read_text() == "odd"
        with listing.open(newline="", encoding="utf-8", errors="surrogateescape") as lines:
            assert os.fsencode(list(csv.reader(lines))[1][2]) == odd

    def test_is_the_published_amount_unless_said_otherwise(self, imagenet: Path, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="holds 3 class folders, and 100 are needed"):
            make_subimagenet(imagenet, tmp_path / "new")
        with pytest.raises(UserError, match="300 are needed, 250 to train and 50 to validate"):
            make_subimagenet(imagenet, tmp_path / "new", classes=3)

    def test_has_the_extensions_that_the_data_sets_read(self) -> None:
        from torchvision.datasets.folder import IMG_EXTENSIONS

        assert subimagenet.IMG_EXTENSIONS == IMG_EXTENSIONS

    @pytest.mark.parametrize("mode", ["symlink", "copy", "hardlink"])
    @pytest.mark.parametrize("name", ["imagenet", "folder"])
    def test_is_a_data_set(self, tmp_path: Path, mode: subimagenet.Mode, name: str) -> None:
        from nni_cream.data import load_data

        for number, class_name in enumerate(CLASSES):
            (tmp_path / "imagenet/train" / class_name).mkdir(parents=True)
            for index in range(16):
                pixels = np.full((40, 40, 3), 80 * number + index, dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "imagenet/train" / class_name / f"{index:02}.png")
        options: dict[str, Any] = {"classes": 2, "train_images": 10, "val_images": 4, "mode": mode}
        make_subimagenet(tmp_path / "imagenet", tmp_path / "new", **options)
        splits = load_data(name, folder=tmp_path / "new", resolution=32)
        assert splits.class_names == ("n01", "n02")
        parts = (splits.weights, splits.architecture, splits.validation, splits.test)
        assert [len(part) for part in parts] == [16, 2, 2, 8]
        # n01 was written second, so its images are 80 + index bright; 10 to 13 are those to validate.
        first, label = splits.test[0]
        assert first.shape == (3, 32, 32)
        mean, std = splits.mean[0], splits.std[0]
        brightness = round(float(first[0].mean() * std + mean) * 255)
        assert brightness in ([90, 91, 92, 93], [170, 171, 172, 173])[label]


class TestModes:
    def test_a_symbolic_link_is_absolute(self, imagenet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        make_subimagenet(Path("imagenet"), Path("new"), **SMALL)
        original = imagenet / "train/n02/d.JPEG"
        assert os.readlink(tmp_path / "new/val/n02/d.JPEG") == str(original)
        shutil.move(tmp_path / "new", tmp_path / "elsewhere")
        assert (tmp_path / "elsewhere/val/n02/d.JPEG").samefile(original)

    def test_a_copy_is_independent(self, imagenet: Path, tmp_path: Path) -> None:
        make_subimagenet(imagenet, tmp_path / "new", mode="copy", **SMALL)
        copy = tmp_path / "new/train/n01/a.png"
        assert not copy.is_symlink()
        copy.write_text("changed")
        assert (imagenet / "train/n01/a.png").read_text() == "n01 a.png"
        shutil.rmtree(imagenet)
        assert (tmp_path / "new/val/n02/d.JPEG").read_text() == "n02 d.JPEG"

    def test_a_hard_link_is_the_same_file(self, imagenet: Path, tmp_path: Path) -> None:
        make_subimagenet(imagenet, tmp_path / "new", mode="hardlink", **SMALL)
        link = tmp_path / "new/train/n01/a.png"
        assert not link.is_symlink()
        assert link.samefile(imagenet / "train/n01/a.png")
        assert link.stat().st_nlink == 2

    @pytest.mark.parametrize("mode", ["symlink", "copy", "hardlink"])
    def test_an_original_may_be_a_relative_link(self, imagenet: Path, tmp_path: Path, mode: subimagenet.Mode) -> None:
        (imagenet / "store").mkdir()
        (imagenet / "train/n01/a.png").rename(imagenet / "store/1")
        (imagenet / "train/n01/a.png").symlink_to("../../store/1")
        (imagenet / "train/n01/0.png").symlink_to("nowhere")  # a broken link is no image
        make_subimagenet(imagenet, tmp_path / "deep/er/new", mode=mode, **SMALL)
        made = tmp_path / "deep/er/new/train/n01/a.png"
        assert made.read_text() == "n01 a.png"
        assert made.is_symlink() == (mode == "symlink")

    def test_the_folder_has_the_usual_rights(self, imagenet: Path, tmp_path: Path) -> None:
        before = os.umask(0o027)
        try:
            make_subimagenet(imagenet, tmp_path / "new", mode="copy", **SMALL)
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o750
        assert stat.S_IMODE((tmp_path / "new/train/n01/a.png").stat().st_mode) == 0o640


class TestRefusals:
    @pytest.fixture(autouse=True)
    def _nothing_is_written(self, imagenet: Path, tmp_path: Path) -> Any:
        (tmp_path / "kept").mkdir()
        (tmp_path / "kept" / "mine.txt").write_text("mine")
        (tmp_path / "kept.txt").write_text("mine too")
        before = contents(tmp_path)
        yield
        assert contents(tmp_path) == before

    @pytest.mark.parametrize(
        ("option", "value"), [("classes", 0), ("train_images", 0), ("val_images", 0), ("train_images", -3)]
    )
    def test_numbers_below_1(self, imagenet: Path, tmp_path: Path, option: str, value: int) -> None:
        sentence = f"--{option.replace('_', '-')} must be at least 1, got {value}."
        assert refusal(imagenet, tmp_path / "new", **{option: value}) == sentence

    def test_a_source_that_is_not_there(self, tmp_path: Path) -> None:
        sentence = f"ImageNet's folder {tmp_path / 'none'} does not exist."
        assert refusal(tmp_path / "none", tmp_path / "new") == sentence
        sentence = f"ImageNet's folder {tmp_path / 'kept.txt'} is not a folder."
        assert refusal(tmp_path / "kept.txt", tmp_path / "new") == sentence

    def test_a_source_without_train(self, imagenet: Path, tmp_path: Path) -> None:
        sentence = f"{imagenet / 'train'} holds no train/, the folder of ImageNet's class folders."
        assert refusal(imagenet / "train", tmp_path / "new") == sentence

    def test_too_few_classes(self, imagenet: Path, tmp_path: Path) -> None:
        sentence = f"{imagenet / 'train'} holds 3 class folders, and 4 are needed."
        assert refusal(imagenet, tmp_path / "new", classes=4) == sentence

    def test_too_few_images(self, imagenet: Path, tmp_path: Path) -> None:
        sentence = f"class folder {imagenet / 'train/n01'} holds 6 images, and 7 are needed, 3 to train and 4 to"
        assert refusal(imagenet, tmp_path / "new", val_images=4) == f"{sentence} validate."

    def test_too_few_images_in_the_last_class(self, imagenet: Path, tmp_path: Path) -> None:
        few = shutil.copytree(imagenet, tmp_path / "few")
        for file in IMAGES[1:]:
            (few / "train/n02" / file).unlink()
        assert f"{few / 'train/n02'} holds 1 image, and 5 are needed" in refusal(few, tmp_path / "new")
        assert not (tmp_path / "new").exists()
        shutil.rmtree(few)

    @pytest.mark.parametrize("name", ["kept", "kept.txt", "imagenet"])
    def test_a_destination_that_exists(self, imagenet: Path, tmp_path: Path, name: str) -> None:
        sentence = f"{tmp_path / name} already exists, and nothing is overwritten; choose a new folder."
        assert refusal(imagenet, tmp_path / name) == sentence

    @pytest.mark.parametrize("name", ["train", "train/new", "train/n01/new", "val/../train/new"])
    def test_a_destination_inside_train(self, imagenet: Path, name: str) -> None:
        assert f" lies in {imagenet / 'train'}, " in refusal(imagenet, imagenet / name)

    def test_a_destination_inside_train_by_way_of_links(self, imagenet: Path, tmp_path: Path) -> None:
        other = tmp_path / "other"
        other.mkdir()
        (other / "train").symlink_to(imagenet / "train")
        (other / "way").symlink_to(imagenet / "train" / "n03")
        assert f" lies in {other / 'train'}, " in refusal(other, other / "way" / "new")
        shutil.rmtree(other)

    def test_a_mount_point(self, imagenet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "mounted").mkdir()
        monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "mounted")
        sentence = f"{tmp_path / 'mounted'} is a mount point; choose a folder in it."
        assert refusal(imagenet, tmp_path / "mounted") == sentence
        (tmp_path / "mounted").rmdir()

    def test_a_source_that_cannot_be_read(
        self, imagenet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def scandir(path: Path) -> None:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

        with monkeypatch.context() as patched:
            patched.setattr(os, "scandir", scandir)
            sentence = refusal(imagenet, tmp_path / "new")
        assert sentence == f"{imagenet / 'train'} cannot be read: Permission denied."

    def test_a_destination_below_a_file(self, imagenet: Path, tmp_path: Path) -> None:
        sentence = f"{tmp_path / 'kept.txt' / 'new'} cannot be made: Not a directory."
        assert refusal(imagenet, tmp_path / "kept.txt" / "new") == sentence


class TestDestination:
    def test_may_be_an_empty_folder(self, imagenet: Path, tmp_path: Path) -> None:
        (tmp_path / "new").mkdir()
        make_subimagenet(imagenet, tmp_path / "new", **SMALL)
        assert (tmp_path / "new/val/n01/d.JPEG").exists()

    def test_is_not_made_again(self, imagenet: Path, tmp_path: Path) -> None:
        make_subimagenet(imagenet, tmp_path / "new", mode="copy", **SMALL)
        before = contents(tmp_path)
        assert "already exists" in refusal(imagenet, tmp_path / "new", classes=1)
        assert contents(tmp_path) == before

    def test_does_not_exist_until_it_is_complete(
        self, imagenet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def copy(source: Path, target: Path) -> None:
            assert not (tmp_path / "new").exists()
            # A rename is atomic only within a file system, and a hidden folder is nobody's data set.
            temporary = target.parents[2]
            assert temporary.parent == tmp_path
            assert temporary.name.startswith(".new.")
            shutil.copyfile(source, target)

        replace_placing(monkeypatch, copy)
        make_subimagenet(imagenet, tmp_path / "new", mode="copy", **SMALL)
        assert (tmp_path / "new").exists()

    @pytest.mark.parametrize("kind", ["folder", "file"])
    def test_that_comes_to_be_meanwhile_is_kept(
        self, imagenet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
    ) -> None:
        mine = tmp_path / "new" / "mine.txt" if kind == "folder" else tmp_path / "new"

        def copy(source: Path, target: Path) -> None:
            mine.parent.mkdir(exist_ok=True)
            mine.write_text("mine")
            shutil.copyfile(source, target)

        replace_placing(monkeypatch, copy)
        assert f"{tmp_path / 'new'} cannot be made: " in refusal(imagenet, tmp_path / "new", mode="copy")
        assert mine.read_text() == "mine"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["imagenet", "new"]


def replace_placing(monkeypatch: pytest.MonkeyPatch, place: Callable[[Path, Path], object]) -> None:
    monkeypatch.setattr(subimagenet, "_PLACE", dict.fromkeys(["symlink", "copy", "hardlink"], place))


def failing_at(monkeypatch: pytest.MonkeyPatch, file: str, error: BaseException) -> list[Path]:
    """Let placing fail at one file; returns the list that will hold what was there by then."""
    there: list[Path] = []

    def place(source: Path, target: Path) -> None:
        if str(source).endswith(file):
            there.extend(path for path in target.parents[2].rglob("*") if path.is_file())
            raise error
        shutil.copyfile(source, target)

    replace_placing(monkeypatch, place)
    return there


class TestInterruption:
    @pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("ours")])
    @pytest.mark.parametrize("place", ["new", "deep/er/new"])
    def test_leaves_nothing(
        self, imagenet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, place: str
    ) -> None:
        before = contents(imagenet)
        there = failing_at(monkeypatch, "n02/b.jpeg", error)
        with pytest.raises(type(error)):
            make_subimagenet(imagenet, tmp_path / place, **SMALL)
        assert len(there) == 4  # so it was in the middle
        assert list(tmp_path.iterdir()) == [imagenet]
        assert contents(imagenet) == before

    def test_leaves_an_empty_folder_empty(
        self, imagenet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "new").mkdir()
        failing_at(monkeypatch, "n02/b.jpeg", KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            make_subimagenet(imagenet, tmp_path / "new", **SMALL)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["imagenet", "new"]
        assert list((tmp_path / "new").iterdir()) == []

    def test_by_a_full_disk_is_one_sentence(
        self, imagenet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        failing_at(monkeypatch, "n02/b.jpeg", OSError(errno.ENOSPC, "No space left on device"))
        sentence = f"{tmp_path / 'new'} cannot be made: No space left on device, at {imagenet / 'train/n02/b.jpeg'}."
        assert refusal(imagenet, tmp_path / "new", mode="copy") == sentence
        assert list(tmp_path.iterdir()) == [imagenet]

    def test_by_another_file_system_names_the_other_modes(
        self, imagenet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def link(*_: Any, **__: Any) -> None:
            raise OSError(errno.EXDEV, "Invalid cross-device link")

        monkeypatch.setattr(os, "link", link)
        sentence = refusal(imagenet, tmp_path / "new", mode="hardlink")
        assert "different file systems" in sentence
        assert "--mode symlink or --mode copy" in sentence
        assert list(tmp_path.iterdir()) == [imagenet]
