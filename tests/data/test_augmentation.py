"""What is done to training images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torchvision import transforms

from nni_cream.data import Augmentation, DataSplits, LabelledImages, load_data
from nni_cream.errors import UserError
from nni_cream.resident import as_resident
from tests.data.images import drawn

WHOLE: dict[str, Any] = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}


class TestAugmentation:
    def test_training_images_vary_and_others_do_not(self, digits: DataSplits) -> None:
        assert not torch.equal(drawn(digits.weights, range(1), seed=0), drawn(digits.weights, range(1), seed=1))
        for part in (digits.architecture, digits.validation, digits.test):
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

    @pytest.mark.parametrize(
        ("strengths", "varies", "stays"),
        [
            # Brightness multiplies all channels; hue turns the colour and leaves the largest and the smallest channel.
            ((0.3, 0, 0, 0), lambda rgb: rgb.max(), lambda rgb: rgb.argmax().item()),
            ((0, 0, 0, 0.5), lambda rgb: rgb.argmax(), lambda rgb: (rgb.max().item(), rgb.min().item())),
        ],
        ids=["brightness", "hue"],
    )
    def test_four_strengths_of_colour(
        self,
        strengths: tuple[float, float, float, float],
        varies: Callable[[Tensor], Tensor],
        stays: Callable[[Tensor], Any],
    ) -> None:
        splits = load_data("digits", resolution=8, augmentation=Augmentation(**WHOLE, color_jitter=strengths))
        red = Image.new("RGB", (8, 8), (150, 51, 51))
        torch.manual_seed(0)
        mean, std = (torch.tensor(values)[:, None, None] for values in (splits.mean, splits.std))
        found = [(splits.weights.transform(red) * std + mean)[:, 4, 4] for _ in range(40)]
        assert len({varies(rgb).item() for rgb in found}) >= 3
        expected = stays(torch.tensor([150, 51, 51]) / 255)
        for rgb in found:
            assert stays(rgb) == pytest.approx(expected, abs=0.01)

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

    @pytest.mark.parametrize("size", [(30, 20), (20, 33), (20, 20)])
    @pytest.mark.parametrize("resident", [True, False])
    def test_padding_keeps_proportions(self, tmp_path: Path, size: tuple[int, int], resident: bool) -> None:
        """Of an image that is not square the same middle is taken as when it is measured on."""
        pixels = np.random.default_rng(0)
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            for number in range(4):
                image = Image.fromarray(pixels.integers(0, 256, (*size, 3), dtype=np.uint8))
                image.save(tmp_path / name / f"{number}.png")
        augmentation = Augmentation(crop_padding=1, hflip=0, color_jitter=0)
        splits = load_data("folder", folder=tmp_path, resolution=12, augmentation=augmentation)
        measured_on = splits.test.transform
        images: Any = as_resident(splits.weights, 12, torch.device("cpu")) if resident else splits.weights
        black = measured_on(Image.new("RGB", (12, 12)))[:, :1, :1]
        padded = black.repeat(1, 14, 14)
        padded[:, 1:13, 1:13] = measured_on(splits.weights.images.rgb(int(splits.weights.indices[0])))
        windows = {(y, x): padded[:, y : y + 12, x : x + 12] for y in range(3) for x in range(3)}
        torch.manual_seed(0)
        seen = set()
        for _ in range(60):
            found, _label = images[0]
            (at,) = (at for at, window in windows.items() if torch.equal(found, window))
            seen.add(at)
        assert seen == set(windows)

    def test_padding_leaves_square_images_as_they_were(self) -> None:
        splits = load_data("digits", resolution=12, augmentation=Augmentation(crop_padding=2))
        resize, middle, *others = splits.weights.transform.transforms  # type: ignore[attr-defined]
        squashed = transforms.Compose([transforms.Resize((12, 12), resize.interpolation), *others])
        assert isinstance(middle, transforms.CenterCrop)
        before = LabelledImages(splits.weights.images, splits.weights.indices, squashed)
        assert torch.equal(drawn(splits.weights, range(20)), drawn(before, range(20)))

    def test_cutout_comes_after_all_else(self) -> None:
        splits = load_data("digits", resolution=12, augmentation=Augmentation(**WHOLE, cutout=6))
        still = LabelledImages(splits.weights.images, splits.weights.indices, splits.test.transform)
        cut, whole = drawn(splits.weights, range(30)), drawn(still, range(30))
        holes = (cut == 0).all(1)
        assert not (whole == 0).any()
        assert all(9 <= area <= 36 for area in holes.sum((1, 2)).tolist())
        assert torch.equal(cut, torch.where(holes[:, None], torch.zeros(()), whole))
        assert torch.equal(drawn(splits.test, range(5)), drawn(load_data("digits", resolution=12).test, range(5)))

    @pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "random"])
    @pytest.mark.parametrize("more", [{}, {"hflip": 0.5, "color_jitter": 0.4}], ids=["grey", "coloured"])
    def test_images_are_those_of_timm(self, interpolation: str, more: dict[str, Any]) -> None:
        given: Any = {"scale": (0.3, 1.0), "ratio": (0.5, 2.0), "interpolation": interpolation, "color_jitter": 0.0}
        splits = load_data("digits", resolution=12, augmentation=Augmentation(**(given | more)))
        of_timm = create_transform(
            (3, 12, 12), is_training=True, mean=splits.mean, std=splits.std, **({"hflip": 0.0} | given | more)
        )
        # In a function, of which nobody knows that it could be done faster.
        timms = LabelledImages(splits.weights.images, splits.weights.indices, lambda image: of_timm(image))
        assert torch.equal(drawn(splits.weights, range(50)), drawn(timms, range(50)))

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
            (Augmentation(color_jitter=(0.1, 0.1, -0.1, 0.1)), "color_jitter is a strength"),
            (Augmentation(color_jitter=(0.4, 0.4, 0.4, 0.6)), "hue, the last up to 0.5, got "),
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
            (Augmentation(cutout=8), r"cutout=8 could leave nothing of an image of 8 pixels; it must be smaller"),
            (Augmentation(crop_padding=8), "crop_padding=8 could leave nothing of an image of 8 pixels; it must be"),
            (Augmentation(crop_padding=4, scale=(0.5, 1.0)), "crop_padding=4 takes the place of the crop by augm"),
            (Augmentation(crop_padding=4, ratio=(1.0, 1.0)), "crop_padding=4 takes the place .* give one or the other"),
            (Augmentation(auto_augment="rand-m9", color_jitter=0.4), "color_jitter=0.4 has no effect beside"),
        ],
    )
    def test_what_timm_cannot_do_is_refused(self, augmentation: Augmentation, sentence: str) -> None:
        with pytest.raises(UserError, match=sentence):
            load_data("digits", resolution=8, augmentation=augmentation)
