from __future__ import annotations

import pickle

import pytest
import torch

from nni_cream.shards import Draw, Shuffled


def drawn(shuffled: Shuffled) -> list[tuple[int, int]]:
    return [(int(draw), draw.seed) for draw in shuffled]


class TestDraw:
    def test_is_a_position_wherever_one_is_wanted(self) -> None:
        draw = Draw(3, 2**62 + 1)
        assert ["a", "b", "c", "d"][draw] == "d"
        assert torch.arange(5)[draw] == 3
        assert draw == 3

    def test_reaches_another_process_whole(self) -> None:
        again = pickle.loads(pickle.dumps(Draw(3, 2**62 + 1)))
        assert (type(again), int(again), again.seed) == (Draw, 3, 2**62 + 1)


class TestShuffled:
    def test_gives_every_position_once_and_every_image_numbers_of_its_own(self) -> None:
        positions, seeds = zip(*drawn(Shuffled(200, seed=1)), strict=True)
        assert sorted(positions) == list(range(200))
        assert positions != tuple(range(200))
        assert len(set(seeds)) == 200

    def test_depends_on_nothing_else_than_seed_stream_epoch_and_lap(self) -> None:
        def of(seed: int, stream: int, epoch: int, lap: int) -> list[tuple[int, int]]:
            torch.manual_seed(epoch)
            shuffled = Shuffled(50, seed, stream)
            shuffled.set_epoch(epoch)
            shuffled.lap = lap
            before = torch.get_rng_state()
            found = drawn(shuffled)
            assert torch.equal(torch.get_rng_state(), before)
            return found

        first = of(2, 0, 0, 0)
        assert of(2, 0, 0, 0) == first
        others = [of(3, 0, 0, 0), of(2, 1, 0, 0), of(2, 0, 1, 0), of(2, 0, 0, 1), of(0, 2, 0, 0)]
        for other in others:
            positions = [position for position, _ in other]
            assert positions != [position for position, _ in first]
            assert not {seed for _, seed in other} & {seed for _, seed in first}

    @pytest.mark.parametrize("first", [0, 7, 50])
    def test_goes_on_in_the_middle(self, first: int) -> None:
        whole = Shuffled(50, seed=4)
        whole.set_epoch(2)
        whole.lap = 1
        expected = drawn(whole)
        again = Shuffled(50, seed=4)
        again.resume(2, 1, first)
        again.set_epoch(2)  # Lightning says so before every epoch, the one that it goes on with too
        assert drawn(again) == expected[first:]
        assert len(again) == 50
        # From there on, whole epochs.
        again.set_epoch(3)
        whole.set_epoch(3)
        assert drawn(again) == drawn(whole)

    def test_begins_another_epoch_from_its_beginning(self) -> None:
        again = Shuffled(50, seed=4)
        again.resume(2, 1, 7)
        again.set_epoch(3)
        assert (again.lap, again.first, len(drawn(again))) == (0, 0, 50)
