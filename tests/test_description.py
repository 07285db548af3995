from __future__ import annotations

import pytest
import torch
from torch import nn

from nni_cream.architecture import CreamPath
from nni_cream.description import Block, describe_operation, describe_path
from nni_cream.errors import UserError
from nni_cream.models import cream
from nni_cream.models.cream import OPERATIONS, build_child

PATH = CreamPath.parse("[0] [0] [3, 6] [4, 0, 8] [2, 9] [3] [0]")


@pytest.mark.parametrize("resolution", [32, 50, 224])
@torch.no_grad()
def test_channels_and_sizes_are_those_of_the_network(resolution: int) -> None:
    network = build_child(PATH, num_classes=10).eval()
    features = network.bn1(network.conv_stem(torch.zeros(1, 3, resolution, resolution)))
    described = describe_path(PATH, resolution)
    assert [stage.number for stage in described] == list(range(7))
    for stage, blocks, chosen in zip(described, network.blocks, PATH.stages, strict=True):
        features = blocks(features)
        assert features.shape == (1, stage.channels, stage.size, stage.size)
        assert len(stage.blocks) == len(chosen)
        if stage.number in (0, 6):
            assert stage.blocks[0].operation is None
        else:
            assert tuple(block.operation for block in stage.blocks) == chosen


def test_operations_in_words() -> None:
    words = [describe_operation(index) for index in range(len(OPERATIONS))]
    assert words[0] == Block(0, "3×3, ×4", "inverted residual 3×3, expansion 4")
    assert words[5] == Block(5, "7×7, ×6", "inverted residual 7×7, expansion 6")
    assert words[7] == Block(7, "5×5 dilated", "dilated separable convolution 5×5")
    assert words[8] == Block(8, "bottleneck", "residual unit (bottleneck)")
    assert len({block.short for block in words}) == len({block.words for block in words}) == 10


@pytest.mark.parametrize("text", ["[0] [1] [0]", "[0] [0] [0] [0] [0] [10] [0]", "[1] [0] [0] [0] [0] [0] [0]"])
def test_a_path_that_does_not_fit_is_refused(text: str) -> None:
    with pytest.raises(UserError):
        describe_path(CreamPath.parse(text), 32)


def test_operations_of_ones_own_by_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cream, "_OWN", {})
    for name, number in (("fused_3x3", 100), ("a_name_that_is_long", 101)):
        cream.register_block_operation(name, number=number)(lambda i, o, s: nn.Conv2d(i, o, 3, s, padding=1))
    assert describe_operation(100) == Block(100, "fused_3x3", "fused_3x3")
    assert describe_operation(101) == Block(101, "a_name_that_i…", "a_name_that_is_long")
