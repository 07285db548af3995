from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from nni_cream.mixing import Mixing
from nni_cream.settings import MixingSettings

CLASSES, SIZE = 5, 16
LABELS = torch.tensor([0, 1, 2, 3, 4, 0, 2, 1])


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    state = np.random.get_state()
    np.random.seed(11)
    yield
    np.random.set_state(state)


def numbered(number: int = len(LABELS)) -> Tensor:
    """Images of which every pixel tells the number, from 1."""
    return torch.arange(1.0, 1 + number).view(-1, 1, 1, 1).repeat(1, 3, SIZE, SIZE)


def expected_targets(share: float, smoothing: float) -> Tensor:
    one_hot = torch.full((len(LABELS), CLASSES), smoothing / CLASSES)
    one_hot[torch.arange(len(LABELS)), LABELS] += 1 - smoothing
    return share * one_hot + (1 - share) * one_hot.flip(0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixup_is_a_weighted_mean_of_two_images_and_of_their_labels(smoothing: float) -> None:
    mix = Mixing(CLASSES, mixup=0.8, label_smoothing=smoothing)
    shares = []
    for _ in range(20):
        images, targets = mix(numbered(), LABELS, 0)
        own, partner = numbered(), numbered().flip(0)
        share = ((images - partner) / (own - partner))[0, 0, 0, 0].item()
        assert torch.allclose(images, share * own + (1 - share) * partner, atol=1e-5)
        assert torch.allclose(targets, expected_targets(share, smoothing), atol=1e-5)
        shares.append(share)
    assert len({round(share, 4) for share in shares}) > 15


def test_cutmix_takes_a_rectangle_and_as_much_of_the_label_as_of_the_area() -> None:
    mix = Mixing(CLASSES, cutmix=1.0, label_smoothing=0.1)
    shares = set()
    for _ in range(20):
        images, targets = mix(numbered(), LABELS, 0)
        own = images == numbered()
        assert (own | (images == numbered().flip(0))).all()
        assert all(torch.equal(image, own[0]) for image in own)
        replaced = ~own[0, 0]
        rows, columns = replaced.any(1), replaced.any(0)
        assert torch.equal(replaced, rows[:, None] & columns[None, :])
        share = own[0].double().mean().item()
        assert torch.allclose(targets, expected_targets(share, 0.1), atol=1e-5)
        shares.add(round(share, 4))
    assert len(shares) > 10


def test_a_beta_distribution_gives_the_shares() -> None:
    mix = Mixing(CLASSES, mixup=0.4)
    ends = numbered(2)
    shares = np.array([(2 - mix(ends.clone(), LABELS[:2], 0)[0][0, 0, 0, 0]).item() for _ in range(2000)])
    # Mean and variance of Beta(α, α): 1/2 and 1 / (4 (2α + 1)).
    assert shares.mean() == pytest.approx(0.5, abs=0.03)
    assert shares.var() == pytest.approx(1 / (4 * 1.8), rel=0.06)


@pytest.mark.parametrize(("prob", "switch_prob"), [(0.5, 0.25), (1.0, 0.8), (0.0, 0.5)])
def test_batches_are_mixed_as_often_as_asked_for(prob: float, switch_prob: float) -> None:
    mix = Mixing(CLASSES, mixup=1.0, cutmix=1.0, prob=prob, switch_prob=switch_prob)
    kinds = {"none": 0, "cutmix": 0, "mixup": 0}
    for _ in range(2000):
        images, _ = mix(numbered(2), LABELS[:2], 0)
        values = set(images.unique().tolist())
        kinds["none" if (images == numbered(2)).all() else "cutmix" if values <= {1.0, 2.0} else "mixup"] += 1
    # A rectangle may be empty.
    assert kinds["none"] / 2000 == pytest.approx(1 - prob + 0.01 * prob, abs=0.04)
    assert kinds["cutmix"] / 2000 == pytest.approx(prob * switch_prob, abs=0.04)


def test_from_its_last_epoch_on_images_stay_and_labels_are_smoothed() -> None:
    mix = Mixing(CLASSES, mixup=1.0, label_smoothing=0.1, off_epoch=3)
    assert not torch.equal(mix(numbered(), LABELS, 2)[0], numbered())
    before = np.random.get_state()
    # Also of an odd number of images, which is what one of several processes may have.
    for number in (8, 7):
        images, targets = mix(numbered(number), LABELS[:number], 3)
        assert torch.equal(images, numbered(number))
        assert torch.allclose(targets, expected_targets(1.0, 0.1)[:number])
    after = np.random.get_state()
    assert (before[1] == after[1]).all()
    assert before[2] == after[2]


def test_it_draws_from_numpys_stream_alone() -> None:
    mix = Mixing(CLASSES, mixup=1.0, cutmix=1.0)
    of_torch, of_python, of_numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()
    first = [mix(numbered(), LABELS, 0)[0] for _ in range(5)]
    assert torch.equal(torch.get_rng_state(), of_torch)
    assert random.getstate() == of_python
    np.random.set_state(of_numpy)
    again = [mix(numbered(), LABELS, 0)[0] for _ in range(5)]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(again, first, strict=True))
    assert not torch.equal(first[0], first[1])


def test_it_has_the_settings_of_a_recipe() -> None:
    defaults = Mixing.__init__.__kwdefaults__
    assert defaults == {**MixingSettings().model_dump(), "label_smoothing": 0.0}
