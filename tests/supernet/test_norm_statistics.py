"""Running statistics of a fused cell are views of one tensor, which nobody may notice."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import torch

from nni_cream.supernet.mixed_cell import MixedCell
from tests.darts_reference import Together
from tests.supernet.test_fused_cell import assert_same, images, inputs, pair


def train_both(textbook: Together, fused: Together) -> None:
    for network in (textbook, fused):
        network(images())
    assert_same(list(fused.buffers()), list(textbook.buffers()))


def joint(network: Together) -> bool:
    return all(cell._running.is_joint() for cell in network.space.cells)


def test_a_copy_has_its_own() -> None:
    textbook, fused = pair()
    twin = copy.deepcopy(fused)
    before = [buffer.clone() for buffer in twin.buffers()]
    train_both(textbook, fused)
    assert all(torch.equal(a, b) for a, b in zip(twin.buffers(), before, strict=True))
    assert joint(twin)
    twin(images())
    assert_same(list(twin.buffers()), list(fused.buffers()))


def test_of_another_type() -> None:
    textbook, fused = (network.float().double() for network in pair())
    assert joint(fused)
    train_both(textbook, fused)


def test_that_others_have_replaced() -> None:
    textbook, fused = pair()
    state = {name: tensor.clone() for name, tensor in textbook.state_dict().items()}
    fused.load_state_dict(state, assign=True)
    assert not joint(fused)
    train_both(textbook, fused)


def test_in_other_memory() -> None:
    textbook, fused = pair()
    for name, buffer in fused.named_buffers():
        if "edges" in name:
            buffer.data = buffer.clone()
            break
    assert not joint(fused)
    train_both(textbook, fused)


def test_of_a_pickled_network() -> None:
    """Pickle keeps which tensor is which, but gives each memory of its own."""
    textbook, fused = pair()
    twin = pickle.loads(pickle.dumps(fused))
    assert not joint(twin)
    train_both(textbook, twin)


def test_from_a_file(tmp_path: Path) -> None:
    textbook, fused = pair()
    train_both(textbook, fused)
    torch.save(fused.state_dict(), tmp_path / "weights.pth")
    _, other = pair()
    other.load_state_dict(torch.load(tmp_path / "weights.pth"))
    assert joint(other)
    assert_same(list(other.buffers()), list(textbook.buffers()))


def test_that_a_norm_moves_by_itself() -> None:
    """A cell that runs as in the textbook after all can be differentiated: no norm has changed another's."""
    textbook, fused = pair()
    for network in (textbook, fused):
        for cell in network.space.cells:
            MixedCell.forward(cell, *inputs(cell)).sum().backward()
    assert_same(list(fused.buffers()), list(textbook.buffers()))
