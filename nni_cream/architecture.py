"""Architectures as immutable values: their text, their validation, and their form as an NNI sample."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nni_cream.errors import UserError


def block_label(stage: int, block: int) -> str:
    """Return the NNI label of the choice at ``block`` of ``stage``, both counted from 0."""
    return f"stage{stage}_block{block}"


@dataclass(frozen=True, order=True)
class CreamPath:
    """One choice per block of the Cream supernet: ``stages[s][b]`` is the index chosen for block ``b`` of stage ``s``.

    Stages are counted from 0; the first and the last have a single block with a single choice. The text form is the
    published one, ``[[0], [3], [3, 1], [3, 1], [3, 3, 3], [3, 3], [0]]`` (Peng et al., NeurIPS 2020). Paths compare
    like tuples, which gives them a total order.

    Raises:
        UserError: if there are no stages, a stage has no block, or a choice is not a whole number from 0 upwards.
    """

    stages: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if not self.stages:
            raise UserError("A Cream path needs at least one stage, such as [[0], [3], [3, 1], [3, 1], [3], [3], [0]].")
        for number, stage in enumerate(self.stages):
            if not stage:
                raise UserError(f"Stage {number} of the Cream path has no block; every stage needs at least one.")
            for choice in stage:
                if type(choice) is not int or choice < 0:
                    raise UserError(
                        f"Stage {number} of the Cream path holds {choice!r}, "
                        "but a choice is a whole number from 0 upwards."
                    )

    @classmethod
    def of(cls, stages: Sequence[Sequence[int]]) -> CreamPath:
        """Build a path from nested sequences, as JSON holds them."""
        return cls(tuple(tuple(stage) for stage in stages))

    @classmethod
    def parse(cls, text: str) -> CreamPath:
        """Read the text form, with or without the outer brackets and the commas between stages.

        Raises:
            UserError: if the text is not a list of lists of whole numbers.
        """
        hint = f"{text!r} is not a Cream path; write one list a stage, as in [[0], [3], [3, 1], [3, 1], [3], [3], [0]]."
        body = re.sub(r"\]\s*\[", "], [", text.strip())
        if not re.match(r"\[\s*\[", body):
            body = f"[{body}]"
        try:
            value = ast.literal_eval(body)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise UserError(hint) from None
        if not isinstance(value, list) or not all(isinstance(stage, list) for stage in value):
            raise UserError(hint)
        return cls.of(value)

    @classmethod
    def from_sample(cls, sample: Mapping[str, Any]) -> CreamPath:
        """Read an NNI sample of the Cream space, a dictionary from :func:`block_label` to the chosen index.

        Raises:
            UserError: if the sample has no ``stage0_block0`` or leaves a gap.
        """
        stages: list[list[int]] = []
        remaining = dict(sample)
        while block_label(len(stages), 0) in remaining:
            stage: list[int] = []
            while (label := block_label(len(stages), len(stage))) in remaining:
                stage.append(remaining.pop(label))
            stages.append(stage)
        if remaining or not stages:
            raise UserError(
                f"The sample is not one of the Cream space: {sorted(remaining) or 'it is empty'} "
                "does not continue stage0_block0, stage0_block1, …, stage1_block0, …"
            )
        return cls.of(stages)

    def to_sample(self) -> dict[str, int]:
        """Return the NNI sample that freezes the Cream space, without further operations or skips, to this path."""
        return {block_label(s, b): choice for s, stage in enumerate(self.stages) for b, choice in enumerate(stage)}

    def to_json(self) -> list[list[int]]:
        """Return the path as nested lists, for JSON."""
        return [list(stage) for stage in self.stages]

    def __str__(self) -> str:
        return str(self.to_json())
