from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nni_cream.cutout import Cutout

HEIGHT, WIDTH = 5, 7


def hole(size: int, row: int, column: int) -> Tensor:
    """Where an image of 5 × 7 pixels is cut out around a pixel, written out."""
    mask = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    for y in range(row - size // 2, row - size // 2 + size):
        for x in range(column - size // 2, column - size // 2 + size):
            if 0 <= y < HEIGHT and 0 <= x < WIDTH:
                mask[y, x] = True
    return mask


def key(mask: Tensor) -> tuple[bool, ...]:
    return tuple(mask.flatten().tolist())


def holes(size: int, draws: int) -> list[tuple[bool, ...]]:
    torch.manual_seed(0)
    cutout, image = Cutout(size), torch.ones(1, HEIGHT, WIDTH)
    return [key(cutout(image)[0] == 0) for _ in range(draws)]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_the_holes_are_squares_around_every_pixel_clipped_at_the_edges(size: int) -> None:
    expected = {key(hole(size, row, column)) for row in range(HEIGHT) for column in range(WIDTH)}
    assert set(holes(size, 1000)) == expected


def test_every_pixel_is_the_centre_equally_often() -> None:
    found = torch.tensor(holes(1, 7000)).sum(0)
    assert found.sum() == 7000
    chi_square = ((found - 200.0) ** 2 / 200).sum().item()
    assert chi_square < 66  # one in a thousand, of 34 degrees of freedom


def test_a_hole_of_16_in_an_image_of_32_pixels() -> None:
    torch.manual_seed(0)
    areas = [int((Cutout(16)(torch.ones(1, 32, 32)) == 0).sum()) for _ in range(2000)]
    assert max(areas) == 16 * 16
    assert min(areas) >= 8 * 8  # around a corner
    # Its mean side: 16 rows less what is beyond the edge.
    side = sum(min(c + 8, 32) - max(c - 8, 0) for c in range(32)) / 32
    assert sum(areas) / 2000 == pytest.approx(side**2, rel=0.03)


def test_every_channel_has_the_same_hole_and_the_rest_is_untouched() -> None:
    torch.manual_seed(1)
    image = torch.rand(3, HEIGHT, WIDTH) + 1
    before = image.clone()
    for _ in range(50):
        cut = Cutout(3)(image)
        mask = cut[0] == 0
        assert 4 <= mask.sum() <= 9
        assert torch.equal(cut, torch.where(mask, torch.zeros(()), image))
    assert torch.equal(image, before)


def test_the_seed_decides() -> None:
    assert holes(3, 20) == holes(3, 20)
    torch.manual_seed(0)
    first = [key(Cutout(3)(torch.ones(1, HEIGHT, WIDTH))[0] == 0) for _ in range(20)]
    torch.manual_seed(1)
    second = [key(Cutout(3)(torch.ones(1, HEIGHT, WIDTH))[0] == 0) for _ in range(20)]
    assert first == holes(3, 20) != second
