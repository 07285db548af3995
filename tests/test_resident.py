from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from torch import Tensor

from nni_cream import resident as module_under_test
from nni_cream.cutout import Cutout
from nni_cream.data import Augmentation, LabelledImages, load_data
from nni_cream.resident import ResidentImages, as_resident
from nni_cream.search import make_loader, make_training_loader
from nni_cream.settings import Data, Device
from nni_cream.shards import Draw

RESOLUTION = 8
CPU = torch.device("cpu")
MOVING = Augmentation(crop_padding=1, hflip=0.5, vflip=0.25, color_jitter=0.0)


def part(augmentation: Augmentation = MOVING) -> LabelledImages:
    return load_data("digits", resolution=RESOLUTION, augmentation=augmentation).weights


def resident(images: LabelledImages) -> ResidentImages:
    found = as_resident(images, RESOLUTION, CPU)
    assert found is not None
    return found


def draws(position: int, number: int) -> list[Draw]:
    seeds = torch.randint(2**63 - 1, (number,), generator=torch.Generator().manual_seed(0))
    return [Draw(position, seed) for seed in seeds.tolist()]


def moved_by_pillow(images: LabelledImages, position: int) -> dict[tuple[int, ...], Tensor]:
    """Every way in which an image can be moved: first row and column, mirrored or not; as torchvision does it."""
    image = images.images.rgb(int(images.indices[position]))
    padded = TF.pad(image, [1])
    to_tensor, normalize = images.transform.transforms[-2:]
    found = {}
    for top, left, across, down in itertools.product(range(3), range(3), (0, 1), (0, 1)):
        moved = TF.crop(padded, top, left, RESOLUTION, RESOLUTION)
        moved = TF.hflip(moved) if across else moved
        moved = TF.vflip(moved) if down else moved
        found[top, left, across, down] = normalize(to_tensor(moved))
    return found


def test_images_to_measure_on_are_those_that_are_loaded() -> None:
    images = load_data("digits", resolution=12).validation
    found = as_resident(images, 12, CPU)
    assert found is not None
    pixels, labels = found.__getitems__([3, 0, 7])
    assert torch.equal(pixels, torch.stack([images[i][0] for i in (3, 0, 7)]))
    assert labels.tolist() == [images[i][1] for i in (3, 0, 7)]
    assert (pixels.dtype, labels.dtype) == (torch.float32, torch.int64)


def test_an_image_is_moved_as_pillow_moves_it_and_every_way_equally_often() -> None:
    images = part()
    ways = moved_by_pillow(images, 5)
    assert len({tuple(way.flatten().tolist()) for way in ways.values()}) == 36
    number = 7200
    pixels, _ = resident(images).__getitems__(draws(5, number))
    seen = Counter(next(way for way, wanted in ways.items() if torch.equal(wanted, found)) for found in pixels)
    assert sum(seen.values()) == number
    for (_, _, _, down), count in ((way, seen[way]) for way in ways):
        expected = number / 9 / 2 * (0.25 if down else 0.75)
        # Five standard deviations.
        assert abs(count - expected) < 5 * expected**0.5


def test_what_is_blotted_out_is_what_cutout_blots_out(monkeypatch: pytest.MonkeyPatch) -> None:
    images = part(Augmentation(crop_padding=1, hflip=0.0, color_jitter=0.0, cutout=3))
    whole = part(Augmentation(crop_padding=1, hflip=0.0, color_jitter=0.0))
    chosen = draws(2, 4000)
    cut, plain = (resident(source).__getitems__(chosen)[0] for source in (images, whole))
    masks = Counter(tuple(mask.flatten().tolist()) for mask in ((cut != plain) | (plain == 0)).any(1).logical_not())
    centres = iter(itertools.product(range(RESOLUTION), repeat=2))
    possible = set()
    for row, column in centres:
        coordinates = iter((row, column))
        monkeypatch.setattr(torch, "randint", lambda *_, c=coordinates: torch.tensor(next(c)))
        possible.add(tuple((Cutout(3)(torch.ones(1, 8, 8))[0] == 1).flatten().tolist()))
    assert set(masks) == possible
    assert len(possible) == RESOLUTION**2


def test_how_an_image_varies_follows_from_its_seed_alone() -> None:
    chosen = [Draw(i, 1000 + i) for i in range(6)]
    source = resident(part())
    together, _ = source.__getitems__(chosen)
    for i, draw in enumerate(chosen):
        assert torch.equal(source.__getitems__([draw])[0][0], together[i])
    assert not torch.equal(source.__getitems__([Draw(0, 7)])[0][0], source.__getitems__([Draw(0, 8)])[0][0])


def test_draws_are_uniform_and_independent() -> None:
    seeds = np.arange(20_000, dtype=np.uint64)
    numbers = np.stack([module_under_test._uniform(seeds, which) for which in range(6)])
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = np.stack([np.histogram(row, 20, (0, 1))[0] for row in numbers])
    assert np.abs(counts - 1000).max() < 5 * 1000**0.5
    assert np.abs(np.corrcoef(numbers) - np.eye(6)).max() < 0.04
    assert abs(np.corrcoef(numbers[0, :-1], numbers[0, 1:])[0, 1]) < 0.04
    # The first number that SplitMix64 gives after the seed 0, of its 64 bits the first 53.
    assert numbers[0, 0] == (0xE220A8397B1DCDAF >> 11) / 2**53


def test_images_that_were_loaded_in_inference_mode_can_be_trained_on() -> None:
    source = resident(load_data("digits", resolution=RESOLUTION).validation)
    with torch.inference_mode():
        source.__getitems__([0])
    pixels, _ = source.__getitems__([0, 1])
    weight = torch.ones(3, requires_grad=True)
    (pixels.mean((2, 3)) * weight).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize(
    "augmentation",
    [
        Augmentation(scale=(0.5, 1.0)),
        Augmentation(crop_padding=1, color_jitter=0.3),
        Augmentation(crop_padding=1, color_jitter=0.0, auto_augment="rand-m5"),
        Augmentation(crop_padding=1, color_jitter=0.0, re_prob=0.5),
    ],
)
def test_images_that_vary_in_another_way_are_not_kept(augmentation: Augmentation) -> None:
    assert as_resident(part(augmentation), RESOLUTION, CPU) is None


def test_images_that_do_not_fit_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    images = part()
    needed = len(images) * 3 * RESOLUTION**2 * 4
    monkeypatch.setattr(module_under_test, "LARGEST", needed)
    assert as_resident(images, RESOLUTION, CPU) is not None
    monkeypatch.setattr(module_under_test, "LARGEST", needed - 1)
    assert as_resident(images, RESOLUTION, CPU) is None


@pytest.mark.parametrize("kept", [True, False])
def test_the_recipe_decides(kept: bool) -> None:
    data = Data(name="digits", resolution=RESOLUTION, batch_size=32, workers=0, resident=kept)
    device = Device(accelerator="cpu")
    loaders: list[Any] = [make_training_loader(part(), data, 0, device), make_loader(part(), data, device)]
    for loader in loaders:
        assert isinstance(loader.dataset, ResidentImages if kept else LabelledImages)
        pixels, labels = next(iter(loader))
        assert (tuple(pixels.shape[1:]), labels.dtype) == ((3, RESOLUTION, RESOLUTION), torch.int64)


def test_batches_to_measure_on_are_the_same_either_way() -> None:
    images = load_data("digits", resolution=RESOLUTION).validation
    device = Device(accelerator="cpu")
    kept, loaded = (
        list(make_loader(images, Data(name="digits", resolution=RESOLUTION, batch_size=50, resident=resident), device))
        for resident in (True, False)
    )
    assert len(kept) == len(loaded) > 1
    for (pixels, labels), (others, other_labels) in zip(kept, loaded, strict=True):
        assert torch.equal(pixels, others)
        assert torch.equal(labels, other_labels)


def test_workers_are_for_images_that_are_not_kept() -> None:
    data = Data(name="digits", resolution=RESOLUTION, batch_size=32, workers=2)
    assert make_training_loader(part(), data, 0, Device(accelerator="cpu")).num_workers == 0
    other = part(Augmentation(scale=(0.5, 1.0)))
    assert make_training_loader(other, data, 0, Device(accelerator="cpu")).num_workers == 2
