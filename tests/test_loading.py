from __future__ import annotations

import itertools
import random
import signal
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from nni_cream.data import Augmentation, LabelledImages, load_data
from nni_cream.loading import Batches, TrainingBatches, first_batches
from nni_cream.randomness import seed_streams
from nni_cream.shards import Draw
from nni_cream.trouble import sentence_of

BATCH = 8

pytestmark = pytest.mark.filterwarnings("ignore:.*DataLoader will create")


class Varied:
    """Draws from the three streams that transforms draw from."""

    def __call__(self, _image: Any) -> Tensor:
        return torch.tensor([torch.rand(()).item(), random.random(), np.random.rand()], dtype=torch.float64)


@pytest.fixture(scope="module")
def images() -> LabelledImages:
    """43 images, which is 5 batches and some."""
    part = load_data("digits", resolution=8).weights
    return LabelledImages(part.images, part.indices[:43], Varied())


def streams() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())


def loaded(loader: Any) -> list[Tensor]:
    return [varied for varied, _ in loader]


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


class TestVariation:
    def test_of_an_image_follows_from_its_seed_alone(self, images: LabelledImages) -> None:
        first = images[Draw(3, 123456789012345)][0]
        random.random()
        assert torch.equal(images[Draw(3, 123456789012345)][0], first)
        assert torch.equal(images.__getitems__([0, Draw(3, 123456789012345)])[1][0], first)
        other = images[Draw(3, 123456789012346 + 2**40)][0]
        assert (other != first).all()

    @pytest.mark.parametrize(
        "augmentation",
        [
            Augmentation(),
            Augmentation(scale=(0.5, 1.0), hflip=0.5, color_jitter=0.4),
            Augmentation(crop_padding=4, cutout=6),
            Augmentation(re_prob=1.0),
        ],
        ids=["shipped", "coloured", "cutout", "erased"],
    )
    def test_in_a_batch_is_that_by_the_whole_transform_one_by_one(self, augmentation: Augmentation) -> None:
        part = load_data("mnist5k", resolution=20, augmentation=augmentation).weights
        chosen = [Draw(position, 2**40 + position) for position in (3, 0, 7, 3)]
        found = part.__getitems__(chosen)
        for draw, (pixels, label) in zip(chosen, found, strict=True):
            seed_streams(draw.seed)
            index = int(part.indices[draw])
            assert torch.equal(pixels, part.transform(part.images.rgb(index)))
            assert label == part.images.labels[index]

    def test_draws_different_numbers_from_the_three_streams(self, images: LabelledImages) -> None:
        """PyTorch and NumPy have the same generator, of which each shows other bits of its numbers."""
        for seed in (5, 2**40 + 3, 2**62 + 7):
            seed_streams(seed)
            first = {int(torch.randint(2**16, ())), int(np.random.randint(2**32, dtype=np.uint32)) % 2**16}
            assert len(first) == 2
        numbers = torch.stack([images[Draw(0, seed)][0] for seed in torch.randint(2**63 - 1, (500,)).tolist()])
        assert numbers.mean(0).tolist() == pytest.approx([0.5] * 3, abs=0.06)

    def test_leaves_the_streams_of_the_process_alone(self, images: LabelledImages) -> None:
        before = streams()
        loaded(TrainingBatches(images, BATCH))
        assert streams() == before

    def test_of_a_plain_position_draws_from_them(self, images: LabelledImages) -> None:
        before = streams()
        torch.manual_seed(1)
        first = images[3][0]
        assert not torch.equal(images[3][0], first)
        assert streams() != before

    @pytest.mark.parametrize("workers", [1, 2])
    def test_is_the_same_in_workers(self, images: LabelledImages, workers: int) -> None:
        expected, found = (TrainingBatches(images, BATCH, number, seed=3) for number in (0, workers))
        for _ in range(2):
            assert same(loaded(found), loaded(expected))

    @pytest.mark.parametrize("processes", [2, 3])
    def test_is_the_same_in_several_processes(self, images: LabelledImages, processes: int) -> None:
        whole = loaded(TrainingBatches(images, 6, seed=3))
        parts = [
            loaded(TrainingBatches(images, 6, seed=3, rank=rank, processes=processes)) for rank in range(processes)
        ]
        assert same([torch.cat(pieces) for pieces in zip(*parts, strict=True)], whole)

    def test_by_the_transforms_of_timm_follows_from_it_too(self) -> None:
        augmentation = Augmentation(color_jitter=0.4, re_prob=0.5, interpolation="random")
        automatic = Augmentation(auto_augment="rand-m9-mstd0.5", re_prob=0.5, re_mode="pixel")
        for chosen in (augmentation, automatic, Augmentation(crop_padding=4, cutout=8)):
            part = load_data("digits", resolution=32, augmentation=chosen).weights
            first = part[Draw(3, 7)][0]
            assert torch.equal(part[Draw(3, 7)][0], first)
            assert not torch.equal(part[Draw(3, 8 + 2**40)][0], first)


class TestResuming:
    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("done", [1, 3, 4])
    def test_goes_on_with_the_next_batch(self, images: LabelledImages, done: int, workers: int) -> None:
        first = TrainingBatches(images, BATCH, workers, seed=3)
        list(first)
        second_lap = iter(first)
        for _ in range(done):
            next(second_lap)
        state = first.state_dict()
        assert state == {"epoch": 0, "lap": 1, "batches": done}
        expected = loaded(second_lap)
        assert len(expected) == 5 - done

        again = TrainingBatches(images, BATCH, workers, seed=3)
        again.load_state_dict(state)
        assert len(again) == 5
        assert same(loaded(again), expected)
        assert same(loaded(again), loaded(first))

    def test_after_the_last_batch_goes_on_with_the_next_lap(self, images: LabelledImages) -> None:
        first = TrainingBatches(images, BATCH, seed=3)
        lap = iter(first)
        for _ in range(5):
            next(lap)
        state = first.state_dict()
        assert state == {"epoch": 0, "lap": 1, "batches": 0}

    def test_loads_no_image_of_the_batches_before(self, images: LabelledImages) -> None:
        seen: list[int] = []

        class Watched(LabelledImages):
            def __getitems__(self, positions: Any) -> Any:
                seen.extend(map(int, positions))
                return super().__getitems__(positions)

        loader = TrainingBatches(Watched(images.images, images.indices, images.transform), BATCH)
        loader.load_state_dict({"epoch": 0, "lap": 0, "batches": 3})
        list(loader)
        assert len(seen) == 2 * BATCH


class TestBatches:
    @pytest.mark.parametrize("workers", [0, 1])
    @pytest.mark.parametrize("make", [TrainingBatches, lambda images, size, workers: in_order(images, size, workers)])
    def test_draw_no_number_of_the_process(
        self, images: LabelledImages, make: Callable[..., Any], workers: int
    ) -> None:
        still = LabelledImages(images.images, images.indices, lambda _: torch.zeros(1))
        loader = make(still, BATCH, workers)
        before = streams()
        for _ in range(2):
            list(loader)
        assert streams() == before


def in_order(images: LabelledImages, size: int, workers: int) -> Batches:
    return Batches(images, BatchSampler(SequentialSampler(images), size, drop_last=False), workers)


class TestFirstBatches:
    def test_are_the_same_whatever_has_been_loaded_before(self, images: LabelledImages) -> None:
        fresh, used = TrainingBatches(images, BATCH, seed=3), TrainingBatches(images, BATCH, seed=3)
        expected = loaded(first_batches(fresh, 3, epoch=9))
        list(used)
        next(iter(used))
        for number in (2, 5, 3):
            found = loaded(first_batches(used, number, epoch=9))
        assert same(found, expected)
        assert not same(loaded(itertools.islice(used, 3)), loaded(first_batches(used, 3, epoch=8)))

    def test_of_a_loader_that_draws_its_order(self, images: LabelledImages) -> None:
        drawn = DataLoader(images, BATCH, shuffle=True)
        before = streams()
        first = loaded(first_batches(drawn, 3, epoch=9))
        assert streams() == before
        list(drawn)
        assert same(loaded(first_batches(drawn, 3, epoch=9)), first)
        assert not same(loaded(first_batches(drawn, 3, epoch=8)), first)


def started(images: LabelledImages) -> tuple[Any, psutil.Process]:
    """Batches of which one has been loaded, and the process that loads them."""
    batches = iter(Batches(images, [[i] for i in range(40)], workers=1))
    next(batches)
    return batches, psutil.Process(batches._workers[0].pid)


def rest_of(batches: Any) -> None:
    try:
        list(batches)
    finally:
        # Else torch raises the error again wherever this process is when another child of its ends.
        batches._shutdown_workers()


class TestSignals:
    def test_ctrl_c_is_left_to_the_main_process(self, images: LabelledImages) -> None:
        batches, worker = started(images)
        worker.send_signal(signal.SIGINT)
        assert len(list(batches)) == 39
        assert worker.is_running()

    def test_a_worker_can_be_ended(self, images: LabelledImages) -> None:
        batches, worker = started(images)
        worker.terminate()
        # Which error depends on what it was doing.
        with pytest.raises((RuntimeError, OSError, EOFError)) as caught:
            rest_of(batches)
        assert "A process of the data loader has ended" in str(sentence_of(caught.value))
