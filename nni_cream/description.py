"""The network of a Cream path in words: what each block is, and how large its output."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from nni_cream.architecture import CreamPath
from nni_cream.models.cream import (
    FIRST_STAGE,
    LAST_STAGE,
    STAGES,
    Choice,
    DilConvChoice,
    OwnChoice,
    block_strings,
    known_operations,
)


@dataclass(frozen=True)
class Block:
    """A block in words.

    Attributes:
        operation: its number, as in a path; None for a block that is the same in every path.
        short: a few letters, such as ``5×5, ×6`` for a kernel of 5 pixels and an expansion of 6.
        words: the same for those who do not know the notation.
    """

    operation: int | None
    short: str
    words: str


@dataclass(frozen=True)
class DescribedStage:
    """A stage in words: its number, the channels of its output, height and width of that in pixels, and its blocks."""

    number: int
    channels: int
    size: int
    blocks: tuple[Block, ...]


# So many fit into the box of a picture.
_LETTERS: Final = 14

_FIRST: Final = Block(None, "separable 3×3", "depthwise-separable convolution 3×3")
_LAST: Final = Block(None, "conv 1×1", "convolution 1×1")


def describe_path(path: CreamPath, resolution: int) -> list[DescribedStage]:
    """Return the stages of the network of ``path``, whose images have ``resolution`` pixels on each side.

    Raises:
        UserError: if the path does not fit the stage table.
    """
    block_strings(path)
    # The stem before them halves the image.
    size = -(-resolution // 2)
    described = [DescribedStage(0, _channels(FIRST_STAGE), size, (_FIRST,))]
    for number, (stage, chosen) in enumerate(zip(STAGES, path.stages[1:-1], strict=True), start=1):
        size = -(-size // stage.stride)
        described.append(DescribedStage(number, stage.channels, size, tuple(map(describe_operation, chosen))))
    described.append(DescribedStage(len(STAGES) + 1, _channels(LAST_STAGE), size, (_LAST,)))
    return described


def describe_operation(index: int) -> Block:
    """Return the operation with this number, as in a path, in words."""
    operation = known_operations()[index]
    if isinstance(operation, Choice):
        kernel = f"{operation.kernel}×{operation.kernel}"
        return Block(
            index,
            f"{kernel}, ×{operation.expansion}",
            f"inverted residual {kernel}, expansion {operation.expansion}",
        )
    if isinstance(operation, DilConvChoice):
        kernel = f"{operation.kernel}×{operation.kernel}"
        return Block(index, f"{kernel} dilated", f"dilated separable convolution {kernel}")
    if isinstance(operation, OwnChoice):
        name = operation.name
        return Block(index, name if len(name) <= _LETTERS else f"{name[: _LETTERS - 1]}…", name)
    return Block(index, operation.kind, f"residual unit ({operation.kind})")


def _channels(block: str) -> int:
    """Read the number of channels off timm's notation of a block."""
    found = re.search(r"_c(\d+)", block)
    assert found is not None
    return int(found[1])
